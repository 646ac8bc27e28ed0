//! Loads a GGUF file: strict check, facts, tokenizer, template, then the tensors.
//!
//! [`check`] reads the header before anything else sees the file; candle's own header parser never runs.
//! Quantised blocks go to `kernels` as they are; storage types without a kernel go through candle's
//! dequantisation to f32. [`mod@write`] makes small files for tests.

pub mod value;
pub mod check;
mod facts;
mod tensors;
pub mod write;

use std::fs::File;
use std::io::{BufReader, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use shared::hash::ContentHash;

use crate::base::assemble::{self, Naming};
use crate::base::family::{self, FamilyRules};
use crate::base::{BaseModel, LoadError, check_vocabulary, hash_files, panels};
use crate::info::{ModelInfo, Numerics};
use crate::template::ChatTemplate;
use crate::text::ModelText;
use crate::tokenizer::Tokenizer;

use self::check::{GgufFile, Limits, Texts};
use self::tensors::GgufTensors;

/// Name of the tensor with a divisor per rotary frequency.
const ROPE_FREQS: &str = "rope_freqs.weight";

/// Loads everything.
///
/// # Errors
/// Names the first thing that is missing, damaged or not supported.
pub(crate) fn load(path: &Path, numerics: Numerics, panels: Option<&Path>) -> Result<BaseModel, LoadError> {
    let unreadable = |error: std::io::Error| LoadError::read(path, &error);
    let mut file = File::open(path).map_err(unreadable)?;
    let file_bytes = file.metadata().map_err(unreadable)?.len();
    let header = check::read(BufReader::new(&mut file), file_bytes, &Limits::BASE)?;
    file.rewind().map_err(unreadable)?;
    let hash = hash_files(&[PathBuf::from(path)]).map_err(unreadable)?;
    load_checked(file, &header, hash, numerics, panels)
}

fn load_checked(
    file: File,
    header: &GgufFile,
    hash: ContentHash,
    numerics: Numerics,
    panels: Option<&Path>,
) -> Result<BaseModel, LoadError> {
    let (mut text, rules, tied) = read_text(header, hash, numerics)?;
    let mut tensors = GgufTensors::new(file, header);
    if header.tensor(ROPE_FREQS).is_some() {
        facts::apply_rope_freqs(&mut text.info, &mut tensors)?;
    }
    let weights = panels::weights(panels, &hash, &mut tensors, |source| {
        assemble::weights(&text.info, rules, Naming::Gguf, tied, source)
    })?;
    let ModelText { info, tokenizer, template } = text;
    Ok(BaseModel { info, weights, tokenizer, template })
}

/// Everything but the weights, and whether the head is the embedding.
fn read_text(
    header: &GgufFile,
    hash: ContentHash,
    numerics: Numerics,
) -> Result<(ModelText, &'static FamilyRules, bool), LoadError> {
    if header.text("general.type").is_some_and(|kind| kind != "model") {
        let found = header.text("general.type").unwrap_or_default();
        return Err(LoadError::unsupported("general.type", found, "a base model; adapters belong to tenants"));
    }
    let rules = family::of_gguf(header)?;
    let mut info = ModelInfo { hash, ..facts::model_info(header, rules, numerics)? };
    let tied = header.tensor(Naming::Gguf.head()).is_none();
    let shapes = header.tensors().iter().map(|tensor| {
        let slowest_first: Vec<usize> = tensor.dims.iter().rev().copied().collect();
        (tensor.name.as_str(), slowest_first)
    });
    assemble::check_tensors(&info, rules, Naming::Gguf, tied, shapes, |name| name == ROPE_FREQS)?;
    // A tokenizer takes twenty times its metadata: it is made for what is a model otherwise.
    check_vocabulary(header.texts("tokenizer.ggml.tokens").map_or(0, Texts::len), info.vocab)?;
    let tokenizer = Tokenizer::from_gguf(header)?;
    info.eos = facts::ends(header, &tokenizer);
    assemble::check_specials(&info)?;
    let template = match header.text("tokenizer.chat_template") {
        Some(source) => Some(Arc::new(template(source, &info, &tokenizer)?)),
        None => None,
    };
    Ok((ModelText { info, tokenizer, template }, rules, tied))
}

/// The header of a file, and how long the whole file is.
///
/// # Errors
/// As [`load`].
pub(crate) fn head(path: &Path) -> Result<(Vec<u8>, u64), LoadError> {
    let unreadable = |error: std::io::Error| LoadError::read(path, &error);
    let mut file = File::open(path).map_err(unreadable)?;
    let file_bytes = file.metadata().map_err(unreadable)?.len();
    let header = check::read(BufReader::new(&mut file), file_bytes, &Limits::BASE)?;
    file.rewind().map_err(unreadable)?;
    let mut bytes = Vec::new();
    file.take(header.header_bytes()).read_to_end(&mut bytes).map_err(unreadable)?;
    Ok((bytes, file_bytes))
}

/// What [`head`] has read, understood as [`load`] would.
///
/// # Errors
/// As [`load`].
pub(crate) fn text(
    head: &[u8],
    file_bytes: u64,
    hash: ContentHash,
    numerics: Numerics,
) -> Result<ModelText, LoadError> {
    let header = check::read(head, file_bytes, &Limits::BASE)?;
    read_text(&header, hash, numerics).map(|(text, ..)| text)
}

fn template(source: &str, info: &ModelInfo, tokenizer: &Tokenizer) -> Result<ChatTemplate, LoadError> {
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.special_text(id)).unwrap_or_default().to_owned();
    Ok(ChatTemplate::from_source(source)?
        .with_global("bos_token", text(info.bos))
        .with_global("eos_token", text(info.eos.first().copied())))
}
