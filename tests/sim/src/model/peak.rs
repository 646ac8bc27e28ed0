//! What clients see at the busiest hour, when a node dies and when it comes back: the real membership and routes over
//! nodes that are queues, batches and caches.
//!
//! ```text
//! 0 ── caches fill ── 90 s ── before ── 150 s ✕ n1 dies ── 160 s ── without it ── 200 s n1 is back ── 230 s ── 260 s
//! ```
//! All nodes share one view, the one that node 0 has from everybody's heartbeats. Sessions come at random; a fifth of
//! the tenants open four fifths of them. A node admits what is loaded, first come first served; a step is as long as
//! [`super::Speed`] says, and prompts may double it. Streams of the dead node go on at their next candidate, from their
//! prompt and what was delivered, when the view says that it is dead.

use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::membership::detector::{DetectorRules, Health};
use coordinator::membership::{Change, Membership, Own};
use coordinator::route::{Expected, Place, Routes, RoutingTable};
use serde::Serialize;
use shared::clock::{Clock, SystemClock};
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::id::{NodeId, TenantId};

use super::{Size, Speed, is_heavy, node, percentile, place, placed, ring_key, spec, tenant};
use crate::random::{Random, mix};

mod queue;
mod worker;

use queue::{Queue, What};
use worker::{Request, Worker};

/// One second in the model's time.
const S: u64 = 1_000_000;
/// Time between heartbeats; the membership ticks twice as often, loads are published every [`LOADS_EVERY`].
const BEAT: u64 = S / 10;
/// Time between tables that differ in loads only.
const LOADS_EVERY: u64 = S / 4;
/// Requests begin when the nodes have found each other.
const BEGIN: u64 = 2 * S;
/// When the node dies, and when it is back.
const DEATH: u64 = 150 * S;
const RETURN: u64 = 200 * S;
const END: u64 = 260 * S;
/// Who dies.
const VICTIM: usize = 1;
/// Phases that are told apart, by when a request was asked.
const PHASES: [(&str, u64); 6] = [
    ("caches fill", 0),
    ("before", 90 * S),
    ("10 s after a death", DEATH),
    ("without it", DEATH + 10 * S),
    ("30 s after its return", RETURN),
    ("after", RETURN + 30 * S),
];
/// Tokens of a prompt and of an answer.
const PROMPT: u32 = 96;
const ANSWER: u32 = 64;
/// Requests of a session, and the pause between two of them.
const SESSION: (u64, u64) = (3, 13);
const PAUSE: (u64, u64) = (5 * S, 25 * S);

/// How the cluster is used.
#[derive(Debug, Clone, Copy)]
pub struct Use {
    /// Requests a second, as a share of what all nodes can do with batches of 16.
    pub busy: f64,
    /// Adapters of tenants that asked within the last minute are loaded where they move to, without being asked for.
    pub warm: bool,
}

/// Requests of one phase.
#[derive(Debug, Clone, Serialize)]
pub struct Phase {
    /// Which.
    pub name: &'static str,
    /// How many.
    pub requests: usize,
    /// Share of them whose adapter was in memory.
    pub hits: f64,
    /// Time to the first token, in ms: half of them, all but one of a hundred.
    pub first_token_ms_p50: f64,
    /// The same.
    pub first_token_ms_p99: f64,
}

/// What came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Peak {
    /// Requests a second on all nodes.
    pub requests_per_s: f64,
    /// In order.
    pub phases: Vec<Phase>,
    /// Time that the busiest node computes, over the mean, before the death.
    pub busiest: f64,
    /// Streams that lived on the node that died.
    pub streams_moved: usize,
    /// Their pause, in ms: half, and the longest.
    pub pause_ms_p50: f64,
    /// The same.
    pub pause_ms_max: f64,
    /// From the death to the first table that says so, in ms.
    pub noticed_ms: f64,
    /// Requests that no node could be found for.
    pub refused: usize,
    /// Requests that had not ended half a minute after the last was asked.
    pub unfinished: usize,
    /// Tables that were published for another reason than loads.
    pub tables: usize,
}

/// Runs the peak.
pub fn peak(seed: u64, size: Size, speed: &Speed, how: Use) -> Peak {
    let mut model = Model::new(seed, size, speed.clone(), how);
    model.run();
    model.report()
}

struct Model {
    random: Random,
    size: Size,
    speed: Speed,
    how: Use,
    place: Place,
    names: Vec<NodeId>,
    tenants: Vec<TenantId>,
    asked_at: Vec<u64>,
    queue: Queue,
    workers: Vec<Worker>,
    requests: Vec<Request>,
    /// Requests of the dead node, until its death is known.
    lost: Vec<usize>,
    start: Instant,
    membership: Membership,
    routes: Routes,
    table: Arc<RoutingTable>,
    stale: bool,
    published_at: u64,
    noticed_at: Option<u64>,
    tables: usize,
    refused: usize,
    busy_before: Vec<u64>,
}

impl Model {
    fn new(seed: u64, size: Size, speed: Speed, how: Use) -> Self {
        let start = SystemClock.now();
        let own = Own { incarnation: 1, phase: NodePhase::Serving, load: NodeLoad::default() };
        let specs = (0..size.nodes).map(spec).collect();
        let rules = DetectorRules::with_interval(Duration::from_micros(BEAT));
        let membership = Membership::new(start, &node(0), own, specs, rules);
        let mut routes = Routes::new(ring_key());
        routes.expect_tenants(Expected::new(&ring_key(), &placed(size.tenants)));
        let table = Arc::new(routes.table(membership.view()));
        let slots = (size.tenants / size.nodes / 5).max(4);
        Self {
            random: Random::new(mix(seed)),
            size,
            place: place(),
            names: (0..size.nodes).map(node).collect(),
            tenants: (0..size.tenants).map(tenant).collect(),
            asked_at: vec![0; size.tenants],
            queue: Queue::default(),
            workers: (0..size.nodes).map(|_| Worker::new(slots, &speed)).collect(),
            requests: Vec::new(),
            lost: Vec::new(),
            start,
            membership,
            routes,
            table,
            stale: false,
            published_at: 0,
            noticed_at: None,
            tables: 0,
            refused: 0,
            busy_before: Vec::new(),
            speed,
            how,
        }
    }

    fn requests_per_s(&self) -> f64 {
        let token_ms = self.speed.step_ms(16, 0) / 16.0;
        let one_ms = f64::from(PROMPT) * self.speed.prompt_token_ms + f64::from(ANSWER) * token_ms;
        self.how.busy * self.size.nodes as f64 * 1e3 / one_ms
    }

    fn run(&mut self) {
        for (at, what) in [
            (0, What::Beat),
            (BEAT / 2, What::Tick),
            (BEGIN, What::Session),
            (DEATH, What::Die),
            (RETURN, What::Return),
        ] {
            self.queue.put(at, what);
        }
        while let Some((now, what)) = self.queue.next() {
            if now > END + 30 * S {
                break;
            }
            match what {
                What::Beat => self.on_beat(now),
                What::Tick => self.on_tick(now),
                What::Session => self.on_session(now),
                What::Ask { tenant, left } => self.on_ask(now, tenant, left),
                What::StepEnds { worker, life } if self.workers[worker].life == life => {
                    self.workers[worker].on_step(now, worker, &mut self.requests, &mut self.queue);
                }
                What::Loaded { worker, life, tenant } if self.workers[worker].life == life => {
                    self.workers[worker].on_loaded(now, worker, tenant, &mut self.requests, &mut self.queue);
                }
                What::StepEnds { .. } | What::Loaded { .. } => {}
                What::Die => {
                    self.busy_before = self.workers.iter().map(|worker| worker.busy).collect();
                    self.lost = self.workers[VICTIM].die();
                }
                What::Return => self.workers[VICTIM].come_back(now),
            }
        }
    }

    fn at(&self, now: u64) -> Instant {
        self.start + Duration::from_micros(now)
    }

    fn on_beat(&mut self, now: u64) {
        let at = self.at(now);
        for (i, worker) in self.workers.iter().enumerate().filter(|(_, worker)| worker.alive) {
            let load = worker.load();
            if i == 0 {
                self.membership.say(NodePhase::Serving, load);
                continue;
            }
            let beat = Heartbeat {
                incarnation: u64::from(worker.life) + 1,
                seq: now / BEAT + 1,
                uptime_ms: (now - worker.born) / 1000,
                epoch: 0,
                phase: NodePhase::Serving,
                load,
            };
            self.membership.on_heartbeat(at, &self.names[i], beat);
        }
        self.queue.put(now + BEAT, What::Beat);
    }

    /// As the coordinator's actor does.
    fn on_tick(&mut self, now: u64) {
        let change = self.membership.on_tick(self.at(now));
        self.stale |= change != Change::None;
        if change == Change::Placement || self.stale && now >= self.published_at + LOADS_EVERY {
            (self.stale, self.published_at) = (false, now);
            let before = std::mem::replace(&mut self.table, Arc::new(self.routes.table(self.membership.view())));
            if change == Change::Placement {
                self.tables += 1;
                self.on_table(now, &before);
            }
        }
        self.queue.put(now + BEAT / 2, What::Tick);
    }

    fn on_table(&mut self, now: u64, before: &RoutingTable) {
        let dead = |table: &RoutingTable| table.members()[&node(VICTIM)].health == Health::Dead;
        if self.how.warm && now > BEGIN + S {
            self.warm_moved(now, before);
        }
        if now >= DEATH && dead(&self.table) && self.noticed_at.is_none() {
            self.noticed_at = Some(now);
            for request in std::mem::take(&mut self.lost) {
                self.send(now, request);
            }
        }
    }

    /// Tenants of the last minute are loaded where their requests go from now on, the latest first.
    fn warm_moved(&mut self, now: u64, before: &RoutingTable) {
        let recent = |at: &u64| *at > 0 && now - at < 60 * S;
        let mut moved: Vec<(u64, usize, usize)> = Vec::new();
        for (i, at) in self.asked_at.iter().enumerate().filter(|(_, at)| recent(at)) {
            let to = |table: &RoutingTable| table.candidates(&self.place, &self.tenants[i]).first().map(index_of);
            if let Some(new) = to(&self.table).filter(|new| to(before) != Some(*new)) {
                moved.push((*at, i, new));
            }
        }
        moved.sort_unstable_by(|a, b| b.cmp(a));
        for (_, tenant, worker) in moved {
            self.workers[worker].warm(now, worker, tenant, &mut self.queue);
        }
    }

    fn on_session(&mut self, now: u64) {
        if now > END {
            return;
        }
        let heavy = self.random.within(0, 5) > 0;
        let tenant = loop {
            let tenant = self.random.within(0, self.size.tenants as u64) as usize;
            if is_heavy(tenant) == heavy {
                break tenant;
            }
        };
        let left = self.random.within(SESSION.0, SESSION.1);
        self.queue.put(now, What::Ask { tenant, left });
        let per_s = self.requests_per_s() / ((SESSION.0 + SESSION.1 - 1) as f64 / 2.0);
        let even = (self.random.draw() >> 11) as f64 / (1_u64 << 53) as f64;
        let wait = -(1.0 - even).ln() / per_s;
        self.queue.put(now + (wait * S as f64) as u64, What::Session);
    }

    fn on_ask(&mut self, now: u64, tenant: usize, left: u64) {
        if now > END {
            return;
        }
        if left > 1 {
            let pause = self.random.within(PAUSE.0, PAUSE.1);
            self.queue.put(now + pause, What::Ask { tenant, left: left - 1 });
        }
        self.asked_at[tenant] = now;
        self.requests.push(Request::new(tenant, now, PROMPT, ANSWER));
        self.send(now, self.requests.len() - 1);
    }

    fn send(&mut self, now: u64, request: usize) {
        let tenant = &self.tenants[self.requests[request].tenant];
        let Some(worker) = self.table.candidates(&self.place, tenant).first().map(index_of) else {
            self.refused += 1;
            return;
        };
        if !self.workers[worker].alive {
            self.lost.push(request);
            return;
        }
        self.workers[worker].take(now, worker, request, &mut self.requests, &mut self.queue);
    }

    fn report(&self) -> Peak {
        let of_phase = |i: usize| {
            let (from, to) = (PHASES[i].1, PHASES.get(i + 1).map_or(END, |(_, at)| *at));
            let asked = self.requests.iter().filter(move |request| (from..to).contains(&request.asked_at));
            let mut first: Vec<f64> =
                asked.clone().filter_map(|r| Some((r.first_at? - r.asked_at) as f64 / 1e3)).collect();
            first.sort_unstable_by(f64::total_cmp);
            let (requests, hits) = (asked.clone().count(), asked.filter(|request| request.hit).count());
            Phase {
                name: PHASES[i].0,
                requests,
                hits: hits as f64 / requests.max(1) as f64,
                first_token_ms_p50: percentile(&first, 50.0),
                first_token_ms_p99: percentile(&first, 99.0),
            }
        };
        let mut pauses: Vec<f64> =
            self.requests.iter().filter_map(|request| Some(request.pause? as f64 / 1e3)).collect();
        pauses.sort_unstable_by(f64::total_cmp);
        let mean = self.busy_before.iter().sum::<u64>() as f64 / self.busy_before.len().max(1) as f64;
        let most = self.busy_before.iter().max().map_or(0.0, |most| *most as f64);
        Peak {
            requests_per_s: self.requests_per_s(),
            phases: (1..PHASES.len()).map(of_phase).collect(),
            busiest: most / mean,
            streams_moved: pauses.len(),
            pause_ms_p50: percentile(&pauses, 50.0),
            pause_ms_max: pauses.last().copied().unwrap_or(0.0),
            noticed_ms: self.noticed_at.map_or(0.0, |at| (at - DEATH) as f64 / 1e3),
            refused: self.refused,
            unfinished: self.requests.iter().filter(|request| request.tokens_left > 0).count() - self.refused,
            tables: self.tables,
        }
    }
}

fn index_of(candidate: &coordinator::route::Candidate) -> usize {
    candidate.node.as_str()[1..].parse().expect("names of the model are n and a number")
}
