//! Qwen2 and Qwen2.5: biases on q, k and v; GGUF files keep Hugging Face's row order.

use super::FamilyRules;
use crate::info::Family;

pub(super) const RULES: FamilyRules = FamilyRules {
    family: Family::Qwen2,
    gguf_architecture: "qwen2",
    hf_architecture: "Qwen2ForCausalLM",
    gguf_interleaves_qk: false,
    qkv_bias: true,
    claims: |_| true,
    // The window is written even when it is off.
    hf_window: |config| if config["use_sliding_window"] == true { config["sliding_window"].as_u64() } else { None },
};
