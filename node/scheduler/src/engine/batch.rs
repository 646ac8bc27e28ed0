//! Everything an engine holds between two steps, and what a step's logits do to it.
//!
//! [`super::Engine`] drives it: sweep, admit, plan, (forward), settle. No clock, no source of work, no model.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::step::{Run, Step};
use shared::error::{ErrorKind, RequestError};
use shared::id::Route;
use shared::tenant::Tier;
use shared::token::TokenEvent;

use super::request::{Request, StartError, send_failure};
use super::stats::EngineSnapshot;
use super::{EngineConfig, EngineShape};
use crate::blocks::{BlockPool, PoolConfig};
use crate::grammar::GrammarError;
use crate::plan::cost::CostModel;
use crate::plan::{PlanConfig, Planner, StepPlan};
use crate::sampler::{Draw, SampleError, Sampler};
use crate::sequence::{Phase, Sequence, SequenceInit};
use crate::source::{Charge, Room, Work};
use crate::vocab::Vocabulary;

/// The running requests of one engine.
#[derive(Debug)]
pub(super) struct Batch {
    config: EngineConfig,
    shape: EngineShape,
    vocabulary: Arc<Vocabulary>,
    planner: Planner,
    cost: CostModel,
    sampler: Sampler,
    pub(super) pool: BlockPool,
    /// In order of admission; the choices of a request stand together.
    sequences: Vec<Sequence>,
    requests: BTreeMap<u64, Request>,
    n_admitted: u64,
    /// What routes used since the engine last asked.
    charges: Vec<(Tier, Route, Charge)>,
    pub(super) stats: EngineSnapshot,
}

impl Batch {
    pub(super) fn new(config: EngineConfig, shape: EngineShape, vocabulary: Arc<Vocabulary>) -> Self {
        let pages_for = |n_tokens: usize| u32::try_from(n_tokens.div_ceil(shape.page_tokens)).unwrap_or(u32::MAX);
        let n_pages = u32::try_from(shape.n_pages).expect("page ids are u32");
        let pool = BlockPool::new(PoolConfig {
            n_pages,
            tenant_quota_pages: if config.prefix_cache { config.cache_quota_pages } else { 0 },
            tenant_floor_pages: config.cache_floor_pages,
            sequence_pages_max: pages_for(config.context).min(n_pages),
        });
        let planner = Planner::new(PlanConfig {
            rows_max: shape.rows_max,
            prefill_rows_max: config.prefill_rows_max,
            prefill_stretch: config.prefill_stretch,
            logits_rows_max: config.logits_rows_max,
            reserve: config.reserve,
        });
        let stats = EngineSnapshot {
            kv_pages: u64::from(n_pages),
            kv_pages_free: u64::from(n_pages),
            ..EngineSnapshot::default()
        };
        Self {
            config,
            shape,
            vocabulary,
            planner,
            cost: CostModel::default(),
            sampler: Sampler::default(),
            pool,
            sequences: Vec::new(),
            requests: BTreeMap::new(),
            n_admitted: 0,
            charges: Vec::new(),
            stats,
        }
    }

    /// The sequences in short, for error texts.
    #[cfg(test)]
    pub(super) fn describe(&self) -> String {
        let line = |s: &Sequence| {
            let (computed, n, phase) = (s.computed(), s.tokens().len(), s.phase());
            format!(
                "\n{}.{} {phase:?} {computed}/{n} in {:?} held {} parked {}",
                s.request,
                s.choice,
                s.pages(),
                s.held,
                s.parked
            )
        };
        self.sequences.iter().map(line).collect()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Charges that arose since the last call.
    pub(super) fn take_charges(&mut self) -> Vec<(Tier, Route, Charge)> {
        std::mem::take(&mut self.charges)
    }

    /// Longest possible sequence: the model's context, or all pages.
    fn tokens_max(&self) -> usize {
        self.config.context.min(self.shape.n_pages * self.shape.page_tokens)
    }

    // === before the step ===

    /// Sends what slow readers now take, and removes requests that nobody wants or that took too long.
    pub(super) fn sweep(&mut self, now: Instant) {
        let numbers: Vec<u64> = self.requests.keys().copied().collect();
        for number in numbers {
            let request = self.requests.get_mut(&number).expect("listed above");
            if request.parked_since().is_some() {
                request.flush(now);
            }
            let deadline = request.work.envelope.deadline;
            let parked_for = request.parked_since().map(|since| now.saturating_duration_since(since));
            if request.is_over() {
                self.remove(number, None);
            } else if request.is_abandoned() {
                self.stats.requests_cancelled += 1;
                self.remove(number, Some(cancelled()));
            } else if now >= deadline {
                self.fail(number, deadline_exceeded());
            } else if parked_for.is_some_and(|parked_for| parked_for >= self.config.park_max) {
                self.fail(number, client_too_slow());
            } else if !lease_matches(&request.work) {
                shared::violation!(request = %request.work.envelope.id, "a leased adapter is not the pinned one");
                self.fail(number, RequestError::internal());
            } else {
                let parked = parked_for.is_some();
                self.sequences.iter_mut().filter(|sequence| sequence.request == number).for_each(|s| s.parked = parked);
            }
        }
    }

    /// What may be pulled: nothing while preempted sequences wait, for they came first. Those whose readers are slow
    /// could not come back anyway, so they hold up nobody.
    /// An empty engine takes anything: what does not fit even then is refused with a reason instead of waiting forever.
    pub(super) fn room(&self) -> Option<Room> {
        if self.requests.is_empty() {
            return Some(Room { sequences: u32::MAX, kv_tokens: u32::MAX });
        }
        let is_preempted = |sequence: &Sequence| sequence.phase() == Phase::Waiting && !sequence.held;
        if self.sequences.iter().any(|sequence| is_preempted(sequence) && !sequence.parked) {
            return None;
        }
        let sequences = self.config.sequences_max.saturating_sub(self.sequences.len());
        // Pages that running sequences will need for what they have, and one more for each to grow into.
        let running = self.sequences.iter().filter(|sequence| !is_preempted(sequence));
        let promised: usize = running.map(|sequence| sequence.n_pages_missing() + 1).sum();
        let pages = (self.pool.available_to_any() as usize).saturating_sub(promised);
        let bounded = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let room = Room { sequences: bounded(sequences), kv_tokens: bounded(pages * self.shape.page_tokens) };
        (room.sequences > 0 && room.kv_tokens > 0).then_some(room)
    }

    /// Takes a request in, or tells it why not.
    pub(super) fn admit(&mut self, work: Work, now: Instant) {
        if let Err(error) = self.check(&work, now) {
            self.refuse(&work, error);
            return;
        }
        let (mut request, open) = match Request::new(work, &self.vocabulary, self.tokens_max()) {
            Ok(request) => request,
            Err((work, StartError::Grammar(error))) => {
                return self.refuse(&work, error.to_request_error("response_format"));
            }
            Err((work, StartError::TokensAfterEnd)) => {
                shared::violation!(request = %work.envelope.id, "tokens were emitted after an end");
                return self.refuse(&work, RequestError::internal());
            }
        };
        self.n_admitted += 1;
        let n_cached = self.start_sequences(&request.work, &open);
        let envelope = &request.work.envelope;
        self.stats.requests_started += 1;
        self.stats.requests_resumed += u64::from(!request.work.emitted.is_empty());
        self.stats.prefix_queries += envelope.generation.prompt.len() as u64;
        self.stats.prefix_hits += n_cached as u64;
        let queue_wait = now.saturating_duration_since(envelope.admitted_at);
        let (fell_back, adapter_hit) = (envelope.fell_back, request.work.adapter_hit);
        request.start(TokenEvent::Started { queue_wait, cached_tokens: n_cached as u32, fell_back, adapter_hit });
        request.flush(now);
        self.requests.insert(self.n_admitted, request);
    }

    /// Makes the sequences of these choices; the first computes the prompt for all. Returns how many tokens of the
    /// prompt it found in the cache.
    fn start_sequences(&mut self, work: &Work, open: &[u32]) -> usize {
        let Work { envelope, emitted, .. } = work;
        let wants_all_logits = envelope.generation.prompt_logprobs.is_some() && emitted.is_empty();
        let start = self.sequences.len();
        for &choice in open {
            let is_first = self.sequences.len() == start;
            self.sequences.push(Sequence::new(SequenceInit {
                request: self.n_admitted,
                choice,
                tier: envelope.tier,
                tenant: envelope.route.tenant.clone(),
                cache_secret: envelope.cache_secret,
                base: self.config.base,
                adapter: envelope.adapter.as_ref().map(|pin| pin.hash),
                prompt: envelope.generation.prompt.to_vec(),
                emitted: emitted.tokens(choice).to_vec(),
                held: !is_first,
                all_logits: is_first && wants_all_logits,
                page_tokens: self.shape.page_tokens,
            }));
        }
        let Some(first) = self.sequences.get_mut(start) else { return 0 };
        first.enter(&mut self.pool).min(first.prompt_len())
    }

    fn check(&self, work: &Work, now: Instant) -> Result<(), RequestError> {
        let generation = &work.envelope.generation;
        let n_prompt = generation.prompt.len();
        if work.cancel.is_cancelled() || work.sink.is_closed() {
            return Err(cancelled());
        }
        if now >= work.envelope.deadline {
            return Err(deadline_exceeded());
        }
        if !lease_matches(work) || (generation.grammar.is_some() && work.grammar.is_none()) {
            shared::violation!(request = %work.envelope.id, "work lacks its adapter or its grammar");
            return Err(RequestError::internal());
        }
        if n_prompt == 0 || generation.n == 0 || generation.max_tokens == 0 {
            return Err(RequestError::new(
                ErrorKind::Invalid,
                "invalid_request",
                "prompt, n and max_tokens must not be empty",
            ));
        }
        if work.emitted.0.len() > generation.n as usize {
            shared::violation!(request = %work.envelope.id, "more choices were emitted than wanted");
            return Err(RequestError::internal());
        }
        let emitted = work.emitted.0.iter().flat_map(|choice| &choice.tokens);
        if generation.prompt.iter().chain(emitted).any(|&id| id as usize >= self.shape.vocab) {
            let message = format!("prompt token ids must be below {}", self.shape.vocab);
            return Err(RequestError::field("invalid_token", "prompt", message));
        }
        let most = self.tokens_max();
        if n_prompt >= most {
            let message = format!("the prompt has {n_prompt} tokens, this model takes at most {most} with the answer");
            return Err(RequestError::field("context_length_exceeded", "prompt", message));
        }
        Ok(())
    }

    fn refuse(&mut self, work: &Work, error: RequestError) {
        if error.code == "cancelled" {
            self.stats.requests_cancelled += 1;
        } else {
            self.stats.requests_failed += 1;
        }
        send_failure(work, None, error);
    }

    /// Chooses the next step's rows and reserves their pages.
    pub(super) fn plan(&mut self) -> StepPlan {
        let plan = self.planner.plan(&mut self.sequences, &mut self.pool, &self.cost);
        self.stats.preemptions += plan.n_preempted as u64;
        self.pool.assert_counts();
        plan
    }

    /// The planned rows as the forward pass wants them.
    pub(super) fn step(&self, plan: &StepPlan) -> Step {
        let run = |planned: &crate::plan::Planned| {
            let sequence = &self.sequences[planned.at];
            let start = sequence.computed();
            let tokens = sequence.tokens()[start..start + planned.n_rows].to_vec();
            let logits = sequence.wanted_logits(planned.n_rows).collect();
            let lease = &self.requests[&sequence.request].work.lease;
            let adapter = lease.as_ref().map(|lease| Arc::clone(lease.adapter()));
            Run { tokens, start, pages: sequence.pages().to_vec(), adapter, logits }
        };
        Step { runs: plan.runs.iter().map(run).collect() }
    }

    // === after the step ===

    /// Takes the results of a step in: pages are published, tokens chosen and sent, ends noticed.
    pub(super) fn settle(&mut self, plan: &StepPlan, logits: &[f32], took: Duration, now: Instant) {
        let n_rows = plan.n_rows();
        self.cost.learn(plan.load(&self.sequences), took);
        self.planner.measured(plan, &self.sequences, took, &self.cost);
        let mut rows = logits.chunks_exact(self.shape.vocab);
        let mut failed: Vec<(u64, RequestError)> = Vec::new();
        for planned in &plan.runs {
            let number = self.sequences[planned.at].request;
            let n_logits = self.sequences[planned.at].wanted_logits(planned.n_rows).len();
            let rows: Vec<&[f32]> = rows.by_ref().take(n_logits).collect();
            assert_eq!(rows.len(), n_logits, "the forward pass returns the logits asked for");
            let request = self.requests.get_mut(&number).expect("a planned sequence has a request");
            request.compute += took.mul_f64(planned.n_rows as f64 / n_rows as f64);
            if let Err(error) = self.settle_run(planned.at, planned.n_rows, &rows) {
                failed.push((number, error));
            }
        }
        for (number, error) in failed {
            if self.requests.contains_key(&number) {
                self.fail(number, error);
            }
        }
        self.count_rows(plan, took);
        self.flush(now);
    }

    fn settle_run(&mut self, at: usize, n_rows: usize, rows: &[&[f32]]) -> Result<(), RequestError> {
        let was_decoding = self.sequences[at].phase() == Phase::Decode;
        if was_decoding {
            self.stats.rows_decode += n_rows as u64
        } else {
            self.stats.rows_prefill += n_rows as u64
        }
        let first_row = self.sequences[at].computed();
        let n_prompt = self.sequences[at].advance(n_rows, &mut self.pool);
        self.stats.tokens_prompt += n_prompt as u64;
        self.charge(at, Charge { prefill: n_prompt as u32, decode: 0 });
        if self.sequences[at].all_logits {
            self.collect_prompt_logprobs(at, first_row, rows);
        }
        if self.sequences[at].n_pending() > 0 {
            return Ok(());
        }
        self.start_further_choices(at);
        let last = rows.last().expect("the logits of the newest token are always wanted");
        self.choose(at, last)
    }

    /// Log-probabilities of the tokens that follow the rows, as far as they are prompt.
    fn collect_prompt_logprobs(&mut self, at: usize, first_row: usize, rows: &[&[f32]]) {
        let sequence = &mut self.sequences[at];
        let request = self.requests.get_mut(&sequence.request).expect("a sequence has a request");
        let n_top = request.generation.prompt_logprobs.unwrap_or(0);
        if first_row == 0 {
            // A preemption before the prompt was complete starts over.
            request.prompt_logprobs.clear();
        }
        for (row, next) in rows.iter().zip(first_row + 1..sequence.prompt_len()) {
            request.prompt_logprobs.push(self.sampler.logprobs(row, sequence.tokens()[next], n_top));
        }
        if sequence.n_pending() == 0 {
            sequence.all_logits = false;
            let logprobs = std::mem::take(&mut request.prompt_logprobs);
            assert_eq!(logprobs.len(), sequence.prompt_len() - 1, "one entry per prompt token but the first");
            request.emit(TokenEvent::Prompt { logprobs });
        }
    }

    /// The prompt is done: choices that waited for it go on from its pages.
    fn start_further_choices(&mut self, at: usize) {
        let (head, tail) = self.sequences.split_at_mut(at + 1);
        let first = &head[at];
        let others = tail.iter_mut().take_while(|other| other.request == first.request);
        others.filter(|other| other.held).for_each(|other| other.enter_beside(first, &mut self.pool));
    }

    /// Chooses and emits the next token of a sequence and ends it where it must end.
    fn choose(&mut self, at: usize, logits: &[f32]) -> Result<(), RequestError> {
        let sequence = &mut self.sequences[at];
        let request = self.requests.get_mut(&sequence.request).expect("a sequence has a request");
        let Request { choices, generation, ends, .. } = &mut *request;
        let choice = &mut choices[sequence.choice as usize];
        let position = sequence.n_emitted() as u32;
        let grammar_failed = |error: GrammarError| error.to_request_error("response_format");
        let mask = choice.grammar.as_mut().map(|grammar| grammar.mask()).transpose().map_err(grammar_failed)?;
        let draw = Draw {
            logits,
            sampling: &generation.sampling,
            history: &choice.history,
            mask: mask.as_ref(),
            unwanted: if position < generation.min_tokens { &ends.ids } else { &[] },
            choice: sequence.choice,
            position,
        };
        let id = self.sampler.sample(&draw).map_err(sampling_failed)?;
        let reason = choice.push(id, ends, &self.vocabulary).map_err(grammar_failed)?;
        sequence.push(id);
        let logprobs = generation.logprobs.map(|n_top| self.sampler.logprobs(logits, id, n_top));
        request.emit(TokenEvent::Token { choice: sequence.choice, seq: position, id, logprobs });
        if let Some(reason) = reason {
            request.finish(sequence.choice, reason);
            sequence.finish(&mut self.pool);
        }
        self.stats.tokens_emitted += 1;
        self.charge(at, Charge { prefill: 0, decode: 1 });
        Ok(())
    }

    fn charge(&mut self, at: usize, charge: Charge) {
        if charge == Charge::default() {
            return;
        }
        let envelope = &self.requests[&self.sequences[at].request].work.envelope;
        match self.charges.last_mut() {
            Some((tier, route, sum)) if *tier == envelope.tier && *route == envelope.route => {
                sum.prefill += charge.prefill;
                sum.decode += charge.decode;
            }
            _ => self.charges.push((envelope.tier, envelope.route.clone(), charge)),
        }
    }

    /// Sends what the step brought; parks requests whose channel is full; removes those that are over.
    fn flush(&mut self, now: Instant) {
        let mut over = Vec::new();
        for (&number, request) in &mut self.requests {
            request.flush(now);
            if request.is_over() {
                over.push(number);
            }
        }
        over.into_iter().for_each(|number| self.remove(number, None));
        self.sequences.retain(|sequence| sequence.phase() != Phase::Done);
        let requests = &self.requests;
        self.sequences.iter_mut().for_each(|s| s.parked = requests[&s.request].parked_since().is_some());
    }

    fn fail(&mut self, number: u64, error: RequestError) {
        self.stats.requests_failed += 1;
        self.remove(number, Some(error));
    }

    /// Frees everything a request holds, the tenant's credit last.
    fn remove(&mut self, number: u64, error: Option<RequestError>) {
        let Some(request) = self.requests.remove(&number) else {
            return;
        };
        for sequence in self.sequences.iter_mut().filter(|sequence| sequence.request == number) {
            sequence.finish(&mut self.pool);
        }
        self.sequences.retain(|sequence| sequence.request != number);
        match error {
            Some(error) => request.fail(error),
            None => self.stats.requests_finished += 1,
        }
    }

    /// Fails everything without touching pages or sequences, which a panic may have left in any state.
    pub(super) fn fail_everything(&mut self) {
        for (_, request) in std::mem::take(&mut self.requests) {
            self.stats.requests_failed += 1;
            request.fail(RequestError::internal());
        }
    }

    fn count_rows(&mut self, plan: &StepPlan, took: Duration) {
        self.stats.count_step(plan.n_rows() as u64);
        self.stats.forward_ns += u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    }

    /// Brings the state part of the numbers up to date.
    pub(super) fn update_stats(&mut self) {
        let count = |phase: &dyn Fn(&Sequence) -> bool| self.sequences.iter().filter(|s| phase(s)).count() as u64;
        self.stats.requests = self.requests.len() as u64;
        self.stats.sequences_running = count(&|s| matches!(s.phase(), Phase::Prefill | Phase::Decode));
        self.stats.sequences_preempted = count(&|s| s.phase() == Phase::Waiting && !s.held);
        self.stats.requests_parked =
            self.requests.values().filter(|request| request.parked_since().is_some()).count() as u64;
        let usage = self.pool.usage();
        self.stats.kv_pages_used = u64::from(usage.used);
        self.stats.kv_pages_cached = u64::from(usage.cached);
        self.stats.kv_pages_free = u64::from(usage.free);
    }
}

/// The lease holds exactly the pinned content.
fn lease_matches(work: &Work) -> bool {
    match (&work.envelope.adapter, &work.lease) {
        (None, None) => true,
        (Some(pin), Some(lease)) => pin.hash == lease.hash(),
        _ => false,
    }
}

fn cancelled() -> RequestError {
    RequestError::new(ErrorKind::Unavailable, "cancelled", "the request was cancelled by its client")
}

fn deadline_exceeded() -> RequestError {
    RequestError::new(
        ErrorKind::Deadline,
        "deadline_exceeded",
        "the request's deadline passed before its answer was complete",
    )
}

fn client_too_slow() -> RequestError {
    RequestError::new(ErrorKind::Unavailable, "client_too_slow", "the client did not read its answer for too long")
}

fn sampling_failed(error: SampleError) -> RequestError {
    let (code, hint) = match error {
        SampleError::NotFinite => ("not_finite", "the adapter's weights overflow on this input"),
        SampleError::NothingAllowed => ("nothing_allowed", "relax logit_bias or the response format"),
    };
    RequestError::new(ErrorKind::Unprocessable, code, format!("{error}; hint: {hint}"))
}
