//! What loading ahead of requests needs of the cache: who has a slot, and making one free.
//!
//! Called by the node's pre-warming, which decides who is likely enough; nothing that is used or waited for goes here.

use std::time::Instant;

use shared::adapter::AdapterRef;

use super::{AdapterId, CacheCore, Occupant};

/// An adapter in the engine tier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resident {
    /// Which.
    pub adapter: AdapterRef,
    /// Bytes of engine memory.
    pub bytes: u64,
    /// Requests hold it, wait for it, or it is still on its way.
    pub leased: bool,
}

impl CacheCore {
    /// What has a slot.
    pub fn residents(&self) -> Vec<Resident> {
        let occupants = self.slots.iter().filter_map(|slot| slot.occupant.as_ref());
        occupants
            .filter_map(|occupant| {
                let entry = self.entries.get(&occupant.id)?;
                let leased = occupant.leases > 0 || occupant.adapter.is_none() || entry.want_seq.is_some();
                Some(Resident { adapter: entry.adapter.clone(), bytes: occupant.bytes as u64, leased })
            })
            .collect()
    }

    /// Takes an adapter out that nobody uses or waits for; any other stays.
    pub fn cool(&mut self, now: Instant, id: &AdapterId) {
        let Some(entry) = self.entries.get(id).filter(|entry| entry.want_seq.is_none()) else { return };
        let Some(slot) = entry.slot else { return };
        let idle = |occupant: &Occupant| occupant.adapter.is_some() && occupant.leases == 0;
        if self.slots[slot as usize].occupant.as_ref().is_some_and(idle) {
            self.evict(slot);
            self.plan(now);
        }
    }
}
