//! This node among the others: its place on their network, its view of who serves whom, the way of requests to them.
//!
//! [`crate::serve`] opens it for a node of several; a node alone has none of it. Decisions are the coordinator's;
//! here its seams are bound: heartbeats and the registry's messages go to the peer endpoint, runs of requests to this
//! node's engine ([`App::serve`](crate::app::App::serve)) and to peers' doors ([`crate::gateway::peer`]).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use anyhow::Context;
use coordinator::actor::{Coordinator, CoordinatorOptions, Heart};
use coordinator::forward::{Carrier, Forwarder, Journey, Lost, Run};
use coordinator::journal::idempotency::Stance;
use coordinator::journal::records::{Found, Records};
use coordinator::journal::whom_to_ask;
use coordinator::membership::detector::Health;
use coordinator::membership::{Member, MemberSpec, Own};
use coordinator::registry::cluster::{Answer as RegistryAnswer, Transport, TransportError};
use coordinator::registry::snapshot::Snapshot;
use coordinator::ring::RingKey;
use coordinator::route::{DEFAULT_POOL, Place, PlacedTenant};
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use peer::pki::PkiError;
use peer::{Authority, EndpointParts, Exchange, Identity, PeerError, PeerNet, PeerNetConfig};
use shared::clock::Clock;
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::config::{ClusterConfig, NodeConfig};
use shared::error::RequestError;
use shared::id::{BaseName, NodeId, RequestId};
use shared::request::{Emitted, Envelope};
use shared::tenant::TenantContract;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use wire::node::{
    Answer, Hello, JournalDelta, JournalRecord, Progress, Request, Resident, Response, ServedBase, Start,
};

use crate::app::App;
use crate::app::serve::{EVENTS_WAITING_MAX, Serving};
use crate::gateway::backend::CancelOnDrop;

/// Longest wait for a peer to take a request's bytes; its queue answers on the stream.
const HAND_OUT_WITHIN: Duration = Duration::from_secs(2);
/// A node that starts waits this long for the others before it calls itself ready without them.
const LOOK_ROUND: Duration = Duration::from_secs(3);
/// Longest wait for a node to say whether it answers a request; one that is silent for longer is as good as away.
const PROBE_WITHIN: Duration = Duration::from_millis(250);
/// Longest wait for a node to say what is in its memory; an operator waits for it.
const RESIDENTS_WITHIN: Duration = Duration::from_secs(1);
/// Longest wait for another node's record.
const TAKE_WITHIN: Duration = Duration::from_millis(500);
/// Longest wait for another node to write into a record.
const KEEP_WITHIN: Duration = Duration::from_secs(1);
/// The registry's only group of nodes.
const REGISTRY_GROUP: u32 = 0;

/// A node's place on the network of its cluster: what the registry talks through.
pub struct Network {
    /// The other nodes.
    pub net: PeerNet,
    incarnation: u64,
    bases: Arc<[ServedBase]>,
}

/// One node's part in its cluster.
pub struct ClusterNode {
    net: PeerNet,
    coordinator: Coordinator,
    forwarder: Arc<Forwarder<Roads>>,
    /// What this node says it does, for streams that must leave it.
    phase: watch::Sender<NodePhase>,
    /// Requests of other nodes that run here.
    n_guests: watch::Sender<usize>,
    roads: Arc<Roads>,
    /// What this node keeps of other nodes' requests.
    records: Mutex<Records>,
    /// Who serves a base otherwise than the others, as the log says.
    unlike: Mutex<BTreeSet<Unlike>>,
    clock: Arc<dyn Clock>,
    started_at: Instant,
    /// Tell the coordinator of connections that break, as long as this lives.
    _links: JoinSet<()>,
}

/// A node and what it says of a base.
type Unlike = (NodeId, ServedBase);

/// Counts one request of another node while it runs here.
pub struct Guest(watch::Sender<usize>);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.send_modify(|n| *n -= 1);
    }
}

// === impl Network ===

impl Network {
    /// To be asked before the node creates anything: what it stores without the cluster's key keeps it from joining.
    ///
    /// # Errors
    /// When the node is one of several and was not let in yet.
    pub fn is_let_in(config: &ClusterConfig, node: &NodeConfig) -> anyhow::Result<()> {
        if config.nodes.len() == 1 || Identity::is_stored(&node.data) {
            return Ok(());
        }
        let hint = "hint: let the node in first: tenantry ctl ca invite, then tenantry ctl join";
        anyhow::bail!("join the cluster: {} holds no certificate of this node; {hint}", node.data.display())
    }

    /// Opens the peer port and begins to look for the others.
    ///
    /// # Errors
    /// When the node was not let in yet or its port is taken.
    pub fn open(
        config: &ClusterConfig,
        node: &NodeConfig,
        bases: Vec<ServedBase>,
        clock: Arc<dyn Clock>,
    ) -> anyhow::Result<Option<Self>> {
        let Some(address) = node.peer.filter(|_| config.nodes.len() > 1) else { return Ok(None) };
        let identity = Identity::load(node.name.clone(), &node.data)?;
        let incarnation = u64::try_from(clock.wall().as_millis()).unwrap_or(u64::MAX);
        let hello = Hello::new(config.name.clone(), node.name.clone(), incarnation, bases.clone());
        let peers = config.nodes.iter().filter_map(|node| Some((node.name.clone(), node.peer?))).collect();
        let parts = EndpointParts::bind(address)
            .map_err(|error| anyhow::anyhow!("listen for other nodes on {address}: {error}"))?;
        let authority = Authority::open(&config.ca, clock.wall()).context("open the cluster's authority")?;
        let net = PeerNet::new(&identity, PeerNetConfig { hello, peers, clock, authority }, parts)?;
        Ok(Some(Self { net, incarnation, bases: bases.into() }))
    }

    /// The registry's way to the other nodes.
    pub fn registry_transport(&self) -> Arc<dyn Transport> {
        Arc::new(RegistryRoad(self.net.clone()))
    }
}

// === impl ClusterNode ===

impl ClusterNode {
    /// A node that has heard nobody yet.
    pub fn new(
        network: Network,
        config: &ClusterConfig,
        me: &NodeId,
        ring_key: RingKey,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        let Network { net, incarnation, bases } = network;
        let options = CoordinatorOptions {
            me: me.clone(),
            own: Own { incarnation, phase: NodePhase::Serving, load: NodeLoad::default() },
            nodes: config.nodes.iter().map(member_spec).collect(),
            interval: config.heartbeat,
            ring_key,
        };
        let coordinator = Coordinator::new(options, Arc::new(PeerHeart(net.clone())), Arc::clone(&clock));
        coordinator.serves(me, bases);
        let roads = Arc::new(Roads { me: me.clone(), net: net.clone(), app: OnceLock::new() });
        let forwarder = Arc::new(Forwarder::new(Arc::clone(&roads), coordinator.tables(), Arc::clone(&clock)));
        let mut links = JoinSet::new();
        for peer in config.nodes.iter().map(|node| node.name.clone()).filter(|name| name != me) {
            let (net, coordinator) = (net.clone(), coordinator.clone());
            links.spawn(async move {
                loop {
                    net.lost(&peer).await;
                    coordinator.lost(&peer);
                }
            });
        }
        Arc::new(Self {
            net,
            coordinator,
            forwarder,
            phase: watch::Sender::new(NodePhase::Serving),
            n_guests: watch::Sender::new(0),
            roads,
            records: Mutex::default(),
            unlike: Mutex::default(),
            started_at: clock.now(),
            clock,
            _links: links,
        })
    }

    /// Whether it is known who is there: every other node was heard, or waited for long enough.
    pub fn has_looked_round(&self) -> bool {
        let table = self.coordinator.tables().borrow().clone();
        let heard = |member: &Member| !matches!(member.health, Health::Absent | Health::Returning);
        table.members().values().all(heard) || self.clock.now() - self.started_at > LOOK_ROUND
    }

    /// The other nodes.
    pub fn net(&self) -> &PeerNet {
        &self.net
    }

    /// This node's view of the cluster.
    pub fn coordinator(&self) -> &Coordinator {
        &self.coordinator
    }

    /// Looks whether the cluster's authority came to this machine: then nodes join here. True when there is no reason
    /// to look again.
    pub async fn look_for_authority(&self, config: &ClusterConfig, node: &NodeConfig) -> bool {
        let (ca, name, data, now) = (config.ca.clone(), node.name.clone(), node.data.clone(), self.clock.wall());
        let look =
            move || Authority::open(&ca, now)?.map(|found| Ok((Identity::load(name, &data)?, found))).transpose();
        let found: Result<Option<(Identity, Authority)>, PkiError> =
            tokio::task::spawn_blocking(look).await.expect("reading an authority does not panic");
        let opened = match found {
            Ok(None) => return false,
            Ok(Some((identity, authority))) => self.net.let_join(&identity, authority).map_err(anyhow::Error::from),
            Err(error) => Err(error.into()),
        };
        match opened {
            Ok(()) => tracing::info!(folder = %config.ca.display(), "the authority is here: nodes may join"),
            Err(error) => tracing::error!(%error, folder = %config.ca.display(), "nodes cannot join here"),
        }
        true
    }

    /// Requests that run here find their engine in `app` from now on.
    pub fn attach(&self, app: &Arc<App>) {
        // Set once, by the start of the node.
        let _ = self.roads.app.set(Arc::downgrade(app));
    }

    /// What this node does from now on; the others hear of it at once.
    pub fn say(&self, phase: NodePhase, load: NodeLoad) {
        self.phase.send_if_modified(|now| std::mem::replace(now, phase) != phase);
        self.coordinator.say(phase, load);
    }

    /// What this node says it does.
    pub fn phase(&self) -> NodePhase {
        *self.phase.borrow()
    }

    /// Ends when streams should go on elsewhere.
    pub async fn leaving(&self) {
        if self.phase.subscribe().wait_for(|phase| *phase == NodePhase::Leaving).await.is_err() {
            std::future::pending().await
        }
    }

    /// A request of another node begins.
    pub fn guest(&self) -> Guest {
        self.n_guests.send_modify(|n| *n += 1);
        Guest(self.n_guests.clone())
    }

    /// Ends when no request of another node runs here.
    pub async fn without_guests(&self) {
        // The sender is held above: waiting cannot fail.
        let _ = self.n_guests.subscribe().wait_for(|n| *n == 0).await;
    }

    /// Says in the log who serves a base otherwise than the others, once.
    pub fn tell_unlike(&self) {
        let table = self.coordinator.tables().borrow().clone();
        let now: BTreeSet<Unlike> =
            table.unlike().into_iter().map(|(node, said)| (node.clone(), said.clone())).collect();
        let mut before = self.unlike.lock();
        for (node, said) in now.difference(&before) {
            let Some(agreed) = table.agreed(&said.name) else { continue };
            if said.hash != agreed.hash {
                tracing::error!(%node, base = %said.name, theirs = %said.hash.short(), others = %agreed.hash.short(), "a node serves another content under this base's name: it is left out for this base");
            } else {
                tracing::warn!(%node, base = %said.name, theirs = %said.numerics_id, others = %agreed.numerics_id, "a node computes this base with other arithmetic: streams do not move between it and the others");
            }
        }
        for (node, said) in before.difference(&now) {
            tracing::info!(%node, base = %said.name, "a node serves a base as the others do, or not at all");
        }
        *before = now;
    }

    /// The tenants to be placed, as the registry knows them.
    pub fn expect_tenants(&self, snapshot: &Snapshot) {
        let views = snapshot.tenants();
        let placed = views.iter().flat_map(|view| {
            let contract = view.contract();
            let load = u64::from(contract.weight);
            let tenant = contract.tenant.clone();
            contract.bases.iter().map(move |base| PlacedTenant {
                tenant: tenant.clone(),
                place: place(base, contract),
                load,
            })
        });
        self.coordinator.expect_tenants(placed.collect());
    }

    /// Sends an admitted request to where it runs. Its events come whatever happens to nodes.
    ///
    /// `emitted` is what its client has after `attempt` runs; `answer` goes into the record from which another node can
    /// go on, without it there is none.
    pub fn forward(
        &self,
        envelope: Envelope,
        contract: &TenantContract,
        emitted: Emitted,
        attempt: u32,
        answer: Option<Vec<u8>>,
    ) -> Serving {
        let (sink, events) = mpsc::channel(EVENTS_WAITING_MAX);
        let place = place(&envelope.base, contract);
        let journey = Journey { envelope, place, emitted, attempt };
        let forwarder = Arc::clone(&self.forwarder);
        tokio::spawn(async move {
            match answer {
                Some(answer) => forwarder.forward_kept(journey, answer, sink).await,
                None => forwarder.forward(journey, sink).await,
            }
        });
        // It ends with the last receiver of its events.
        Serving { events, cancel: CancelOnDrop::new(|| {}) }
    }
}

impl ClusterNode {
    /// Which other nodes answer a client's request, as those say that can be reached.
    pub async fn stances(&self, id: RequestId) -> Vec<(NodeId, Stance)> {
        let table = self.coordinator.tables().borrow().clone();
        let others = table.members().keys().filter(|node| *node != table.me() && self.net.is_connected(node));
        let ask = |node: NodeId| async move {
            match self.net.call(&node, &Request::Probe { id, attempt: 0 }, PROBE_WITHIN).await {
                Ok(Response::Probe(Progress { known: true, running: true, .. })) => Some((node, Stance::Answering)),
                Ok(Response::Probe(Progress { known: true, .. })) => Some((node, Stance::Asking)),
                Ok(_) | Err(_) => None,
            }
        };
        let stances = futures_util::future::join_all(others.cloned().map(ask)).await;
        stances.into_iter().flatten().collect()
    }

    /// What is in the memory of every other node that lives; `None` for one that does not say.
    pub async fn residents(&self) -> BTreeMap<NodeId, Option<Vec<Resident>>> {
        let table = self.coordinator.tables().borrow().clone();
        let lives = |member: &Member| !matches!(member.health, Health::Dead | Health::Absent);
        let others = table.members().iter().filter(|(node, member)| *node != table.me() && lives(member));
        let ask = |node: NodeId| async move {
            match self.net.call(&node, &Request::Residents, RESIDENTS_WITHIN).await {
                Ok(Response::Residents(residents)) => (node, Some(residents)),
                Ok(_) | Err(_) => (node, None),
            }
        };
        futures_util::future::join_all(others.map(|(node, _)| ask(node.clone()))).await.into_iter().collect()
    }
}

/// The records of other nodes' requests (see [`coordinator::journal`]).
impl ClusterNode {
    /// Another node's request, to be kept.
    pub fn keep(&self, from: &NodeId, request: JournalRecord) -> Result<(), RequestError> {
        self.records.lock().open(self.clock.now(), from, request)
    }

    /// More of what is kept.
    pub fn keep_more(&self, from: &NodeId, deltas: &[JournalDelta]) -> Result<(), RequestError> {
        let (now, mut records) = (self.clock.now(), self.records.lock());
        deltas.iter().try_for_each(|delta| records.put(now, from, delta))
    }

    /// Hands a copy of a record out to a node that may go on with its request.
    pub fn hand_out(&self, id: RequestId) -> Option<JournalRecord> {
        self.records.lock().take(self.clock.now(), id)
    }

    /// Records that are kept here.
    pub fn n_records(&self) -> usize {
        self.records.lock().len()
    }

    /// Forgets old records. What is to be billed for nodes that died comes back, once.
    pub fn settle_records(&self) -> Vec<JournalRecord> {
        let (table, mut records) = (self.coordinator.tables().borrow().clone(), self.records.lock());
        let orphans = records.orphans(&table);
        records.forget(self.clock.now());
        orphans
    }

    /// What is to be billed before this node leaves, should others die behind it.
    pub fn settle_all_records(&self) -> Vec<JournalRecord> {
        self.records.lock().before_leaving()
    }

    /// A copy of the record of a request of a tenant of `region`, from whoever keeps it. Nothing changes for its entry
    /// node before this one goes on with the request.
    pub async fn take_record(&self, id: RequestId, region: Option<&str>) -> Found {
        let table = self.coordinator.tables().borrow().clone();
        let (here, others): (Vec<_>, Vec<_>) =
            whom_to_ask(&table, id, region).into_iter().partition(|node| node == table.me());
        let ask = |node: NodeId| async move {
            match self.net.call(&node, &Request::JournalTake { id }, TAKE_WITHIN).await {
                Ok(Response::Journal(record)) => Ok(record.map(|record| *record)),
                Ok(_) => Err(Lost("it answers something else".to_owned())),
                Err(error) => Err(lost(error)),
            }
        };
        let there = futures_util::future::join_all(others.into_iter().map(ask)).await;
        let here = here.first().map(|_| Ok(self.hand_out(id)));
        there.into_iter().chain(here).collect()
    }
}

/// Where a tenant's requests for a base may run.
pub fn place(base: &BaseName, contract: &TenantContract) -> Place {
    let pool = contract.pool.as_deref().unwrap_or(DEFAULT_POOL).to_owned();
    Place { base: base.clone(), pool, region: contract.region.clone() }
}

/// What the cluster file says of a node, as the ring needs it.
pub fn member_spec(node: &NodeConfig) -> MemberSpec {
    MemberSpec {
        id: node.name.clone(),
        capacity: node.capacity,
        pool: node.pool.to_string(),
        region: node.region.as_ref().map(ToString::to_string),
        bases: node.bases.clone(),
    }
}

/// Heartbeats as datagrams.
struct PeerHeart(PeerNet);

impl Heart for PeerHeart {
    fn beat(&self, to: &NodeId, beat: Heartbeat) {
        self.0.datagram(to, &beat);
    }
}

/// Where runs of requests happen: here, or behind a peer's door.
struct Roads {
    me: NodeId,
    net: PeerNet,
    app: OnceLock<Weak<App>>,
}

/// A run under way.
enum Leg {
    Here { serving: Serving, attempt: u32 },
    There(Exchange),
    Refused(Option<Answer>),
}

impl Carrier for Roads {
    type Run = Leg;

    async fn start(&self, node: &NodeId, start: Start) -> Result<Leg, Lost> {
        if *node != self.me {
            return self.net.start(node, &start, HAND_OUT_WITHIN).await.map(Leg::There).map_err(lost);
        }
        let app = self.app.get().and_then(Weak::upgrade);
        let app = app.ok_or_else(|| Lost("this node has not started or is stopping".to_owned()))?;
        let Start { envelope, attempt, emitted, .. } = start;
        Ok(match app.serve(Arc::new(envelope), emitted, attempt).await {
            Ok(serving) => Leg::Here { serving, attempt },
            Err(error) => Leg::Refused(Some(Answer::Refused(error))),
        })
    }

    async fn keep(&self, node: &NodeId, request: Request) -> Result<Response, Lost> {
        self.net.call(node, &request, KEEP_WITHIN).await.map_err(lost)
    }
}

impl Run for Leg {
    async fn recv(&mut self) -> Result<Option<Answer>, Lost> {
        match self {
            Self::Here { serving, attempt } => {
                let event = serving.events.recv().await;
                Ok(event.map(|event| Answer::Event { attempt: *attempt, event }))
            }
            Self::There(exchange) => exchange.recv().await.map_err(lost),
            Self::Refused(answer) => Ok(answer.take()),
        }
    }
}

fn lost(error: PeerError) -> Lost {
    Lost(error.to_string())
}

/// The registry's messages as calls to peers.
struct RegistryRoad(PeerNet);

impl RegistryRoad {
    fn call(&self, to: &NodeId, request: Request, within: Duration) -> BoxFuture<'static, RegistryAnswer> {
        let (net, to) = (self.0.clone(), to.clone());
        Box::pin(async move {
            match net.call(&to, &request, within).await {
                Ok(Response::Raft { bytes } | Response::Admin { bytes }) => Ok(bytes),
                Ok(_) => Err(TransportError::NoAnswer(format!("node {to} answered something else"))),
                Err(error @ (PeerError::Unknown { .. } | PeerError::NotConnected { .. })) => {
                    Err(TransportError::NotSent(error.to_string()))
                }
                Err(error) => Err(TransportError::NoAnswer(error.to_string())),
            }
        })
    }
}

impl Transport for RegistryRoad {
    fn raft(&self, to: &NodeId, message: Vec<u8>, within: Duration) -> BoxFuture<'static, RegistryAnswer> {
        self.call(to, Request::Raft { group: REGISTRY_GROUP, bytes: message }, within)
    }

    fn forward(&self, to: &NodeId, command: Vec<u8>, within: Duration) -> BoxFuture<'static, RegistryAnswer> {
        self.call(to, Request::Admin { bytes: command }, within)
    }
}
