//! A small engine and a small adapter cache, stepped by hand: one row per decoding sequence, a prompt chunk
//! per prefilling one, slots with leases and loads that take steps.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shared::adapter::AdapterId;
use shared::clock::{Clock, ManualClock};
use shared::id::{RequestId, Route};
use shared::tenant::Tier;

use crate::fair::FairQueue;
use crate::item::{AdapterView, FairConfig, Item, Room};
use shared::adapter::Residency;

/// Tokens that a request will still take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Job {
    pub(crate) answer_tokens: u32,
}

#[derive(Debug)]
struct Sequence {
    id: RequestId,
    tier: Tier,
    route: Route,
    adapter: Option<AdapterId>,
    prompt_left: u32,
    answer_left: u32,
}

/// What one tenant got.
#[derive(Debug, Default, Clone)]
pub(crate) struct Served {
    pub(crate) weighted_tokens: u64,
    pub(crate) waits_steps: Vec<u64>,
    pub(crate) finished: u64,
}

/// Slots with leases; a load takes `load_steps`.
#[derive(Debug)]
pub(crate) struct Slots {
    capacity: usize,
    load_steps: u64,
    now_step: u64,
    epoch: u64,
    /// Resident or loading (ready at that step), and its leases.
    held: BTreeMap<AdapterId, (u64, u32)>,
    pub(crate) loads: u64,
}

impl Slots {
    /// Gives slots in the queue's order as the real cache does: free ones first, then unleased ones that
    /// nobody waits for, and those that wait further back only while the queue drains.
    fn prefer(&mut self, order: &[AdapterId], drain: bool) {
        for (place, adapter_id) in order.iter().enumerate() {
            if self.held.contains_key(adapter_id) {
                continue;
            }
            if self.held.len() >= self.capacity {
                let rank = |other: &AdapterId| order.iter().position(|h| h == other);
                let victim = self
                    .held
                    .iter()
                    .filter(|&(_, &(ready_at, leases))| leases == 0 && ready_at <= self.now_step)
                    .filter(|&(other, _)| rank(other).is_none_or(|behind| drain && behind > place))
                    .max_by_key(|&(other, _)| rank(other).map_or(usize::MAX, |behind| behind))
                    .map(|(&other, _)| other);
                let Some(victim) = victim else { return };
                self.held.remove(&victim);
            }
            self.held.insert(*adapter_id, (self.now_step + self.load_steps, 0));
            self.loads += 1;
        }
    }

    fn advance(&mut self) {
        self.now_step += 1;
        if self.held.values().any(|&(ready_at, _)| ready_at == self.now_step) {
            self.epoch += 1;
        }
    }
}

impl AdapterView for Slots {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn residency(&mut self, adapter_id: &AdapterId) -> Residency {
        match self.held.get(adapter_id) {
            Some(&(ready_at, _)) if ready_at <= self.now_step => Residency::Ready,
            Some(_) => Residency::Loading,
            None => Residency::NoSlot,
        }
    }

    fn settled(&mut self, out: &mut Vec<AdapterId>) {
        out.extend(self.held.iter().filter(|(_, held)| held.0 <= self.now_step).map(|(&adapter_id, _)| adapter_id));
    }
}

/// The simulated node.
#[derive(Debug)]
pub(crate) struct Sim {
    pub(crate) clock: ManualClock,
    pub(crate) queue: FairQueue<Job>,
    pub(crate) slots: Slots,
    batch: usize,
    running: Vec<Sequence>,
    submitted_at: BTreeMap<RequestId, u64>,
    pub(crate) step: u64,
    pub(crate) served: BTreeMap<Route, Served>,
    next_id: u128,
}

impl Sim {
    pub(crate) fn new(config: FairConfig, batch: usize, slots: usize) -> Self {
        Self {
            clock: ManualClock::default(),
            queue: FairQueue::new(config),
            slots: Slots { capacity: slots, load_steps: 3, now_step: 0, epoch: 0, held: BTreeMap::new(), loads: 0 },
            batch,
            running: Vec::new(),
            submitted_at: BTreeMap::new(),
            step: 0,
            served: BTreeMap::new(),
            next_id: 0,
        }
    }

    pub(crate) fn now(&self) -> Instant {
        self.clock.now()
    }

    /// Queues a request like `item`; whether it was accepted.
    pub(crate) fn submit(&mut self, item: Item, answer_tokens: u32) -> bool {
        self.next_id += 1;
        let id = RequestId(self.next_id);
        let accepted = self.queue.submit(self.now(), Item { id, ..item }, Job { answer_tokens }).is_ok();
        if accepted {
            self.submitted_at.insert(id, self.step);
        }
        accepted
    }

    /// One engine step of 10 ms: pull, compute, charge.
    pub(crate) fn step(&mut self) {
        self.pull();
        let mut finished = Vec::new();
        for sequence in &mut self.running {
            let (prefill, decode) = if sequence.prompt_left > 0 {
                let chunk = sequence.prompt_left.min(64);
                sequence.prompt_left -= chunk;
                (chunk, 0)
            } else {
                sequence.answer_left -= 1;
                (0, 1)
            };
            self.queue.charge(sequence.tier, &sequence.route, prefill, decode);
            let served = self.served.entry(sequence.route.clone()).or_default();
            served.weighted_tokens += u64::from(prefill) + 2 * u64::from(decode);
            if sequence.answer_left == 0 {
                served.finished += 1;
                finished.push((sequence.id, sequence.adapter));
            }
        }
        self.running.retain(|sequence| sequence.answer_left > 0);
        for (id, adapter) in finished {
            self.queue.left(id);
            if let Some(held) = adapter.and_then(|adapter_id| self.slots.held.get_mut(&adapter_id)) {
                held.1 -= 1;
            }
        }
        self.step += 1;
        self.slots.advance();
        self.clock.advance(Duration::from_millis(10));
    }

    fn pull(&mut self) {
        loop {
            let room = Room { sequences: (self.batch - self.running.len()) as u32, kv_tokens: 1 << 24 };
            let now = self.now();
            let picked = self.queue.next(now, room, &mut self.slots);
            // The lease comes first: once picked, its adapter may be one that nobody waits for any more.
            if let Some(adapter_id) = picked.as_ref().and_then(|picked| picked.item.adapter) {
                let held = self.slots.held.get_mut(&adapter_id).expect("picked requests have a resident adapter");
                assert!(held.0 <= self.step, "picked while its adapter was loading");
                held.1 += 1;
            }
            self.slots.prefer(&self.queue.wanted(32), self.queue.draining());
            let Some(picked) = picked else { return };
            let waited = self.step - self.submitted_at.remove(&picked.item.id).expect("submitted");
            self.served.entry(picked.item.route.clone()).or_default().waits_steps.push(waited);
            self.running.push(Sequence {
                id: picked.item.id,
                tier: picked.item.tier,
                route: picked.item.route,
                adapter: picked.item.adapter,
                prompt_left: picked.item.prompt_tokens,
                answer_left: picked.payload.answer_tokens,
            });
            assert!(self.running.len() <= self.batch, "the batch was overfilled");
        }
    }
}

/// The `p`-th percentile of `values`.
pub(crate) fn percentile(values: &[u64], p: usize) -> u64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get((sorted.len() * p / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

/// A small deterministic generator, so that a failing case can be run again.
#[derive(Debug)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// Uniform in `0..n`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % n
    }
}
