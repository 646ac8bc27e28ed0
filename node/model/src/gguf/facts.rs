//! Facts about a model from GGUF metadata.

use shared::hash::ContentHash;

use super::ROPE_FREQS;
use super::check::GgufFile;
use super::tensors::GgufTensors;
use crate::base::LoadError;
use crate::base::assemble::{self, TensorSource};
use crate::base::family::FamilyRules;
use crate::info::{ModelInfo, Numerics, RopeScaling};
use crate::tokenizer::Tokenizer;

/// Control tokens that end an answer in the families we read, whether or not the metadata says so: many
/// converted files name only one of them.
const END_TEXTS: [&str; 5] = ["<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|endoftext|>"];

/// Reads and checks them; the hash and the ends of an answer are filled in later.
pub(super) fn model_info(file: &GgufFile, rules: &FamilyRules, numerics: Numerics) -> Result<ModelInfo, LoadError> {
    let prefix = rules.gguf_architecture;
    let need = |key: &str| file.need_uint(&format!("{prefix}.{key}")).map(narrow);
    let maybe = |key: &str| file.uint(&format!("{prefix}.{key}")).map(narrow);
    if let Some(experts) = maybe("expert_count").filter(|&experts| experts > 0) {
        return Err(LoadError::unsupported("expert_count", experts.to_string(), "dense models are read"));
    }
    let (hidden, n_heads) = (need("embedding_length")?, need("attention.head_count")?);
    let head_dim = maybe("attention.key_length").unwrap_or_else(|| hidden.checked_div(n_heads).unwrap_or(0));
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(other) = maybe(key).filter(|&other| other != head_dim) {
            let found = format!("{other} with heads of {head_dim}");
            return Err(LoadError::unsupported(&format!("{prefix}.{key}"), found, "it equals the head dimension"));
        }
    }
    let window = maybe("attention.sliding_window").filter(|&window| window > 0);
    let context = need("context_length")?.min(window.unwrap_or(usize::MAX));
    let vocab = file.tensor(assemble::Naming::Gguf.embed()).and_then(|tensor| tensor.dims.get(1).copied());
    let bos = token(file, "bos_token_id");
    let info = ModelInfo {
        hash: ContentHash([0; 32]),
        family: rules.family,
        n_layers: need("block_count")?,
        hidden,
        n_heads,
        n_kv_heads: maybe("attention.head_count_kv").unwrap_or(n_heads),
        head_dim,
        ffn: need("feed_forward_length")?,
        vocab: vocab.ok_or_else(|| LoadError::MissingTensor { name: assemble::Naming::Gguf.embed().to_owned() })?,
        context,
        rms_eps: file.float(&format!("{prefix}.attention.layer_norm_rms_epsilon")).unwrap_or(1e-5) as f32,
        rope_theta: file.float(&format!("{prefix}.rope.freq_base")).unwrap_or(10_000.0),
        rope_scaling: rope_scaling(file, prefix)?,
        bos,
        add_bos: bos.is_some() && adds_bos(file),
        eos: Vec::new(),
        numerics,
    };
    assemble::check_facts(&info)?;
    Ok(info)
}

/// Llama 3.1 and later: the converter has worked the scaling out as one divisor per frequency.
pub(super) fn apply_rope_freqs(info: &mut ModelInfo, tensors: &mut GgufTensors<'_>) -> Result<(), LoadError> {
    let divisors = tensors.vector(ROPE_FREQS)?;
    if divisors.len() != info.head_dim / 2 {
        let (found, expected) = (vec![divisors.len()], vec![info.head_dim / 2]);
        return Err(LoadError::Shape { name: ROPE_FREQS.to_owned(), found, expected });
    }
    if !divisors.iter().all(|divisor| divisor.is_finite() && *divisor > 0.0) {
        return Err(LoadError::tensor(ROPE_FREQS, &"divisors are positive; hint: the file is damaged"));
    }
    if info.rope_scaling != RopeScaling::None {
        let found = format!("{:?} together with {ROPE_FREQS}", info.rope_scaling);
        return Err(LoadError::unsupported("rope scaling", found, "one kind of scaling at a time"));
    }
    info.rope_scaling = RopeScaling::Divisors(divisors);
    Ok(())
}

fn rope_scaling(file: &GgufFile, prefix: &str) -> Result<RopeScaling, LoadError> {
    let factor = file.float(&format!("{prefix}.rope.scaling.factor"));
    // Old files have only this key; llama.cpp reads it as linear scaling.
    let factor = factor.or_else(|| file.float(&format!("{prefix}.rope.scale_linear")));
    match file.text(&format!("{prefix}.rope.scaling.type")) {
        Some("none") => Ok(RopeScaling::None),
        None | Some("linear") => match factor.unwrap_or(1.0) as f32 {
            1.0 => Ok(RopeScaling::None),
            factor if factor.is_finite() && factor >= 1.0 => Ok(RopeScaling::Linear { factor }),
            factor => Err(LoadError::config("the rope scaling factor", factor.to_string(), "it is at least 1")),
        },
        Some(other) => {
            let key = format!("{prefix}.rope.scaling.type");
            Err(LoadError::unsupported(&key, other, "none, linear and Llama 3's rope_freqs.weight are read"))
        }
    }
}

fn adds_bos(file: &GgufFile) -> bool {
    file.flag("tokenizer.ggml.add_bos_token").unwrap_or_else(|| {
        // Without the key: what the tokenizers of these families do.
        let pre = file.text("tokenizer.ggml.pre").unwrap_or_default();
        file.text("tokenizer.ggml.model") == Some("llama") || matches!(pre, "llama-bpe" | "llama3" | "llama-v3")
    })
}

/// Ends of an answer; the one the metadata calls end of text comes first.
pub(super) fn ends(file: &GgufFile, tokenizer: &Tokenizer) -> Vec<u32> {
    let mut ends: Vec<u32> =
        ["eos_token_id", "eot_token_id", "eom_token_id"].iter().filter_map(|key| token(file, key)).collect();
    let known = END_TEXTS.iter().filter_map(|text| tokenizer.id_of(text)).filter(|&id| tokenizer.is_special(id));
    ends.extend(known);
    let mut seen = std::collections::BTreeSet::new();
    ends.retain(|&id| seen.insert(id));
    ends
}

fn token(file: &GgufFile, key: &str) -> Option<u32> {
    file.uint(&format!("tokenizer.ggml.{key}")).and_then(|id| u32::try_from(id).ok())
}

/// Saturates: [`assemble::check_facts`] refuses what does not fit.
fn narrow(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
