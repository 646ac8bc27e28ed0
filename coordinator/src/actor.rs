//! `CoordinatorActor`: the heartbeat of this node's view of the cluster.
//!
//! Supervised by the node; sent to by its own timer only. It ends when stopped; a crash loses nothing, since the
//! membership lives in the [`Coordinator`] handle behind one short lock, and a new actor goes on with it. What peers
//! say is taken in under that lock by whoever received it, so that no flood of heartbeats can fill a mailbox.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ractor::{Actor, ActorProcessingErr, ActorRef, SpawnErr};
use shared::clock::Clock;
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::id::NodeId;
use tokio::sync::watch;

use crate::membership::detector::DetectorRules;
use crate::membership::{Change, MemberSpec, Membership, Own};
use crate::ring::RingKey;
use crate::route::{PlacedTenant, Routes, RoutingTable};

/// Ticks in a heartbeat: silence is judged this much finer than it is broken.
const TICKS_PER_BEAT: u32 = 2;

/// Ticks between two tables that differ only in loads: every request in flight looks at each new table.
const TICKS_PER_LOAD: u32 = 5;

/// How heartbeats leave the node.
pub trait Heart: Send + Sync + 'static {
    /// Sends one to a peer. Never waits: one that cannot be sent now is as good as lost.
    fn beat(&self, to: &NodeId, beat: Heartbeat);
}

/// What a coordinator starts with.
#[derive(Debug)]
pub struct CoordinatorOptions {
    /// This node.
    pub me: NodeId,
    /// In its own words.
    pub own: Own,
    /// Every node of the cluster, this one too.
    pub nodes: Vec<MemberSpec>,
    /// Time between heartbeats.
    pub interval: Duration,
    /// The cluster's key for placing tenants.
    pub ring_key: RingKey,
}

/// This node's view of the cluster; clones are the same.
#[derive(Clone)]
pub struct Coordinator {
    inner: Arc<Inner>,
}

struct Inner {
    clock: Arc<dyn Clock>,
    heart: Arc<dyn Heart>,
    interval: Duration,
    core: Mutex<Core>,
    tables: watch::Sender<Arc<RoutingTable>>,
}

struct Core {
    membership: Membership,
    routes: Routes,
    ticks: u32,
    published: u32,
    /// Loads or tenants differ from what is published.
    stale: bool,
}

// === impl Coordinator ===

impl Coordinator {
    /// A coordinator that has heard nobody yet; [`Self::spawn`] sets its heart beating.
    pub fn new(options: CoordinatorOptions, heart: Arc<dyn Heart>, clock: Arc<dyn Clock>) -> Self {
        let CoordinatorOptions { me, own, nodes, interval, ring_key } = options;
        let membership = Membership::new(clock.now(), &me, own, nodes, DetectorRules::with_interval(interval));
        let mut routes = Routes::new(ring_key);
        let tables = watch::Sender::new(Arc::new(routes.table(membership.view())));
        let core = Mutex::new(Core { membership, routes, ticks: 0, published: 0, stale: false });
        Self { inner: Arc::new(Inner { clock, heart, interval, core, tables }) }
    }

    /// Starts the actor, under a supervisor if there is one. At most one runs at a time.
    ///
    /// # Errors
    /// ractor's, when the actor could not start.
    pub async fn spawn(
        &self,
        supervisor: Option<ractor::ActorCell>,
    ) -> Result<ActorRef<CoordinatorMsg>, Box<SpawnErr>> {
        let spawned = match supervisor {
            Some(supervisor) => Actor::spawn_linked(None, CoordinatorActor, self.clone(), supervisor).await,
            None => Actor::spawn(None, CoordinatorActor, self.clone()).await,
        };
        spawned.map(|(actor, _)| actor).map_err(Box::new)
    }

    /// The routing table, now and as it changes.
    pub fn tables(&self) -> watch::Receiver<Arc<RoutingTable>> {
        self.inner.tables.subscribe()
    }

    /// A peer's heartbeat came.
    pub fn heard(&self, from: &NodeId, beat: Heartbeat) {
        let now = self.inner.clock.now();
        self.core().membership.on_heartbeat(now, from, beat);
    }

    /// The connection to a peer broke.
    pub fn lost(&self, peer: &NodeId) {
        self.core().membership.on_connection_lost(peer);
    }

    /// What this node does now; others hear of it with the next heartbeat, which a change of phase does not wait for.
    pub fn say(&self, phase: NodePhase, load: NodeLoad) {
        let now = self.inner.clock.now();
        let mut core = self.core();
        if core.membership.say(phase, load) {
            self.publish(&mut core, now);
            self.beat(&mut core, now);
        }
    }

    /// Whom to place and what to expect of them, for bounding loads; given again when the registry changes.
    pub fn expect_tenants(&self, tenants: Arc<[PlacedTenant]>) {
        let mut core = self.core();
        core.routes.expect_tenants(tenants);
        core.stale = true;
    }

    fn tick(&self) {
        let now = self.inner.clock.now();
        let mut core = self.core();
        core.ticks = core.ticks.wrapping_add(1);
        self.publish(&mut core, now);
        if core.ticks.is_multiple_of(TICKS_PER_BEAT) {
            self.beat(&mut core, now);
        }
    }

    fn publish(&self, core: &mut Core, now: Instant) {
        let change = core.membership.on_tick(now);
        core.stale |= change != Change::None;
        let waited = core.ticks.wrapping_sub(core.published) >= TICKS_PER_LOAD;
        if change == Change::Placement || core.stale && waited {
            core.stale = false;
            core.published = core.ticks;
            let table = core.routes.table(core.membership.view());
            self.inner.tables.send_replace(Arc::new(table));
        }
    }

    fn beat(&self, core: &mut Core, now: Instant) {
        let beat = core.membership.heartbeat(now);
        core.membership.peers().for_each(|peer| self.inner.heart.beat(peer, beat));
    }

    fn core(&self) -> MutexGuard<'_, Core> {
        // A panic under the lock leaves a view that the next tick makes anew.
        self.inner.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Coordinator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let table = self.inner.tables.borrow();
        write!(f, "Coordinator({} at epoch {})", table.me(), table.epoch())
    }
}

/// What the actor is told.
#[derive(Debug)]
pub enum CoordinatorMsg {
    /// Time passed; sent by the actor's own timer.
    Tick,
}

/// Stateless: everything is in the handle.
#[derive(Debug)]
pub struct CoordinatorActor;

impl Actor for CoordinatorActor {
    type Msg = CoordinatorMsg;
    type State = Coordinator;
    type Arguments = Coordinator;

    async fn pre_start(
        &self,
        myself: ActorRef<CoordinatorMsg>,
        coordinator: Coordinator,
    ) -> Result<Coordinator, ActorProcessingErr> {
        // The timer ends with the actor.
        myself.send_interval(coordinator.inner.interval / TICKS_PER_BEAT, || CoordinatorMsg::Tick);
        Ok(coordinator)
    }

    async fn handle(
        &self,
        _myself: ActorRef<CoordinatorMsg>,
        message: CoordinatorMsg,
        coordinator: &mut Coordinator,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            CoordinatorMsg::Tick => coordinator.tick(),
        }
        Ok(())
    }
}
