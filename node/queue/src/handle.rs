//! The queue as gateway and engine see it: the fair core behind one short lock.
//!
//! The gateway submits and holds a [`Ticket`]; the engine takes with [`Queue::next`] directly, without a
//! mailbox in between, and sleeps in [`Queue::park`]. Payloads are always dropped outside the lock. What is
//! decided lies in [`crate::fair`]; timers lie in [`crate::actor`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shared::adapter::AdapterId;
use shared::id::{BaseName, RequestId, Route};
use shared::tenant::Tier;

use crate::fair::{FairQueue, QueueStats};
use crate::item::{AdapterView, FairConfig, Item, Picked, Room, SubmitError};
use crate::metrics;

/// A shared fair queue. Clones are the same queue.
#[derive(Debug)]
pub struct Queue<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
    /// Whose metrics it counts in.
    base: BaseName,
    core: Mutex<FairQueue<T>>,
    /// True from a wake until the next park returns, so that a wake before the park is not lost.
    woken: Mutex<bool>,
    wake: Condvar,
    closed: AtomicBool,
}

impl<T> Clone for Queue<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

/// The submitter's hold on a waiting request: dropping it takes the request out if it still waits. A
/// request that was picked is not touched; its own cancel flag ends it.
#[derive(Debug)]
#[must_use = "dropping the ticket cancels the request"]
pub struct Ticket<T> {
    queue: Queue<T>,
    id: RequestId,
}

impl<T> Ticket<T> {
    /// The request.
    pub fn id(&self) -> RequestId {
        self.id
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        if self.queue.cancel(self.id).is_some() {
            metrics::cancelled(&self.queue.0.base);
        }
    }
}

/// A picked request's place under its tenant's concurrency cap; dropping it gives the place back, also when
/// the engine thread unwinds.
#[derive(Debug)]
pub struct Permit<T> {
    queue: Queue<T>,
    id: RequestId,
}

impl<T> Drop for Permit<T> {
    fn drop(&mut self) {
        self.queue.left(self.id);
    }
}

// === impl Queue ===

impl<T> Queue<T> {
    /// An empty, open queue for requests to `base`.
    pub fn new(base: BaseName, config: FairConfig) -> Self {
        Self(Arc::new(Shared {
            base,
            core: Mutex::new(FairQueue::new(config)),
            woken: Mutex::new(false),
            wake: Condvar::new(),
            closed: AtomicBool::new(false),
        }))
    }

    /// Queues a request and wakes the engine.
    ///
    /// # Errors
    ///
    /// [`SubmitError`], which converts into the client's error; the payload is dropped.
    pub fn submit(&self, now: Instant, item: Item, payload: T) -> Result<Ticket<T>, SubmitError> {
        let (id, tier) = (item.id, item.tier);
        let submitted = {
            let mut core = self.0.core.lock();
            // Read under the lock: what closing drained cannot be followed by another submission.
            if self.is_closed() { Err(SubmitError::Closed) } else { core.submit(now, item, payload) }
        };
        match submitted {
            Ok(()) => {
                metrics::submitted(&self.0.base, tier);
                self.wake();
                Ok(Ticket { queue: self.clone(), id })
            }
            Err(error) => {
                metrics::refused(&self.0.base, &error);
                Err(error)
            }
        }
    }

    /// The next request in fair order; see [`FairQueue::next`].
    pub fn next(&self, now: Instant, room: Room, view: &mut dyn AdapterView) -> Option<Picked<T>> {
        self.0.core.lock().next(now, room, view)
    }

    /// Undoes a pick whose adapter could not be leased; see [`FairQueue::put_back`].
    pub fn put_back(&self, picked: Picked<T>) {
        self.0.core.lock().put_back(picked);
    }

    /// Ties a picked request's place to a value; drop it when the request has left the engine.
    pub fn permit(&self, id: RequestId) -> Permit<T> {
        Permit { queue: self.clone(), id }
    }

    /// Reports tokens that a route used; see [`FairQueue::charge`].
    pub fn charge(&self, tier: Tier, route: &Route, prefill_tokens: u32, decode_tokens: u32) {
        self.0.core.lock().charge(tier, route, prefill_tokens, decode_tokens);
    }

    /// A picked request left the engine. Saying it twice is harmless.
    pub fn left(&self, id: RequestId) {
        self.0.core.lock().left(id);
    }

    /// Takes a waiting request out.
    pub fn cancel(&self, id: RequestId) -> Option<(Item, T)> {
        self.0.core.lock().cancel(id)
    }

    /// The next `k` adapters in [fair order](FairQueue::wanted), and whether their slots must be
    /// [drained](FairQueue::draining): what the adapter cache is told before or after each pull.
    pub fn wanted(&self, k: usize) -> (Vec<AdapterId>, bool) {
        let core = self.0.core.lock();
        (core.wanted(k), core.draining())
    }

    /// What passed its deadline while waiting; the caller answers it.
    pub fn expire(&self, now: Instant) -> Vec<(Item, T)> {
        let expired = self.0.core.lock().expire(now);
        metrics::expired(&self.0.base, expired.len());
        expired
    }

    /// Changes the terms.
    pub fn configure(&self, config: FairConfig) {
        self.0.core.lock().configure(config);
    }

    /// Everything countable at `now`.
    pub fn stats(&self, now: Instant) -> QueueStats {
        self.0.core.lock().stats(now)
    }

    /// Requests that wait.
    pub fn n_waiting(&self) -> usize {
        self.0.core.lock().n_waiting()
    }

    /// Waits until woken, at most `timeout`. A wake since the last return ends it at once.
    pub fn park(&self, timeout: Duration) {
        let mut woken = self.0.woken.lock();
        if !*woken {
            self.0.wake.wait_for(&mut woken, timeout);
        }
        *woken = false;
    }

    /// Ends the engine's [`Queue::park`]: work arrived, an adapter settled, or the queue closed.
    pub fn wake(&self) {
        *self.0.woken.lock() = true;
        self.0.wake.notify_one();
    }

    /// Refuses everything from now on and returns what waited; the caller answers it. Requests in the
    /// engine go on.
    pub fn close(&self) -> Vec<(Item, T)> {
        let drained = {
            let mut core = self.0.core.lock();
            self.0.closed.store(true, Ordering::Release);
            core.drain()
        };
        self.wake();
        drained
    }

    /// Whether [`Queue::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.0.closed.load(Ordering::Acquire)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use shared::adapter::{AdapterId, Residency};
    use shared::clock::{Clock, SystemClock};

    use super::*;

    struct NoAdapters;

    impl AdapterView for NoAdapters {
        fn epoch(&self) -> u64 {
            0
        }

        fn residency(&mut self, _id: &AdapterId) -> Residency {
            Residency::Absent
        }

        fn settled(&mut self, _out: &mut Vec<AdapterId>) {}
    }

    fn open<T>() -> Queue<T> {
        Queue::new("tiny".parse().expect("a name"), FairConfig::default())
    }

    const ROOM: Room = Room { sequences: 8, kv_tokens: 1 << 20 };

    fn item(now: Instant, id: u128) -> Item {
        Item {
            id: RequestId(id),
            route: Route { tenant: "acme".parse().expect("tenant"), task: None },
            tier: Tier::Shared,
            weight: 1,
            concurrency: 1,
            queue_depth: 100_000,
            adapter: None,
            n_sequences: 1,
            prompt_tokens: 4,
            kv_tokens: 4,
            admitted_at: now,
            deadline: now + Duration::from_secs(60),
        }
    }

    #[test]
    fn a_dropped_ticket_takes_its_request_out() {
        let (queue, now) = (open(), SystemClock.now());
        let kept = queue.submit(now, item(now, 1), "kept").expect("accepted");
        drop(queue.submit(now, item(now, 2), "dropped").expect("accepted"));
        assert_eq!(queue.n_waiting(), 1);
        assert_eq!(queue.next(now, ROOM, &mut NoAdapters).map(|picked| picked.payload), Some("kept"));
        drop(kept);
        assert!(queue.next(now, ROOM, &mut NoAdapters).is_none());
    }

    #[test]
    fn a_permit_gives_its_place_back_even_when_its_holder_unwinds() {
        let (queue, now) = (open(), SystemClock.now());
        let _tickets = [1, 2].map(|id| queue.submit(now, item(now, id), ()).expect("accepted"));
        let first = queue.next(now, ROOM, &mut NoAdapters).expect("picked");
        let permit = queue.permit(first.item.id);
        assert!(queue.next(now, ROOM, &mut NoAdapters).is_none(), "the tenant's cap is one");
        let held = thread::spawn(move || {
            let _permit = permit;
            std::panic::resume_unwind(Box::new("the engine died"));
        });
        assert!(held.join().is_err());
        assert!(queue.next(now, ROOM, &mut NoAdapters).is_some());
    }

    #[test]
    fn parking_ends_at_a_submission_and_a_wake_before_it_is_not_lost() {
        let queue: Queue<()> = open();
        let started = SystemClock.now();
        queue.wake();
        queue.park(Duration::from_secs(20));
        let sleeper = thread::spawn({
            let queue = queue.clone();
            move || {
                while queue.n_waiting() == 0 {
                    queue.park(Duration::from_secs(20));
                }
            }
        });
        let _ticket = queue.submit(started, item(started, 1), ()).expect("accepted");
        sleeper.join().expect("woken");
        assert!(started.elapsed() < Duration::from_secs(10));
        queue.park(Duration::from_millis(1));
    }

    #[test]
    fn a_closed_queue_returns_what_waited_and_refuses_the_rest() {
        let (queue, now) = (open(), SystemClock.now());
        let tickets: Vec<_> = (0..5).map(|id| queue.submit(now, item(now, id), id).expect("accepted")).collect();
        let drained: Vec<u128> = queue.close().into_iter().map(|(_, id)| id).collect();
        assert_eq!(drained, [0, 1, 2, 3, 4]);
        assert_eq!(queue.submit(now, item(now, 9), 9).err(), Some(SubmitError::Closed));
        assert!(queue.is_closed());
        drop(tickets);
    }

    #[test]
    fn a_storm_of_cancellations_from_many_threads_leaves_nothing_behind() {
        let (queue, now) = (open(), SystemClock.now());
        let engine = thread::spawn({
            let queue = queue.clone();
            move || {
                let mut picked_n = 0;
                while !(queue.is_closed() && queue.n_waiting() == 0) {
                    queue.park(Duration::from_millis(1));
                    while let Some(picked) = queue.next(now, ROOM, &mut NoAdapters) {
                        picked_n += 1;
                        drop(queue.permit(picked.item.id));
                    }
                }
                picked_n
            }
        });
        let clients: Vec<_> = (0..4_u128)
            .map(|client| {
                let queue = queue.clone();
                thread::spawn(move || {
                    for n in 0..2_000 {
                        let ticket = queue.submit(now, item(now, client * 10_000 + n), ()).expect("accepted");
                        thread::yield_now();
                        drop(ticket);
                    }
                })
            })
            .collect();
        for client in clients {
            client.join().expect("client ended");
        }
        assert!(queue.close().is_empty(), "every ticket was dropped");
        let picked_n: u32 = engine.join().expect("engine ended");
        let stats = queue.stats(now);
        println!("8,000 requests, {picked_n} picked before their cancellation");
        assert_eq!((stats.running, stats.classes[0].waiting, stats.classes[0].running_sequences), (0, 0, 0));
    }
}
