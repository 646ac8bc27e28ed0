//! Where the engine's work comes from. The engine *pulls*: it holds no backlog but preempted sequences,
//! so the fair queue is the only queue.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use adapters::lease::Lease;
use shared::id::{Route, TenantId};
use shared::request::{Emitted, Envelope};
use shared::tenant::Tier;
use shared::token::TokenEvent;
use tokio::sync::mpsc;

use crate::grammar::CompiledGrammar;

/// Set once by whoever no longer wants the answer; the engine frees everything within a step.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Asks for the end of the request.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What the engine has free right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// More sequences that fit in the batch.
    pub sequences: u32,
    /// KV token positions that are free or can be freed from caches without preempting anyone.
    pub kv_tokens: u32,
}

/// A request whose turn has come, with everything it needs to run.
#[derive(Debug)]
pub struct Work {
    /// The admitted request.
    pub envelope: Arc<Envelope>,
    /// What its client has already, from an engine that could not finish it; empty for a new request.
    pub emitted: Emitted,
    /// Its adapter, resident and pinned; `None` for base requests.
    pub lease: Option<Lease>,
    /// Whether the adapter was resident when the request arrived; for the report only.
    pub adapter_hit: Option<bool>,
    /// The compiled constraint, when `generation.grammar` asks for one; compiled before queueing.
    pub grammar: Option<CompiledGrammar>,
    /// Where its events go; bounded, never blocked on: a full channel parks the request.
    pub sink: mpsc::Sender<TokenEvent>,
    /// The client's wish to stop.
    pub cancel: CancelFlag,
    /// Held until the request has left the engine; dropping it returns the tenant's concurrency credit.
    pub permit: Box<dyn Any + Send>,
}

/// Tokens that a route used in one step; the fair queue's virtual counters grow by them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Charge {
    /// Prompt tokens computed (prefix-cache hits cost nothing).
    pub prefill: u32,
    /// Answer tokens computed.
    pub decode: u32,
}

/// The queue, seen from the engine. All calls are short and never wait for an actor.
pub trait WorkSource: Send {
    /// The next request in fair order that fits into `room`, if any.
    fn pull(&mut self, now: Instant, room: Room) -> Option<Work>;

    /// Reports what a route used since the last call.
    fn charge(&mut self, tier: Tier, route: &Route, charge: Charge);

    /// Tenants whose cached pages must go (erasure, a new cache secret) since the last call; asked in every step.
    /// Named after their last requests have left: what still runs may fill the cache again.
    fn forgotten(&mut self) -> Vec<TenantId> {
        Vec::new()
    }

    /// Waits until work may have arrived, at most `timeout`; returns early when it has.
    fn park(&mut self, timeout: Duration);

    /// True when the engine should finish what it has and stop.
    fn closed(&self) -> bool;
}
