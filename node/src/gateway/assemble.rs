//! Token events of one request → text, ids, log-probabilities and ends of its choices: what whole answers and
//! streams have in common. Pure; time is passed in. Checks what `shared::token` promises about the events.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::error::{ErrorKind, RequestError};
use shared::token::{FinishReason, PositionLogprobs, TokenEvent};

use super::backend::TokenText;
use super::text::{StopGate, Utf8Stream};
use super::tools::calls::{Call, CallGate, MARKERS};
use super::tools::{Choice as ToolChoice, ToolUse};

/// State of one request's answer.
pub struct Assembly {
    token_text: Arc<dyn TokenText>,
    choices: Vec<ChoiceState>,
    tools: Option<ToolUse>,
    n_open: usize,
    /// Tokens of all choices.
    pub completion_tokens: u32,
    /// Prompt tokens that came from the cache.
    pub cached_tokens: u32,
    /// The base answers in place of an adapter that cannot be had.
    pub fell_back: bool,
    /// Log-probabilities of the prompt.
    pub prompt_logprobs: Option<Vec<PositionLogprobs>>,
    /// Time in queue and in forward steps.
    pub timing: Timing,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default)]
pub struct Timing {
    /// From admission to entering the batch.
    pub queue_wait: Duration,
    /// Inside forward steps, all choices.
    pub compute: Duration,
    /// When the first token came.
    pub first_token: Option<Instant>,
}

/// What is new of a choice since it was last taken.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fresh {
    /// Text that may be shown.
    pub text: String,
    /// Tokens behind it.
    pub ids: Vec<u32>,
    /// Their log-probabilities, when asked for.
    pub logprobs: Vec<Position>,
}

/// Log-probabilities of a token and where it begins in the text, in characters.
#[derive(Debug, Clone, PartialEq)]
pub struct Position {
    /// The numbers.
    pub logprobs: PositionLogprobs,
    /// Characters of the answer before it.
    pub offset: u32,
}

/// How a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// `stop`, `length` or `tool_calls`.
    pub reason: &'static str,
    /// Calls, whole.
    pub calls: Vec<Call>,
}

/// What an event led to.
#[derive(Debug, Clone, PartialEq)]
pub enum Progress {
    /// Nothing to show.
    Nothing,
    /// This choice has something new.
    Fresh(u32),
    /// This choice ended; what is new is still to be taken.
    Ended(u32, Ending),
}

struct ChoiceState {
    characters: Utf8Stream,
    stop: StopGate,
    calls: Option<CallGate>,
    fresh: Fresh,
    n_tokens: u32,
    n_characters: u32,
    ended: bool,
}

impl Assembly {
    /// Nothing has happened yet. `n` choices; `stop` as in the request.
    pub fn new(token_text: Arc<dyn TokenText>, n: u32, stop: &[String], tools: Option<ToolUse>) -> Self {
        let choice = || ChoiceState {
            characters: Utf8Stream::default(),
            stop: StopGate::new(stop.to_vec()),
            calls: tools.clone().map(CallGate::new),
            fresh: Fresh::default(),
            n_tokens: 0,
            n_characters: 0,
            ended: false,
        };
        Self {
            token_text,
            choices: (0..n).map(|_| choice()).collect(),
            n_open: n as usize,
            tools,
            completion_tokens: 0,
            cached_tokens: 0,
            fell_back: false,
            prompt_logprobs: None,
            timing: Timing::default(),
        }
    }

    /// Whether every choice has ended.
    pub fn is_complete(&self) -> bool {
        self.n_open == 0
    }

    /// What is new of a choice.
    pub fn take(&mut self, choice: u32) -> Fresh {
        self.choices.get_mut(choice as usize).map(|state| std::mem::take(&mut state.fresh)).unwrap_or_default()
    }

    /// Takes in one event.
    ///
    /// # Errors
    /// The request's failure, or a broken promise about the events.
    pub fn on_event(&mut self, now: Instant, event: TokenEvent) -> Result<Progress, RequestError> {
        match event {
            TokenEvent::Started { queue_wait, cached_tokens, fell_back, .. } => {
                self.timing.queue_wait = queue_wait;
                self.cached_tokens = cached_tokens;
                self.fell_back = fell_back;
                Ok(Progress::Nothing)
            }
            TokenEvent::Prompt { logprobs } => {
                self.prompt_logprobs = Some(logprobs);
                Ok(Progress::Nothing)
            }
            TokenEvent::Token { choice, seq, id, logprobs } => self.on_token(now, choice, seq, id, logprobs),
            TokenEvent::Finished { choice, reason, compute } => self.on_finished(choice, &reason, compute),
            TokenEvent::Failed(error) => Err(error),
        }
    }

    /// The error for a channel that closed too early: the engine is gone.
    pub fn broke_off() -> RequestError {
        RequestError::new(
            ErrorKind::Unavailable,
            "engine_restarted",
            "the engine restarted; hint: send the request again",
        )
        .retry_after(Duration::from_secs(1))
    }

    fn on_token(
        &mut self,
        now: Instant,
        choice: u32,
        seq: u32,
        id: u32,
        logprobs: Option<PositionLogprobs>,
    ) -> Result<Progress, RequestError> {
        let in_tools = self.tools.is_some();
        let state = self.choices.get_mut(choice as usize).filter(|state| !state.ended && state.n_tokens == seq);
        let state = state.ok_or_else(|| broken_promise("token", choice, seq))?;
        self.timing.first_token.get_or_insert(now);
        self.completion_tokens += 1;
        state.n_tokens += 1;
        state.fresh.ids.push(id);
        let piece = self.token_text.piece(id);
        let is_text = !piece.special || (in_tools && MARKERS.iter().any(|marker| marker.as_bytes() == &*piece.bytes));
        if let Some(logprobs) = logprobs {
            state.fresh.logprobs.push(Position { logprobs, offset: state.n_characters });
        }
        if is_text {
            let text = state.characters.push(&piece.bytes);
            state.show(&text);
        }
        Ok(if state.fresh.text.is_empty() { Progress::Nothing } else { Progress::Fresh(choice) })
    }

    fn on_finished(&mut self, choice: u32, reason: &FinishReason, compute: Duration) -> Result<Progress, RequestError> {
        let state = self.choices.get_mut(choice as usize).filter(|state| !state.ended);
        let state = state.ok_or_else(|| broken_promise("end", choice, 0))?;
        state.ended = true;
        self.n_open -= 1;
        self.timing.compute += compute;
        let stop_idx = match reason {
            FinishReason::StopText { index } => Some(*index),
            FinishReason::Stop | FinishReason::Length => None,
        };
        let last = state.characters.finish();
        state.show(&last);
        let rest = state.stop.finish(stop_idx);
        let mut ending = Ending { reason: "stop", calls: Vec::new() };
        if *reason == FinishReason::Length {
            ending.reason = "length";
        }
        match state.calls.take() {
            None => state.fresh.text.push_str(&rest),
            Some(mut gate) => {
                let passed = gate.push(&rest);
                let reading = gate.finish();
                state.fresh.text.push_str(&passed);
                state.fresh.text.push_str(&reading.content);
                let named = matches!(self.tools.as_ref().map(|tools| &tools.choice), Some(ToolChoice::Named(_)));
                // OpenAI reports `stop` when the client itself named the function.
                if !reading.calls.is_empty() && ending.reason == "stop" && !named {
                    ending.reason = "tool_calls";
                }
                ending.calls = reading.calls;
            }
        }
        Ok(Progress::Ended(choice, ending))
    }
}

impl ChoiceState {
    fn show(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        self.n_characters += u32::try_from(text.chars().count()).unwrap_or(u32::MAX);
        let passed = self.stop.push(text);
        match &mut self.calls {
            Some(gate) => self.fresh.text.push_str(&gate.push(&passed)),
            None => self.fresh.text.push_str(&passed),
        }
    }
}

fn broken_promise(what: &str, choice: u32, seq: u32) -> RequestError {
    shared::critical!("{what} out of order: choice {choice}, seq {seq}");
    RequestError::internal()
}
