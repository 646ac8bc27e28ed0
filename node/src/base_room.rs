//! Everything of one base model that this node hosts: weights, queue, adapters, and how its engine fares.
//!
//! Built once at start; the actors below the supervisor keep its parts moving, the app submits into it. What takes
//! requests, also for bases of other nodes, is [`crate::base_text`].

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use adapters::cache::Command;
use adapters::{AdapterCache, Loader};
use arc_swap::ArcSwap;
use model::base::BaseModel;
use model::forward::RuntimeOptions;
use model::info::Numerics;
use parking_lot::Mutex;
use queue::{FairConfig, Queue};
use scheduler::engine::{EngineConfig, EngineSnapshot, EngineStats};
use scheduler::plan::reserve::ClassReserve;
use shared::config::{BaseConfig, ClusterConfig};
use shared::id::{BaseName, TenantId};
use tokio::sync::mpsc;

use crate::base_text::{BaseText, kv_pages};
use crate::engine_source::Payload;

/// Longest that the other classes may keep a reserved class's row waiting: one step of the default size on two
/// slow cores.
const RESERVE_DELAY_MAX: std::time::Duration = std::time::Duration::from_millis(50);
/// KV pages per tenant that other tenants' prefixes cannot push out.
const CACHE_FLOOR_PAGES: u32 = 16;

/// One base model of this node.
pub struct BaseRoom {
    /// Name that requests use.
    pub name: BaseName,
    /// The frozen model.
    pub model: Arc<BaseModel>,
    /// What of it is text.
    pub text: Arc<BaseText>,
    /// Whose turn it is.
    pub queue: Queue<Payload>,
    /// Which adapters are in memory.
    pub cache: AdapterCache,
    /// What the cache's actor works with.
    pub adapter_loading: AdapterLoading,
    /// How the engine is set up.
    pub engine: EngineOptions,
    /// Numbers of the running engine.
    pub stats: ArcSwap<EngineStats>,
    /// Counters of the engines before it.
    earlier: Mutex<EngineSnapshot>,
    /// Deleted tenants whose cached pages the engine has still to drop.
    erased: Mutex<Vec<TenantId>>,
    up: AtomicBool,
}

/// How adapters of a base get into memory.
pub struct AdapterLoading {
    /// Does the loading.
    pub loader: Arc<dyn Loader>,
    /// The cache's commands, until its actor takes them.
    pub commands: Mutex<Option<mpsc::UnboundedReceiver<Command>>>,
}

/// Settings of a base's engine, kept to start it again.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// For the forward pass.
    pub runtime: RuntimeOptions,
    /// For the loop.
    pub scheduling: EngineConfig,
}

// === impl BaseRoom ===

impl BaseRoom {
    /// Puts the parts of a loaded base together.
    pub fn new(
        text: Arc<BaseText>,
        model: Arc<BaseModel>,
        cache: AdapterCache,
        adapter_loading: AdapterLoading,
        config: &ClusterConfig,
    ) -> Self {
        Self {
            engine: EngineOptions::new(&text, config),
            queue: Queue::new(text.name.clone(), fair_config(config)),
            stats: ArcSwap::default(),
            earlier: Mutex::default(),
            erased: Mutex::default(),
            up: AtomicBool::new(false),
            name: text.name.clone(),
            model,
            text,
            cache,
            adapter_loading,
        }
    }

    /// Loads the weights named in the configuration.
    ///
    /// # Errors
    /// With the path and the loader's reason.
    pub fn load_model(base: &BaseConfig) -> anyhow::Result<Arc<BaseModel>> {
        let numerics = if base.exact { Numerics::Exact } else { rounded_numerics() };
        let mut model = BaseModel::load_shared(&base.path, numerics, base.panels.as_deref())
            .map_err(|error| load_failed(&base.path, &error))?;
        if numerics == Numerics::Gpu
            && let Err(reason) = model::gpu::supports(&model.info)
        {
            tracing::warn!(%reason, "computing on the CPU");
            model.info.numerics = Numerics::Fast;
        }
        Ok(Arc::new(model))
    }

    /// Longest sequence served: the model's context, or what the KV memory holds if that is less.
    pub fn context(&self) -> usize {
        self.text.context
    }

    /// The engine is to drop what it keeps of a deleted tenant; it looks in every step and when idle.
    pub fn erase(&self, tenant: &TenantId) {
        self.text.grammars.forget(tenant);
        self.erased.lock().push(tenant.clone());
        self.queue.wake();
    }

    /// Taken by the engine.
    pub fn take_erased(&self) -> Vec<TenantId> {
        std::mem::take(&mut *self.erased.lock())
    }

    /// A new engine counts in `stats` from now on; what the one before it counted stays counted.
    pub fn engine_started(&self, stats: Arc<EngineStats>) {
        let mut earlier = self.earlier.lock();
        *earlier = self.stats.swap(stats).snapshot().after(&earlier);
    }

    /// State of the running engine, with counters since the node started.
    pub fn engine_totals(&self) -> EngineSnapshot {
        let earlier = self.earlier.lock();
        self.stats.load().snapshot().after(&earlier)
    }

    /// Whether the engine thread runs.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Acquire)
    }

    /// Told by the engine's actor.
    pub fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::Release);
    }
}

/// A GPU's where the binary was built for one and this machine has it.
fn rounded_numerics() -> Numerics {
    if !cfg!(feature = "cuda") {
        return Numerics::Fast;
    }
    match kernels::cuda::available() {
        Ok(()) => Numerics::Gpu,
        Err(reason) => {
            tracing::warn!(%reason, "computing on the CPU");
            Numerics::Fast
        }
    }
}

fn load_failed(path: &Path, error: &model::base::LoadError) -> anyhow::Error {
    let hint =
        if path.exists() { "" } else { "; hint: scripts/fetch-model gets the model of the shipped cluster.toml" };
    anyhow::anyhow!("load the base model {}: {error}{hint}", path.display())
}

/// Places in the batch that only a class may take, given the shares of step time reserved for each: step time is of no
/// use to a class that cannot get a place.
pub fn places(reserves: [f64; 3], sequences: usize) -> [u32; 3] {
    reserves.map(|share| (share * sequences as f64) as u32)
}

/// The engine's side of these reserves.
pub fn reserve(reserves: [f64; 3]) -> ClassReserve {
    ClassReserve { shares: reserves.map(|share| share as f32), delay_max: RESERVE_DELAY_MAX }
}

fn fair_config(config: &ClusterConfig) -> FairConfig {
    FairConfig {
        prefill_weight: config.queue.prefill_weight,
        decode_weight: config.queue.decode_weight,
        class_weights: config.queue.class_weights,
        pass_tokens_max: config.queue.pass_tokens_max,
        waiting_max: config.queue.depth_total,
        tenant_waiting_max: config.queue.depth_tenant,
        class_sequences_reserved: places(config.engine.reserves, config.engine.sequences),
        ..FairConfig::default()
    }
}

// === impl EngineOptions ===

impl EngineOptions {
    fn new(text: &BaseText, config: &ClusterConfig) -> Self {
        let engine = &config.engine;
        let runtime = RuntimeOptions {
            threads: engine.threads,
            rows_max: engine.rows_per_step,
            kv_bytes: engine.kv_bytes,
            n_logits_max: engine.sequences,
            poison_freed_pages: true,
        };
        let n_pages = kv_pages(&text.info, config);
        let quota = (n_pages as f64 * engine.prefix_cache_share) as u32;
        let scheduling = EngineConfig {
            sequences_max: engine.sequences,
            prefill_rows_max: engine.prefill_chunk,
            prefill_stretch: engine.prefill_stretch,
            logits_rows_max: engine.sequences,
            reserve: reserve(engine.reserves),
            prefix_cache: quota > 0,
            cache_quota_pages: quota,
            cache_floor_pages: CACHE_FLOOR_PAGES.min(quota),
            ..EngineConfig::new(text.info.hash, text.context)
        };
        Self { runtime, scheduling }
    }
}
