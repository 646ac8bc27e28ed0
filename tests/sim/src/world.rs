//! The simulated cluster: builds nodes, gives them requests, breaks one thing after the other, all from a seed.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::actor::{Coordinator, CoordinatorOptions};
use coordinator::forward::{Forwarder, Journey};
use coordinator::membership::{MemberSpec, Own};
use coordinator::ring::RingKey;
use coordinator::route::Place;
use shared::clock::Clock;
use shared::cluster::{NodeLoad, NodePhase};
use shared::id::{BaseName, NodeId, RequestId, Route};
use shared::request::{Emitted, Envelope, Generation, Sampling};
use shared::tenant::Tier;
use shared::token::TokenEvent;
use tokio::sync::mpsc;

use crate::engine::{Engine, Planted, QUEUE_MAX, token};
use crate::network::{Streams, answer, datagrams, receive_beats, serve};
use crate::oracle::{Oracle, Outcome, Report};
use crate::random::{Random, mix};

/// Requests begin after this: the nodes have found each other.
const WARM_UP_MS: u64 = 800;

/// Time a request may take.
const DEADLINE: Duration = Duration::from_secs(20);

/// What may happen to the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// One thing at a time, with a pause for the cluster to notice that it is over: nothing may fail.
    OneAtATime,
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

/// Something that happens to nodes, at a time in ms.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Act {
    Crash(usize),
    Bounce(usize),
    /// Nothing of or to the node arrives, until released: as if it were stopped.
    Hold(usize),
    Release(usize),
    /// Nothing passes between the two; what was sent arrives afterwards, as QUIC's retransmissions would. turmoil's own
    /// partitions lose bytes of a TCP stream for ever.
    Part(usize, usize),
    Join(usize, usize),
}

/// A request in the plan of its entry node.
#[derive(Debug, Clone)]
struct Planned {
    at_ms: u64,
    id: RequestId,
    tenant: u64,
    prompt: Arc<[u32]>,
    n: u32,
    max_tokens: u32,
}

/// The clock of a host: turmoil's.
#[derive(Debug)]
struct SimClock;

impl Clock for SimClock {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn wall(&self) -> Duration {
        turmoil::sim_elapsed().unwrap_or_default()
    }
}

/// What a running node shows to the oracle.
struct Life {
    coordinator: Coordinator,
    engine: Engine,
    incarnation: u64,
}

fn name(i: usize) -> NodeId {
    format!("n{i}").parse().expect("a valid name")
}

fn base() -> BaseName {
    "stub".parse().expect("a valid base")
}

/// Simulates until every request has ended.
pub fn run(scenario: Scenario) -> Report {
    let mut random = Random::new(mix(scenario.seed));
    let n_nodes = usize::try_from(random.within(3, 6)).expect("small");
    let step = Duration::from_millis(random.within(5, 25));
    let plans = requests(&mut random, n_nodes);
    let acts = troubles(&mut random, n_nodes, scenario.trouble);
    let all: Vec<(usize, RequestId)> =
        plans.iter().enumerate().flat_map(|(node, plan)| plan.iter().map(move |planned| (node, planned.id))).collect();
    let end_ms = 12_000 + u64::try_from(DEADLINE.as_millis()).unwrap_or(0) + 5_000;

    let mut builder = turmoil::Builder::new();
    let latency = random.within(2, 12);
    builder
        .rng_seed(scenario.seed)
        .simulation_duration(Duration::from_millis(end_ms + 1000))
        .tick_duration(Duration::from_millis(5))
        .tcp_capacity(4096)
        .udp_capacity(4096)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(latency));
    let mut sim = builder.build();
    let oracle = Oracle::default();
    let lives = Rc::new(RefCell::new(BTreeMap::<usize, Life>::new()));
    for (i, plan) in plans.into_iter().enumerate() {
        let (oracle, lives, planted) = (oracle.clone(), lives.clone(), scenario.planted);
        let incarnation = Rc::new(Cell::new(0));
        sim.host(name(i).as_str(), move || {
            incarnation.set(incarnation.get() + 1);
            let node = Node { i, n_nodes, incarnation: incarnation.get(), step, planted, oracle: oracle.clone() };
            node.live(plan.clone(), lives.clone())
        });
    }
    let mut acts = acts.into_iter().peekable();
    let mut down = vec![false; n_nodes];
    let mut connected = Vec::<(u64, usize)>::new();
    loop {
        let now_ms = u64::try_from(sim.elapsed().as_millis()).unwrap_or(u64::MAX);
        while let Some((_, act)) = acts.next_if(|(at, _)| *at <= now_ms) {
            perform(&mut sim, &act, n_nodes, &mut down);
            match act {
                Act::Hold(node) => {
                    oracle.on_cut_off(name(node), true);
                    connected.retain(|(_, other)| *other != node);
                }
                // What was held is heard by then.
                Act::Release(node) => connected.push((now_ms + 500, node)),
                _ => {}
            }
            if let Act::Crash(node) = act {
                lives.borrow_mut().remove(&node);
                let lost = all.iter().filter(|(entry, id)| *entry == node && !oracle.has_ended(id));
                // Those that had not begun begin after the restart.
                lost.filter(|(_, id)| oracle.has_begun(id))
                    .for_each(|(_, id)| oracle.on_outcome(*id, Outcome::EntryDied));
            }
        }
        connected.retain(|(at, node)| {
            let over = *at <= now_ms;
            if over {
                oracle.on_cut_off(name(*node), false);
            }
            !over
        });
        sim.step().expect("no host ends or panics");
        check(&lives.borrow(), &oracle);
        let ended = acts.peek().is_none() && all.iter().all(|(_, id)| oracle.has_ended(id));
        if ended || now_ms > end_ms {
            break;
        }
    }
    for (_, id) in all.iter().filter(|(_, id)| !oracle.has_ended(id)) {
        oracle.violation(format!("{id} hangs"));
    }
    // Cancelled runs end within a step or two, wherever they are.
    for _ in 0..200 {
        sim.step().expect("no host ends or panics");
    }
    for life in lives.borrow().values().filter(|life| life.engine.load().running + life.engine.load().waiting > 0) {
        oracle.violation(format!("I5: work is left on {:?}: {:?}", life.coordinator, life.engine.load()));
    }
    oracle.report()
}

fn check(lives: &BTreeMap<usize, Life>, oracle: &Oracle) {
    for (node, life) in lives {
        oracle.on_epoch(&name(*node), life.incarnation, life.coordinator.tables().borrow().epoch());
        if life.engine.load().waiting > QUEUE_MAX {
            oracle.violation(format!("I10: {} wait on node {node}", life.engine.load().waiting));
        }
        life.engine.violations().into_iter().for_each(|what| oracle.violation(what));
    }
}

fn perform(sim: &mut turmoil::Sim<'_>, act: &Act, n_nodes: usize, down: &mut [bool]) {
    let others = |node: usize| (0..n_nodes).filter(move |other| *other != node);
    match *act {
        Act::Crash(node) if !down[node] => {
            down[node] = true;
            sim.crash(name(node).as_str());
        }
        Act::Bounce(node) if down[node] => {
            down[node] = false;
            sim.bounce(name(node).as_str());
        }
        Act::Crash(_) | Act::Bounce(_) => {}
        Act::Hold(node) => others(node).for_each(|other| sim.hold(name(node).as_str(), name(other).as_str())),
        Act::Release(node) => others(node).for_each(|other| sim.release(name(node).as_str(), name(other).as_str())),
        Act::Part(a, b) => sim.hold(name(a).as_str(), name(b).as_str()),
        Act::Join(a, b) => sim.release(name(a).as_str(), name(b).as_str()),
    }
}

/// About thirty requests over seven seconds, by entry node.
fn requests(random: &mut Random, n_nodes: usize) -> Vec<Vec<Planned>> {
    let mut plans = vec![Vec::new(); n_nodes];
    for i in 0..random.within(20, 40) {
        let planned = Planned {
            at_ms: WARM_UP_MS + random.within(0, 7000),
            id: RequestId(u128::from(i) + 1),
            tenant: random.within(0, 12),
            prompt: (0..random.within(1, 6)).map(|_| (random.draw() % 49_152) as u32).collect(),
            n: 1 + u32::from(random.within(0, 4) == 0),
            max_tokens: random.within(10, 60) as u32,
        };
        plans[random.within(0, n_nodes as u64) as usize].push(planned);
    }
    plans.iter_mut().for_each(|plan: &mut Vec<Planned>| plan.sort_by_key(|planned| planned.at_ms));
    plans
}

fn troubles(random: &mut Random, n_nodes: usize, trouble: Trouble) -> Vec<(u64, Act)> {
    let (mut acts, mut at) = (Vec::new(), WARM_UP_MS + 200);
    while at < 9000 {
        let node = random.within(0, n_nodes as u64) as usize;
        let other = (node + 1 + random.within(0, n_nodes as u64 - 1) as usize) % n_nodes;
        let lasts = random.within(100, 3000);
        let (begin, end) = match random.within(0, 5) {
            0 | 1 => (Act::Crash(node), Act::Bounce(node)),
            2 | 3 => (Act::Hold(node), Act::Release(node)),
            _ => (Act::Part(node, other), Act::Join(node, other)),
        };
        acts.extend([(at, begin), (at + lasts, end)]);
        at += match trouble {
            Trouble::OneAtATime => lasts + random.within(1200, 2500),
            Trouble::Overlapping => random.within(100, 1500),
        };
    }
    acts.sort_by_key(|(at, _)| *at);
    acts
}

/// One life of one node.
struct Node {
    i: usize,
    n_nodes: usize,
    incarnation: u64,
    step: Duration,
    planted: Planted,
    oracle: Oracle,
}

// === impl Node ===

impl Node {
    async fn live(self, plan: Vec<Planned>, lives: Rc<RefCell<BTreeMap<usize, Life>>>) -> turmoil::Result {
        let (heart, socket) = datagrams().await?;
        let coordinator = Coordinator::new(self.options(), Arc::new(heart), Arc::new(SimClock));
        coordinator.spawn(None).await?;
        let engine = Engine::new(self.step, self.planted);
        let life = Life { coordinator: coordinator.clone(), engine: engine.clone(), incarnation: self.incarnation };
        lives.borrow_mut().insert(self.i, life);
        tokio::task::spawn_local(receive_beats(socket, coordinator.clone()));
        tokio::task::spawn_local(report_load(coordinator.clone(), engine.clone()));
        let (local, mut starts) = mpsc::channel(64);
        let streams = Streams { me: name(self.i), local, oracle: self.oracle.clone() };
        let forwarder = Rc::new(Forwarder::new(Arc::new(streams), coordinator.tables(), Arc::new(SimClock)));
        for planned in plan {
            tokio::task::spawn_local(client(planned, name(self.i), forwarder.clone(), self.oracle.clone()));
        }
        let own = (coordinator.clone(), engine.clone());
        tokio::task::spawn_local(async move {
            while let Some((start, answers)) = starts.recv().await {
                let own = own.clone();
                tokio::task::spawn_local(async move { answer(start, &own.0, &own.1, answers).await });
            }
        });
        serve(coordinator, engine).await?;
        Ok(())
    }

    fn options(&self) -> CoordinatorOptions {
        let spec =
            |i| MemberSpec { id: name(i), capacity: 1, pool: "default".into(), region: None, bases: vec![base()] };
        CoordinatorOptions {
            me: name(self.i),
            own: Own { incarnation: self.incarnation, phase: NodePhase::Serving, load: NodeLoad::default() },
            nodes: (0..self.n_nodes).map(spec).collect(),
            interval: Duration::from_millis(100),
            ring_key: RingKey::derive(b"simulation"),
        }
    }
}

async fn report_load(coordinator: Coordinator, engine: Engine) {
    loop {
        coordinator.say(NodePhase::Serving, engine.load());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// A client at its entry node: waits for its time, asks, and checks every event.
async fn client(planned: Planned, entry: NodeId, forwarder: Rc<Forwarder<Streams>>, oracle: Oracle) {
    let now_ms = turmoil::sim_elapsed().map_or(0, |elapsed| u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX));
    if oracle.has_begun(&planned.id) {
        return;
    }
    tokio::time::sleep(Duration::from_millis(planned.at_ms.max(now_ms + WARM_UP_MS).saturating_sub(now_ms))).await;
    oracle.on_begin(planned.id);
    let (events, mut received) = mpsc::channel(4);
    let base = base();
    let journey =
        Journey { envelope: envelope(&planned), place: Place::anywhere(base), emitted: Emitted::default(), attempt: 0 };
    tokio::task::spawn_local(async move { forwarder.forward(journey, events).await });
    let mut tokens = vec![0_u32; planned.n as usize];
    let mut finished = vec![false; planned.n as usize];
    let mut last = tokio::time::Instant::now();
    while let Some(event) = received.recv().await {
        match event {
            TokenEvent::Started { .. } | TokenEvent::Prompt { .. } => {}
            TokenEvent::Token { choice, seq, id, .. } => {
                let got = &mut tokens[choice as usize];
                if seq != *got || finished[choice as usize] {
                    oracle.violation(format!("I2: {} got token {seq} of choice {choice} for {got}", planned.id));
                }
                if id != token(&planned.prompt, choice, *got) {
                    oracle.violation(format!("I1: {} got a wrong token at {got} of choice {choice}", planned.id));
                }
                // A node that reaches no other cannot bring tokens from them.
                if *got > 0 && !oracle.is_cut_off(&entry) {
                    oracle.on_gap(last.elapsed());
                }
                (*got, last) = (*got + 1, tokio::time::Instant::now());
            }
            TokenEvent::Finished { choice, .. } => {
                if std::mem::replace(&mut finished[choice as usize], true) {
                    oracle.violation(format!("I2: {} got a second end of choice {choice}", planned.id));
                }
            }
            TokenEvent::Failed(_) if oracle.is_cut_off(&entry) => {
                return oracle.on_outcome(planned.id, Outcome::EntryCutOff);
            }
            TokenEvent::Failed(error) => return oracle.on_outcome(planned.id, Outcome::Refused(error.code.to_owned())),
        }
    }
    let complete = finished.iter().all(|finished| *finished) && tokens.iter().all(|got| *got == planned.max_tokens);
    if !complete {
        oracle.violation(format!("{} ended with {tokens:?} of {} tokens", planned.id, planned.max_tokens));
    }
    oracle.on_outcome(planned.id, Outcome::Complete);
}

fn envelope(planned: &Planned) -> Envelope {
    let now = SimClock.now();
    let generation = Generation {
        prompt: planned.prompt.clone(),
        n: planned.n,
        max_tokens: planned.max_tokens,
        min_tokens: 0,
        ignore_eos: true,
        stop_token_ids: Vec::new(),
        stop: Vec::new(),
        sampling: Sampling::default(),
        logprobs: None,
        prompt_logprobs: None,
        grammar: None,
    };
    Envelope {
        id: planned.id,
        route: Route { tenant: format!("tenant-{}", planned.tenant).parse().expect("a valid name"), task: None },
        tier: Tier::Shared,
        weight: 1,
        concurrency: 8,
        queue_depth: QUEUE_MAX,
        base: base(),
        adapter: None,
        fell_back: false,
        cache_secret: [0; 32],
        generation: Arc::new(generation),
        contract_epoch: 1,
        admitted_at: now,
        deadline: now + DEADLINE,
    }
}
