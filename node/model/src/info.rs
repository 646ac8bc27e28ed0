//! What a base model is: its family, sizes, rotary rule, special tokens and numerics, as plain facts.

use shared::hash::ContentHash;

/// Model family; decides tensor names, biases and chat conventions, not the shape of the forward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3.x, SmolLM2 and others of the `llama` architecture.
    Llama,
    /// Mistral 7B: Llama with an optional sliding window (the context is cut to it).
    Mistral,
    /// Qwen2 and Qwen2.5: Llama with biases on q, k and v.
    Qwen2,
}

/// How activations and KV pages are kept. Both are batch-invariant; the choice is part of [`ModelInfo::numerics_id`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numerics {
    /// f32 activations, f32 KV pages: equal to a float32 reference up to rounding.
    Exact,
    /// Activations rounded to int8 with a scale per block of 32, f16 KV pages.
    Fast,
    /// As `Fast`, computed by a GPU: sums have another order, so the bits are others than those of a CPU.
    Gpu,
}

/// Change of the rotary frequencies for long contexts.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Plain rotary embedding.
    None,
    /// All frequencies divided by the factor.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// Llama 3.x: low frequencies divided, high kept, a smooth ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Ramp start, in wavelengths per original context.
        low_freq_factor: f32,
        /// Ramp end.
        high_freq_factor: f32,
        /// Context the model was first trained with.
        original_context: u32,
    },
    /// A divisor per frequency, as GGUF's `rope_freqs.weight` stores it; `head_dim / 2` entries.
    Divisors(Vec<f32>),
}

/// Facts about a loaded base model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInfo {
    /// BLAKE3 of the weight file; for a directory, of the sorted list of (file name, BLAKE3).
    pub hash: ContentHash,
    /// Family.
    pub family: Family,
    /// Transformer layers.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key/value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Width of the feed-forward layer.
    pub ffn: usize,
    /// Rows of the embedding table.
    pub vocab: usize,
    /// Longest sequence, in tokens.
    pub context: usize,
    /// Epsilon of the RMS norms.
    pub rms_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Long-context rule.
    pub rope_scaling: RopeScaling,
    /// Beginning-of-text token.
    pub bos: Option<u32>,
    /// Whether raw prompts get `bos` in front.
    pub add_bos: bool,
    /// Tokens that end an answer; at least one.
    pub eos: Vec<u32>,
    /// Precision of activations and KV.
    pub numerics: Numerics,
}

impl ModelInfo {
    /// Names everything that decides the bits of a result besides weights and tokens. Streams migrate only
    /// between nodes with equal ids.
    pub fn numerics_id(&self) -> String {
        let how = match self.numerics {
            Numerics::Exact => "cpu1-f32-kv32",
            Numerics::Fast => "cpu1-int8-kv16",
            Numerics::Gpu => "gpu1-int8-kv16",
        };
        format!("{how}-{}", self.hash.short())
    }

    /// `[out, in]` of one linear layer.
    pub fn linear_shape(&self, linear: Linear) -> (usize, usize) {
        let q = self.n_heads * self.head_dim;
        let kv = self.n_kv_heads * self.head_dim;
        match linear {
            Linear::Q => (q, self.hidden),
            Linear::K | Linear::V => (kv, self.hidden),
            Linear::O => (self.hidden, q),
            Linear::Gate | Linear::Up => (self.ffn, self.hidden),
            Linear::Down => (self.hidden, self.ffn),
        }
    }
}

/// The seven linear layers of a block that an adapter may change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Linear {
    /// Query projection.
    Q,
    /// Key projection.
    K,
    /// Value projection.
    V,
    /// Output projection.
    O,
    /// Gate of the feed-forward layer.
    Gate,
    /// Up projection.
    Up,
    /// Down projection.
    Down,
}

impl Linear {
    /// In the order of the forward pass.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Module path below `model.layers.{i}.`, as Hugging Face names it.
    pub fn hf_path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Name below `blk.{i}.`, as GGUF names it.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Self::Q => "attn_q",
            Self::K => "attn_k",
            Self::V => "attn_v",
            Self::O => "attn_output",
            Self::Gate => "ffn_gate",
            Self::Up => "ffn_up",
            Self::Down => "ffn_down",
        }
    }
}
