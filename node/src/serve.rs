//! `tenantry node`: from a configuration file to a serving node, and from SIGTERM to a clean end.
//!
//! Order of start: configuration, everything behind the doors (`serve::open`), actors, ports. Nothing listens before
//! everything behind it works. Order of stop: refuse new requests, let running ones finish, hand over to other nodes
//! what runs for them, flush, exit.

mod open;

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use metrics_exporter_prometheus::PrometheusHandle;
use peer::EndpointParts;
use peer::clients::{self, ClientBounds};
use ractor::{Actor, ActorCell, ActorRef};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use shared::clock::{Clock, SystemClock};
use shared::cluster::NodePhase;
use shared::config::{ClusterConfig, NodeConfig, TlsConfig};
use shared::id::NodeId;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::admin::{self, Admin};
use crate::app::App;
use crate::base_texts;
use crate::gateway;
use crate::gateway::backend::node_stopping;
use crate::gateway::clients::ClientDoor;
use crate::gateway::listen::{self, Bounds};
use crate::gateway::peer::PeerDoor;
use crate::metering::journal::Journal;
use crate::metrics;
use crate::prewarm;
use crate::supervisor::{NodeSupervisor, SupervisorArgs, SupervisorMsg};

/// Histogram samples wait in memory until they are sorted into buckets; without a scraper nobody else does it.
const METRICS_UPKEEP_EVERY: Duration = Duration::from_secs(5);

/// Between two looks at how busy the node is, for the other nodes.
const LOAD_EVERY: Duration = Duration::from_millis(100);
/// Longest that a node which leaves spends on naming its tenants' adapters to their successors.
const NAME_WITHIN: Duration = Duration::from_millis(500);
/// Between two looks for the cluster's authority where there is none: one file is looked for.
const AUTHORITY_EVERY: Duration = Duration::from_secs(1);
/// Of the drain time, this much at its end is for streams that other nodes take over.
const HAND_OVER_WITHIN: Duration = Duration::from_secs(5);
/// Longest wait at the end for requests whose connections were cut.
const RECORDS_WITHIN: Duration = Duration::from_secs(2);

/// Arguments of `tenantry node`.
#[derive(Debug, clap::Args)]
pub struct NodeArgs {
    /// Cluster file, the same for all nodes.
    #[arg(long, default_value = "cluster.toml")]
    config: PathBuf,
    /// Name of this node in the cluster file.
    #[arg(long)]
    name: NodeId,
    /// Check the configuration and exit.
    #[arg(long)]
    check: bool,
    /// Log lines as JSON.
    #[arg(long)]
    log_json: bool,
}

/// Starts the node and returns when it has ended.
pub fn run(args: &NodeArgs) -> anyhow::Result<()> {
    let config = ClusterConfig::load(&args.config)?;
    let node = match config.node(&args.name) {
        Some(node) => node.clone(),
        None => {
            let names: Vec<String> = config.nodes.iter().map(|node| node.name.to_string()).collect();
            anyhow::bail!("start node {}: {} lists {}", args.name, args.config.display(), names.join(", "));
        }
    };
    if args.check {
        println!("{} is valid for node {}", args.config.display(), node.name);
        return Ok(());
    }
    log_to_stderr(args.log_json);
    // The provider is chosen here once, so that no library has to guess.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("start the async runtime")?;
    let end = runtime.block_on(async { start(config, node).await?.run().await });
    // Not waited for: an adapter's reader may hang for ever.
    runtime.shutdown_background();
    end
}

fn log_to_stderr(json: bool) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info,openraft=warn".into());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    if json { builder.json().init() } else { builder.init() }
}

/// A node that serves.
pub struct Running {
    app: Arc<App>,
    supervisor: ActorRef<SupervisorMsg>,
    supervisor_end: JoinHandle<()>,
    clients: Port,
    admins: Port,
    tls: Option<(RustlsConfig, TlsConfig)>,
    metrics: PrometheusHandle,
}

/// Starts a node: when this returns, its ports answer.
///
/// # Errors
/// With what could not be opened and why.
pub async fn start(config: ClusterConfig, node: NodeConfig) -> anyhow::Result<Running> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    let tls = match &config.tls {
        Some(tls) => Some(load_tls(tls).await?),
        None => None,
    };
    // Ports are taken before the slow part, so that a second node on them fails at once; they answer later.
    let http = TcpListener::bind(node.http).with_context(|| format!("listen for clients on {}", node.http))?;
    let quic = match node.clients_quic {
        Some(at) => Some(EndpointParts::bind(at).with_context(|| format!("listen for clients over QUIC on {at}"))?),
        None => None,
    };
    let operators = TcpListener::bind(node.admin).with_context(|| format!("listen for operators on {}", node.admin))?;
    let metrics = metrics::install().context("install the metrics recorder")?;
    let (app, admin_key) = open::open(config, node, Arc::clone(&clock)).await?;
    let app = Arc::new(app);
    app.follow_registry();
    let supervisor_args = SupervisorArgs {
        rooms: app.rooms().values().cloned().collect(),
        registry: app.registry().clone(),
        coordinator: app.cluster().map(|cluster| cluster.coordinator().clone()),
        clock,
    };
    let (supervisor, supervisor_end) = NodeSupervisor::spawn(None, NodeSupervisor, supervisor_args)
        .await
        .map_err(|error| anyhow::anyhow!("start the node's actors: {error}"))?;

    join(&app);
    prewarm::spawn(&app);
    base_texts::spawn(&app);
    let client_router = gateway::router(Arc::clone(&app), app.config().clients.body_bytes);
    let admin_router =
        admin::router(Arc::new(Admin { app: Arc::clone(&app), key: admin_key, metrics: metrics.clone() }));
    let bounds = Bounds::new(&app.config().clients);
    open_clients_quic(&app, quic, client_router.clone())?;
    let clients = Port::open(http, tls.clone(), bounds, client_router);
    let admins = Port::open(operators, tls.clone(), bounds, admin_router);
    tracing::info!(node = %app.node().name, http = %clients.address, admin = %admins.address, tls = tls.is_some(), "node serves");
    Ok(Running { app, supervisor, supervisor_end, clients, admins, tls, metrics })
}

impl Running {
    /// Address of the client port.
    pub fn http(&self) -> SocketAddr {
        self.clients.address
    }

    /// Address of the admin port.
    pub fn admin(&self) -> SocketAddr {
        self.admins.address
    }

    /// The root of the node's actors.
    pub fn supervisor(&self) -> ActorCell {
        self.supervisor.get_cell()
    }

    /// Serves until a signal says otherwise or the actors give up, then stops the node.
    ///
    /// # Errors
    /// When the actors gave up.
    pub async fn run(self) -> anyhow::Result<()> {
        let Self { app, supervisor, supervisor_end, clients, admins, tls, metrics } = self;
        let end = wait_for_end(&app, tls, &metrics, supervisor_end).await;
        stop(app, supervisor, clients, admins, end.is_ok()).await;
        end
    }
}

/// Lets the other nodes in and tells them about this one. Does nothing for a node alone.
fn join(app: &Arc<App>) {
    let Some(cluster) = app.cluster() else { return };
    cluster.attach(app);
    let door = PeerDoor::new(Arc::clone(app), Arc::clone(cluster));
    tokio::spawn(peer::serve(cluster.net().clone(), Arc::new(door)));
    // Both end with the node: they hold nothing of it.
    let (weak, mut snapshots) = (Arc::downgrade(app), app.registry().subscribe());
    tokio::spawn(async move {
        let mut every = tokio::time::interval(LOAD_EVERY);
        loop {
            every.tick().await;
            let Some(app) = weak.upgrade() else { return };
            let Some(cluster) = app.cluster() else { return };
            cluster.say(cluster.phase(), app.load());
            cluster.tell_unlike();
            cluster.settle_records().into_iter().for_each(|record| app.bill_for_another(record));
            if snapshots.has_changed().is_ok_and(|changed| changed) {
                let snapshot = snapshots.borrow_and_update().clone();
                cluster.expect_tenants(&snapshot);
            }
        }
    });
    cluster.expect_tenants(&app.registry().snapshot());
    let weak = Arc::downgrade(app);
    tokio::spawn(async move {
        loop {
            let Some(app) = weak.upgrade() else { return };
            let Some(cluster) = app.cluster() else { return };
            if cluster.net().lets_join() || cluster.look_for_authority(app.config(), app.node()).await {
                return;
            }
            drop(app);
            tokio::time::sleep(AUTHORITY_EVERY).await;
        }
    });
}

/// Opens the door of the client library and of HTTP/3, with the certificate of `[tls]` or, without one, this node's of the cluster.
fn open_clients_quic(app: &Arc<App>, parts: Option<EndpointParts>, router: axum::Router) -> anyhow::Result<()> {
    let Some(parts) = parts else { return Ok(()) };
    let endpoint = match (&app.config().tls, app.cluster()) {
        (Some(tls), _) => {
            let chain = CertificateDer::pem_file_iter(&tls.certificate).and_then(Iterator::collect);
            let chain = chain.with_context(|| format!("read the certificate {}", tls.certificate.display()))?;
            let key = PrivateKeyDer::from_pem_file(&tls.key);
            clients::open(chain, key.with_context(|| format!("read the key {}", tls.key.display()))?, parts)?
        }
        (None, Some(cluster)) => clients::open_as_node(cluster.net(), parts)?,
        (None, None) => anyhow::bail!(
            "open the clients' QUIC port: a node alone has no certificate; hint: add a [tls] table, or leave clients_quic out"
        ),
    };
    let config = &app.config().clients;
    let bounds = ClientBounds { connections: config.connections, bodies: (config.body_bytes >> 20).max(1) };
    let door = ClientDoor::new(Arc::clone(app), router);
    tokio::spawn(clients::serve(endpoint, app.node().name.clone(), Arc::new(door), bounds));
    Ok(())
}

async fn load_tls(tls: &TlsConfig) -> anyhow::Result<(RustlsConfig, TlsConfig)> {
    let config = RustlsConfig::from_pem_file(&tls.certificate, &tls.key).await.with_context(|| {
        format!("read the TLS certificate {} and key {}", tls.certificate.display(), tls.key.display())
    })?;
    Ok((config, tls.clone()))
}

/// A listening port and how to stop it.
struct Port {
    address: SocketAddr,
    handle: Handle<SocketAddr>,
    task: JoinHandle<std::io::Result<()>>,
}

impl Port {
    fn open(
        listener: TcpListener,
        tls: Option<(RustlsConfig, TlsConfig)>,
        bounds: Bounds,
        router: axum::Router,
    ) -> Self {
        let address = listener.local_addr().expect("a bound listener has an address");
        let handle = Handle::new();
        let task = tokio::spawn(listen::serve(listener, tls.map(|(config, _)| config), handle.clone(), bounds, router));
        Self { address, handle, task }
    }

    async fn close(self, within: Duration) {
        self.handle.graceful_shutdown(Some(within));
        match self.task.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(address = %self.address, %error, "listener ended with an error"),
            Err(error) => tracing::warn!(address = %self.address, %error, "listener panicked"),
        }
    }
}

/// Returns when the node should stop: `Ok` on SIGTERM, SIGINT or an operator's call, the reason when its actors gave up.
async fn wait_for_end(
    app: &App,
    tls: Option<(RustlsConfig, TlsConfig)>,
    metrics: &PrometheusHandle,
    mut supervisor_end: JoinHandle<()>,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watch for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("watch for SIGHUP")?;
    let mut upkeep = tokio::time::interval(METRICS_UPKEEP_EVERY);
    loop {
        tokio::select! {
            _ = upkeep.tick() => metrics.run_upkeep(),
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            () = app.asked_to_end() => return Ok(()),
            _ = hangup.recv() => reload_tls(tls.as_ref()).await,
            _ = &mut supervisor_end => {
                app.start_draining();
                anyhow::bail!("keep the node running: its actors gave up; hint: the log above says which and why");
            }
        }
    }
}

async fn reload_tls(tls: Option<&(RustlsConfig, TlsConfig)>) {
    let Some((config, files)) = tls else { return };
    match config.reload_from_pem_file(&files.certificate, &files.key).await {
        Ok(()) => tracing::info!(certificate = %files.certificate.display(), "TLS certificate reloaded"),
        Err(error) => {
            tracing::error!(%error, certificate = %files.certificate.display(), "TLS certificate not reloaded, the old one stays")
        }
    }
}

/// Refuses new requests, waits for running ones up to the drain time (a second signal ends the wait), flushes.
async fn stop(app: Arc<App>, supervisor: ActorRef<SupervisorMsg>, clients: Port, admins: Port, orderly: bool) {
    if orderly {
        // Before the others send our tenants elsewhere.
        let _ = tokio::time::timeout(NAME_WITHIN, prewarm::before_leaving(&app)).await;
    }
    app.start_draining();
    app.say(NodePhase::Draining);
    tracing::info!(in_flight = app.n_in_flight(), "node stops");
    if orderly {
        let mut terminate = signal(SignalKind::terminate()).ok();
        let mut interrupt = signal(SignalKind::interrupt()).ok();
        let again = async {
            match (&mut terminate, &mut interrupt) {
                (Some(terminate), Some(interrupt)) => {
                    tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
                }
                _ => std::future::pending().await,
            }
        };
        let hand_over = app.cluster().map_or(Duration::ZERO, |_| HAND_OVER_WITHIN);
        tokio::select! {
            () = drained(&app) => {}
            () = tokio::time::sleep(app.config().drain.saturating_sub(hand_over)) => {
                tracing::warn!(in_flight = app.n_in_flight(), "drain time is over");
            }
            () = again => tracing::warn!("second signal, stopping at once"),
        }
    }
    if let Some(cluster) = app.cluster() {
        // What runs for other nodes goes on there; the time they need is theirs and short.
        app.say(NodePhase::Leaving);
        let _ = tokio::time::timeout(HAND_OVER_WITHIN, cluster.without_guests()).await;
    }
    for room in app.rooms().values() {
        for (_, payload) in room.queue.close() {
            payload.fail(node_stopping());
        }
    }
    app.fail_running();
    if let Some(cluster) = app.cluster() {
        cluster.net().close().await;
        cluster.settle_all_records().into_iter().for_each(|record| app.bill_for_another(record));
    }
    clients.close(Duration::from_secs(1)).await;
    admins.close(Duration::from_secs(1)).await;
    // Before its children end, so that it does not take their end for a failure.
    if let Err(error) = supervisor.stop_and_wait(None, None).await {
        tracing::debug!(%error, "the actors had ended already");
    }
    app.registry().stop().await;
    close_journal(app.journal().clone()).await;
    tracing::info!("node stopped");
}

/// Nothing waits, nothing runs, and what ran has reached its client.
async fn drained(app: &App) {
    while app.n_in_flight() > 0 || app.journal().open_records() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The last records are handed over while replies are being dropped, so the journal waits for them first.
async fn close_journal(journal: Journal) {
    let handed_over = async {
        while journal.open_records() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(RECORDS_WITHIN, handed_over).await.is_err() {
        tracing::error!(lost = journal.open_records(), "some requests did not end and leave no usage record");
    }
    if let Err(error) = tokio::task::spawn_blocking(move || journal.close()).await {
        tracing::error!(%error, "closing the usage journal panicked");
    }
}
