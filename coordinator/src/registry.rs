//! The tenant registry: the single source of truth for who is served and how.
//!
//! ```text
//! admin API ── Command ──► submit ──► the leader's actor ──► keeper ──► log, on a majority of the voters' disks
//!                                                                         │ on every node
//!               everyone ◄── Snapshot ◄── publish ◄── disk ◄── decide ◄───┘
//! ```
//!
//! The nodes that vote agree on one log of commands (openraft); every node applies it to a copy of its own. So
//! writes are linearizable wherever they are asked for, reads are local and go on without a leader, and any
//! minority of the voters may be lost. A node that is alone is a cluster of one: same code, one sync per write.
//!
//! [`Registry`] is the handle that the rest of the node holds. Reading is a pointer copy; only changes go
//! through the log. A node opens it with [`Registry::open`]; its supervisor takes the actor over with
//! [`Registry::link`] and, when it fails, calls [`Registry::respawn`]: every handle stays valid.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ractor::{Actor, ActorCell, ActorId, ActorRef, ActorStatus};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

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
mod disk;
pub mod cluster;
pub mod status;
mod raft;
mod election;
mod replica;
mod keeper;
mod submit;
pub mod actor;

use actor::{RegistryActor, RegistryArgs, RegistryMsg};
use cluster::{Cluster, Member};
use disk::{Content, Disk, Published};
use error::RegistryError;
use keeper::{Ground, Keeper};
use replica::Replica;
use secrets::Secrets;
use snapshot::Snapshot;
use state::RegistryState;
use status::Status;

/// Commands that may wait at once: far more than operators cause, and little memory.
pub const COMMANDS_WAITING_MAX: usize = 1024;

/// Bytes of one command: several times what the largest allowed contract takes.
pub const COMMAND_BYTES_MAX: usize = 64 << 10;

/// Longest wait for the actor to pass its commands on to the keeper, which takes microseconds each.
const DRAIN_WAIT_MAX: Duration = Duration::from_secs(1);

/// Where the registry lives and what opens it.
#[derive(Debug)]
pub struct RegistryOptions {
    /// Data directory; created with mode 0700 if absent.
    pub dir: PathBuf,
    /// The cluster's root secret.
    pub cluster_key: ClusterKey,
    /// Who else keeps it.
    pub cluster: Cluster,
}

impl RegistryOptions {
    /// Options for a node that is alone, for `dir` with the cluster key in `key_path`. The key file is created only together with a
    /// new registry: beside an existing one a fresh key would open nothing.
    ///
    /// # Errors
    /// [`RegistryError::Open`] when the key file cannot be used.
    pub fn load(dir: &Path, key_path: &Path) -> Result<Self, RegistryError> {
        let exists = dir.join("registry.redb").exists();
        let key = if exists { ClusterKey::load(key_path) } else { ClusterKey::load_or_create(key_path) };
        let cluster_key = key.map_err(|error| RegistryError::Open(error.to_string()))?;
        let me = "alone".parse().expect("a valid node name");
        Ok(Self { dir: dir.to_owned(), cluster_key, cluster: Cluster::alone(me) })
    }

    /// The same in a cluster.
    #[must_use]
    pub fn in_cluster(self, cluster: Cluster) -> Self {
        Self { cluster, ..self }
    }
}

/// The handle to the registry; clones are the same registry.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    ground: Ground,
    actor: Mutex<Option<ActorRef<RegistryMsg>>>,
    keeper: Arc<Mutex<Option<JoinHandle<()>>>>,
    credits: Arc<Semaphore>,
}

impl Registry {
    /// Opens or creates this node's copy and starts its actor; [`Self::link`] puts it under a supervisor. A node
    /// that is alone is ready for changes when this returns; in a cluster the others are found afterwards.
    ///
    /// # Errors
    /// [`RegistryError::Open`] with the reason.
    pub async fn open(options: RegistryOptions) -> Result<Self, RegistryError> {
        Self::open_on(options, Disk::thread).await
    }

    /// As [`Self::open`], for simulations, whose clock stands still while a task works: work on the file is done by
    /// whoever asks for it instead of a thread, and this thread's elections are drawn from `seed`.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_repeatable(options: RegistryOptions, seed: u64) -> Result<Self, RegistryError> {
        raft::runtime::seed(seed);
        Self::open_on(options, |content| Ok(Disk::inline(content))).await
    }

    async fn open_on(
        options: RegistryOptions,
        start_disk: fn(Content) -> std::io::Result<Disk>,
    ) -> Result<Self, RegistryError> {
        let RegistryOptions { dir, cluster_key, cluster } = options;
        let secrets = Arc::new(Secrets::new(cluster_key));
        let empty = Snapshot::build(&RegistryState::default(), secrets.clone());
        let empty = empty.map_err(|error| RegistryError::Open(error.to_string()))?;
        let published =
            Published { snapshot: Arc::new(watch::Sender::new(Arc::new(empty))), scrub_due: Arc::default() };
        let (status, replica) = (Arc::default(), Arc::new(watch::Sender::new(None)));
        let cluster = Arc::new(cluster);
        let ground = Ground { dir, secrets, cluster, published, status, replica, start_disk };
        let replica = ground.open().await?;
        let credits = Arc::new(Semaphore::new(COMMANDS_WAITING_MAX));
        let inner = Inner { ground, actor: Mutex::default(), keeper: Arc::default(), credits };
        let registry = Self { inner: Arc::new(inner) };
        registry.spawn(replica, None).await?;
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
    /// dropped before: it holds the way to the keeper, which is waited for.
    ///
    /// # Errors
    /// As [`Self::open`]; the last snapshot stays readable.
    pub async fn respawn(&self, supervisor: Option<ActorCell>) -> Result<(), RegistryError> {
        self.stop().await;
        let replica = self.inner.ground.open().await?;
        self.spawn(replica, supervisor).await
    }

    async fn spawn(&self, replica: Replica, supervisor: Option<ActorCell>) -> Result<(), RegistryError> {
        let inner = &self.inner;
        let keeper = Keeper { ground: inner.ground.clone(), replica: Some(replica) };
        let args = RegistryArgs { keeper, task: inner.keeper.clone() };
        let spawned = match supervisor {
            Some(supervisor) => RegistryActor::spawn_linked(None, RegistryActor, args, supervisor).await,
            None => RegistryActor::spawn(None, RegistryActor, args).await,
        };
        let (actor, _) = spawned.map_err(|error| RegistryError::Open(error.to_string()))?;
        *lock(&inner.actor) = Some(actor);
        Ok(())
    }

    /// Ends the actor and waits until the keeper has finished what it was given and let go of the directory.
    pub async fn stop(&self) {
        let actor = lock(&self.inner.actor).take();
        if let Some(actor) = actor.filter(|actor| actor.get_status() < ActorStatus::Stopping) {
            // Bounded, because one that ends at this very moment tells nobody; the keeper is waited for below.
            let _ = actor.drain_and_wait(Some(DRAIN_WAIT_MAX)).await;
        }
        let keeper = lock(&self.inner.keeper).take();
        if let Some(keeper) = keeper {
            let _ = keeper.await;
        }
    }

    /// The present actor, for its supervisor to recognise.
    pub fn actor_id(&self) -> Option<ActorId> {
        lock(&self.inner.actor).as_ref().map(|actor| actor.get_id())
    }

    /// The registry as this node knows it: with every change that was applied through this node, and with those of
    /// other nodes as they arrive.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.inner.ground.published.snapshot.borrow().clone()
    }

    /// Follows the snapshots as they come.
    pub fn subscribe(&self) -> watch::Receiver<Arc<Snapshot>> {
        self.inner.ground.published.snapshot.subscribe()
    }

    /// Follows the agreement: who leads, who takes part.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.inner.ground.status.subscribe()
    }

    /// The nodes that are to keep it, as configured.
    pub fn configured(&self) -> &[Member] {
        &self.inner.ground.cluster.members
    }

    /// Keys and random parts for commands.
    pub fn secrets(&self) -> &Secrets {
        &self.inner.ground.secrets
    }
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({:?} in {})", self.snapshot(), self.inner.ground.dir.display())
    }
}

/// A panic while one of these short locks is held leaves nothing half-done.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
#[cfg(test)]
mod cluster_tests;
