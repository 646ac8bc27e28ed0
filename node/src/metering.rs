//! Hop 12: what did it cost? One usage record per request, counted from the tokens that were delivered.
//!
//! [`Tap`] sits on the request's events at the entry node and counts what the client's side took; when the
//! request ends, however it ends, it hands exactly one [`UsageRecord`] to the [`journal`]. The client's own
//! view (a lost stream, a missing usage chunk) plays no part. A request that never entered the batch costs
//! nothing: its record says 0 prompt tokens. One that another node's queue refused has no record at all, as if it had
//! been refused at the door.

pub mod journal;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shared::clock::Clock;
use shared::error::ErrorKind;
use shared::hash::ContentHash;
use shared::id::{AdapterName, BaseName, TaskName, TenantId};
use shared::request::{Emitted, Envelope};
use shared::tenant::Tier;
use shared::token::{FinishReason, TokenEvent};

use journal::{Journal, OpenRecord};

use crate::gateway::assemble::Assembly;
use crate::gateway::backend::EventTap;
use crate::metrics::activity::InUse;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// Every choice finished.
    Finished,
    /// The client went away first.
    Cancelled,
    /// It failed after admission, or its engine let go of it.
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
    /// The adapter was in engine memory when the request arrived where it ran (BILL-08); `null` for base requests
    /// and for those that never entered the batch.
    pub adapter_hit: Option<bool>,
    /// Prompt tokens, billed once; 0 when the request never entered the batch.
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

// === impl UsageRecord ===

impl UsageRecord {
    /// What a node delivered that died, by the record that another kept of it; `at_ms` is when that one writes this.
    /// Times and hits died with the node. A prompt is billed when a token was delivered.
    pub fn of_another(
        envelope: &Envelope,
        emitted: &Emitted,
        key: String,
        cost_center: Option<String>,
        at_ms: u64,
    ) -> Self {
        let delivered: Vec<u32> = emitted.0.iter().map(|choice| choice.tokens.len() as u32).collect();
        let is_finished = emitted.0.iter().all(|choice| choice.finished);
        let has_run = delivered.iter().any(|&count| count > 0);
        let n_prompt = u32::try_from(envelope.generation.prompt.len()).unwrap_or(u32::MAX);
        Self {
            prompt_tokens: if has_run { n_prompt } else { 0 },
            delivered,
            outcome: if is_finished { Outcome::Finished } else { Outcome::Cancelled },
            key,
            cost_center,
            at_ms,
            ..Self::of(envelope, envelope.fell_back)
        }
    }

    /// What the request itself says.
    fn of(envelope: &Envelope, fell_back: bool) -> Self {
        let pin = envelope.adapter.as_ref().filter(|_| !fell_back);
        Self {
            v: 1,
            request: envelope.id.to_string(),
            at_ms: 0,
            tenant: envelope.route.tenant.clone(),
            key: String::new(),
            task: envelope.route.task.clone(),
            base: envelope.base.clone(),
            adapter: pin.map(|pin| pin.name.clone()),
            adapter_hash: pin.map(|pin| pin.hash),
            tier: envelope.tier,
            cost_center: None,
            fell_back,
            adapter_hit: None,
            prompt_tokens: 0,
            cached_tokens: 0,
            delivered: Vec::new(),
            queue_wait_ms: 0.0,
            first_token_ms: None,
            total_ms: 0.0,
            compute_ms: 0.0,
            outcome: Outcome::Cancelled,
            contract_epoch: envelope.contract_epoch,
        }
    }
}

/// Is told the tokens that a request used; `None` if it was refused and gets back all it had taken.
pub type Settle = Box<dyn FnOnce(Option<u64>) + Send>;

/// Counts one request's delivered events.
pub struct Tap {
    envelope: Arc<Envelope>,
    key: String,
    cost_center: Option<String>,
    adapter_hit: Option<bool>,
    journal: Journal,
    /// Lets the journal wait for the record; fields go after `drop` has written it.
    _open: OpenRecord,
    clock: Arc<dyn Clock>,
    started: bool,
    cached_tokens: u32,
    queue_wait: Duration,
    first_token_at: Option<Instant>,
    compute: Duration,
    delivered: Vec<u32>,
    finished: u32,
    /// Code of the error that ended it.
    failure: Option<&'static str>,
    fell_back: bool,
    last_token_at: Option<Instant>,
    /// Why the queue where it should have run did not take it.
    refused: Option<&'static str>,
    settle: Option<Settle>,
    in_use: Option<InUse>,
}

// === impl Tap ===

impl Tap {
    /// Starts counting an admitted request.
    pub fn new(
        envelope: Arc<Envelope>,
        key: String,
        cost_center: Option<String>,
        settle: Settle,
        journal: Journal,
        clock: Arc<dyn Clock>,
    ) -> Self {
        let delivered = vec![0; envelope.n_sequences() as usize];
        Self {
            in_use: InUse::waiting(&envelope),
            envelope,
            key,
            cost_center,
            adapter_hit: None,
            _open: journal.open_record(),
            journal,
            clock,
            started: false,
            cached_tokens: 0,
            queue_wait: Duration::ZERO,
            first_token_at: None,
            compute: Duration::ZERO,
            delivered,
            finished: 0,
            failure: None,
            fell_back: false,
            last_token_at: None,
            refused: None,
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
        u64::from(self.prompt_tokens()) + delivered
    }

    /// What the prompt costs: nothing before the request entered the batch.
    fn prompt_tokens(&self) -> u32 {
        if self.started { u32::try_from(self.envelope.generation.prompt.len()).unwrap_or(u32::MAX) } else { 0 }
    }
}

impl EventTap for Tap {
    fn observe(&mut self, event: &TokenEvent) {
        match event {
            TokenEvent::Started { queue_wait, cached_tokens, fell_back, adapter_hit } => {
                self.started = true;
                self.adapter_hit = *adapter_hit;
                self.queue_wait = *queue_wait;
                self.cached_tokens = *cached_tokens;
                self.fell_back = *fell_back;
                match &mut self.in_use {
                    // The base runs in its place.
                    Some(_) if *fell_back => self.in_use = None,
                    Some(in_use) => in_use.run(),
                    None => {}
                }
            }
            TokenEvent::Prompt { .. } => {}
            TokenEvent::Token { choice, .. } => self.on_token(*choice),
            TokenEvent::Finished { reason, compute, .. } => {
                self.finished += 1;
                self.compute += *compute;
                crate::metrics::request_finished(&self.envelope, finish_label(reason));
            }
            TokenEvent::Failed(error) => {
                self.failure = Some(error.code);
                let took_nothing = !self.started && self.delivered.iter().all(|&count| count == 0);
                self.refused = (error.kind == ErrorKind::Throttled && took_nothing).then_some(error.code);
            }
        }
    }

    fn closed(&mut self) {
        if self.finished < self.envelope.n_sequences() {
            self.failure.get_or_insert(Assembly::broke_off().code);
        }
    }
}

impl Tap {
    fn record(&self) -> UsageRecord {
        let envelope = &self.envelope;
        let since = |at: Instant| at.saturating_duration_since(envelope.admitted_at).as_secs_f64() * 1e3;
        let outcome = if self.failure.is_some() {
            Outcome::Failed
        } else if self.finished >= envelope.n_sequences() {
            Outcome::Finished
        } else {
            Outcome::Cancelled
        };
        UsageRecord {
            at_ms: u64::try_from(self.clock.wall().as_millis()).unwrap_or(u64::MAX),
            key: self.key.clone(),
            cost_center: self.cost_center.clone(),
            adapter_hit: self.adapter_hit,
            prompt_tokens: self.prompt_tokens(),
            cached_tokens: self.cached_tokens,
            delivered: self.delivered.clone(),
            queue_wait_ms: self.queue_wait.as_secs_f64() * 1e3,
            first_token_ms: self.first_token_at.map(since),
            total_ms: since(self.clock.now()),
            compute_ms: self.compute.as_secs_f64() * 1e3,
            outcome,
            ..UsageRecord::of(envelope, envelope.fell_back || self.fell_back)
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let settle = self.settle.take();
        if let Some(code) = self.refused {
            crate::metrics::rejected(Some((&self.envelope.route.tenant, self.envelope.tier)), code);
            return settle.into_iter().for_each(|settle| settle(None));
        }
        let record = self.record();
        crate::metrics::request_ended(&self.envelope, &record, self.failure);
        self.journal.append(&record);
        if let Some(settle) = settle {
            settle(Some(self.used_tokens()));
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

#[cfg(test)]
pub(crate) mod tests {
    use shared::clock::ManualClock;
    use shared::error::RequestError;
    use shared::id::{RequestId, Route};
    use shared::request::{EmittedChoice, Generation};

    use super::*;

    /// A request of three prompt tokens for the base.
    pub(crate) fn envelope(clock: &ManualClock) -> Envelope {
        let generation = Generation::new([1, 2, 3], 8);
        Envelope {
            id: RequestId(7),
            route: Route { tenant: "acme".parse().expect("valid"), task: None },
            tier: Tier::Shared,
            weight: 1,
            concurrency: 1,
            queue_depth: 1,
            base: "tiny".parse().expect("valid"),
            pin: Default::default(),
            adapter: None,
            fell_back: false,
            cache_secret: [0; 32],
            generation: Arc::new(generation),
            contract_epoch: 1,
            admitted_at: clock.now(),
            deadline: clock.now() + Duration::from_secs(1),
        }
    }

    /// What the journal holds of a request that saw `events`, and the tokens it was settled with.
    fn written(name: &str, events: &[TokenEvent], closed: bool) -> (String, Option<u64>) {
        let folder = std::env::temp_dir().join(format!("tenantry-tap-{name}-{}", std::process::id()));
        let journal = Journal::open(&folder).expect("opens");
        let clock = ManualClock::default();
        let (tell, told) = std::sync::mpsc::channel();
        let settle = Box::new(move |used| tell.send(used).expect("somebody listens"));
        let envelope = Arc::new(envelope(&clock));
        let mut tap = Tap::new(envelope, "k1".into(), None, settle, journal.clone(), Arc::new(clock));
        events.iter().for_each(|event| tap.observe(event));
        if closed {
            tap.closed();
        }
        assert_eq!(journal.open_records(), 1);
        drop(tap);
        assert_eq!(journal.open_records(), 0);
        journal.close();
        let text = std::fs::read_to_string(folder.join("usage-00000000.jsonl")).expect("a segment");
        std::fs::remove_dir_all(&folder).expect("a test folder can go");
        (text, told.try_recv().expect("settled once"))
    }

    /// The record of a request that saw `events`, and the tokens it was settled with.
    fn account(name: &str, events: &[TokenEvent], closed: bool) -> (UsageRecord, u64) {
        let (text, used) = written(name, events, closed);
        (serde_json::from_str(&text).expect("one record"), used.expect("it was not refused"))
    }

    fn started() -> TokenEvent {
        TokenEvent::Started {
            queue_wait: Duration::from_millis(2),
            cached_tokens: 0,
            fell_back: false,
            adapter_hit: None,
        }
    }

    fn token() -> TokenEvent {
        TokenEvent::Token { choice: 0, seq: 0, id: 5, logprobs: None }
    }

    #[test]
    fn a_request_that_never_started_costs_nothing() {
        let (record, used) = account("left", &[], false);
        assert_eq!((record.prompt_tokens, record.outcome, used), (0, Outcome::Cancelled, 0));
        let (record, used) = account("refused", &[TokenEvent::Failed(RequestError::internal())], false);
        assert_eq!((record.prompt_tokens, record.outcome, used), (0, Outcome::Failed, 0));
    }

    #[test]
    fn a_request_that_another_nodes_queue_refused_gets_back_what_it_took_and_has_no_record() {
        let full = || TokenEvent::Failed(RequestError::new(ErrorKind::Throttled, "queue_full", "full"));
        assert_eq!(written("throttled", &[full()], false), (String::new(), None));
        let (record, used) = account("moved", &[started(), token(), full()], false);
        assert_eq!((record.outcome, used), (Outcome::Failed, 4), "what ran is paid for");
    }

    #[test]
    fn a_request_that_started_pays_its_prompt_and_what_was_delivered() {
        let (record, used) = account("partly", &[started(), token()], false);
        assert_eq!((record.prompt_tokens, record.delivered, record.outcome), (3, vec![1], Outcome::Cancelled));
        assert_eq!(used, 4);
    }

    #[test]
    fn a_dead_nodes_request_is_billed_what_its_record_holds() {
        let (envelope, choice) = (envelope(&ManualClock::default()), |n: u32, finished| EmittedChoice {
            tokens: (0..n).collect(),
            finished,
        });
        let of = |choices: Vec<EmittedChoice>| {
            let record = UsageRecord::of_another(&envelope, &Emitted(choices), "k1".into(), None, 5);
            (record.prompt_tokens, record.delivered, record.outcome)
        };
        assert_eq!(of(vec![choice(0, false)]), (0, vec![0], Outcome::Cancelled), "it may never have begun");
        assert_eq!(of(vec![choice(2, true), choice(1, false)]), (3, vec![2, 1], Outcome::Cancelled));
        assert_eq!(of(vec![choice(2, true)]), (3, vec![2], Outcome::Finished));
    }

    #[test]
    fn an_engine_that_lets_go_of_a_request_has_failed_it() {
        let (record, _) = account("let-go", &[started(), token()], true);
        assert_eq!(record.outcome, Outcome::Failed);
        let end = TokenEvent::Finished { choice: 0, reason: FinishReason::Length, compute: Duration::ZERO };
        let (record, _) = account("finished", &[started(), token(), end], true);
        assert_eq!(record.outcome, Outcome::Finished, "closing after the end is how every request ends");
    }
}
