//! What nodes say to each other, as vocabulary; [`Message`] turns it into frames and back.
//!
//! | exchange | first frame | answered by |
//! |---|---|---|
//! | a connection opens | [`Hello`] | [`Hello`] |
//! | [`Opening::Renew`] | nothing more | [`Renewal`] |
//! | datagram | [`Heartbeat`] | nothing |
//! | work | [`Start`] | [`Answer`]s until the stream ends |
//! | call | [`Request`] | one [`Response`] |
//!
//! Times travel as what is left of them, since clocks of nodes differ: [`Message::encode`] and
//! [`Message::decode`] take the present of their own node.

use std::time::Instant;

use shared::adapter::AdapterRef;
use shared::cluster::Heartbeat;
use shared::error::RequestError;
use shared::hash::ContentHash;
use shared::id::{BaseName, NodeId, RequestId};
use shared::request::{Emitted, Envelope};
use shared::token::TokenEvent;

use crate::frame::{Frame, FrameError, Kind};
use crate::version::{Spoken, Version};

/// What a node says of itself when a connection opens. TLS has proved the name by then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Name of the cluster; a node of another one is refused.
    pub cluster: String,
    /// Who speaks.
    pub node: NodeId,
    /// Names one life of the process, as in its heartbeats.
    pub incarnation: u64,
    /// Bases it serves.
    pub bases: Vec<ServedBase>,
    /// Wire versions it speaks.
    pub wire: Spoken,
    /// It certifies nodes; a node of version 1 does not say so.
    pub has_authority: bool,
}

// === impl Hello ===

impl Hello {
    /// Of a node of this program; `peer` adds whether it has the authority.
    pub fn new(cluster: String, node: NodeId, incarnation: u64, bases: Vec<ServedBase>) -> Self {
        Self { cluster, node, incarnation, bases, wire: Spoken::OURS, has_authority: false }
    }
}

/// A base as one node serves it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ServedBase {
    /// Its name.
    pub name: BaseName,
    /// Content of its weights.
    pub hash: ContentHash,
    /// Content of its text, which other nodes may ask for ([`Request::BaseText`]); a node of version 1 has none to give.
    pub text: Option<ContentHash>,
    /// Names the arithmetic: equal ids give equal bits, so a stream may move between them.
    pub numerics_id: String,
}

/// Asks a node to run an admitted request.
#[derive(Debug, Clone)]
pub struct Start {
    /// The request.
    pub envelope: Envelope,
    /// Counts the nodes that were asked, from 1; events of any but the current attempt are void.
    pub attempt: u32,
    /// Epoch of the routing table by which this node was chosen.
    pub epoch: u64,
    /// What the client has already.
    pub emitted: Emitted,
}

/// What flows back on a stream that a [`Start`] opened.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// Progress.
    Event {
        /// The attempt it belongs to.
        attempt: u32,
        /// The event.
        event: TokenEvent,
    },
    /// By a newer routing table others are to be asked; nothing follows.
    Moved {
        /// Epoch of that table.
        epoch: u64,
        /// Whom it names, best first.
        to: Vec<NodeId>,
    },
    /// Not taken on; nothing follows.
    Refused(RequestError),
}

/// A call with one answer.
#[derive(Debug, Clone)]
pub enum Request {
    /// A message of the registry's agreement. Answered by [`Response::Raft`].
    Raft {
        /// Which group of nodes agrees.
        group: u32,
        /// The message, in the registry's own format.
        bytes: Vec<u8>,
    },
    /// A change to the registry for its leader. Answered by [`Response::Admin`].
    Admin {
        /// The change, in the registry's own format.
        bytes: Vec<u8>,
    },
    /// Have this adapter ready. Answered by [`Response::Done`].
    Warm {
        /// Epoch of the plan; an older one than seen before is void.
        epoch: u64,
        /// The base it belongs to.
        base: BaseName,
        /// Which adapter.
        adapter: AdapterRef,
    },
    /// Keep this record, from which its request can go on. Answered by [`Response::Done`].
    JournalOpen(Box<JournalRecord>),
    /// Add to records. Answered by [`Response::Done`].
    JournalPut(Vec<JournalDelta>),
    /// Hand out a record. Answered by [`Response::Journal`].
    JournalTake {
        /// Its request.
        id: RequestId,
    },
    /// The sender takes no new requests from now on. Answered by [`Response::Done`].
    DrainNotice {
        /// Epoch of its routing table.
        epoch: u64,
    },
    /// Does a client of the asked node wait for this request? Answered by [`Response::Probe`].
    Probe {
        /// Which request.
        id: RequestId,
        /// Nothing yet: zero.
        attempt: u32,
    },
    /// Which adapters are in the memory of the asked node's engines? Answered by [`Response::Residents`]. Since
    /// version 2.
    Residents,
    /// A piece of a base's text: what a node needs to take requests for a base that it does not host. Answered by
    /// [`Response::BaseText`]. Since version 2.
    BaseText {
        /// Which text.
        text: ContentHash,
        /// Where the piece begins.
        offset: u64,
    },
}

/// The answer to a [`Request`].
#[derive(Debug, Clone)]
pub enum Response {
    /// To [`Request::Raft`].
    Raft {
        /// In the registry's own format.
        bytes: Vec<u8>,
    },
    /// To [`Request::Admin`].
    Admin {
        /// In the registry's own format.
        bytes: Vec<u8>,
    },
    /// Taken on.
    Done,
    /// The record, if it is here.
    Journal(Option<Box<JournalRecord>>),
    /// What a node does for a request.
    Probe(Progress),
    /// To [`Request::Residents`].
    Residents(Vec<Resident>),
    /// To [`Request::BaseText`].
    BaseText(TextPiece),
    /// Not done, and why.
    Refused(RequestError),
}

/// A piece of a base's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextPiece {
    /// Bytes of the whole text.
    pub total: u64,
    /// Those from the offset asked for, at most [`TEXT_PIECE_BYTES`].
    pub bytes: Vec<u8>,
}

/// Largest [`TextPiece`]: below the bound of its frame, so large that a text of 10 MB takes ten calls.
pub const TEXT_PIECE_BYTES: usize = 1 << 20;

/// An adapter in the memory of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resident {
    /// The engine's base.
    pub base: BaseName,
    /// Whose, and which content.
    pub adapter: AdapterRef,
}

/// From which a request can go on when the node that holds its client dies.
#[derive(Debug, Clone)]
pub struct JournalRecord {
    /// The request.
    pub envelope: Envelope,
    /// The attempt that runs.
    pub attempt: u32,
    /// How its client is answered, in the gateway's own format.
    pub answer: Vec<u8>,
    /// What the client has.
    pub emitted: Emitted,
}

/// More of one choice was delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalDelta {
    /// Which request.
    pub id: RequestId,
    /// The attempt that runs.
    pub attempt: u32,
    /// Choice index.
    pub choice: u32,
    /// `seq` of the first token here.
    pub from: u32,
    /// The tokens.
    pub tokens: Vec<u32>,
    /// The end of the choice was delivered, too.
    pub finished: bool,
}

/// How far the node is with a request that asks for it on its client's behalf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// A client of this node waits for it.
    pub known: bool,
    /// And no other node may begin it; otherwise it has yet to ask the others.
    pub running: bool,
    /// Nothing yet: zero.
    pub n_tokens: u64,
}

/// The first and only frame that a node sends on a stream it opened.
#[derive(Debug, Clone)]
pub enum Opening {
    /// Work.
    Start(Box<Start>),
    /// A call.
    Request(Request),
    /// The sender asks for a new certificate for its key and name. Answered by [`Renewal`]. Since version 2.
    Renew,
}

/// The answer to [`Opening::Renew`].
#[derive(Debug, Clone, PartialEq)]
pub enum Renewal {
    /// A certificate, PEM.
    Certificate(String),
    /// Not done, and why.
    Refused(RequestError),
}

/// What has frames.
pub trait Message: Sized {
    /// The frame types it comes in.
    const KINDS: &'static [Kind];

    /// Appends its frame in a version to `out`.
    ///
    /// # Errors
    /// [`FrameError::Length`] when it is larger than its type may be, [`FrameError::Missing`] when the version does not
    /// know it; `out` is unchanged then.
    fn encode_for(&self, version: Version, now: Instant, out: &mut Vec<u8>) -> Result<(), FrameError>;

    /// As [`Self::encode_for`], for ends of this program.
    ///
    /// # Errors
    /// [`FrameError::Length`] when it is larger than its type may be; `out` is unchanged then.
    fn encode(&self, now: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        self.encode_for(Version::NEWEST, now, out)
    }

    /// Reads a frame of one of [`Self::KINDS`].
    ///
    /// # Errors
    /// [`FrameError::Body`] when its bytes are no value of the type, or a value that has no meaning.
    fn decode(frame: &Frame, now: Instant) -> Result<Self, FrameError>;
}

/// A [`Heartbeat`] as one datagram for ends of this program.
pub fn encode_datagram(heartbeat: &Heartbeat, now: Instant) -> Vec<u8> {
    encode_datagram_for(Version::NEWEST, heartbeat, now)
}

/// A [`Heartbeat`] as one datagram of a version.
pub fn encode_datagram_for(version: Version, heartbeat: &Heartbeat, now: Instant) -> Vec<u8> {
    let mut out = Vec::with_capacity(128);
    heartbeat
        .encode_for(version, now, &mut out)
        .expect("a heartbeat of every version has a fixed size below its limit");
    out
}

/// The [`Heartbeat`] in a datagram between ends of this program.
///
/// # Errors
/// When it is anything else.
pub fn decode_datagram(bytes: &[u8], now: Instant) -> Result<Heartbeat, FrameError> {
    decode_datagram_of(Version::NEWEST, bytes, now)
}

/// The [`Heartbeat`] in a datagram of a version.
///
/// # Errors
/// When it is anything else.
pub fn decode_datagram_of(version: Version, bytes: &[u8], now: Instant) -> Result<Heartbeat, FrameError> {
    let frame = crate::frame::Decoder::only(version, Heartbeat::KINDS, bytes)?;
    Heartbeat::decode(&frame, now)
}
