//! The registry's content and the one place where it changes: state, file and published snapshot move together.
//!
//! A thread of its own does the work, since every sync blocks; callers wait for their piece. What was written
//! without a sync is synced once the thread has been idle for a moment. After any failure the content is let go:
//! what is on disk is then unknown, and [`super::keeper`] opens and reads it again. Openraft waits for each of its
//! calls, so that only a handful are ever queued: one per peer it replicates to, and three of its own.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use openraft::{BasicNode, EntryPayload, LogId, Membership, SnapshotMeta, StoredMembership};
use tokio::sync::{oneshot, watch};

use super::cluster::Cluster;
use super::command::random_id;
use super::error::RegistryError;
use super::raft::types::{Answers, Entry, Position, member, raft_id};
use super::record;
use super::secrets::Secrets;
use super::snapshot::{Fence, Snapshot};
use super::state::{Change, Changes, Image, RegistryState};
use super::store::tables::RegistryId;
use super::store::{Store, StoreError};
use shared::id::NodeId;

/// Idle time after which unsynced writes are synced: longer than the pause between two batches.
const SYNC_AFTER_IDLE: Duration = Duration::from_millis(20);

/// What readers and the keeper see of the content.
#[derive(Debug, Clone)]
pub(super) struct Published {
    /// The state.
    pub(super) snapshot: Arc<watch::Sender<Arc<Snapshot>>>,
    /// Up to where the log must be compacted so that erased keys can go.
    pub(super) scrub_due: Arc<watch::Sender<Option<u64>>>,
}

/// The state as of one entry, from which a snapshot for another node is spelled when it is asked for.
pub(super) struct Built {
    /// Openraft's description of it.
    pub(super) meta: SnapshotMeta<u64, BasicNode>,
    image: Image,
}

impl Built {
    /// Its bytes.
    pub(super) fn bytes(&self) -> Vec<u8> {
        record::encode(&self.image)
    }
}

/// Everything that changes.
pub(super) struct Content {
    pub(super) store: Store,
    pub(super) position: Position,
    pub(super) built: Option<Arc<Built>>,
    state: RegistryState,
    published: Published,
}

impl Content {
    /// Reads what is in `store`.
    ///
    /// # Errors
    /// When it is damaged or belongs to another cluster key.
    pub(super) fn read(store: Store, secrets: Arc<Secrets>) -> Result<Self, StoreError> {
        let (state, position) = store.read()?;
        let snapshot = Snapshot::build(&state, secrets)?.under(fence_of(position.applied.as_ref()));
        let published = Published {
            snapshot: Arc::new(watch::Sender::new(Arc::new(snapshot))),
            scrub_due: Arc::new(watch::Sender::new(store.scrub_due())),
        };
        Ok(Self { store, position, built: None, state, published })
    }

    /// Opens the directory and reads it. Blocks.
    ///
    /// # Errors
    /// As [`Store::open`] and [`Self::read`].
    pub(super) fn open(dir: &Path, secrets: &Arc<Secrets>) -> Result<Self, RegistryError> {
        let opened = Store::open(dir, &secrets.fingerprint()).and_then(|store| Self::read(store, secrets.clone()));
        opened.map_err(|error| RegistryError::Open(error.to_string()))
    }

    /// Shows its content to these readers from now on.
    ///
    /// # Errors
    /// When a tenant's key does not open.
    pub(super) fn publish_to(&mut self, published: Published) -> Result<(), StoreError> {
        let next = published.snapshot.borrow().replaced_by(&self.state)?;
        published.snapshot.send_replace(Arc::new(next.under(fence_of(self.position.applied.as_ref()))));
        published.scrub_due.send_replace(self.store.scrub_due());
        self.published = published;
        Ok(())
    }

    /// Which registry this is. A node that is alone founds its own; so does one whose tenants were stored before
    /// registries had ids. The others wait for a leader to call, or for [`super::keeper`] to found theirs.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) fn settle(&mut self, cluster: &Cluster) -> Result<Option<RegistryId>, StoreError> {
        let Some(id) = self.store.registry_id()? else {
            if !cluster.is_alone() && self.state.epoch() == 0 {
                return Ok(None);
            }
            let id = random_id();
            self.found(id, &cluster.me)?;
            return Ok(Some(id));
        };
        let membership = self.position.membership.membership();
        let was_alone = membership.nodes().count() == 1;
        if was_alone && membership.get_node(&raft_id(&cluster.me)).is_none() {
            tracing::warn!(me = %cluster.me, "this node has a new name; it stays the registry's only member");
            self.position.membership = sole_member(&cluster.me);
            self.store.write(&Changes::default(), self.state.epoch(), &self.position)?;
            self.store.sync()?;
        }
        Ok(Some(id))
    }

    /// Makes this node the only member of a registry that starts with what is stored.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) fn found(&mut self, id: RegistryId, me: &NodeId) -> Result<(), StoreError> {
        self.position = Position { applied: Some(LogId::default()), membership: sole_member(me) };
        self.store.found(id, &self.position)
    }

    /// Applies agreed entries: state, file, readers, in this order.
    ///
    /// # Errors
    /// When the disk fails or a tenant's key does not open.
    pub(super) fn apply(&mut self, entries: Vec<Entry>) -> Result<Vec<Answers>, StoreError> {
        let mut changes = Changes::default();
        let mut all = Vec::with_capacity(entries.len());
        let shown = self.published.snapshot.borrow().clone();
        for entry in entries {
            let answers = match entry.payload {
                EntryPayload::Blank => Vec::new(),
                EntryPayload::Membership(membership) => {
                    self.position.membership = StoredMembership::new(Some(entry.log_id), membership);
                    Vec::new()
                }
                EntryPayload::Normal(batch) => {
                    batch.iter().map(|proposal| self.state.apply_once(proposal, &mut changes)).collect()
                }
            };
            self.position.applied = Some(entry.log_id);
            all.push(answers);
        }
        let erases = changes.changes.iter().any(|change| matches!(change, Change::Delete(_)));
        let next = shown.with(&changes.changes, self.state.epoch())?;
        self.store.write(&changes, self.state.epoch(), &self.position)?;
        let next = next.under(fence_of(self.position.applied.as_ref()));
        if !changes.changes.is_empty() || shown.fence() != next.fence() {
            self.published.snapshot.send_replace(Arc::new(next));
        }
        if erases {
            self.published.scrub_due.send_replace(self.store.scrub_due());
        }
        Ok(all)
    }

    /// Compacts the log, and scrubs the file if it was waited for.
    ///
    /// # Errors
    /// When the disk fails.
    pub(super) fn purge(&mut self, upto: &LogId<u64>) -> Result<(), StoreError> {
        self.store.purge(upto, self.position.applied.as_ref())?;
        // While a snapshot is being installed, its end scrubs.
        if Some(upto) <= self.position.applied.as_ref() { self.scrub() } else { Ok(()) }
    }

    fn scrub(&mut self) -> Result<(), StoreError> {
        if self.store.scrub_due().is_some() {
            self.store.scrub_if_due()?;
            self.published.scrub_due.send_replace(self.store.scrub_due());
        }
        Ok(())
    }

    /// Takes the state as it is for a snapshot; cheap, since records are shared.
    pub(super) fn build(&mut self) -> Arc<Built> {
        let Position { applied, membership } = self.position.clone();
        let snapshot_id = applied.map_or_else(|| "start".to_owned(), |applied| applied.to_string());
        let meta = SnapshotMeta { last_log_id: applied, last_membership: membership, snapshot_id };
        let built = Arc::new(Built { meta, image: self.state.image() });
        self.built = Some(built.clone());
        built
    }

    /// Replaces the state by the one in a snapshot from the leader.
    ///
    /// # Errors
    /// When the snapshot is damaged, a key in it does not open here, or the disk fails.
    pub(super) fn install(&mut self, meta: &SnapshotMeta<u64, BasicNode>, bytes: &[u8]) -> Result<(), StoreError> {
        let image: Image =
            record::decode(bytes).map_err(|source| StoreError::Record { what: "snapshot".to_owned(), source })?;
        let state = RegistryState::from_image(image);
        let position = Position { applied: meta.last_log_id, membership: meta.last_membership.clone() };
        let snapshot = self.published.snapshot.borrow().replaced_by(&state)?;
        let snapshot = snapshot.under(fence_of(position.applied.as_ref()));
        self.store.replace(&state, &position)?;
        let built = Built { meta: meta.clone(), image: state.image() };
        (self.state, self.position, self.built) = (state, position, Some(Arc::new(built)));
        tracing::info!(
            epoch = snapshot.epoch(),
            n_tenants = snapshot.n_tenants(),
            "caught up from the leader's snapshot"
        );
        self.published.snapshot.send_replace(Arc::new(snapshot));
        self.published.scrub_due.send_replace(self.store.scrub_due());
        self.scrub()
    }
}

/// As of the entry before the first.
fn sole_member(me: &NodeId) -> StoredMembership<u64, BasicNode> {
    let nodes = BTreeMap::from([(raft_id(me), member(me))]);
    StoredMembership::new(Some(LogId::default()), Membership::new(vec![[raft_id(me)].into()], nodes))
}

fn fence_of(applied: Option<&LogId<u64>>) -> Fence {
    applied
        .map_or(Fence::default(), |applied| Fence { term: applied.leader_id.term, leader: applied.leader_id.node_id })
}

type Task = Box<dyn FnOnce(&mut Content) -> Result<(), StoreError> + Send>;

/// A handle to the content.
#[derive(Clone)]
pub(super) enum Disk {
    /// Work runs on a thread.
    Thread(mpsc::Sender<Option<Task>>, Arc<Mutex<Option<JoinHandle<()>>>>),
    /// Work runs in the caller, for tests under a paused clock: it must not see the thread as idle time.
    Inline(Arc<Mutex<Option<Content>>>),
}

impl Disk {
    /// Starts the thread.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub(super) fn thread(content: Content) -> std::io::Result<Self> {
        let (sender, tasks) = mpsc::channel();
        let thread = std::thread::Builder::new().name("registry".to_owned()).spawn(move || work(content, &tasks))?;
        Ok(Self::Thread(sender, Arc::new(Mutex::new(Some(thread)))))
    }

    /// See the variant.
    pub(super) fn inline(content: Content) -> Self {
        Self::Inline(Arc::new(Mutex::new(Some(content))))
    }

    /// Does something with the content.
    ///
    /// # Errors
    /// What `act` says, after which the content is closed; [`StoreError::Closed`] ever after.
    pub(super) async fn with<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Content) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        match self {
            Self::Thread(tasks, _) => {
                let (reply, answer) = oneshot::channel();
                let task: Task = Box::new(move |content| {
                    let (told, outcome) = match act(content) {
                        Ok(value) => (Ok(value), Ok(())),
                        Err(error) => (Err(error), Err(StoreError::Closed)),
                    };
                    // A caller that went away does not undo what was done.
                    let _ = reply.send(told);
                    outcome
                });
                tasks.send(Some(task)).map_err(|_| StoreError::Closed)?;
                answer.await.unwrap_or(Err(StoreError::Closed))
            }
            Self::Inline(content) => {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                let outcome = act(content.as_mut().ok_or(StoreError::Closed)?);
                if outcome.is_err() {
                    *content = None;
                }
                outcome
            }
        }
    }

    /// Finishes what was asked before and lets go of the directory. Says whether the thread panicked.
    pub(super) async fn close(&self) -> bool {
        match self {
            Self::Thread(tasks, thread) => {
                let _ = tasks.send(None);
                let thread = thread.lock().unwrap_or_else(PoisonError::into_inner).take();
                let Some(thread) = thread else { return false };
                !matches!(tokio::task::spawn_blocking(move || thread.join()).await, Ok(Ok(())))
            }
            Self::Inline(content) => {
                drop(content.lock().unwrap_or_else(PoisonError::into_inner).take());
                false
            }
        }
    }
}

/// The thread: works until it is told to stop, everybody is gone or something fails.
fn work(mut content: Content, tasks: &mpsc::Receiver<Option<Task>>) {
    loop {
        let outcome = match tasks.recv_timeout(SYNC_AFTER_IDLE) {
            Ok(Some(task)) => task(&mut content),
            Err(RecvTimeoutError::Timeout) if content.store.is_unsynced() => content.store.sync(),
            Err(RecvTimeoutError::Timeout) => match tasks.recv() {
                Ok(Some(task)) => task(&mut content),
                Ok(None) | Err(_) => return,
            },
            Ok(None) | Err(RecvTimeoutError::Disconnected) => return,
        };
        if let Err(error) = outcome {
            return tracing::error!(%error, "the registry's file is let go after a failure");
        }
    }
}
