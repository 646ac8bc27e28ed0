//! Adapter versions: the forms of uploads, and removal. What becomes of an upload is `app::upload`'s business.

use axum::body::Body;
use axum::extract::multipart::MultipartError;
use axum::extract::{Multipart, Path, State};
use axum::http::{Response, StatusCode};
use coordinator::registry::command::Action;
use shared::error::{ErrorKind, RequestError};
use shared::id::{AdapterName, TenantId};

use super::api::{AdapterView, Done};
use super::{Admin, Shared, answer, parse};
use crate::app::upload::{Part, Upload};

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
    let mut upload = admin.app.begin_upload(&tenant, name).await?;
    receive(form, &mut upload).await?;
    let record = admin.app.finish_upload(upload).await?;
    tracing::info!(adapter = %record.name, hash = %record.hash.short(), bytes = record.bytes, "adapter version stored");
    Ok(AdapterView::of(&record))
}

async fn remove_version(admin: &Admin, tenant: &str, name: &str) -> Result<Done, RequestError> {
    let (tenant, name) = owned(tenant, name)?;
    let applied = admin.app.change(Action::RemoveAdapterVersion { tenant, name }).await?;
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

/// The form's parts, handed on as they arrive. The body limit bounds their size.
async fn receive(form: &mut Multipart, upload: &mut Upload) -> Result<(), RequestError> {
    while let Some(mut field) = form.next_field().await.map_err(|error| malformed(&error))? {
        let part = match field.name() {
            Some("config") => Part::Config,
            Some("weights") => Part::Weights,
            Some("gguf") => Part::Gguf,
            other => {
                let message =
                    format!("the form has a part {:?}; send config and weights, or gguf", other.unwrap_or_default());
                return Err(RequestError::new(ErrorKind::Invalid, "invalid_body", message));
            }
        };
        upload.begin(part)?;
        while let Some(bytes) = field.chunk().await.map_err(|error| malformed(&error))? {
            upload.write(bytes).await?;
        }
    }
    Ok(())
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
