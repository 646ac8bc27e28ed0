//! Hops 1, 2 and 11: the client HTTP API. Parses, authenticates, checks, formats; decides nothing about turns.
//!
//! Reading order: [`backend`] is the seam to the rest of the node; [`limits`] the table of bounds; [`auth`]
//! the outer layer that every route but health passes through; [`json`], [`fields`] and [`request`] turn
//! untrusted bytes into a checked request; [`tools`] is tool calling; [`text`] turns tokens into text without
//! splitting characters or leaking stop texts; [`wire`] the shapes that clients see; [`answer`] the whole
//! answer, [`stream`] the same piece by piece; [`reply`] the one map from errors to HTTP.
//! [`openapi`] documents it from the types; [`listen`] puts a router on a socket with bounds.
//!
//! Not here: contracts, queues, templates, models (behind [`backend::Backend`]); admin routes and metrics,
//! which have a port of their own.

pub mod backend;

use std::sync::Arc;

use axum::Router;

use self::backend::Backend;

/// The client API over a backend. Every route but health, version and the API document needs a key.
pub fn router<B: Backend>(backend: Arc<B>) -> Router {
    let _ = backend;
    Router::new()
}
