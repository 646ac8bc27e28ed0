//! What a request's `model` means under its tenant's contract (core). Called by the gateway after authentication.
//!
//! Only the caller's own contract is looked at, so another tenant's name and a name nobody has are the same
//! case and give the same bytes. A name never reaches the base model unless it is the base model's own or the
//! contract's fallback says so.

use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::{AdapterName, BaseName, TaskName};
use shared::request::AdapterPin;
use shared::tenant::{Fallback, TenantContract};

/// What a request will run on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Base model.
    pub base: BaseName,
    /// Pinned adapter content; `None` is the base itself.
    pub adapter: Option<AdapterPin>,
    /// Line of traffic; a version named in full counts as its task.
    pub task: Option<TaskName>,
    /// The task has no adapter yet and the contract lets the base answer.
    pub fell_back: bool,
}

/// Finds what `requested` means.
///
/// # Errors
/// - 400 `model_required` for an empty name,
/// - 404 `model_not_found` for every name that is not the tenant's own, always the same bytes,
/// - 403 `model_not_allowed` for a base of the contract that may not be named,
/// - 409 `adapter_not_ready` for a task without adapter when the contract's fallback is to refuse.
pub fn resolve(contract: &TenantContract, requested: &str) -> Result<Target, RequestError> {
    if requested.trim().is_empty() {
        let message = "the request names no model; hint: GET /v1/models lists what this key may use";
        return Err(RequestError::field("model_required", "model", message));
    }
    if let Some((task, pointer)) = requested.parse().ok().and_then(|task: TaskName| contract.tasks.get_key_value(&task))
    {
        return match pointer {
            Some(to) => Ok(pinned(&to.adapter, to.hash, task.clone())),
            None => without_adapter(contract, task),
        };
    }
    let version = requested.parse().ok().and_then(|name: AdapterName| contract.versions.get_key_value(&name));
    if let Some((name, hash)) = version {
        return Ok(pinned(name, *hash, name.task.clone()));
    }
    let base = contract.bases.iter().find(|base| base.as_str() == requested).ok_or_else(not_found)?;
    if contract.allow_base {
        return Ok(Target { base: base.clone(), adapter: None, task: None, fell_back: false });
    }
    let message =
        "this contract does not allow naming the base model; hint: name one of your tasks, see GET /v1/models";
    Err(of_model(ErrorKind::Forbidden, "model_not_allowed", message))
}

fn of_model(kind: ErrorKind, code: &'static str, message: impl Into<std::borrow::Cow<'static, str>>) -> RequestError {
    RequestError { param: Some("model".into()), ..RequestError::new(kind, code, message) }
}

/// Echoes nothing, so that it is the same for every name.
fn not_found() -> RequestError {
    let message = "the model does not exist or is not yours; hint: GET /v1/models lists what this key may use";
    of_model(ErrorKind::NotFound, "model_not_found", message)
}

fn pinned(name: &AdapterName, hash: ContentHash, task: TaskName) -> Target {
    let adapter = AdapterPin { name: name.clone(), hash };
    Target { base: name.base.clone(), adapter: Some(adapter), task: Some(task), fell_back: false }
}

/// The default base, where a task falls back to. The registry keeps at least one.
fn default_base(contract: &TenantContract) -> Result<&BaseName, RequestError> {
    contract.bases.first().ok_or_else(not_found)
}

fn without_adapter(contract: &TenantContract, task: &TaskName) -> Result<Target, RequestError> {
    match contract.fallback {
        Fallback::Base => {
            let base = default_base(contract)?.clone();
            Ok(Target { base, adapter: None, task: Some(task.clone()), fell_back: true })
        }
        // 409, not 503: waiting does not bring an adapter, an upload does.
        Fallback::Refuse => Err(of_model(
            ErrorKind::Conflict,
            "adapter_not_ready",
            format!(
                "task {task} has no adapter yet and the contract forbids answering with the base model; hint: upload a version and point the task at it"
            ),
        )),
    }
}

/// One line of `GET /v1/models`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VisibleModel {
    /// What to write in the `model` field.
    pub id: String,
    /// Base model it runs on.
    pub base: BaseName,
    /// Version behind it; `None` is the base itself.
    pub version: Option<AdapterName>,
}

/// Every name that [`resolve`] accepts under this contract: tasks, versions, bases, each in order.
pub fn visible_models(contract: &TenantContract) -> Vec<VisibleModel> {
    let task = |name: &TaskName| {
        let target = resolve(contract, name.as_str()).ok()?;
        let version = target.adapter.map(|pin| pin.name);
        Some(VisibleModel { id: name.to_string(), base: target.base, version })
    };
    let version = |name: &AdapterName| VisibleModel {
        id: name.to_string(),
        base: name.base.clone(),
        version: Some(name.clone()),
    };
    let base = |base: &BaseName| VisibleModel { id: base.to_string(), base: base.clone(), version: None };
    let bases = contract.bases.iter().filter(|_| contract.allow_base).map(base);
    contract.tasks.keys().filter_map(task).chain(contract.versions.keys().map(version)).chain(bases).collect()
}

#[cfg(test)]
mod tests;
