//! Mistral 7B and its kin: Llama with a sliding window, to which the context is cut.

use super::FamilyRules;
use crate::info::Family;

pub(super) const RULES: FamilyRules = FamilyRules {
    family: Family::Mistral,
    // Converters file Mistral under llama; only the name tells.
    gguf_architecture: "llama",
    hf_architecture: "MistralForCausalLM",
    gguf_interleaves_qk: true,
    qkv_bias: false,
    claims: |file| {
        let named = |key| file.text(key).is_some_and(|name| name.to_ascii_lowercase().contains("mistral"));
        named("general.basename") || named("general.name")
    },
    hf_window: |config| config["sliding_window"].as_u64(),
};
