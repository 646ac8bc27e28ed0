//! The handlers, one per route, and the one path that both generating endpoints take: parse, submit, wait for
//! the first event, then answer whole or as a stream.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Response, StatusCode};
use serde_json::{Map, Value};
use shared::error::RequestError;
use tokio::time::timeout;

use super::answer::{self, Kind, Shape};
use super::assemble::{Assembly, Ending, Progress};
use super::auth::Caller;
use super::backend::{Backend, ModelCard, Prepared, model_not_found};
use super::body::{self, BodyBudget};
use super::flow::{Arrival, Flow};
use super::limits::{Pace, TIMEOUT_MAX};
use super::reply::{self, HttpRefusal};
use super::request::chat::ChatRequest;
use super::request::completion::{CompletionRequest, Prompt};
use super::request::{Common, FromHeaders, names_other_tenant, other_tenant};
use super::stream;
use super::tools::ToolUse;
use super::wire::{Liveness, Model, ModelList, Readiness, ReadinessCheck, Version};

type Reply = Response<Body>;

/// `POST /v1/chat/completions`.
pub async fn chat<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller<B::Who>>,
    Extension(pace): Extension<Pace>,
    request: Request,
) -> Reply {
    let (headers, body) = match read(backend.as_ref(), &caller.0, request, pace).await {
        Ok(read) => read,
        Err(refusal) => return *refusal,
    };
    let prepared = from_headers(&headers).and_then(|from_headers| {
        let request = ChatRequest::parse(&body)?;
        let (prepared, tools) = request.prepare(from_headers)?;
        Ok((request, prepared, tools))
    });
    let (request, prepared, tools) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return reply::failed(&error),
    };
    drop(body);
    let id = format!("chatcmpl-{}", prepared.id);
    let shape = shape(backend.as_ref(), id, Kind::Chat, &request.common, request.logprobs);
    let work = Generate { prepared: vec![prepared], shape, tools, stream: request.common.stream };
    work.run(backend, &caller.0, pace).await
}

/// `POST /v1/completions`.
pub async fn completions<B: Backend>(
    State(backend): State<Arc<B>>,
    Extension(caller): Extension<Caller<B::Who>>,
    Extension(pace): Extension<Pace>,
    request: Request,
) -> Reply {
    let (headers, body) = match read(backend.as_ref(), &caller.0, request, pace).await {
        Ok(read) => read,
        Err(refusal) => return *refusal,
    };
    let prepared = from_headers(&headers).and_then(|from_headers| {
        let request = CompletionRequest::parse(&body)?;
        let prepared = request.prepare(from_headers)?;
        Ok((request, prepared))
    });
    let (request, prepared) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return reply::failed(&error),
    };
    drop(body);
    let id = format!("cmpl-{}", prepared.first().expect("a request has at least one prompt").id);
    let texts = request.prompt.into_iter().map(|prompt| match prompt {
        Prompt::Text(text) => Some(text),
        Prompt::Tokens(_) => None,
    });
    let kind = Kind::Text { echo: request.echo.then(|| texts.collect()) };
    let shape = shape(backend.as_ref(), id, kind, &request.common, request.logprobs.is_some());
    let work = Generate { prepared, shape, tools: None, stream: request.common.stream };
    work.run(backend, &caller.0, pace).await
}

async fn read<B: Backend>(
    backend: &B,
    who: &B::Who,
    request: Request,
    pace: Pace,
) -> Result<(HeaderMap, Map<String, Value>), Box<Reply>> {
    let (parts, body) = request.into_parts();
    let budget = parts.extensions.get::<BodyBudget>().expect("the router adds it to every request");
    let object = body::read_object(&parts.headers, body, pace.body_wait, budget, backend.tenant(who)).await?;
    if names_other_tenant(&object, backend.tenant(who).as_str()) {
        backend.impersonation_refused(who);
        return Err(Box::new(reply::failed(&other_tenant())));
    }
    Ok((parts.headers, object))
}

fn from_headers(headers: &HeaderMap) -> Result<FromHeaders, RequestError> {
    const NAME: &str = "x-tenantry-timeout-ms";
    let Some(value) = headers.get(NAME) else { return Ok(FromHeaders::default()) };
    let ms = value.to_str().ok().filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    let wait = ms.and_then(|text| text.parse::<u64>().ok()).map(Duration::from_millis);
    let in_range = wait.filter(|wait| !wait.is_zero() && *wait <= TIMEOUT_MAX);
    in_range.map(|timeout| FromHeaders { timeout: Some(timeout) }).ok_or_else(|| {
        let message = format!("{NAME} must be an integer from 1 to {}", TIMEOUT_MAX.as_millis());
        RequestError::field("invalid_value", NAME, message)
    })
}

fn shape<B: Backend>(backend: &B, id: String, kind: Kind, common: &Common, logprobs: bool) -> Shape {
    Shape {
        id,
        created: backend.clock().wall().as_secs(),
        kind,
        n: common.n,
        logprobs,
        prompt_logprobs: common.prompt_logprobs.is_some(),
        return_token_ids: common.return_token_ids,
        include_usage: common.stream_options.include_usage,
        continuous_usage: common.stream_options.continuous_usage_stats,
    }
}

/// A checked request on its way.
struct Generate {
    prepared: Vec<Prepared>,
    shape: Shape,
    tools: Option<ToolUse>,
    stream: bool,
}

impl Generate {
    async fn run<B: Backend>(self, backend: Arc<B>, who: &B::Who, pace: Pace) -> Reply {
        let started = backend.clock().now();
        let stop = self.prepared.first().map(|one| one.stop.clone()).unwrap_or_default();
        let mut runs = Vec::with_capacity(self.prepared.len());
        for prepared in self.prepared {
            // A refusal of one prompt drops, and so cancels, those before it.
            match backend.submit(who, prepared).await {
                Ok(running) => runs.push(running),
                Err(refused) => return reply::refused(&refused),
            }
        }
        let mut flow = Flow::new(runs, self.shape.n, &stop, self.tools.as_ref());
        if self.stream {
            return match first_events(&mut flow, pace.status_wait).await {
                Ok(first) => stream::respond(backend, self.shape, flow, first, pace),
                Err(error) => failed_in_flight(&flow, &error),
            };
        }
        let endings = match to_the_end(backend.as_ref(), &mut flow, self.shape.n).await {
            Ok(endings) => endings,
            Err(error) => return failed_in_flight(&flow, &error),
        };
        let mut response = match self.shape.kind {
            Kind::Chat => reply::json(StatusCode::OK, &answer::chat(&self.shape, &mut flow, &endings)),
            Kind::Text { .. } => reply::json(StatusCode::OK, &answer::completion(&self.shape, &mut flow, &endings)),
        };
        let took = backend.clock().now().saturating_duration_since(started);
        let headers = response.headers_mut();
        flow.headers(headers);
        let timing = flow.parts.iter().map(|part| part.assembly.timing);
        let queue_wait = timing.clone().map(|timing| timing.queue_wait).max().unwrap_or_default();
        reply::set(headers, "x-tenantry-queue-ms", queue_wait.as_millis());
        let compute: Duration = timing.clone().map(|timing| timing.compute).sum();
        reply::set(headers, "x-tenantry-compute-ms", compute.as_millis());
        if let Some(first) = timing.filter_map(|timing| timing.first_token).min() {
            reply::set(headers, "x-tenantry-ttft-ms", first.saturating_duration_since(started).as_millis());
        }
        reply::set(headers, "x-tenantry-total-ms", took.as_millis());
        response
    }
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
