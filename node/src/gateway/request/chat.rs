//! The body of `POST /v1/chat/completions` → a conversation for the chat template and what to generate.
//!
//! Messages are rebuilt from the keys we know, so that nothing else of a client's object reaches a template.

use serde::Serialize;
use serde_json::{Map, Value};
use shared::error::RequestError;
use utoipa::ToSchema;

use super::{Common, FromHeaders, Unsupported, missing, refuse_unsupported, unsupported};
use crate::gateway::backend::{ChatInput, Input, Prepared};
use crate::gateway::fields::Fields;
use crate::gateway::json::type_name;
use crate::gateway::limits::{BODY_BYTES_MAX, MESSAGES_MAX, TOKENS_MAX, TOP_LOGPROBS_MAX};
use crate::gateway::tools::{ToolUse, Tools};

/// Body of a chat completion.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct ChatRequest {
    /// Fields of both endpoints.
    #[serde(flatten)]
    pub common: Common,
    /// The conversation: `{role, content, …}` with role system, developer, user, assistant or tool.
    #[schema(value_type = Vec<Object>)]
    pub messages: Vec<Value>,
    /// Longest answer; what the context leaves by default.
    #[schema(minimum = 1, maximum = 1048576)]
    pub max_completion_tokens: Option<u32>,
    /// The older name of `max_completion_tokens`.
    #[schema(minimum = 1, maximum = 1048576)]
    pub max_tokens: Option<u32>,
    /// Report log-probabilities.
    #[schema(required = false)]
    pub logprobs: bool,
    /// Alternatives per position; needs `logprobs`.
    #[schema(minimum = 0, maximum = 20)]
    pub top_logprobs: Option<u32>,
    /// Functions the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Tools>,
    /// Open the assistant's turn after the conversation (vLLM).
    #[schema(required = false)]
    pub add_generation_prompt: bool,
    /// Further variables of the chat template (vLLM).
    #[schema(value_type = Object, required = false)]
    pub chat_template_kwargs: Map<String, Value>,
}

const CHAT_UNSUPPORTED: &[Unsupported] = &[
    ("audio", &[]),
    ("modalities", &["[\"text\"]"]),
    ("prediction", &[]),
    ("web_search_options", &[]),
    ("functions", &["[]"]),
    ("function_call", &["\"none\""]),
    ("reasoning_effort", &["\"none\""]),
    ("reasoning", &[]),
    ("verbosity", &["\"medium\""]),
    ("moderation", &[]),
    ("echo", &["false"]),
    ("add_special_tokens", &["false"]),
    ("continue_final_message", &["false"]),
    ("chat_template", &[]),
    ("documents", &["[]"]),
    ("mm_processor_kwargs", &[]),
    ("include_reasoning", &["true"]),
    ("best_of", &["1"]),
];

/// Template variables that the server sets itself.
const RESERVED_KWARGS: [&str; 6] =
    ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token", "documents"];

impl ChatRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// 400 naming the field, the range and what was found.
    pub fn parse(body: &Map<String, Value>) -> Result<Self, RequestError> {
        refuse_unsupported(body, CHAT_UNSUPPORTED)?;
        let fields = Fields::new(body);
        let common = Common::parse(fields)?;
        let tools = Tools::parse(fields)?;
        if tools.is_some() && common.response_format.is_some() {
            return Err(unsupported("response_format", "together with tools; hint: set tool_choice to \"none\""));
        }
        let request = Self {
            messages: messages(fields)?,
            max_completion_tokens: fields.count("max_completion_tokens", 1, TOKENS_MAX)?,
            max_tokens: fields.count("max_tokens", 1, TOKENS_MAX)?,
            logprobs: fields.boolean("logprobs")?.unwrap_or(false),
            top_logprobs: fields.count("top_logprobs", 0, TOP_LOGPROBS_MAX)?,
            tools,
            add_generation_prompt: fields.boolean("add_generation_prompt")?.unwrap_or(true),
            chat_template_kwargs: template_kwargs(fields)?,
            common,
        };
        if request.top_logprobs.is_some_and(|top| top > 0) && !request.logprobs {
            return Err(RequestError::field("invalid_value", "top_logprobs", "top_logprobs needs logprobs to be true"));
        }
        match (request.max_completion_tokens, request.max_tokens) {
            (Some(new), Some(old)) if new != old => {
                let message = "max_tokens and max_completion_tokens differ; hint: send only max_completion_tokens";
                Err(RequestError::field("invalid_value", "max_tokens", message))
            }
            _ => Ok(request),
        }
    }

    /// The request for the backend, and how its tool calls are to be read.
    pub fn prepare(&self, from_headers: FromHeaders) -> Result<(Prepared, Option<ToolUse>), RequestError> {
        let input = Input::Chat(ChatInput {
            messages: self.messages.clone(),
            tools: self.tools.as_ref().map(|tools| tools.template_value()),
            add_generation_prompt: self.add_generation_prompt,
            template_kwargs: self.chat_template_kwargs.clone(),
        });
        let logprobs = self.logprobs.then(|| self.top_logprobs.unwrap_or(0));
        let max_tokens = self.max_completion_tokens.or(self.max_tokens);
        let mut prepared = self.common.prepare(input, max_tokens, logprobs, from_headers)?;
        if let Some(tools) = &self.tools {
            prepared.grammar = tools.grammar();
        }
        Ok((prepared, self.tools.as_ref().map(Tools::tool_use)))
    }
}

fn template_kwargs(fields: Fields<'_>) -> Result<Map<String, Value>, RequestError> {
    let Some(map) = fields.object("chat_template_kwargs")? else { return Ok(Map::new()) };
    match map.keys().find(|key| RESERVED_KWARGS.contains(&key.as_str())) {
        Some(key) => Err(unsupported(&format!("chat_template_kwargs.{key}"), "because the server sets it itself")),
        None => Ok(map.clone()),
    }
}

fn messages(fields: Fields<'_>) -> Result<Vec<Value>, RequestError> {
    let Some(messages) = fields.array("messages", MESSAGES_MAX)? else { return Err(missing("messages")) };
    if messages.is_empty() {
        return Err(fields.out_of_range("messages", format_args!("1 to {MESSAGES_MAX} messages"), 0));
    }
    messages.iter().enumerate().map(|(idx, message)| one_message(&format!("messages[{idx}]"), message)).collect()
}

fn one_message(path: &str, message: &Value) -> Result<Value, RequestError> {
    let Some(map) = message.as_object() else {
        let text = format!("{path} must be an object, found {}", type_name(message));
        return Err(RequestError::field("invalid_type", path.to_owned(), text));
    };
    let fields = Fields::nested(map, path);
    let role = match fields.text("role", 32)? {
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool")) => role,
        Some(other) => {
            let wanted = "system, developer, user, assistant or tool";
            return Err(fields.out_of_range("role", wanted, format_args!("{other:?}")));
        }
        None => return Err(missing(&fields.param("role"))),
    };
    if fields.value("audio").is_some() || fields.value("function_call").is_some() {
        let name = if fields.value("audio").is_some() { "audio" } else { "function_call" };
        return Err(unsupported(&fields.param(name), "by this server"));
    }
    let mut clean = Map::new();
    clean.insert("role".to_owned(), role.into());
    let content = content(fields)?;
    if let Some(name) = fields.text("name", 256)? {
        clean.insert("name".to_owned(), name.into());
    }
    let calls = if role == "assistant" { tool_calls(fields)? } else { None };
    if content.is_none() && calls.is_none() {
        return Err(missing(&fields.param("content")));
    }
    clean.insert("content".to_owned(), content.map_or(Value::Null, Value::String));
    if let Some(calls) = calls {
        clean.insert("tool_calls".to_owned(), calls);
    }
    if role == "tool" {
        let id = fields.text("tool_call_id", 256)?.ok_or_else(|| missing(&fields.param("tool_call_id")))?;
        clean.insert("tool_call_id".to_owned(), id.into());
    }
    Ok(Value::Object(clean))
}

/// A string, or text parts joined by newlines; other parts are refused by their type.
fn content(fields: Fields<'_>) -> Result<Option<String>, RequestError> {
    let parts = match fields.value("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text.clone())),
        Some(Value::Array(parts)) => parts,
        Some(other) => return Err(fields.wrong_type("content", "a string or an array of parts", other)),
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (idx, part) in parts.iter().enumerate() {
        let path = format!("{}[{idx}]", fields.param("content"));
        let Some(map) = part.as_object() else {
            let text = format!("{path} must be an object, found {}", type_name(part));
            return Err(RequestError::field("invalid_type", path, text));
        };
        let part = Fields::nested(map, &path);
        match part.text("type", 64)? {
            Some("text") => {
                let text = part.text("text", BODY_BYTES_MAX)?.ok_or_else(|| missing(&part.param("text")))?;
                texts.push(text.to_owned());
            }
            Some(other) => return Err(unsupported(&path, &format!("with type {other:?}; only text parts are"))),
            None => return Err(missing(&part.param("type"))),
        }
    }
    Ok(Some(texts.join("\n")))
}

/// Earlier calls of the assistant; `arguments` become objects, as templates expect.
fn tool_calls(fields: Fields<'_>) -> Result<Option<Value>, RequestError> {
    let Some(calls) = fields.array("tool_calls", MESSAGES_MAX)?.filter(|calls| !calls.is_empty()) else {
        return Ok(None);
    };
    let clean = calls.iter().enumerate().map(|(idx, call)| {
        let path = format!("{}[{idx}]", fields.param("tool_calls"));
        let function =
            call.get("function").and_then(Value::as_object).ok_or_else(|| missing(&format!("{path}.function")))?;
        let function_path = format!("{path}.function");
        let inner = Fields::nested(function, &function_path);
        let name = inner.text("name", 64)?.ok_or_else(|| missing(&inner.param("name")))?;
        let arguments = inner.text("arguments", BODY_BYTES_MAX)?.unwrap_or("{}");
        let arguments = super::super::json::parse_object(arguments.as_bytes())
            .map_err(|_| inner.out_of_range("arguments", "a JSON object as text", "something else"))?;
        let id = call.get("id").and_then(Value::as_str).unwrap_or_default();
        Ok(serde_json::json!({
            "id": id, "type": "function", "function": {"name": name, "arguments": Value::Object(arguments)}
        }))
    });
    clean.collect::<Result<Vec<_>, RequestError>>().map(|calls| Some(Value::Array(calls)))
}
