//! The engine's side of the queue: the next request in fair order whose adapter can be leased now.
//!
//! Glue between the fair queue, the adapter cache and the engine; decides only what happens to a request
//! whose adapter cannot be loaded: the contract's fallback, or an error.

use std::sync::Arc;
use std::time::{Duration, Instant};

use adapters::{AdapterCache, LeaseDecision};
use queue::{AdapterView, Item, Picked, Queue};
use scheduler::grammar::CompiledGrammar;
use scheduler::source::{CancelFlag, Charge, Room, Work, WorkSource};
use shared::adapter::{AdapterId, Residency};
use shared::error::{ErrorKind, RequestError};
use shared::id::{RequestId, Route, TenantId};
use shared::request::{Emitted, Envelope};
use shared::tenant::{Fallback, Tier};
use shared::token::TokenEvent;
use tokio::sync::mpsc;

use crate::base_room::BaseRoom;
use crate::gateway::backend::node_stopping;

/// What travels with a queued request.
#[derive(Debug)]
pub struct Payload {
    /// The admitted request.
    pub envelope: Arc<Envelope>,
    /// What its client has already.
    pub emitted: Emitted,
    /// Its compiled constraint.
    pub grammar: Option<CompiledGrammar>,
    /// Where its events go.
    pub sink: mpsc::Sender<TokenEvent>,
    /// The client's wish to stop.
    pub cancel: CancelFlag,
    /// What the contract says about a broken adapter.
    pub fallback: Fallback,
    /// Whether its adapter was resident when it came; `None` for base requests.
    pub adapter_hit: Option<bool>,
}

impl Payload {
    /// Ends the request with an error; the channel always has room for it before anything was sent.
    pub fn fail(&self, error: RequestError) {
        // A receiver that is gone does not need the news.
        let _ = self.sink.try_send(TokenEvent::Failed(error));
    }
}

/// What an expired request is told.
pub fn deadline_passed(item: &Item) -> RequestError {
    let waited_ms = item.deadline.saturating_duration_since(item.admitted_at).as_millis();
    RequestError::new(
        ErrorKind::Deadline,
        "queue_timeout",
        format!(
            "the request waited {waited_ms} ms for its turn and its deadline passed; hint: send fewer requests at once, or ask your operator for a larger share"
        ),
    )
}

/// The [`WorkSource`] of one base.
pub struct EngineSource {
    room: Arc<BaseRoom>,
    /// The step in which the cache was last told the order.
    told_at: Option<Instant>,
}

impl EngineSource {
    /// Pulls from the room's queue.
    pub fn new(room: Arc<BaseRoom>) -> Self {
        Self { room, told_at: None }
    }

    fn queue(&self) -> &Queue<Payload> {
        &self.room.queue
    }

    /// The cache keeps and loads adapters in the queue's order. Called after leasing: what was picked has its lease.
    fn tell_order(&mut self, now: Instant) {
        let (order, holds_back) = self.queue().wanted(self.room.cache.order_len());
        self.room.cache.prefer(&order, holds_back);
        self.told_at = Some(now);
    }

    /// Turns a picked request into work; `None` when it was answered with an error instead.
    fn start(&self, picked: Picked<Payload>) -> Result<Option<Work>, Box<Picked<Payload>>> {
        let id = picked.item.id;
        let lease = match picked.item.adapter {
            None => None,
            Some(adapter) => match self.room.cache.lease(&adapter) {
                LeaseDecision::Leased(lease) => Some(lease),
                LeaseDecision::Failed(error) => return Ok(self.without_adapter(picked.payload, id, error.into())),
                LeaseDecision::Loading | LeaseDecision::NoSlot | LeaseDecision::Absent => return Err(Box::new(picked)),
            },
        };
        Ok(Some(self.work(picked.payload, lease, id)))
    }

    fn work(&self, payload: Payload, lease: Option<adapters::Lease>, id: RequestId) -> Work {
        let Payload { envelope, emitted, grammar, sink, cancel, adapter_hit, .. } = payload;
        let permit = Box::new(self.queue().permit(id));
        Work { envelope, emitted, lease, adapter_hit, grammar, sink, cancel, permit }
    }

    /// The contract decides: the base answers and says so, or the client gets the reason (AD-26). An answer that
    /// began with the adapter never goes on without it.
    fn without_adapter(&self, mut payload: Payload, id: RequestId, error: RequestError) -> Option<Work> {
        tracing::warn!(request_id = %id, tenant_id = %payload.envelope.route.tenant, code = error.code, "adapter cannot be loaded");
        if payload.fallback == Fallback::Refuse || !payload.emitted.is_empty() {
            payload.fail(error);
            self.queue().left(id);
            return None;
        }
        let envelope = Envelope { adapter: None, fell_back: true, ..payload.envelope.as_ref().clone() };
        payload.envelope = Arc::new(envelope);
        Some(self.work(payload, None, id))
    }
}

/// Undoes a pick, unless nobody waits for the request any more.
fn put_back(queue: &Queue<Payload>, picked: Picked<Payload>) {
    let (id, cancel) = (picked.item.id, picked.payload.cancel.clone());
    queue.put_back(picked);
    // Looked at afterwards: a client that left, or a queue that closed, in between did not find it waiting.
    if cancel.is_cancelled() {
        queue.cancel(id);
    } else if queue.is_closed()
        && let Some((_, payload)) = queue.cancel(id)
    {
        payload.fail(node_stopping());
    }
}

impl WorkSource for EngineSource {
    fn pull(&mut self, now: Instant, room: Room) -> Option<Work> {
        let room = queue::Room { sequences: room.sequences, kv_tokens: room.kv_tokens };
        loop {
            let mut view = CacheView(&self.room.cache);
            let Some(picked) = self.queue().next(now, room, &mut view) else {
                self.tell_order(now);
                return None;
            };
            match self.start(picked) {
                Ok(Some(work)) => {
                    // Also when the batch is always full of others' work, but not once per request.
                    if self.told_at != Some(now) {
                        self.tell_order(now);
                    }
                    return Some(work);
                }
                Ok(None) => {}
                Err(picked) => {
                    // Evicted between the look and the lease: it goes back to the head of its line.
                    put_back(self.queue(), *picked);
                    return None;
                }
            }
        }
    }

    fn charge(&mut self, tier: Tier, route: &Route, charge: Charge) {
        self.queue().charge(tier, route, charge.prefill, charge.decode);
    }

    fn forgotten(&mut self) -> Vec<TenantId> {
        self.room.take_erased()
    }

    fn park(&mut self, timeout: Duration) {
        self.queue().park(timeout);
    }

    fn closed(&self) -> bool {
        self.queue().is_closed()
    }
}

/// The cache as the queue sees it.
struct CacheView<'a>(&'a AdapterCache);

impl AdapterView for CacheView<'_> {
    fn epoch(&self) -> u64 {
        self.0.epoch()
    }

    fn residency(&mut self, adapter: &AdapterId) -> Residency {
        self.0.residency(adapter)
    }

    fn settled(&mut self, out: &mut Vec<AdapterId>) {
        self.0.settled(out);
    }
}

#[cfg(test)]
mod tests {
    use queue::FairConfig;
    use shared::clock::{Clock, ManualClock};

    use super::*;
    use crate::metering;

    struct NoAdapters;

    impl AdapterView for NoAdapters {
        fn epoch(&self) -> u64 {
            0
        }

        fn residency(&mut self, _: &AdapterId) -> Residency {
            Residency::Ready
        }

        fn settled(&mut self, _: &mut Vec<AdapterId>) {}
    }

    /// A queue, a request picked from it, its events, and the hold of its client.
    fn picked() -> (Queue<Payload>, Picked<Payload>, mpsc::Receiver<TokenEvent>, queue::Ticket<Payload>) {
        let clock = ManualClock::default();
        let envelope = Arc::new(metering::tests::envelope(&clock));
        let (sink, receiver) = mpsc::channel(1);
        let cancel = CancelFlag::default();
        let item = Item::of(&envelope, &Emitted::default());
        let (emitted, fallback) = (Emitted::default(), Fallback::Refuse);
        let payload = Payload { envelope, emitted, grammar: None, sink, cancel, fallback, adapter_hit: None };
        let queue = Queue::new("tiny".parse().expect("a name"), FairConfig::default());
        let ticket = queue.submit(clock.now(), item, payload).expect("there is room");
        let room = queue::Room { sequences: 8, kv_tokens: 1000 };
        let picked = queue.next(clock.now(), room, &mut NoAdapters).expect("it is its turn");
        (queue, picked, receiver, ticket)
    }

    #[test]
    fn a_request_whose_client_left_while_it_was_picked_does_not_wait_again() {
        let (queue, picked, mut receiver, ticket) = picked();
        picked.payload.cancel.cancel();
        drop(ticket);
        put_back(&queue, picked);
        assert_eq!(queue.n_waiting(), 0);
        assert!(matches!(receiver.try_recv(), Err(mpsc::error::TryRecvError::Disconnected)));
    }

    #[test]
    fn a_request_that_is_put_back_waits_again_but_not_in_a_closed_queue() {
        let (queue, waiting, mut receiver, _ticket) = picked();
        put_back(&queue, waiting);
        assert_eq!(queue.n_waiting(), 1);
        assert!(receiver.try_recv().is_err(), "nothing happened to it");
        let (queue, stranded, mut receiver, _ticket) = picked();
        queue.close();
        put_back(&queue, stranded);
        assert_eq!(queue.n_waiting(), 0);
        assert!(matches!(receiver.try_recv(), Ok(TokenEvent::Failed(error)) if error.code == "node_stopping"));
    }
}
