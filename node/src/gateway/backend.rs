//! The seam between the client API and the rest of the node: what the gateway asks for and what it gets.
//!
//! [`Backend`] is implemented once, by the application; tests script their own. The gateway parses, checks
//! and formats; everything that needs a contract, a tokenizer, a template, a queue or a model happens behind
//! this trait. No HTTP type crosses it.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use ::wire::client::Have;
use serde_json::Value;
use shared::clock::Clock;
use shared::error::{ErrorKind, RequestError};
use shared::id::{RequestId, TenantId};
use shared::request::{Grammar, Sampling};
use shared::token::TokenEvent;
use tokio::sync::{mpsc, watch};

/// What the gateway needs from the node.
pub trait Backend: Send + Sync + 'static {
    /// An authenticated caller; made by [`Backend::authenticate`] only.
    type Who: Clone + Send + Sync + 'static;

    /// Who holds this key. Compares in constant time.
    ///
    /// # Errors
    /// `Unauthenticated` for an unknown, expired or revoked key. A suspended tenant authenticates; `submit` refuses it.
    fn authenticate(&self, bearer: &str) -> Result<Self::Who, RequestError>;

    /// The caller's tenant.
    fn tenant<'a>(&self, who: &'a Self::Who) -> &'a TenantId;

    /// Called when a caller named another tenant than its key's; the request is refused with 403.
    fn impersonation_refused(&self, who: &Self::Who);

    /// The models this caller may name, in a stable order.
    fn models(&self, who: &Self::Who) -> Vec<ModelCard>;

    /// Admits a request: resolves the model, renders and encodes the input, takes credit, enqueues.
    /// Returns as soon as the request waits in the queue.
    ///
    /// # Errors
    /// Every refusal of admission; for an unknown or foreign model [`model_not_found`].
    fn submit(&self, who: &Self::Who, request: Prepared) -> impl Future<Output = Result<Running, Refused>> + Send;

    /// Whether requests can go on at another node when this one dies.
    fn keeps_records(&self) -> bool;

    /// The id of a caller's request with this idempotency key; the same at every node.
    fn request_id(&self, who: &Self::Who, key: &[u8]) -> RequestId;

    /// Claims a request that its client may have sent before, until the returned value is dropped.
    ///
    /// # Errors
    /// 409 `idempotency_key_in_use` while an earlier sending is being answered, at whatever node.
    fn claim(&self, request: RequestId) -> impl Future<Output = Result<CancelOnDrop, RequestError>> + Send;

    /// Goes on with a request of this caller of which the client has a part. Its events begin with those that the
    /// client has seen; the others come as if nothing had happened.
    ///
    /// # Errors
    /// 404 `stream_gone` when nobody remembers it, the same for a request of somebody else; 503 [`RECORD_SILENT`] while
    /// a node that may remember it does not answer.
    fn resume(
        &self,
        who: &Self::Who,
        request: RequestId,
        have: &[Have],
    ) -> impl Future<Output = Result<Resumed, RequestError>> + Send;

    /// The conditions under which this node can serve, each with its present state. No I/O.
    fn checks(&self) -> Vec<Check>;

    /// The reader of time.
    fn clock(&self) -> &dyn Clock;
}

/// Code of the refusal to go on with a request that nobody else may have forgotten: a node that may keep its record
/// does not answer. That node answers soon or counts as dead soon.
pub const RECORD_SILENT: &str = "record_silent";

/// The refusal of a model that does not exist or is not the caller's: the same bytes for both.
pub fn model_not_found(model: &str) -> RequestError {
    let shown: String = model.chars().take(128).collect();
    RequestError {
        param: Some("model".into()),
        ..RequestError::new(
            ErrorKind::NotFound,
            "model_not_found",
            format!(
                "the model {shown:?} does not exist or you do not have access to it; hint: GET /v1/models lists yours"
            ),
        )
    }
}

/// A checked request, before admission. All ranges hold; whether it fits the model's context is not known yet.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// Unique id, chosen by us: keys metering and the random stream.
    pub id: RequestId,
    /// The model as the client named it: a task, a full adapter version, or a base.
    pub model: String,
    /// The prompt.
    pub input: Input,
    /// Independent answers, 1…8.
    pub n: u32,
    /// Longest answer; `None` is what the context leaves.
    pub max_tokens: Option<u32>,
    /// No end of answer before this many tokens.
    pub min_tokens: u32,
    /// Go on after the end-of-answer token.
    pub ignore_eos: bool,
    /// Texts that end the answer, none empty.
    pub stop: Vec<String>,
    /// Token ids that end the answer; the vocabulary is not checked yet.
    pub stop_token_ids: Vec<u32>,
    /// Choice of tokens. Its `seed` is 0 here: the backend sets it from [`Prepared::seed`] or the id.
    pub sampling: Sampling,
    /// The client's seed.
    pub seed: Option<u64>,
    /// Report the chosen token's log-probability and this many of the best.
    pub logprobs: Option<u32>,
    /// The same for the prompt.
    pub prompt_logprobs: Option<u32>,
    /// Constraint on the answer.
    pub grammar: Option<Grammar>,
    /// Earlier deadline than the contract's, wanted by the client.
    pub timeout: Option<Duration>,
    /// How the gateway makes an answer of the tokens, in its own format: kept with the request where another node
    /// could go on with it. `None` when none shall.
    pub answering: Option<Vec<u8>>,
}

/// The prompt as the client gave it.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// A conversation for the model's chat template.
    Chat(ChatInput),
    /// Raw text; special-token texts in it are plain text.
    Text {
        /// The prompt.
        text: String,
        /// Put the model's beginning-of-text token in front if the model wants one.
        add_special: bool,
    },
    /// Token ids, not empty; the vocabulary is not checked yet.
    Tokens(Vec<u32>),
}

/// Variables of the chat template.
#[derive(Debug, Clone, PartialEq)]
pub struct ChatInput {
    /// Messages with `role` and `content` (string or null); assistant `tool_calls` carry `arguments` as objects.
    pub messages: Vec<Value>,
    /// The `tools` array as sent; `None` when absent or `tool_choice` is `none`.
    pub tools: Option<Value>,
    /// Open the assistant's turn.
    pub add_generation_prompt: bool,
    /// Further template variables (`chat_template_kwargs`).
    pub template_kwargs: serde_json::Map<String, Value>,
}

/// An admitted request and its answer to come.
pub struct Running {
    /// Events as `shared::token` promises them.
    pub events: Events,
    /// Ends the request when dropped.
    pub cancel: CancelOnDrop,
    /// What serves it.
    pub served: Served,
    /// Tokens of the prompt, as the model sees them.
    pub prompt_tokens: Arc<[u32]>,
    /// Text of the tokens.
    pub token_text: Arc<dyn TokenText>,
    /// State of the caller's rate limits after this request.
    pub rate: Option<RateState>,
}

/// A request that goes on here.
pub struct Resumed {
    /// As after [`Backend::submit`].
    pub running: Running,
    /// As in [`Prepared::answering`].
    pub answering: Vec<u8>,
}

/// A request's events on their way to the reply, seen by whoever counts what was delivered.
pub struct Events {
    receiver: mpsc::Receiver<TokenEvent>,
    tap: Option<Box<dyn EventTap>>,
    stop: Option<watch::Receiver<bool>>,
    /// What comes first: the part of an answer that its client has.
    before: VecDeque<TokenEvent>,
    /// Dropped when all is told, each with the choices whose end is still to come.
    held: Vec<(CancelOnDrop, u32)>,
}

/// Sees every event that the reply takes; dropped when the reply is over, however it ends.
pub trait EventTap: Send {
    /// The reply took this event.
    fn observe(&mut self, event: &TokenEvent);

    /// The reply asked for more and nothing can come: after the end, or because the engine let go of the request.
    fn closed(&mut self) {}
}

impl Events {
    /// Events that `tap` sees.
    pub fn new(receiver: mpsc::Receiver<TokenEvent>, tap: Box<dyn EventTap>) -> Self {
        Self { tap: Some(tap), ..receiver.into() }
    }

    /// Puts events before those that come.
    pub fn after(self, before: VecDeque<TokenEvent>) -> Self {
        Self { before, ..self }
    }

    /// Ends the events with the error of a stopping node as soon as `stop` is true.
    pub fn until(self, stop: watch::Receiver<bool>) -> Self {
        Self { stop: Some(stop), ..self }
    }

    /// Holds something until the end of an answer of `n` choices was taken, well or not.
    pub fn hold(&mut self, held: CancelOnDrop, n: u32) {
        self.held.push((held, n));
    }

    /// The next event; `None` when the engine has let go of the request.
    pub async fn recv(&mut self) -> Option<TokenEvent> {
        let event = match self.before.pop_front() {
            Some(event) => Some(event),
            None => self.next().await,
        };
        match (&mut self.tap, &event) {
            (Some(tap), Some(event)) => tap.observe(event),
            (Some(tap), None) => tap.closed(),
            (None, _) => {}
        }
        match &event {
            Some(TokenEvent::Finished { .. }) => {
                self.held.iter_mut().for_each(|(_, n_open)| *n_open = n_open.saturating_sub(1));
                self.held.retain(|(_, n_open)| *n_open > 0);
            }
            Some(TokenEvent::Failed(_)) | None => self.held.clear(),
            Some(_) => {}
        }
        event
    }

    async fn next(&mut self) -> Option<TokenEvent> {
        tokio::select! {
            biased;
            event = self.receiver.recv() => event,
            () = stopped(&mut self.stop) => {
                // Nothing follows a failure, and the engine notices that nobody listens.
                self.receiver.close();
                self.stop = None;
                Some(TokenEvent::Failed(node_stopping()))
            }
        }
    }
}

impl From<mpsc::Receiver<TokenEvent>> for Events {
    /// Events that nobody counts.
    fn from(receiver: mpsc::Receiver<TokenEvent>) -> Self {
        Self { receiver, tap: None, stop: None, before: VecDeque::new(), held: Vec::new() }
    }
}

/// What requests are told that this node cannot finish.
pub fn node_stopping() -> RequestError {
    let message = "this node is stopping; hint: retry, another node will answer";
    RequestError::new(ErrorKind::Unavailable, "node_stopping", message).retry_after(Duration::from_secs(1))
}

async fn stopped(stop: &mut Option<watch::Receiver<bool>>) {
    let Some(stop) = stop else { return std::future::pending().await };
    if stop.wait_for(|stop| *stop).await.is_err() {
        // Nobody is left who could stop us.
        std::future::pending().await
    }
}

/// What serves a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// Model id reported to the client.
    pub model: String,
    /// Base model name.
    pub base: String,
    /// Full adapter version; `None` for the base itself.
    pub adapter: Option<String>,
    /// Content hash of the adapter, in hex.
    pub adapter_hash: Option<String>,
    /// The contract's fallback replaced a missing adapter by the base.
    pub fell_back: bool,
    /// Names everything besides weights and tokens that decides the bits of the answer.
    pub numerics_id: String,
}

/// Runs its action when dropped.
pub struct CancelOnDrop(Option<Box<dyn FnOnce() + Send>>);

impl CancelOnDrop {
    /// `cancel` must be cheap and must not panic; it may run after the request has ended.
    pub fn new(cancel: impl FnOnce() + Send + 'static) -> Self {
        Self(Some(Box::new(cancel)))
    }
}

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        if let Some(cancel) = self.0.take() {
            cancel();
        }
    }
}

/// Text of tokens; implemented by the model's tokenizer.
pub trait TokenText: Send + Sync {
    /// The token's piece; an id out of range has an empty one.
    fn piece(&self, id: u32) -> Piece<'_>;
}

/// One token as bytes. The text of an answer is the concatenation of its pieces.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Bytes, possibly a part of a UTF-8 sequence.
    pub bytes: Cow<'a, [u8]>,
    /// A control token: not part of the text, though it has a name.
    pub special: bool,
}

/// A refusal of admission.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Why.
    pub error: RequestError,
    /// State of the caller's rate limits.
    pub rate: Option<RateState>,
}

impl From<RequestError> for Refused {
    fn from(error: RequestError) -> Self {
        Self { error, rate: None }
    }
}

/// Rate limits of a tenant at one moment, for the `x-ratelimit-*` headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateState {
    /// Requests per minute allowed.
    pub limit_requests: u64,
    /// Requests left right now.
    pub remaining_requests: u64,
    /// Until all requests are available again.
    pub reset_requests: Duration,
    /// Tokens per minute allowed.
    pub limit_tokens: u64,
    /// Tokens left right now.
    pub remaining_tokens: u64,
    /// Until all tokens are available again.
    pub reset_tokens: Duration,
}

/// One model a caller may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelCard {
    /// What goes into `model`.
    pub id: String,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// The tenant for adapters, `tenantry` for bases.
    pub owned_by: String,
    /// The full version an alias stands for.
    pub root: Option<String>,
    /// Base model of an adapter.
    pub parent: Option<String>,
    /// Longest sequence, in tokens.
    pub max_model_len: Option<u32>,
    /// Content hash of the adapter, in hex.
    pub adapter_generation: Option<String>,
}

/// One condition of readiness.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// Short name, such as `base_loaded`.
    pub name: &'static str,
    /// Whether it holds.
    pub ok: bool,
    /// For the operator; never a secret, a prompt or a tenant's name.
    pub detail: String,
}
