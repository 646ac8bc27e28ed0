//! What waits, what the queue is told about the engine and the adapters, and what it answers.
//!
//! Plain values; gateway, engine glue and actor build them. No decision is made here.

use std::time::{Duration, Instant};

use shared::adapter::{AdapterId, Residency};
use shared::error::{ErrorKind, RequestError};
use shared::id::{RequestId, Route};
use shared::request::{Emitted, Envelope};
use shared::tenant::Tier;

/// The facts of one request that decide its turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    /// Key for cancellation and for [`crate::FairQueue::left`].
    pub id: RequestId,
    /// Tenant and task: one line, first come first served inside it.
    pub route: Route,
    /// Queue class.
    pub tier: Tier,
    /// Share of the tenant inside its class, at least 1.
    pub weight: u32,
    /// Sequences the tenant may have in the engine at once, at least 1.
    pub concurrency: u32,
    /// Requests that may wait on the route.
    pub queue_depth: u32,
    /// Weights it needs; `None` runs the base model.
    pub adapter: Option<AdapterId>,
    /// Places in the batch it takes.
    pub n_sequences: u32,
    /// Prompt tokens: charged when it is picked, corrected by what was really computed.
    pub prompt_tokens: u32,
    /// KV positions that must be free before it may enter.
    pub kv_tokens: u32,
    /// When it was admitted; waiting time counts from here.
    pub admitted_at: Instant,
    /// After this it never reaches the engine.
    pub deadline: Instant,
}

impl Item {
    /// KV positions per sequence reserved for the first answer tokens, so that a request that enters does
    /// not preempt another one at once: four pages of 16.
    pub const ANSWER_HEADROOM_TOKENS: u32 = 64;

    /// Reads the facts off an admitted request whose client has `emitted` already.
    pub fn of(envelope: &Envelope, emitted: &Emitted) -> Self {
        let generation = &envelope.generation;
        let prompt_tokens = u32::try_from(generation.prompt.len()).unwrap_or(u32::MAX);
        let answer_tokens = generation.max_tokens.min(Self::ANSWER_HEADROOM_TOKENS);
        Self {
            id: envelope.id,
            route: envelope.route.clone(),
            tier: envelope.tier,
            weight: envelope.weight,
            concurrency: envelope.concurrency,
            queue_depth: envelope.queue_depth,
            adapter: envelope.adapter.as_ref().map(|pin| pin.adapter().id()),
            n_sequences: envelope.n_sequences(),
            prompt_tokens,
            kv_tokens: prompt_tokens
                .saturating_add(u32::try_from(emitted.n_tokens()).unwrap_or(u32::MAX))
                .saturating_add(answer_tokens.saturating_mul(envelope.n_sequences())),
            admitted_at: envelope.admitted_at,
            deadline: envelope.deadline,
        }
    }
}

/// What the engine has free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// More sequences that fit in the batch.
    pub sequences: u32,
    /// KV positions that are free without preempting anyone.
    pub kv_tokens: u32,
}

/// The adapter cache, seen from the queue. Calls are made under the queue's lock: they must be short.
pub trait AdapterView {
    /// Changes whenever an adapter became [`Residency::Ready`] or [`Residency::Failed`].
    fn epoch(&self) -> u64;

    /// Where one adapter is.
    fn residency(&mut self, adapter_id: &AdapterId) -> Residency;

    /// Appends the adapters that are ready or failed; asked only when the epoch changed.
    fn settled(&mut self, out: &mut Vec<AdapterId>);
}

/// A request whose turn has come. It counts as running until [`crate::FairQueue::left`] or
/// [`crate::FairQueue::put_back`].
#[derive(Debug)]
pub struct Picked<T> {
    /// Its facts.
    pub item: Item,
    /// What the submitter attached.
    pub payload: T,
    /// [`Residency::Ready`] or [`Residency::Failed`].
    pub residency: Residency,
    /// From admission to now.
    pub waited: Duration,
    /// Place in its line, for putting it back.
    pub(crate) seq: u64,
}

/// What fairness means on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FairConfig {
    /// Cost of one computed prompt token; default 1.
    pub prefill_weight: u32,
    /// Cost of one computed answer token; default 2, the price ratio VTC (OSDI'24) uses: an answer token
    /// occupies a row of a step of its own, prompt tokens share one.
    pub decode_weight: u32,
    /// Shares of the classes in the order of [`Tier::ALL`] while all are backlogged; default 1, 2, 2.
    pub class_weights: [u32; 3],
    /// Places in the batch that only this class may take, in the order of [`Tier::ALL`]; default none.
    /// What is reserved and unused stays free: latency for one class, paid in throughput of the others.
    pub class_sequences_reserved: [u32; 3],
    /// How far (weighted tokens at weight 1) those whose adapter is resident may run ahead of one who waits
    /// for a slot; default 4096, about ten chat turns. Small is fair, large loads adapters less often.
    pub pass_tokens_max: u64,
    /// How much unused share (weighted tokens at weight 1) a backlogged tenant can save up while its own
    /// concurrency cap keeps it back; default 16,384.
    pub credit_tokens_max: u64,
    /// Requests that may wait on this node; default 10,000. The last eighth is for tenants that have
    /// nothing waiting yet, so that a flood cannot shut the door on everybody else.
    pub waiting_max: usize,
    /// Requests of one tenant that may wait on this node, all its routes together; default 1000. A tenant with
    /// many tasks would otherwise have a line for each.
    pub tenant_waiting_max: u32,
    /// How long an idle tenant's debt is remembered; default 10 min.
    pub forget_after: Duration,
}

impl Default for FairConfig {
    fn default() -> Self {
        Self {
            prefill_weight: 1,
            decode_weight: 2,
            class_weights: [1, 2, 2],
            class_sequences_reserved: [0; 3],
            pass_tokens_max: 4096,
            credit_tokens_max: 16_384,
            waiting_max: 10_000,
            tenant_waiting_max: 1000,
            forget_after: Duration::from_secs(600),
        }
    }
}

/// Why a request was not queued. Nothing of it stays behind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The route's own line is full: the tenant sends faster than its share is served.
    #[error(
        "{waiting} requests already wait on this route, limit {limit}; hint: retry after the Retry-After header or raise limits.queue_depth"
    )]
    RouteFull {
        /// Waiting now.
        waiting: u32,
        /// The contract's depth.
        limit: u32,
        /// Estimate of when the line has moved.
        retry_after: Duration,
    },
    /// The tenant has requests waiting on many routes.
    #[error(
        "{waiting} requests of this tenant already wait on this node, limit {limit}; hint: retry after the Retry-After header"
    )]
    TenantFull {
        /// Waiting now, on all its routes.
        waiting: u32,
        /// The node's limit for one tenant.
        limit: u32,
        /// Estimate of when there is room.
        retry_after: Duration,
    },
    /// The node's queue is full.
    #[error("{waiting} requests already wait on this node, limit {limit}; hint: retry after the Retry-After header")]
    NodeFull {
        /// Waiting now.
        waiting: usize,
        /// The limit that applies to this tenant.
        limit: usize,
        /// Estimate of when there is room.
        retry_after: Duration,
    },
    /// The deadline had passed on arrival.
    #[error("the deadline passed before the request could be queued")]
    DeadlinePassed,
    /// A request with this id waits or runs already.
    #[error("request {0} is already queued or running")]
    Duplicate(RequestId),
    /// The node is stopping.
    #[error("this node is stopping; hint: retry, another node will answer")]
    Closed,
}

impl From<SubmitError> for RequestError {
    fn from(error: SubmitError) -> Self {
        let text = error.to_string();
        match error {
            SubmitError::RouteFull { retry_after, .. } | SubmitError::TenantFull { retry_after, .. } => {
                Self::new(ErrorKind::Throttled, "queue_full", text).retry_after(retry_after)
            }
            // The tenant did nothing wrong here, so this is not a 429 and tells no numbers of other tenants.
            SubmitError::NodeFull { retry_after, .. } => Self::new(
                ErrorKind::Unavailable,
                "node_overloaded",
                "this node has too many requests waiting; hint: retry after the Retry-After header",
            )
            .retry_after(retry_after),
            SubmitError::DeadlinePassed => Self::new(ErrorKind::Deadline, "deadline_exceeded", text),
            SubmitError::Duplicate(_) => Self::new(ErrorKind::Conflict, "duplicate_request", text),
            SubmitError::Closed => {
                Self::new(ErrorKind::Unavailable, "node_stopping", text).retry_after(Duration::from_secs(1))
            }
        }
    }
}
