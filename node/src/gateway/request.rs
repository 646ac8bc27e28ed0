//! A parsed body → a checked request: what `/v1/chat/completions` and `/v1/completions` have in common.
//!
//! Unknown fields are accepted; fields that would change the answer and are not implemented are refused by
//! name ([`refuse_unsupported`]). The structs double as the API document's schemas. Called by the routes.

pub mod chat;
pub mod completion;

use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};
use shared::error::{ErrorKind, RequestError};
use shared::id::RequestId;
use shared::request::{Grammar, Sampling};
use utoipa::ToSchema;

use super::backend::{Input, Prepared};
use super::fields::{self, Fields, Problem};
use super::json::type_name;
use super::limits::*;

/// Fields of both endpoints. `null` is the same as leaving a field out.
#[derive(Debug, Clone, PartialEq, Serialize, ToSchema)]
pub struct Common {
    /// A task of the tenant (`support`), a full adapter version, or a base model the contract allows.
    #[schema(max_length = 256)]
    pub model: String,
    /// Send the answer piece by piece as server-sent events.
    #[schema(required = false)]
    pub stream: bool,
    /// Options of a stream.
    #[schema(required = false)]
    pub stream_options: StreamOptions,
    /// Independent answers per prompt.
    #[schema(minimum = 1, maximum = 8, required = false)]
    pub n: u32,
    /// No end of answer before this many tokens (vLLM).
    #[schema(minimum = 0, maximum = 1048576, required = false)]
    pub min_tokens: u32,
    /// Go on after the end-of-answer token (vLLM).
    #[schema(required = false)]
    pub ignore_eos: bool,
    /// Texts that end the answer and are not part of it: a string or up to 16 strings of up to 256 bytes.
    #[schema(value_type = Value, required = false)]
    pub stop: Vec<String>,
    /// Token ids that end the answer (vLLM).
    #[schema(required = false)]
    pub stop_token_ids: Vec<u32>,
    /// 0 always takes the most likely token.
    #[schema(minimum = 0, maximum = 2, required = false)]
    pub temperature: f32,
    /// Nucleus mass; 0 keeps only the most likely token.
    #[schema(minimum = 0, maximum = 1, required = false)]
    pub top_p: f32,
    /// Keep the k most likely; 0 and -1 are off (vLLM).
    #[schema(minimum = -1, maximum = 1000000, required = false)]
    pub top_k: i64,
    /// Drop tokens less likely than this share of the best (vLLM).
    #[schema(minimum = 0, maximum = 1, required = false)]
    pub min_p: f32,
    /// Above 1 discourages tokens already seen; 1 is off (vLLM).
    #[schema(minimum = 0.01, maximum = 10, required = false)]
    pub repetition_penalty: f32,
    /// Subtracted once from tokens already in the answer.
    #[schema(minimum = -2, maximum = 2, required = false)]
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the answer.
    #[schema(minimum = -2, maximum = 2, required = false)]
    pub frequency_penalty: f32,
    /// Token id → bias from -100 to 100; at most 1024 entries.
    #[schema(value_type = Object, required = false)]
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same answer again.
    pub seed: Option<i64>,
    /// `{"type": "text" | "json_object" | "json_schema"}`.
    #[schema(value_type = Object, required = false)]
    pub response_format: Option<Format>,
    /// Report the token ids of prompt and answer (vLLM).
    #[schema(required = false)]
    pub return_token_ids: bool,
    /// Report this many alternatives per prompt token (vLLM); not in streams.
    #[schema(minimum = 0, maximum = 20)]
    pub prompt_logprobs: Option<u32>,
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct StreamOptions {
    /// Send one more chunk with the usage of the whole request before the end.
    #[schema(required = false)]
    pub include_usage: bool,
    /// Send the usage so far with every chunk (vLLM).
    #[schema(required = false)]
    pub continuous_usage_stats: bool,
}

/// `response_format`, understood.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Format {
    /// Any JSON object.
    JsonObject,
    /// JSON of this schema (JSON text).
    JsonSchema(String),
}

impl From<Format> for Grammar {
    fn from(format: Format) -> Self {
        match format {
            Format::JsonObject => Self::JsonObject,
            Format::JsonSchema(schema) => Self::JsonSchema(schema),
        }
    }
}

/// What is known of a request besides its fields.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FromHeaders {
    /// `x-tenantry-timeout-ms`.
    pub timeout: Option<Duration>,
    /// The id that an idempotency key stands for.
    pub id: Option<RequestId>,
    /// Hash of the body.
    pub digest: [u8; 32],
}

impl Common {
    /// Reads and checks the common fields.
    pub fn parse(fields: Fields<'_>) -> Result<Self, RequestError> {
        let model = fields.text("model", MODEL_BYTES_MAX)?.unwrap_or_default().to_owned();
        if model.is_empty() {
            return Err(RequestError::field(
                "missing_required_parameter",
                "model",
                "model is required; hint: GET /v1/models",
            ));
        }
        let common = Self {
            model,
            stream: fields.boolean("stream")?.unwrap_or(false),
            stream_options: stream_options(fields)?,
            n: fields.count("n", 1, N_MAX)?.unwrap_or(1),
            min_tokens: fields.count("min_tokens", 0, TOKENS_MAX)?.unwrap_or(0),
            ignore_eos: fields.boolean("ignore_eos")?.unwrap_or(false),
            stop: stop(fields)?,
            stop_token_ids: stop_token_ids(fields)?,
            temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_p: fields.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
            top_k: fields.integer("top_k", -1..=1_000_000)?.unwrap_or(0),
            min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(0.0),
            repetition_penalty: fields.number("repetition_penalty", 0.01..=10.0)?.unwrap_or(1.0),
            presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
            logit_bias: logit_bias(fields)?,
            seed: fields.integer("seed", i64::MIN..=i64::MAX)?,
            response_format: response_format(fields)?,
            return_token_ids: fields.boolean("return_token_ids")?.unwrap_or(false),
            prompt_logprobs: fields.count("prompt_logprobs", 0, TOP_LOGPROBS_MAX)?,
        };
        if common.stream && common.prompt_logprobs.is_some() {
            return Err(unsupported("prompt_logprobs", "in streams; hint: set stream to false"));
        }
        Ok(common)
    }

    /// The request for one prompt, with a fresh id unless a key stands for one.
    pub fn prepare(
        &self,
        input: Input,
        max_tokens: Option<u32>,
        logprobs: Option<u32>,
        from_headers: FromHeaders,
    ) -> Result<Prepared, RequestError> {
        if max_tokens.is_some_and(|max| self.min_tokens > max) {
            let message = format!("min_tokens must be at most max_tokens, found {}", self.min_tokens);
            return Err(RequestError::field("invalid_value", "min_tokens", message));
        }
        Ok(Prepared {
            id: from_headers.id.unwrap_or_else(RequestId::random),
            model: self.model.clone(),
            input,
            n: self.n,
            max_tokens,
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_ids.clone(),
            sampling: self.sampling(),
            seed: self.seed.map(i64::cast_unsigned),
            logprobs,
            prompt_logprobs: self.prompt_logprobs,
            grammar: self.response_format.clone().map(Grammar::from),
            timeout: from_headers.timeout,
            answering: None,
        })
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            // The vocabulary says (0, 1]; the smallest positive mass keeps exactly the best token.
            top_p: self.top_p.max(f32::MIN_POSITIVE),
            top_k: u32::try_from(self.top_k).unwrap_or(0),
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            logit_bias: self.logit_bias.clone(),
            seed: 0,
        }
    }
}

/// 400 `unsupported_parameter`: known, would change the answer, not implemented.
pub fn unsupported(param: &str, why: &str) -> RequestError {
    RequestError::field("unsupported_parameter", param.to_owned(), format!("{param} is not supported {why}"))
}

/// A field that changes the answer and the values of it that change nothing, as JSON text.
type Unsupported = (&'static str, &'static [&'static str]);

/// Fields of OpenAI, vLLM, SGLang, LoRAX, TGI, llama.cpp and mistral.rs that both endpoints refuse.
const UNSUPPORTED: &[Unsupported] = &[
    ("store", &["false"]),
    ("service_tier", &["\"auto\"", "\"default\""]),
    ("suffix", &["\"\""]),
    ("use_beam_search", &["false"]),
    ("num_beams", &["1"]),
    ("length_penalty", &["1", "1.0"]),
    ("early_stopping", &["false"]),
    ("guided_json", &[]),
    ("guided_regex", &[]),
    ("guided_choice", &[]),
    ("guided_grammar", &[]),
    ("structured_outputs", &[]),
    ("structural_tag", &[]),
    ("json_schema", &[]),
    ("regex", &[]),
    ("ebnf", &[]),
    ("grammar", &["\"\""]),
    ("truncate_prompt_tokens", &[]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true"]),
    ("include_stop_str_in_output", &["false"]),
    ("return_tokens_as_token_ids", &["false"]),
    ("allowed_token_ids", &[]),
    ("bad_words", &["[]"]),
    ("logits_processors", &["[]"]),
    ("prompt_embeds", &[]),
    ("kv_transfer_params", &[]),
    ("lora", &["[]"]),
    ("lora_path", &[]),
    ("adapter", &[]),
    ("adapter_id", &[]),
    ("adapter_parameters", &[]),
    ("mirostat", &["0"]),
    ("typical_p", &["1", "1.0"]),
    ("tfs_z", &["1", "1.0"]),
    ("repeat_penalty", &["1", "1.0"]),
    ("dynatemp_range", &["0", "0.0"]),
    ("xtc_probability", &["0", "0.0"]),
    ("dry_multiplier", &["0", "0.0"]),
    ("n_predict", &[]),
    ("max_new_tokens", &[]),
    ("min_new_tokens", &["0"]),
    ("no_repeat_ngram_size", &["0"]),
    ("stop_regex", &["[]", "\"\""]),
    ("top_n_sigma", &["-1", "-1.0"]),
    ("top_a", &["0", "0.0"]),
    ("epsilon_cutoff", &["0", "0.0"]),
    ("eta_cutoff", &["0", "0.0"]),
    ("random_seed", &[]),
];

/// Refuses the listed fields unless they have a neutral value.
///
/// # Errors
/// 400 `unsupported_parameter` naming the field.
pub fn refuse_unsupported(body: &Map<String, Value>, more: &[Unsupported]) -> Result<(), RequestError> {
    for (name, neutral) in UNSUPPORTED.iter().chain(more) {
        match body.get(*name) {
            None | Some(Value::Null) => {}
            Some(value) if neutral.contains(&value.to_string().as_str()) => {}
            Some(_) => return Err(unsupported(name, &hint(neutral))),
        }
    }
    Ok(())
}

fn hint(neutral: &[&str]) -> String {
    match neutral.first() {
        Some(value) => format!("by this server; hint: leave it out or send {value}"),
        None => "by this server; hint: leave it out".to_owned(),
    }
}

/// Refuses a body that names another tenant than the key's (`tenant`, `tenant_id`).
pub fn names_other_tenant(body: &Map<String, Value>, tenant: &str) -> bool {
    ["tenant", "tenant_id"].iter().filter_map(|name| body.get(*name)).any(|value| match value {
        Value::Null => false,
        value => value.as_str() != Some(tenant),
    })
}

/// 403 for a caller that names another tenant than its key's.
pub fn other_tenant() -> RequestError {
    RequestError::new(
        ErrorKind::Forbidden,
        "tenant_mismatch",
        "the request names another tenant than its key's; hint: leave the tenant out, the key says it",
    )
}

fn stream_options(fields: Fields<'_>) -> Result<StreamOptions, RequestError> {
    let Some(map) = fields.object("stream_options")? else { return Ok(StreamOptions::default()) };
    let nested = Fields::nested(map, "stream_options");
    Ok(StreamOptions {
        include_usage: nested.boolean("include_usage")?.unwrap_or(false),
        continuous_usage_stats: nested.boolean("continuous_usage_stats")?.unwrap_or(false),
    })
}

fn stop(fields: Fields<'_>) -> Result<Vec<String>, RequestError> {
    let texts: Vec<&Value> = match fields.value("stop") {
        None => return Ok(Vec::new()),
        Some(text @ Value::String(_)) => vec![text],
        Some(Value::Array(texts)) => texts.iter().collect(),
        Some(other) => return Err(fields.wrong_type("stop", "a string or an array of strings", other)),
    };
    if texts.len() > STOP_MAX {
        return Err(fields.out_of_range("stop", format_args!("at most {STOP_MAX} texts"), texts.len()));
    }
    texts
        .into_iter()
        .map(|text| match text {
            Value::String(text) if text.is_empty() || text.len() > STOP_BYTES_MAX => {
                let wanted = format_args!("texts of 1 to {STOP_BYTES_MAX} bytes");
                Err(fields.out_of_range("stop", wanted, format_args!("one of {} bytes", text.len())))
            }
            Value::String(text) => Ok(text.clone()),
            other => Err(fields.wrong_type("stop", "a string or an array of strings", other)),
        })
        .collect()
}

fn stop_token_ids(fields: Fields<'_>) -> Result<Vec<u32>, RequestError> {
    let ids = fields.array("stop_token_ids", STOP_TOKEN_IDS_MAX)?.unwrap_or_default();
    token_ids(fields, "stop_token_ids", ids)
}

/// An array of token ids; whether the vocabulary has them is checked at admission.
pub fn token_ids(fields: Fields<'_>, name: &str, ids: &[Value]) -> Result<Vec<u32>, RequestError> {
    ids.iter()
        .map(|id| match fields::integer(id, 0..=i64::from(u32::MAX)) {
            Ok(id) => Ok(u32::try_from(id).expect("the range is u32's")),
            Err(_) => Err(fields.out_of_range(name, "an array of token ids", shown(id))),
        })
        .collect()
}

fn shown(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        other => type_name(other).to_owned(),
    }
}

fn logit_bias(fields: Fields<'_>) -> Result<Vec<(u32, f32)>, RequestError> {
    let Some(map) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    if map.len() > LOGIT_BIAS_MAX {
        return Err(fields.out_of_range("logit_bias", format_args!("at most {LOGIT_BIAS_MAX} entries"), map.len()));
    }
    map.iter()
        .map(|(key, value)| {
            let digits = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_digit());
            let id = key.parse::<u32>().ok().filter(|_| digits).ok_or_else(|| {
                let shown: String = key.chars().take(32).collect();
                fields.out_of_range("logit_bias", "an object with token ids as keys", format_args!("{shown:?}"))
            })?;
            let bias = fields::number(value, &(-100.0..=100.0)).map_err(|problem| {
                let wanted = match problem {
                    Problem::Type(wanted) => wanted.to_owned(),
                    Problem::Range(wanted) => wanted,
                };
                fields.out_of_range("logit_bias", format_args!("{wanted} for each token"), shown(value))
            })?;
            Ok((id, bias))
        })
        .collect()
}

fn response_format(fields: Fields<'_>) -> Result<Option<Format>, RequestError> {
    let Some(map) = fields.object("response_format")? else { return Ok(None) };
    let nested = Fields::nested(map, "response_format");
    match nested.text("type", 64)? {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Format::JsonObject)),
        Some("json_schema") => {
            let holder = nested.object("json_schema")?.ok_or_else(|| missing("response_format.json_schema"))?;
            let inner = Fields::nested(holder, "response_format.json_schema");
            let schema = inner.object("schema")?.ok_or_else(|| missing("response_format.json_schema.schema"))?;
            let text = Value::Object(schema.clone()).to_string();
            if text.len() > SCHEMA_BYTES_MAX {
                let wanted = format_args!("at most {SCHEMA_BYTES_MAX} bytes");
                return Err(inner.out_of_range("schema", wanted, format_args!("{} bytes", text.len())));
            }
            Ok(Some(Format::JsonSchema(text)))
        }
        Some(other) => {
            let shown: String = other.chars().take(32).collect();
            Err(nested.out_of_range("type", "\"text\", \"json_object\" or \"json_schema\"", format_args!("{shown:?}")))
        }
        None => Err(missing("response_format.type")),
    }
}

/// 400 for a field that must be there.
pub fn missing(param: &str) -> RequestError {
    RequestError::field("missing_required_parameter", param.to_owned(), format!("{param} is required"))
}
