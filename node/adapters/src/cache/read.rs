//! What shells read from the cache, and how its inside is summed up as a residency.

use shared::adapter::{AdapterId, Residency};

use super::{CacheCore, CacheStats, Command};
use crate::loader::LoadError;

impl CacheCore {
    /// What must be done since the last call.
    pub fn take_commands(&mut self) -> Vec<Command> {
        std::mem::take(&mut self.commands)
    }

    /// Whether [`Self::take_commands`] would return anything.
    pub fn has_commands(&self) -> bool {
        !self.commands.is_empty()
    }

    /// Changes of residency since the last call, oldest first.
    pub fn drain_changes(&mut self) -> std::vec::Drain<'_, (AdapterId, Residency)> {
        self.changes.drain(..)
    }

    /// Counts up whenever an adapter became [`Residency::Ready`] or [`Residency::Failed`].
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Where an adapter is.
    pub fn residency(&self, id: &AdapterId) -> Residency {
        self.entries.get(id).map_or(Residency::Absent, |entry| entry.shown)
    }

    /// Appends every adapter that is ready, by slot, then every one that failed, by time.
    pub fn settled(&self, out: &mut Vec<AdapterId>) {
        let occupants = self.slots.iter().filter_map(|slot| slot.occupant.as_ref());
        out.extend(occupants.filter(|occupant| occupant.adapter.is_some()).map(|occupant| occupant.id));
        out.extend(self.failures.values());
    }

    /// Why the last load of an adapter failed, while it counts.
    pub fn failure(&self, id: &AdapterId) -> Option<&LoadError> {
        self.entries.get(id)?.failure.as_ref().map(|failure| &failure.error)
    }

    /// Counts and sizes.
    pub fn stats(&self) -> CacheStats {
        let occupants = || self.slots.iter().filter_map(|slot| slot.occupant.as_ref());
        CacheStats {
            resident: occupants().filter(|occupant| occupant.adapter.is_some()).count(),
            leased: occupants().filter(|occupant| occupant.leases > 0).count(),
            loading: self.jobs.len(),
            stuck: self.stuck.len(),
            engine_bytes: self.engine_bytes,
            hosted: self.host_order.len(),
            host_bytes: self.host_bytes,
            ..self.stats
        }
    }

    /// Recomputes what the index should say of `id` and notes a change.
    pub(super) fn show(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let occupant = entry.slot.and_then(|slot| self.slots[slot as usize].occupant.as_ref());
        let missing = || match &entry.failure {
            Some(failure) if !failure.retrying => Residency::Failed,
            _ if entry.wanted_until.is_some() => Residency::NoSlot,
            _ => Residency::Absent,
        };
        let residency = match occupant {
            Some(occupant) if occupant.doomed => missing(),
            Some(occupant) if occupant.adapter.is_some() => Residency::Ready,
            Some(_) => Residency::Loading,
            None => missing(),
        };
        if residency != entry.shown {
            entry.shown = residency;
            if matches!(residency, Residency::Ready | Residency::Failed) {
                self.epoch += 1;
            }
            self.changes.push((id, residency));
        }
    }

    /// Forgets an adapter that is nowhere, wanted by nobody and did not fail.
    pub(super) fn drop_unused(&mut self, id: AdapterId) {
        let Some(entry) = self.entries.get(&id) else { return };
        let used = entry.slot.is_some()
            || entry.job.is_some()
            || entry.host.is_some()
            || entry.failure.is_some()
            || entry.wanted_until.is_some();
        if !used {
            self.entries.remove(&id);
        }
    }
}
