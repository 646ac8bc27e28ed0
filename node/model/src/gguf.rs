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
use std::io::{BufReader, Seek};
use std::path::{Path, PathBuf};

use shared::hash::ContentHash;

use crate::base::assemble::{self, Naming};
use crate::base::{BaseModel, LoadError, check_vocabulary, family, hash_files, panels};
use crate::info::{ModelInfo, Numerics};
use crate::template::ChatTemplate;
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
    let mut tensors = GgufTensors::new(file, header);
    if header.tensor(ROPE_FREQS).is_some() {
        facts::apply_rope_freqs(&mut info, &mut tensors)?;
    }
    let weights = panels::weights(panels, &hash, &mut tensors, |source| {
        assemble::weights(&info, rules, Naming::Gguf, tied, source)
    })?;
    let template = match header.text("tokenizer.chat_template") {
        Some(source) => Some(template(source, &info, &tokenizer)?),
        None => None,
    };
    Ok(BaseModel { info, weights, tokenizer, template })
}

fn template(source: &str, info: &ModelInfo, tokenizer: &Tokenizer) -> Result<ChatTemplate, LoadError> {
    let text = |id: Option<u32>| id.and_then(|id| tokenizer.special_text(id)).unwrap_or_default().to_owned();
    Ok(ChatTemplate::from_source(source)?
        .with_global("bos_token", text(info.bos))
        .with_global("eos_token", text(info.eos.first().copied())))
}
