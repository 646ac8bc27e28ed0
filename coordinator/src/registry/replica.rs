//! One running copy of the registry: openraft on one open file, until either fails.
//!
//! Started and closed by [`super::keeper`]. Writes, membership, compaction and messages from other nodes meet here.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use openraft::error::{ClientWriteError, RaftError};
use openraft::{ChangeMembers, Config, RaftMetrics, ServerState, SnapshotPolicy};

use super::cluster::{Cluster, Member};
use super::disk::Disk;
use super::election::{LOOK_EVERY, Patience};
use super::error::RegistryError;
use super::raft::log::Log;
use super::raft::machine::Machine;
use super::raft::network::{self, Ask, Message, Network, PIECE_BYTES, Told};
use super::raft::types::{Answers, Batch, Raft, member, name_of, raft_id};
use super::status::{MemberStatus, Role, Status};
use super::store::tables::RegistryId;
use shared::id::NodeId;

/// Entries after which the log is compacted: a restart replays at most these.
const COMPACT_AFTER: u64 = 2000;
/// Entries kept after compaction, so that a node that was away for a moment needs no snapshot.
const KEEP_ENTRIES: u64 = 500;
/// Entries that a node may be behind and still count as caught up.
const CAUGHT_UP_WITHIN: u64 = 20;
/// A leader that no majority has answered for this many longest election time-outs takes no changes: the others
/// may have elected another one.
const QUORUM_SILENCE_MAX: u32 = 2;

/// See the module. A handle.
#[derive(Clone)]
pub(super) struct Replica {
    pub(super) raft: Raft,
    pub(super) disk: Disk,
    cluster: Arc<Cluster>,
    registry: Arc<OnceLock<RegistryId>>,
    patience: Arc<Mutex<Patience>>,
    /// Ends with the last handle.
    _watch: Arc<Watch>,
}

/// The task that stands for election.
struct Watch(tokio::task::JoinHandle<()>);

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// How a write ended.
pub(super) enum Written {
    /// Agreed and applied here.
    Applied(Answers),
    /// Not taken: this node does not lead, or cannot reach a majority.
    NotLeader(Option<NodeId>),
    /// Openraft ended in the middle.
    Failed(String),
}

impl Replica {
    /// Starts taking part.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub(super) async fn start(
        disk: Disk,
        cluster: Arc<Cluster>,
        registry: Option<RegistryId>,
    ) -> Result<Self, RegistryError> {
        let id = Arc::new(registry.map_or_else(OnceLock::new, OnceLock::from));
        let network = Network { transport: cluster.transport.clone(), registry: id.clone() };
        let (log, machine) = (Log(disk.clone()), Machine(disk.clone()));
        let config = Arc::new(config(&cluster)?);
        let raft = Raft::new(raft_id(&cluster.me), config, network, log, machine).await;
        let raft = raft.map_err(|error| RegistryError::Open(error.to_string()))?;
        let patience = Arc::new(Mutex::new(Patience::new(now(), cluster.timing.election.1)));
        let watch = Watch(tokio::spawn(stand_in_turn(raft.clone(), raft_id(&cluster.me), patience.clone())));
        Ok(Self { raft, disk, cluster, registry: id, patience, _watch: Arc::new(watch) })
    }

    /// Stops taking part and lets go of the directory. Says whether something panicked.
    pub(super) async fn close(self) -> bool {
        let ended = self.raft.shutdown().await;
        self.disk.close().await || ended.is_err()
    }

    /// Proposes commands and waits for their answers; the caller bounds the time.
    pub(super) async fn write(&self, batch: Batch) -> Written {
        if !self.hears_majority(&self.raft.metrics().borrow()) {
            return Written::NotLeader(None);
        }
        match self.raft.client_write(batch).await {
            Ok(response) => Written::Applied(response.data),
            Err(RaftError::APIError(ClientWriteError::ForwardToLeader(to))) => {
                Written::NotLeader(to.leader_node.as_ref().and_then(name_of))
            }
            Err(error) => Written::Failed(error.to_string()),
        }
    }

    fn hears_majority(&self, metrics: &RaftMetrics<u64, openraft::BasicNode>) -> bool {
        let silence_max = self.cluster.timing.election.1 * QUORUM_SILENCE_MAX;
        let is_alone = metrics.membership_config.voter_ids().count() == 1;
        let silence = metrics.millis_since_quorum_ack.map(Duration::from_millis);
        is_alone || silence.is_none_or(|silence| silence <= silence_max)
    }

    /// Answers another node's message.
    pub(super) async fn on_message(&self, from: &NodeId, message: Message) -> Told {
        if !message.ask.is_from(from) {
            return Told::Refused(format!("{from} speaks for another node"));
        }
        if matches!(message.ask, Ask::Who) {
            return Told::Who(self.registry());
        }
        let Some(theirs) = message.registry else {
            return Told::Refused(format!("{from} belongs to no registry yet"));
        };
        if let Err(reason) = self.belongs_to(theirs).await {
            return Told::Refused(reason);
        }
        if matches!(message.ask, Ask::Append(_) | Ask::Install(_)) {
            lock(&self.patience).on_leader(now());
        }
        network::answer(&self.raft, message.ask).await
    }

    /// Joins the registry that calls if this node belongs to none.
    async fn belongs_to(&self, theirs: RegistryId) -> Result<(), String> {
        if self.registry.get().is_none() {
            let joined = self.disk.with(move |content| content.store.join(theirs)).await;
            joined.map_err(|error| error.to_string())?;
            let _ = self.registry.set(theirs);
        }
        if self.registry.get() == Some(&theirs) {
            return Ok(());
        }
        Err(format!("node {} holds another registry; hint: empty its data folder if it shall join", self.cluster.me))
    }

    /// Which registry this is a copy of, once it is one.
    pub(super) fn registry(&self) -> Option<RegistryId> {
        self.registry.get().copied()
    }

    /// What is known of the agreement.
    pub(super) fn status(&self) -> Status {
        let metrics = self.raft.metrics().borrow().clone();
        let members = metrics.membership_config.membership();
        let voters: BTreeSet<u64> = members.voter_ids().collect();
        let behind = |id: &u64| {
            let matched = metrics.replication.as_ref()?.get(id)?.map_or(0, |matched| matched.index + 1);
            Some(metrics.last_log_index.map_or(0, |last| last + 1).saturating_sub(matched))
        };
        let member = |(id, record): (&u64, &openraft::BasicNode)| {
            Some(MemberStatus { node: name_of(record)?, votes: voters.contains(id), behind: behind(id) })
        };
        let leader = metrics.current_leader.and_then(|id| members.get_node(&id)).and_then(name_of);
        let is_leader = metrics.state == ServerState::Leader;
        Status {
            role: match metrics.state {
                ServerState::Leader => Role::Leader,
                ServerState::Candidate => Role::Candidate,
                ServerState::Follower => Role::Follower,
                ServerState::Learner | ServerState::Shutdown => Role::Learner,
            },
            term: metrics.current_term,
            leader: leader.filter(|_| !is_leader || self.hears_majority(&metrics)),
            applied: metrics.last_applied.map_or(0, |applied| applied.index),
            last: metrics.last_log_index.unwrap_or(0),
            members: members.nodes().filter_map(member).collect(),
        }
    }

    /// Waits until everything in the own log is applied; for a node that is alone, whose whole log is agreed on.
    pub(super) async fn caught_up_alone(&self, within: Duration) -> Result<(), RegistryError> {
        let all = |metrics: &RaftMetrics<u64, openraft::BasicNode>| {
            metrics.state == ServerState::Leader
                && metrics.last_applied.map(|applied| applied.index) >= metrics.last_log_index
        };
        let waited = self.raft.wait(Some(within)).metrics(all, "own log applied").await;
        waited.map(drop).map_err(|error| RegistryError::Open(error.to_string()))
    }

    /// Stands for election at once: a node that is alone need not wait for silence.
    pub(super) async fn elect(&self) {
        if self.raft.metrics().borrow().state != ServerState::Leader {
            let _ = self.raft.trigger().elect().await;
        }
    }

    /// Compacts the log up to an erasure, so that the file can be scrubbed.
    pub(super) async fn compact(&self, due: u64) {
        let _ = self.raft.trigger().snapshot().await;
        let built = |metrics: &RaftMetrics<u64, openraft::BasicNode>| {
            metrics.snapshot.is_some_and(|snapshot| snapshot.index >= due)
        };
        let within = Duration::from_secs(1);
        if self.raft.wait(Some(within)).metrics(built, "snapshot built").await.is_ok() {
            let _ = self.raft.trigger().purge_log(due).await;
        }
    }

    /// If this node leads: one step towards the members that are configured.
    pub(super) async fn follow_configuration(&self) {
        let metrics = self.raft.metrics().borrow().clone();
        if metrics.state != ServerState::Leader || !self.hears_majority(&metrics) {
            return;
        }
        let Some(step) = next_step(&self.cluster.members, &metrics) else { return };
        tracing::info!(?step, "changing the registry's members");
        let outcome = match step {
            Step::Follow(node) => self.raft.add_learner(raft_id(&node), member(&node), false).await.map(drop),
            Step::Vote(voters) => self.raft.change_membership(voters, true).await.map(drop),
            Step::Leave(nodes) => self.raft.change_membership(ChangeMembers::RemoveNodes(nodes), true).await.map(drop),
        };
        if let Err(error) = outcome {
            tracing::warn!(%error, "the registry's members could not be changed; tried again");
        }
    }
}

/// Stands for election when it is this node's turn, until the node's part ends.
async fn stand_in_turn(raft: Raft, me: u64, patience: Arc<Mutex<Patience>>) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let (voters, leader) = {
            let metrics = raft.metrics();
            let metrics = metrics.borrow();
            let voters: BTreeSet<u64> = metrics.membership_config.voter_ids().collect();
            (voters, metrics.current_leader)
        };
        let stands = lock(&patience).on_tick(now(), me, &voters, leader);
        if stands && raft.trigger().elect().await.is_err() {
            return;
        }
    }
}

/// Time as openraft has it.
fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

/// A panic under this short lock leaves nothing half-done.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One change of the members.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// A node starts to follow.
    Follow(NodeId),
    /// These vote from now on.
    Vote(BTreeSet<u64>),
    /// Nodes that are no longer configured go.
    Leave(BTreeSet<u64>),
}

/// Followers come first. The voters change at once and only when all new ones have caught up: two voters survive
/// less than one, so there is no point in half of the way.
fn next_step(configured: &[Member], metrics: &RaftMetrics<u64, openraft::BasicNode>) -> Option<Step> {
    let wanted: BTreeMap<u64, &Member> = configured.iter().map(|member| (raft_id(&member.node), member)).collect();
    let membership = metrics.membership_config.membership();
    let present: BTreeSet<u64> = membership.nodes().map(|(id, _)| *id).collect();
    if let Some((_, new)) = wanted.iter().find(|(id, _)| !present.contains(id)) {
        return Some(Step::Follow(new.node.clone()));
    }
    let voters: BTreeSet<u64> = membership.voter_ids().collect();
    let wanted_voters: BTreeSet<u64> = wanted.iter().filter(|(_, member)| member.votes).map(|(id, _)| *id).collect();
    if voters != wanted_voters {
        let last = metrics.last_log_index.unwrap_or(0);
        let has_caught_up = |id: &u64| {
            let matched = metrics.replication.as_ref().and_then(|all| *all.get(id)?);
            voters.contains(id) || matched.is_some_and(|matched| matched.index + CAUGHT_UP_WITHIN >= last)
        };
        let ready = !wanted_voters.is_empty() && wanted_voters.iter().all(has_caught_up);
        return ready.then_some(Step::Vote(wanted_voters));
    }
    let gone: BTreeSet<u64> = present.into_iter().filter(|id| !wanted.contains_key(id)).collect();
    (!gone.is_empty()).then_some(Step::Leave(gone))
}

fn config(cluster: &Cluster) -> Result<Config, RegistryError> {
    let timing = &cluster.timing;
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let config = Config {
        cluster_name: "registry".to_owned(),
        heartbeat_interval: ms(timing.heartbeat),
        election_timeout_min: ms(timing.election.0),
        election_timeout_max: ms(timing.election.1),
        // Openraft's 200 ms is less than a busy machine needs to install 10,000 tenants.
        install_snapshot_timeout: 10_000,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(COMPACT_AFTER),
        max_in_snapshot_log_to_keep: KEEP_ENTRIES,
        replication_lag_threshold: 2 * COMPACT_AFTER,
        snapshot_max_chunk_size: PIECE_BYTES,
        ..Config::default()
    };
    config.validate().map_err(|error| RegistryError::Open(error.to_string()))
}

#[cfg(test)]
mod tests;
