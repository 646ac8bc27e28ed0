//! Who keeps the registry together with this node, and the way to them.
//!
//! The node gives this to [`super::RegistryOptions`]; its transport is the node's QUIC. Not here: who is alive
//! (membership), what the messages say (`raft::network`).

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use shared::id::NodeId;

/// Why a message brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// It certainly did not arrive.
    #[error("not sent: {0}")]
    NotSent(String),
    /// It may have arrived, and may still be worked on.
    #[error("no answer: {0}")]
    NoAnswer(String),
}

/// Carries messages to other nodes, each to be answered by [`super::Registry::on_raft`] or
/// [`super::Registry::on_forwarded`] there. Authenticates both ends, encrypts, and gives up after `within`.
pub trait Transport: Send + Sync + 'static {
    /// A message of the agreement protocol, at most [`MESSAGE_BYTES_MAX`].
    fn raft(&self, to: &NodeId, message: Vec<u8>, within: Duration) -> BoxFuture<'static, Answer>;

    /// A command for the leader, at most [`MESSAGE_BYTES_MAX`].
    fn forward(&self, to: &NodeId, command: Vec<u8>, within: Duration) -> BoxFuture<'static, Answer>;
}

/// The other node's bytes.
pub type Answer = Result<Vec<u8>, TransportError>;

/// Bytes of a message: the largest holds a piece of a snapshot or about a MiB of log.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// How often and how long; the defaults are for one machine room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Between two signs of life from the leader.
    pub heartbeat: Duration,
    /// Silence after which a node stands for election: drawn between these two, so that not all do at once.
    pub election: (Duration, Duration),
    /// A change is tried this long before its caller is told.
    pub apply_within: Duration,
    /// Between two looks at what the members should be.
    pub tick: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            // Three to six heartbeats: an engine that takes every core for a moment is no reason to elect.
            election: (Duration::from_millis(300), Duration::from_millis(600)),
            apply_within: Duration::from_secs(10),
            tick: Duration::from_millis(500),
        }
    }
}

/// One node as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name.
    pub node: NodeId,
    /// Whether it votes; the others follow, so that they can read.
    pub votes: bool,
}

/// The nodes of the cluster file as the registry sees them.
#[derive(Clone)]
pub struct Cluster {
    /// This node; one of the members.
    pub me: NodeId,
    /// All nodes. The first that votes founds the registry, once.
    pub members: Vec<Member>,
    /// The way to the others.
    pub transport: Arc<dyn Transport>,
    /// See [`Timing`].
    pub timing: Timing,
}

impl Cluster {
    /// This node and nobody else.
    pub fn alone(me: NodeId) -> Self {
        let members = vec![Member { node: me.clone(), votes: true }];
        Self { me, members, transport: Arc::new(Nobody), timing: Timing::default() }
    }

    /// Whether there is no other node.
    pub(super) fn is_alone(&self) -> bool {
        self.members.iter().all(|member| member.node == self.me)
    }

    /// The node that starts the registry when there is none yet.
    pub(super) fn founder(&self) -> Option<&NodeId> {
        self.members.iter().find(|member| member.votes).map(|member| &member.node)
    }

    /// The other nodes that vote.
    pub(super) fn other_voters(&self) -> impl Iterator<Item = &NodeId> {
        self.members.iter().filter(|member| member.votes && member.node != self.me).map(|member| &member.node)
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cluster({} of {:?})", self.me, self.members)
    }
}

/// The transport of a node without others.
struct Nobody;

impl Transport for Nobody {
    fn raft(&self, to: &NodeId, _: Vec<u8>, _: Duration) -> BoxFuture<'static, Answer> {
        let error = TransportError::NotSent(format!("this node knows no node {to}"));
        Box::pin(std::future::ready(Err(error)))
    }

    fn forward(&self, to: &NodeId, command: Vec<u8>, within: Duration) -> BoxFuture<'static, Answer> {
        self.raft(to, command, within)
    }
}
