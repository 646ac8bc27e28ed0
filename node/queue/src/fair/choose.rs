//! The choice itself: walk in fair order, step over what cannot run, and never let those who can run get too
//! far ahead of those who wait for a slot.
//!
//! A line whose adapter is not ready is *parked*: it keeps its turn, is not looked at again until its adapter
//! settles, and so a pick costs the same with ten thousand of them. Who waits for a **slot** limits the
//! others: a tenant with a resident adapter may enter only while its counter is at most `pass_tokens_max`
//! ahead. Beyond that nothing new enters on the slots, they drain, and the cache gives the first free one to
//! the first of [`FairQueue::wanted`]. Who waits for a **load** limits nobody: its slot is sure, loads end by
//! themselves, and one slow disk must not stop the node. Base requests hold no slot and pass freely.

use std::ops::Bound;
use std::time::Instant;

use shared::adapter::{AdapterId, Residency};
use shared::tenant::Tier;

use super::FairQueue;
use super::lines::{Order, RouteIdx, TenantIdx};
use crate::item::{AdapterView, Picked, Room};
use crate::virtual_time::VirtualTime;

/// Lines that a pick may step over without parking them (barred or too wide). More are open only if more
/// adapters are resident than any slot count in use; then the rest waits for the next step.
const STEP_OVERS_MAX: u32 = 256;
/// Lines that one pick may park. Each is parked once per change of its adapter, so this bounds one call, not
/// the work.
const PARKINGS_MAX: u32 = 1024;
/// Parked lines asked about until the first that waits for a slot is found: those before it are loading, and
/// no more load than there are slots.
const BLOCKED_LOOKS_MAX: usize = 64;
/// The same within one tenant, whose routes are few.
const BLOCKED_ROUTE_LOOKS_MAX: usize = 8;
/// Tenants visited to find the adapters wanted next.
const WANTED_LOOKS_MAX: usize = 256;

/// Outcome of looking at one tenant's lines.
enum Look {
    Take(RouteIdx, Residency),
    /// The fair choice does not fit: nobody may take the room it waits for.
    Wait,
    /// The class has used up what is not reserved for others.
    ClassFull,
    /// Nothing of this tenant can run now.
    Nothing,
}

/// What one pick may still spend.
struct Budget {
    step_overs: u32,
    parkings: u32,
}

impl<T> FairQueue<T> {
    /// The next request in fair order that fits into `room`, if any.
    ///
    /// If the fair choice does not fit, nothing is picked: smaller ones would keep it out for ever. Only when
    /// nothing runs at all is it handed out regardless, since then waiting cannot help and the engine can say
    /// why. Requests past their deadline are set aside for [`FairQueue::expire`] first.
    pub fn next(&mut self, now: Instant, room: Room, view: &mut dyn AdapterView) -> Option<Picked<T>> {
        self.collect_expired(now);
        self.draining = false;
        if self.waiting.is_empty() || room.sequences == 0 {
            return None;
        }
        self.notice_settled(view);
        let (route, residency) = self.choose(room, view)?;
        Some(self.hand_out(now, route, residency))
    }

    /// Asks again about adapters that became ready or failed since the last pick.
    fn notice_settled(&mut self, view: &mut dyn AdapterView) {
        let epoch = view.epoch();
        if self.view_epoch == Some(epoch) {
            return;
        }
        self.view_epoch = Some(epoch);
        let mut settled = Vec::new();
        view.settled(&mut settled);
        for adapter_id in &settled {
            self.set_parked(adapter_id, false);
        }
    }

    fn choose(&mut self, room: Room, view: &mut dyn AdapterView) -> Option<(RouteIdx, Residency)> {
        let mut budget = Budget { step_overs: STEP_OVERS_MAX, parkings: PARKINGS_MAX };
        let mut tiers = Tier::ALL;
        tiers.sort_by_key(|&tier| (self.class(tier).service, tier));
        for tier in tiers {
            let mut after = Bound::Unbounded;
            while let Some(&key) = self.class(tier).open.range((after, Bound::Unbounded)).next() {
                after = Bound::Excluded(key);
                match self.look_at(key.1, room, view, &mut budget) {
                    Look::Take(route, residency) => return Some((route, residency)),
                    Look::Wait => return None,
                    Look::ClassFull => break,
                    Look::Nothing if budget.step_overs == 0 || budget.parkings == 0 => return None,
                    Look::Nothing => {}
                }
            }
        }
        None
    }

    /// Finds the first line of a tenant that may run now; parks those whose adapter is not ready.
    fn look_at(&mut self, tenant: TenantIdx, room: Room, view: &mut dyn AdapterView, budget: &mut Budget) -> Look {
        let mut after = Bound::Unbounded;
        while let Some(&key) = self.tenants.at(tenant).open.range((after, Bound::Unbounded)).next() {
            after = Bound::Excluded(key);
            let route = key.1;
            let Some(item) = self.head(route) else { continue };
            let (adapter, n_sequences, kv_tokens) = (item.adapter, item.n_sequences, item.kv_tokens);
            let residency = adapter.map_or(Residency::Ready, |adapter_id| view.residency(&adapter_id));
            if let (Some(adapter_id), Residency::Loading | Residency::NoSlot | Residency::Absent) = (adapter, residency)
            {
                self.set_parked(&adapter_id, true);
                budget.parkings = budget.parkings.saturating_sub(1);
                continue;
            }
            budget.step_overs = budget.step_overs.saturating_sub(1);
            // A failed one needs no slot, but room: its contract may let the base answer.
            let needs_slot = adapter.is_some() && residency == Residency::Ready;
            let barred = needs_slot && self.is_barred(tenant, route, view);
            self.draining |= barred;
            if barred || !self.tenants.at(tenant).may_run(n_sequences) {
                if budget.step_overs == 0 {
                    return Look::Nothing;
                }
                continue;
            }
            if self.running.is_empty() {
                return Look::Take(route, residency);
            }
            if n_sequences > room.sequences || kv_tokens > room.kv_tokens {
                return Look::Wait;
            }
            if n_sequences > self.sequences_free_for(self.tenants.at(tenant).tier, room) {
                return Look::ClassFull;
            }
            return Look::Take(route, residency);
        }
        Look::Nothing
    }

    /// Places in the batch left for a class after what is reserved for the others and not used by them.
    fn sequences_free_for(&self, tier: Tier, room: Room) -> u32 {
        let kept_free: u32 = Tier::ALL
            .into_iter()
            .filter(|&other| other != tier)
            .map(|other| {
                let reserved = self.config.class_sequences_reserved[other as usize];
                reserved.saturating_sub(self.class(other).running_sequences)
            })
            .sum();
        room.sequences.saturating_sub(kept_free)
    }

    /// Whether `route`, whose adapter is resident, is too far ahead of someone who waits for a slot, at the
    /// level where the two part: route, tenant or class.
    fn is_barred(&self, tenant: TenantIdx, route: RouteIdx, view: &mut dyn AdapterView) -> bool {
        let ahead_max = VirtualTime::of(self.config.pass_tokens_max, 1);
        let lines = self.tenants.at(tenant);
        let own = self.first_blocked_route(&lines.parked, view);
        if own.is_some_and(|blocked| self.routes.at(route).service > blocked.plus(ahead_max)) {
            return true;
        }
        for tier in Tier::ALL {
            let class = self.class(tier);
            let blocked = class
                .parked
                .iter()
                .take(BLOCKED_LOOKS_MAX)
                .find(|&&(_, idx)| {
                    idx != tenant && self.first_blocked_route(&self.tenants.at(idx).parked, view).is_some()
                })
                .map(|&(service, _)| service);
            let Some(blocked) = blocked else { continue };
            let (mine, theirs) = if tier == lines.tier {
                (lines.service, blocked)
            } else {
                (self.class(lines.tier).service, class.service)
            };
            if mine > theirs.plus(ahead_max) {
                return true;
            }
        }
        false
    }

    /// Counter of the least served of these parked routes that waits for a slot.
    fn first_blocked_route(&self, parked: &Order, view: &mut dyn AdapterView) -> Option<VirtualTime> {
        parked.iter().take(BLOCKED_ROUTE_LOOKS_MAX).find_map(|&(service, route)| {
            let adapter_id = self.head(route)?.adapter?;
            (view.residency(&adapter_id) == Residency::NoSlot).then_some(service)
        })
    }

    /// Whether the last [`FairQueue::next`] held somebody back for one who waits for a slot: the cache may then
    /// take slots from adapters that wait themselves, further back in the order.
    pub fn draining(&self) -> bool {
        self.draining
    }

    /// The next `k` distinct adapters in fair order, for the cache: what to keep, and what to load first.
    /// Tenants at their concurrency cap are left out; they could not use a slot more.
    pub fn wanted(&self, k: usize) -> Vec<AdapterId> {
        let mut wanted = Vec::with_capacity(k);
        let mut tiers = Tier::ALL;
        tiers.sort_by_key(|&tier| (self.class(tier).service, tier));
        let mut looks_left = WANTED_LOOKS_MAX;
        for tier in tiers {
            let class = self.class(tier);
            for (_, tenant) in merged(&class.open, &class.parked) {
                let lines = self.tenants.at(tenant);
                for (_, route) in merged(&lines.open, &lines.parked) {
                    if wanted.len() >= k || looks_left == 0 {
                        return wanted;
                    }
                    looks_left -= 1;
                    if let Some(adapter_id) = self.head(route).and_then(|item| item.adapter)
                        && !wanted.contains(&adapter_id)
                    {
                        wanted.push(adapter_id);
                    }
                }
            }
        }
        wanted
    }
}

/// Two orders as one, without what is in both twice.
fn merged<'a>(left: &'a Order, right: &'a Order) -> impl Iterator<Item = (VirtualTime, u32)> + 'a {
    let (mut left, mut right) = (left.iter().copied().peekable(), right.iter().copied().peekable());
    std::iter::from_fn(move || match (left.peek(), right.peek()) {
        (Some(a), Some(b)) if a == b => {
            right.next();
            left.next()
        }
        (Some(a), Some(b)) if a < b => left.next(),
        (_, Some(_)) => right.next(),
        (_, None) => left.next(),
    })
}
