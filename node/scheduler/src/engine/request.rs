//! A request inside the engine: its settings, what each choice needs to pick tokens, and its way out.
//!
//! Events go through an outbox into the request's bounded channel, which is never waited on. While events are
//! left over the request is parked: its sequences get no rows. One place in the channel is kept for the end, so
//! that even a request with a full channel can be told that it failed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::error::RequestError;
use shared::request::Generation;
use shared::token::{FinishReason, PositionLogprobs, TokenEvent};
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::TrySendError;

use crate::grammar::{GrammarError, GrammarState};
use crate::sampler::History;
use crate::source::Work;
use crate::stop::StopMatcher;

/// What a choice needs besides its tokens: functions of prompt and emitted tokens.
#[derive(Debug)]
pub(super) struct ChoiceState {
    pub(super) stop: StopMatcher,
    pub(super) grammar: Option<GrammarState>,
    pub(super) history: History,
}

/// A request inside the engine.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) work: Work,
    pub(super) generation: Arc<Generation>,
    pub(super) choices: Vec<ChoiceState>,
    /// Tokens that end an answer.
    pub(super) ends: Vec<u32>,
    /// Log-probabilities of the prompt tokens computed so far.
    pub(super) prompt_logprobs: Vec<PositionLogprobs>,
    /// Time its rows took since the last choice ended, all choices together.
    pub(super) compute: Duration,
    outbox: VecDeque<TokenEvent>,
    n_open: u32,
    last_place: Option<OwnedPermit<TokenEvent>>,
    parked_since: Option<Instant>,
}

impl Request {
    /// A request that enters with these model end tokens.
    ///
    /// # Errors
    /// When the grammar cannot be started.
    pub(super) fn new(work: Work, eos: &[u32]) -> Result<Self, (Work, GrammarError)> {
        let generation = Arc::clone(&work.envelope.generation);
        let choice = || {
            Ok(ChoiceState {
                stop: StopMatcher::new(&generation.stop, generation.min_tokens),
                grammar: work.grammar.as_ref().map(|grammar| grammar.start(&[])).transpose()?,
                history: History::new(&generation.sampling, &generation.prompt, &[]),
            })
        };
        let choices = match (0..generation.n).map(|_| choice()).collect() {
            Ok(choices) => choices,
            Err(error) => return Err((work, error)),
        };
        let mut ends = generation.stop_token_ids.clone();
        if !generation.ignore_eos {
            ends.extend_from_slice(eos);
        }
        Ok(Self {
            last_place: work.sink.clone().try_reserve_owned().ok(),
            n_open: generation.n,
            outbox: VecDeque::new(),
            prompt_logprobs: Vec::new(),
            compute: Duration::ZERO,
            parked_since: None,
            work,
            generation,
            choices,
            ends,
        })
    }

    /// Queues an event.
    pub(super) fn emit(&mut self, event: TokenEvent) {
        self.outbox.push_back(event);
    }

    /// Queues the end of a choice.
    pub(super) fn finish(&mut self, choice: u32, reason: FinishReason) {
        assert!(self.n_open > 0, "a choice ends once");
        self.n_open -= 1;
        let compute = std::mem::take(&mut self.compute);
        self.emit(TokenEvent::Finished { choice, reason, compute });
    }

    /// Sends what fits into the channel; notes since when something did not.
    pub(super) fn flush(&mut self, now: Instant) {
        while let Some(event) = self.outbox.pop_front() {
            let is_last = self.n_open == 0 && self.outbox.is_empty();
            if is_last && let Some(place) = self.last_place.take() {
                place.send(event);
                continue;
            }
            match self.work.sink.try_send(event) {
                // Nobody listens: the next sweep removes the request.
                Ok(()) | Err(TrySendError::Closed(_)) => {}
                Err(TrySendError::Full(event)) => {
                    self.outbox.push_front(event);
                    self.parked_since = self.parked_since.or(Some(now));
                    return;
                }
            }
        }
        self.parked_since = None;
    }

    /// Since when its reader has not kept up.
    pub(super) fn parked_since(&self) -> Option<Instant> {
        self.parked_since
    }

    /// All choices ended and everything is sent.
    pub(super) fn is_over(&self) -> bool {
        self.n_open == 0 && self.outbox.is_empty()
    }

    /// Nobody wants the answer any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.work.cancel.is_cancelled() || self.work.sink.is_closed()
    }

    /// Tells the receiver that the whole request failed; unsent events are dropped.
    pub(super) fn fail(mut self, error: RequestError) {
        send_failure(&self.work, self.last_place.take(), error);
    }
}

/// Sends `Failed` if there is any room for it; a receiver without room sees the channel close.
pub(super) fn send_failure(work: &Work, place: Option<OwnedPermit<TokenEvent>>, error: RequestError) {
    let event = TokenEvent::Failed(error);
    match place {
        Some(place) => drop(place.send(event)),
        None => drop(work.sink.try_send(event)),
    }
}
