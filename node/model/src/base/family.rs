//! What distinguishes the model families: a record each. The forward pass is the same for all.

mod llama;
mod mistral;
mod qwen2;

use serde_json::Value;

use super::LoadError;
use crate::gguf::check::GgufFile;
use crate::info::Family;

/// How a family's files differ.
pub(crate) struct FamilyRules {
    /// The family.
    pub(crate) family: Family,
    /// `general.architecture` in GGUF files; also the prefix of the keys.
    pub(crate) gguf_architecture: &'static str,
    /// `architectures[0]` in `config.json`.
    pub(crate) hf_architecture: &'static str,
    /// Whether GGUF converters interleave the rows of q and k.
    pub(crate) gguf_interleaves_qk: bool,
    /// Whether q, k and v have biases.
    pub(crate) qkv_bias: bool,
    /// Whether a GGUF file of the architecture is of this family.
    pub(crate) claims: fn(&GgufFile) -> bool,
    /// Length the context is cut to, when `config.json` says so.
    pub(crate) hf_window: fn(&Value) -> Option<u64>,
}

/// In the order in which GGUF files are offered to them.
const ALL: [&FamilyRules; 3] = [&mistral::RULES, &llama::RULES, &qwen2::RULES];

/// The family of a GGUF file.
pub(crate) fn of_gguf(file: &GgufFile) -> Result<&'static FamilyRules, LoadError> {
    let architecture = file.need_text("general.architecture")?;
    let mut candidates = ALL.into_iter().filter(|rules| rules.gguf_architecture == architecture);
    candidates.find(|rules| (rules.claims)(file)).ok_or_else(|| {
        LoadError::unsupported(
            "general.architecture",
            architecture,
            "llama (Llama, SmolLM2, Mistral) and qwen2 are read",
        )
    })
}

/// The family of a Hugging Face architecture.
pub(crate) fn of_hf(architecture: &str) -> Result<&'static FamilyRules, LoadError> {
    ALL.into_iter().find(|rules| rules.hf_architecture == architecture).ok_or_else(|| {
        let supported = "LlamaForCausalLM, MistralForCausalLM and Qwen2ForCausalLM are read";
        LoadError::unsupported("architecture", architecture, supported)
    })
}
