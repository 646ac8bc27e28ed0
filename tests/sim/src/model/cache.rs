//! What a node's adapter cache hits over weeks of business hours, as an LRU alone and with pre-warming.
//!
//! Tenants live where the real ring puts them, with bounded loads; each node has room for a fifth of a fair share of
//! the adapters. Nodes share nothing here, so that of many only some are looked at.

use std::collections::BTreeMap;
use std::time::Duration;

use coordinator::prewarm::activity::Activity;
use coordinator::prewarm::plan::{AHEAD, Caution, EVERY, Known, Room, Step, loads_max, plan};
use coordinator::route::RoutingTable;
use serde::Serialize;
use shared::adapter::AdapterRef;
use shared::hash::ContentHash;
use shared::id::Route;

use super::trace::{DAY_S, SESSION_GAP_S, WEEK_S, requests};
use super::{Size, node, place, tenant};

/// Weeks that are replayed.
const WEEKS: u64 = 5;
/// What is counted is the last two weeks.
const COUNTED_FROM_S: u64 = 3 * WEEK_S;
/// Plans are made from this time on: a plan needs habits, and what was warm three days before does not last.
const PLANNED_FROM_S: u64 = COUNTED_FROM_S - 3 * DAY_S;

/// What became of requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Count {
    /// Requests.
    pub requests: u64,
    /// Of these, those whose adapter was in memory.
    pub hits: u64,
    /// First requests of sessions.
    pub sessions: u64,
    /// Of these, those whose adapter was not.
    pub cold_sessions: u64,
    /// Adapters loaded, asked for or ahead of time.
    pub loads: u64,
}

/// Caches of some nodes of a cluster.
#[derive(Debug, Clone, Serialize)]
pub struct Caches {
    /// Nodes looked at.
    pub nodes: usize,
    /// Tenants that live on them.
    pub tenants: usize,
    /// Places for adapters on each.
    pub slots: usize,
    /// With an LRU alone.
    pub lru: Count,
    /// With pre-warming.
    pub prewarmed: Count,
    /// Lowest share of hits of a node: LRU, pre-warmed.
    pub worst_hits: (f64, f64),
}

impl Count {
    /// Share of requests that found their adapter in memory.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.requests.max(1) as f64
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.hits += other.hits;
        self.sessions += other.sessions;
        self.cold_sessions += other.cold_sessions;
        self.loads += other.loads;
    }
}

/// Replays the trace on at most `looked_at` nodes, evenly chosen.
pub fn caches(seed: u64, size: Size, table: &RoutingTable, looked_at: usize) -> Caches {
    let chosen: BTreeMap<_, usize> =
        (0..looked_at.min(size.nodes)).map(|i| (node(i * size.nodes / looked_at.min(size.nodes)), i)).collect();
    let mut tenants = vec![Vec::new(); chosen.len()];
    for i in 0..size.tenants {
        let owners = table.owners(&place(), &tenant(i)).expect("there are nodes");
        if let Some(index) = chosen.get(owners.home) {
            tenants[*index].push(i);
        }
    }
    let slots = (size.tenants / size.nodes / 5).max(1);
    let mut caches = Caches {
        nodes: chosen.len(),
        tenants: tenants.iter().map(Vec::len).sum(),
        slots,
        lru: Count::default(),
        prewarmed: Count::default(),
        worst_hits: (1.0, 1.0),
    };
    for tenants in &tenants {
        let replay = Replay::new(seed, tenants, slots);
        let (lru, prewarmed) = (replay.run(false), replay.run(true));
        caches.lru.add(lru);
        caches.prewarmed.add(prewarmed);
        caches.worst_hits = (caches.worst_hits.0.min(lru.hit_rate()), caches.worst_hits.1.min(prewarmed.hit_rate()));
    }
    caches
}

/// One node's tenants and what they ask for.
struct Replay {
    routes: Vec<Route>,
    adapters: Vec<AdapterRef>,
    index: BTreeMap<AdapterRef, usize>,
    /// `(second, tenant)`, in order.
    requests: Vec<(u64, usize)>,
    slots: usize,
}

/// What a node has in memory and remembers.
struct Cache {
    activity: Activity,
    resident: BTreeMap<usize, u64>,
    asked_at: Vec<Option<u64>>,
    count: Count,
}

impl Replay {
    fn new(seed: u64, tenants: &[usize], slots: usize) -> Self {
        let route = |i: &usize| Route { tenant: tenant(*i), task: Some("support".parse().expect("a valid name")) };
        let adapter = |i: &usize| AdapterRef { tenant: tenant(*i), hash: ContentHash::of(&i.to_le_bytes()) };
        let adapters: Vec<AdapterRef> = tenants.iter().map(adapter).collect();
        let asked = |(index, i): (usize, &usize)| requests(seed, *i, WEEKS).into_iter().map(move |at| (at, index));
        let mut requests: Vec<(u64, usize)> = tenants.iter().enumerate().flat_map(asked).collect();
        requests.sort_unstable();
        let index = adapters.iter().cloned().zip(0..).collect();
        Self { routes: tenants.iter().map(route).collect(), adapters, index, requests, slots }
    }

    fn run(&self, prewarm: bool) -> Count {
        let mut cache = Cache {
            activity: Activity::default(),
            resident: BTreeMap::new(),
            asked_at: vec![None; self.routes.len()],
            count: Count::default(),
        };
        let mut plan_at_s = PLANNED_FROM_S;
        for (now_s, index) in &self.requests {
            while prewarm && plan_at_s <= *now_s {
                self.plan(&mut cache, plan_at_s);
                plan_at_s += EVERY.as_secs();
            }
            self.on_request(&mut cache, *now_s, *index);
        }
        cache.count
    }

    fn on_request(&self, cache: &mut Cache, now_s: u64, index: usize) {
        let opens = cache.asked_at[index].replace(now_s).is_none_or(|at| now_s - at > SESSION_GAP_S);
        let hit = cache.resident.insert(index, now_s).is_some();
        if cache.resident.len() > self.slots {
            let oldest = cache.resident.iter().min_by_key(|(_, at)| **at).map(|(index, _)| *index);
            oldest.map(|oldest| cache.resident.remove(&oldest));
        }
        cache.activity.on_request(Duration::from_secs(now_s), &self.routes[index]);
        if now_s >= COUNTED_FROM_S {
            cache.count.add(Count {
                requests: 1,
                hits: u64::from(hit),
                sessions: u64::from(opens),
                cold_sessions: u64::from(opens && !hit),
                loads: u64::from(!hit),
            });
        }
    }

    fn plan(&self, cache: &mut Cache, now_s: u64) {
        let wall = Duration::from_secs(now_s);
        let known = self.adapters.iter().enumerate().map(|(index, adapter)| Known {
            adapter: adapter.clone(),
            bytes: 1,
            likely: cache.activity.likely(wall, AHEAD, &self.routes[index]),
            resident: cache.resident.contains_key(&index),
            leased: cache.asked_at[index].is_some_and(|at| now_s - at < 5),
        });
        let loads = loads_max(self.slots);
        let room = Room { slots: self.slots, bytes: self.slots as u64, loads };
        for step in plan(known.collect(), room, Caution::default()) {
            match step {
                Step::Cool(adapter) => _ = cache.resident.remove(&self.index[&adapter]),
                Step::Warm(adapter) => {
                    cache.count.loads += u64::from(now_s >= COUNTED_FROM_S);
                    cache.resident.insert(self.index[&adapter], now_s);
                }
            }
        }
    }
}
