//! The messages between nodes as bytes: the only `rkyv` derives of the workspace, and the table of frame types.
//!
//! Plain data without meaning; `convert` gives it one or refuses it. Numbers of types are never used again. A type
//! that changed keeps its former layout beside it, under the version that had it, as long as that is spoken.

pub(crate) mod v1;

use rkyv::api::high::{HighDeserializer, HighSerializer, HighValidator};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor;
use rkyv::ser::allocator::ArenaHandle;
use rkyv::util::AlignedVec;
use rkyv::{Archive, Deserialize, Serialize};

use crate::frame::{Frame, FrameError, Kind, header};
use crate::schema::{FORMAT, Schema, then, wire_type};
use crate::version::Version;

/// A message that is a frame of its own.
pub(crate) trait Body: Schema {
    /// The type of its frames.
    const KIND: Kind;
}

/// Fingerprint of a layout as it stands in headers.
const fn schema<T: Schema>() -> Option<u64> {
    Some(then(FORMAT, T::HASH))
}

/// The table of frame types: what is said of version 1 only where it differed.
macro_rules! bodies {
    ($($name:ident = $id:literal, at most $bytes_max:expr $(, in version 1 $v1:expr)?;)*) => {
        $(impl Body for $name {
            const KIND: Kind = Kind {
                id: $id,
                schemas: [bodies!(@ schema::<$name>() $(, $v1)?), schema::<$name>()],
                bytes_max: $bytes_max,
                name: stringify!($name),
            };
        })*

        /// Every type of frame, for tests that go through all.
        #[cfg(test)]
        pub(crate) const KINDS: &[Kind] = &[$($name::KIND),*];
    };
    (@ $same:expr) => { $same };
    (@ $same:expr, $v1:expr) => { $v1 };
}

/// 1 KiB.
const KIB: u32 = 1 << 10;
/// 1 MiB.
const MIB: u32 = 1 << 20;

bodies! {
    Hello = 1, at most 64 * KIB, in version 1 schema::<v1::Hello>();
    // One datagram: below the smallest path that QUIC allows.
    Heartbeat = 2, at most KIB;
    // A prompt of 131,072 tokens, as many tokens of answer, a schema.
    Start = 3, at most 4 * MIB, in version 1 schema::<v1::Start>();
    // Log-probabilities of a whole prompt; tokens take a hundred bytes.
    Event = 4, at most 16 * MIB;
    Moved = 5, at most 4 * KIB;
    Refused = 6, at most 16 * KIB;
    // Log entries in batches, snapshots in pieces.
    Raft = 10, at most 16 * MIB;
    RaftReply = 11, at most 16 * MIB;
    Admin = 12, at most 4 * MIB;
    AdminReply = 13, at most 4 * MIB;
    Warm = 14, at most KIB;
    Done = 15, at most KIB;
    // A start and how its client is answered.
    JournalOpen = 16, at most 8 * MIB, in version 1 schema::<v1::JournalOpen>();
    JournalPut = 17, at most MIB;
    JournalTake = 18, at most KIB;
    Journal = 19, at most 8 * MIB, in version 1 schema::<v1::Journal>();
    DrainNotice = 20, at most KIB;
    Probe = 21, at most KIB;
    ProbeReply = 22, at most KIB;
    Renew = 23, at most KIB, in version 1 None;
    Renewed = 24, at most 8 * KIB, in version 1 None;
    AskResidents = 25, at most KIB, in version 1 None;
    // Slots are some thousands at most; each takes a hundred bytes.
    Residents = 26, at most MIB, in version 1 None;
    AskBaseText = 27, at most KIB, in version 1 None;
    // A piece of a MiB.
    BaseText = 28, at most 2 * MIB, in version 1 None;
}

/// Appends the frame of `body`, whose layout is that of the version, to `out`.
pub(crate) fn write<T>(version: Version, body: &T, out: &mut Vec<u8>) -> Result<(), FrameError>
where
    T: Body + for<'a> Serialize<HighSerializer<AlignedVec, ArenaHandle<'a>, rancor::Error>>,
{
    let kind = T::KIND;
    let bytes = rkyv::to_bytes::<rancor::Error>(body).expect("serialising to memory fails only without memory");
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    if length > kind.bytes_max {
        return Err(FrameError::Length { name: kind.name, found: length, max: kind.bytes_max });
    }
    let header = header(version, kind, length)?;
    debug_assert_eq!(kind.schema(version), schema::<T>(), "a version is written in its own layouts");
    out.extend_from_slice(&header);
    out.extend_from_slice(&bytes);
    Ok(())
}

/// The value that `frame` holds, whose layout is that of its version.
pub(crate) fn read<T>(frame: &Frame) -> Result<T, FrameError>
where
    T: Body + Archive,
    T::Archived: for<'a> CheckBytes<HighValidator<'a, rancor::Error>> + Deserialize<T, HighDeserializer<rancor::Error>>,
{
    debug_assert_eq!(frame.kind.schema(frame.version), schema::<T>(), "a version is read in its own layouts");
    rkyv::from_bytes::<T, rancor::Error>(&frame.body)
        .map_err(|error| FrameError::Body { name: T::KIND.name, reason: error.to_string() })
}

wire_type! {
    struct Hello {
        cluster: String,
        node: String,
        incarnation: u64,
        bases: Vec<ServedBase>,
        wire_oldest: u16,
        wire_newest: u16,
        has_authority: bool,
    }
}

wire_type! {
    struct ServedBase {
        name: String,
        hash: [u8; 32],
        text: Option<[u8; 32]>,
        numerics_id: String,
    }
}

wire_type! {
    struct Heartbeat {
        incarnation: u64,
        seq: u64,
        uptime_ms: u64,
        epoch: u64,
        phase: Phase,
        running: u32,
        places: u32,
        waiting: u32,
    }
}

wire_type! {
    enum Phase { Serving, Draining, Leaving }
}

wire_type! {
    struct Start {
        envelope: Envelope,
        attempt: u32,
        epoch: u64,
        emitted: Vec<EmittedChoice>,
        pin: BasePin,
    }
}

wire_type! {
    struct BasePin {
        hash: Option<[u8; 32]>,
        numerics: Option<String>,
    }
}

impl BasePin {
    /// Of a node that says nothing of it.
    pub(crate) const NONE: Self = Self { hash: None, numerics: None };
}

wire_type! {
    struct EmittedChoice {
        tokens: Vec<u32>,
        finished: bool,
    }
}

wire_type! {
    struct Envelope {
        id: u128,
        tenant: String,
        task: Option<String>,
        tier: Tier,
        weight: u32,
        concurrency: u32,
        queue_depth: u32,
        base: String,
        adapter: Option<AdapterPin>,
        fell_back: bool,
        cache_secret: [u8; 32],
        generation: Generation,
        contract_epoch: u64,
        admitted_ms_ago: u64,
        deadline_ms_left: u64,
    }
}

wire_type! {
    enum Tier { Shared, Premium, Isolated }
}

wire_type! {
    struct AdapterPin {
        name: String,
        hash: [u8; 32],
    }
}

wire_type! {
    struct Generation {
        prompt: Vec<u32>,
        n: u32,
        max_tokens: u32,
        min_tokens: u32,
        ignore_eos: bool,
        stop_token_ids: Vec<u32>,
        stop: Vec<String>,
        sampling: Sampling,
        logprobs: Option<u32>,
        prompt_logprobs: Option<u32>,
        grammar: Option<Grammar>,
    }
}

wire_type! {
    struct Sampling {
        temperature: f32,
        top_p: f32,
        top_k: u32,
        min_p: f32,
        repetition_penalty: f32,
        presence_penalty: f32,
        frequency_penalty: f32,
        logit_bias: Vec<Bias>,
        seed: u64,
    }
}

wire_type! {
    struct Bias {
        token: u32,
        bias: f32,
    }
}

wire_type! {
    enum Grammar { JsonObject, JsonSchema(String), Lark(String) }
}

wire_type! {
    struct Event {
        attempt: u32,
        event: TokenEvent,
    }
}

wire_type! {
    enum TokenEvent { Started(Started), Prompt(Prompt), Token(Token), Finished(Finished), Failed(Refused) }
}

wire_type! {
    struct Started {
        queue_wait_us: u64,
        cached_tokens: u32,
        fell_back: bool,
        adapter_hit: Option<bool>,
    }
}

wire_type! {
    struct Prompt {
        logprobs: Vec<PositionLogprobs>,
    }
}

wire_type! {
    struct Token {
        choice: u32,
        seq: u32,
        id: u32,
        logprobs: Option<PositionLogprobs>,
    }
}

wire_type! {
    struct Finished {
        choice: u32,
        reason: FinishReason,
        compute_us: u64,
    }
}

wire_type! {
    enum FinishReason { Stop, StopText(u32), Length }
}

wire_type! {
    struct PositionLogprobs {
        chosen: TokenLogprob,
        top: Vec<TokenLogprob>,
    }
}

wire_type! {
    struct TokenLogprob {
        id: u32,
        logprob: f32,
    }
}

wire_type! {
    struct Moved {
        epoch: u64,
        to: Vec<String>,
    }
}

wire_type! {
    struct Refused {
        kind: ErrorKind,
        code: String,
        message: String,
        param: Option<String>,
        retry_after_ms: Option<u64>,
    }
}

wire_type! {
    enum ErrorKind {
        Invalid,
        Unauthenticated,
        Forbidden,
        NotFound,
        Conflict,
        TooLarge,
        Unprocessable,
        Throttled,
        Unavailable,
        Deadline,
        StorageFull,
        Internal,
    }
}

wire_type! {
    struct Raft {
        group: u32,
        bytes: Vec<u8>,
    }
}

wire_type! {
    struct RaftReply {
        bytes: Vec<u8>,
    }
}

wire_type! {
    struct Admin {
        bytes: Vec<u8>,
    }
}

wire_type! {
    struct AdminReply {
        bytes: Vec<u8>,
    }
}

wire_type! {
    struct Warm {
        epoch: u64,
        base: String,
        tenant: String,
        hash: [u8; 32],
    }
}

wire_type! {
    /// Holds a byte, since a frame without a body would need rules of its own.
    struct Done {
        reserved: u8,
    }
}

wire_type! {
    struct JournalRecord {
        envelope: Envelope,
        attempt: u32,
        answer: Vec<u8>,
        emitted: Vec<EmittedChoice>,
        pin: BasePin,
    }
}

wire_type! {
    struct JournalOpen {
        record: JournalRecord,
    }
}

wire_type! {
    struct JournalPut {
        deltas: Vec<JournalDelta>,
    }
}

wire_type! {
    struct JournalDelta {
        id: u128,
        attempt: u32,
        choice: u32,
        from: u32,
        tokens: Vec<u32>,
        finished: bool,
    }
}

wire_type! {
    struct JournalTake {
        id: u128,
    }
}

wire_type! {
    struct Journal {
        record: Option<JournalRecord>,
    }
}

wire_type! {
    struct DrainNotice {
        epoch: u64,
    }
}

wire_type! {
    struct Probe {
        id: u128,
        attempt: u32,
    }
}

wire_type! {
    struct ProbeReply {
        known: bool,
        running: bool,
        n_tokens: u64,
    }
}

wire_type! {
    /// As [`Done`].
    struct Renew {
        reserved: u8,
    }
}

wire_type! {
    struct Renewed {
        certificate: String,
    }
}

wire_type! {
    /// As [`Done`].
    struct AskResidents {
        reserved: u8,
    }
}

wire_type! {
    struct Residents {
        adapters: Vec<Resident>,
    }
}

wire_type! {
    struct AskBaseText {
        text: [u8; 32],
        offset: u64,
    }
}

wire_type! {
    struct BaseText {
        total: u64,
        bytes: Vec<u8>,
    }
}

wire_type! {
    struct Resident {
        base: String,
        tenant: String,
        hash: [u8; 32],
    }
}
