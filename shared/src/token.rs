//! What flows back from the engine: tokens with sequence numbers, then an end per choice.
//!
//! One bounded channel per request carries the events of all its choices. The receiver may rely on:
//! `Started` first; per choice `seq` counts 0, 1, 2 … without gaps; exactly one `Finished` per choice
//! or one `Failed` for the whole request, after which nothing follows.

use std::time::Duration;

use crate::error::RequestError;

/// A token with its natural-log probability under the model's own distribution (before temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenLogprob {
    /// Token id.
    pub id: u32,
    /// ln p.
    pub logprob: f32,
}

/// Log-probabilities at one position.
#[derive(Debug, Clone, PartialEq)]
pub struct PositionLogprobs {
    /// The token that stands there.
    pub chosen: TokenLogprob,
    /// The most likely tokens, best first; ties by lower id.
    pub top: Vec<TokenLogprob>,
}

/// Why a choice ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FinishReason {
    /// End-of-answer token, or the grammar is complete.
    Stop,
    /// One of the request's stop texts; the text before it is the answer.
    StopText {
        /// Index into `Generation::stop`.
        index: usize,
    },
    /// `max_tokens` or the model's context is used up.
    Length,
}

/// One event of a request.
#[derive(Debug, Clone, PartialEq)]
pub enum TokenEvent {
    /// The request entered the batch.
    Started {
        /// From admission to entering the batch.
        queue_wait: Duration,
        /// Prompt tokens whose KV came from the tenant's prefix cache.
        cached_tokens: u32,
        /// The base answers in place of an adapter that is missing or cannot be loaded.
        fell_back: bool,
        /// The adapter was in engine memory when the request arrived where it runs; `None` for base requests.
        adapter_hit: Option<bool>,
    },
    /// Log-probabilities of prompt tokens 1…, when asked for; sent once, before the first token.
    Prompt {
        /// One entry per prompt token after the first.
        logprobs: Vec<PositionLogprobs>,
    },
    /// One token of one choice.
    Token {
        /// Choice index.
        choice: u32,
        /// 0, 1, 2 … within the choice.
        seq: u32,
        /// The token; end-of-answer tokens are sent too.
        id: u32,
        /// When asked for.
        logprobs: Option<PositionLogprobs>,
    },
    /// A choice ended.
    Finished {
        /// Choice index.
        choice: u32,
        /// Why.
        reason: FinishReason,
        /// Time all the request's sequences spent inside forward steps, attributed by rows, since the last choice
        /// ended: the sum over choices is the request's.
        compute: Duration,
    },
    /// The request as a whole failed; nothing follows.
    Failed(RequestError),
}
