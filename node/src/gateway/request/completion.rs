//! The body of `POST /v1/completions` → one checked request per prompt.

use serde::Serialize;
use serde_json::{Map, Value};
use shared::error::RequestError;
use shared::id::RequestId;
use utoipa::ToSchema;

use super::{Common, FromHeaders, Unsupported, missing, refuse_unsupported, token_ids, unsupported};
use crate::gateway::backend::{Input, Prepared};
use crate::gateway::fields::Fields;
use crate::gateway::limits::{CHOICES_MAX, JSON_VALUES_MAX, N_MAX, PROMPTS_MAX, TOKENS_MAX, TOP_LOGPROBS_MAX};

/// Body of a text completion.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct CompletionRequest {
    /// Fields of both endpoints.
    #[serde(flatten)]
    pub common: Common,
    /// A string, an array of strings, an array of token ids, or an array of such arrays.
    #[schema(value_type = Value)]
    pub prompt: Vec<Prompt>,
    /// Longest answer.
    #[schema(minimum = 1, maximum = 1048576, required = false)]
    pub max_tokens: u32,
    /// Report log-probabilities with this many alternatives.
    #[schema(minimum = 0, maximum = 20)]
    pub logprobs: Option<u32>,
    /// Put the prompt in front of the answer.
    #[schema(required = false)]
    pub echo: bool,
    /// Only `n` is possible.
    #[schema(minimum = 1, maximum = 8)]
    pub best_of: Option<u32>,
    /// Put the model's beginning-of-text token in front of a text prompt if the model wants one (vLLM).
    #[schema(required = false)]
    pub add_special_tokens: bool,
}

/// One prompt.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

const COMPLETION_UNSUPPORTED: &[Unsupported] = &[("tools", &["[]"]), ("tool_choice", &["\"none\"", "\"auto\""])];

/// OpenAI's default for this endpoint.
const DEFAULT_TOKENS: u32 = 16;

impl CompletionRequest {
    /// Reads and checks a body.
    ///
    /// # Errors
    /// 400 naming the field, the range and what was found.
    pub fn parse(body: &Map<String, Value>) -> Result<Self, RequestError> {
        refuse_unsupported(body, COMPLETION_UNSUPPORTED)?;
        let fields = Fields::new(body);
        let request = Self {
            common: Common::parse(fields)?,
            prompt: prompts(fields)?,
            max_tokens: fields.count("max_tokens", 1, TOKENS_MAX)?.unwrap_or(DEFAULT_TOKENS),
            logprobs: fields.count("logprobs", 0, TOP_LOGPROBS_MAX)?,
            echo: fields.boolean("echo")?.unwrap_or(false),
            best_of: fields.count("best_of", 1, N_MAX)?,
            add_special_tokens: fields.boolean("add_special_tokens")?.unwrap_or(true),
        };
        let n = request.common.n;
        if request.best_of.is_some_and(|best_of| best_of != n) {
            return Err(unsupported("best_of", "unless it equals n; hint: leave it out"));
        }
        let choices = n * u32::try_from(request.prompt.len()).expect("the number of prompts is bounded");
        if choices > CHOICES_MAX {
            return Err(fields.out_of_range(
                "n",
                format_args!("such that prompts × n is at most {CHOICES_MAX}"),
                choices,
            ));
        }
        Ok(request)
    }

    /// One request per prompt, in order.
    pub fn prepare(&self, from_headers: FromHeaders) -> Result<Vec<Prepared>, RequestError> {
        let one = |(idx, prompt): (u32, &Prompt)| {
            // Of several prompts each needs an id of its own, the same every time.
            let id = from_headers.id.map(|id| RequestId(id.0 ^ u128::from(idx) << 64));
            let from_headers = FromHeaders { id, ..from_headers };
            let input = match prompt {
                Prompt::Text(text) => Input::Text { text: text.clone(), add_special: self.add_special_tokens },
                Prompt::Tokens(ids) => Input::Tokens(ids.clone()),
            };
            let mut prepared = self.common.prepare(input, Some(self.max_tokens), self.logprobs, from_headers)?;
            if self.echo && prepared.prompt_logprobs.is_none() {
                prepared.prompt_logprobs = self.logprobs;
            }
            Ok(prepared)
        };
        (0..).zip(&self.prompt).map(one).collect()
    }
}

fn prompts(fields: Fields<'_>) -> Result<Vec<Prompt>, RequestError> {
    const WANTED: &str = "a string, an array of strings, an array of token ids, or an array of such arrays";
    let array = match fields.value("prompt") {
        None => return Err(missing("prompt")),
        Some(Value::String(text)) => return Ok(vec![text_prompt(fields, text)?]),
        Some(Value::Array(array)) => array,
        Some(other) => return Err(fields.wrong_type("prompt", WANTED, other)),
    };
    match array.first() {
        None => Err(fields.out_of_range("prompt", "not empty", "an empty array")),
        Some(Value::Number(_)) => Ok(vec![Prompt::Tokens(prompt_ids(fields, array)?)]),
        Some(Value::String(_) | Value::Array(_)) => {
            if array.len() > PROMPTS_MAX {
                return Err(fields.out_of_range("prompt", format_args!("at most {PROMPTS_MAX} prompts"), array.len()));
            }
            array
                .iter()
                .map(|prompt| match prompt {
                    Value::String(text) => text_prompt(fields, text),
                    Value::Array(ids) => Ok(Prompt::Tokens(prompt_ids(fields, ids)?)),
                    other => Err(fields.wrong_type("prompt", WANTED, other)),
                })
                .collect()
        }
        Some(other) => Err(fields.wrong_type("prompt", WANTED, other)),
    }
}

fn text_prompt(fields: Fields<'_>, text: &str) -> Result<Prompt, RequestError> {
    if text.is_empty() {
        return Err(fields.out_of_range("prompt", "not empty", "an empty string"));
    }
    Ok(Prompt::Text(text.to_owned()))
}

fn prompt_ids(fields: Fields<'_>, ids: &[Value]) -> Result<Vec<u32>, RequestError> {
    if ids.is_empty() || ids.len() > JSON_VALUES_MAX {
        return Err(fields.out_of_range("prompt", "a non-empty array of token ids", format_args!("{} ids", ids.len())));
    }
    token_ids(fields, "prompt", ids)
}
