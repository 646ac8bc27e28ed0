//! Openraft's messages over [`Transport`]: spelled as JSON, so that a field more does not part two versions.
//!
//! Every message names the registry it belongs to. A node that belongs to another one refuses it: two registries
//! that grew up alone are never mixed. A node without one joins the first that calls. The leader a message claims
//! to come from must be the node the transport says it comes from.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use openraft::error::{InstallSnapshotError, NetworkError, RPCError, RaftError, RemoteError, Unreachable};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, VoteRequest,
    VoteResponse,
};
use openraft::{BasicNode, RaftNetwork, RaftNetworkFactory, SnapshotMeta, Vote};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use shared::id::NodeId;

use super::types::{Raft, TypeConfig, name_of, raft_id};
use crate::registry::cluster::{Answer, Transport, TransportError};
use crate::registry::store::tables::RegistryId;

/// Bytes of a snapshot in one message.
pub(crate) const PIECE_BYTES: u64 = 1 << 20;
/// Bytes of a whole snapshot: three times what 100,000 tenants need.
const SNAPSHOT_BYTES_MAX: u64 = 1 << 30;
/// Pause after a node could not be reached.
const RETRY_AFTER: Duration = Duration::from_millis(200);

/// What one node asks another.
#[derive(Serialize, Deserialize)]
pub(crate) struct Message {
    /// `None` from a node that belongs to none yet.
    pub(crate) registry: Option<RegistryId>,
    pub(crate) ask: Ask,
}

/// The questions.
#[derive(Serialize, Deserialize)]
pub(crate) enum Ask {
    /// Which registry is yours?
    Who,
    Append(AppendEntriesRequest<TypeConfig>),
    Vote(VoteRequest<u64>),
    Install(Piece),
}

/// The answers.
#[derive(Serialize, Deserialize)]
pub(crate) enum Told {
    Who(Option<RegistryId>),
    Append(Result<AppendEntriesResponse<u64>, RaftError<u64>>),
    Vote(Result<VoteResponse<u64>, RaftError<u64>>),
    Install(Result<InstallSnapshotResponse<u64>, RaftError<u64, InstallSnapshotError>>),
    /// The message is not for this node as it is now.
    Refused(String),
}

/// A piece of a snapshot, its bytes in base64.
#[derive(Serialize, Deserialize)]
pub(crate) struct Piece {
    vote: Vote<u64>,
    meta: SnapshotMeta<u64, BasicNode>,
    offset: u64,
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    data: Vec<u8>,
    done: bool,
}

fn to_base64<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    use base64::Engine;
    serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    use base64::Engine;
    let text = String::deserialize(deserializer)?;
    base64::engine::general_purpose::STANDARD.decode(text).map_err(serde::de::Error::custom)
}

/// Spells a message or an answer.
pub(crate) fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("messages have text keys and writing to memory succeeds")
}

/// Reads one.
pub(crate) fn decode<T: for<'de> Deserialize<'de>>(bytes: &[u8]) -> Result<T, TransportError> {
    serde_json::from_slice(bytes).map_err(|error| {
        TransportError::NoAnswer(format!(
            "unreadable message: {:?} error in column {}",
            error.classify(),
            error.column()
        ))
    })
}

impl Ask {
    /// Whose authority it claims.
    fn claimed(&self) -> Option<u64> {
        let vote = match self {
            Self::Who => return None,
            Self::Append(request) => &request.vote,
            Self::Vote(request) => &request.vote,
            Self::Install(piece) => &piece.vote,
        };
        Some(vote.leader_id().node_id)
    }

    /// Whether `from` may say this.
    pub(crate) fn is_from(&self, from: &NodeId) -> bool {
        self.claimed().is_none_or(|claimed| claimed == raft_id(from))
    }
}

/// Lets openraft answer.
pub(crate) async fn answer(raft: &Raft, ask: Ask) -> Told {
    match ask {
        Ask::Who => Told::Refused("asked of the wrong part".to_owned()),
        Ask::Append(request) => Told::Append(raft.append_entries(request).await),
        Ask::Vote(request) => Told::Vote(raft.vote(request).await),
        Ask::Install(Piece { vote, meta, offset, data, done }) => {
            if offset.saturating_add(data.len() as u64) > SNAPSHOT_BYTES_MAX {
                return Told::Refused(format!("a snapshot of more than {SNAPSHOT_BYTES_MAX} bytes"));
            }
            Told::Install(raft.install_snapshot(InstallSnapshotRequest { vote, meta, offset, data, done }).await)
        }
    }
}

/// Asks another node which registry it belongs to.
pub(crate) async fn who(transport: &dyn Transport, node: &NodeId, within: Duration) -> Option<Option<RegistryId>> {
    let message = encode(&Message { registry: None, ask: Ask::Who });
    match decode(&transport.raft(node, message, within).await.ok()?).ok()? {
        Told::Who(registry) => Some(registry),
        _ => None,
    }
}

/// Makes a [`Peer`] per member.
pub(crate) struct Network {
    pub(crate) transport: Arc<dyn Transport>,
    pub(crate) registry: Arc<OnceLock<RegistryId>>,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, target: u64, node: &BasicNode) -> Peer {
        Peer { transport: self.transport.clone(), registry: self.registry.clone(), target, name: name_of(node) }
    }
}

/// The way to one member.
pub(crate) struct Peer {
    transport: Arc<dyn Transport>,
    registry: Arc<OnceLock<RegistryId>>,
    target: u64,
    /// `None` when its record holds no name, which only a damaged log can cause.
    name: Option<NodeId>,
}

type Failed<E> = RPCError<u64, BasicNode, E>;

impl Peer {
    async fn ask<E: std::error::Error>(&self, ask: Ask, option: &RPCOption) -> Result<Told, Failed<E>> {
        let Some(name) = &self.name else {
            let error = TransportError::NotSent(format!("member {} has no name", self.target));
            return Err(Unreachable::new(&error).into());
        };
        let message = encode(&Message { registry: self.registry.get().copied(), ask });
        let answer: Answer = self.transport.raft(name, message, option.hard_ttl()).await;
        match answer.and_then(|bytes| decode(&bytes)) {
            Ok(told) => Ok(told),
            // Both wait a moment before the next attempt: a node that does not answer is not asked in a loop.
            Err(error) => Err(Unreachable::new(&error).into()),
        }
    }

    fn unexpected<E: std::error::Error>(&self, told: &Told) -> Failed<E> {
        let error = match told {
            Told::Refused(reason) => TransportError::NotSent(reason.clone()),
            _ => {
                return NetworkError::new(&TransportError::NoAnswer("another answer than asked for".to_owned())).into();
            }
        };
        tracing::warn!(node = ?self.name, %error, "a node refuses the registry's messages");
        Unreachable::new(&error).into()
    }

    #[expect(clippy::result_large_err, reason = "openraft's own type, on a path of a few calls a second")]
    fn remote<T, E: std::error::Error>(&self, outcome: Result<T, E>) -> Result<T, Failed<E>> {
        outcome.map_err(|error| RemoteError::new(self.target, error).into())
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failed<RaftError<u64>>> {
        match self.ask(Ask::Append(request), &option).await? {
            Told::Append(outcome) => self.remote(outcome),
            told => Err(self.unexpected(&told)),
        }
    }

    async fn install_snapshot(
        &mut self,
        request: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failed<RaftError<u64, InstallSnapshotError>>> {
        let InstallSnapshotRequest { vote, meta, offset, data, done } = request;
        match self.ask(Ask::Install(Piece { vote, meta, offset, data, done }), &option).await? {
            Told::Install(outcome) => self.remote(outcome),
            told => Err(self.unexpected(&told)),
        }
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failed<RaftError<u64>>> {
        match self.ask(Ask::Vote(request), &option).await? {
            Told::Vote(outcome) => self.remote(outcome),
            told => Err(self.unexpected(&told)),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY_AFTER))
    }
}
