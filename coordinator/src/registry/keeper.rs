//! Keeps a copy of the registry running: batches commands into it, and opens it again after a failure.
//!
//! One task, started and watched by [`super::actor`]; it ends when the actor does, after it has finished what it was
//! given, or when the thread below it panicked. Commands that wait together become one entry of the log: one disk
//! sync for all of them, and one is under way at a time. Readers keep the last snapshot whatever happens here.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, OptionFuture};
use serde::{Deserialize, Serialize};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};

use super::cluster::Cluster;
use super::command::{Applied, Event, Proposal, random_id};
use super::disk::{Content, Disk, Published};
use super::error::RegistryError;
use super::raft::network;
use super::replica::{Replica, Written};
use super::secrets::Secrets;
use super::status::Status;
use super::store::tables::RegistryId;
use shared::id::NodeId;

/// Commands in one entry of the log: bounds how long the first of them waits.
const BATCH_MAX: usize = 128;
/// Bytes in one entry; a command has at most [`super::COMMAND_BYTES_MAX`].
const BATCH_BYTES_MAX: usize = 256 << 10;
/// Pause before a copy that failed is opened again.
const REOPEN_AFTER: Duration = Duration::from_secs(1);
/// Longest wait for an erased key to leave the file before the caller is answered; it goes on afterwards.
const ERASE_WAIT_MAX: Duration = Duration::from_secs(5);
/// Longest replay of the own log at start.
const REPLAY_WAIT_MAX: Duration = Duration::from_secs(30);
/// How long another node may take to say which registry it holds.
const WHO_WAIT_MAX: Duration = Duration::from_secs(1);

/// Why this node did not apply a command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Refusal {
    /// It does not lead; perhaps this one does. Nothing was changed by this attempt.
    NotLeader(Option<NodeId>),
    /// The registry's answer.
    Error(RegistryError),
}

/// An answer to a command.
pub(super) type Reply = Result<Applied, Refusal>;

/// A command and where its answer goes.
pub(super) struct Job {
    pub(super) proposal: Proposal,
    pub(super) bytes: usize,
    pub(super) reply: oneshot::Sender<Reply>,
    pub(super) claim: Claim,
    /// The sender's credit, given back when the job is done.
    pub(super) credit: Arc<OwnedSemaphorePermit>,
}

/// Whoever takes it first decides whether a waiting command goes into the log.
#[derive(Debug, Clone, Default)]
pub(super) struct Claim(Arc<AtomicU8>);

const WAITING: u8 = 0;
const PROPOSED: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Claim {
    fn take(&self, by: u8) -> bool {
        self.0.compare_exchange(WAITING, by, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// The caller waits no longer. `true` if the command was not proposed, and now never will be.
    pub(super) fn give_up(&self) -> bool {
        self.take(GIVEN_UP)
    }
}

/// What outlives every copy.
#[derive(Clone)]
pub(super) struct Ground {
    pub(super) dir: PathBuf,
    pub(super) secrets: Arc<Secrets>,
    pub(super) cluster: Arc<Cluster>,
    pub(super) published: Published,
    pub(super) status: Arc<watch::Sender<Status>>,
    /// The running copy, for messages from other nodes.
    pub(super) replica: Arc<watch::Sender<Option<Replica>>>,
    /// How work on the file is done.
    pub(super) start_disk: fn(Content) -> std::io::Result<Disk>,
}

impl Ground {
    /// Opens the file and takes part. A node that is alone founds its registry, and has replayed its whole log
    /// when this returns; any other returns with its copy as it was.
    ///
    /// # Errors
    /// [`RegistryError::Open`] with the reason.
    pub(super) async fn open(&self) -> Result<Replica, RegistryError> {
        let open_error = |error: &dyn std::error::Error| RegistryError::Open(error.to_string());
        let (ground, start) = (self.clone(), self.start_disk);
        let work = move || {
            let mut content = Content::open(&ground.dir, &ground.secrets)?;
            let registry = content.settle(&ground.cluster).map_err(|error| open_error(&error))?;
            content.publish_to(ground.published.clone()).map_err(|error| open_error(&error))?;
            Ok((start(content).map_err(|error| open_error(&error))?, registry))
        };
        let opened = tokio::task::spawn_blocking(work).await;
        let (disk, registry) = opened.unwrap_or_else(|error| Err(RegistryError::Open(error.to_string())))?;
        let replica = Replica::start(disk.clone(), self.cluster.clone(), registry).await;
        let replica = match replica {
            Ok(replica) => replica,
            Err(error) => {
                disk.close().await;
                return Err(error);
            }
        };
        if self.cluster.is_alone() {
            replica.elect().await;
            if let Err(error) = replica.caught_up_alone(REPLAY_WAIT_MAX).await {
                replica.close().await;
                return Err(error);
            }
        }
        self.status.send_replace(replica.status());
        self.replica.send_replace(Some(replica.clone()));
        Ok(replica)
    }
}

/// See the module.
pub(super) struct Keeper {
    pub(super) ground: Ground,
    /// A copy that is open already.
    pub(super) replica: Option<Replica>,
}

/// Why a copy stopped.
enum End {
    /// Nobody sends commands any more.
    Stopped,
    /// Openraft or the file failed.
    Failed(String),
    /// It has to be opened anew, as the founder.
    Found(RegistryId),
}

impl Keeper {
    /// Works until every sender is gone.
    pub(super) async fn run(mut self, mut jobs: mpsc::UnboundedReceiver<Job>) {
        loop {
            let replica = match self.replica.take() {
                Some(replica) => replica,
                None => match self.ground.open().await {
                    Ok(replica) => replica,
                    Err(error) => {
                        tracing::error!(%error, "registry stays closed");
                        if self.refuse_for_a_while(&mut jobs, &error).await { return } else { continue }
                    }
                },
            };
            let end = self.serve(&replica, &mut jobs).await;
            self.ground.replica.send_replace(None);
            self.ground.status.send_modify(|status| status.leader = None);
            let panicked = replica.close().await;
            match end {
                End::Stopped => return,
                End::Found(id) => self.found(id).await,
                End::Failed(reason) => {
                    tracing::error!(reason, "registry failed; it is opened and read again");
                    if panicked {
                        return;
                    }
                    tokio::time::sleep(REOPEN_AFTER).await;
                }
            }
        }
    }

    /// Answers what comes in with the error. `true` when nobody sends any more.
    async fn refuse_for_a_while(&self, jobs: &mut mpsc::UnboundedReceiver<Job>, error: &RegistryError) -> bool {
        let refuse = async {
            while let Some(job) = jobs.recv().await {
                let _ = job.reply.send(Err(Refusal::Error(error.clone())));
            }
        };
        tokio::time::timeout(REOPEN_AFTER, refuse).await.is_ok()
    }

    async fn serve(&self, replica: &Replica, jobs: &mut mpsc::UnboundedReceiver<Job>) -> End {
        let mut metrics = replica.raft.metrics();
        let mut scrub_due = self.ground.published.scrub_due.subscribe();
        let mut tick = tokio::time::interval(self.ground.cluster.timing.tick);
        let mut writing: OptionFuture<BoxFuture<'_, ()>> = None.into();
        let mut chores: OptionFuture<BoxFuture<'_, Option<RegistryId>>> = None.into();
        let (mut is_writing, mut has_chores) = (false, false);
        loop {
            tokio::select! {
                job = jobs.recv(), if !is_writing => {
                    let Some(job) = job else { return End::Stopped };
                    let batch = batch_of(job, jobs);
                    writing = Some(self.write(replica, batch).boxed()).into();
                    is_writing = true;
                }
                _ = &mut writing, if is_writing => (writing, is_writing) = (None.into(), false),
                found = &mut chores, if has_chores => {
                    (chores, has_chores) = (None.into(), false);
                    if let Some(id) = found.flatten() {
                        return End::Found(id);
                    }
                }
                changed = metrics.changed() => {
                    let state = metrics.borrow_and_update().running_state.clone();
                    if let (Err(reason), _) | (_, Err(reason)) =
                        (state.map_err(|error| error.to_string()), changed.map_err(|error| error.to_string()))
                    {
                        return End::Failed(reason);
                    }
                    self.show(replica);
                }
                _ = tick.tick(), if !has_chores => {
                    (chores, has_chores) = (Some(self.chores(replica).boxed()).into(), true);
                }
                changed = scrub_due.changed(), if !has_chores => {
                    if changed.is_ok() {
                        (chores, has_chores) = (Some(self.chores(replica).boxed()).into(), true);
                    }
                }
            }
        }
    }

    fn show(&self, replica: &Replica) {
        let status = replica.status();
        self.ground.status.send_if_modified(|shown| {
            let changed = *shown != status;
            if changed && shown.leader != status.leader {
                tracing::info!(leader = ?status.leader, term = status.term, role = ?status.role, "registry leader");
            }
            *shown = status;
            changed
        });
    }

    /// What is done now and then. An id means: found the registry under it.
    async fn chores(&self, replica: &Replica) -> Option<RegistryId> {
        let due = *self.ground.published.scrub_due.borrow();
        if let Some(due) = due {
            replica.compact(due).await;
        }
        if replica.registry().is_none() {
            return self.may_found().await;
        }
        replica.follow_configuration().await;
        None
    }

    /// The first voter of the cluster file founds the registry, but only when every other voter says that it holds
    /// none: with one of them out of reach there might be a registry that this node has lost.
    async fn may_found(&self) -> Option<RegistryId> {
        let cluster = &self.ground.cluster;
        if cluster.founder() != Some(&cluster.me) {
            return None;
        }
        for node in cluster.other_voters() {
            match network::who(&*cluster.transport, node, WHO_WAIT_MAX).await {
                Some(None) => {}
                Some(Some(_)) => return None,
                None => {
                    tracing::info!(%node, "waiting for this node before the registry is founded");
                    return None;
                }
            }
        }
        Some(random_id())
    }

    async fn found(&self, id: RegistryId) {
        let ground = self.ground.clone();
        let found = tokio::task::spawn_blocking(move || {
            let mut content = Content::open(&ground.dir, &ground.secrets)?;
            content.found(id, &ground.cluster.me).map_err(|error| RegistryError::Open(error.to_string()))
        });
        match found.await {
            Ok(Ok(())) => tracing::info!("founded the registry"),
            Ok(Err(error)) => tracing::error!(%error, "the registry could not be founded; tried again"),
            Err(error) => tracing::error!(%error, "founding the registry panicked"),
        }
    }

    async fn write(&self, replica: &Replica, batch: Vec<Job>) {
        let (mut waiting, mut proposals) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        for job in batch.into_iter().filter(|job| job.claim.take(PROPOSED)) {
            proposals.push(job.proposal);
            waiting.push((job.reply, job.credit));
        }
        let within = self.ground.cluster.timing.apply_within;
        let written = tokio::time::timeout(within, replica.write(proposals)).await;
        let unknown = || {
            let waited_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
            Refusal::Error(RegistryError::OutcomeUnknown { waited_ms })
        };
        let replies: Vec<Reply> = match written {
            Ok(Written::Applied(answers)) => {
                if answers.iter().flatten().any(erases) {
                    self.wait_for_erasure().await;
                }
                answers.into_iter().map(|answer| answer.map_err(Refusal::Error)).collect()
            }
            Ok(Written::NotLeader(leader)) => {
                std::iter::repeat_n(Err(Refusal::NotLeader(leader)), waiting.len()).collect()
            }
            Ok(Written::Failed(reason)) => {
                let error = RegistryError::Storage(reason);
                std::iter::repeat_n(Err(Refusal::Error(error)), waiting.len()).collect()
            }
            Err(_) => std::iter::repeat_with(|| Err(unknown())).take(waiting.len()).collect(),
        };
        for ((reply, credit), answer) in waiting.into_iter().zip(replies) {
            drop(credit);
            // A caller that went away does not undo its command.
            let _ = reply.send(answer);
        }
    }

    /// The deletion itself is agreed on and published; what is late here goes on by itself.
    async fn wait_for_erasure(&self) {
        let mut due = self.ground.published.scrub_due.subscribe();
        if tokio::time::timeout(ERASE_WAIT_MAX, due.wait_for(Option::is_none)).await.is_err() {
            tracing::error!("an erased tenant's key is still in this node's file; it is tried again");
        }
    }
}

fn erases(applied: &Applied) -> bool {
    applied.events.iter().any(|event| matches!(event, Event::TenantDeleted { .. }))
}

/// The job and those that wait behind it, as many as fit.
fn batch_of(first: Job, jobs: &mut mpsc::UnboundedReceiver<Job>) -> Vec<Job> {
    let mut bytes = first.bytes;
    let mut batch = vec![first];
    while batch.len() < BATCH_MAX && bytes < BATCH_BYTES_MAX {
        let Ok(job) = jobs.try_recv() else { break };
        bytes += job.bytes;
        batch.push(job);
    }
    batch
}
