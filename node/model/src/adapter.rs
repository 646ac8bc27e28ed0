//! A tenant's LoRA adapter: from untrusted files to packed matrices.
//!
//! Files are checked in full before anything is allocated from their claims ([`check`]), then packed into
//! the layout the kernels want ([`CheckedAdapter::pack`]). What comes out computes exactly what PEFT would,
//! or the file is refused by naming the field or the tensor. GGUF LoRA files take the same road.
//!
//! Called by the upload path (check only) and by the adapter cache (check and pack, off the hot path). It
//! reads no file, keeps no copy of the bytes, and never decides who may use an adapter.
//!
//! # Order of a linear layer with an adapter
//! Without DoRA: `y = W·x + s·B·(A·x)`, then the bias. With DoRA the pair carries a factor `c` per output row:
//! `y = c ⊙ (W·x + s·B·(A·x))`, then the bias. So the forward pass runs the base matmul, then the LoRA delta
//! including its row scale, and adds the bias of q, k and v (Qwen2) last: PEFT does not scale the bias.

mod json;
mod tensor;
mod pattern;
mod config;
mod safetensors;
mod peft;
mod gguf_lora;
mod pack;
#[cfg(test)]
mod tests;

use std::fmt;

use kernels::lora::{LoraPair, RANK_MAX};
use shared::hash::ContentHash;

use crate::info::{Linear, ModelInfo};

pub use config::CONFIG_BYTES_MAX;
pub use pack::CheckedAdapter;

/// A packed adapter, ready for the forward pass. It fits one base model: DoRA factors are made from its weights.
#[derive(Debug)]
pub struct LoraAdapter {
    /// Content hash of the files it came from.
    pub hash: ContentHash,
    /// Per transformer layer, in the order of [`Linear::ALL`]; `None` leaves the base layer alone.
    pub layers: Vec<[Option<LoraPair>; 7]>,
    /// Largest rank in it.
    pub rank_max: usize,
    /// Bytes of engine memory.
    pub bytes: usize,
}

impl LoraAdapter {
    /// The pair for one linear layer.
    pub fn pair(&self, layer: usize, linear: Linear) -> Option<&LoraPair> {
        self.layers.get(layer).and_then(|pairs| pairs[linear as usize].as_ref())
    }
}

/// The file format an adapter came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AdapterKind {
    /// `adapter_config.json` and `adapter_model.safetensors`.
    Peft,
    /// One GGUF file of `general.type = adapter`.
    Gguf,
}

impl fmt::Display for AdapterKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Peft => "peft",
            Self::Gguf => "gguf",
        })
    }
}

/// An adapter as it was uploaded: bytes nobody has looked at.
#[derive(Clone, PartialEq, Eq)]
pub enum AdapterFiles {
    /// A PEFT directory. A missing file is given as no bytes, which [`check`] refuses.
    Peft {
        /// `adapter_config.json`.
        config: Vec<u8>,
        /// `adapter_model.safetensors`.
        weights: Vec<u8>,
    },
    /// A GGUF LoRA file.
    Gguf(Vec<u8>),
}

// === impl AdapterFiles ===

impl AdapterFiles {
    /// The format, as the uploader declared it.
    pub fn kind(&self) -> AdapterKind {
        match self {
            Self::Peft { .. } => AdapterKind::Peft,
            Self::Gguf(_) => AdapterKind::Gguf,
        }
    }

    /// Zeroed memory for a large file, in large pages where the system has them: most of a first use's time would
    /// otherwise go into getting 20 MB in pieces of 4 KiB.
    pub fn buffer(n_bytes: usize) -> Vec<u8> {
        let mut buffer = vec![0; n_bytes];
        kernels::memory::prefer_large_pages(&mut buffer);
        buffer
    }

    /// Bytes of all files together.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Peft { config, weights } => config.len() + weights.len(),
            Self::Gguf(bytes) => bytes.len(),
        }
    }

    /// Identity of the content, as [`ContentHasher`] defines it.
    pub fn content_hash(&self) -> ContentHash {
        let mut hasher = ContentHasher::default();
        match self {
            Self::Peft { config, weights } => {
                hasher.update(weights);
                hasher.finish(Some(config))
            }
            Self::Gguf(bytes) => {
                hasher.update(bytes);
                hasher.finish(None)
            }
        }
    }
}

/// Content hash of an adapter whose weights, or GGUF file, arrive piece by piece: BLAKE3 keyed to this use, over the
/// format and the BLAKE3 of each file, so that no two splits of the same bytes agree.
#[derive(Default)]
pub struct ContentHasher(blake3::Hasher);

impl ContentHasher {
    /// The next bytes of the weights or of the GGUF file.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash of a PEFT adapter with its configuration, or of a GGUF file without one.
    pub fn finish(self, config: Option<&[u8]>) -> ContentHash {
        let mut hasher = blake3::Hasher::new_derive_key("tenantry adapter content v2");
        hasher.update(if config.is_some() { b"peft" } else { b"gguf" });
        hasher.update(self.0.finalize().as_bytes());
        if let Some(config) = config {
            hasher.update(blake3::hash(config).as_bytes());
        }
        ContentHash(*hasher.finalize().as_bytes())
    }
}

impl fmt::Debug for AdapterFiles {
    /// Format and size only: weights are a tenant's property and far too long for a log line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AdapterFiles({}, {} bytes)", self.kind(), self.bytes())
    }
}

/// What a tenant's contract and the operator allow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterLimits {
    /// Largest rank of any module.
    pub rank_max: usize,
    /// Most bytes of all files together.
    pub bytes_max: usize,
    /// Names under which the base model is known. An adapter that names another base is refused; one that
    /// names none is judged by its shapes, and so is every adapter when this list is empty. Compared by the
    /// last path segment, ignoring case.
    pub accepted_base_names: Vec<String>,
}

impl Default for AdapterLimits {
    /// Rank 256 and 512 MiB: above what adapters of the models served here need, and what a loader can hold.
    fn default() -> Self {
        Self { rank_max: RANK_MAX, bytes_max: 512 << 20, accepted_base_names: Vec::new() }
    }
}

/// Facts about a checked adapter, for records, replies and budgets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterSummary {
    /// File format.
    pub kind: AdapterKind,
    /// Largest rank of any module.
    pub rank_max: usize,
    /// Linear layers it changes, over all transformer layers.
    pub modules: usize,
    /// Bytes of the files.
    pub bytes: usize,
    /// Whether any module is DoRA.
    pub dora: bool,
}

/// Why an adapter was refused. The text names the field or tensor and what would be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AdapterError {
    /// The files are broken or contradict themselves: export the adapter again.
    #[error("invalid adapter: {0}")]
    Invalid(String),
    /// A module's rank is over the contract's limit: train with a smaller rank or raise the limit.
    #[error("{module} has rank {found}, the limit is {max}; hint: train with a smaller `r` or ask for a higher limit")]
    Rank {
        /// Module or config field.
        module: String,
        /// Rank asked for.
        found: u64,
        /// Largest rank allowed.
        max: usize,
    },
    /// The files are larger than the contract allows: store as f16 or use a smaller rank.
    #[error(
        "{what} has {found} bytes, the limit is {max}; hint: store the weights as float16 or train with a smaller rank"
    )]
    Bytes {
        /// Which file.
        what: &'static str,
        /// Its size.
        found: usize,
        /// Most bytes allowed.
        max: usize,
    },
    /// The adapter uses something that changes the computation and is not implemented: never approximated.
    #[error("{field} = {found} is not supported; hint: {hint}")]
    Unsupported {
        /// Config field, metadata key or tensor.
        field: String,
        /// What it holds.
        found: String,
        /// What would be accepted.
        hint: String,
    },
    /// The adapter belongs to another base model.
    #[error("the adapter does not fit this base model: {0}")]
    BaseMismatch(String),
}

// === impl AdapterError ===

impl AdapterError {
    /// Stable machine-readable code; clients match on it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid(_) => "invalid_lora_adapter",
            Self::Rank { .. } => "lora_rank_limit_exceeded",
            Self::Bytes { .. } => "lora_byte_limit_exceeded",
            Self::Unsupported { .. } => "unsupported_lora_feature",
            Self::BaseMismatch(_) => "lora_base_mismatch",
        }
    }

    /// Class of the failure.
    pub fn kind(&self) -> shared::error::ErrorKind {
        match self {
            Self::Bytes { .. } => shared::error::ErrorKind::TooLarge,
            _ => shared::error::ErrorKind::Unprocessable,
        }
    }

    fn invalid(what: impl Into<String>) -> Self {
        Self::Invalid(what.into())
    }

    fn unsupported(field: impl Into<String>, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into(), found: found.into(), hint: hint.into() }
    }
}

impl From<AdapterError> for shared::error::RequestError {
    fn from(error: AdapterError) -> Self {
        Self::new(error.kind(), error.code(), error.to_string())
    }
}

/// Checks an adapter in full against a base model: structure, names, shapes, ranks and every value. Nothing
/// is allocated from a size the file claims; the result borrows the bytes.
///
/// # Errors
/// The first rule the files break, by name.
pub fn check<'a>(
    files: &'a AdapterFiles,
    info: &ModelInfo,
    limits: &AdapterLimits,
) -> Result<CheckedAdapter<'a>, AdapterError> {
    if files.bytes() > limits.bytes_max {
        return Err(AdapterError::Bytes { what: "the adapter", found: files.bytes(), max: limits.bytes_max });
    }
    // Whatever the contract says, the kernels have a largest rank.
    let limits = &AdapterLimits { rank_max: limits.rank_max.min(RANK_MAX), ..limits.clone() };
    let modules = match files {
        AdapterFiles::Peft { config, weights } => peft::check(config, weights, info, limits)?,
        AdapterFiles::Gguf(bytes) => gguf_lora::check(bytes, info, limits)?,
    };
    Ok(CheckedAdapter::new(files, info, modules))
}

/// A string from an untrusted file, quoted and cut so that it can stand in a message.
fn quote(text: &str) -> String {
    const SHOWN_CHARS_MAX: usize = 120;
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    format!("{shown:?}")
}
