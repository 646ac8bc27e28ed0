//! Everything behind the doors: data folder, models, network, registry, stores, in this order.
//!
//! Called once, by [`super::start`]. The network comes before the registry, which talks through it, and after the
//! models, which it says are here.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use adapters::{AdapterCache, CacheConfig, DiskLoader, KeySource, Objects, Store};
use anyhow::Context;
use coordinator::auth::AdminKey;
use coordinator::journal::idempotency::RequestIds;
use coordinator::registry::cluster::{Cluster, Member, Timing};
use coordinator::registry::{Registry, RegistryOptions};
use coordinator::ring::RingKey;
use model::base::BaseModel;
use parking_lot::Mutex;
use shared::adapter::AdapterRef;
use shared::clock::Clock;
use shared::config::{AdapterConfig, BaseConfig, ClusterConfig, NodeConfig};
use shared::id::TenantId;
use shared::seal::TenantKey;
use wire::node::ServedBase;

use crate::app::upload::adapter_limits;
use crate::app::{App, AppParts};
use crate::base_room::{AdapterLoading, BaseRoom};
use crate::base_text::BaseText;
use crate::base_texts::BaseTexts;
use crate::cluster::{ClusterNode, Network};
use crate::metering::journal::Journal;

/// Opens everything.
pub(super) async fn open(
    config: ClusterConfig,
    node: NodeConfig,
    clock: Arc<dyn Clock>,
) -> anyhow::Result<(App, AdminKey)> {
    let data = &node.data;
    Network::is_let_in(&config, &node)?;
    create_private(data)?;
    let options =
        RegistryOptions::load(&data.join("registry"), &data.join("cluster.key")).context("open the registry")?;
    let ring_key = RingKey::derive(&*options.cluster_key.derive("tenantry 2026 placement of tenants"));
    let request_ids = RequestIds::derive(&*options.cluster_key.derive("tenantry 2026 ids of requests"));
    let admin_key =
        AdminKey::load_or_create(&data.join("admin.key"), &options.cluster_key).context("open the admin key")?;
    let mut models = BTreeMap::new();
    for base in config.bases.iter().filter(|base| node.bases.contains(&base.name)) {
        let model = load_model(base, clock.as_ref()).await?;
        let text = text(base.clone(), Arc::clone(&model), config.clone()).await?;
        models.insert(base.name.clone(), (model, Arc::new(text)));
    }
    let served = models.values().map(|(model, text)| served(model, text)).collect();
    let network = Network::open(&config, &node, served, Arc::clone(&clock))?;
    let options = match &network {
        Some(network) => options.in_cluster(registry_cluster(&config, &node, network)),
        None => options.in_cluster(Cluster::alone(node.name.clone())),
    };
    let registry = Registry::open(options).await.context("open the registry")?;
    let store = open_store(&config, data, &registry)?;
    let journal = Journal::open(&data.join("usage")).context("open the usage journal")?;
    let own: Vec<Arc<BaseText>> = models.values().map(|(_, text)| Arc::clone(text)).collect();
    let texts = Arc::new(BaseTexts::open(&config, data.join("texts"), &own));
    let mut rooms = BTreeMap::new();
    for (name, (model, text)) in models {
        let room = room(text, model, &config, &store, &registry, Arc::clone(&clock));
        rooms.insert(name, Arc::new(room));
    }
    let cluster = network.map(|network| ClusterNode::new(network, &config, &node.name, ring_key, Arc::clone(&clock)));
    let app = App::new(AppParts { config, node, clock, registry, rooms, texts, store, journal, cluster, request_ids });
    wake_engines_on_load(&app);
    Ok((app, admin_key))
}

fn served(model: &BaseModel, text: &BaseText) -> ServedBase {
    let (hash, numerics_id) = (model.info.hash, model.info.numerics_id());
    ServedBase { name: text.name.clone(), hash, text: Some(text.block.hash), numerics_id }
}

/// The text of a base that is loaded here, also for the nodes that do not host it.
async fn text(base: BaseConfig, model: Arc<BaseModel>, config: ClusterConfig) -> anyhow::Result<BaseText> {
    let made = tokio::task::spawn_blocking(move || {
        let block = model::text::pack(&base.path, model.info.hash).context("read the text of the base model")?;
        BaseText::of(base.name, &model, block.into(), &config)
    });
    made.await.context("read the text of the base model")?
}

fn registry_cluster(config: &ClusterConfig, node: &NodeConfig, network: &Network) -> Cluster {
    let member = |node: &NodeConfig| Member { node: node.name.clone(), votes: node.registry };
    Cluster {
        me: node.name.clone(),
        members: config.nodes.iter().map(member).collect(),
        transport: network.registry_transport(),
        timing: Timing::default(),
    }
}

async fn load_model(base: &BaseConfig, clock: &dyn Clock) -> anyhow::Result<Arc<BaseModel>> {
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
    Ok(model)
}

fn room(
    text: Arc<BaseText>,
    model: Arc<BaseModel>,
    config: &ClusterConfig,
    store: &Store,
    registry: &Registry,
    clock: Arc<dyn Clock>,
) -> BaseRoom {
    let loader = DiskLoader {
        store: store.clone(),
        keys: Arc::new(RegistryKeys(registry.clone())),
        base: Arc::clone(&model),
        limits: adapter_limits(config, &text.name),
    };
    let (cache, commands) = AdapterCache::new(cache_config(&config.adapters), clock);
    let loading = AdapterLoading { loader: Arc::new(loader), commands: Mutex::new(Some(commands)) };
    BaseRoom::new(text, model, cache, loading, config)
}

fn open_store(config: &ClusterConfig, data: &Path, registry: &Registry) -> anyhow::Result<Store> {
    let objects = config.adapters.objects.as_ref().map(Objects::open).transpose().context("open the object store")?;
    let is_alone = config.nodes.len() == 1;
    if objects.is_none() && !is_alone {
        tracing::warn!(
            "adapters.objects names no object store: an adapter uploaded through one node is served by no other"
        );
    }
    let disk_bytes = config.adapters.disk_bytes;
    let store = Store::open_before(&data.join("adapters"), disk_bytes, objects).context("open the adapter store")?;
    // In a cluster this node's copy of the registry may be late: only what can be fetched again may go.
    if is_alone || config.adapters.objects.is_some() {
        sweep(&store, registry).context("clean the adapter store")?;
    }
    share(store.clone());
    Ok(store)
}

/// Puts what was stored before there was an object store into it, while the node serves already.
fn share(store: Store) {
    tokio::task::spawn_blocking(move || match store.share() {
        Ok(0) => {}
        Ok(shared) => tracing::info!(shared, "adapter files were put into the object store"),
        Err(error) => tracing::error!(%error, "adapter files could not be put into the object store"),
    });
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
