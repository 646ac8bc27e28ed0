//! `AdapterCacheActor`: performs the cache's commands off the hot path.
//!
//! Supervised by the node supervisor. Commands come from the cache's handle through its channel (a pump task
//! turns them into messages), results come back from blocking threads; both are bounded by the loads allowed
//! at once and by the adapters leaving, so the mailbox needs no further credit. A panicking loader is caught
//! on its thread and is a failed load. What is resident lives in the cache, not here: if the actor ends, the
//! cache goes on serving it but loads nothing more, so the supervisor replaces cache and actor together.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use ractor::{Actor, ActorProcessingErr, ActorRef};
use shared::adapter::AdapterRef;
use shared::clock::Clock;
use shared::id::{BaseName, TenantId};
use tokio::sync::mpsc;

use crate::cache::{Command, LoadJob, Loaded};
use crate::handle::AdapterCache;
use crate::loader::{LoadError, Loader};
use crate::metrics;

#[cfg(test)]
mod tests;

/// How late a want may end.
pub const TICK: Duration = Duration::from_secs(1);

/// What the actor is told.
#[derive(Debug)]
pub enum AdapterCacheMsg {
    /// Sent by the pump: the cache wants something done.
    Perform(Command),
    /// Sent by a load's thread when it has the files.
    FilesRead {
        /// Which load.
        number: u64,
    },
    /// Sent by a load's thread when it is done.
    LoadFinished {
        /// Which load.
        number: u64,
        /// Of which adapter.
        adapter: AdapterRef,
        /// What came of it.
        result: Result<Loaded, LoadError>,
    },
    /// Sent by its own timer.
    Tick,
}

/// What the actor needs to start.
pub struct AdapterCacheArgs {
    /// The cache it works for.
    pub cache: AdapterCache,
    /// The cache's commands, from [`AdapterCache::new`].
    pub commands: mpsc::UnboundedReceiver<Command>,
    /// Does the loading.
    pub loader: Arc<dyn Loader>,
    /// Where it reads the time.
    pub clock: Arc<dyn Clock>,
    /// Base of its adapters.
    pub base: BaseName,
    /// What the metrics call a tenant; must have a bounded number of values.
    pub tenant_label: fn(&TenantId) -> String,
}

impl fmt::Debug for AdapterCacheArgs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdapterCacheArgs").field("cache", &self.cache).finish_non_exhaustive()
    }
}

/// The actor.
#[derive(Debug, Default)]
pub struct AdapterCacheActor;

/// The actor's working state.
pub struct AdapterCacheState {
    cache: AdapterCache,
    loader: Arc<dyn Loader>,
    clock: Arc<dyn Clock>,
    base: BaseName,
    tenant_label: fn(&TenantId) -> String,
}

impl Actor for AdapterCacheActor {
    type Msg = AdapterCacheMsg;
    type State = AdapterCacheState;
    type Arguments = AdapterCacheArgs;

    async fn pre_start(
        &self,
        myself: ActorRef<Self::Msg>,
        args: Self::Arguments,
    ) -> Result<Self::State, ActorProcessingErr> {
        let AdapterCacheArgs { cache, mut commands, loader, clock, base, tenant_label } = args;
        myself.send_interval(TICK, || AdapterCacheMsg::Tick);
        tokio::spawn(async move {
            while let Some(command) = commands.recv().await {
                if myself.cast(AdapterCacheMsg::Perform(command)).is_err() {
                    return;
                }
            }
        });
        Ok(AdapterCacheState { cache, loader, clock, base, tenant_label })
    }

    async fn handle(
        &self,
        myself: ActorRef<Self::Msg>,
        message: Self::Msg,
        state: &mut Self::State,
    ) -> Result<(), ActorProcessingErr> {
        match message {
            AdapterCacheMsg::Perform(Command::Load(job)) => state.on_load(myself, job),
            AdapterCacheMsg::Perform(Command::Retire(retired)) => {
                // Wiping tens of megabytes takes milliseconds.
                tokio::task::spawn_blocking(move || drop(retired));
            }
            AdapterCacheMsg::FilesRead { number } => state.cache.files_read(number),
            AdapterCacheMsg::LoadFinished { number, adapter, result } => {
                state.on_load_finished(number, &adapter, result);
            }
            AdapterCacheMsg::Tick => state.cache.expire(),
        }
        Ok(())
    }
}

// === impl AdapterCacheState ===

impl AdapterCacheState {
    fn on_load(&self, myself: ActorRef<AdapterCacheMsg>, job: LoadJob) {
        let (loader, clock) = (Arc::clone(&self.loader), Arc::clone(&self.clock));
        let (base, tenant) = (self.base.clone(), (self.tenant_label)(&job.adapter.tenant));
        tokio::task::spawn_blocking(move || {
            let (number, adapter) = (job.number, job.adapter.clone());
            let tier = match (&job.host, job.pack) {
                (Some(_), _) => "host",
                (None, true) => "disk",
                (None, false) => "prefetch",
            };
            let started = clock.now();
            let has_files = || {
                let _ = myself.cast(AdapterCacheMsg::FilesRead { number });
            };
            let result = perform(loader.as_ref(), job, has_files);
            if result.is_ok() {
                metrics::loaded(&base, tenant, tier, clock.now().saturating_duration_since(started));
            }
            // A stopped actor has no use for it; its memory goes here.
            let _ = myself.cast(AdapterCacheMsg::LoadFinished { number, adapter, result });
        });
    }

    fn on_load_finished(&self, number: u64, adapter: &AdapterRef, result: Result<Loaded, LoadError>) {
        let (tenant_id, adapter) = (&adapter.tenant, adapter.hash.short());
        match &result {
            Ok(_) => tracing::debug!(%tenant_id, adapter, "adapter loaded"),
            Err(error) => tracing::warn!(%tenant_id, adapter, %error, "adapter failed to load"),
        }
        self.cache.finished(number, result);
    }
}

/// Runs one load; a panic in the loader is a failed load, not the end of the cache.
/// `has_files` is called between reading and packing.
pub fn perform(loader: &dyn Loader, job: LoadJob, has_files: impl Fn()) -> Result<Loaded, LoadError> {
    let attempt = || {
        let files = match &job.host {
            Some(files) => Arc::clone(files),
            None => Arc::new(loader.fetch(&job.adapter)?),
        };
        has_files();
        let packed = if job.pack { Some(Arc::new(loader.pack(&job.adapter.hash, &files)?)) } else { None };
        if packed.as_ref().is_some_and(|packed| packed.hash != job.adapter.hash) {
            return Err(LoadError::Damaged);
        }
        Ok(Loaded { files, packed })
    };
    catch_unwind(AssertUnwindSafe(attempt)).unwrap_or_else(|_| {
        tracing::error!(tenant_id = %job.adapter.tenant, adapter = %job.adapter.hash.short(), "the adapter loader panicked");
        Err(LoadError::Panicked)
    })
}
