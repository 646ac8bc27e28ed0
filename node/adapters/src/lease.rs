//! Permission to use a resident adapter: while a lease lives, its adapter is not evicted.

use std::fmt;
use std::sync::Arc;

use model::adapter::LoraAdapter;
use shared::hash::ContentHash;

/// Told when the last clone of a lease is dropped.
pub trait ReleaseLease: Send + Sync {
    /// The lease on (`slot`, `generation`) ended.
    fn release(&self, slot: u32, generation: u64);
}

/// A held adapter. Cloning shares the lease.
#[derive(Clone)]
pub struct Lease(Arc<Held>);

struct Held {
    adapter: Arc<LoraAdapter>,
    slot: u32,
    generation: u64,
    owner: Option<Arc<dyn ReleaseLease>>,
}

impl Lease {
    /// A lease that tells `owner` when it ends. Made by the cache only.
    pub fn new(adapter: Arc<LoraAdapter>, slot: u32, generation: u64, owner: Arc<dyn ReleaseLease>) -> Self {
        Self(Arc::new(Held { adapter, slot, generation, owner: Some(owner) }))
    }

    /// A lease that no cache tracks, for tests and tools that run the engine alone.
    pub fn untracked(adapter: Arc<LoraAdapter>) -> Self {
        Self(Arc::new(Held { adapter, slot: 0, generation: 0, owner: None }))
    }

    /// The weights.
    pub fn adapter(&self) -> &Arc<LoraAdapter> {
        &self.0.adapter
    }

    /// Content of the weights; compared with the pin before every step.
    pub fn hash(&self) -> ContentHash {
        self.0.adapter.hash
    }

    /// (slot, generation): changes whenever a slot gets other weights.
    pub fn place(&self) -> (u32, u64) {
        (self.0.slot, self.0.generation)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(owner) = &self.owner {
            owner.release(self.slot, self.generation);
        }
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({:?}@{}.{})", self.hash(), self.0.slot, self.0.generation)
    }
}
