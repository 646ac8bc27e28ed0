//! The fair choice among classes, tenants and routes, in tokens of service.
//!
//! Hierarchical weighted virtual token counters: a class is compared with classes, a tenant with tenants of
//! its class, a route with routes of its tenant; the one that had the least service per weight is next
//! (VTC, OSDI'24, per level as in hierarchical fair queueing). Work is charged when it is computed; a
//! request's prompt is charged already when it is picked and corrected later, so that a burst of picks
//! between two charges is spread too. Who returns from idleness starts at the least of those who wait:
//! idleness is not saved up (counter lift).
//!
//! Called by [`crate::handle::Queue`] under its lock, and by the actor's timer. No clock, no allocation per
//! pick beyond set nodes; every call is O(log n) in tenants and requests, and a pick looks besides at no
//! more than a bounded number of lines that cannot run.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use shared::adapter::{AdapterId, Residency};
use shared::id::{RequestId, Route, TenantId};
use shared::tenant::Tier;

use crate::drain::DrainRate;
use crate::item::{FairConfig, Item, Picked, SubmitError};
use crate::virtual_time::VirtualTime;

mod lines;
mod choose;
mod stats;
#[cfg(test)]
mod tests;

pub use stats::{ClassStats, QueueStats, TenantStats};

use lines::{Class, Entry, Group, RouteIdx, RouteLine, Slab, TenantIdx, TenantLines};

/// A request in the engine.
#[derive(Debug, Clone, Copy)]
struct Running {
    route: RouteIdx,
    n_sequences: u32,
    prompt_tokens: u32,
}

/// The queue's core; `T` is what the submitter attached to a request.
#[derive(Debug)]
pub struct FairQueue<T> {
    config: FairConfig,
    classes: [Class; 3],
    tenants: Slab<TenantLines>,
    routes: Slab<RouteLine<T>>,
    by_tenant: HashMap<(Tier, TenantId), TenantIdx>,
    by_route: HashMap<(Tier, Route), RouteIdx>,
    /// Waiting requests by id.
    waiting: HashMap<RequestId, (RouteIdx, u64)>,
    running: HashMap<RequestId, Running>,
    deadlines: BTreeSet<(Instant, u64, RouteIdx)>,
    groups: HashMap<AdapterId, Group>,
    /// Passed their deadline, not yet reported.
    expired: Vec<(Item, T)>,
    next_seq: u64,
    /// Where a class that was empty starts when no other waits.
    class_floor: VirtualTime,
    view_epoch: Option<u64>,
    /// The last pick held somebody back for one who waits for a slot.
    draining: bool,
    rate: DrainRate,
    swept_at: Option<Instant>,
}

// === impl FairQueue ===

impl<T> FairQueue<T> {
    /// An empty queue.
    pub fn new(config: FairConfig) -> Self {
        Self {
            config,
            classes: Default::default(),
            tenants: Slab::default(),
            routes: Slab::default(),
            by_tenant: HashMap::new(),
            by_route: HashMap::new(),
            waiting: HashMap::new(),
            running: HashMap::new(),
            deadlines: BTreeSet::new(),
            groups: HashMap::new(),
            expired: Vec::new(),
            next_seq: 0,
            class_floor: VirtualTime::default(),
            view_epoch: None,
            draining: false,
            rate: DrainRate::default(),
            swept_at: None,
        }
    }

    /// Replaces the terms; takes effect with the next pick. Service already counted stays as it is.
    pub fn configure(&mut self, config: FairConfig) {
        self.config = config;
    }

    /// Requests that wait.
    pub fn n_waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that were picked and have not left.
    pub fn n_running(&self) -> usize {
        self.running.len()
    }

    /// Queues a request or says at once why not.
    ///
    /// # Errors
    ///
    /// [`SubmitError`]; nothing of the request is kept then.
    pub fn submit(&mut self, now: Instant, item: Item, payload: T) -> Result<(), SubmitError> {
        self.check_limits(now, &item)?;
        let route = self.line_for(now, &item);
        self.lift(route);
        self.insert(route, self.next_seq, Entry { item, payload });
        self.next_seq += 1;
        Ok(())
    }

    fn check_limits(&self, now: Instant, item: &Item) -> Result<(), SubmitError> {
        if item.deadline <= now {
            return Err(SubmitError::DeadlinePassed);
        }
        if self.waiting.contains_key(&item.id) || self.running.contains_key(&item.id) {
            return Err(SubmitError::Duplicate(item.id));
        }
        let tenant = self.by_tenant.get(&(item.tier, item.route.tenant.clone())).map(|&idx| self.tenants.at(idx));
        if let Some(&route) = self.by_route.get(&(item.tier, item.route.clone())) {
            let waiting = u32::try_from(self.routes.at(route).items.len()).unwrap_or(u32::MAX);
            if waiting >= item.queue_depth {
                let rate = tenant.map_or(self.rate, |lines| lines.rate);
                let retry_after = rate.retry_after(waiting as usize, item.id);
                return Err(SubmitError::RouteFull { waiting, limit: item.queue_depth, retry_after });
            }
        } else if item.queue_depth == 0 {
            let retry_after = self.rate.retry_after(0, item.id);
            return Err(SubmitError::RouteFull { waiting: 0, limit: 0, retry_after });
        }
        if let Some(lines) = tenant.filter(|lines| lines.waiting >= self.config.tenant_waiting_max) {
            let retry_after = lines.rate.retry_after(lines.waiting as usize, item.id);
            let limit = self.config.tenant_waiting_max;
            return Err(SubmitError::TenantFull { waiting: lines.waiting, limit, retry_after });
        }
        let is_first = tenant.is_none_or(|lines| lines.waiting == 0);
        let limit = self.config.waiting_max - if is_first { 0 } else { self.config.waiting_max / 8 };
        if self.waiting.len() >= limit {
            let retry_after = self.rate.retry_after(self.waiting.len(), item.id);
            return Err(SubmitError::NodeFull { waiting: self.waiting.len(), limit, retry_after });
        }
        Ok(())
    }

    /// Whoever had nothing waiting starts level with the least served of those who wait.
    fn lift(&mut self, route: RouteIdx) {
        let (tier, tenant) = (self.routes.at(route).tier, self.routes.at(route).tenant);
        if self.class(tier).waiting.is_empty() {
            let others = self.classes.iter().filter(|class| !class.waiting.is_empty());
            let least = others.map(|class| class.service).min().unwrap_or(self.class_floor);
            let class = self.class_mut(tier);
            class.service = class.service.max(least);
        }
        let lines = self.tenants.at(tenant);
        if lines.waiting == 0 {
            let class = self.class(tier);
            let least = class.waiting.first().map_or(class.floor, |&(service, _)| service);
            let lines = self.tenants.at_mut(tenant);
            lines.service = lines.service.max(least);
        }
        let lines = self.tenants.at(tenant);
        if self.routes.at(route).items.is_empty() {
            let least = lines.first_route().map_or(lines.route_floor, |first| self.routes.at(first).service);
            let line = self.routes.at_mut(route);
            line.service = line.service.max(least);
        }
    }

    fn insert(&mut self, route: RouteIdx, seq: u64, entry: Entry<T>) {
        let tenant = self.routes.at(route).tenant;
        self.unplace_tenant(tenant);
        self.unplace_route(route);
        self.waiting.insert(entry.item.id, (route, seq));
        self.deadlines.insert((entry.item.deadline, seq, route));
        self.routes.at_mut(route).items.insert(seq, entry);
        self.tenants.at_mut(tenant).waiting += 1;
        self.place_route(route);
        self.place_tenant(tenant);
    }

    /// Takes one waiting request out of its line.
    fn remove(&mut self, route: RouteIdx, seq: u64) -> Entry<T> {
        let (tier, tenant) = (self.routes.at(route).tier, self.routes.at(route).tenant);
        self.unplace_tenant(tenant);
        self.unplace_route(route);
        let line = self.routes.at_mut(route);
        let entry = line.items.remove(&seq).expect("waiting requests are in their line");
        let (route_service, emptied) = (line.service, line.items.is_empty());
        self.waiting.remove(&entry.item.id);
        self.deadlines.remove(&(entry.item.deadline, seq, route));
        let lines = self.tenants.at_mut(tenant);
        lines.waiting -= 1;
        if emptied {
            lines.route_floor = lines.route_floor.max(route_service);
        }
        let tenant_service = lines.service;
        self.place_route(route);
        self.place_tenant(tenant);
        if self.class(tier).waiting.is_empty() {
            let class = self.class_mut(tier);
            class.floor = class.floor.max(tenant_service);
            self.class_floor = self.class_floor.max(self.class(tier).service);
        }
        entry
    }

    /// Moves counters of a route, its tenant and its class by `tokens` (weighted), up or down.
    fn serve(&mut self, route: RouteIdx, tokens: u64, direction: fn(VirtualTime, VirtualTime) -> VirtualTime) {
        let (tier, tenant) = (self.routes.at(route).tier, self.routes.at(route).tenant);
        self.unplace_tenant(tenant);
        self.unplace_route(route);
        let class_weight = self.config.class_weights[tier as usize];
        let class = self.class_mut(tier);
        class.service = direction(class.service, VirtualTime::of(tokens, class_weight));
        let lines = self.tenants.at_mut(tenant);
        lines.service = direction(lines.service, VirtualTime::of(tokens, lines.weight));
        let line = self.routes.at_mut(route);
        line.service = direction(line.service, VirtualTime::of(tokens, 1));
        self.place_route(route);
        self.place_tenant(tenant);
    }

    fn prefill_cost(&self, tokens: u64) -> u64 {
        tokens.saturating_mul(u64::from(self.config.prefill_weight))
    }

    /// Takes the head of `route` into the engine.
    fn hand_out(&mut self, now: Instant, route: RouteIdx, residency: Residency) -> Picked<T> {
        let (&seq, _) = self.routes.at(route).items.first_key_value().expect("only lines with a head are chosen");
        let prompt_tokens = self.head(route).map_or(0, |item| item.prompt_tokens);
        // Charged before the head is removed, so that a floor left behind includes it.
        self.serve(route, self.prefill_cost(u64::from(prompt_tokens)), VirtualTime::plus);
        let Entry { item, payload } = self.remove(route, seq);
        let running = Running { route, n_sequences: item.n_sequences, prompt_tokens };
        self.running.insert(item.id, running);
        let line = self.routes.at_mut(route);
        line.running += 1;
        line.running_prompt_tokens += u64::from(prompt_tokens);
        line.prepaid_tokens += u64::from(prompt_tokens);
        self.run_sequences(route, i64::from(item.n_sequences));
        let tenant = self.routes.at(route).tenant;
        let lines = self.tenants.at_mut(tenant);
        lines.rate.record(now);
        lines.active_at = now;
        self.rate.record(now);
        Picked { waited: now.saturating_duration_since(item.admitted_at), item, payload, residency, seq }
    }

    /// Changes how many sequences a route's tenant and class have in the engine.
    fn run_sequences(&mut self, route: RouteIdx, by: i64) {
        let (tier, tenant) = (self.routes.at(route).tier, self.routes.at(route).tenant);
        self.unplace_tenant(tenant);
        let moved = |count: u32| u32::try_from(i64::from(count) + by).expect("as many sequences leave as entered");
        let lines = self.tenants.at_mut(tenant);
        lines.running_sequences = moved(lines.running_sequences);
        self.place_tenant(tenant);
        let class = self.class_mut(tier);
        class.running_sequences = moved(class.running_sequences);
    }

    /// Tokens that a route really used. Prompt tokens come off what was charged at picking first.
    pub fn charge(&mut self, tier: Tier, route: &Route, prefill_tokens: u32, decode_tokens: u32) {
        // A clone of two shared strings: the price of one map for both parts of the key.
        let Some(&route) = self.by_route.get(&(tier, route.clone())) else { return };
        let line = self.routes.at_mut(route);
        let prepaid = line.prepaid_tokens.min(u64::from(prefill_tokens));
        line.prepaid_tokens -= prepaid;
        let decode_cost = u64::from(decode_tokens) * u64::from(self.config.decode_weight);
        let tokens = self.prefill_cost(u64::from(prefill_tokens) - prepaid).saturating_add(decode_cost);
        if tokens > 0 {
            self.serve(route, tokens, VirtualTime::plus);
        }
    }

    /// A picked request left the engine, whatever its end. Returns whether it was running.
    pub fn left(&mut self, id: RequestId) -> bool {
        let Some(running) = self.running.remove(&id) else { return false };
        let line = self.routes.at_mut(running.route);
        line.running -= 1;
        line.running_prompt_tokens -= u64::from(running.prompt_tokens);
        // Prompt tokens that came from the prefix cache or were never computed are given back. Charges name
        // the route, not the request, so what is still owed is bounded by the prompts that still run.
        let refund = line.prepaid_tokens.saturating_sub(line.running_prompt_tokens);
        line.prepaid_tokens -= refund;
        self.run_sequences(running.route, -i64::from(running.n_sequences));
        if refund > 0 {
            self.serve(running.route, self.prefill_cost(refund), VirtualTime::minus);
        }
        self.limit_credit(running.route);
        true
    }

    /// A backlogged tenant that its own cap keeps back may not save up more than a stated credit.
    fn limit_credit(&mut self, route: RouteIdx) {
        let (tier, tenant) = (self.routes.at(route).tier, self.routes.at(route).tenant);
        let least_other =
            self.class(tier).waiting.iter().take(2).find(|&&(_, idx)| idx != tenant).map(|&(least, _)| least);
        let Some(least_other) = least_other else { return };
        let bound = least_other.minus(VirtualTime::of(self.config.credit_tokens_max, 1));
        if self.tenants.at(tenant).service < bound {
            self.unplace_tenant(tenant);
            self.tenants.at_mut(tenant).service = bound;
            self.place_tenant(tenant);
        }
    }

    /// Undoes a pick whose adapter turned out not to be there: the request is first in its line again.
    pub fn put_back(&mut self, picked: Picked<T>) {
        let Some(&Running { route, .. }) = self.running.get(&picked.item.id) else { return };
        let (id, adapter) = (picked.item.id, picked.item.adapter);
        self.insert(route, picked.seq, Entry { item: picked.item, payload: picked.payload });
        self.left(id);
        if let Some(adapter_id) = &adapter {
            self.set_parked(adapter_id, true);
        }
    }

    /// Takes a waiting request out. `None` if it does not wait (any more).
    pub fn cancel(&mut self, id: RequestId) -> Option<(Item, T)> {
        let &(route, seq) = self.waiting.get(&id)?;
        let Entry { item, payload } = self.remove(route, seq);
        Some((item, payload))
    }

    /// What passed its deadline while waiting: it will never be picked. Also forgets long idle tenants.
    pub fn expire(&mut self, now: Instant) -> Vec<(Item, T)> {
        self.collect_expired(now);
        self.sweep(now);
        // A missed change of an adapter costs one tick, not a request's whole deadline.
        self.view_epoch = None;
        std::mem::take(&mut self.expired)
    }

    fn collect_expired(&mut self, now: Instant) {
        while let Some(&(deadline, seq, route)) = self.deadlines.first() {
            if deadline > now {
                return;
            }
            let Entry { item, payload } = self.remove(route, seq);
            self.expired.push((item, payload));
        }
    }

    /// When the next waiting request passes its deadline.
    pub fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|&(deadline, _, _)| deadline)
    }

    /// Empties the queue, oldest first; running requests stay counted.
    pub fn drain(&mut self) -> Vec<(Item, T)> {
        let mut places: Vec<(u64, RouteIdx)> = self.deadlines.iter().map(|&(_, seq, route)| (seq, route)).collect();
        places.sort_unstable();
        let mut out = std::mem::take(&mut self.expired);
        for (seq, route) in places {
            let Entry { item, payload } = self.remove(route, seq);
            out.push((item, payload));
        }
        out
    }

    /// Drops tenants that neither wait nor run and owe nothing, and those idle for long. Once in ten seconds:
    /// it visits every tenant.
    fn sweep(&mut self, now: Instant) {
        const SWEEP_EVERY_S: u64 = 10;
        if self.swept_at.is_some_and(|last| now.saturating_duration_since(last).as_secs() < SWEEP_EVERY_S) {
            return;
        }
        self.swept_at = Some(now);
        let idle_routes: Vec<RouteIdx> = self
            .routes
            .iter()
            .filter(|(_, line)| line.items.is_empty() && line.running == 0 && self.is_forgettable(now, line.tenant))
            .map(|(route, _)| route)
            .collect();
        for route in idle_routes {
            let Some(line) = self.routes.remove(route) else { continue };
            self.by_route.remove(&(line.tier, line.route.clone()));
            if let Some(lines) = self.tenants.remove(line.tenant) {
                self.by_tenant.remove(&(lines.tier, lines.id));
            }
        }
    }

    fn is_forgettable(&self, now: Instant, tenant: TenantIdx) -> bool {
        let lines = self.tenants.at(tenant);
        let class = self.class(lines.tier);
        let least = class.waiting.first().map_or(class.floor, |&(service, _)| service);
        lines.waiting == 0
            && lines.running_sequences == 0
            && (lines.service <= least || now.saturating_duration_since(lines.active_at) >= self.config.forget_after)
    }
}
