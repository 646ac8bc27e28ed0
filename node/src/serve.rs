//! `tenantry node`: from a configuration file to a serving node, and from SIGTERM to a clean end.
//!
//! Order of start: configuration, data folder, registry, models, actors, ports. Nothing listens before
//! everything behind it works. Order of stop: refuse new requests, let running ones finish, flush, exit.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adapters::{AdapterCache, CacheConfig, DiskLoader, KeySource, Objects, Store};
use anyhow::Context;
use axum_server::Handle;
use axum_server::tls_rustls::RustlsConfig;
use coordinator::auth::AdminKey;
use coordinator::registry::cluster::Cluster;
use coordinator::registry::{Registry, RegistryOptions};
use metrics_exporter_prometheus::PrometheusHandle;
use parking_lot::Mutex;
use ractor::{Actor, ActorCell, ActorRef};
use shared::adapter::AdapterRef;
use shared::clock::{Clock, SystemClock};
use shared::config::{AdapterConfig, BaseConfig, ClusterConfig, NodeConfig, TlsConfig};
use shared::id::{NodeId, TenantId};
use shared::seal::TenantKey;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use crate::admin::{self, Admin};
use crate::app::upload::adapter_limits;
use crate::app::{App, AppParts};
use crate::base_room::{AdapterLoading, BaseRoom};
use crate::gateway;
use crate::gateway::backend::node_stopping;
use crate::gateway::listen::{self, Bounds};
use crate::metering::journal::Journal;
use crate::metrics;
use crate::supervisor::{NodeSupervisor, SupervisorArgs, SupervisorMsg};

/// Histogram samples wait in memory until they are sorted into buckets; without a scraper nobody else does it.
const METRICS_UPKEEP_EVERY: Duration = Duration::from_secs(5);

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
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
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
    let operators = TcpListener::bind(node.admin).with_context(|| format!("listen for operators on {}", node.admin))?;
    let metrics = metrics::install().context("install the metrics recorder")?;
    let (app, admin_key) = open(config, node, Arc::clone(&clock)).await?;
    let app = Arc::new(app);
    app.follow_registry();
    let supervisor_args =
        SupervisorArgs { rooms: app.rooms().values().cloned().collect(), registry: app.registry().clone(), clock };
    let (supervisor, supervisor_end) = NodeSupervisor::spawn(None, NodeSupervisor, supervisor_args)
        .await
        .map_err(|error| anyhow::anyhow!("start the node's actors: {error}"))?;

    let client_router = gateway::router(Arc::clone(&app), app.config().clients.body_bytes);
    let admin_router =
        admin::router(Arc::new(Admin { app: Arc::clone(&app), key: admin_key, metrics: metrics.clone() }));
    let bounds = Bounds::new(&app.config().clients);
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

/// Everything behind the doors.
async fn open(config: ClusterConfig, node: NodeConfig, clock: Arc<dyn Clock>) -> anyhow::Result<(App, AdminKey)> {
    let data = &node.data;
    create_private(data)?;
    let options =
        RegistryOptions::load(&data.join("registry"), &data.join("cluster.key")).context("open the registry")?;
    let options = options.in_cluster(Cluster::alone(node.name.clone()));
    let admin_key =
        AdminKey::load_or_create(&data.join("admin.key"), &options.cluster_key).context("open the admin key")?;
    let registry = Registry::open(options).await.context("open the registry")?;
    let objects = config.adapters.objects.as_ref().map(Objects::open).transpose().context("open the object store")?;
    if config.nodes.len() > 1 {
        tracing::warn!("this version does not join nodes into a cluster: each serves alone, with tenants of its own");
    }
    let disk_bytes = config.adapters.disk_bytes;
    let store = Store::open_before(&data.join("adapters"), disk_bytes, objects).context("open the adapter store")?;
    // In a cluster this node's copy of the registry may be late: only what can be fetched again may go.
    if config.nodes.len() == 1 || config.adapters.objects.is_some() {
        sweep(&store, &registry).context("clean the adapter store")?;
    }
    share(store.clone());
    let journal = Journal::open(&data.join("usage")).context("open the usage journal")?;
    let mut rooms = BTreeMap::new();
    for base in config.bases.iter().filter(|base| node.bases.contains(&base.name)) {
        let room = load_base(base, &config, &store, &registry, Arc::clone(&clock)).await?;
        rooms.insert(base.name.clone(), Arc::new(room));
    }
    let app = App::new(AppParts { config, node, clock, registry, rooms, store, journal });
    wake_engines_on_load(&app);
    Ok((app, admin_key))
}

/// Removes adapter files that no tenant's record names: a crash between two steps of a change left them.
fn sweep(store: &Store, registry: &Registry) -> Result<(), adapters::StoreError> {
    let snapshot = registry.snapshot();
    let views = snapshot.tenants();
    let copies = views.iter().flat_map(|view| {
        let record = view.record();
        let copy = |hash| AdapterRef { tenant: record.tenant().clone(), hash };
        record.adapters.values().map(move |adapter| copy(adapter.hash).id())
    });
    let removed = store.sweep(&copies.collect())?;
    if removed > 0 {
        tracing::info!(removed, "adapter files that nobody names were removed");
    }
    Ok(())
}

/// Puts what was stored before there was an object store into it, while the node serves already.
fn share(store: Store) {
    tokio::task::spawn_blocking(move || match store.share() {
        Ok(0) => {}
        Ok(shared) => tracing::info!(shared, "adapter files were put into the object store"),
        Err(error) => tracing::error!(%error, "adapter files could not be put into the object store"),
    });
}

async fn load_base(
    base: &BaseConfig,
    config: &ClusterConfig,
    store: &Store,
    registry: &Registry,
    clock: Arc<dyn Clock>,
) -> anyhow::Result<BaseRoom> {
    let wanted = base.clone();
    let started = clock.now();
    let model =
        tokio::task::spawn_blocking(move || BaseRoom::load_model(&wanted)).await.context("load the base model")??;
    tracing::info!(
        base = %base.name,
        took_ms = clock.now().saturating_duration_since(started).as_millis(),
        weight_bytes = model.weights.bytes(),
        hash = %model.info.hash.short(),
        kernels = kernels::backend::describe(),
        "base model loaded"
    );
    let loader = DiskLoader {
        store: store.clone(),
        keys: Arc::new(RegistryKeys(registry.clone())),
        base: Arc::clone(&model),
        limits: adapter_limits(config, &base.name),
    };
    let (cache, commands) = AdapterCache::new(cache_config(&config.adapters), clock);
    let loading =
        AdapterLoading { loader: Arc::new(loader), store: store.clone(), commands: Mutex::new(Some(commands)) };
    BaseRoom::new(base.name.clone(), model, cache, loading, config)
}

fn cache_config(adapters: &AdapterConfig) -> CacheConfig {
    CacheConfig {
        slots: adapters.slots,
        engine_bytes: adapters.engine_bytes,
        host_bytes: adapters.host_bytes,
        loads_at_once: adapters.loads_at_once,
    }
}

/// An engine that waits for an adapter wakes when it is there.
fn wake_engines_on_load(app: &App) {
    for room in app.rooms().values() {
        let queue = room.queue.clone();
        room.cache.set_waker(Arc::new(move || queue.wake()));
    }
}

/// Tenants' keys for the adapter loader, from the registry's snapshot.
struct RegistryKeys(Registry);

impl KeySource for RegistryKeys {
    fn tenant_key(&self, tenant: &TenantId) -> Option<Arc<TenantKey>> {
        self.0.snapshot().tenant(tenant).map(|view| Arc::clone(view.key()))
    }
}

fn create_private(folder: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("create the data folder {}", folder.display()))
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

/// Returns when the node should stop: `Ok` on SIGTERM or SIGINT, the reason when its actors gave up.
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
    app.start_draining();
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
        tokio::select! {
            () = drained(&app) => {}
            () = tokio::time::sleep(app.config().drain) => tracing::warn!(in_flight = app.n_in_flight(), "drain time is over"),
            () = again => tracing::warn!("second signal, stopping at once"),
        }
    }
    for room in app.rooms().values() {
        for (_, payload) in room.queue.close() {
            payload.fail(node_stopping());
        }
    }
    app.fail_running();
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
