//! Adapter versions: an upload is checked in full, stored under its content hash, then registered.
//!
//! Order matters: the bytes are durable before the registry names them, so a crash in between leaves an
//! unreferenced object and never a name without content.

use axum::body::Body;
use axum::extract::multipart::MultipartError;
use axum::extract::{Multipart, Path, State};
use axum::http::{Response, StatusCode};
use coordinator::registry::command::Action;
use coordinator::registry::record::{AdapterKind, AdapterRecord};
use model::adapter::AdapterFiles;
use shared::error::{ErrorKind, RequestError};
use shared::id::{AdapterName, TenantId};

use super::api::{AdapterView, Done};
use super::{Admin, Shared, answer, parse};

pub(super) async fn upload(
    State(admin): Shared,
    Path((tenant, name)): Path<(String, String)>,
    form: Result<Multipart, axum::extract::multipart::MultipartRejection>,
) -> Response<Body> {
    let outcome = match form {
        Ok(mut form) => {
            let outcome = store(&admin, &tenant, &name, &mut form).await;
            if outcome.is_err() {
                drain(&mut form).await;
            }
            outcome
        }
        Err(rejection) => Err(RequestError::new(
            ErrorKind::Invalid,
            "invalid_body",
            format!("send multipart/form-data with config and weights, or gguf ({rejection})"),
        )),
    };
    answer(StatusCode::CREATED, outcome)
}

pub(super) async fn remove(State(admin): Shared, Path((tenant, name)): Path<(String, String)>) -> Response<Body> {
    answer(StatusCode::OK, remove_version(&admin, &tenant, &name).await)
}

async fn store(admin: &Admin, tenant: &str, name: &str, form: &mut Multipart) -> Result<AdapterView, RequestError> {
    let (tenant, name) = owned(tenant, name)?;
    let snapshot = admin.app.registry().snapshot();
    let owner = snapshot
        .tenant(&tenant)
        .cloned()
        .ok_or_else(|| RequestError::new(ErrorKind::NotFound, "not_found", format!("there is no tenant {tenant}")))?;
    let files = read_files(form).await?;
    let stored = admin.app.store_adapter(owner, &name, files).await?;
    let (kind, kind_text) = if stored.is_gguf { (AdapterKind::Gguf, "gguf") } else { (AdapterKind::Peft, "peft") };
    let record = AdapterRecord {
        name: name.clone(),
        hash: stored.hash,
        bytes: stored.bytes,
        rank: stored.rank,
        kind,
        uploaded_at_s: admin.app.wall_s(),
        base: name.base.clone(),
    };
    let view = AdapterView {
        name: name.clone(),
        hash: stored.hash.to_string(),
        bytes: record.bytes,
        rank: record.rank,
        kind: kind_text.to_owned(),
        uploaded_at: record.uploaded_at_s,
    };
    let action = Action::AddAdapterVersion { tenant: tenant.clone(), adapter: record };
    if let Err(error) = admin.app.registry().apply(action).await {
        admin.app.delete_unless_used(&tenant, &stored.hash);
        return Err(error.into());
    }
    tracing::info!(adapter = %name, hash = %stored.hash.short(), bytes = stored.bytes, "adapter version stored");
    Ok(view)
}

async fn remove_version(admin: &Admin, tenant: &str, name: &str) -> Result<Done, RequestError> {
    let (tenant, name) = owned(tenant, name)?;
    let applied = admin.app.registry().apply(Action::RemoveAdapterVersion { tenant, name }).await?;
    for event in &applied.events {
        admin.app.on_registry_event(event);
    }
    Ok(Done { done: "adapter version removed".to_owned(), epoch: applied.epoch })
}

fn owned(tenant: &str, name: &str) -> Result<(TenantId, AdapterName), RequestError> {
    let tenant: TenantId = parse("tenant", tenant)?;
    let name: AdapterName = parse("name", name)?;
    if name.client != tenant {
        let message = format!(
            "adapter {name} names client {}, not {tenant}; hint: the name starts with the tenant id",
            name.client
        );
        return Err(RequestError::field("invalid_value", "name", message));
    }
    Ok((tenant, name))
}

/// The form's parts: `config` and `weights`, or `gguf`. The body limit bounds their size.
async fn read_files(form: &mut Multipart) -> Result<AdapterFiles, RequestError> {
    let (mut config, mut weights, mut gguf) = (None, None, None);
    while let Some(field) = form.next_field().await.map_err(|error| malformed(&error))? {
        let slot = match field.name() {
            Some("config") => &mut config,
            Some("weights") => &mut weights,
            Some("gguf") => &mut gguf,
            other => {
                let message =
                    format!("the form has a part {:?}; send config and weights, or gguf", other.unwrap_or_default());
                return Err(RequestError::new(ErrorKind::Invalid, "invalid_body", message));
            }
        };
        if slot.is_some() {
            return Err(RequestError::new(ErrorKind::Invalid, "invalid_body", "a part of the form comes twice"));
        }
        *slot = Some(field.bytes().await.map_err(|error| malformed(&error))?.into());
    }
    match (config, weights, gguf) {
        (Some(config), Some(weights), None) => Ok(AdapterFiles::Peft { config, weights }),
        (None, None, Some(gguf)) => Ok(AdapterFiles::Gguf(gguf)),
        _ => Err(RequestError::new(
            ErrorKind::Invalid,
            "invalid_body",
            "send the parts config and weights (PEFT), or the part gguf",
        )),
    }
}

/// Reads what is left, within the body limit: a client that is still sending would see a broken connection
/// instead of the answer.
async fn drain(form: &mut Multipart) {
    while let Ok(Some(mut field)) = form.next_field().await {
        while let Ok(Some(_)) = field.chunk().await {}
    }
}

fn malformed(error: &MultipartError) -> RequestError {
    if error.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return RequestError::new(
            ErrorKind::TooLarge,
            "lora_byte_limit_exceeded",
            "the adapter is larger than this cluster accepts; hint: adapters.file_mib_max in cluster.toml",
        );
    }
    RequestError::new(ErrorKind::Invalid, "invalid_body", format!("the form cannot be read: {error}"))
}
