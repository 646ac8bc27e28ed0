//! What a node knows of the agreement on the registry: for `tenantry ctl cluster`, metrics and readiness.

use shared::id::NodeId;

/// What this node does in the agreement.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// Decides the order of changes.
    Leader,
    /// Votes and follows.
    Follower,
    /// Stands for election.
    Candidate,
    /// Follows without a vote, or has not joined yet.
    #[default]
    Learner,
}

/// One member as this node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberStatus {
    /// Who.
    pub node: NodeId,
    /// Whether it votes.
    pub votes: bool,
    /// Entries it is behind; known by the leader only.
    pub behind: Option<u64>,
}

/// See the module. The default is a copy that is just starting.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// What this node does.
    pub role: Role,
    /// Counts elections.
    pub term: u64,
    /// Who takes changes, as far as this node knows. `None` without one, also on a leader that no majority answers.
    pub leader: Option<NodeId>,
    /// Last entry in the local state.
    pub applied: u64,
    /// Last entry in the local log.
    pub last: u64,
    /// Everybody who takes part.
    pub members: Vec<MemberStatus>,
}
