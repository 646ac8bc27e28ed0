//! The operators' API on its own port: tenants, keys, adapter versions, tasks, status, metrics.
//!
//! Every route but health needs the node's admin key. Handlers translate bodies to registry commands; the
//! registry decides. Reading order: [`api`] is what operators send and see, `tenants` and `adapters` are
//! the handlers, `status` and `cluster` read the state of the node and of its cluster.

pub mod api;
mod adapters;
mod cluster;
mod status;
mod tenants;

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, FromRequest, Request, State};
use axum::http::{Response, StatusCode, header};
use axum::middleware::Next;
use axum::response::IntoResponse;
use axum::routing::{delete, get, post, put};
use coordinator::auth::AdminKey;
use metrics_exporter_prometheus::PrometheusHandle;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shared::error::{ErrorKind, RequestError};

use crate::app::App;
use crate::gateway::reply;

/// Largest JSON body of an admin call.
const BODY_BYTES_MAX: usize = 1 << 20;
/// What multipart framing may add to an adapter's files.
const FORM_OVERHEAD_BYTES: usize = 1 << 20;

/// What the admin routes share.
pub struct Admin {
    /// The node.
    pub app: Arc<App>,
    /// Checks the operator's credential.
    pub key: AdminKey,
    /// Renders `/metrics`.
    pub metrics: PrometheusHandle,
}

type Shared = State<Arc<Admin>>;

/// The admin API.
pub fn router(admin: Arc<Admin>) -> Router {
    let file_bytes_max = admin.app.config().adapters.file_bytes_max;
    let guarded = Router::new()
        .route("/admin/v1/status", get(status::show))
        .route("/admin/v1/tenants", get(tenants::list).post(tenants::create))
        .route("/admin/v1/tenants/{tenant}", get(tenants::show).patch(tenants::update).delete(tenants::remove))
        .route("/admin/v1/tenants/{tenant}/suspend", post(tenants::suspend))
        .route("/admin/v1/tenants/{tenant}/resume", post(tenants::resume))
        .route("/admin/v1/tenants/{tenant}/keys", post(tenants::add_key))
        .route("/admin/v1/tenants/{tenant}/keys/{key}", delete(tenants::revoke_key))
        .route("/admin/v1/tenants/{tenant}/tasks/{task}", put(tenants::point_task).delete(tenants::remove_task))
        .route("/admin/v1/cluster", get(cluster::show))
        .route("/admin/v1/cluster/tenants", get(cluster::tenants))
        .route("/admin/v1/drain", post(cluster::drain))
        .route("/metrics", get(status::metrics))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX));
    let uploads = Router::new()
        .route("/admin/v1/tenants/{tenant}/adapters/{name}", put(adapters::upload).delete(adapters::remove))
        .layer(DefaultBodyLimit::max(file_bytes_max + FORM_OVERHEAD_BYTES));
    guarded
        .merge(uploads)
        .fallback(|| async {
            failed(&RequestError::new(
                ErrorKind::NotFound,
                "not_found",
                "there is no such admin route; hint: see /openapi.json",
            ))
        })
        .layer(axum::middleware::from_fn_with_state(admin.clone(), authenticate))
        .merge(
            Router::new()
                .route("/healthz", get(|| async { "ok" }))
                .route("/readyz", get(status::ready))
                .route("/openapi.json", get(status::openapi)),
        )
        .with_state(admin)
}

/// Lets only the holder of the admin key through.
async fn authenticate(State(admin): Shared, request: Request, next: Next) -> Response<Body> {
    let presented = request
        .headers()
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.strip_prefix("Bearer "))
        .unwrap_or_default();
    match admin.key.verify(presented) {
        Ok(_) => next.run(request).await,
        Err(_) => failed(&RequestError::new(
            ErrorKind::Unauthenticated,
            "invalid_admin_key",
            "the admin key is missing or wrong; hint: send Authorization: Bearer with the content of admin.key in the node's data folder",
        )),
    }
}

fn failed(error: &RequestError) -> Response<Body> {
    reply::failed(error)
}

fn answer<T: Serialize>(status: StatusCode, outcome: Result<T, RequestError>) -> Response<Body> {
    match outcome {
        Ok(body) => reply::json(status, &body),
        Err(error) => failed(&error),
    }
}

/// A JSON body whose mistakes are answered in the API's own error form.
struct Json<T>(T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Response<Body>;

    async fn from_request(request: Request, state: &S) -> Result<Self, Response<Body>> {
        let bytes = match axum::body::Bytes::from_request(request, state).await {
            Ok(bytes) => bytes,
            Err(rejection) if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE => {
                return Err(failed(&RequestError::new(ErrorKind::TooLarge, "body_too_large", "the body is too large")));
            }
            Err(rejection) => return Err(rejection.into_response()),
        };
        let bytes = if bytes.is_empty() { b"{}".as_slice() } else { &bytes };
        serde_json::from_slice(bytes).map(Json).map_err(|error| {
            failed(&RequestError::new(ErrorKind::Invalid, "invalid_body", format!("the body does not fit: {error}")))
        })
    }
}

/// A path segment as an identifier.
fn parse<T: std::str::FromStr<Err = shared::id::InvalidId>>(
    param: &'static str,
    text: &str,
) -> Result<T, RequestError> {
    text.parse().map_err(|error: shared::id::InvalidId| RequestError::field("invalid_value", param, error.to_string()))
}
