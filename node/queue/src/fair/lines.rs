//! The state of the fair queue: classes, tenants and routes, and the ordered sets that find the next one.
//!
//! Used by the other files of [`super`] only. Every change of a route follows the same four steps: unplace
//! its tenant, unplace it, change it, place both again; so the sets always agree with the counters.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use shared::adapter::AdapterId;
use shared::id::{Route, TenantId};
use shared::tenant::Tier;

use super::FairQueue;
use crate::drain::DrainRate;
use crate::item::Item;
use crate::virtual_time::VirtualTime;

pub(super) type TenantIdx = u32;
pub(super) type RouteIdx = u32;
/// An ordered set keyed by service received; ties by index, so that the order is total.
pub(super) type Order = BTreeSet<(VirtualTime, u32)>;

/// Values at stable small indices.
#[derive(Debug)]
pub(super) struct Slab<V> {
    places: Vec<Option<V>>,
    free: Vec<u32>,
}

impl<V> Default for Slab<V> {
    fn default() -> Self {
        Self { places: Vec::new(), free: Vec::new() }
    }
}

impl<V> Slab<V> {
    pub(super) fn insert(&mut self, value: V) -> u32 {
        if let Some(idx) = self.free.pop() {
            self.places[idx as usize] = Some(value);
            return idx;
        }
        self.places.push(Some(value));
        u32::try_from(self.places.len() - 1).expect("fewer than 2^32 tenants and routes")
    }

    pub(super) fn remove(&mut self, idx: u32) -> Option<V> {
        let value = self.places.get_mut(idx as usize)?.take();
        if value.is_some() {
            self.free.push(idx);
        }
        value
    }

    pub(super) fn at(&self, idx: u32) -> &V {
        self.places[idx as usize].as_ref().expect("indices are kept only while their place is taken")
    }

    pub(super) fn at_mut(&mut self, idx: u32) -> &mut V {
        self.places[idx as usize].as_mut().expect("indices are kept only while their place is taken")
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &V)> + Clone {
        self.places.iter().enumerate().filter_map(|(idx, value)| {
            let idx = u32::try_from(idx).expect("fewer than 2^32 places");
            value.as_ref().map(|value| (idx, value))
        })
    }
}

/// One waiting request.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) item: Item,
    pub(super) payload: T,
}

/// One route: a line, first come first served.
#[derive(Debug)]
pub(super) struct RouteLine<T> {
    pub(super) route: Route,
    pub(super) tier: Tier,
    pub(super) tenant: TenantIdx,
    pub(super) service: VirtualTime,
    /// By arrival; the first is the head.
    pub(super) items: BTreeMap<u64, Entry<T>>,
    pub(super) running: u32,
    /// Prompt tokens of requests that run.
    pub(super) running_prompt_tokens: u64,
    /// Prompt tokens charged at picking and not yet reported as computed.
    pub(super) prepaid_tokens: u64,
    placed: Option<RoutePlace>,
}

#[derive(Debug, Clone, Copy)]
struct RoutePlace {
    service: VirtualTime,
    parked: bool,
    adapter: Option<AdapterId>,
}

/// One tenant inside one class.
#[derive(Debug)]
pub(super) struct TenantLines {
    pub(super) id: TenantId,
    pub(super) tier: Tier,
    pub(super) weight: u32,
    pub(super) concurrency: u32,
    pub(super) service: VirtualTime,
    /// Routes whose head may be able to run.
    pub(super) open: Order,
    /// Routes whose head waits for its adapter.
    pub(super) parked: Order,
    /// Where a route that was empty starts when no other waits.
    pub(super) route_floor: VirtualTime,
    pub(super) waiting: u32,
    pub(super) running_sequences: u32,
    pub(super) rate: DrainRate,
    pub(super) active_at: Instant,
    placed: Option<TenantPlace>,
}

#[derive(Debug, Clone, Copy)]
struct TenantPlace {
    service: VirtualTime,
    open: bool,
    parked: bool,
}

impl TenantLines {
    /// Its route that had the least service.
    pub(super) fn first_route(&self) -> Option<RouteIdx> {
        [self.open.first(), self.parked.first()].into_iter().flatten().min().map(|&(_, route)| route)
    }

    /// Whether `n` more sequences respect the cap. A request larger than the cap runs alone.
    pub(super) fn may_run(&self, n_sequences: u32) -> bool {
        self.running_sequences == 0 || self.running_sequences.saturating_add(n_sequences) <= self.concurrency
    }
}

/// One queue class.
#[derive(Debug, Default)]
pub(super) struct Class {
    pub(super) service: VirtualTime,
    /// Tenants below their cap with an open route.
    pub(super) open: Order,
    /// Tenants below their cap with a parked route.
    pub(super) parked: Order,
    /// Every tenant with a waiting request, capped ones too.
    pub(super) waiting: Order,
    /// Where a tenant that was idle starts when no other waits.
    pub(super) floor: VirtualTime,
    pub(super) running_sequences: u32,
}

/// Routes whose head needs the same adapter.
#[derive(Debug, Default)]
pub(super) struct Group {
    pub(super) routes: BTreeSet<RouteIdx>,
    /// The adapter was not ready when last asked.
    pub(super) parked: bool,
}

// === finding and making lines ===

impl<T> FairQueue<T> {
    pub(super) fn class(&self, tier: Tier) -> &Class {
        &self.classes[tier as usize]
    }

    pub(super) fn class_mut(&mut self, tier: Tier) -> &mut Class {
        &mut self.classes[tier as usize]
    }

    /// The line of `item`'s route, made if it is new, with the tenant's terms brought up to date.
    pub(super) fn line_for(&mut self, now: Instant, item: &Item) -> RouteIdx {
        let tenant_key = (item.tier, item.route.tenant.clone());
        let tenant = match self.by_tenant.get(&tenant_key) {
            Some(&tenant) => tenant,
            None => {
                let tenant = self.tenants.insert(TenantLines {
                    id: item.route.tenant.clone(),
                    tier: item.tier,
                    weight: 1,
                    concurrency: 1,
                    service: VirtualTime::default(),
                    open: Order::new(),
                    parked: Order::new(),
                    route_floor: VirtualTime::default(),
                    waiting: 0,
                    running_sequences: 0,
                    rate: DrainRate::default(),
                    active_at: now,
                    placed: None,
                });
                self.by_tenant.insert(tenant_key, tenant);
                tenant
            }
        };
        self.unplace_tenant(tenant);
        let lines = self.tenants.at_mut(tenant);
        lines.weight = item.weight.max(1);
        lines.concurrency = item.concurrency.max(1);
        lines.active_at = now;
        self.place_tenant(tenant);

        let route_key = (item.tier, item.route.clone());
        if let Some(&route) = self.by_route.get(&route_key) {
            return route;
        }
        let route = self.routes.insert(RouteLine {
            route: item.route.clone(),
            tier: item.tier,
            tenant,
            service: VirtualTime::default(),
            items: BTreeMap::new(),
            running: 0,
            running_prompt_tokens: 0,
            prepaid_tokens: 0,
            placed: None,
        });
        self.by_route.insert(route_key, route);
        route
    }

    // === keeping the sets in step ===

    /// Removes a tenant from its class's sets; its fields may change until [`Self::place_tenant`].
    pub(super) fn unplace_tenant(&mut self, tenant: TenantIdx) {
        let lines = self.tenants.at_mut(tenant);
        let Some(place) = lines.placed.take() else { return };
        let tier = lines.tier;
        let key = (place.service, tenant);
        let class = self.class_mut(tier);
        class.waiting.remove(&key);
        if place.open {
            class.open.remove(&key);
        }
        if place.parked {
            class.parked.remove(&key);
        }
    }

    pub(super) fn place_tenant(&mut self, tenant: TenantIdx) {
        let lines = self.tenants.at(tenant);
        let Some(first) = lines.first_route() else { return };
        let n_sequences = self.head(first).map_or(1, |item| item.n_sequences);
        // The head that is next by fairness decides, not any head that would fit: otherwise a wide request
        // starves behind the tenant's own narrow ones.
        let eligible = lines.may_run(n_sequences);
        let place = TenantPlace {
            service: lines.service,
            open: eligible && !lines.open.is_empty(),
            parked: eligible && !lines.parked.is_empty(),
        };
        let (tier, key) = (lines.tier, (lines.service, tenant));
        self.tenants.at_mut(tenant).placed = Some(place);
        let class = self.class_mut(tier);
        class.waiting.insert(key);
        if place.open {
            class.open.insert(key);
        }
        if place.parked {
            class.parked.insert(key);
        }
    }

    /// Removes a route from its tenant's sets and its adapter's group. The tenant must be unplaced.
    pub(super) fn unplace_route(&mut self, route: RouteIdx) {
        let line = self.routes.at_mut(route);
        let Some(place) = line.placed.take() else { return };
        let tenant = self.tenants.at_mut(line.tenant);
        let key = (place.service, route);
        if place.parked {
            tenant.parked.remove(&key)
        } else {
            tenant.open.remove(&key)
        };
        if let Some(adapter_id) = place.adapter
            && let Some(group) = self.groups.get_mut(&adapter_id)
        {
            group.routes.remove(&route);
            if group.routes.is_empty() {
                self.groups.remove(&adapter_id);
            }
        }
    }

    pub(super) fn place_route(&mut self, route: RouteIdx) {
        let Some(adapter) = self.head(route).map(|item| item.adapter) else { return };
        let parked = adapter.is_some_and(|adapter_id| {
            let group = self.groups.entry(adapter_id).or_default();
            group.routes.insert(route);
            group.parked
        });
        let line = self.routes.at_mut(route);
        line.placed = Some(RoutePlace { service: line.service, parked, adapter });
        let (key, tenant) = ((line.service, route), line.tenant);
        let tenant = self.tenants.at_mut(tenant);
        if parked {
            tenant.parked.insert(key)
        } else {
            tenant.open.insert(key)
        };
    }

    /// Notes that an adapter is (not) worth asking about, and moves every route that waits for it.
    pub(super) fn set_parked(&mut self, adapter_id: &AdapterId, parked: bool) {
        let Some(group) = self.groups.get_mut(adapter_id) else { return };
        if group.parked == parked {
            return;
        }
        group.parked = parked;
        let routes: Vec<RouteIdx> = group.routes.iter().copied().collect();
        for route in routes {
            let line = self.routes.at_mut(route);
            let tenant = line.tenant;
            let Some(place) = line.placed.as_mut() else { continue };
            place.parked = parked;
            let key = (place.service, route);
            self.unplace_tenant(tenant);
            let lines = self.tenants.at_mut(tenant);
            if parked {
                lines.open.remove(&key);
                lines.parked.insert(key);
            } else {
                lines.parked.remove(&key);
                lines.open.insert(key);
            }
            self.place_tenant(tenant);
        }
    }

    /// First request of a line.
    pub(super) fn head(&self, route: RouteIdx) -> Option<&Item> {
        self.routes.at(route).items.first_key_value().map(|(_, entry)| &entry.item)
    }
}
