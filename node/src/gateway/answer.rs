//! Assembled choices → the bodies that clients see: the parts that whole answers and streams share, and whole
//! answers themselves.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use shared::id::RequestId;
use shared::token::{PositionLogprobs, TokenLogprob};

use super::assemble::{Ending, Fresh, Position};
use super::backend::TokenText;
use super::flow::{Flow, Part, count};
use super::tools::calls::Call;
use super::wire::*;

/// What of the request decides how the answer looks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shape {
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: String,
    /// Seconds since the Unix epoch.
    pub created: u64,
    /// Which endpoint.
    pub kind: Kind,
    /// Answers per prompt.
    pub n: u32,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
    /// Whether those of the prompt were asked for by their own field.
    pub prompt_logprobs: bool,
    /// Whether token ids were asked for.
    pub return_token_ids: bool,
    /// Send a usage chunk at the end of a stream.
    pub include_usage: bool,
    /// Send the usage so far with every chunk.
    pub continuous_usage: bool,
}

/// Endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text {
        /// The prompts to put in front of the answers, as the client wrote them; `None` for token ids.
        echo: Option<Vec<Option<String>>>,
    },
}

/// Lowest log-probability reported: JSON has no infinity.
const LOGPROB_MIN: f32 = -9999.0;

/// The whole chat completion. `endings[choice]` belongs to the only prompt.
pub fn chat(shape: &Shape, flow: &mut Flow, endings: &[Vec<Option<Ending>>]) -> ChatCompletion {
    let usage = flow.usage();
    let tenantry = flow.tenantry();
    let part = flow.parts.first_mut().expect("a request has at least one prompt");
    let choices = (0..shape.n).map(|index| {
        let fresh = part.assembly.take(index);
        let ending = ending_of(endings, 0, index);
        let tool_calls: Vec<ToolCall> = ending.calls.into_iter().map(|call| tool_call(call, None)).collect();
        let content = if fresh.text.is_empty() && !tool_calls.is_empty() { None } else { Some(fresh.text.clone()) };
        ChatChoice {
            index,
            logprobs: chat_logprobs(shape, part, &fresh),
            message: Message { role: "assistant", content, refusal: None, tool_calls },
            finish_reason: ending.reason,
            token_ids: shape.return_token_ids.then_some(fresh.ids),
        }
    });
    ChatCompletion {
        choices: choices.collect(),
        id: shape.id.clone(),
        object: "chat.completion",
        created: shape.created,
        model: part.served.model.clone(),
        usage,
        system_fingerprint: part.served.numerics_id.clone(),
        prompt_token_ids: shape.return_token_ids.then(|| part.prompt_tokens.to_vec()),
        prompt_logprobs: shape.prompt_logprobs.then(|| prompt_logprobs(part)),
        tenantry,
    }
}

/// The whole text completion. `endings[prompt][choice]`.
pub fn completion(shape: &Shape, flow: &mut Flow, endings: &[Vec<Option<Ending>>]) -> Completion {
    let usage = flow.usage();
    let mut choices = Vec::new();
    for prompt_idx in 0..flow.parts.len() {
        let echo = echo(shape, &flow.parts[prompt_idx], prompt_idx);
        let part = &mut flow.parts[prompt_idx];
        for choice in 0..shape.n {
            let fresh = part.assembly.take(choice);
            let ending = ending_of(endings, prompt_idx, choice);
            let mut logprobs = echo.as_ref().map_or_else(CompletionLogprobs::default, |echo| echo.logprobs.clone());
            let offset = echo.as_ref().map_or(0, |echo| count(echo.text.chars().count()));
            add_answer_logprobs(&mut logprobs, part, &fresh.logprobs, offset);
            choices.push(CompletionChoice {
                index: count(prompt_idx) * shape.n + choice,
                text: echo.as_ref().map_or("", |echo| &echo.text).to_owned() + &fresh.text,
                logprobs: shape.logprobs.then_some(logprobs),
                finish_reason: Some(ending.reason),
                token_ids: shape.return_token_ids.then_some(fresh.ids),
                prompt_token_ids: shape.return_token_ids.then(|| part.prompt_tokens.to_vec()),
                prompt_logprobs: shape.prompt_logprobs.then(|| prompt_logprobs(part)),
            });
        }
    }
    Completion {
        id: shape.id.clone(),
        object: "text_completion",
        created: shape.created,
        model: flow.served().model.clone(),
        choices,
        usage: Some(Some(usage)),
        system_fingerprint: flow.served().numerics_id.clone(),
        tenantry: flow.tenantry(),
    }
}

fn ending_of(endings: &[Vec<Option<Ending>>], prompt_idx: usize, choice: u32) -> Ending {
    endings[prompt_idx][choice as usize].clone().expect("called when every choice has ended")
}

/// A call as clients see it, with a fresh id.
pub fn tool_call(call: Call, index: Option<u32>) -> ToolCall {
    let random = RequestId::random().to_string();
    let function = FunctionCall { name: call.name, arguments: call.arguments };
    ToolCall { index, id: format!("call_{}", &random[..24]), r#type: "function", function }
}

/// A prompt put in front of an answer.
pub struct Echo {
    /// Its text.
    pub text: String,
    /// Its log-probabilities, when asked for.
    pub logprobs: CompletionLogprobs,
}

/// The echo of a prompt, when asked for.
pub fn echo(shape: &Shape, part: &Part, prompt_idx: usize) -> Option<Echo> {
    let Kind::Text { echo: Some(prompts) } = &shape.kind else { return None };
    let whole = prompts.get(prompt_idx).cloned().flatten();
    let text = whole.unwrap_or_else(|| token_ids_text(part));
    let logprobs = if shape.logprobs { echo_logprobs(part) } else { CompletionLogprobs::default() };
    Some(Echo { text, logprobs })
}

/// One pass over the prompt: its pieces, where each begins in the text, and how likely it was.
fn echo_logprobs(part: &Part) -> CompletionLogprobs {
    let mut logprobs = CompletionLogprobs::default();
    let mut offset = 0;
    for (idx, &id) in part.prompt_tokens.iter().enumerate() {
        let piece = part.token_text.piece(id);
        let text = String::from_utf8_lossy(&piece.bytes).into_owned();
        let position = idx.checked_sub(1).and_then(|idx| part.assembly.prompt_logprobs.as_ref()?.get(idx));
        logprobs.text_offset.push(offset);
        logprobs.token_logprobs.push(position.map(|position| finite(position.chosen.logprob)));
        logprobs.top_logprobs.push(position.map(|position| alternatives(part, position)));
        if !piece.special {
            offset += count(text.chars().count());
        }
        logprobs.tokens.push(text);
    }
    logprobs
}

/// Text of the prompt's ids; unlike single tokens, characters that span tokens come out whole.
fn token_ids_text(part: &Part) -> String {
    let mut bytes = Vec::new();
    for piece in part.prompt_tokens.iter().map(|&id| part.token_text.piece(id)).filter(|piece| !piece.special) {
        bytes.extend_from_slice(&piece.bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Log-probabilities of what is new in a chat answer.
pub fn chat_logprobs(shape: &Shape, part: &Part, fresh: &Fresh) -> Option<ChatLogprobs> {
    let entry = |position: &Position| {
        let chosen = top(part.token_text.as_ref(), &position.logprobs.chosen);
        ChatTokenLogprob {
            token: chosen.token,
            logprob: chosen.logprob,
            bytes: chosen.bytes,
            top_logprobs: position.logprobs.top.iter().map(|one| top(part.token_text.as_ref(), one)).collect(),
        }
    };
    shape.logprobs.then(|| ChatLogprobs { content: fresh.logprobs.iter().map(entry).collect(), refusal: None })
}

/// Appends an answer's positions; `offset` is the length of the echo in characters.
pub fn add_answer_logprobs(to: &mut CompletionLogprobs, part: &Part, positions: &[Position], offset: u32) {
    for position in positions {
        to.tokens.push(token_string(part.token_text.as_ref(), position.logprobs.chosen.id));
        to.token_logprobs.push(Some(finite(position.logprobs.chosen.logprob)));
        to.top_logprobs.push(Some(alternatives(part, &position.logprobs)));
        to.text_offset.push(offset + position.offset);
    }
}

fn alternatives(part: &Part, position: &PositionLogprobs) -> BTreeMap<String, f32> {
    let mut map = BTreeMap::new();
    // Best first, so that of two tokens with the same text the likelier one stays.
    for one in position.top.iter().chain([&position.chosen]) {
        map.entry(token_string(part.token_text.as_ref(), one.id)).or_insert(finite(one.logprob));
    }
    map
}

fn prompt_logprobs(part: &Part) -> PromptLogprobs {
    let positions = part.assembly.prompt_logprobs.as_deref().unwrap_or_default();
    let entry = |position: &PositionLogprobs| {
        let ranked = position.top.iter().zip(1_u32..).map(|(one, rank)| (one, Some(rank)));
        let mut map = BTreeMap::new();
        for (one, rank) in ranked.chain([(&position.chosen, None)]) {
            map.entry(one.id.to_string()).or_insert_with(|| PromptLogprob {
                logprob: finite(one.logprob),
                rank,
                decoded_token: token_string(part.token_text.as_ref(), one.id),
            });
        }
        map
    };
    std::iter::once(None).chain(positions.iter().map(entry).map(Some)).collect()
}

fn top(token_text: &dyn TokenText, one: &TokenLogprob) -> TopLogprob {
    let bytes = token_text.piece(one.id).bytes.into_owned();
    TopLogprob { token: String::from_utf8_lossy(&bytes).into_owned(), logprob: finite(one.logprob), bytes }
}

fn token_string(token_text: &dyn TokenText, id: u32) -> String {
    String::from_utf8_lossy(&token_text.piece(id).bytes).into_owned()
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_nan() { LOGPROB_MIN } else { logprob.clamp(LOGPROB_MIN, 0.0) }
}
