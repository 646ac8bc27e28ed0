//! The host tier: verified file bytes, least recently used out first, never those that still wait for a slot.

use std::sync::Arc;

use shared::adapter::AdapterId;

use super::{CacheCore, Command, HostPlace, Retired};
use crate::loader::HostFiles;

impl CacheCore {
    /// Whether files fetched ahead of a slot would be kept.
    pub(super) fn host_has_room(&self) -> bool {
        self.host_bytes < self.config.host_bytes || self.oldest_unwanted().is_some()
    }

    /// The least recently used, unless it waits for a slot itself.
    fn oldest_unwanted(&self) -> Option<AdapterId> {
        let (_, id) = self.host_order.first_key_value()?;
        self.entries.get(id).is_some_and(|entry| entry.want_seq.is_none()).then_some(*id)
    }

    /// Keeps files if the budget allows it after dropping older ones that nobody waits for.
    pub(super) fn keep_files(&mut self, id: AdapterId, files: Arc<HostFiles>) {
        let bytes = files.bytes();
        let held = self.entries.get(&id).is_none_or(|entry| entry.host.is_some());
        while !held && self.host_bytes + bytes > self.config.host_bytes && bytes <= self.config.host_bytes {
            let Some(oldest) = self.oldest_unwanted() else { break };
            self.drop_host(&oldest);
            self.drop_unused(oldest);
        }
        if held || self.host_bytes + bytes > self.config.host_bytes {
            self.commands.push(Command::Retire(Retired::Files(files)));
            return;
        }
        let used_at = self.next_tick();
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.host = Some(HostPlace { files, used_at });
            self.host_order.insert(used_at, id);
            self.host_bytes += bytes;
        }
    }

    /// The files of `id`, marked as used.
    pub(super) fn touch_host(&mut self, id: &AdapterId, tick: u64) -> Option<Arc<HostFiles>> {
        let place = self.entries.get_mut(id)?.host.as_mut()?;
        self.host_order.remove(&place.used_at);
        place.used_at = tick;
        self.host_order.insert(tick, *id);
        Some(Arc::clone(&place.files))
    }

    pub(super) fn drop_host(&mut self, id: &AdapterId) {
        let Some(place) = self.entries.get_mut(id).and_then(|entry| entry.host.take()) else { return };
        self.host_order.remove(&place.used_at);
        self.host_bytes -= place.files.bytes();
        self.commands.push(Command::Retire(Retired::Files(place.files)));
    }
}
