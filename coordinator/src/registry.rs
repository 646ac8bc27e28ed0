//! The tenant registry: the single source of truth for who is served and how.
//!
//! ```text
//! admin API ── Command ──► actor ──► writer thread: decide → disk → publish ──► Snapshot ──► everyone
//! ```
//!
//! [`Registry`] is the handle that the rest of the node holds. Reading is a pointer copy; only changes go
//! through the actor. A node opens it with [`Registry::open`]; its supervisor takes the actor over with
//! [`Registry::link`] and, when it fails, calls [`Registry::respawn`]: every handle stays valid.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ractor::{Actor, ActorCell, ActorId, ActorRef, ActorStatus};
use tokio::sync::{Semaphore, oneshot, watch};

use shared::seal::ClusterKey;

pub mod record;
pub mod command;
pub mod error;
pub mod bounds;
pub mod state;
pub mod secrets;
pub mod snapshot;
mod shard_map;
pub mod store;
mod writer;
pub mod actor;

use actor::{RegistryActor, RegistryArgs, RegistryMsg};
use command::{Applied, Command};
use error::RegistryError;
use secrets::Secrets;
use snapshot::Snapshot;
use state::RegistryState;
use store::Store;
use writer::{Job, Writer};

/// Commands that may wait at once: far more than operators cause, and little memory.
pub const COMMANDS_WAITING_MAX: usize = 1024;

/// Longest wait for the actor to pass its commands on to the writer, which takes microseconds each.
const DRAIN_WAIT_MAX: Duration = Duration::from_secs(1);

/// Where the registry lives and what opens it.
#[derive(Debug)]
pub struct RegistryOptions {
    /// Data directory; created with mode 0700 if absent.
    pub dir: PathBuf,
    /// The cluster's root secret.
    pub cluster_key: ClusterKey,
}

impl RegistryOptions {
    /// Options for `dir` with the cluster key in `key_path`. The key file is created only together with a
    /// new registry: beside an existing one a fresh key would open nothing.
    ///
    /// # Errors
    /// [`RegistryError::Open`] when the key file cannot be used.
    pub fn load(dir: &Path, key_path: &Path) -> Result<Self, RegistryError> {
        let exists = dir.join("registry.redb").exists();
        let key = if exists { ClusterKey::load(key_path) } else { ClusterKey::load_or_create(key_path) };
        let cluster_key = key.map_err(|error| RegistryError::Open(error.to_string()))?;
        Ok(Self { dir: dir.to_owned(), cluster_key })
    }
}

/// The handle to the registry; clones are the same registry.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    secrets: Arc<Secrets>,
    published: Arc<watch::Sender<Arc<Snapshot>>>,
    actor: Mutex<Option<ActorRef<RegistryMsg>>>,
    writer: Arc<Mutex<Option<JoinHandle<()>>>>,
    credits: Arc<Semaphore>,
}

impl Registry {
    /// Opens or creates the registry and starts its actor; [`Self::link`] puts it under a supervisor.
    ///
    /// # Errors
    /// [`RegistryError::Open`] with the reason.
    pub async fn open(options: RegistryOptions) -> Result<Self, RegistryError> {
        let RegistryOptions { dir, cluster_key } = options;
        let secrets = Arc::new(Secrets::new(cluster_key));
        let (store, state, snapshot) = open_blocking(&dir, &secrets).await?;
        let inner = Inner {
            dir,
            secrets,
            published: Arc::new(watch::Sender::new(Arc::new(snapshot))),
            actor: Mutex::default(),
            writer: Arc::default(),
            credits: Arc::new(Semaphore::new(COMMANDS_WAITING_MAX)),
        };
        let registry = Self { inner: Arc::new(inner) };
        registry.spawn((store, state), None).await?;
        Ok(registry)
    }

    /// Puts the running actor under `supervisor`, which hears of its end from now on. `None` when it has ended
    /// already: then [`Self::respawn`] is due.
    pub fn link(&self, supervisor: ActorCell) -> Option<ActorId> {
        let actor = lock(&self.inner.actor).clone()?;
        actor.get_cell().link(supervisor);
        // Looked at afterwards: an end before the link was told to nobody.
        (actor.get_status() < ActorStatus::Draining).then(|| actor.get_id())
    }

    /// Starts a new actor after the former one failed, from what is on disk. The former one's last state must be
    /// dropped before: it holds the writer, which is waited for.
    ///
    /// # Errors
    /// As [`Self::open`]; the last snapshot stays readable.
    pub async fn respawn(&self, supervisor: Option<ActorCell>) -> Result<(), RegistryError> {
        self.stop().await;
        let (store, state, snapshot) = open_blocking(&self.inner.dir, &self.inner.secrets).await?;
        self.inner.published.send_replace(Arc::new(snapshot));
        self.spawn((store, state), supervisor).await
    }

    async fn spawn(&self, content: (Store, RegistryState), supervisor: Option<ActorCell>) -> Result<(), RegistryError> {
        let inner = &self.inner;
        let writer = Writer::new(inner.dir.clone(), inner.secrets.clone(), content, inner.published.clone());
        let args = RegistryArgs { writer, thread: inner.writer.clone() };
        let spawned = match supervisor {
            Some(supervisor) => RegistryActor::spawn_linked(None, RegistryActor, args, supervisor).await,
            None => RegistryActor::spawn(None, RegistryActor, args).await,
        };
        let (actor, _) = spawned.map_err(|error| RegistryError::Open(error.to_string()))?;
        *lock(&inner.actor) = Some(actor);
        Ok(())
    }

    /// Ends the actor and waits until the writer has finished what it was given and let go of the directory.
    pub async fn stop(&self) {
        let actor = lock(&self.inner.actor).take();
        if let Some(actor) = actor.filter(|actor| actor.get_status() < ActorStatus::Stopping) {
            // Bounded, because one that ends at this very moment tells nobody; the writer is waited for below.
            let _ = actor.drain_and_wait(Some(DRAIN_WAIT_MAX)).await;
        }
        let writer = lock(&self.inner.writer).take();
        if let Some(writer) = writer {
            let _ = tokio::task::spawn_blocking(move || writer.join()).await;
        }
    }

    /// The present actor, for its supervisor to recognise.
    pub fn actor_id(&self) -> Option<ActorId> {
        lock(&self.inner.actor).as_ref().map(|actor| actor.get_id())
    }

    /// The registry as it is now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.inner.published.borrow().clone()
    }

    /// Follows the snapshots as they come.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.inner.published.subscribe()
    }

    /// Keys and random parts for commands.
    pub fn secrets(&self) -> &Secrets {
        &self.inner.secrets
    }

    /// Applies one command. When it returns `Ok`, the change is on disk and in [`Self::snapshot`]. A command
    /// whose caller stops waiting is still carried out.
    ///
    /// # Errors
    /// Why the command was refused; [`RegistryError::Storage`] and [`RegistryError::Unavailable`] leave open
    /// whether it was carried out.
    pub async fn apply(&self, command: impl Into<Command>) -> Result<Applied, RegistryError> {
        let busy = |_| RegistryError::Busy { max: COMMANDS_WAITING_MAX };
        let credit = self.inner.credits.clone().try_acquire_owned().map_err(busy)?;
        let (reply, answer) = oneshot::channel();
        let job = Job { command: command.into(), reply, credit };
        let actor = lock(&self.inner.actor).clone().ok_or(RegistryError::Unavailable)?;
        actor.send_message(RegistryMsg::Apply(job)).map_err(|_| RegistryError::Unavailable)?;
        answer.await.unwrap_or(Err(RegistryError::Unavailable))
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({:?} in {})", self.snapshot(), self.inner.dir.display())
    }
}

/// A panic while one of these short locks is held leaves nothing half-done.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn open_blocking(dir: &Path, secrets: &Arc<Secrets>) -> Result<(Store, RegistryState, Snapshot), RegistryError> {
    let (dir, secrets) = (dir.to_owned(), secrets.clone());
    let opened = tokio::task::spawn_blocking(move || writer::open(&dir, &secrets)).await;
    opened.unwrap_or_else(|error| Err(RegistryError::Open(error.to_string())))
}

#[cfg(test)]
mod tests;
