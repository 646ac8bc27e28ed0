//! One life of one simulated node: the real coordinator and forwarder, the stub engine, and the doors for nodes and
//! clients.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coordinator::actor::{Coordinator, CoordinatorOptions};
use coordinator::forward::Forwarder;
use coordinator::journal::idempotency::RequestIds;
use coordinator::journal::records::Records;
use coordinator::membership::{MemberSpec, Own};
use coordinator::registry::Registry;
use coordinator::ring::RingKey;
use shared::clock::Clock;
use shared::cluster::{NodeLoad, NodePhase};
use tokio::sync::mpsc;

use crate::door::{Door, Usage, serve_clients, write_usage};
use crate::engine::{Engine, Planted};
use crate::network::{Peers, Streams, answer, datagrams, now, receive_beats, serve};
use crate::oracle::Oracle;
use crate::plan::{Planned, base, name};
use crate::random::Random;
use crate::registry::{Minutes, Shelf, place_tenants};

/// The clock of a host: turmoil's.
#[derive(Debug)]
pub struct SimClock;

impl Clock for SimClock {
    fn now(&self) -> Instant {
        now()
    }

    fn wall(&self) -> Duration {
        turmoil::sim_elapsed().unwrap_or_default()
    }
}

/// What a running node shows to the world.
pub struct Life {
    /// Its view.
    pub coordinator: Coordinator,
    /// Its engine.
    pub engine: Engine,
    /// The records that it keeps.
    pub records: Rc<RefCell<Records>>,
    /// What it does; set from outside, as by a signal.
    pub phase: Rc<Cell<NodePhase>>,
    /// Its copy of the registry, where there is one.
    pub registry: Option<Registry>,
    /// Which life it is.
    pub incarnation: u64,
}

/// The lives of the moment, by node.
pub type Lives = Rc<RefCell<BTreeMap<usize, Life>>>;

/// One life of one node.
pub struct Node {
    /// Which node.
    pub i: usize,
    /// Of how many.
    pub n_nodes: usize,
    /// Which life.
    pub incarnation: u64,
    /// Time per token.
    pub step: Duration,
    /// Heartbeats of a thousand that do not arrive.
    pub lost_of_1000: u64,
    /// Decides which.
    pub seed: u64,
    /// A mistake built in.
    pub planted: Planted,
    /// What clients ask for.
    pub plan: Rc<BTreeMap<u128, Planned>>,
    /// Where registries are kept, and what their operators are told; without it every tenant is known.
    pub registry: Option<(Rc<Shelf>, Minutes)>,
    /// Sees everything.
    pub oracle: Oracle,
}

// === impl Node ===

impl Node {
    /// Serves until it is crashed.
    ///
    /// # Errors
    /// When a port is taken or the actor does not start.
    pub async fn live(self, lives: Lives) -> turmoil::Result {
        let (heart, socket) = datagrams().await?;
        let coordinator = Coordinator::new(self.options(), Arc::new(heart), Arc::new(SimClock));
        coordinator.spawn(None).await?;
        let engine = Engine::new(self.step, self.planted);
        let registry = self.open_registry(&coordinator).await?;
        let (records, phase) = (Rc::<RefCell<Records>>::default(), Rc::new(Cell::new(NodePhase::Serving)));
        let life = Life {
            coordinator: coordinator.clone(),
            engine: engine.clone(),
            records: records.clone(),
            phase: phase.clone(),
            registry: registry.clone(),
            incarnation: self.incarnation,
        };
        lives.borrow_mut().insert(self.i, life);
        let random = Random::new(self.seed ^ self.incarnation << 8 ^ self.i as u64);
        tokio::task::spawn_local(receive_beats(socket, coordinator.clone(), self.lost_of_1000, random));
        let (local, mut starts) = mpsc::channel(64);
        let streams = Streams { me: name(self.i), local, oracle: self.oracle.clone(), planted: self.planted };
        let forwarder = Rc::new(Forwarder::new(Arc::new(streams), coordinator.tables(), Arc::new(SimClock)));
        let own = (coordinator.clone(), engine.clone());
        tokio::task::spawn_local(async move {
            while let Some((start, answers)) = starts.recv().await {
                let own = own.clone();
                tokio::task::spawn_local(async move { answer(start, &own.0, &own.1, answers).await });
            }
        });
        let (usage, written) = mpsc::unbounded_channel();
        tokio::task::spawn_local(write_usage(written, self.planted, self.oracle.clone()));
        let keeper = Keeper { records: records.clone(), usage: usage.clone(), phase: phase.clone() };
        tokio::task::spawn_local(keeper.report(coordinator.clone(), engine.clone()));
        let door = Door {
            coordinator: coordinator.clone(),
            forwarder,
            records: records.clone(),
            phase,
            plan: self.plan.clone(),
            ids: RequestIds::derive(b"simulation"),
            registry: registry.clone(),
            usage,
            planted: self.planted,
            oracle: self.oracle.clone(),
        };
        tokio::task::spawn_local(serve_clients(Rc::new(door)));
        serve(Peers { coordinator, engine, records, registry, planted: self.planted }).await?;
        Ok(())
    }

    async fn open_registry(&self, coordinator: &Coordinator) -> turmoil::Result<Option<Registry>> {
        let Some((shelf, minutes)) = &self.registry else { return Ok(None) };
        let registry = shelf.open(self.i, self.n_nodes, self.seed, coordinator.clone()).await?;
        tokio::task::spawn_local(place_tenants(registry.clone(), coordinator.clone()));
        tokio::task::spawn_local(minutes.clone().operate(registry.clone(), self.i, self.incarnation));
        Ok(Some(registry))
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

/// What a node does now and then: it says how busy it is, and bills for nodes that died.
struct Keeper {
    records: Rc<RefCell<Records>>,
    usage: mpsc::UnboundedSender<Usage>,
    phase: Rc<Cell<NodePhase>>,
}

// === impl Keeper ===

impl Keeper {
    async fn report(self, coordinator: Coordinator, engine: Engine) {
        loop {
            coordinator.say(self.phase.get(), engine.load());
            let due = match self.phase.get() {
                NodePhase::Leaving => self.records.borrow_mut().before_leaving(),
                _ => self.records.borrow_mut().orphans(&coordinator.tables().borrow()),
            };
            // The other end is held by a task of this node.
            due.iter().for_each(|record| _ = self.usage.send(Usage::of(record)));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}
