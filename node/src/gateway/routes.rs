//! The HTTP handlers, one per route, and the one path that both generating endpoints take: read, [`super::generate`],
//! wait for the first event, then answer whole or as a stream.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::wire::client::Endpoint;
use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, HeaderValue, Response, StatusCode};
use serde_json::{Map, Value};
use shared::error::RequestError;
use tokio::time::timeout;

use super::answer::{self, Kind};
use super::assemble::{Assembly, Ending, Progress};
use super::auth::Caller;
use super::backend::{Backend, ModelCard, model_not_found};
use super::body::{self, BodyBudget};
use super::flow::{Arrival, Flow};
use super::generate::{Answering, Generate, Started};
use super::limits::{IDEMPOTENCY_KEY_BYTES_MAX, Pace, TIMEOUT_MAX};
use super::position::Position;
use super::reply::{self, HttpRefusal};
use super::request::FromHeaders;
use super::sse;
use super::wire::{Liveness, Model, ModelList, Readiness, ReadinessCheck, Version};

type Reply = Response<Body>;

const TIMEOUT_MS: &str = "x-tenantry-timeout-ms";
const IDEMPOTENCY_KEY: &str = "idempotency-key";
const LAST_EVENT_ID: &str = "last-event-id";

/// `POST /v1/chat/completions`.
pub async fn chat<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller<B::Who>>,
    Extension(pace): Extension<Pace>,
    request: Request,
) -> Reply {
    generate(Endpoint::Chat, backend, &caller.0, pace, request).await
}

/// `POST /v1/completions`.
pub async fn completions<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller<B::Who>>,
    Extension(pace): Extension<Pace>,
    request: Request,
) -> Reply {
    generate(Endpoint::Completions, backend, &caller.0, pace, request).await
}

async fn generate<B: Backend>(
    endpoint: Endpoint,
    backend: Arc<B>,
    who: &B::Who,
    pace: Pace,
    request: Request,
) -> Reply {
    let received = backend.clock().now();
    let (headers, body, digest) = match read(backend.as_ref(), who, request, pace).await {
        Ok(read) => read,
        Err(refusal) => return *refusal,
    };
    if let Some(position) = headers.get(LAST_EVENT_ID) {
        // The body was said before; what is kept of it counts.
        return go_on(backend, who, pace, position.to_str().unwrap_or_default()).await;
    }
    let generate = from_headers(backend.as_ref(), who, &headers, digest)
        .and_then(|from_headers| Generate::parse(backend.as_ref(), who, endpoint, &body, from_headers));
    let generate = match generate {
        Ok(generate) => generate,
        Err(error) => return reply::failed(&error),
    };
    drop(body);
    let as_stream = generate.stream;
    let started = match generate.start(backend.as_ref(), who).await {
        Ok(started) => started,
        Err(refused) => return reply::refused(&refused),
    };
    if as_stream { streamed(backend, started, pace).await } else { whole(backend.as_ref(), started, received).await }
}

/// The rest of a stream that its client lost.
async fn go_on<B: Backend>(backend: Arc<B>, who: &B::Who, pace: Pace, position: &str) -> Reply {
    let started = match Position::parse(position) {
        Ok(Position { request, have }) => Started::resume(backend.as_ref(), who, request, have).await,
        Err(error) => Err(error),
    };
    match started {
        Ok(started) => streamed(backend, started, pace).await,
        Err(error) => reply::failed(&error),
    }
}

async fn streamed<B: Backend>(backend: Arc<B>, mut started: Started, pace: Pace) -> Reply {
    match first_events(&mut started.flow, pace.status_wait).await {
        Ok(first) => sse::respond(backend, started, first, pace),
        Err(error) => failed_in_flight(&started.flow, &error),
    }
}

async fn whole<B: Backend>(backend: &B, started: Started, received: Instant) -> Reply {
    let Started { mut flow, answering: Answering { shape, .. }, .. } = started;
    let endings = match to_the_end(backend, &mut flow, shape.n).await {
        Ok(endings) => endings,
        Err(error) => return failed_in_flight(&flow, &error),
    };
    let mut response = match shape.kind {
        Kind::Chat => reply::json(StatusCode::OK, &answer::chat(&shape, &mut flow, &endings)),
        Kind::Text { .. } => reply::json(StatusCode::OK, &answer::completion(&shape, &mut flow, &endings)),
    };
    let took = backend.clock().now().saturating_duration_since(received);
    let headers = response.headers_mut();
    flow.headers(headers);
    let timing = flow.parts.iter().map(|part| part.assembly.timing);
    let queue_wait = timing.clone().map(|timing| timing.queue_wait).max().unwrap_or_default();
    reply::set(headers, "x-tenantry-queue-ms", queue_wait.as_millis());
    let compute: Duration = timing.clone().map(|timing| timing.compute).sum();
    reply::set(headers, "x-tenantry-compute-ms", compute.as_millis());
    if let Some(first) = timing.filter_map(|timing| timing.first_token).min() {
        reply::set(headers, "x-tenantry-ttft-ms", first.saturating_duration_since(received).as_millis());
    }
    reply::set(headers, "x-tenantry-total-ms", took.as_millis());
    response
}

async fn read<B: Backend>(
    backend: &B,
    who: &B::Who,
    request: Request,
    pace: Pace,
) -> Result<(HeaderMap, Map<String, Value>, [u8; 32]), Box<Reply>> {
    let (parts, body) = request.into_parts();
    let budget = parts.extensions.get::<BodyBudget>().expect("the router adds it to every request");
    let (object, digest) = body::read_object(&parts.headers, body, pace.body_wait, budget, backend.tenant(who)).await?;
    Ok((parts.headers, object, digest))
}

fn from_headers<B: Backend>(
    backend: &B,
    who: &B::Who,
    headers: &HeaderMap,
    digest: [u8; 32],
) -> Result<FromHeaders, RequestError> {
    let timeout = headers.get(TIMEOUT_MS).map(timeout_of).transpose()?;
    let id = headers.get(IDEMPOTENCY_KEY).map(|key| {
        let is_key = (1..=IDEMPOTENCY_KEY_BYTES_MAX).contains(&key.len());
        let message = format!("{IDEMPOTENCY_KEY} must have 1 to {IDEMPOTENCY_KEY_BYTES_MAX} bytes");
        let wrong = || RequestError::field("invalid_value", IDEMPOTENCY_KEY, message);
        is_key.then(|| backend.request_id(who, key.as_bytes())).ok_or_else(wrong)
    });
    Ok(FromHeaders { timeout, id: id.transpose()?, digest })
}

fn timeout_of(value: &HeaderValue) -> Result<Duration, RequestError> {
    let ms = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let wait = ms.and_then(|text| text.parse::<u64>().ok()).map(Duration::from_millis);
    wait.filter(|wait| !wait.is_zero() && *wait <= TIMEOUT_MAX).ok_or_else(|| {
        let message = format!("{TIMEOUT_MS} must be an integer from 1 to {}", TIMEOUT_MAX.as_millis());
        RequestError::field("invalid_value", TIMEOUT_MS, message)
    })
}

/// A failure after admission: the error with the headers that say what was to serve it.
fn failed_in_flight(flow: &Flow, error: &RequestError) -> Reply {
    let mut response = reply::failed(error);
    flow.headers(response.headers_mut());
    response
}

/// Waits for the first events of a stream, so that a refusal by the queue still gets its own status. After
/// `wait` the stream begins anyway, empty.
async fn first_events(flow: &mut Flow, wait: Duration) -> Result<Vec<Arrival>, RequestError> {
    let Ok(first) = timeout(wait, flow.next()).await else { return Ok(Vec::new()) };
    let first = first.ok_or_else(Assembly::broke_off)?;
    match first.iter().find_map(|(_, event)| match event {
        Some(shared::token::TokenEvent::Failed(error)) => Some(error.clone()),
        Some(_) => None,
        None => Some(Assembly::broke_off()),
    }) {
        Some(error) if !any_token(&first) => Err(error),
        _ => Ok(first),
    }
}

fn any_token(events: &[Arrival]) -> bool {
    events.iter().any(|(_, event)| matches!(event, Some(shared::token::TokenEvent::Token { .. })))
}

/// Takes in everything. The endings are by prompt and choice, all present.
async fn to_the_end<B: Backend>(
    backend: &B,
    flow: &mut Flow,
    n: u32,
) -> Result<Vec<Vec<Option<Ending>>>, RequestError> {
    let mut endings = vec![vec![None; n as usize]; flow.parts.len()];
    while !flow.is_complete() {
        let arrived = flow.next().await.ok_or_else(Assembly::broke_off)?;
        for (prompt_idx, event) in arrived {
            let assembly = &mut flow.parts[prompt_idx].assembly;
            let progress = match event {
                Some(event) => assembly.on_event(backend.clock().now(), event)?,
                None if assembly.is_complete() => continue,
                None => return Err(Assembly::broke_off()),
            };
            if let Progress::Ended(choice, ending) = progress {
                endings[prompt_idx][choice as usize] = Some(ending);
            }
        }
    }
    Ok(endings)
}

/// `GET /v1/models`.
pub async fn models<B: Backend>(State(backend): State<Arc<B>>, Extension(caller): Extension<Caller<B::Who>>) -> Reply {
    let data = backend.models(&caller.0).into_iter().map(model_of).collect();
    reply::json(StatusCode::OK, &ModelList { object: "list", data })
}

/// `GET /v1/models/{model}`.
pub async fn model<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller<B::Who>>,
    Path(id): Path<String>,
) -> Reply {
    match backend.models(&caller.0).into_iter().find(|card| card.id == id) {
        Some(card) => reply::json(StatusCode::OK, &model_of(card)),
        None => reply::failed(&model_not_found(&id)),
    }
}

fn model_of(card: ModelCard) -> Model {
    Model {
        id: card.id,
        object: "model",
        created: card.created,
        owned_by: card.owned_by,
        root: card.root,
        parent: card.parent,
        max_model_len: card.max_model_len,
        adapter_generation: card.adapter_generation,
    }
}

/// `POST /v1/embeddings`: known, not there yet.
pub async fn embeddings() -> Reply {
    reply::http_refusal(HttpRefusal::NotImplemented("/v1/embeddings"))
}

/// `GET /healthz`, `/livez`: the process answers.
pub async fn liveness() -> Reply {
    reply::json(StatusCode::OK, &Liveness { status: "ok" })
}

/// `GET /readyz`, `/health`: this node can serve.
pub async fn readiness<B: Backend>(State(backend): State<Arc<B>>) -> Reply {
    let checks = backend.checks();
    let ready = checks.iter().all(|check| check.ok);
    let checks =
        checks.into_iter().map(|check| ReadinessCheck { name: check.name, ok: check.ok, detail: check.detail });
    let body = Readiness { status: if ready { "ready" } else { "not_ready" }, checks: checks.collect() };
    reply::json(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &body)
}

/// `GET /version`.
pub async fn version() -> Reply {
    reply::json(StatusCode::OK, &Version { version: env!("CARGO_PKG_VERSION") })
}

/// Everything else.
pub async fn no_route() -> Reply {
    reply::http_refusal(HttpRefusal::NoRoute)
}

/// A known path with another method.
pub async fn no_method() -> Reply {
    reply::http_refusal(HttpRefusal::Method)
}
