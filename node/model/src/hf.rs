//! Loads a Hugging Face directory: `config.json`, `tokenizer.json`, `tokenizer_config.json`,
//! `chat_template.jinja`, `generation_config.json`, and safetensors, in one file or sharded with an index.
//!
//! `facts` reads the configuration strictly (what would change the results and is not implemented is refused
//! by name), `tensors` reads one tensor at a time by its place in the file, so that a large file is never in
//! memory as a whole. Pickled weights are not read.

mod facts;
mod tensors;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};
use shared::hash::ContentHash;

use crate::base::assemble::{self, Naming};
use crate::base::{BaseModel, LoadError, check_vocabulary, hash_files, panels};
use crate::info::{ModelInfo, Numerics};
use crate::template::ChatTemplate;
use crate::text::ModelText;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

use self::facts::Configs;
use self::tensors::Shards;

/// Largest configuration or template file; real ones have a few KB, an index of shards a few hundred.
const TEXT_BYTES_MAX: u64 = 16 << 20;

/// Files that are text, and the largest each may be.
const TEXTS: [(&str, u64); 5] = [
    ("config.json", TEXT_BYTES_MAX),
    ("generation_config.json", TEXT_BYTES_MAX),
    ("tokenizer.json", crate::tokenizer::json::FILE_BYTES_MAX),
    ("tokenizer_config.json", TEXT_BYTES_MAX),
    ("chat_template.jinja", TEXT_BYTES_MAX),
];

/// Loads everything.
///
/// # Errors
/// Names the first thing that is missing, damaged or not supported.
pub(crate) fn load(path: &Path, numerics: Numerics, panels: Option<&Path>) -> Result<BaseModel, LoadError> {
    let files = texts(path)?;
    need(&files, path, "config.json")?;
    let shards = Shards::open(path)?;
    let hash = hash_files(&hashed_files(path, &shards)).map_err(|error| LoadError::read(path, &error))?;
    let (ModelText { info, tokenizer, template }, configs) = read_text_of(path, &files, hash, numerics)?;
    drop(files);
    let weights = read_weights(&configs, &info, shards, panels)?;
    Ok(BaseModel { info, weights, tokenizer, template })
}

/// The files of a directory that are text, by name.
///
/// # Errors
/// Names the first that cannot be read or is too large.
pub(crate) fn texts(path: &Path) -> Result<BTreeMap<String, Vec<u8>>, LoadError> {
    let mut files = BTreeMap::new();
    for (name, bytes_max) in TEXTS {
        if let Some(bytes) = read_file(&path.join(name), bytes_max)? {
            files.insert(name.to_owned(), bytes);
        }
    }
    Ok(files)
}

/// What [`texts`] has read, understood as [`load`] would.
///
/// # Errors
/// As [`load`].
pub(crate) fn text(
    files: &BTreeMap<String, Vec<u8>>,
    hash: ContentHash,
    numerics: Numerics,
) -> Result<ModelText, LoadError> {
    read_text_of(Path::new(""), files, hash, numerics).map(|(text, _)| text)
}

/// Everything but the weights; `path` is for messages.
fn read_text_of(
    path: &Path,
    files: &BTreeMap<String, Vec<u8>>,
    hash: ContentHash,
    numerics: Numerics,
) -> Result<(ModelText, Configs), LoadError> {
    let configs = Configs {
        model: json(path, "config.json", need(files, path, "config.json")?)?,
        tokenizer: maybe_json(path, "tokenizer_config.json", files)?,
        generation: maybe_json(path, "generation_config.json", files)?,
    };
    let tokenizer = Tokenizer::from_json_text(need(files, path, "tokenizer.json")?, &path.join("tokenizer.json"))?;
    let mut info = configs.model_info(configs.family()?, &tokenizer, numerics)?;
    info.hash = hash;
    check_vocabulary(tokenizer.vocab_size(), info.vocab)?;
    let template = match template_source(path, files, &configs.tokenizer)? {
        Some(source) => Some(Arc::new(template(&source, &configs.tokenizer)?)),
        None => None,
    };
    Ok((ModelText { info, tokenizer, template }, configs))
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
fn template_source(
    path: &Path,
    files: &BTreeMap<String, Vec<u8>>,
    tokenizer_config: &Value,
) -> Result<Option<String>, LoadError> {
    if let Some(source) = files.get("chat_template.jinja") {
        let source = String::from_utf8(source.clone());
        return source.map(Some).map_err(|error| LoadError::read(&path.join("chat_template.jinja"), &error));
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
    let texts = TEXTS.iter().map(|(name, _)| path.join(name)).filter(|file| file.is_file());
    texts.chain(shards.files().map(Path::to_path_buf)).collect()
}

fn need<'a>(files: &'a BTreeMap<String, Vec<u8>>, path: &Path, name: &str) -> Result<&'a [u8], LoadError> {
    let missing =
        || LoadError::read(&path.join(name), &"no such file; hint: this is not a Hugging Face model directory");
    files.get(name).map(Vec::as_slice).ok_or_else(missing)
}

/// A JSON object, or null when there is no such file.
fn maybe_json(path: &Path, name: &str, files: &BTreeMap<String, Vec<u8>>) -> Result<Value, LoadError> {
    files.get(name).map_or(Ok(Value::Null), |text| json(path, name, text))
}

fn json(path: &Path, name: &str, text: &[u8]) -> Result<Value, LoadError> {
    let object: Map<String, Value> =
        serde_json::from_slice(text).map_err(|error| LoadError::read(&path.join(name), &error))?;
    Ok(Value::Object(object))
}

/// A JSON object that must be there.
fn need_json(path: &Path) -> Result<Value, LoadError> {
    let text = read_file(path, TEXT_BYTES_MAX)?.ok_or_else(|| LoadError::read(path, &"no such file"))?;
    json(path, "", &text)
}

/// A file's bytes, or `None` when there is no such file.
fn read_file(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, LoadError> {
    let n_bytes = match std::fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(LoadError::read(path, &error)),
    };
    if n_bytes > bytes_max {
        return Err(LoadError::read(path, &format!("it has {n_bytes} bytes, the limit is {bytes_max}")));
    }
    std::fs::read(path).map(Some).map_err(|error| LoadError::read(path, &error))
}
