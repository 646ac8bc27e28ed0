//! A backend that answers by script: each request is given to a closure that says what the engine would emit.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::wire::client::Have;
use parking_lot::Mutex;
use shared::clock::{Clock, SystemClock};
use shared::error::{ErrorKind, RequestError};
use shared::id::{RequestId, TenantId};
use shared::token::{FinishReason, PositionLogprobs, TokenEvent, TokenLogprob};
use tokio::sync::mpsc;

use crate::gateway::backend::{
    Backend, CancelOnDrop, Check, Input, ModelCard, Piece, Prepared, RECORD_SILENT, RateState, Refused, Resumed,
    Running, Served, TokenText, model_not_found,
};

/// What happens to a request.
pub(super) enum Script {
    /// Refused at admission.
    Refuse(RequestError),
    /// These events, then the channel closes.
    Emit(Vec<TokenEvent>),
    /// These events, then nothing for ever.
    EmitThenHang(Vec<TokenEvent>),
    /// Tokens without end, as fast as they are taken.
    Forever,
}

type Play = Arc<dyn Fn(&Prepared) -> Script + Send + Sync>;

/// Names of control tokens; their ids follow the 256 bytes.
pub(super) const CONTROL: [&str; 3] = ["<|im_end|>", "<tool_call>", "</tool_call>"];
/// The end-of-answer token.
pub(super) const EOS: u32 = 256;

/// Every byte is a token; a few control tokens follow.
struct Bytes;

impl TokenText for Bytes {
    fn piece(&self, id: u32) -> Piece<'_> {
        match u8::try_from(id) {
            Ok(byte) => Piece { bytes: Cow::Owned(vec![byte]), special: false },
            Err(_) => {
                let name = CONTROL.get(id as usize - 256).copied().unwrap_or_default();
                Piece { bytes: Cow::Borrowed(name.as_bytes()), special: true }
            }
        }
    }
}

/// The backend.
pub(super) struct Fake {
    pub(super) play: Play,
    /// Requests that reached admission.
    pub(super) seen: Mutex<Vec<Prepared>>,
    /// Requests whose `Running` was dropped.
    pub(super) dropped: Arc<AtomicUsize>,
    /// Impersonations reported.
    pub(super) impersonations: AtomicUsize,
    /// Whether the served model is a fallback.
    pub(super) fell_back: bool,
    /// Remembers requests, as the nodes of a cluster do.
    pub(super) keeps: bool,
    /// A node that may remember a request does not answer.
    pub(super) one_is_silent: bool,
    /// Requests that are being answered.
    pub(super) claimed: Arc<Mutex<BTreeSet<RequestId>>>,
    pub(super) clock: SystemClock,
}

impl Fake {
    /// A backend for tenant `acme` with key `acme-key`.
    pub(super) fn new(play: impl Fn(&Prepared) -> Script + Send + Sync + 'static) -> Self {
        Self {
            play: Arc::new(play),
            seen: Mutex::default(),
            dropped: Arc::default(),
            impersonations: AtomicUsize::new(0),
            fell_back: false,
            keeps: false,
            one_is_silent: false,
            claimed: Arc::default(),
            clock: SystemClock,
        }
    }

    /// Answers everything with this text, then the end token.
    pub(super) fn saying(text: &'static str) -> Self {
        Self::new(move |request| Script::Emit(say(request, text.as_bytes())))
    }
}

/// The events of an answer of these bytes to each choice, interleaved.
pub(super) fn say(request: &Prepared, bytes: &[u8]) -> Vec<TokenEvent> {
    let ids: Vec<u32> = bytes.iter().map(|&byte| u32::from(byte)).chain([EOS]).collect();
    emit(request, &ids, FinishReason::Stop)
}

/// The events of an answer of these tokens to each choice, interleaved.
pub(super) fn emit(request: &Prepared, ids: &[u32], reason: FinishReason) -> Vec<TokenEvent> {
    let position = |id: u32| PositionLogprobs {
        chosen: TokenLogprob { id, logprob: -0.25 },
        top: (0..request.logprobs.unwrap_or(0))
            .map(|i| TokenLogprob { id: id + i, logprob: -0.25 - i as f32 })
            .collect(),
    };
    let mut events = vec![TokenEvent::Started {
        queue_wait: Duration::from_millis(7),
        cached_tokens: 2,
        fell_back: false,
        adapter_hit: None,
    }];
    if request.prompt_logprobs.is_some() {
        let rest = &prompt(request)[1..];
        events.push(TokenEvent::Prompt { logprobs: rest.iter().map(|&id| position(id)).collect() });
    }
    for (seq, &id) in (0..).zip(ids) {
        for choice in 0..request.n {
            events.push(TokenEvent::Token { choice, seq, id, logprobs: request.logprobs.map(|_| position(id)) });
        }
    }
    let finish = |choice| TokenEvent::Finished { choice, reason: reason.clone(), compute: Duration::from_millis(5) };
    events.extend((0..request.n).map(finish));
    events
}

/// The prompt's tokens: the bytes of the text, or of the last message.
pub(super) fn prompt(request: &Prepared) -> Vec<u32> {
    let bytes = |text: &str| text.bytes().map(u32::from).collect();
    match &request.input {
        Input::Tokens(ids) => ids.clone(),
        Input::Text { text, .. } => bytes(text),
        Input::Chat(chat) => bytes(chat.messages.last().and_then(|message| message["content"].as_str()).unwrap_or("-")),
    }
}

impl Backend for Fake {
    type Who = TenantId;

    fn authenticate(&self, bearer: &str) -> Result<TenantId, RequestError> {
        let tenant = bearer.strip_suffix("-key").and_then(|tenant| tenant.parse().ok());
        tenant.ok_or_else(|| RequestError::new(ErrorKind::Unauthenticated, "invalid_api_key", "unknown key"))
    }

    fn tenant<'a>(&self, who: &'a TenantId) -> &'a TenantId {
        who
    }

    fn impersonation_refused(&self, _who: &TenantId) {
        self.impersonations.fetch_add(1, Ordering::SeqCst);
    }

    fn models(&self, who: &TenantId) -> Vec<ModelCard> {
        vec![ModelCard {
            id: "support".to_owned(),
            created: 1_700_000_000,
            owned_by: who.to_string(),
            root: Some(format!("{who}-support-smollm2-v1.0.0")),
            parent: Some("smollm2".to_owned()),
            max_model_len: Some(2048),
            adapter_generation: None,
        }]
    }

    async fn submit(&self, who: &TenantId, request: Prepared) -> Result<Running, Refused> {
        self.seen.lock().push(request.clone());
        if request.model != "support" {
            return Err(model_not_found(&request.model).into());
        }
        let mut forever = false;
        let (events, then_hang) = match (self.play)(&request) {
            Script::Refuse(error) => return Err(Refused { error, rate: Some(rate()) }),
            Script::Emit(events) => (events.into_iter(), false),
            Script::EmitThenHang(events) => (events.into_iter(), true),
            Script::Forever => {
                forever = true;
                (Vec::new().into_iter(), false)
            }
        };
        let (sender, receiver) = mpsc::channel(8);
        tokio::spawn(async move {
            for event in events {
                if sender.send(event).await.is_err() {
                    return;
                }
            }
            for seq in 0.. {
                let event = TokenEvent::Token { choice: 0, seq, id: u32::from(b'x'), logprobs: None };
                if !forever || sender.send(event).await.is_err() {
                    break;
                }
            }
            if then_hang {
                sender.closed().await;
            }
        });
        let dropped = self.dropped.clone();
        let adapter = (!self.fell_back).then(|| format!("{who}-support-smollm2-v1.0.0"));
        Ok(Running {
            events: receiver.into(),
            cancel: CancelOnDrop::new(move || {
                dropped.fetch_add(1, Ordering::SeqCst);
            }),
            served: Served {
                model: "support".to_owned(),
                base: "smollm2".to_owned(),
                adapter,
                adapter_hash: (!self.fell_back).then(|| "ab".repeat(32)),
                fell_back: self.fell_back,
                numerics_id: "cpu1-f32".to_owned(),
            },
            prompt_tokens: prompt(&request).into(),
            token_text: Arc::new(Bytes),
            rate: Some(rate()),
        })
    }

    fn keeps_records(&self) -> bool {
        self.keeps
    }

    fn request_id(&self, _who: &TenantId, key: &[u8]) -> RequestId {
        RequestId(u128::from(key.iter().map(|&byte| u64::from(byte)).sum::<u64>()))
    }

    async fn claim(&self, request: RequestId) -> Result<CancelOnDrop, RequestError> {
        if !self.claimed.lock().insert(request) {
            return Err(coordinator::journal::idempotency::in_use());
        }
        let claimed = Arc::clone(&self.claimed);
        Ok(CancelOnDrop::new(move || {
            claimed.lock().remove(&request);
        }))
    }

    /// Plays the request again: what the client has seen comes first.
    async fn resume(&self, who: &TenantId, id: RequestId, _have: &[Have]) -> Result<Resumed, RequestError> {
        let known =
            |seen: &&Prepared| seen.id == id && seen.answering.is_some() && self.keeps && who.as_str() == "acme";
        let record = self.seen.lock().iter().find(known).cloned();
        let gone = || match self.one_is_silent {
            true => RequestError::new(ErrorKind::Unavailable, RECORD_SILENT, "somebody may remember it"),
            false => RequestError::new(ErrorKind::NotFound, "stream_gone", "nobody remembers it"),
        };
        let record = record.ok_or_else(gone)?;
        let answering = record.answering.clone().expect("looked at above");
        let running = self.submit(who, record).await.map_err(|refused| refused.error)?;
        Ok(Resumed { running, answering })
    }

    fn checks(&self) -> Vec<Check> {
        vec![Check { name: "base_loaded", ok: false, detail: "loading".to_owned() }]
    }

    fn clock(&self) -> &dyn Clock {
        &self.clock
    }
}

fn rate() -> RateState {
    RateState {
        limit_requests: 60,
        remaining_requests: 59,
        reset_requests: Duration::from_secs(1),
        limit_tokens: 1000,
        remaining_tokens: 990,
        reset_tokens: Duration::from_millis(600),
    }
}
