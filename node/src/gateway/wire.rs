//! The shapes that clients see: OpenAI's objects, with vLLM's extensions for token ids and our own
//! `tenantry` object. Plain data; made by [`super::answer`] and [`super::stream`]. Also the API document's schemas.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

/// Token counts of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    /// Tokens of the prompt, counted once whatever `n` is.
    pub prompt_tokens: u32,
    /// Tokens of all answers, end-of-answer tokens included.
    pub completion_tokens: u32,
    /// Sum.
    pub total_tokens: u32,
    /// Details.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// Details of the prompt's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Tokens that came from the tenant's own prefix cache.
    pub cached_tokens: u32,
}

/// What this server adds to an answer that OpenAI has no place for; absent when there is nothing to say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub struct Tenantry {
    /// `base`: the contract let the base model answer because the adapter was missing or broken.
    pub fallback: &'static str,
    /// The base model that answered.
    pub base: String,
}

/// `POST /v1/chat/completions`, whole.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatCompletion {
    /// `chatcmpl-…`.
    pub id: String,
    /// `chat.completion`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// What answered.
    pub model: String,
    /// The answers.
    pub choices: Vec<ChatChoice>,
    /// Token counts.
    pub usage: Usage,
    /// Same fingerprint, same weights, same request, same seed: same answer.
    pub system_fingerprint: String,
    /// With `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// With `prompt_logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Value>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenantry: Option<Tenantry>,
}

/// One answer of a chat completion.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatChoice {
    /// 0 … n−1.
    pub index: u32,
    /// The answer.
    pub message: Message,
    /// With `logprobs`.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// `stop`, `length` or `tool_calls`.
    pub finish_reason: &'static str,
    /// With `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// An assistant's message.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Message {
    /// `assistant`.
    pub role: &'static str,
    /// Text; null when there are only tool calls.
    #[schema(required)]
    pub content: Option<String>,
    /// Always null.
    #[schema(required)]
    pub refusal: Option<String>,
    /// Calls the model wants.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// One call.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ToolCall {
    /// Position among the calls; only in streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    /// `call_…`.
    pub id: String,
    /// `function`.
    pub r#type: &'static str,
    /// The function.
    pub function: FunctionCall,
}

/// Name and arguments of a call.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct FunctionCall {
    /// Function name.
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// Log-probabilities of a chat answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    /// One entry per token.
    pub content: Vec<ChatTokenLogprob>,
    /// Always null.
    #[schema(required)]
    pub refusal: Option<Vec<ChatTokenLogprob>>,
}

/// One position of a chat answer.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatTokenLogprob {
    /// Text of the token; half characters are U+FFFD.
    pub token: String,
    /// Natural logarithm of the probability before temperature; at least −9999.
    pub logprob: f32,
    /// Exact bytes.
    pub bytes: Vec<u8>,
    /// The most likely tokens.
    pub top_logprobs: Vec<TopLogprob>,
}

/// One alternative.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct TopLogprob {
    /// Text of the token.
    pub token: String,
    /// Natural logarithm of the probability.
    pub logprob: f32,
    /// Exact bytes.
    pub bytes: Vec<u8>,
}

/// One piece of a streamed chat completion.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChatChunk {
    /// The same in all chunks.
    pub id: String,
    /// `chat.completion.chunk`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// What answers.
    pub model: String,
    /// One choice, or none in the usage chunk.
    pub choices: Vec<ChunkChoice>,
    /// With `include_usage`: null in all chunks but the last. Absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    /// As in the whole answer.
    pub system_fingerprint: String,
    /// With `return_token_ids`, in the first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// Extension, in the first chunk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenantry: Option<Tenantry>,
}

/// A choice inside a chunk.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ChunkChoice {
    /// 0 … n−1.
    pub index: u32,
    /// What is new.
    pub delta: Delta,
    /// With `logprobs`.
    #[schema(required)]
    pub logprobs: Option<ChatLogprobs>,
    /// In the last chunk of a choice.
    #[schema(required)]
    pub finish_reason: Option<&'static str>,
    /// With `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
}

/// What is new in a chunk.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct Delta {
    /// In the first chunk of a choice.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// Text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// Calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// `POST /v1/completions`, whole and in pieces.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Completion {
    /// `cmpl-…`.
    pub id: String,
    /// `text_completion`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// What answers.
    pub model: String,
    /// The answers, prompts × n; one in a piece, none in the usage piece.
    pub choices: Vec<CompletionChoice>,
    /// Always there in a whole answer; in streams as in [`ChatChunk::usage`].
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    /// As for chat.
    pub system_fingerprint: String,
    /// Extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenantry: Option<Tenantry>,
}

/// One answer of a text completion, or a piece of it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// prompt × n + answer.
    pub index: u32,
    /// Text.
    pub text: String,
    /// With `logprobs`.
    #[schema(required)]
    pub logprobs: Option<CompletionLogprobs>,
    /// `stop` or `length`; null before the last piece.
    #[schema(required)]
    pub finish_reason: Option<&'static str>,
    /// With `return_token_ids`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// With `return_token_ids`; in streams in the first piece.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// With `prompt_logprobs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Value>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
}

/// Log-probabilities of a text completion: four lists of equal length.
#[derive(Debug, Clone, Default, PartialEq, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    /// Texts of the tokens.
    pub tokens: Vec<String>,
    /// Null for the first prompt token.
    pub token_logprobs: Vec<Option<f32>>,
    /// Text of the alternatives → log-probability.
    #[schema(value_type = Vec<Option<Object>>)]
    pub top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    /// Where the token begins in the text, in characters.
    pub text_offset: Vec<u32>,
}

/// vLLM's list: null for the first token, then token id → entry.
pub type PromptLogprobs = Vec<Option<BTreeMap<String, PromptLogprob>>>;

/// One entry of [`PromptLogprobs`].
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct PromptLogprob {
    /// Natural logarithm of the probability.
    pub logprob: f32,
    /// 1 is the most likely; null when it is not among the reported.
    #[schema(required)]
    pub rank: Option<u32>,
    /// Text of the token.
    pub decoded_token: String,
}

/// `GET /v1/models`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ModelList {
    /// `list`.
    pub object: &'static str,
    /// What the caller may name.
    pub data: Vec<Model>,
}

/// One model.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Model {
    /// What goes into `model`.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// The tenant, or `tenantry` for a base model.
    pub owned_by: String,
    /// The full version a task stands for (vLLM).
    #[schema(required)]
    pub root: Option<String>,
    /// Base model of an adapter (vLLM).
    #[schema(required)]
    pub parent: Option<String>,
    /// Longest sequence in tokens (vLLM).
    pub max_model_len: Option<u32>,
    /// Content hash of the adapter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub adapter_generation: Option<String>,
}

/// `GET /healthz`, `/livez`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Liveness {
    /// `ok`.
    pub status: &'static str,
}

/// `GET /readyz`, `/health`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Readiness {
    /// `ready` or `not_ready`.
    pub status: &'static str,
    /// Every condition.
    pub checks: Vec<ReadinessCheck>,
}

/// One condition of readiness.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ReadinessCheck {
    /// Short name.
    pub name: &'static str,
    /// Whether it holds.
    pub ok: bool,
    /// For the operator.
    pub detail: String,
}

/// `GET /version`.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct Version {
    /// Version of the server.
    pub version: &'static str,
}
