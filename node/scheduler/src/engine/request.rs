//! A request inside the engine: its settings, what each choice needs to pick tokens, and its way out.
//!
//! Events go through an outbox into the request's bounded channel, which is never waited on. While events are
//! left over the request is parked: its sequences get no rows. One place in the channel is kept for the end, so
//! that even a request with a full channel can be told that it failed.
//!
//! A request that another engine could not finish comes with the tokens it has emitted. They go through the same
//! [`ChoiceState::push`] as chosen ones, so that what follows is what would have followed there.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::error::RequestError;
use shared::request::Generation;
use shared::token::{FinishReason, PositionLogprobs, TokenEvent};
use tokio::sync::mpsc::OwnedPermit;
use tokio::sync::mpsc::error::TrySendError;

use crate::grammar::{CompiledGrammar, GrammarError, GrammarState};
use crate::sampler::History;
use crate::source::Work;
use crate::stop::StopMatcher;
use crate::vocab::Vocabulary;

/// What a choice needs besides its tokens: functions of prompt and emitted tokens.
#[derive(Debug)]
pub(super) struct ChoiceState {
    pub(super) grammar: Option<GrammarState>,
    pub(super) history: History,
    stop: StopMatcher,
    n_tokens: u32,
}

/// Where answers end, the same for all choices of a request.
#[derive(Debug)]
pub(super) struct Ends {
    /// Tokens that end an answer.
    pub(super) ids: Vec<u32>,
    /// Longest answer that the request and the context allow.
    pub(super) tokens_max: u32,
}

/// Why a request cannot enter.
#[derive(Debug)]
pub(super) enum StartError {
    /// Its constraint does not allow the tokens emitted already.
    Grammar(GrammarError),
    /// A choice has tokens after its end: whoever says they were emitted is wrong.
    TokensAfterEnd,
}

/// A request inside the engine.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) work: Work,
    pub(super) generation: Arc<Generation>,
    pub(super) choices: Vec<ChoiceState>,
    pub(super) ends: Ends,
    /// Log-probabilities of the prompt tokens computed so far.
    pub(super) prompt_logprobs: Vec<PositionLogprobs>,
    /// Time its rows took since the last choice ended, all choices together.
    pub(super) compute: Duration,
    outbox: VecDeque<TokenEvent>,
    n_open: u32,
    last_place: Option<OwnedPermit<TokenEvent>>,
    parked_since: Option<Instant>,
}

// === impl ChoiceState ===

impl ChoiceState {
    /// At the start of an answer.
    fn new(generation: &Generation, grammar: Option<&CompiledGrammar>) -> Self {
        Self {
            grammar: grammar.map(CompiledGrammar::start),
            history: History::new(&generation.sampling, &generation.prompt, &[]),
            stop: StopMatcher::new(&generation.stop, generation.min_tokens),
            n_tokens: 0,
        }
    }

    /// Takes the next token; says whether the answer ends with it.
    ///
    /// # Errors
    /// When the token does not follow the grammar or a limit of it is exceeded.
    pub(super) fn push(
        &mut self,
        id: u32,
        ends: &Ends,
        vocabulary: &Vocabulary,
    ) -> Result<Option<FinishReason>, GrammarError> {
        if let Some(grammar) = &mut self.grammar {
            grammar.commit(id)?;
        }
        self.history.push(id);
        self.n_tokens += 1;
        let found = self.stop.push(vocabulary.text(id));
        Ok(if ends.ids.contains(&id) || self.grammar.as_ref().is_some_and(GrammarState::is_complete) {
            Some(FinishReason::Stop)
        } else if let Some(found) = found {
            Some(FinishReason::StopText { index: found.index })
        } else {
            (self.n_tokens >= ends.tokens_max).then_some(FinishReason::Length)
        })
    }

    /// Takes the tokens that another engine emitted; says whether the last of them ends the answer.
    fn replay(
        &mut self,
        emitted: &[u32],
        ends: &Ends,
        vocabulary: &Vocabulary,
    ) -> Result<Option<FinishReason>, StartError> {
        let mut end = None;
        for &id in emitted {
            if end.is_some() {
                return Err(StartError::TokensAfterEnd);
            }
            end = self.push(id, ends, vocabulary).map_err(StartError::Grammar)?;
        }
        Ok(end)
    }
}

// === impl Request ===

impl Request {
    /// A request that enters where sequences have at most `tokens_max` tokens, and the choices of it that still
    /// need to run. Choices that end with the last token their client has are told so after [`Request::start`].
    ///
    /// # Errors
    /// When what was emitted cannot be continued.
    pub(super) fn new(
        work: Work,
        vocabulary: &Vocabulary,
        tokens_max: usize,
    ) -> Result<(Self, Vec<u32>), (Work, StartError)> {
        let generation = Arc::clone(&work.envelope.generation);
        let mut ids = generation.stop_token_ids.clone();
        if !generation.ignore_eos {
            ids.extend_from_slice(vocabulary.eos());
        }
        let left = u32::try_from(tokens_max.saturating_sub(generation.prompt.len())).unwrap_or(u32::MAX);
        let ends = Ends { ids, tokens_max: generation.max_tokens.min(left) };
        let start = |choice: u32| {
            let mut state = ChoiceState::new(&generation, work.grammar.as_ref());
            let is_finished = work.emitted.is_finished(choice);
            let emitted = if is_finished { &[] } else { work.emitted.tokens(choice) };
            let end = state.replay(emitted, &ends, vocabulary)?;
            Ok((state, is_finished, end))
        };
        let starts: Vec<(ChoiceState, bool, Option<FinishReason>)> = match (0..generation.n).map(start).collect() {
            Ok(starts) => starts,
            Err(error) => return Err((work, error)),
        };
        let mut request = Self {
            last_place: work.sink.clone().try_reserve_owned().ok(),
            n_open: 0,
            outbox: VecDeque::new(),
            prompt_logprobs: Vec::new(),
            compute: Duration::ZERO,
            parked_since: None,
            work,
            generation,
            choices: Vec::new(),
            ends,
        };
        let mut open = Vec::new();
        for ((state, is_finished, end), choice) in starts.into_iter().zip(0..) {
            request.choices.push(state);
            request.n_open += u32::from(!is_finished);
            match end {
                Some(reason) => request.finish(choice, reason),
                None if is_finished => {}
                None => open.push(choice),
            }
        }
        Ok((request, open))
    }

    /// Puts the event in front that every request begins with.
    pub(super) fn start(&mut self, started: TokenEvent) {
        self.outbox.push_front(started);
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
