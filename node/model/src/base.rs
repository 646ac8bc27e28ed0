//! A whole base model from a path: a GGUF file or a Hugging Face directory.
//!
//! The app calls [`BaseModel::load`] once at start, on a blocking thread. The steps are the same for both
//! formats and live here and in `assemble`: facts, then a check that exactly the expected tensors are there
//! with the expected shapes, then reading and packing one tensor at a time, so that no more than the packed
//! weights and one raw tensor are in memory. What is format-specific lies in [`crate::gguf`] and [`crate::hf`], what is
//! family-specific in `family`.

pub(crate) mod assemble;
pub(crate) mod family;
mod hash;
pub(crate) mod panels;

use std::path::Path;
use std::sync::Arc;

use crate::gguf::check::GgufError;
use crate::info::{ModelInfo, Numerics};
use crate::template::{ChatTemplate, TemplateError};
use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::weights::Weights;

pub(crate) use self::hash::hash_files;

/// Why a base model could not be loaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoadError {
    /// A file could not be read.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// Which file.
        file: String,
        /// What went wrong.
        reason: String,
    },
    /// The GGUF header was refused.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The tokenizer was refused.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template was refused.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A feature of the model that is not implemented.
    #[error("{what} {found:?} is not supported; hint: {supported}")]
    Unsupported {
        /// Which feature.
        what: String,
        /// What the model asks for.
        found: String,
        /// What would be read.
        supported: &'static str,
    },
    /// A fact that is missing or contradicts others.
    #[error("{key} is {found}; hint: {expected}")]
    Config {
        /// Key in the metadata or `config.json`.
        key: String,
        /// What was found.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// A tensor that must be there is not.
    #[error("tensor {name:?} is missing; hint: the file is incomplete or of another architecture")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor that we would have to ignore.
    #[error("tensor {name:?} is not part of a {family:?} model; hint: ignoring it would change the results")]
    UnknownTensor {
        /// Its name.
        name: String,
        /// Family the file claims.
        family: crate::info::Family,
    },
    /// A tensor with another shape than the facts say.
    #[error("tensor {name:?} has the shape {found:?}, expected {expected:?}; hint: the file is damaged")]
    Shape {
        /// Its name.
        name: String,
        /// Shape found, slowest dimension first.
        found: Vec<usize>,
        /// Shape expected.
        expected: Vec<usize>,
    },
    /// A tensor whose content cannot be used.
    #[error("tensor {name:?}: {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

/// A loaded base model.
#[derive(Debug)]
pub struct BaseModel {
    /// Facts.
    pub info: ModelInfo,
    /// Packed weights.
    pub weights: Weights,
    /// Tokenizer.
    pub tokenizer: Tokenizer,
    /// Chat template, when the model has one.
    pub template: Option<Arc<ChatTemplate>>,
}

impl BaseModel {
    /// Loads a GGUF file, or a directory with `config.json`, `tokenizer.json` and safetensors.
    ///
    /// Blocks for as long as reading takes (about a second per 100 MB); call it where that is allowed.
    ///
    /// # Errors
    /// Names the first thing that is missing, damaged or not supported.
    pub fn load(path: &Path, numerics: Numerics) -> Result<Self, LoadError> {
        Self::load_shared(path, numerics, None)
    }

    /// As [`BaseModel::load`], with the packed weights in a file in the folder `panels`, from which the next load maps
    /// them.
    ///
    /// # Errors
    /// As [`BaseModel::load`].
    pub fn load_shared(path: &Path, numerics: Numerics, panels: Option<&Path>) -> Result<Self, LoadError> {
        let load = if path.is_dir() { crate::hf::load } else { crate::gguf::load };
        let model = load(path, numerics, panels)?;
        check_vocabulary(model.tokenizer.vocab_size(), model.info.vocab)?;
        tracing::info!(
            hash = %model.info.hash.short(),
            family = ?model.info.family,
            n_layers = model.info.n_layers,
            context = model.info.context,
            weight_bytes = model.weights.bytes(),
            "base model loaded"
        );
        Ok(model)
    }
}

/// Every token has its row in the embedding.
pub(crate) fn check_vocabulary(n_tokens: usize, n_rows: usize) -> Result<(), LoadError> {
    if n_tokens <= n_rows {
        return Ok(());
    }
    let found = format!("{n_tokens} tokens for {n_rows} embedding rows");
    Err(LoadError::config("the tokenizer's vocabulary", found, "tokenizer and weights belong to the same model"))
}

// === impl LoadError ===

impl LoadError {
    pub(crate) fn read(file: &Path, error: &dyn std::fmt::Display) -> Self {
        Self::Read { file: file.display().to_string(), reason: error.to_string() }
    }

    pub(crate) fn config(key: &str, found: impl Into<String>, expected: &'static str) -> Self {
        Self::Config { key: key.to_owned(), found: found.into(), expected }
    }

    pub(crate) fn unsupported(what: &str, found: impl Into<String>, supported: &'static str) -> Self {
        Self::Unsupported { what: what.to_owned(), found: found.into(), supported }
    }

    pub(crate) fn tensor(name: &str, reason: &dyn std::fmt::Display) -> Self {
        Self::Tensor { name: name.to_owned(), reason: reason.to_string() }
    }
}

#[cfg(test)]
mod tests;
