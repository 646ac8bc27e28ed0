//! A generating request from its body to running answers, whichever door it came through: parse, submit, or go on
//! with what another node had begun.
//!
//! [`Answering`] is what of the request the client's side needs; with the tokens it is enough to go on with an answer
//! anywhere. A request of several prompts is never gone on with: it is answered in full or fails.

use ::wire::client::{Endpoint, Have};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use shared::error::{ErrorKind, RequestError};
use shared::id::RequestId;

use super::answer::{Kind, Shape};
use super::backend::{Backend, Prepared, RECORD_SILENT, Refused, Running};
use super::flow::Flow;
use super::request::chat::ChatRequest;
use super::request::completion::{CompletionRequest, Prompt};
use super::request::{Common, FromHeaders, names_other_tenant, other_tenant};
use super::tools::ToolUse;

/// How tokens become the answer of one request.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Answering {
    /// Its form.
    pub shape: Shape,
    /// The model as the client named it.
    pub model: String,
    /// Stop texts.
    pub stop: Vec<String>,
    /// How tool calls are read.
    pub tools: Option<ToolUse>,
    /// Hash of the request's body: an idempotency key stands for one request only.
    pub digest: [u8; 32],
}

/// A checked request on its way.
pub struct Generate {
    prepared: Vec<Prepared>,
    answering: Answering,
    /// Whether the client wants it piece by piece.
    pub stream: bool,
    /// The request may have been sent before.
    keyed: bool,
}

/// An answer that runs.
pub struct Started {
    /// Its events.
    pub flow: Flow,
    /// How they are answered.
    pub answering: Answering,
    /// What the client has of it.
    pub have: Vec<Have>,
    /// Under which id another node could go on with it.
    pub resumable: Option<RequestId>,
}

// === impl Generate ===

impl Generate {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// 400 naming the field; 403 when it names another tenant.
    pub fn parse<B: Backend>(
        backend: &B,
        who: &B::Who,
        endpoint: Endpoint,
        body: &Map<String, Value>,
        from_headers: FromHeaders,
    ) -> Result<Self, RequestError> {
        if names_other_tenant(body, backend.tenant(who).as_str()) {
            backend.impersonation_refused(who);
            return Err(other_tenant());
        }
        let created = backend.clock().wall().as_secs();
        match endpoint {
            Endpoint::Chat => chat(body, from_headers, created),
            Endpoint::Completions => completion(body, from_headers, created),
        }
    }

    /// Submits it, or goes on with it when it was sent before.
    ///
    /// # Errors
    /// Every refusal of admission; `idempotency_key_reused` when its key was used for another request,
    /// `idempotency_key_in_use` while that one is being answered.
    pub async fn start<B: Backend>(self, backend: &B, who: &B::Who) -> Result<Started, Refused> {
        let Self { mut prepared, answering, stream, keyed } = self;
        let claim = match prepared.first() {
            Some(first) if keyed => Some(backend.claim(first.id).await?),
            _ => None,
        };
        if let ([one], true) = (&prepared[..], keyed) {
            match backend.resume(who, one.id, &[]).await {
                Ok(resumed) => {
                    let before = Answering::read(&resumed.answering)?;
                    if before.digest != answering.digest {
                        return Err(key_reused().into());
                    }
                    return Ok(Started::resumed(one.id, resumed.running, before, Vec::new()));
                }
                // Begun twice it has the same tokens and is billed once.
                Err(error) if error.kind == ErrorKind::NotFound || error.code == RECORD_SILENT => {}
                Err(error) => return Err(error.into()),
            }
        }
        let resumable = match &mut prepared[..] {
            // Nobody comes back for any other.
            [one] if (stream || keyed) && backend.keeps_records() => {
                one.answering = Some(answering.write());
                Some(one.id)
            }
            _ => None,
        };
        let mut runs = Vec::with_capacity(prepared.len());
        for prepared in prepared {
            // A refusal of one prompt drops, and so cancels, those before it.
            runs.push(backend.submit(who, prepared).await?);
        }
        if let ([run, ..], Some(claim)) = (&mut runs[..], claim) {
            run.events.hold(claim, answering.shape.n);
        }
        let flow = Flow::new(runs, answering.shape.n, &answering.stop, answering.tools.as_ref());
        Ok(Started { flow, answering, have: Vec::new(), resumable })
    }
}

// === impl Started ===

impl Started {
    /// Goes on with an answer of which the client has a part.
    ///
    /// # Errors
    /// 404 when no node remembers it for this caller, 503 while one that may does not answer.
    pub async fn resume<B: Backend>(
        backend: &B,
        who: &B::Who,
        request: RequestId,
        have: Vec<Have>,
    ) -> Result<Self, RequestError> {
        let resumed = backend.resume(who, request, &have).await?;
        let answering = Answering::read(&resumed.answering)?;
        Ok(Self::resumed(request, resumed.running, answering, have))
    }

    fn resumed(request: RequestId, running: Running, answering: Answering, have: Vec<Have>) -> Self {
        let flow = Flow::new(vec![running], answering.shape.n, &answering.stop, answering.tools.as_ref());
        Self { flow, answering, have, resumable: Some(request) }
    }
}

// === impl Answering ===

impl Answering {
    fn write(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("it has text keys and finite numbers")
    }

    /// A record comes from a node of this cluster, perhaps of another version.
    fn read(bytes: &[u8]) -> Result<Self, RequestError> {
        serde_json::from_slice(bytes).map_err(|error| {
            tracing::error!(%error, "the record of a request that was to go on here cannot be read");
            RequestError::internal()
        })
    }
}

fn chat(body: &Map<String, Value>, from_headers: FromHeaders, created: u64) -> Result<Generate, RequestError> {
    let request = ChatRequest::parse(body)?;
    let (prepared, tools) = request.prepare(from_headers)?;
    let shape = shape(format!("chatcmpl-{}", prepared.id), created, Kind::Chat, &request.common, request.logprobs);
    Ok(generate(vec![prepared], shape, tools, &request.common, from_headers))
}

fn completion(body: &Map<String, Value>, from_headers: FromHeaders, created: u64) -> Result<Generate, RequestError> {
    let request = CompletionRequest::parse(body)?;
    let prepared = request.prepare(from_headers)?;
    let id = format!("cmpl-{}", prepared.first().expect("a request has at least one prompt").id);
    let texts = request.prompt.into_iter().map(|prompt| match prompt {
        Prompt::Text(text) => Some(text),
        Prompt::Tokens(_) => None,
    });
    let kind = Kind::Text { echo: request.echo.then(|| texts.collect()) };
    let shape = shape(id, created, kind, &request.common, request.logprobs.is_some());
    Ok(generate(prepared, shape, None, &request.common, from_headers))
}

fn generate(
    prepared: Vec<Prepared>,
    shape: Shape,
    tools: Option<ToolUse>,
    common: &Common,
    from_headers: FromHeaders,
) -> Generate {
    let answering =
        Answering { shape, model: common.model.clone(), stop: common.stop.clone(), tools, digest: from_headers.digest };
    Generate { prepared, answering, stream: common.stream, keyed: from_headers.id.is_some() }
}

fn shape(id: String, created: u64, kind: Kind, common: &Common, logprobs: bool) -> Shape {
    Shape {
        id,
        created,
        kind,
        n: common.n,
        logprobs,
        prompt_logprobs: common.prompt_logprobs.is_some(),
        return_token_ids: common.return_token_ids,
        include_usage: common.stream_options.include_usage,
        continuous_usage: common.stream_options.continuous_usage_stats,
    }
}

fn key_reused() -> RequestError {
    let message = "this idempotency key was used for another request; hint: use a new key for a new request";
    RequestError::new(ErrorKind::Unprocessable, "idempotency_key_reused", message)
}
