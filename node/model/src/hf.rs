//! Loads a Hugging Face directory: `config.json`, `tokenizer.json`, `tokenizer_config.json`,
//! `chat_template.jinja`, `generation_config.json`, and safetensors, in one file or sharded with an index.
//!
//! `facts` reads the configuration strictly (what would change the results and is not implemented is refused
//! by name), `tensors` reads one tensor at a time by its place in the file, so that a large file is never in
//! memory as a whole. Pickled weights are not read.

mod facts;
mod tensors;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::base::assemble::{self, Naming};
use crate::base::{BaseModel, LoadError, hash_files, panels};
use crate::info::{ModelInfo, Numerics};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

use self::facts::Configs;
use self::tensors::Shards;

/// Largest configuration or template file; real ones have a few KB, an index of shards a few hundred.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// Loads everything.
///
/// # Errors
/// Names the first thing that is missing, damaged or not supported.
pub(crate) fn load(path: &Path, numerics: Numerics, panels: Option<&Path>) -> Result<BaseModel, LoadError> {
    let configs = Configs {
        model: need_json(&path.join("config.json"))?,
        tokenizer: read_json(&path.join("tokenizer_config.json"))?.unwrap_or(Value::Null),
        generation: read_json(&path.join("generation_config.json"))?.unwrap_or(Value::Null),
    };
    let shards = Shards::open(path)?;
    let tokenizer = Tokenizer::from_json(&path.join("tokenizer.json"))?;
    let hash = hash_files(&hashed_files(path, &shards)).map_err(|error| LoadError::read(path, &error))?;
    let rules = configs.family()?;
    let mut info = configs.model_info(rules, &tokenizer, numerics)?;
    info.hash = hash;
    let weights = read_weights(&configs, &info, shards, panels)?;
    let template = match template_source(path, &configs.tokenizer)? {
        Some(source) => Some(template(&source, &configs.tokenizer)?),
        None => None,
    };
    Ok(BaseModel { info, weights, tokenizer, template })
}

fn read_weights(
    configs: &Configs,
    info: &ModelInfo,
    mut shards: Shards,
    panels: Option<&Path>,
) -> Result<Weights, LoadError> {
    let rules = configs.family()?;
    let tied = configs.model["tie_word_embeddings"].as_bool().unwrap_or(false);
    // A tied model may store its head a second time; old Llama files store the rotary frequencies.
    let ignored = |name: &str| name.ends_with(".rotary_emb.inv_freq") || (tied && name == Naming::HuggingFace.head());
    assemble::check_tensors(info, rules, Naming::HuggingFace, tied, shards.shapes(), ignored)?;
    panels::weights(panels, &info.hash, &mut shards, |source| {
        assemble::weights(info, rules, Naming::HuggingFace, tied, source)
    })
}

/// The file of its own comes first, as in transformers; of several named templates the default one.
fn template_source(path: &Path, tokenizer_config: &Value) -> Result<Option<String>, LoadError> {
    if let Some(source) = read_text(&path.join("chat_template.jinja"))? {
        return Ok(Some(source));
    }
    Ok(match &tokenizer_config["chat_template"] {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str())
            .map(str::to_owned),
        _ => None,
    })
}

fn template(source: &str, tokenizer_config: &Value) -> Result<ChatTemplate, LoadError> {
    let mut template = ChatTemplate::from_source(source)?;
    for key in ["bos_token", "eos_token", "unk_token", "pad_token"] {
        if let Some(text) = token_text(&tokenizer_config[key]) {
            template = template.with_global(key, text);
        }
    }
    Ok(template)
}

/// A token given as a text or as an object with its content.
fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

fn hashed_files(path: &Path, shards: &Shards) -> Vec<PathBuf> {
    let texts =
        ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    let texts = texts.iter().map(|name| path.join(name)).filter(|file| file.is_file());
    texts.chain(shards.files().map(Path::to_path_buf)).collect()
}

fn need_json(path: &Path) -> Result<Value, LoadError> {
    let missing = || LoadError::read(path, &"no such file; hint: this is not a Hugging Face model directory");
    read_json(path)?.ok_or_else(missing)
}

/// A JSON object, or `None` when there is no such file.
fn read_json(path: &Path) -> Result<Option<Value>, LoadError> {
    let Some(text) = read_text(path)? else { return Ok(None) };
    let object: Map<String, Value> = serde_json::from_str(&text).map_err(|error| LoadError::read(path, &error))?;
    Ok(Some(Value::Object(object)))
}

fn read_text(path: &Path) -> Result<Option<String>, LoadError> {
    let n_bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LoadError::read(path, &error)),
    };
    if n_bytes > TEXT_BYTES_MAX {
        return Err(LoadError::read(path, &format!("it has {n_bytes} bytes, the limit is {TEXT_BYTES_MAX}")));
    }
    std::fs::read_to_string(path).map(Some).map_err(|error| LoadError::read(path, &error))
}
