//! The outer layers of every route: a request id, a net under panics, and the key. The key alone says who the
//! caller is; a header that names another tenant is refused (and reported to the backend for the audit).

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, Response};
use axum::middleware::Next;
use futures_util::FutureExt;
use shared::error::{ErrorKind, RequestError};
use shared::id::RequestId;

use super::backend::Backend;
use super::limits::KEY_BYTES_MAX;
use super::reply;
use super::request::other_tenant;

/// Paths that answer without a key. Everything else, unknown paths included, needs one.
pub const OPEN_PATHS: [&str; 6] = ["/healthz", "/livez", "/readyz", "/health", "/version", "/openapi.json"];

/// Headers that some gateways use to name a tenant.
const TENANT_HEADERS: [&str; 3] = ["x-tenant-id", "x-tenant", "x-tenantry-tenant"];

/// The authenticated caller, as handlers find it in the request's extensions.
#[derive(Debug, Clone)]
pub struct Caller<W>(pub W);

/// Outermost: gives the response an id and a duration, and turns a panic into a 500.
pub async fn identify<B: Backend>(State(backend): State<Arc<B>>, request: Request, next: Next) -> Response<Body> {
    let id = request_id(request.headers());
    let started = backend.clock().now();
    let mut response = match AssertUnwindSafe(next.run(request)).catch_unwind().await {
        Ok(response) => response,
        Err(_) => {
            tracing::error!(request_id = %id, "a request handler panicked");
            reply::failed(&RequestError::internal())
        }
    };
    let took = backend.clock().now().saturating_duration_since(started);
    let headers = response.headers_mut();
    reply::set(headers, "x-request-id", id);
    reply::set(headers, "openai-processing-ms", took.as_millis());
    reply::set(headers, "x-content-type-options", "nosniff");
    response
}

/// Lets a request with a valid key through, with a [`Caller`] in its extensions.
pub async fn authenticate<B: Backend>(
    State(backend): State<Arc<B>>,
    mut request: Request,
    next: Next,
) -> Response<Body> {
    if OPEN_PATHS.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let who = match bearer(request.headers()).and_then(|key| backend.authenticate(key)) {
        Ok(who) => who,
        Err(error) => return reply::failed(&error),
    };
    if names_other_tenant(request.headers(), backend.tenant(&who).as_str()) {
        backend.impersonation_refused(&who);
        return reply::failed(&other_tenant());
    }
    request.extensions_mut().insert(Caller(who));
    next.run(request).await
}

/// The client's own id if it is harmless to repeat, otherwise a fresh one. Never used as a key.
fn request_id(headers: &HeaderMap) -> String {
    let harmless = |text: &&str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:/".contains(&byte);
        !text.is_empty() && text.len() <= 128 && text.bytes().all(plain)
    };
    let sent = headers.get("x-request-id").and_then(|value| value.to_str().ok()).filter(harmless);
    sent.map_or_else(|| format!("req_{}", RequestId::random()), ToOwned::to_owned)
}

fn bearer(headers: &HeaderMap) -> Result<&str, RequestError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let key = match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok().and_then(|value| {
            let (scheme, key) = value.split_once(' ')?;
            scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
        }),
        _ => None,
    };
    key.filter(|key| !key.is_empty() && key.len() <= KEY_BYTES_MAX).ok_or_else(|| {
        RequestError::new(
            ErrorKind::Unauthenticated,
            "invalid_api_key",
            "no usable API key; hint: send exactly one header `Authorization: Bearer <key>`",
        )
    })
}

fn names_other_tenant(headers: &HeaderMap, tenant: &str) -> bool {
    TENANT_HEADERS.iter().flat_map(|name| headers.get_all(*name)).any(|value| value.as_bytes() != tenant.as_bytes())
}
