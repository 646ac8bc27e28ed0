//! Every bound of the client API with its reason, in one table. Checked before anything is allocated from a
//! client's claims; the contract's own limits (rates, concurrency) are not here.

use std::time::Duration;

/// Largest request body. A 32k-token conversation is about 130 KiB; the rest is room for tool schemas.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// A body must have arrived within this time, or its connection is held for nothing.
pub const BODY_WAIT_MAX: Duration = Duration::from_secs(10);
/// Deepest JSON. Real requests nest about 12 deep (tool schemas).
pub const JSON_DEPTH_MAX: usize = 32;
/// Values in one body: a 128k-token prompt as ids, twice.
pub const JSON_VALUES_MAX: usize = 262_144;
/// Object keys in one body: 1024 messages of 4 keys, 1024 biases and 128 tools of 80 keys.
pub const JSON_KEYS_MAX: usize = 16_384;
/// Longest model name: an adapter name is at most 3 × 63 + 37 characters.
pub const MODEL_BYTES_MAX: usize = 256;
/// Messages of a conversation.
pub const MESSAGES_MAX: usize = 1024;
/// Prompts of one completion request; each takes its own place in the queue.
pub const PROMPTS_MAX: usize = 16;
/// Answers per prompt: each is a sequence in the batch.
pub const N_MAX: u32 = 8;
/// Answers of one request in all.
pub const CHOICES_MAX: u32 = 32;
/// Longest answer that can be asked for at all; the model's context is the real limit.
pub const TOKENS_MAX: u32 = 1 << 20;
/// Stop texts of a request; each is matched at every token.
pub const STOP_MAX: usize = 16;
/// Longest stop text; a stream holds back at most this much.
pub const STOP_BYTES_MAX: usize = 256;
/// Stop token ids of a request.
pub const STOP_TOKEN_IDS_MAX: usize = 64;
/// Entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Alternatives reported per position.
pub const TOP_LOGPROBS_MAX: u32 = 20;
/// Tools of a request.
pub const TOOLS_MAX: usize = 128;
/// Longest JSON schema, as text: of a response format, or of all tools together.
pub const SCHEMA_BYTES_MAX: usize = 64 * 1024;
/// Most calls a `required` answer may hold; keeps small models from listing calls for ever.
pub const TOOL_CALLS_MAX: usize = 8;
/// Longest wait a client may ask for.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(3600);
/// Longest idempotency key: two UUIDs and a prefix.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;
/// Longest bearer token looked at.
pub const KEY_BYTES_MAX: usize = 256;
/// How long a stream keeps its status open for a refusal that comes from the queue, before it commits to 200.
pub const STATUS_WAIT_MAX: Duration = Duration::from_secs(5);
/// Pause after which a stream sends a comment: below the 30 s after which common proxies cut a silent stream.
pub const KEEP_ALIVE_EVERY: Duration = Duration::from_secs(15);
/// A client that takes nothing for this long is cut, so that it cannot hold KV pages.
pub const STALL_MAX: Duration = Duration::from_secs(10);
/// Frames a stream may be ahead of its client.
pub const FRAMES_AHEAD_MAX: usize = 32;
/// Events merged into one frame when the engine is ahead.
pub const EVENTS_PER_FRAME_MAX: usize = 64;

/// The waits of the API together, so that tests can shorten them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// [`BODY_WAIT_MAX`].
    pub body_wait: Duration,
    /// [`STATUS_WAIT_MAX`].
    pub status_wait: Duration,
    /// [`KEEP_ALIVE_EVERY`].
    pub keep_alive: Duration,
    /// [`STALL_MAX`].
    pub stall: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self { body_wait: BODY_WAIT_MAX, status_wait: STATUS_WAIT_MAX, keep_alive: KEEP_ALIVE_EVERY, stall: STALL_MAX }
    }
}

const _: () = assert!(JSON_KEYS_MAX < JSON_VALUES_MAX);
const _: () = assert!(BODY_BYTES_MAX > SCHEMA_BYTES_MAX);
