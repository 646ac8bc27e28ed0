//! What the replicated log holds and how nodes are numbered in it.

use std::io::Cursor;

use openraft::{BasicNode, LogId, StoredMembership};
use serde::{Deserialize, Serialize};

use shared::id::NodeId;

use super::runtime::Runtime;
use crate::registry::command::{Applied, Proposal};
use crate::registry::error::RegistryError;

/// Commands that became durable together: one entry of the log.
pub(crate) type Batch = Vec<Proposal>;
/// Their answers, in order; empty for entries of the protocol's own.
pub(crate) type Answers = Vec<Result<Applied, RegistryError>>;

openraft::declare_raft_types!(
    /// The types openraft works with. A node's address is its name: the transport knows the rest.
    pub(crate) TypeConfig:
        D = Batch,
        R = Answers,
        NodeId = u64,
        Node = BasicNode,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = Runtime,
);

/// One entry of the log.
pub(crate) type Entry = openraft::Entry<TypeConfig>;
/// Openraft's handle.
pub(crate) type Raft = openraft::Raft<TypeConfig>;

/// How far the stored state is, and who takes part.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Position {
    /// Entry after which the state is.
    pub(crate) applied: Option<LogId<u64>>,
    /// Members as of then.
    pub(crate) membership: StoredMembership<u64, BasicNode>,
}

/// A node's number: the start of its name's hash, so that nobody has to hand numbers out.
pub(crate) fn raft_id(node: &NodeId) -> u64 {
    let hash = blake3::hash(node.as_str().as_bytes());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// The name in a member's record.
pub(crate) fn name_of(member: &BasicNode) -> Option<NodeId> {
    member.addr.parse().ok()
}

/// The record of a member.
pub(crate) fn member(node: &NodeId) -> BasicNode {
    BasicNode::new(node.as_str())
}
