//! Who gets a slot and who gives one up, and which loads start.

use std::sync::Arc;
use std::time::Instant;

use model::adapter::LoraAdapter;
use shared::adapter::AdapterId;

use super::{CacheCore, Command, Job, LoadJob, Loaded, Occupant, READ_MAX, Retired, STUCK_MAX, STUCK_PER_ADAPTER_MAX};
use crate::loader::LoadError;

impl CacheCore {
    /// Assigns slots in the queue's order, then in order of asking, and starts loads. Stops at the first that
    /// finds no slot: giving one to somebody behind it would be unfair.
    pub(super) fn plan(&mut self, now: Instant) {
        self.assign_slots(now);
        // A load that may not start gives its slot back.
        while self.start_loads(now) {
            self.assign_slots(now);
        }
        self.start_fetches(now);
    }

    fn assign_slots(&mut self, now: Instant) {
        let mut blocked = false;
        for place in 0..self.order.len() {
            let id = self.order[place];
            if self.needs_slot(&id) && !self.assign(now, id, place) {
                blocked = true;
                break;
            }
        }
        while !blocked {
            let Some((&seq, &id)) = self.wants.first_key_value() else { break };
            if !self.needs_slot(&id) {
                self.wants.remove(&seq);
            } else {
                blocked = !self.assign(now, id, usize::MAX);
            }
        }
    }

    /// Whether `id` may get a slot: known, without one, and not waiting out a back-off.
    fn needs_slot(&self, id: &AdapterId) -> bool {
        self.entries
            .get(id)
            .is_some_and(|entry| entry.slot.is_none() && entry.failure.as_ref().is_none_or(|failure| failure.retrying))
    }

    /// Gives `id`, at this place of the fair order (not in it: `usize::MAX`), a slot and queues its load. False if
    /// none can be had now.
    fn assign(&mut self, now: Instant, id: AdapterId, place: usize) -> bool {
        let needed = self.entries.get(&id).and_then(|entry| entry.packed_bytes).unwrap_or(0);
        if needed > self.config.engine_bytes {
            let budget_bytes = self.config.engine_bytes;
            self.note_failure(now, id, LoadError::TooLarge { needed_bytes: needed, budget_bytes });
            self.show(id);
            return true;
        }
        if !self.make_room(1, needed, place) {
            return false;
        }
        let slot = self.slots.iter().position(|slot| slot.occupant.is_none()).expect("room was just made");
        let tick = self.next_tick();
        self.slots[slot].generation += 1;
        self.slots[slot].occupant = Some(Occupant {
            id,
            adapter: None,
            leases: 0,
            uses: 0,
            protected: false,
            doomed: false,
            bytes: needed,
            used_at: tick,
        });
        self.engine_bytes += needed;
        self.to_load.insert(tick, id);
        let entry = self.entries.get_mut(&id).expect("only known adapters are assigned");
        entry.slot = Some(u32::try_from(slot).expect("fewer than 2^32 slots"));
        if let Some(seq) = entry.want_seq {
            self.wants.remove(&seq);
            self.to_fetch.remove(&seq);
        }
        self.show(id);
        true
    }

    /// Evicts for who waits at `place` until `n_slots` are free and `bytes` fit. Evicts nothing if that cannot be
    /// reached.
    fn make_room(&mut self, n_slots: usize, bytes: usize, place: usize) -> bool {
        let budget = self.config.engine_bytes;
        let free = self.slots.iter().filter(|slot| slot.occupant.is_none()).count();
        if free >= n_slots && self.engine_bytes + bytes <= budget {
            return true;
        }
        let victims = self.victims(place);
        let (mut freed_slots, mut freed_bytes, mut n_victims) = (free, 0, 0);
        while freed_slots < n_slots || self.engine_bytes - freed_bytes + bytes > budget {
            let Some(&(slot, victim_bytes)) = victims.get(n_victims) else { return false };
            debug_assert!(self.slots[slot as usize].occupant.as_ref().is_some_and(|held| held.leases == 0));
            freed_slots += 1;
            freed_bytes += victim_bytes;
            n_victims += 1;
        }
        for &(slot, _) in &victims[..n_victims] {
            self.evict(slot);
        }
        true
    }

    /// Slots that may be emptied for who waits at `ahead`, first to go first: those nobody waits for, probation before
    /// protected, least recently used first; then, if the queue drains, those who wait furthest back.
    fn victims(&self, ahead: usize) -> Vec<(u32, usize)> {
        let mut victims: Vec<(usize, bool, u64, u32, usize)> = Vec::new();
        for (slot, occupant) in
            (0_u32..).zip(&self.slots).filter_map(|(idx, slot)| Some((idx, slot.occupant.as_ref()?)))
        {
            if occupant.leases > 0 || occupant.adapter.is_none() {
                continue;
            }
            // Asked for after the queue last told its order: it waits, at a place not known yet.
            let is_news = || self.entries.get(&occupant.id).is_some_and(|entry| entry.asked_at > self.preferred_at);
            let waits_at = self.places.get(&occupant.id).copied().or_else(|| is_news().then_some(usize::MAX));
            if waits_at.is_none_or(|behind| self.drain && behind > ahead) {
                // Furthest back first: places count down from the end.
                let rank = waits_at.map_or(0, |place| usize::MAX - place);
                victims.push((rank, occupant.protected, occupant.used_at, slot, occupant.bytes));
            }
        }
        victims.sort_unstable();
        victims.into_iter().map(|(_, _, _, slot, bytes)| (slot, bytes)).collect()
    }

    /// Second lease: the adapter is in regular use. Keeps the protected segment at three quarters.
    pub(super) fn protect(&mut self, slot: u32) {
        let protected_max = self.config.slots * 3 / 4;
        if let Some(occupant) = self.slots[slot as usize].occupant.as_mut() {
            occupant.protected = true;
        }
        let protected =
            || self.slots.iter().enumerate().filter(|(_, s)| s.occupant.as_ref().is_some_and(|o| o.protected));
        if protected().count() <= protected_max {
            return;
        }
        let oldest = protected().min_by_key(|(_, s)| s.occupant.as_ref().map_or(0, |o| o.used_at)).map(|(idx, _)| idx);
        if let Some(occupant) = oldest.and_then(|idx| self.slots[idx].occupant.as_mut()) {
            occupant.protected = false;
            occupant.uses = 1;
        }
    }

    /// Empties a slot that nobody leases.
    pub(super) fn evict(&mut self, slot: u32) {
        let Some(occupant) = self.slots[slot as usize].occupant.take() else { return };
        if occupant.leases > 0 {
            shared::critical!("slot {slot} was to be emptied under {} leases", occupant.leases);
            self.slots[slot as usize].occupant = Some(occupant);
            return;
        }
        self.engine_bytes -= occupant.bytes;
        self.stats.evictions += 1;
        self.commands.extend(occupant.adapter.map(|adapter| Command::Retire(Retired::Packed(adapter))));
        if let Some(entry) = self.entries.get_mut(&occupant.id) {
            entry.slot = None;
        }
        self.show(occupant.id);
        self.drop_unused(occupant.id);
    }

    /// Takes the slot of an adapter that has not arrived.
    pub(super) fn vacate(&mut self, id: AdapterId) {
        let Some(slot) = self.entries.get(&id).and_then(|entry| entry.slot) else { return };
        let place = &mut self.slots[slot as usize];
        if place.occupant.as_ref().is_none_or(|occupant| occupant.adapter.is_some()) {
            return;
        }
        let reserved = place.occupant.take().map_or(0, |occupant| occupant.bytes);
        self.engine_bytes -= reserved;
        self.to_load.retain(|_, waiting| *waiting != id);
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.slot = None;
        }
    }

    /// Starts the loads of assigned slots, as many as may run at once. Whether one was refused.
    fn start_loads(&mut self, now: Instant) -> bool {
        if self.to_load.is_empty() {
            return false;
        }
        let mut any_refused = false;
        let waiting: Vec<(u64, AdapterId)> = self.to_load.iter().map(|(&tick, &id)| (tick, id)).collect();
        for (tick, id) in waiting {
            if self.jobs.len() >= self.config.loads_at_once {
                break;
            }
            let Some(entry) = self.entries.get(&id) else { continue };
            // Its files are being fetched already; the load follows when they are here.
            if entry.job.is_some() {
                continue;
            }
            self.to_load.remove(&tick);
            any_refused |= !self.start(now, id, true);
        }
        any_refused
    }

    /// Uses what loads leave over to bring files of waiting adapters into host memory. One load's worth stays
    /// free for slots, unless only one is allowed.
    fn start_fetches(&mut self, now: Instant) {
        let spare = if self.config.loads_at_once == 1 { 1 } else { self.config.loads_at_once - 1 };
        while self.jobs.len() < spare && self.to_load.is_empty() && self.host_has_room() {
            let Some((_, id)) = self.to_fetch.pop_first() else { return };
            if self.entries.get(&id).is_some_and(|entry| entry.job.is_none() && entry.host.is_none()) {
                self.start(now, id, false);
            }
        }
    }

    /// Starts a load. False if its reader would most likely be the next to hang: it counts as failed then.
    fn start(&mut self, now: Instant, id: AdapterId, pack: bool) -> bool {
        let number = self.next_tick();
        let host = self.touch_host(&id, number);
        let n_stuck = self.stuck.values().filter(|stuck| **stuck == id).count();
        if host.is_none() && (self.stuck.len() >= STUCK_MAX || n_stuck >= STUCK_PER_ADAPTER_MAX) {
            self.note_failure(now, id, LoadError::TimedOut);
            self.show(id);
            return false;
        }
        let entry = self.entries.get_mut(&id).expect("only known adapters are loaded");
        entry.job = Some(number);
        let read_until = host.is_none().then(|| now + READ_MAX);
        self.jobs.insert(number, Job { id, read_until, doomed: false, renewed: false });
        self.commands.push(Command::Load(LoadJob { number, adapter: entry.adapter.clone(), host, pack }));
        true
    }

    /// Puts what a load brought where it belongs.
    pub(super) fn place_loaded(&mut self, now: Instant, id: AdapterId, loaded: Loaded) {
        self.keep_files(id, loaded.files);
        let Some(entry) = self.entries.get_mut(&id) else { return };
        if let Some(failure) = entry.failure.take() {
            self.failures.remove(&failure.at);
        }
        let Some(packed) = loaded.packed else { return };
        entry.packed_bytes = Some(packed.bytes);
        let budget_bytes = self.config.engine_bytes;
        if packed.bytes > budget_bytes {
            let needed_bytes = packed.bytes;
            self.commands.push(Command::Retire(Retired::Packed(packed)));
            self.note_failure(now, id, LoadError::TooLarge { needed_bytes, budget_bytes });
            return;
        }
        let Some(slot) = entry.slot else {
            self.commands.push(Command::Retire(Retired::Packed(packed)));
            return;
        };
        self.settle(slot, id, packed);
    }

    /// Fills the slot, or gives it up if the adapter turned out larger than what can be freed now; its size is
    /// known then, and it waits for as much.
    fn settle(&mut self, slot: u32, id: AdapterId, packed: Arc<LoraAdapter>) {
        let reserved = self.slots[slot as usize].occupant.as_ref().map_or(0, |occupant| occupant.bytes);
        let more = packed.bytes.saturating_sub(reserved);
        let place = self.places.get(&id).copied().unwrap_or(usize::MAX);
        if !self.make_room(0, more, place) {
            self.commands.push(Command::Retire(Retired::Packed(packed)));
            self.vacate(id);
            self.want_again(id);
            return;
        }
        self.engine_bytes = self.engine_bytes - reserved + packed.bytes;
        self.stats.loads += 1;
        let tick = self.next_tick();
        if let Some(occupant) = self.slots[slot as usize].occupant.as_mut() {
            occupant.bytes = packed.bytes;
            occupant.used_at = tick;
            occupant.adapter = Some(packed);
        }
    }
}
