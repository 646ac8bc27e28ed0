//! The registry on simulated nodes: the real one, in files of a temporary folder, its messages over turmoil's TCP; and
//! operators who keep asking every node for changes and write down what they are told.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use coordinator::actor::Coordinator;
use coordinator::membership::detector::Health;
use coordinator::registry::cluster::{Answer, Cluster, Member, Timing, Transport, TransportError};
use coordinator::registry::command::TenantSpec;
use coordinator::registry::error::RegistryError;
use coordinator::registry::{Registry, RegistryOptions};
use coordinator::route::{Place, PlacedTenant};
use shared::error::ErrorKind;
use shared::id::{NodeId, TenantId};
use shared::seal::ClusterKey;
use shared::tenant::{Fallback, Limits, Tier};
use tokio::time::{Instant, sleep, timeout};
use wire::node::{Request, Response};

use crate::engine::QUEUE_MAX;
use crate::network::call;
use crate::plan::{TENANTS, base, name};

/// Nodes that vote; the others follow.
pub const VOTERS: usize = 3;

/// The file of a node's copy.
const FILE: &str = "registry.redb";

/// An operator asks this often.
const EVERY: Duration = Duration::from_secs(5);

/// Where the nodes of one simulation keep their registries; goes away with it.
#[derive(Debug)]
pub struct Shelf(PathBuf);

// === impl Shelf ===

impl Shelf {
    /// A new folder with a cluster's key in it.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn create() -> std::io::Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let unique = format!("tenantry-sim-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let shelf = Self(std::env::temp_dir().join(unique));
        fs::create_dir_all(&shelf.0)?;
        ClusterKey::load_or_create(&shelf.key()).map_err(std::io::Error::other)?;
        Ok(shelf)
    }

    fn key(&self) -> PathBuf {
        self.0.join("cluster.key")
    }

    fn file(&self, i: usize) -> PathBuf {
        self.0.join(name(i).as_str()).join(FILE)
    }

    /// Opens a node's copy.
    ///
    /// # Errors
    /// As [`Registry::open`].
    pub async fn open(
        &self,
        i: usize,
        n_nodes: usize,
        seed: u64,
        coordinator: Coordinator,
    ) -> Result<Registry, RegistryError> {
        let members = (0..n_nodes).map(|i| Member { node: name(i), votes: i < VOTERS }).collect();
        let transport = Arc::new(Road(coordinator));
        let cluster = Cluster { me: name(i), members, transport, timing: Timing::default() };
        let folder = self.0.join(name(i).as_str());
        let options = RegistryOptions::load(&folder, &self.key())?.in_cluster(cluster);
        Registry::open_repeatable(options, seed ^ i as u64).await
    }

    /// Ends a node by `end` as `kill -9` would: what the file holds now is all that stays.
    pub fn kill(&self, i: usize, end: impl FnOnce()) {
        let (file, image) = (self.file(i), self.0.join("image"));
        let kept = fs::copy(&file, &image);
        end();
        if kept.is_ok() {
            fs::rename(&image, &file).expect("the folder is there");
        }
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The registry's messages. One for a node that is known to be away fails at once, as it does without a connection.
struct Road(Coordinator);

impl Road {
    fn ask(
        &self,
        to: &NodeId,
        request: Request,
        within: Duration,
    ) -> Pin<Box<dyn Future<Output = Answer> + Send + 'static>> {
        let health = self.0.tables().borrow().members().get(to).map(|member| member.health);
        let (to, is_away) = (to.clone(), health == Some(Health::Dead));
        Box::pin(async move {
            if is_away {
                return Err(TransportError::NotSent(format!("{to} is away")));
            }
            match timeout(within, call(&to, request)).await {
                Ok(Ok(Response::Raft { bytes } | Response::Admin { bytes })) => Ok(bytes),
                Ok(Ok(_)) => Err(TransportError::NoAnswer("something else was answered".to_owned())),
                Ok(Err(error)) => Err(TransportError::NoAnswer(error.to_string())),
                Err(_) => Err(TransportError::NoAnswer("too late".to_owned())),
            }
        })
    }
}

impl Transport for Road {
    fn raft(
        &self,
        to: &NodeId,
        message: Vec<u8>,
        within: Duration,
    ) -> Pin<Box<dyn Future<Output = Answer> + Send + 'static>> {
        self.ask(to, Request::Raft { group: 0, bytes: message }, within)
    }

    fn forward(
        &self,
        to: &NodeId,
        command: Vec<u8>,
        within: Duration,
    ) -> Pin<Box<dyn Future<Output = Answer> + Send + 'static>> {
        self.ask(to, Request::Admin { bytes: command }, within)
    }
}

/// Places the tenants that the registry knows, as they come.
pub async fn place_tenants(registry: Registry, coordinator: Coordinator) {
    let mut snapshots = registry.subscribe();
    loop {
        let tenants = snapshots.borrow_and_update().tenants();
        let placed = |tenant: TenantId| PlacedTenant { tenant, place: Place::anywhere(base()), load: 1 };
        coordinator.expect_tenants(tenants.iter().map(|view| placed(view.record().tenant().clone())).collect());
        if snapshots.changed().await.is_err() {
            return;
        }
    }
}

/// What an operator was told of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Told {
    /// Nothing: the node that was asked died.
    Nothing,
    /// It is made.
    Done,
    /// It is not, or it is not known, and why.
    Failed(RegistryError),
}

/// One change that an operator asked for: a tenant of its own.
#[derive(Debug, Clone)]
pub struct Change {
    /// When, of the simulation.
    pub asked_at: Duration,
    /// How long until it was told.
    pub took: Duration,
    /// What.
    pub told: Told,
}

/// What operators asked for and were told; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Minutes {
    changes: Rc<RefCell<BTreeMap<TenantId, Change>>>,
    is_closed: Rc<Cell<bool>>,
}

// === impl Minutes ===

impl Minutes {
    /// Everything.
    pub fn changes(&self) -> BTreeMap<TenantId, Change> {
        self.changes.borrow().clone()
    }

    /// Operators ask for nothing more.
    pub fn close(&self) {
        self.is_closed.set(true);
    }

    /// Asks a node for a tenant every few seconds. On its first life the first node has the clients'
    /// tenants made before.
    pub async fn operate(self, registry: Registry, i: usize, life: u64) {
        if i == 0 && life == 1 {
            for tenant in (0..TENANTS).map(|tenant| format!("tenant-{tenant}")) {
                self.create(&registry, &tenant).await;
            }
        }
        // Not all at the same moment.
        sleep(EVERY / 10 * u32::try_from(i).unwrap_or(0)).await;
        for number in 0.. {
            if self.is_closed.get() {
                return;
            }
            self.create(&registry, &format!("by-n{i}-{life}-{number}")).await;
            sleep(EVERY).await;
        }
    }

    async fn create(&self, registry: &Registry, tenant: &str) {
        let tenant: TenantId = tenant.parse().expect("a valid name");
        let asked_at = turmoil::sim_elapsed().unwrap_or_default();
        let begin = Instant::now();
        let change = |told| Change { asked_at, took: begin.elapsed(), told };
        self.changes.borrow_mut().insert(tenant.clone(), change(Told::Nothing));
        let told = registry.apply(registry.secrets().create_tenant(spec(tenant.clone()), Vec::new(), 7)).await;
        let told = told.map_or_else(Told::Failed, |_| Told::Done);
        self.changes.borrow_mut().insert(tenant, change(told));
    }

    /// What must not be, seen by registries that all nodes agree on by now.
    pub fn violations(&self, registries: &[Registry]) -> Vec<String> {
        let tenants = |registry: &Registry| -> BTreeSet<TenantId> {
            registry.snapshot().tenants().iter().map(|view| view.record().tenant().clone()).collect()
        };
        let Some(first) = registries.first() else { return vec!["nobody has a registry".to_owned()] };
        let (found, asked) = (tenants(first), self.changes.borrow());
        let mut wrong = Vec::new();
        for registry in registries {
            let (theirs, ours) = (registry.snapshot(), first.snapshot());
            if theirs.epoch() != ours.epoch() || tenants(registry) != found {
                wrong.push(format!("registry: epoch {} here, {} there", ours.epoch(), theirs.epoch()));
            }
        }
        for (tenant, change) in &*asked {
            let is_found = found.contains(tenant);
            match &change.told {
                Told::Done if !is_found => wrong.push(format!("registry: {tenant} was acknowledged and is lost")),
                Told::Failed(RegistryError::NoLeader { .. }) if is_found => {
                    wrong.push(format!("registry: {tenant} was refused and is there"));
                }
                Told::Failed(error) if error.kind() != ErrorKind::Unavailable => {
                    wrong.push(format!("registry: {tenant} failed for good: {error}"));
                }
                _ => {}
            }
        }
        let strangers = found.iter().filter(|tenant| !asked.contains_key(*tenant));
        wrong.extend(strangers.map(|tenant| format!("registry: nobody asked for {tenant}")));
        wrong
    }
}

fn spec(tenant: TenantId) -> TenantSpec {
    let limits = Limits {
        concurrency: 8,
        queue_depth: QUEUE_MAX,
        deadline_ms: 20_000,
        requests_per_minute: 6000,
        tokens_per_minute: 600_000,
        burst_requests: 100,
    };
    TenantSpec {
        display_name: tenant.to_string(),
        tenant,
        contact: None,
        tier: Tier::Shared,
        weight: 1,
        bases: vec![base()],
        allow_base: true,
        fallback: Fallback::Refuse,
        limits,
        region: None,
        pool: None,
        cost_center: None,
        tasks: BTreeSet::from(["support".parse().expect("a valid name")]),
    }
}
