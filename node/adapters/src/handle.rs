//! The adapter cache as queue, engine and gateway see it: the core behind one short lock.
//!
//! Leases are taken and given back without a mailbox; what has to be loaded or freed is sent to the actor.
//! The number of messages under way is bounded by the loads allowed at once plus the adapters leaving, so
//! the unbounded mailbox needs no further credit.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Mutex, RwLock};
use shared::adapter::{AdapterId, AdapterRef, Residency};
use shared::clock::Clock;
use tokio::sync::mpsc;

use crate::cache::ahead::Resident;
use crate::cache::{CacheConfig, CacheCore, CacheStats, Command, CoreLease, Loaded};
use crate::lease::{Lease, ReleaseLease};
use crate::loader::LoadError;
use crate::residency::ResidencyIndex;

/// Longest order worth telling: finding it costs the queue microseconds per pull.
const ORDER_LEN_MAX: usize = 128;

/// Called when an adapter became ready or failed, so that a sleeping engine looks again. Must not block.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// A shared adapter cache. Clones are the same cache.
#[derive(Clone)]
pub struct AdapterCache(Arc<Inner>);

struct Inner {
    core: Mutex<CacheCore>,
    index: ResidencyIndex,
    /// To whoever performs commands: the actor, or a test.
    commands: mpsc::UnboundedSender<Command>,
    waker: RwLock<Option<Waker>>,
    clock: Arc<dyn Clock>,
    order_len: usize,
}

/// Answer to a wish for a lease.
#[derive(Debug)]
pub enum LeaseDecision {
    /// Here it is.
    Leased(Lease),
    /// On its way, its slot is sure.
    Loading,
    /// Waits until a slot is free.
    NoSlot,
    /// Nobody asked for it: call [`AdapterCache::want`].
    Absent,
    /// It cannot be loaded; refuse the request or fall back.
    Failed(LoadError),
}

impl fmt::Debug for AdapterCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AdapterCache").field(&self.stats()).finish()
    }
}

// === impl AdapterCache ===

impl AdapterCache {
    /// An empty cache and the commands it will give; [`crate::actor::AdapterCacheActor`] performs them.
    pub fn new(config: CacheConfig, clock: Arc<dyn Clock>) -> (Self, mpsc::UnboundedReceiver<Command>) {
        let (commands, receiver) = mpsc::unbounded_channel();
        let order_len = config.slots.saturating_mul(2).clamp(8, ORDER_LEN_MAX);
        let inner = Inner {
            core: Mutex::new(CacheCore::new(config)),
            index: ResidencyIndex::default(),
            commands,
            waker: RwLock::new(None),
            clock,
            order_len,
        };
        (Self(Arc::new(inner)), receiver)
    }

    /// Asks for an adapter. Called when a request for it is queued: loading starts at once if a slot and a
    /// load are free, otherwise when the queue's order ([`Self::prefer`]) comes to it.
    pub fn want(&self, adapter: &AdapterRef, until: Instant) {
        self.0.update(|core, now| core.want(now, adapter, until));
    }

    /// Tells the queue's fair order of waiting adapters and whether it holds others back to free slots.
    /// Cheap when nothing changed.
    pub fn prefer(&self, order: &[AdapterId], drain: bool) {
        self.0.update(|core, now| core.prefer(now, order, drain));
    }

    /// How many adapters of the queue's order [`Self::prefer`] should be told: every slot's, so that who waits
    /// keeps a resident adapter, and as many again to load next.
    pub fn order_len(&self) -> usize {
        self.0.order_len
    }

    /// Holds an adapter if it is resident. Takes well under a microsecond.
    pub fn lease(&self, id: &AdapterId) -> LeaseDecision {
        let decision = self.0.core.lock().lease(id);
        match decision {
            CoreLease::Leased(adapter, slot, generation) => {
                let owner: Arc<dyn ReleaseLease> = Arc::<Inner>::clone(&self.0);
                LeaseDecision::Leased(Lease::new(adapter, slot, generation, owner))
            }
            CoreLease::Failed(error) => LeaseDecision::Failed(error),
            CoreLease::Missing(Residency::Loading) => LeaseDecision::Loading,
            CoreLease::Missing(Residency::Absent | Residency::Failed) => LeaseDecision::Absent,
            CoreLease::Missing(Residency::NoSlot | Residency::Ready) => LeaseDecision::NoSlot,
        }
    }

    /// Where an adapter is, without the cache's lock.
    pub fn residency(&self, id: &AdapterId) -> Residency {
        self.0.index.residency(id)
    }

    /// Counts up whenever an adapter became ready or failed.
    pub fn epoch(&self) -> u64 {
        self.0.core.lock().epoch()
    }

    /// Appends every adapter that is ready or failed.
    pub fn settled(&self, out: &mut Vec<AdapterId>) {
        self.0.core.lock().settled(out);
    }

    /// Why an adapter's last load failed, while that counts.
    pub fn failure(&self, id: &AdapterId) -> Option<LoadError> {
        self.0.core.lock().failure(id).cloned()
    }

    /// What has a slot.
    pub fn residents(&self) -> Vec<Resident> {
        self.0.core.lock().residents()
    }

    /// Takes an adapter out that nobody uses or waits for; any other stays.
    pub fn cool(&self, id: &AdapterId) {
        self.0.update(|core, now| core.cool(now, id));
    }

    /// The adapter was deleted: no new lease; its memory goes with its last lease.
    pub fn forget(&self, id: &AdapterId) {
        self.0.update(|core, now| core.forget(now, id));
    }

    /// The adapter's files were stored again: earlier failures and deletions no longer count. Called after an
    /// upload.
    pub fn stored(&self, id: &AdapterId) {
        self.0.update(|core, now| core.stored(now, id));
    }

    /// Counts and sizes.
    pub fn stats(&self) -> CacheStats {
        self.0.core.lock().stats()
    }

    /// Sets who is woken when an adapter settled.
    pub fn set_waker(&self, waker: Waker) {
        *self.0.waker.write() = Some(waker);
    }

    /// Reports that a load has its files; the actor's side.
    pub(crate) fn files_read(&self, number: u64) {
        self.0.core.lock().files_read(number);
    }

    /// Reports the end of a load; the actor's side.
    pub(crate) fn finished(&self, number: u64, result: Result<Loaded, LoadError>) {
        self.0.update(|core, now| core.finished(now, number, result));
    }

    /// Gives up reads and wants whose time is over; the actor's timer.
    pub(crate) fn expire(&self) {
        self.0.update(|core, now| core.expire(now));
    }
}

// === impl Inner ===

impl Inner {
    /// Changes the core, then tells index, actor and engine.
    fn update(&self, change: impl FnOnce(&mut CacheCore, Instant)) {
        let now = self.clock.now();
        let settled = {
            let mut core = self.core.lock();
            let epoch = core.epoch();
            change(&mut core, now);
            for (id, residency) in core.drain_changes() {
                self.index.set(id, residency);
            }
            // Sent under the lock, so that commands keep their order.
            if core.has_commands() {
                for command in core.take_commands() {
                    // Without an actor there is nobody to load: the node is stopping.
                    let _ = self.commands.send(command);
                }
            }
            core.epoch() != epoch
        };
        if settled {
            let waker = self.waker.read().clone();
            if let Some(waker) = waker {
                waker();
            }
        }
    }
}

impl ReleaseLease for Inner {
    fn release(&self, slot: u32, generation: u64) {
        self.update(|core, now| core.release(now, slot, generation));
    }
}
