//! Hops 1, 2 and 11: the client HTTP API. Parses, authenticates, checks, formats; decides nothing about turns.
//!
//! Reading order: [`backend`] is the seam to the rest of the node; [`limits`] the table of bounds; [`auth`]
//! the outer layer that every route but health passes through; [`json`], [`fields`] and [`request`] turn
//! untrusted bytes into a checked request; [`generate`] sets it running, or goes on with it; [`tools`] is tool calling; [`text`] turns tokens into text without
//! splitting characters or leaking stop texts; [`wire`] the shapes that clients see; [`answer`] the whole
//! answer, [`stream`] the same piece by piece ([`sse`] over HTTP, [`position`] where a client is in it); [`reply`] the one map from errors to HTTP.
//! [`openapi`] documents it from the types; [`listen`] puts a router on a socket with bounds; [`peer`] is the door
//! for other nodes, [`clients`] that for the client library
//! and for HTTP/3.
//!
//! Not here: contracts, queues, templates, models (behind [`backend::Backend`]); admin routes and metrics,
//! which have a port of their own.

pub mod backend;
pub mod limits;
pub mod auth;
pub mod routes;
pub mod body;
pub mod json;
pub mod fields;
pub mod request;
pub mod tools;
pub mod flow;
pub mod assemble;
pub mod text;
pub mod answer;
pub mod stream;
pub mod sse;
pub mod position;
pub mod generate;
pub mod wire;
pub mod reply;
pub mod openapi;
pub mod leftover;
pub mod listen;
pub mod peer;
pub mod clients;
mod http3;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use axum::middleware::from_fn_with_state;
use axum::routing::{get, post};
use axum::{Extension, Router};

use self::backend::Backend;
use self::body::BodyBudget;
use self::limits::Pace;

/// The client API over a backend. Every route but health, version and the API document needs a key. Bodies being
/// read take `body_bytes_max` at once.
pub fn router<B: Backend>(backend: Arc<B>, body_bytes_max: usize) -> Router {
    router_paced(backend, Pace::default(), body_bytes_max)
}

fn router_paced<B: Backend>(backend: Arc<B>, pace: Pace, body_bytes_max: usize) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(routes::chat::<B>))
        .route("/v1/completions", post(routes::completions::<B>))
        .route("/v1/embeddings", post(routes::embeddings))
        .route("/v1/models", get(routes::models::<B>))
        .route("/v1/models/{model}", get(routes::model::<B>))
        .route("/healthz", get(routes::liveness))
        .route("/livez", get(routes::liveness))
        .route("/readyz", get(routes::readiness::<B>))
        .route("/health", get(routes::readiness::<B>))
        .route("/version", get(routes::version))
        .route("/openapi.json", get(openapi::serve))
        .fallback(routes::no_route)
        .method_not_allowed_fallback(routes::no_method)
        .layer(Extension(pace))
        .layer(Extension(BodyBudget::new(body_bytes_max)))
        // Layers wrap what stands above them, fallbacks included: the last one is the outermost.
        .layer(from_fn_with_state(backend.clone(), auth::authenticate::<B>))
        .layer(from_fn_with_state(backend.clone(), auth::identify::<B>))
        .with_state(backend)
}
