//! What shells read from the cache, and how its inside is summed up as a warmth.

use shared::hash::ContentHash;

use super::{CacheCore, CacheStats, Command};
use crate::loader::LoadError;
use crate::residency::Warmth;

impl CacheCore {
    /// What must be done since the last call.
    pub fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// Whether [`Self::take_commands`] would return anything.
    pub fn has_commands(&self) -> bool {
        !self.commands.is_empty()
    }

    /// Changes of warmth since the last call, oldest first.
    pub fn drain_changes(&mut self) -> std::vec::Drain<'_, (ContentHash, Warmth)> {
        self.changes.drain(..)
    }

    /// Counts up whenever an adapter became [`Warmth::Ready`] or [`Warmth::Failed`].
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Where an adapter is.
    pub fn warmth(&self, hash: &ContentHash) -> Warmth {
        self.entries.get(hash).map_or(Warmth::Absent, |entry| entry.shown)
    }

    /// Appends every adapter that is ready, by slot, then every one that failed, by time.
    pub fn settled(&self, out: &mut Vec<ContentHash>) {
        let occupants = self.slots.iter().filter_map(|slot| slot.occupant.as_ref());
        out.extend(occupants.filter(|occupant| occupant.adapter.is_some()).map(|occupant| occupant.hash));
        out.extend(self.failures.values());
    }

    /// Why the last load of an adapter failed, while it counts.
    pub fn failure(&self, hash: &ContentHash) -> Option<&LoadError> {
        self.entries.get(hash)?.failure.as_ref().map(|failure| &failure.error)
    }

    /// Counts and sizes.
    pub fn stats(&self) -> CacheStats {
        let occupants = || self.slots.iter().filter_map(|slot| slot.occupant.as_ref());
        CacheStats {
            resident: occupants().filter(|occupant| occupant.adapter.is_some()).count(),
            leased: occupants().filter(|occupant| occupant.leases > 0).count(),
            loading: self.n_jobs,
            engine_bytes: self.engine_bytes,
            hosted: self.host_order.len(),
            host_bytes: self.host_bytes,
            ..self.stats
        }
    }

    /// Recomputes what the index should say of `hash` and notes a change.
    pub(super) fn show(&mut self, hash: ContentHash) {
        let Some(entry) = self.entries.get_mut(&hash) else { return };
        let occupant = entry.slot.and_then(|slot| self.slots[slot as usize].occupant.as_ref());
        let missing = || match &entry.failure {
            Some(failure) if !failure.retrying => Warmth::Failed,
            _ if entry.wanted_until.is_some() => Warmth::NoSlot,
            _ => Warmth::Absent,
        };
        let warmth = match occupant {
            Some(occupant) if occupant.doomed => missing(),
            Some(occupant) if occupant.adapter.is_some() => Warmth::Ready,
            Some(_) => Warmth::Loading,
            None => missing(),
        };
        if warmth != entry.shown {
            entry.shown = warmth;
            if matches!(warmth, Warmth::Ready | Warmth::Failed) {
                self.epoch += 1;
            }
            self.changes.push((hash, warmth));
        }
    }

    /// Forgets an adapter that is nowhere, wanted by nobody and did not fail.
    pub(super) fn drop_unused(&mut self, hash: ContentHash) {
        let Some(entry) = self.entries.get(&hash) else { return };
        let used = entry.slot.is_some()
            || entry.job.is_some()
            || entry.host.is_some()
            || entry.failure.is_some()
            || entry.wanted_until.is_some()
            || self.prewarms.contains(&hash);
        if !used {
            self.entries.remove(&hash);
        }
    }
}
