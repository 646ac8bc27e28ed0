//! Tokenizers from a Hugging Face `tokenizer.json`.
//!
//! The file's own normalizer, pre-tokenizer and BPE model are used as they are. Its added tokens, decoder and
//! post-processor are read here, because who may write a control token is ours to decide.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper};

use super::alphabet::Alphabet;
use super::specials::AddedText;
use super::{Parts, TokenizerError};

/// Largest `tokenizer.json`; the largest known ones have 33 MB.
pub(crate) const FILE_BYTES_MAX: u64 = 128 << 20;

/// Highest id; the largest known vocabularies have 262 thousand.
const ID_MAX: u32 = 1 << 20;

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Added>,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: ModelWrapper,
}

#[derive(Deserialize)]
struct Added {
    id: u32,
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    #[serde(default)]
    special: bool,
}

/// Reads the file.
pub(super) fn parts(path: &Path) -> Result<Parts, TokenizerError> {
    let unreadable = |reason: String| TokenizerError::Read { file: path.display().to_string(), reason };
    let n_bytes = std::fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
    if n_bytes > FILE_BYTES_MAX {
        return Err(unreadable(format!("{n_bytes} bytes, the limit is {FILE_BYTES_MAX}")));
    }
    let text = std::fs::read(path).map_err(|error| unreadable(error.to_string()))?;
    parts_of(&text, path)
}

/// Reads what such a file holds; `path` is for messages.
pub(super) fn parts_of(text: &[u8], path: &Path) -> Result<Parts, TokenizerError> {
    let unreadable = |reason: String| TokenizerError::Read { file: path.display().to_string(), reason };
    assemble(serde_json::from_slice(text).map_err(|error| unreadable(error.to_string()))?)
}

fn assemble(file: File) -> Result<Parts, TokenizerError> {
    let ModelWrapper::BPE(mut model) = file.model else {
        return Err(unsupported("tokenizer model", "not BPE", "byte-level and sentencepiece BPE are read"));
    };
    if model.dropout.is_some_and(|dropout| dropout > 0.0) {
        return Err(unsupported("tokenizer model", "BPE with dropout", "the same text must give the same tokens"));
    }
    model.resize_cache(0);
    let alphabet = alphabet(file.decoder.as_ref())?;
    let mut texts = Vec::new();
    let mut place = |id: u32, text: String| {
        if id > ID_MAX {
            return Err(TokenizerError::Damaged(format!("token id {id}, the limit is {ID_MAX}")));
        }
        if texts.len() <= id as usize {
            texts.resize(id as usize + 1, None);
        }
        texts[id as usize] = Some(text);
        Ok(())
    };
    let vocab = model.get_vocab();
    if let Some(unknown) = model.get_unk_token().as_ref().filter(|unknown| !vocab.contains_key(*unknown)) {
        return Err(TokenizerError::Damaged(format!("the unknown token {unknown:?} is not in the vocabulary")));
    }
    for (text, id) in vocab {
        place(id, text)?;
    }
    let mut added = Vec::with_capacity(file.added_tokens.len());
    for Added { id, content, single_word, lstrip, rstrip, special } in file.added_tokens {
        if single_word {
            return Err(unsupported("added token with single_word", &content, "no model we know has one"));
        }
        place(id, content.clone())?;
        let control = special || (content.starts_with("<|") && content.ends_with("|>"));
        added.push(AddedText { id, text: content, control, lstrip, rstrip });
    }
    let front = file.post_processor.as_ref().and_then(front_token);
    let (normalizer, pre_tokenizer) = (file.normalizer, file.pre_tokenizer);
    Ok(Parts { model: model.into(), normalizer, pre_tokenizer, alphabet, texts, added, front })
}

/// Finds the convention for bytes from the decoder: every BPE model with one of them names it there.
fn alphabet(decoder: Option<&Value>) -> Result<Alphabet, TokenizerError> {
    let steps = steps(decoder, "decoders");
    let kinds: Vec<&str> = steps.iter().filter_map(|step| step["type"].as_str()).collect();
    if kinds.contains(&"ByteLevel") {
        return Ok(Alphabet::ByteLevel);
    }
    if kinds.contains(&"ByteFallback") || kinds.contains(&"Metaspace") {
        let strips = |step: &&Value| match step["type"].as_str() {
            Some("Strip") => step["start"].as_u64() > Some(0),
            Some("Metaspace") => step["prepend_scheme"].as_str() != Some("never"),
            _ => false,
        };
        return Ok(Alphabet::Sentencepiece { strip_first_space: steps.iter().any(strips) });
    }
    let found = if kinds.is_empty() { "none".to_owned() } else { kinds.join(", ") };
    Err(unsupported("tokenizer decoder", &found, "ByteLevel, ByteFallback and Metaspace are read"))
}

/// Id of a token that a `TemplateProcessing` step puts in front of a single text.
fn front_token(post_processor: &Value) -> Option<u32> {
    let steps = steps(Some(post_processor), "processors");
    let template = steps.iter().find(|step| step["type"] == "TemplateProcessing")?;
    let name = template["single"][0]["SpecialToken"]["id"].as_str()?;
    let id = template["special_tokens"][name]["ids"][0].as_u64()?;
    u32::try_from(id).ok()
}

/// The steps of a `Sequence`, or the one step.
fn steps<'a>(step: Option<&'a Value>, key: &str) -> Vec<&'a Value> {
    let Some(step) = step else { return Vec::new() };
    match step[key].as_array() {
        Some(steps) => steps.iter().collect(),
        None => vec![step],
    }
}

fn unsupported(what: &'static str, found: &str, supported: &'static str) -> TokenizerError {
    TokenizerError::Unsupported { what, found: found.to_owned(), supported }
}
