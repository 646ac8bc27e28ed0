//! Fetches adapters before somebody asks (AD-13, AD-16, AD-17): the shell around [`coordinator::prewarm`].
//!
//! A node remembers which of its tenants' tasks are asked for and when. From that it plans loads for itself, a few in
//! five minutes and never against what tenants ask for now; it tells the successor of each likely tenant, and the new home of
//! those that a change of the ring takes from it. Whoever is told has the last word: it takes out an idle adapter for
//! another's only if that is much less likely to be asked for.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use adapters::cache::ahead::Resident;
use coordinator::prewarm::activity::Activity;
use coordinator::prewarm::moved;
use coordinator::prewarm::plan::{AHEAD, Caution, EVERY, Known, Room, Step, loads_max, plan};
use coordinator::registry::snapshot::Snapshot;
use coordinator::resolve::resolve;
use coordinator::route::{Arrival, Place, RoutingTable};
use shared::adapter::AdapterRef;
use shared::id::{BaseName, NodeId, Route};
use shared::tenant::TenantContract;
use wire::node::Request;

use crate::app::App;
use crate::base_room::BaseRoom;
use crate::cluster::{ClusterNode, place};
use crate::metrics;

/// An adapter that was fetched on a guess is wanted for this long.
const WANTED_FOR: Duration = Duration::from_secs(60);
/// How likely an adapter is that another node names: it names only those that it is sure of, and knows them better.
const HINTED: f64 = 0.75;
/// Longest wait for another node to take a hint.
const TELL_WITHIN: Duration = Duration::from_secs(1);

/// What a node remembers of its tenants' habits.
#[derive(Debug, Default)]
pub struct Prewarmer(Mutex<Activity>);

/// An adapter that is likely to be asked for, and by whom.
struct Likely {
    route: Route,
    place: Place,
    adapter: AdapterRef,
    bytes: u64,
    likely: f64,
}

// === impl Prewarmer ===

impl Prewarmer {
    /// A route was asked for at this wall time.
    pub fn on_request(&self, wall: Duration, route: &Route) {
        self.activity().on_request(wall, route);
    }

    /// What may be asked for soon, likeliest first; only what the tenants' contracts point at now.
    fn likely(&self, wall: Duration, snapshot: &Snapshot) -> Vec<Likely> {
        let activity = self.activity();
        let mut found: Vec<Likely> = activity
            .all(wall, AHEAD)
            .filter_map(|(route, likely)| {
                let view = snapshot.tenant(&route.tenant)?;
                let (adapter, place) = target(view.contract(), route)?;
                let bytes = view.record().adapters.values().find(|known| known.hash == adapter.hash)?.bytes;
                Some(Likely { route: route.clone(), place, adapter, bytes, likely })
            })
            .collect();
        found.sort_by(|a, b| b.likely.total_cmp(&a.likely));
        found
    }

    fn activity(&self) -> MutexGuard<'_, Activity> {
        // A panic under this short lock leaves at worst one request uncounted.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The adapter that a route means under its contract.
fn target(contract: &TenantContract, route: &Route) -> Option<(AdapterRef, Place)> {
    let target = resolve(contract, route.task.as_ref()?.as_str()).ok()?;
    let adapter = AdapterRef { tenant: route.tenant.clone(), hash: target.adapter?.hash };
    Some((adapter, place(&target.base, contract)))
}

/// Plans until the node ends.
pub async fn run(app: Weak<App>) {
    let Some(cluster) = app.upgrade().map(|app| app.cluster().cloned()) else { return };
    let mut tables = cluster.as_ref().map(|cluster| cluster.coordinator().tables());
    let mut every = tokio::time::interval(EVERY);
    let mut before = tables.as_ref().map(|tables| tables.borrow().clone());
    loop {
        let changed = async {
            match &mut tables {
                Some(tables) => tables.changed().await,
                None => std::future::pending().await,
            }
        };
        let ring_changed = tokio::select! {
            _ = every.tick() => false,
            () = changed => true,
        };
        let Some(app) = app.upgrade() else { return };
        match (&cluster, &mut before, ring_changed) {
            (Some(cluster), Some(before), true) => {
                let after = cluster.coordinator().tables().borrow().clone();
                if after.epoch() != before.epoch() {
                    hand_on(&app, cluster, before, &after).await;
                    *before = after;
                }
            }
            _ => {
                for room in app.rooms().values() {
                    warm_here(&app, room);
                }
                if let Some(cluster) = &cluster {
                    tell_successors(&app, cluster).await;
                }
            }
        }
    }
}

/// Loads what this node's tenants are about to ask for.
fn warm_here(app: &App, room: &BaseRoom) {
    let slots = app.config().adapters.slots;
    carry_out(app, room, known_here(app, room), loads_max(slots), "plan");
}

/// The adapters in memory, and those that are likely to be asked for.
fn known_here(app: &App, room: &BaseRoom) -> BTreeMap<AdapterRef, Known> {
    let known = |resident: Resident| {
        let Resident { adapter, bytes, leased, .. } = resident;
        (adapter.clone(), Known { adapter, bytes, likely: 0.0, resident: true, leased })
    };
    let mut known: BTreeMap<AdapterRef, Known> = room.cache.residents().into_iter().map(known).collect();
    let likely = app.prewarmer().likely(app.wall(), &app.registry().snapshot());
    for Likely { adapter, bytes, likely, .. } in likely.into_iter().filter(|likely| likely.place.base == room.name) {
        let fresh = || Known { adapter: adapter.clone(), bytes, likely, resident: false, leased: false };
        let known = known.entry(adapter.clone()).or_insert_with(fresh);
        known.likely = known.likely.max(likely);
    }
    known
}

fn carry_out(app: &App, room: &BaseRoom, known: BTreeMap<AdapterRef, Known>, loads: usize, reason: &'static str) {
    let config = &app.config().adapters;
    let budget = Room { slots: config.slots, bytes: config.engine_bytes as u64, loads };
    for step in plan(known.into_values().collect(), budget, Caution::default()) {
        match step {
            Step::Cool(adapter) => room.cache.cool(&adapter.id()),
            Step::Warm(adapter) => {
                metrics::prewarmed(reason);
                room.cache.want(&adapter, app.now() + WANTED_FOR);
            }
        }
    }
}

/// Tells those who serve this node's tenants from now on what they are likely to be asked for.
pub async fn before_leaving(app: &App) {
    if let Some(cluster) = app.cluster() {
        tell_successors(app, cluster).await;
    }
}

/// Names the likeliest adapters to the nodes that would serve them if this one died.
async fn tell_successors(app: &App, cluster: &ClusterNode) {
    let snapshot = app.registry().snapshot();
    let table = cluster.coordinator().tables().borrow().clone();
    let likely = app.prewarmer().likely(app.wall(), &snapshot);
    let sure = likely.into_iter().filter(|likely| likely.likely >= Caution::default().likely_min);
    let most = loads_max(app.config().adapters.slots);
    let mut told = BTreeMap::<NodeId, usize>::new();
    for likely in sure {
        let Some(owners) = table.owners(&likely.place, &likely.route.tenant) else { continue };
        let (true, Some(successor)) = (owners.home == table.me(), owners.successor) else { continue };
        let n_told = told.entry(successor.clone()).or_default();
        if *n_told < most {
            *n_told += 1;
            tell(cluster, successor, table.epoch(), &likely).await;
        }
    }
}

/// Names the adapters of tenants that moved to the nodes that serve them now.
async fn hand_on(app: &App, cluster: &ClusterNode, before: &RoutingTable, after: &RoutingTable) {
    let snapshot = app.registry().snapshot();
    let likely = app.prewarmer().likely(app.wall(), &snapshot);
    let sure: Vec<Likely> =
        likely.into_iter().filter(|likely| likely.likely >= Caution::default().likely_min).collect();
    let new_homes = moved(before, after, sure.iter().map(|likely| (&likely.route, &likely.place)));
    for (route, home) in new_homes.iter().filter(|(_, home)| home != after.me()) {
        if let Some(likely) = sure.iter().find(|likely| likely.route == *route) {
            tell(cluster, home, after.epoch(), likely).await;
        }
    }
}

async fn tell(cluster: &ClusterNode, to: &NodeId, epoch: u64, likely: &Likely) {
    let request = Request::Warm { epoch, base: likely.place.base.clone(), adapter: likely.adapter.clone() };
    if let Err(error) = cluster.net().call(to, &request, TELL_WITHIN).await {
        tracing::debug!(%to, %error, "a node did not take a hint to warm an adapter");
    }
}

/// Another node expects this adapter to be asked for here.
pub fn on_hint(app: &App, epoch: u64, base: &BaseName, adapter: &AdapterRef) {
    let snapshot = app.registry().snapshot();
    let (Some(cluster), Some(room)) = (app.cluster(), app.rooms().get(base)) else { return };
    let Some(tenant) = snapshot.tenant(&adapter.tenant) else { return };
    let table = cluster.coordinator().tables().borrow().clone();
    // A table that is older than ours may send a tenant here that is served elsewhere.
    let arrival = table.on_arrival(&place(base, tenant.contract()), &adapter.tenant, epoch);
    let stored = tenant.record().adapters.values().find(|known| known.hash == adapter.hash);
    let (Arrival::Serve, Some(bytes)) = (arrival, stored.map(|known| known.bytes)) else { return };
    let mut known = known_here(app, room);
    known.retain(|_, known| known.resident);
    let hinted = Known { adapter: adapter.clone(), bytes, likely: HINTED, resident: false, leased: false };
    known.entry(adapter.clone()).or_insert(hinted);
    carry_out(app, room, known, 1, "hint");
}

/// Starts planning for `app`.
pub fn spawn(app: &Arc<App>) {
    tokio::spawn(run(Arc::downgrade(app)));
}
