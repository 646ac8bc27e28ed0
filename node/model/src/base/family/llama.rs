//! Llama 2 and 3.x, SmolLM2, and everything else converted under their name.

use super::FamilyRules;
use crate::info::Family;

pub(super) const RULES: FamilyRules = FamilyRules {
    family: Family::Llama,
    gguf_architecture: "llama",
    hf_architecture: "LlamaForCausalLM",
    gguf_interleaves_qk: true,
    qkv_bias: false,
    claims: |_| true,
    hf_window: |_| None,
};
