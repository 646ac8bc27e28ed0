//! The simulated cluster: builds nodes and clients, breaks one thing after the other, all from a seed.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use coordinator::registry::Registry;
use coordinator::registry::status::Role;
use shared::cluster::NodePhase;

use crate::client::clients;
use crate::engine::{Planted, QUEUE_MAX};
use crate::node::{Lives, Node};
use crate::oracle::{Oracle, Report};
use crate::plan::{Act, DEADLINE, Planned, name, registry_troubles, requests, steady_requests, troubles, weather};
use crate::random::{Random, mix};
use crate::registry::{Minutes, Shelf, VOTERS};

/// Time of the network and of nodes passes in such steps.
const TICK: Duration = Duration::from_millis(5);

/// Longest time of a message on a slow link.
const SLOW: Duration = Duration::from_millis(200);

/// The host of all clients.
const CLIENTS: &str = "clients";

/// What may happen to the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// One thing at a time, with a pause for the cluster to notice that it is over: nothing may fail.
    OneAtATime,
    /// Every node is drained and restarted, one after the other: nothing may fail.
    Rolling,
    /// Things overlap: requests may be refused, but never wrong, doubled or hanging.
    Overlapping,
}

/// What to simulate.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Decides everything else.
    pub seed: u64,
    /// How hard it is.
    pub trouble: Trouble,
    /// A mistake built in.
    pub planted: Planted,
}

/// Simulates until every request has ended.
pub fn run(scenario: Scenario) -> Report {
    let Scenario { seed, trouble, planted } = scenario;
    let mut random = Random::new(mix(seed));
    let n_nodes = usize::try_from(random.within(3, 6)).expect("small");
    let step = Duration::from_millis(random.within(5, 25));
    // A quarter of the clusters lose one heartbeat of twenty.
    let lost_of_1000 = if random.within(0, 4) == 0 { 50 } else { 0 };
    let requests = requests(&mut random, n_nodes);
    let mut acts = troubles(&mut random, n_nodes, trouble);
    let latency = Duration::from_millis(random.within(2, 12));
    // A third of the clusters lose packets on every link.
    let mut dice = Random::new(mix(!seed));
    let mut kept_within = Duration::from_millis(300);
    if dice.within(0, 3) == 0 {
        kept_within = Duration::from_secs(1);
        let until_ms = acts.last().map_or(0, |(at, _)| *at);
        acts.extend(weather(&mut dice, n_nodes, until_ms));
        acts.sort_by_key(|(at, _)| *at);
    }
    let tick = TICK;
    let setting =
        Setting { seed, n_nodes, step, lost_of_1000, latency, tick, kept_within, planted, requests, registry: None };
    setting.run(acts)
}

/// Simulates twenty minutes in which first the leader of the registry is away for ten, then a majority of those that
/// vote on it, while clients and operators go on asking.
///
/// # Panics
/// When there is no room for temporary files.
pub fn run_without_registry(seed: u64) -> (Report, Minutes) {
    let mut random = Random::new(mix(seed));
    let (n_nodes, minutes) = (5, Minutes::default());
    let shelf = Rc::new(Shelf::create().expect("there is room for temporary files"));
    let setting = Setting {
        seed,
        n_nodes,
        step: Duration::from_millis(20),
        lost_of_1000: 0,
        latency: Duration::from_millis(5),
        tick: 2 * TICK,
        kept_within: Duration::from_millis(300),
        planted: Planted::Nothing,
        requests: steady_requests(&mut random, n_nodes),
        registry: Some((shelf, minutes.clone())),
    };
    (setting.run(registry_troubles()), minutes)
}

/// A cluster before anything happens to it.
struct Setting {
    seed: u64,
    n_nodes: usize,
    step: Duration,
    lost_of_1000: u64,
    latency: Duration,
    tick: Duration,
    /// A node that was heard for so long after it accepted a request has its record kept elsewhere.
    kept_within: Duration,
    planted: Planted,
    requests: Vec<Planned>,
    registry: Option<(Rc<Shelf>, Minutes)>,
}

// === impl Setting ===

impl Setting {
    fn run(self, acts: Vec<(u64, Act)>) -> Report {
        let last_ms = acts.last().map_or(0, |(at, _)| *at).max(9000);
        let last_ms = self.requests.iter().map(|planned| planned.at_ms).fold(last_ms, u64::max);
        let end_ms = last_ms + u64::try_from(DEADLINE.as_millis()).unwrap_or(0) + 10_000;
        let mut builder = turmoil::Builder::new();
        builder
            .rng_seed(self.seed)
            .simulation_duration(Duration::from_millis(end_ms + 6000))
            .tick_duration(self.tick)
            .tcp_capacity(4096)
            .udp_capacity(4096)
            .min_message_latency(Duration::from_millis(1))
            .max_message_latency(self.latency);
        let mut world = World {
            sim: builder.build(),
            oracle: Oracle::default(),
            lives: Lives::default(),
            n_nodes: self.n_nodes,
            down: vec![false; self.n_nodes],
            connected: Vec::new(),
            held: BTreeMap::new(),
            latency: self.latency,
            registry: self.registry.clone(),
        };
        (0..self.n_nodes).for_each(|i| self.start(i, &mut world));
        let Self { n_nodes, kept_within, requests, .. } = self;
        let (asked, oracle) = (requests.clone(), world.oracle.clone());
        world.sim.host(CLIENTS, move || clients(asked.clone(), n_nodes, kept_within, oracle.clone()));
        world.pass(acts, &requests, end_ms);
        world.close(&requests)
    }

    fn start(&self, i: usize, world: &mut World<'_>) {
        let &Self { n_nodes, step, lost_of_1000, seed, planted, .. } = self;
        let (oracle, lives, registry) = (world.oracle.clone(), world.lives.clone(), self.registry.clone());
        let plan: Rc<BTreeMap<u128, Planned>> =
            Rc::new(self.requests.iter().map(|planned| (planned.key, planned.clone())).collect());
        let incarnation = Cell::new(0);
        world.sim.host(name(i).as_str(), move || {
            incarnation.set(incarnation.get() + 1);
            let (incarnation, plan, oracle, registry) =
                (incarnation.get(), plan.clone(), oracle.clone(), registry.clone());
            Node { i, n_nodes, incarnation, step, lost_of_1000, seed, planted, plan, registry, oracle }
                .live(lives.clone())
        });
    }
}

struct World<'a> {
    sim: turmoil::Sim<'a>,
    oracle: Oracle,
    lives: Lives,
    n_nodes: usize,
    down: Vec<bool>,
    /// Nodes that count as reached again, and when.
    connected: Vec<(u64, usize)>,
    /// By how many troubles a link is held.
    held: BTreeMap<(String, String), u32>,
    /// Longest time of a message where nothing is slow.
    latency: Duration,
    registry: Option<(Rc<Shelf>, Minutes)>,
}

// === impl World ===

impl World<'_> {
    /// Lets time pass until everything has happened and every client has its answer.
    fn pass(&mut self, acts: Vec<(u64, Act)>, requests: &[Planned], end_ms: u64) {
        let mut acts = acts.into_iter().peekable();
        loop {
            let now_ms = u64::try_from(self.sim.elapsed().as_millis()).unwrap_or(u64::MAX);
            while let Some((_, act)) = acts.next_if(|(at, _)| *at <= now_ms) {
                self.perform(now_ms, act);
            }
            let over = |(at, _): &(u64, usize)| *at <= now_ms;
            for (_, node) in self.connected.extract_if(.., |entry| over(entry)) {
                self.oracle.on_cut_off(name(node), false);
            }
            self.step();
            let ended = acts.peek().is_none() && requests.iter().all(|planned| self.oracle.has_ended(planned.key));
            if ended || now_ms > end_ms {
                return;
            }
        }
    }

    fn step(&mut self) {
        self.oracle.on_step(self.sim.elapsed());
        self.sim.step().expect("no host ends or panics");
        for (node, life) in self.lives.borrow().iter() {
            self.oracle.on_epoch(&name(*node), life.incarnation, life.coordinator.tables().borrow().epoch());
            if life.engine.load().waiting > QUEUE_MAX {
                self.oracle.violation(format!("I10: {} wait on node {node}", life.engine.load().waiting));
            }
            life.engine.violations().into_iter().for_each(|what| self.oracle.violation(what));
        }
    }

    /// What must hold when all is over.
    fn close(mut self, requests: &[Planned]) -> Report {
        for planned in requests.iter().filter(|planned| !self.oracle.has_ended(planned.key)) {
            self.oracle.violation(format!("{} hangs", planned.key));
        }
        // Cancelled runs end within a step or two, wherever they are, and last words are written.
        self.registry.iter().for_each(|(_, minutes)| minutes.close());
        for _ in 0..400 {
            self.step();
        }
        for life in self.lives.borrow().values() {
            let load = life.engine.load();
            if load.running + load.waiting > 0 {
                self.oracle.violation(format!("I5: work is left on {:?}: {load:?}", life.coordinator));
            }
        }
        self.oracle.check_billing();
        if let Some((_, minutes)) = &self.registry {
            let registries: Vec<Registry> =
                self.lives.borrow().values().filter_map(|life| life.registry.clone()).collect();
            minutes.violations(&registries).into_iter().for_each(|what| self.oracle.violation(what));
        }
        self.oracle.report()
    }

    fn perform(&mut self, now_ms: u64, act: Act) {
        match act {
            Act::Crash(node) if !self.down[node] => {
                self.down[node] = true;
                self.oracle.on_death(node);
                let (lives, sim, host) = (self.lives.clone(), &mut self.sim, name(node));
                let mut end = move || {
                    // What it kept dies with it.
                    lives.borrow_mut().remove(&node);
                    sim.crash(host.as_str());
                };
                match &self.registry {
                    Some((shelf, _)) => shelf.kill(node, end),
                    None => end(),
                }
            }
            Act::Bounce(node) if self.down[node] => {
                self.down[node] = false;
                self.sim.bounce(name(node).as_str());
            }
            Act::Crash(_) | Act::Bounce(_) => {}
            Act::Drain(node) => self.say(node, NodePhase::Draining),
            Act::Leave(node) => self.say(node, NodePhase::Leaving),
            Act::Hold(node) => {
                self.each_other(node, Self::hold);
                self.hold(&self.host(node), CLIENTS);
                self.cut_off(node);
            }
            Act::Release(node) => {
                self.each_other(node, Self::release);
                self.release(&self.host(node), CLIENTS);
                self.connected.push((now_ms + 500, node));
            }
            Act::Cut(node) => {
                self.each_other(node, Self::hold);
                self.cut_off(node);
            }
            Act::Mend(node) => {
                self.each_other(node, Self::release);
                // What was held is heard by then.
                self.connected.push((now_ms + 500, node));
            }
            Act::Part(a, b) => self.hold(&self.host(a), &self.host(b)),
            Act::Join(a, b) => self.release(&self.host(a), &self.host(b)),
            Act::Slow(a, b) => self.sim.set_link_max_message_latency(self.host(a), self.host(b), SLOW),
            Act::Swift(a, b) => self.sim.set_link_max_message_latency(self.host(a), self.host(b), self.latency),
            Act::KillLeader(n_others) => {
                let leader = self.leader();
                let others = (0..VOTERS).filter(|voter| Some(*voter) != leader).take(n_others);
                for node in leader.into_iter().chain(others).collect::<Vec<_>>() {
                    self.perform(now_ms, Act::Crash(node));
                }
            }
            Act::BounceAll => (0..self.n_nodes).for_each(|node| self.perform(now_ms, Act::Bounce(node))),
        }
    }

    /// Who leads the registry.
    fn leader(&self) -> Option<usize> {
        let lives = self.lives.borrow();
        let mut leaders = lives.iter().filter(|(_, life)| {
            let role = life.registry.as_ref().map(|registry| registry.status().borrow().role);
            role == Some(Role::Leader)
        });
        leaders.next().map(|(node, _)| *node)
    }

    fn host(&self, i: usize) -> String {
        if i == self.n_nodes { CLIENTS.to_owned() } else { name(i).to_string() }
    }

    /// Nothing passes between two hosts until each that held them has let go.
    fn hold(&mut self, a: &str, b: &str) {
        *self.held.entry(pair(a, b)).or_default() += 1;
        self.sim.hold(a, b);
    }

    fn release(&mut self, a: &str, b: &str) {
        let Some(n) = self.held.get_mut(&pair(a, b)).filter(|n| **n > 0) else { return };
        *n -= 1;
        if *n == 0 {
            self.sim.release(a, b);
        }
    }

    fn each_other(&mut self, node: usize, act: impl Fn(&mut Self, &str, &str)) {
        for other in (0..self.n_nodes).filter(|other| *other != node) {
            act(self, name(node).as_str(), name(other).as_str());
        }
    }

    fn cut_off(&mut self, node: usize) {
        self.oracle.on_cut_off(name(node), true);
        self.connected.retain(|(_, other)| *other != node);
    }

    fn say(&self, node: usize, phase: NodePhase) {
        if let Some(life) = self.lives.borrow().get(&node) {
            life.phase.set(phase);
        }
    }
}

fn pair(a: &str, b: &str) -> (String, String) {
    (a.min(b).to_owned(), a.max(b).to_owned())
}
