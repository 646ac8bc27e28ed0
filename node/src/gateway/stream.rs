//! An answer piece by piece: what each piece looks like and which tokens it carries, and the task that carries pieces
//! to a [`Sink`] without ever waiting longer than the slow-reader rule allows. [`super::sse`] is the sink of HTTP,
//! [`super::clients`] that of the client library.
//!
//! Where pieces are cut depends on the tokens alone, so an answer that goes on at another node is cut alike, and what
//! its client has already is left out.

use std::future::Future;
use std::sync::Arc;

use ::wire::client::{Have, Piece};
use serde::Serialize;
use shared::clock::Clock;
use shared::error::{ErrorKind, RequestError};
use tokio::time::timeout;

use super::answer::{self, Kind, Shape};
use super::assemble::{Assembly, Ending, Fresh, Progress};
use super::backend::Backend;
use super::flow::{Arrival, Flow, count};
use super::tools::calls::Call;
use super::wire::{ChatChunk, ChunkChoice, Completion, CompletionChoice, CompletionLogprobs, Delta, Tenantry, Usage};

/// One part of an answer on its way to the client.
#[derive(Debug)]
pub enum Part {
    /// More of a choice.
    Piece(Piece),
    /// What belongs to no choice (usage), JSON; behind all pieces.
    Extra(Vec<u8>),
    /// The request failed; only [`Part::Done`] follows.
    Failed(RequestError),
    /// All is said.
    Done,
    /// Nothing yet.
    Waiting,
}

/// Where parts go.
pub trait Sink: Send + 'static {
    /// Sends them; false when the client is gone or too slow.
    fn send(&mut self, parts: Vec<Part>) -> impl Future<Output = bool> + Send;

    /// Ends when the client waits no more.
    fn gone(&self) -> impl Future<Output = ()> + Send;
}

/// Carries events to the sink until the answer is complete, the request fails, or the client is gone. `first` is what
/// has already arrived, `have` what the client has.
pub async fn pump<B: Backend, S: Sink>(
    backend: Arc<B>,
    shape: Shape,
    flow: Flow,
    first: Vec<Arrival>,
    have: Vec<Have>,
    keep_alive: std::time::Duration,
    mut sink: S,
) {
    let mut writer = Writer::new(shape, flow, have);
    writer.open();
    let mut arrived = Some(first);
    loop {
        let over = match arrived {
            Some(events) => writer.take(backend.clock(), events),
            None => true,
        };
        if over {
            writer.close();
        }
        let parts = std::mem::take(&mut writer.out);
        let sent = parts.is_empty() || sink.send(parts).await;
        if !sent || over {
            // Dropping the flow here cancels whatever still runs.
            return;
        }
        arrived = tokio::select! {
            () = sink.gone() => return,
            waited = timeout(keep_alive, writer.flow.next()) => match waited {
                Ok(events) => events,
                Err(_) => {
                    writer.out.push(Part::Waiting);
                    Some(Vec::new())
                }
            },
        };
    }
}

/// Events in, parts of the answer out. Pure but for the ids of tool calls.
struct Writer {
    shape: Shape,
    flow: Flow,
    out: Vec<Part>,
    /// What the client had at the start, by choice.
    have: Vec<Have>,
    /// Tokens in pieces so far, by choice.
    written: Vec<u32>,
    failure: Option<RequestError>,
    /// Sent once, with the first piece after it is known.
    tenantry: Option<Tenantry>,
    told_fallback: bool,
    echo_characters: Vec<u32>,
    echoed: bool,
}

/// What a piece does for its choice.
#[derive(Debug, Clone, Copy)]
struct Carries {
    choice: u32,
    n_tokens: u32,
    opens: bool,
    ends: bool,
}

impl Carries {
    fn opening(choice: u32) -> Self {
        Self { choice, n_tokens: 0, opens: true, ends: false }
    }

    fn tokens(choice: u32, n_tokens: usize) -> Self {
        Self { choice, n_tokens: count(n_tokens), opens: false, ends: false }
    }

    fn ending(choice: u32, n_tokens: usize) -> Self {
        Self { ends: true, ..Self::tokens(choice, n_tokens) }
    }
}

impl Writer {
    fn new(shape: Shape, flow: Flow, have: Vec<Have>) -> Self {
        let tenantry = flow.tenantry();
        let told_fallback = tenantry.is_some();
        let echo_characters = vec![0; flow.parts.len()];
        let written = vec![0; flow.parts.len() * shape.n as usize];
        Self {
            shape,
            flow,
            out: Vec::new(),
            have,
            written,
            failure: None,
            tenantry,
            told_fallback,
            echo_characters,
            echoed: false,
        }
    }

    /// Writes a piece unless the client has it.
    fn piece<T: Serialize>(&mut self, carries: Carries, make: impl FnOnce(&mut Self) -> T) {
        let Carries { choice, n_tokens, opens, ends } = carries;
        let have = self.have.get(choice as usize).copied().unwrap_or_default();
        let first = self.written[choice as usize];
        let next = first + n_tokens;
        self.written[choice as usize] = next;
        let has_tokens = next <= have.next;
        if has_tokens && (!opens || have.opened) && (!ends || have.ended) && (n_tokens > 0 || opens || ends) {
            return;
        }
        if first < have.next && !has_tokens {
            // Pieces are cut alike everywhere: this client counts otherwise than we told it.
            let message = "what the client says it has ends inside a piece; hint: send the request again";
            self.failure = Some(RequestError::new(ErrorKind::Conflict, "resume_misfit", message));
            return;
        }
        let json = serde_json::to_vec(&make(self)).expect("response types have string keys and finite numbers");
        self.out.push(Part::Piece(Piece { choice, first, n_tokens, opens, ends, json }));
    }

    /// The role chunk of each choice.
    fn open(&mut self) {
        if self.shape.kind != Kind::Chat {
            return;
        }
        let ids = self.shape.return_token_ids.then(|| self.flow.parts[0].prompt_tokens.to_vec());
        for index in 0..self.shape.n {
            let ids = ids.clone().filter(|_| index == 0);
            self.piece(Carries::opening(index), |writer| {
                let delta = Delta { role: Some("assistant"), content: Some(String::new()), tool_calls: Vec::new() };
                let choice = ChunkChoice { index, delta, logprobs: None, finish_reason: None, token_ids: None };
                ChatChunk { prompt_token_ids: ids, ..writer.chat_chunk(vec![choice]) }
            });
        }
    }

    /// Takes in what arrived; true when nothing can follow.
    fn take(&mut self, clock: &dyn Clock, arrived: Vec<Arrival>) -> bool {
        for (prompt_idx, event) in arrived {
            let assembly = &mut self.flow.parts[prompt_idx].assembly;
            let progress = match event {
                Some(event) => assembly.on_event(clock.now(), event),
                None if assembly.is_complete() => continue,
                None => Err(Assembly::broke_off()),
            };
            if !self.told_fallback && self.flow.parts[prompt_idx].assembly.fell_back {
                // Known too late for the headers: the stream began before the queue had decided.
                self.told_fallback = true;
                self.tenantry = self.flow.tenantry();
            }
            match progress {
                Ok(Progress::Nothing) => {}
                Ok(Progress::Fresh(choice)) => self.fresh(prompt_idx, choice, None),
                Ok(Progress::Ended(choice, ending)) => self.fresh(prompt_idx, choice, Some(ending)),
                Err(error) => {
                    self.failure = Some(error);
                    return true;
                }
            }
        }
        self.failure.is_some() || self.flow.is_complete()
    }

    /// The pieces for what is new of a choice.
    fn fresh(&mut self, prompt_idx: usize, choice: u32, ending: Option<Ending>) {
        let fresh = self.flow.parts[prompt_idx].assembly.take(choice);
        match self.shape.kind {
            Kind::Chat => self.chat_fresh(choice, fresh, ending),
            Kind::Text { .. } => self.text_fresh(prompt_idx, choice, fresh, ending),
        }
    }

    fn chat_fresh(&mut self, index: u32, mut fresh: Fresh, ending: Option<Ending>) {
        let has_calls = ending.as_ref().is_some_and(|ending| !ending.calls.is_empty());
        if !fresh.text.is_empty() && !has_calls {
            let fresh = std::mem::take(&mut fresh);
            self.chat_piece(Carries::tokens(index, fresh.ids.len()), fresh, Vec::new(), None);
        }
        let Some(ending) = ending else { return };
        let reason = Some(ending.reason);
        if has_calls && !fresh.ids.is_empty() {
            // A piece of its own needs tokens of its own; text that was held back goes with the calls.
            let fresh = std::mem::take(&mut fresh);
            self.chat_piece(Carries::tokens(index, fresh.ids.len()), fresh, ending.calls, None);
            return self.chat_piece(Carries::ending(index, 0), Fresh::default(), Vec::new(), reason);
        }
        // Tokens without text, such as the end of the answer, go with the last chunk.
        self.chat_piece(Carries::ending(index, fresh.ids.len()), fresh, ending.calls, reason);
    }

    fn chat_piece(&mut self, carries: Carries, fresh: Fresh, calls: Vec<Call>, finish_reason: Option<&'static str>) {
        self.piece(carries, |writer| {
            let logprobs = answer::chat_logprobs(&writer.shape, &writer.flow.parts[0], &fresh);
            let logprobs = logprobs.filter(|all| !all.content.is_empty() || finish_reason.is_none());
            let calls = calls.into_iter().zip(0_u32..).map(|(call, idx)| answer::tool_call(call, Some(idx)));
            let content = (!fresh.text.is_empty()).then_some(fresh.text);
            let delta = Delta { content, tool_calls: calls.collect(), ..Delta::default() };
            let token_ids = writer.shape.return_token_ids.then_some(fresh.ids);
            let index = carries.choice;
            writer.chat_chunk(vec![ChunkChoice { index, delta, logprobs, finish_reason, token_ids }])
        });
    }

    fn text_fresh(&mut self, prompt_idx: usize, choice: u32, fresh: Fresh, ending: Option<Ending>) {
        self.echo();
        if fresh.text.is_empty() && ending.is_none() {
            return;
        }
        let part = &self.flow.parts[prompt_idx];
        let mut logprobs = CompletionLogprobs::default();
        answer::add_answer_logprobs(&mut logprobs, part, &fresh.logprobs, self.echo_characters[prompt_idx]);
        let index = self.index(prompt_idx, choice);
        let reason = ending.map(|ending| ending.reason);
        let carries = Carries { ends: reason.is_some(), ..Carries::tokens(index, fresh.ids.len()) };
        self.piece(carries, |writer| writer.text_piece(index, fresh.text, logprobs, fresh.ids, reason));
    }

    /// First pieces: the prompt's text when it is to be echoed, and its ids. Sent when the prompt's
    /// log-probabilities have come, that is with the first token.
    fn echo(&mut self) {
        if std::mem::replace(&mut self.echoed, true) {
            return;
        }
        for prompt_idx in 0..self.flow.parts.len() {
            let echo = answer::echo(&self.shape, &self.flow.parts[prompt_idx], prompt_idx);
            if echo.is_none() && !self.shape.return_token_ids {
                continue;
            }
            let (text, logprobs) = echo.map(|echo| (echo.text, echo.logprobs)).unwrap_or_default();
            self.echo_characters[prompt_idx] = count(text.chars().count());
            for choice in 0..self.shape.n {
                let index = self.index(prompt_idx, choice);
                let (text, logprobs) = (text.clone(), logprobs.clone());
                self.piece(Carries::opening(index), |writer| {
                    let mut piece = writer.text_piece(index, text, logprobs, Vec::new(), None);
                    let ids = writer.flow.parts[prompt_idx].prompt_tokens.to_vec();
                    piece.choices[0].prompt_token_ids = writer.shape.return_token_ids.then_some(ids);
                    piece
                });
            }
        }
    }

    /// The last parts: an error or the usage, then the end mark.
    fn close(&mut self) {
        if let Some(error) = self.failure.take() {
            self.out.push(Part::Failed(error));
        } else if self.shape.include_usage {
            let usage = Some(Some(self.flow.usage()));
            let json = match self.shape.kind {
                Kind::Chat => serde_json::to_vec(&ChatChunk { usage, ..self.chat_chunk(Vec::new()) }),
                Kind::Text { .. } => serde_json::to_vec(&Completion { usage, ..self.completion(Vec::new()) }),
            };
            self.out.push(Part::Extra(json.expect("response types have string keys and finite numbers")));
        }
        self.out.push(Part::Done);
    }

    /// `usage` of an ordinary piece: absent, null or the count so far.
    fn running_usage(&self) -> Option<Option<Usage>> {
        if self.shape.continuous_usage {
            return Some(Some(self.flow.usage()));
        }
        self.shape.include_usage.then_some(None)
    }

    fn chat_chunk(&mut self, choices: Vec<ChunkChoice>) -> ChatChunk {
        ChatChunk {
            id: self.shape.id.clone(),
            object: "chat.completion.chunk",
            created: self.shape.created,
            model: self.flow.served().model.clone(),
            choices,
            usage: self.running_usage(),
            system_fingerprint: self.flow.served().numerics_id.clone(),
            prompt_token_ids: None,
            tenantry: self.tenantry.take(),
        }
    }

    fn completion(&mut self, choices: Vec<CompletionChoice>) -> Completion {
        Completion {
            id: self.shape.id.clone(),
            object: "text_completion",
            created: self.shape.created,
            model: self.flow.served().model.clone(),
            choices,
            usage: self.running_usage(),
            system_fingerprint: self.flow.served().numerics_id.clone(),
            tenantry: self.tenantry.take(),
        }
    }

    /// Number of a choice among those of all prompts.
    fn index(&self, prompt_idx: usize, choice: u32) -> u32 {
        count(prompt_idx) * self.shape.n + choice
    }

    fn text_piece(
        &mut self,
        index: u32,
        text: String,
        logprobs: CompletionLogprobs,
        ids: Vec<u32>,
        finish_reason: Option<&'static str>,
    ) -> Completion {
        let choice = CompletionChoice {
            index,
            text,
            logprobs: (self.shape.logprobs && !logprobs.tokens.is_empty()).then_some(logprobs),
            finish_reason,
            token_ids: self.shape.return_token_ids.then_some(ids),
            prompt_token_ids: None,
            prompt_logprobs: None,
        };
        self.completion(vec![choice])
    }
}
