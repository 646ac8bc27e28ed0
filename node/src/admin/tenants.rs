//! Tenants, keys and tasks: bodies in, registry commands out.

use std::collections::BTreeSet;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{Response, StatusCode};
use coordinator::auth::{KeyId, Scope};
use coordinator::membership::MemberSpec;
use coordinator::registry::command::{Action, Applied, Command, Event, TenantPatch, TenantSpec};
use coordinator::route::{DEFAULT_POOL, Place};
use serde_json::Value;
use shared::error::{ErrorKind, RequestError};
use shared::id::{BaseName, TaskName, TenantId};
use shared::tenant::{Fallback, Tier};

use super::api::{
    ContractPatch, CreateKey, CreateTenant, Done, NewKey, PointTask, TenantCreated, TenantList, TenantView,
    UpdateTenant,
};
use super::{Admin, Json, Shared, answer, parse};
use crate::cluster::member_spec;

pub(super) async fn list(State(admin): Shared) -> Response<Body> {
    let snapshot = admin.app.registry().snapshot();
    let tenants = snapshot.tenants().iter().map(|tenant| TenantView::of(tenant.record())).collect();
    answer(StatusCode::OK, Ok(TenantList { epoch: snapshot.epoch(), tenants }))
}

pub(super) async fn show(State(admin): Shared, Path(tenant): Path<String>) -> Response<Body> {
    answer(StatusCode::OK, parse("tenant", &tenant).and_then(|tenant| view(&admin, &tenant)))
}

pub(super) async fn create(State(admin): Shared, Json(body): Json<CreateTenant>) -> Response<Body> {
    answer(StatusCode::CREATED, create_tenant(&admin, body).await)
}

pub(super) async fn update(
    State(admin): Shared,
    Path(tenant): Path<String>,
    Json(body): Json<UpdateTenant>,
) -> Response<Body> {
    answer(StatusCode::OK, update_tenant(&admin, &tenant, body).await)
}

pub(super) async fn suspend(State(admin): Shared, Path(tenant): Path<String>) -> Response<Body> {
    answer(StatusCode::OK, change(&admin, &tenant, |tenant| Action::SuspendTenant { tenant }).await)
}

pub(super) async fn resume(State(admin): Shared, Path(tenant): Path<String>) -> Response<Body> {
    answer(StatusCode::OK, change(&admin, &tenant, |tenant| Action::ResumeTenant { tenant }).await)
}

pub(super) async fn remove(State(admin): Shared, Path(tenant): Path<String>) -> Response<Body> {
    let at_s = admin.app.wall_s();
    answer(StatusCode::OK, change(&admin, &tenant, |tenant| Action::DeleteTenant { tenant, at_s }).await)
}

pub(super) async fn add_key(
    State(admin): Shared,
    Path(tenant): Path<String>,
    Json(body): Json<CreateKey>,
) -> Response<Body> {
    answer(StatusCode::CREATED, add_tenant_key(&admin, &tenant, &body).await)
}

pub(super) async fn revoke_key(State(admin): Shared, Path((tenant, key)): Path<(String, String)>) -> Response<Body> {
    let at_s = admin.app.wall_s();
    let Ok(key_id) = key.parse::<KeyId>() else {
        let error =
            RequestError::new(ErrorKind::NotFound, "not_found", "there is no such key; hint: tenantry ctl key list");
        return answer::<Done>(StatusCode::OK, Err(error));
    };
    answer(StatusCode::OK, change(&admin, &tenant, |tenant| Action::RevokeKey { tenant, key_id, at_s }).await)
}

pub(super) async fn point_task(
    State(admin): Shared,
    Path((tenant, task)): Path<(String, String)>,
    Json(body): Json<PointTask>,
) -> Response<Body> {
    let outcome = match parse::<TaskName>("task", &task) {
        Ok(task) => change(&admin, &tenant, |tenant| Action::PointTask { tenant, task, version: body.version }).await,
        Err(error) => Err(error),
    };
    answer(StatusCode::OK, outcome)
}

pub(super) async fn remove_task(State(admin): Shared, Path((tenant, task)): Path<(String, String)>) -> Response<Body> {
    let outcome = match parse::<TaskName>("task", &task) {
        Ok(task) => change(&admin, &tenant, |tenant| Action::RemoveTask { tenant, task }).await,
        Err(error) => Err(error),
    };
    answer(StatusCode::OK, outcome)
}

fn view(admin: &Admin, tenant: &TenantId) -> Result<TenantView, RequestError> {
    let snapshot = admin.app.registry().snapshot();
    let found = snapshot.tenant(tenant).map(|found| TenantView::of(found.record()));
    found.ok_or_else(|| RequestError::new(ErrorKind::NotFound, "not_found", format!("there is no tenant {tenant}")))
}

async fn create_tenant(admin: &Admin, body: CreateTenant) -> Result<TenantCreated, RequestError> {
    let CreateTenant { id, display_name, contact, tasks, contract } = body;
    let config = admin.app.config();
    let tier = contract.tier.unwrap_or(Tier::Shared);
    let default_base = || config.bases.iter().take(1).map(|base| base.name.clone()).collect();
    let bases = contract.bases.clone().unwrap_or_else(default_base);
    check_place(admin, &bases, non_empty(contract.region.clone()), non_empty(contract.pool.clone()))?;
    let spec = TenantSpec {
        display_name: display_name.unwrap_or_else(|| id.to_string()),
        contact,
        tier,
        weight: contract.weight.unwrap_or(1),
        bases,
        allow_base: contract.allow_base.unwrap_or(true),
        fallback: contract.fallback.unwrap_or(Fallback::Refuse),
        limits: contract.limits_over(config.limits(tier)),
        region: non_empty(contract.region.clone()),
        pool: non_empty(contract.pool.clone()),
        cost_center: non_empty(contract.cost_center.clone()),
        tasks: tasks.into_iter().collect(),
        tenant: id.clone(),
    };
    let at_s = admin.app.wall_s();
    let secrets = admin.app.registry().secrets();
    let (key, record) = secrets.api_key(BTreeSet::from([Scope::Infer]), at_s, None);
    let key_id = record.id.to_string();
    let action = secrets.create_tenant(spec, vec![record], at_s);
    admin.app.registry().apply(action).await?;
    tracing::info!(tenant_id = %id, "tenant created");
    Ok(TenantCreated { tenant: view(admin, &id)?, key: NewKey { id: key_id, key: key.reveal().to_owned() } })
}

/// A base that the cluster does not serve, or not there, would only be noticed by the tenant's first request.
fn check_place(
    admin: &Admin,
    bases: &[BaseName],
    region: Option<String>,
    pool: Option<String>,
) -> Result<(), RequestError> {
    check_bases(admin, bases)?;
    let nodes: Vec<MemberSpec> = admin.app.config().nodes.iter().map(member_spec).collect();
    for base in bases {
        let place =
            Place { base: base.clone(), pool: pool.clone().unwrap_or_else(default_pool), region: region.clone() };
        if nodes.iter().any(|node| place.admits(node)) {
            continue;
        }
        let in_pool = nodes.iter().any(|node| node.pool == place.pool);
        let field = if in_pool && region.is_some() { "contract.region" } else { "contract.pool" };
        let place = match &region {
            Some(region) => format!("in pool {} and region {region}", place.pool),
            None => format!("in pool {}", place.pool),
        };
        let message =
            format!("no node {place} serves the base {base}; hint: [[nodes]] of the cluster file says who does");
        return Err(RequestError::field("invalid_value", field, message));
    }
    Ok(())
}

fn default_pool() -> String {
    DEFAULT_POOL.to_owned()
}

fn check_bases(admin: &Admin, bases: &[BaseName]) -> Result<(), RequestError> {
    let served = &admin.app.config().bases;
    match bases.iter().find(|base| !served.iter().any(|served| served.name == **base)) {
        None => Ok(()),
        Some(unknown) => {
            let names: Vec<String> = served.iter().map(|base| base.name.to_string()).collect();
            let message = format!("this cluster has no base {unknown}; it has {}", names.join(", "));
            Err(RequestError::field("invalid_value", "contract.bases", message))
        }
    }
}

async fn update_tenant(admin: &Admin, tenant: &str, body: UpdateTenant) -> Result<TenantView, RequestError> {
    let tenant: TenantId = parse("tenant", tenant)?;
    let UpdateTenant { display_name, contact, expected_epoch, contract } = body;
    let present = view(admin, &tenant)?;
    if contract.bases.is_some() || contract.region.is_some() || contract.pool.is_some() {
        let wanted = |new: &Option<String>, old: &Option<String>| non_empty(new.as_ref().or(old.as_ref()).cloned());
        let (region, pool) = (wanted(&contract.region, &present.region), wanted(&contract.pool, &present.pool));
        check_place(admin, contract.bases.as_ref().unwrap_or(&present.bases), region, pool)?;
    }
    let patch = TenantPatch {
        display_name,
        contact: contact.map(|text| non_empty(Some(text))),
        tier: contract.tier,
        weight: contract.weight,
        bases: contract.bases.clone(),
        allow_base: contract.allow_base,
        fallback: contract.fallback,
        limits: changes_limits(&contract).then(|| contract.limits_over(present.limits)),
        region: contract.region.map(|text| non_empty(Some(text))),
        pool: contract.pool.map(|text| non_empty(Some(text))),
        cost_center: contract.cost_center.map(|text| non_empty(Some(text))),
    };
    // Limits are merged with those just read, so somebody else's change in between must not be lost.
    let expected_epoch = expected_epoch.or_else(|| patch.limits.is_some().then_some(present.epoch));
    let action = Action::UpdateTenant { tenant: tenant.clone(), patch: Box::new(patch) };
    admin.app.registry().apply(Command { expected_epoch, action }).await?;
    view(admin, &tenant)
}

fn changes_limits(patch: &ContractPatch) -> bool {
    let counts = [
        patch.concurrency,
        patch.queue_depth,
        patch.requests_per_minute,
        patch.tokens_per_minute,
        patch.burst_requests,
    ];
    patch.deadline_ms.is_some() || counts.iter().any(Option::is_some)
}

async fn add_tenant_key(admin: &Admin, tenant: &str, body: &CreateKey) -> Result<NewKey, RequestError> {
    let tenant: TenantId = parse("tenant", tenant)?;
    let at_s = admin.app.wall_s();
    let expires_at_s = body.expires_in_s.map(|seconds| at_s.saturating_add(seconds));
    let (key, record) = admin.app.registry().secrets().api_key(BTreeSet::from([Scope::Infer]), at_s, expires_at_s);
    let id = record.id.to_string();
    admin.app.registry().apply(Action::AddKey { tenant, key: record }).await?;
    Ok(NewKey { id, key: key.reveal().to_owned() })
}

/// Applies one action to one tenant and tells the rest of the node what followed from it.
async fn change(admin: &Admin, tenant: &str, action: impl FnOnce(TenantId) -> Action) -> Result<Done, RequestError> {
    let tenant: TenantId = parse("tenant", tenant)?;
    let Applied { epoch, events } = admin.app.change(action(tenant)).await?;
    let done = events.first().map_or_else(|| "nothing to change".to_owned(), describe);
    Ok(Done { done, epoch })
}

/// The event's name in words, without its content.
fn describe(event: &Event) -> String {
    let name = serde_json::to_value(event).unwrap_or_default();
    let name = match &name {
        Value::Object(map) => map.keys().next().cloned().unwrap_or_default(),
        other => other.as_str().unwrap_or_default().to_owned(),
    };
    let mut words = String::new();
    for (index, letter) in name.chars().enumerate() {
        if letter.is_uppercase() && index > 0 {
            words.push(' ');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

fn non_empty(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}
