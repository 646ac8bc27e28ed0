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
use wire::node::ServedBase;

use crate::membership::detector::DetectorRules;
use crate::membership::{Change, MemberSpec, Membership, Own};
use crate::ring::RingKey;
use crate::route::{Expected, PlacedTenant, Routes};
use crate::tables::Tables;

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
    ring_key: RingKey,
    membership: Mutex<Membership>,
    /// Never taken while the membership is held: a table of a large cluster takes its time, hearing must not wait.
    tables_made: Mutex<Made>,
    tables: Tables,
}

struct Made {
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
        let mut routes = Routes::new(ring_key.clone());
        let tables = Tables::new(routes.table(membership.view()));
        let tables_made = Mutex::new(Made { routes, ticks: 0, published: 0, stale: false });
        let membership = Mutex::new(membership);
        Self { inner: Arc::new(Inner { clock, heart, interval, ring_key, membership, tables_made, tables }) }
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
    pub fn tables(&self) -> Tables {
        self.inner.tables.clone()
    }

    /// A peer's heartbeat came.
    pub fn heard(&self, from: &NodeId, beat: Heartbeat) {
        let now = self.inner.clock.now();
        self.membership().on_heartbeat(now, from, beat);
    }

    /// A node, which may be this one, says which bases it serves.
    pub fn serves(&self, node: &NodeId, bases: Arc<[ServedBase]>) {
        self.membership().on_hello(node, bases);
    }

    /// The connection to a peer broke.
    pub fn lost(&self, peer: &NodeId) {
        self.membership().on_connection_lost(peer);
    }

    /// What this node does now; others hear of it with the next heartbeat, which a change of phase does not wait for.
    pub fn say(&self, phase: NodePhase, load: NodeLoad) {
        let changed = self.membership().say(phase, load);
        if changed {
            let now = self.inner.clock.now();
            self.publish(&mut lock(&self.inner.tables_made), now);
            self.beat(now);
        }
    }

    /// Whom to place and what to expect of them, for bounding loads; given again when the registry changes. Hashes
    /// every tenant, a quarter of a second for a million.
    pub fn expect_tenants(&self, tenants: Arc<[PlacedTenant]>) {
        let expected = Expected::new(&self.inner.ring_key, &tenants);
        let mut tables = lock(&self.inner.tables_made);
        tables.routes.expect_tenants(expected);
        tables.stale = true;
    }

    fn tick(&self) {
        let now = self.inner.clock.now();
        let ticks = {
            let mut tables = lock(&self.inner.tables_made);
            tables.ticks = tables.ticks.wrapping_add(1);
            self.publish(&mut tables, now);
            tables.ticks
        };
        if ticks.is_multiple_of(TICKS_PER_BEAT) {
            self.beat(now);
        }
    }

    fn publish(&self, tables: &mut Made, now: Instant) {
        let (change, view) = {
            let mut membership = self.membership();
            (membership.on_tick(now), membership.view())
        };
        tables.stale |= change != Change::None;
        let waited = tables.ticks.wrapping_sub(tables.published) >= TICKS_PER_LOAD;
        if change == Change::Placement || tables.stale && waited {
            tables.stale = false;
            tables.published = tables.ticks;
            let table = tables.routes.table(view);
            self.inner.tables.publish(table);
        }
    }

    fn beat(&self, now: Instant) {
        let mut membership = self.membership();
        let beat = membership.heartbeat(now);
        membership.peers().for_each(|peer| self.inner.heart.beat(peer, beat));
    }

    fn membership(&self) -> MutexGuard<'_, Membership> {
        lock(&self.inner.membership)
    }
}

/// A panic under a lock leaves a view that the next tick makes anew.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
