//! An answer piece by piece, as server-sent events: what each piece looks like, and the task that carries them
//! to the client without ever waiting longer than the slow-reader rule allows.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use axum::body::Body;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderValue, Response};
use bytes::{Bytes, BytesMut};
use futures_util::stream;
use serde::Serialize;
use shared::clock::Clock;
use shared::error::RequestError;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::answer::{self, Kind, Shape};
use super::assemble::{Assembly, Ending, Fresh, Progress};
use super::backend::Backend;
use super::flow::{Arrival, Flow, count};
use super::limits::{FRAMES_AHEAD_MAX, Pace};
use super::reply::{self, error_body};
use super::wire::{ChatChunk, ChunkChoice, Completion, CompletionChoice, CompletionLogprobs, Delta, Tenantry, Usage};

/// The streaming response. `first` is what has already arrived.
pub fn respond<B: Backend>(
    backend: Arc<B>,
    shape: Shape,
    mut flow: Flow,
    first: Vec<Arrival>,
    pace: Pace,
) -> Response<Body> {
    let (frames, receiver) = mpsc::channel(FRAMES_AHEAD_MAX);
    let cut = Arc::new(AtomicBool::new(false));
    let mut response = Response::new(body(receiver, cut.clone()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    reply::set(headers, "x-accel-buffering", "no");
    flow.look_ahead(&first);
    flow.headers(headers);
    let pump = Pump { backend, writer: Writer::new(shape, flow), frames, cut, pace };
    tokio::spawn(pump.run(first));
    response
}

/// Frames as a body. A stream that was cut ends in an error, so that no client takes it for complete.
fn body(frames: mpsc::Receiver<Bytes>, cut: Arc<AtomicBool>) -> Body {
    Body::from_stream(stream::unfold((frames, cut, false), |(mut frames, cut, over)| async move {
        if over {
            return None;
        }
        match frames.recv().await {
            Some(frame) => Some((Ok(frame), (frames, cut, false))),
            None if cut.load(Ordering::Acquire) => {
                let error = io::Error::new(io::ErrorKind::TimedOut, "the client read too slowly");
                Some((Err(error), (frames, cut, true)))
            }
            None => None,
        }
    }))
}

/// Carries events to frames until the answer is complete, the request fails, or the client is gone.
struct Pump<B> {
    backend: Arc<B>,
    writer: Writer,
    frames: mpsc::Sender<Bytes>,
    cut: Arc<AtomicBool>,
    pace: Pace,
}

impl<B: Backend> Pump<B> {
    async fn run(mut self, first: Vec<Arrival>) {
        self.writer.open();
        let mut arrived = Some(first);
        loop {
            let over = match arrived {
                Some(events) => self.writer.take(self.backend.clock(), events),
                None => true,
            };
            if over {
                self.writer.close();
            }
            if !self.send().await || over {
                // Dropping the flow here cancels whatever still runs.
                return;
            }
            arrived = tokio::select! {
                () = self.frames.closed() => return,
                waited = timeout(self.pace.keep_alive, self.writer.flow.next()) => match waited {
                    Ok(events) => events,
                    Err(_) => {
                        self.writer.out.extend_from_slice(b": keep-alive\n\n");
                        Some(Vec::new())
                    }
                },
            };
        }
    }

    /// Hands over what is written. False when the client is gone or too slow.
    async fn send(&mut self) -> bool {
        let frame = self.writer.out.split().freeze();
        if frame.is_empty() {
            return true;
        }
        match timeout(self.pace.stall, self.frames.send(frame)).await {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                crate::metrics::stream_cut("slow_reader");
                self.cut.store(true, Ordering::Release);
                false
            }
        }
    }
}

/// Events in, bytes of server-sent events out. Pure but for the ids of tool calls.
struct Writer {
    shape: Shape,
    flow: Flow,
    out: BytesMut,
    failure: Option<RequestError>,
    /// Sent once, with the first piece after it is known.
    tenantry: Option<Tenantry>,
    told_fallback: bool,
    echo_characters: Vec<u32>,
    echoed: bool,
}

impl Writer {
    fn new(shape: Shape, flow: Flow) -> Self {
        let tenantry = flow.tenantry();
        let told_fallback = tenantry.is_some();
        let echo_characters = vec![0; flow.parts.len()];
        Self {
            shape,
            flow,
            out: BytesMut::new(),
            failure: None,
            tenantry,
            told_fallback,
            echo_characters,
            echoed: false,
        }
    }

    /// The role chunk of each choice.
    fn open(&mut self) {
        if self.shape.kind != Kind::Chat {
            return;
        }
        let ids = self.shape.return_token_ids.then(|| self.flow.parts[0].prompt_tokens.to_vec());
        for index in 0..self.shape.n {
            let delta = Delta { role: Some("assistant"), content: Some(String::new()), tool_calls: Vec::new() };
            let mut chunk = self.chat_chunk(vec![ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
                token_ids: None,
            }]);
            chunk.prompt_token_ids = ids.clone().filter(|_| index == 0);
            frame(&mut self.out, &chunk);
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
        self.flow.is_complete()
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
        if !fresh.text.is_empty() {
            let fresh = std::mem::take(&mut fresh);
            let logprobs = answer::chat_logprobs(&self.shape, &self.flow.parts[0], &fresh);
            let token_ids = self.shape.return_token_ids.then_some(fresh.ids);
            let delta = Delta { content: Some(fresh.text), ..Delta::default() };
            let chunk = self.chat_chunk(vec![ChunkChoice { index, delta, logprobs, finish_reason: None, token_ids }]);
            frame(&mut self.out, &chunk);
        }
        let Some(ending) = ending else { return };
        if !ending.calls.is_empty() {
            let calls = ending.calls.into_iter().zip(0_u32..).map(|(call, idx)| answer::tool_call(call, Some(idx)));
            let delta = Delta { tool_calls: calls.collect(), ..Delta::default() };
            let choice = ChunkChoice { index, delta, logprobs: None, finish_reason: None, token_ids: None };
            let chunk = self.chat_chunk(vec![choice]);
            frame(&mut self.out, &chunk);
        }
        // Tokens without text, such as the end of the answer, go with the last chunk.
        let logprobs =
            answer::chat_logprobs(&self.shape, &self.flow.parts[0], &fresh).filter(|all| !all.content.is_empty());
        let token_ids = self.shape.return_token_ids.then_some(fresh.ids);
        let finish_reason = Some(ending.reason);
        let choice = ChunkChoice { index, delta: Delta::default(), logprobs, finish_reason, token_ids };
        let chunk = self.chat_chunk(vec![choice]);
        frame(&mut self.out, &chunk);
    }

    fn text_fresh(&mut self, prompt_idx: usize, choice: u32, fresh: Fresh, ending: Option<Ending>) {
        self.echo();
        if fresh.text.is_empty() && ending.is_none() {
            return;
        }
        let part = &self.flow.parts[prompt_idx];
        let mut logprobs = CompletionLogprobs::default();
        answer::add_answer_logprobs(&mut logprobs, part, &fresh.logprobs, self.echo_characters[prompt_idx]);
        let piece =
            self.text_piece(prompt_idx, choice, fresh.text, logprobs, fresh.ids, ending.map(|ending| ending.reason));
        frame(&mut self.out, &piece);
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
                let mut piece = self.text_piece(prompt_idx, choice, text.clone(), logprobs.clone(), Vec::new(), None);
                let ids = self.flow.parts[prompt_idx].prompt_tokens.to_vec();
                piece.choices[0].prompt_token_ids = self.shape.return_token_ids.then_some(ids);
                frame(&mut self.out, &piece);
            }
        }
    }

    /// The last pieces: an error or the usage, then the end mark.
    fn close(&mut self) {
        if let Some(error) = &self.failure {
            frame(&mut self.out, &error_body(error));
        } else if self.shape.include_usage {
            let usage = Some(Some(self.flow.usage()));
            match self.shape.kind {
                Kind::Chat => {
                    let chunk = ChatChunk { usage, ..self.chat_chunk(Vec::new()) };
                    frame(&mut self.out, &chunk);
                }
                Kind::Text { .. } => {
                    let piece = Completion { usage, ..self.completion(Vec::new()) };
                    frame(&mut self.out, &piece);
                }
            }
        }
        self.out.extend_from_slice(b"data: [DONE]\n\n");
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

    fn text_piece(
        &mut self,
        prompt_idx: usize,
        choice: u32,
        text: String,
        logprobs: CompletionLogprobs,
        ids: Vec<u32>,
        finish_reason: Option<&'static str>,
    ) -> Completion {
        let choice = CompletionChoice {
            index: count(prompt_idx) * self.shape.n + choice,
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

fn frame(out: &mut BytesMut, piece: &impl Serialize) {
    let json = serde_json::to_vec(piece).expect("response types have string keys and finite numbers");
    out.extend_from_slice(b"data: ");
    out.extend_from_slice(&json);
    out.extend_from_slice(b"\n\n");
}
