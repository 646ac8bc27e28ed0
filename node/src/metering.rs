//! Hop 12: what did it cost? One usage record per request, counted from the tokens that were delivered.
//!
//! [`Tap`] sits on the request's events at the entry node and counts what the client's side took; when the
//! request ends, however it ends, it hands exactly one [`UsageRecord`] to the [`journal`]. The client's own
//! view (a lost stream, a missing usage chunk) plays no part.

pub mod journal;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shared::clock::Clock;
use shared::hash::ContentHash;
use shared::id::{AdapterName, BaseName, TaskName, TenantId};
use shared::request::Envelope;
use shared::tenant::Tier;
use shared::token::{FinishReason, TokenEvent};

use journal::Journal;

use crate::gateway::backend::EventTap;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every choice finished.
    Finished,
    /// The client went away first.
    Cancelled,
    /// It failed after admission.
    Failed,
}

/// What one request used (BILL-01, BILL-03…11). Holds no text of prompt or answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UsageRecord {
    /// Format of this record.
    pub v: u32,
    /// Request id; records are deduplicated by it.
    pub request: String,
    /// Milliseconds since the Unix epoch, at the end of the request.
    pub at_ms: u64,
    /// Who.
    pub tenant: TenantId,
    /// API key used, public part.
    pub key: String,
    /// What for; `null` is the base itself.
    pub task: Option<TaskName>,
    /// Base model.
    pub base: BaseName,
    /// Adapter version used.
    pub adapter: Option<AdapterName>,
    /// Its content.
    pub adapter_hash: Option<ContentHash>,
    /// Service class.
    pub tier: Tier,
    /// Where usage rolls up.
    pub cost_center: Option<String>,
    /// The base answered in place of a missing adapter (BILL-09).
    pub fell_back: bool,
    /// The adapter was in engine memory when the request arrived (BILL-08); `null` for base requests.
    pub adapter_hit: Option<bool>,
    /// Prompt tokens, billed once.
    pub prompt_tokens: u32,
    /// Of these, from the tenant's prefix cache.
    pub cached_tokens: u32,
    /// Answer tokens delivered, per choice: the range `0..n` of each.
    pub delivered: Vec<u32>,
    /// From admission to entering the batch (BILL-07).
    pub queue_wait_ms: f64,
    /// From admission to the first token; `null` if none came.
    pub first_token_ms: Option<f64>,
    /// From admission to the end.
    pub total_ms: f64,
    /// Engine time attributed to the request's rows.
    pub compute_ms: f64,
    /// How it ended.
    pub outcome: Outcome,
    /// Registry epoch of the contract.
    pub contract_epoch: u64,
}

/// Counts one request's delivered events.
pub struct Tap {
    envelope: Arc<Envelope>,
    key: String,
    cost_center: Option<String>,
    adapter_hit: Option<bool>,
    journal: Journal,
    clock: Arc<dyn Clock>,
    cached_tokens: u32,
    queue_wait: Duration,
    first_token_at: Option<Instant>,
    compute: Duration,
    delivered: Vec<u32>,
    finished: u32,
    failed: bool,
    fell_back: bool,
    last_token_at: Option<Instant>,
    settle: Option<Box<dyn FnOnce(u64) + Send>>,
}

// === impl Tap ===

impl Tap {
    /// Starts counting an admitted request. `settle` is told the tokens used when it ends.
    pub fn new(
        envelope: Arc<Envelope>,
        key: String,
        cost_center: Option<String>,
        adapter_hit: Option<bool>,
        settle: Box<dyn FnOnce(u64) + Send>,
        journal: Journal,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let delivered = vec![0; envelope.n_sequences() as usize];
        Self {
            envelope,
            key,
            cost_center,
            adapter_hit,
            journal,
            clock,
            cached_tokens: 0,
            queue_wait: Duration::ZERO,
            first_token_at: None,
            compute: Duration::ZERO,
            delivered,
            finished: 0,
            failed: false,
            fell_back: false,
            last_token_at: None,
            settle: Some(settle),
        }
    }

    fn on_token(&mut self, choice: u32) {
        let now = self.clock.now();
        self.first_token_at.get_or_insert(now);
        if choice == 0
            && let Some(before) = self.last_token_at.replace(now)
        {
            crate::metrics::token_gap(&self.envelope, now.saturating_duration_since(before));
        }
        if let Some(count) = self.delivered.get_mut(choice as usize) {
            *count += 1;
        }
    }

    fn used_tokens(&self) -> u64 {
        let delivered: u64 = self.delivered.iter().map(|&count| u64::from(count)).sum();
        self.envelope.generation.prompt.len() as u64 + delivered
    }
}

impl EventTap for Tap {
    fn observe(&mut self, event: &TokenEvent) {
        match event {
            TokenEvent::Started { queue_wait, cached_tokens, fell_back } => {
                self.queue_wait = *queue_wait;
                self.cached_tokens = *cached_tokens;
                self.fell_back = *fell_back;
            }
            TokenEvent::Prompt { .. } => {}
            TokenEvent::Token { choice, .. } => self.on_token(*choice),
            TokenEvent::Finished { reason, compute, .. } => {
                self.finished += 1;
                self.compute += *compute;
                crate::metrics::request_finished(&self.envelope, finish_label(reason));
            }
            TokenEvent::Failed(_) => self.failed = true,
        }
    }
}

impl Tap {
    fn record(&self) -> UsageRecord {
        let envelope = &self.envelope;
        let since = |at: Instant| at.saturating_duration_since(envelope.admitted_at).as_secs_f64() * 1e3;
        let outcome = if self.failed {
            Outcome::Failed
        } else if self.finished >= envelope.n_sequences() {
            Outcome::Finished
        } else {
            Outcome::Cancelled
        };
        let fell_back = envelope.fell_back || self.fell_back;
        let pin = envelope.adapter.as_ref().filter(|_| !fell_back);
        UsageRecord {
            v: 1,
            request: envelope.id.to_string(),
            at_ms: u64::try_from(self.clock.wall().as_millis()).unwrap_or(u64::MAX),
            tenant: envelope.route.tenant.clone(),
            key: self.key.clone(),
            task: envelope.route.task.clone(),
            base: envelope.base.clone(),
            adapter: pin.map(|pin| pin.name.clone()),
            adapter_hash: pin.map(|pin| pin.hash),
            tier: envelope.tier,
            cost_center: self.cost_center.clone(),
            fell_back,
            adapter_hit: self.adapter_hit,
            prompt_tokens: u32::try_from(envelope.generation.prompt.len()).unwrap_or(u32::MAX),
            cached_tokens: self.cached_tokens,
            delivered: self.delivered.clone(),
            queue_wait_ms: self.queue_wait.as_secs_f64() * 1e3,
            first_token_ms: self.first_token_at.map(since),
            total_ms: since(self.clock.now()),
            compute_ms: self.compute.as_secs_f64() * 1e3,
            outcome,
            contract_epoch: envelope.contract_epoch,
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let record = self.record();
        crate::metrics::request_ended(&record);
        self.journal.append(&record);
        if let Some(settle) = self.settle.take() {
            settle(self.used_tokens());
        }
    }
}

/// The value of the `finished_reason` label, in vLLM's words.
fn finish_label(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::StopText { .. } => "stop",
        FinishReason::Length => "length",
    }
}
