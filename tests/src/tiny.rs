//! Tiny random models and adapters, generated in milliseconds: what tests run when they need a real forward
//! pass but not a real language model.
//!
//! Everything is a function of its seed, so a failing test can be run again. A model has a byte-level
//! tokenizer with a few merges and a ChatML template, so that `/v1/chat/completions` works on it; what it
//! says is noise. Its adapters are strong on purpose: a row computed with the wrong adapter (or none) gets
//! visibly different logits, which is what isolation tests need.
//!
//! ```no_run
//! # use tests::tiny;
//! # use model::info::Linear;
//! # let dir = std::path::Path::new("somewhere");
//! let base = tiny::model(dir); // a Hugging Face directory below `dir`
//! let files = tiny::adapter(7, 4, &[Linear::Q, Linear::V]); // PEFT config and safetensors, as bytes
//! let other = tiny::TinySpec::qwen2().write_hf(dir); // another family
//! ```

use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use model::adapter::AdapterFiles;
use model::info::Linear;

pub mod adapter;
mod gguf;
mod hf;
mod random;
mod tensors;
mod tokenizer;

pub use adapter::{AdapterSpec, read_adapter, write_adapter};
pub use gguf::Quantisation;
pub use random::Random;
pub use tensors::Tensors;
pub use tokenizer::{EOS_ID, VOCAB};

/// Writes the default tiny model ([`TinySpec::llama`]) as a Hugging Face directory below `dir` and returns
/// the directory. The content is the same on every call.
pub fn model(dir: &Path) -> PathBuf {
    TinySpec::llama().write_hf(dir)
}

/// The same model as one GGUF file of Q8_0 blocks. Fast numerics differ from exact ones only before quantised
/// weights, so tests of the fast path want this one.
pub fn model_gguf(dir: &Path) -> PathBuf {
    TinySpec::llama().write_gguf(dir, Quantisation::All(GgmlDType::Q8_0))
}

/// A strong random adapter for the default tiny model: PEFT files in f32, alpha = 2 × rank.
pub fn adapter(seed: u64, rank: usize, targets: &[Linear]) -> AdapterFiles {
    AdapterSpec::new(seed, rank, targets).files(&TinySpec::llama())
}

/// Family of a tiny model, with the details that only this family has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TinyFamily {
    /// Llama, plain rotary embedding.
    Llama,
    /// Llama 3.x: scaled rotary frequencies with an original context of 64, so that short tests reach all three ranges.
    Llama3,
    /// Mistral without a sliding window.
    Mistral,
    /// Qwen2: biases on q, k and v.
    Qwen2,
}

/// Number format of the tensors in a Hugging Face directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stored {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// Brain floats.
    Bf16,
}

/// Sizes and seed of a tiny model. `hidden` = `n_heads` × `head_dim`.
#[derive(Debug, Clone, PartialEq)]
pub struct TinySpec {
    /// Decides tensor names, biases and the rotary rule.
    pub family: TinyFamily,
    /// Seed of the weights.
    pub seed: u64,
    /// Transformer layers.
    pub n_layers: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Whether the head is the embedding table.
    pub tied: bool,
    /// Number format on disk.
    pub stored: Stored,
}

// === impl TinySpec ===

impl TinySpec {
    /// Two layers, hidden 64, untied head, f32: the default.
    pub fn llama() -> Self {
        Self {
            family: TinyFamily::Llama,
            seed: 1,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            head_dim: 16,
            ffn: 128,
            context: 1024,
            rope_theta: 10_000.0,
            tied: false,
            stored: Stored::F32,
        }
    }

    /// Llama 3.x rotary scaling, tied head.
    pub fn llama3() -> Self {
        Self { family: TinyFamily::Llama3, seed: 2, rope_theta: 500_000.0, tied: true, ..Self::llama() }
    }

    /// Mistral, stored in bf16, three layers.
    pub fn mistral() -> Self {
        Self { family: TinyFamily::Mistral, seed: 3, n_layers: 3, stored: Stored::Bf16, ..Self::llama() }
    }

    /// Qwen2, one key/value head, stored in f16.
    pub fn qwen2() -> Self {
        Self { family: TinyFamily::Qwen2, seed: 4, n_kv_heads: 1, stored: Stored::F16, ..Self::llama() }
    }

    /// Llama with every width a multiple of 256, as K-quants demand.
    pub fn wide() -> Self {
        Self { seed: 5, head_dim: 64, ffn: 512, ..Self::llama() }
    }

    /// Width of the residual stream.
    pub fn hidden(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// `[out, in]` of one linear layer.
    pub fn linear_shape(&self, linear: Linear) -> (usize, usize) {
        let (hidden, kv) = (self.hidden(), self.n_kv_heads * self.head_dim);
        match linear {
            Linear::Q | Linear::O => (hidden, hidden),
            Linear::K | Linear::V => (kv, hidden),
            Linear::Gate | Linear::Up => (self.ffn, hidden),
            Linear::Down => (hidden, self.ffn),
        }
    }

    /// The weights, in Hugging Face names and row order, as they read back after rounding to [`Self::stored`].
    pub fn tensors(&self) -> Tensors {
        Tensors::generate(self)
    }

    /// Writes a Hugging Face directory `dir/tiny-<family>-<seed>` (config, safetensors, tokenizer) and returns it.
    pub fn write_hf(&self, dir: &Path) -> PathBuf {
        hf::write(self, dir)
    }

    /// Writes `dir/tiny-<family>-<seed>.<quantisation>.gguf` and returns its path. q and k rows are permuted as
    /// llama.cpp's converter does for the Llama architecture.
    pub fn write_gguf(&self, dir: &Path, quantisation: Quantisation) -> PathBuf {
        gguf::write(self, dir, quantisation)
    }

    /// `tiny-<family>-<seed>`.
    pub fn name(&self) -> String {
        let family = match self.family {
            TinyFamily::Llama => "llama",
            TinyFamily::Llama3 => "llama3",
            TinyFamily::Mistral => "mistral",
            TinyFamily::Qwen2 => "qwen2",
        };
        format!("tiny-{family}-{}", self.seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_and_adapters_depend_on_their_seed_alone() {
        let spec = TinySpec::llama();
        let values = |spec: &TinySpec| spec.tensors().named("model.norm.weight").values.clone();
        assert_eq!(values(&spec), values(&spec.clone()));
        assert_ne!(values(&spec), values(&TinySpec { seed: 77, ..spec }));
        assert_eq!(adapter(1, 4, &Linear::ALL), adapter(1, 4, &Linear::ALL));
        assert_ne!(adapter(1, 4, &Linear::ALL), adapter(2, 4, &Linear::ALL));
    }
}
