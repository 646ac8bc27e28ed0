//! The queue as gateway and engine see it: the fair core behind one short lock.
//!
//! The gateway submits and holds a [`Ticket`]; the engine takes with [`Queue::next`] directly, without a
//! mailbox in between, and sleeps in [`Queue::park`]. Payloads are always dropped outside the lock. What is
//! decided lies in [`crate::fair`]; timers lie in [`crate::actor`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use shared::hash::ContentHash;
use shared::id::{RequestId, Route};
use shared::tenant::Tier;

use crate::fair::{FairQueue, QueueStats};
use crate::item::{AdapterView, FairConfig, Item, Picked, Room, SubmitError};
use crate::metrics;

/// A shared fair queue. Clones are the same queue.
#[derive(Debug)]
pub struct Queue<T>(Arc<Shared<T>>);

#[derive(Debug)]
struct Shared<T> {
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
            metrics::cancelled();
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
    /// An empty, open queue.
    pub fn new(config: FairConfig) -> Self {
        Self(Arc::new(Shared {
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
                metrics::submitted(tier);
                self.wake();
                Ok(Ticket { queue: self.clone(), id })
            }
            Err(error) => {
                metrics::refused(&error);
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
    pub fn wanted(&self, k: usize) -> (Vec<ContentHash>, bool) {
        let core = self.0.core.lock();
        (core.wanted(k), core.draining())
    }

    /// What passed its deadline while waiting; the caller answers it.
    pub fn expire(&self, now: Instant) -> Vec<(Item, T)> {
        let expired = self.0.core.lock().expire(now);
        metrics::expired(expired.len());
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
