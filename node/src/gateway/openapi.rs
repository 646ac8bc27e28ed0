//! The OpenAPI document, generated from the request and response types and served at `/openapi.json`.

use axum::body::Body;
use axum::http::{Response, StatusCode};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{Modify, OpenApi};

use super::reply::{self, ErrorBody};
use super::request::chat::ChatRequest;
use super::request::completion::CompletionRequest;
use super::wire::{ChatChunk, ChatCompletion, Completion, Liveness, Model, ModelList, Readiness, Version};

/// The document.
#[derive(Debug, OpenApi)]
#[openapi(
    info(title = "Tenantry client API", description = "The OpenAI API, with each tenant's own adapters as models."),
    paths(
        paths::chat_completions, paths::completions, paths::models, paths::model, paths::healthz, paths::livez,
        paths::readyz, paths::health, paths::version, paths::openapi, paths::embeddings
    ),
    components(schemas(ChatChunk)),
    modifiers(&BearerKey)
)]
pub struct Document;

struct BearerKey;

impl Modify for BearerKey {
    fn modify(&self, document: &mut utoipa::openapi::OpenApi) {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("A tenant's API key.")).build();
        document.components.get_or_insert_default().add_security_scheme("key", SecurityScheme::Http(scheme));
    }
}

/// `GET /openapi.json`.
pub async fn serve() -> Response<Body> {
    reply::json(StatusCode::OK, &Document::openapi())
}

/// One function per operation carries its description; the handlers are generic and cannot.
#[expect(dead_code, reason = "utoipa reads the attributes; nothing calls the functions")]
mod paths {
    use super::*;

    /// Answers a conversation.
    #[utoipa::path(post, path = "/v1/chat/completions", security(("key" = [])), request_body = ChatRequest, responses(
        (status = 200, description = "The answer; with `stream` a sequence of `ChatChunk` events", body = ChatCompletion),
        (status = "default", description = "Refusal", body = ErrorBody),
    ))]
    pub(super) fn chat_completions() {}

    /// Continues text or token ids.
    #[utoipa::path(post, path = "/v1/completions", security(("key" = [])), request_body = CompletionRequest, responses(
        (status = 200, description = "The answer; with `stream` a sequence of the same objects", body = Completion),
        (status = "default", description = "Refusal", body = ErrorBody),
    ))]
    pub(super) fn completions() {}

    /// Not implemented.
    #[utoipa::path(post, path = "/v1/embeddings", security(("key" = [])), responses(
        (status = 501, description = "Not implemented", body = ErrorBody),
    ))]
    pub(super) fn embeddings() {}

    /// The models that the key's tenant may name.
    #[utoipa::path(get, path = "/v1/models", security(("key" = [])), responses((status = 200, body = ModelList)))]
    pub(super) fn models() {}

    /// One of them.
    #[utoipa::path(get, path = "/v1/models/{model}", security(("key" = [])), params(("model" = String, Path)), responses(
        (status = 200, body = Model),
        (status = 404, description = "Unknown, or another tenant's", body = ErrorBody),
    ))]
    pub(super) fn model() {}

    /// The process answers.
    #[utoipa::path(get, path = "/healthz", responses((status = 200, body = Liveness)))]
    pub(super) fn healthz() {}

    /// The same as `/healthz`.
    #[utoipa::path(get, path = "/livez", responses((status = 200, body = Liveness)))]
    pub(super) fn livez() {}

    /// This node can serve.
    #[utoipa::path(get, path = "/readyz", responses((status = 200, body = Readiness), (status = 503, body = Readiness)))]
    pub(super) fn readyz() {}

    /// The same as `/readyz`.
    #[utoipa::path(get, path = "/health", responses((status = 200, body = Readiness), (status = 503, body = Readiness)))]
    pub(super) fn health() {}

    /// Version of the server.
    #[utoipa::path(get, path = "/version", responses((status = 200, body = Version)))]
    pub(super) fn version() {}

    /// This document.
    #[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "OpenAPI")))]
    pub(super) fn openapi() {}
}
