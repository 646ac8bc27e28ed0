//! An admitted request: everything the owner of the work needs and nothing the client chose freely.
//!
//! The gateway builds an [`Envelope`] after authentication and admission. It is complete: a request can
//! be resumed anywhere from (envelope, emitted tokens), because sampling, stop matching and grammar state
//! are functions of the emitted tokens (ARCHITECTURE, counter-based sampling).

use std::sync::Arc;
use std::time::Instant;

use crate::adapter::AdapterRef;
use crate::hash::ContentHash;
use crate::id::{AdapterName, BaseName, RequestId, Route};
use crate::tenant::Tier;

/// How the next token is chosen. Neutral values change nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; at most 2.
    pub temperature: f32,
    /// Nucleus mass in (0, 1]; 1 is off.
    pub top_p: f32,
    /// Keep the k most likely; 0 is off.
    pub top_k: u32,
    /// Drop tokens below `min_p` × the best probability; 0 is off.
    pub min_p: f32,
    /// Divides (positive) or multiplies (negative) logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted once from tokens already in the answer; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the answer; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Key of the counter-based random stream.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A constraint on the text of the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON that satisfies this schema (JSON text).
    JsonSchema(String),
    /// A Lark grammar built by the server itself (tool calls); never a tenant's text.
    Lark(String),
}

/// What to generate: fixed at admission.
#[derive(Debug, Clone)]
pub struct Generation {
    /// Prompt tokens, not empty.
    pub prompt: Arc<[u32]>,
    /// Independent answers wanted, at least 1.
    pub n: u32,
    /// Longest answer, at least 1.
    pub max_tokens: u32,
    /// No end of answer before this many tokens.
    pub min_tokens: u32,
    /// Go on after the end-of-answer token.
    pub ignore_eos: bool,
    /// Token ids that end the answer besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Choice of the next token.
    pub sampling: Sampling,
    /// Report the chosen token's log-probability and this many of the best.
    pub logprobs: Option<u32>,
    /// The same for every prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// Constraint on the answer.
    pub grammar: Option<Grammar>,
}

impl Generation {
    /// One answer of at most `max_tokens` tokens, with nothing special about it.
    pub fn new(prompt: impl Into<Arc<[u32]>>, max_tokens: u32) -> Self {
        Self {
            prompt: prompt.into(),
            n: 1,
            max_tokens,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            stop: Vec::new(),
            sampling: Sampling::default(),
            logprobs: None,
            prompt_logprobs: None,
            grammar: None,
        }
    }

    /// One answer of exactly `n_tokens` tokens, each the likeliest.
    pub fn greedy(prompt: impl Into<Arc<[u32]>>, n_tokens: u32) -> Self {
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        Self { ignore_eos: true, sampling, ..Self::new(prompt, n_tokens) }
    }
}

/// The adapter a request was admitted with; it finishes on exactly these weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterPin {
    /// Full version name.
    pub name: AdapterName,
    /// The content.
    pub hash: ContentHash,
}

impl AdapterPin {
    /// The copy of that content which it names: its name's client owns it.
    pub fn adapter(&self) -> AdapterRef {
        AdapterRef { tenant: self.name.client.clone(), hash: self.hash }
    }
}

/// Of which model, besides its adapter, the tokens of an answer are a function: a node with another does not go on with
/// the answer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BasePin {
    /// Content of the base that the request was encoded for; `None` when a node of wire version 1 admitted it.
    pub hash: Option<ContentHash>,
    /// Names the arithmetic of the node that computes it, as nodes say in their hello; `None` before the first run.
    /// Binds once the client has tokens.
    pub numerics: Option<String>,
}

/// An admitted request.
#[derive(Debug, Clone)]
pub struct Envelope {
    /// Unique id; also keys metering and resume.
    pub id: RequestId,
    /// Whose, what for.
    pub route: Route,
    /// Queue class at admission.
    pub tier: Tier,
    /// Weight inside the tier at admission.
    pub weight: u32,
    /// Sequences this tenant may run at once.
    pub concurrency: u32,
    /// Requests that may wait on this route.
    pub queue_depth: u32,
    /// Base model to run on.
    pub base: BaseName,
    /// Which content and arithmetic of it.
    pub pin: BasePin,
    /// Adapter weights; `None` runs the base model itself.
    pub adapter: Option<AdapterPin>,
    /// True when the contract's fallback replaced a missing adapter by the base.
    pub fell_back: bool,
    /// Keyed secret of the tenant's prefix cache; pages are never shared across secrets.
    pub cache_secret: [u8; 32],
    /// What to generate.
    pub generation: Arc<Generation>,
    /// Registry epoch of the contract it was admitted under.
    pub contract_epoch: u64,
    /// When it was admitted (monotonic, this node).
    pub admitted_at: Instant,
    /// When it must be finished (monotonic, this node).
    pub deadline: Instant,
}

impl Envelope {
    /// Sequences the request will occupy in the batch.
    pub fn n_sequences(&self) -> u32 {
        self.generation.n
    }
}

/// What the client has of an answer so far. With the envelope it is all that another engine needs to go on: sampling,
/// penalties, stop texts and grammars are functions of the tokens.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Emitted(
    /// By choice index. Choices beyond the end have nothing; no more than `Generation::n`.
    pub Vec<EmittedChoice>,
);

/// One choice of an [`Emitted`].
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EmittedChoice {
    /// Tokens delivered: `seq` 0, 1, 2 … of the choice.
    pub tokens: Vec<u32>,
    /// Its end was delivered, too: nothing of it is computed again.
    pub finished: bool,
}

// === impl Emitted ===

impl Emitted {
    /// Tokens delivered of a choice.
    pub fn tokens(&self, choice: u32) -> &[u32] {
        self.0.get(choice as usize).map_or(&[], |choice| &choice.tokens)
    }

    /// Whether the end of a choice was delivered.
    pub fn is_finished(&self, choice: u32) -> bool {
        self.0.get(choice as usize).is_some_and(|choice| choice.finished)
    }

    /// Tokens delivered, all choices together.
    pub fn n_tokens(&self) -> usize {
        self.0.iter().map(|choice| choice.tokens.len()).sum()
    }

    /// No token was delivered.
    pub fn is_empty(&self) -> bool {
        self.n_tokens() == 0
    }
}
