//! The answers of one HTTP request: one running request per prompt, their events merged in order of arrival.
//!
//! Dropping a [`Flow`] cancels everything that still runs, which is how a client that leaves frees its pages.

use std::sync::Arc;

use axum::http::HeaderMap;
use futures_util::stream::{self, BoxStream, ReadyChunks, SelectAll, StreamExt};
use shared::token::TokenEvent;

use super::assemble::Assembly;
use super::backend::{CancelOnDrop, RateState, Running, Served, TokenText};
use super::limits::EVENTS_PER_FRAME_MAX;
use super::reply;
use super::tools::ToolUse;
use super::wire::{PromptTokensDetails, Tenantry, Usage};

/// An event of the prompt with this index; `None` when its channel closed.
pub type Arrival = (usize, Option<TokenEvent>);

/// All running prompts of a request.
pub struct Flow {
    /// By prompt.
    pub parts: Vec<Part>,
    arrivals: ReadyChunks<SelectAll<BoxStream<'static, Arrival>>>,
}

/// One running prompt.
pub struct Part {
    /// What has come so far.
    pub assembly: Assembly,
    /// What serves it.
    pub served: Served,
    /// Its tokens.
    pub prompt_tokens: Arc<[u32]>,
    /// Text of tokens.
    pub token_text: Arc<dyn TokenText>,
    rate: Option<RateState>,
    _cancel: CancelOnDrop,
}

impl Flow {
    /// Nothing has come yet. `runs` has at least one element.
    pub fn new(runs: Vec<Running>, n: u32, stop: &[String], tools: Option<&ToolUse>) -> Self {
        let mut parts = Vec::with_capacity(runs.len());
        let mut arrivals = SelectAll::new();
        for (idx, run) in runs.into_iter().enumerate() {
            parts.push(Part {
                assembly: Assembly::new(run.token_text.clone(), n, stop, tools.cloned()),
                served: run.served,
                prompt_tokens: run.prompt_tokens,
                token_text: run.token_text,
                rate: run.rate,
                _cancel: run.cancel,
            });
            let events = stream::unfold(Some(run.events), move |events| async move {
                let mut events = events?;
                let event = events.recv().await;
                let next = event.is_some().then_some(events);
                Some(((idx, event), next))
            });
            arrivals.push(events.boxed());
        }
        Self { parts, arrivals: arrivals.ready_chunks(EVENTS_PER_FRAME_MAX) }
    }

    /// What has arrived, waiting for at least one event. `None` when all channels are closed. Losing the race
    /// in a `select!` loses no event.
    pub async fn next(&mut self) -> Option<Vec<Arrival>> {
        self.arrivals.next().await
    }

    /// Learns from events that are still to be taken in what the headers must say.
    pub fn look_ahead(&mut self, arrivals: &[Arrival]) {
        for (idx, event) in arrivals {
            if let Some(TokenEvent::Started { fell_back: true, .. }) = event {
                self.parts[*idx].assembly.fell_back = true;
            }
        }
    }

    /// Whether every choice of every prompt has ended.
    pub fn is_complete(&self) -> bool {
        self.parts.iter().all(|part| part.assembly.is_complete())
    }

    /// Token counts so far.
    pub fn usage(&self) -> Usage {
        let prompt_tokens: u32 = self.parts.iter().map(|part| count(part.prompt_tokens.len())).sum();
        let completion_tokens: u32 = self.parts.iter().map(|part| part.assembly.completion_tokens).sum();
        Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
            prompt_tokens_details: PromptTokensDetails {
                cached_tokens: self.parts.iter().map(|part| part.assembly.cached_tokens).sum(),
            },
        }
    }

    /// The `tenantry` object of the body.
    pub fn tenantry(&self) -> Option<Tenantry> {
        let fell_back = self.parts.iter().find(|part| part.served.fell_back || part.assembly.fell_back)?;
        Some(Tenantry { fallback: "base", base: fell_back.served.base.clone() })
    }

    /// What serves the request; the same for all prompts but for the fallback.
    pub fn served(&self) -> &Served {
        &self.parts.first().expect("a request has at least one prompt").served
    }

    /// Headers that say what serves the request and how much of the limits is left.
    pub fn headers(&self, headers: &mut HeaderMap) {
        let served = self.served();
        reply::set(headers, "x-tenantry-model", &served.base);
        if self.tenantry().is_some() {
            reply::set(headers, "x-tenantry-fallback", "base");
        } else if let (Some(adapter), Some(hash)) = (&served.adapter, &served.adapter_hash) {
            reply::set(headers, "x-tenantry-adapter", adapter);
            reply::set(headers, "x-tenantry-adapter-hash", hash);
        }
        if let Some(rate) = self.parts.last().and_then(|part| part.rate) {
            reply::rate_headers(headers, rate);
        }
    }
}

/// A length as a count; lengths here are far below 2^32 (bodies are at most 1 MiB).
pub fn count(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
