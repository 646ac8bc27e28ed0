//! From checked facts and a source of tensors to packed weights, the same for both file formats.
//!
//! Before anything large is read, the names and shapes in the source are compared with what the facts
//! require: a missing, unknown or misshapen tensor is named.

use std::collections::BTreeMap;
use std::sync::Arc;

use kernels::matrix::Matrix;

use super::LoadError;
use super::family::FamilyRules;
use crate::info::{Linear, ModelInfo};
use crate::weights::{LayerWeights, Weights};

/// Names of tensors in a file format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Naming {
    /// `blk.0.attn_q.weight`.
    Gguf,
    /// `model.layers.0.self_attn.q_proj.weight`.
    HuggingFace,
}

/// Where tensors come from. Names and shapes have been compared with the facts before anything is read.
pub(crate) trait TensorSource {
    /// Reads and packs a matrix `[n_out, n_in]`; row `i` of the result is row `rows[i]` of the file.
    fn matrix(&mut self, name: &str, shape: (usize, usize), rows: Option<&[u32]>) -> Result<Matrix, LoadError>;

    /// Reads a vector as f32.
    fn vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError>;
}

/// A model has at most this many layers; the largest known ones have 126.
const LAYERS_MAX: usize = 1024;

/// Widths and vocabularies beyond this are damage: the largest known ones are below 300 thousand.
const WIDTH_MAX: usize = 1 << 20;

/// Reads everything.
///
/// # Errors
/// Names the first tensor that is missing, unknown, misshapen or unreadable.
pub(crate) fn weights(
    info: &ModelInfo,
    rules: &FamilyRules,
    naming: Naming,
    tied: bool,
    source: &mut impl TensorSource,
) -> Result<Weights, LoadError> {
    let interleaved = naming == Naming::Gguf && rules.gguf_interleaves_qk;
    let mut layers = Vec::with_capacity(info.n_layers);
    for layer in 0..info.n_layers {
        layers.push(read_layer(info, rules, naming, interleaved, layer, source)?);
    }
    let table = (info.vocab, info.hidden);
    let embed = Arc::new(source.matrix(naming.embed(), table, None)?);
    let head = if tied { embed.clone() } else { Arc::new(source.matrix(naming.head(), table, None)?) };
    let norm = finite(source, naming.norm())?;
    Ok(Weights { embed, layers, norm, head })
}

fn read_layer(
    info: &ModelInfo,
    rules: &FamilyRules,
    naming: Naming,
    interleaved: bool,
    layer: usize,
    source: &mut impl TensorSource,
) -> Result<LayerWeights, LoadError> {
    let mut linears = Vec::with_capacity(Linear::ALL.len());
    for linear in Linear::ALL {
        let heads = match linear {
            Linear::Q => Some(info.n_heads),
            Linear::K => Some(info.n_kv_heads),
            _ => None,
        };
        let rows = heads.filter(|_| interleaved).map(|n_heads| rotate_half_rows(n_heads, info.head_dim));
        let name = naming.linear(layer, linear, "weight");
        linears.push(source.matrix(&name, info.linear_shape(linear), rows.as_deref())?);
    }
    let qkv_bias = if rules.qkv_bias {
        let mut bias = |linear| finite(source, &naming.linear(layer, linear, "bias"));
        Some([bias(Linear::Q)?, bias(Linear::K)?, bias(Linear::V)?])
    } else {
        None
    };
    Ok(LayerWeights {
        attn_norm: finite(source, &naming.attn_norm(layer))?,
        linears: linears.try_into().expect("one matrix per entry of Linear::ALL"),
        qkv_bias,
        ffn_norm: finite(source, &naming.ffn_norm(layer))?,
    })
}

/// Compares the tensors of a file (name → shape, slowest dimension first) with what the facts require.
/// `ignored` says which surplus names change nothing.
///
/// # Errors
/// Names the first tensor that is missing, misshapen or unknown.
pub(crate) fn check_tensors<'a>(
    info: &ModelInfo,
    rules: &FamilyRules,
    naming: Naming,
    tied: bool,
    found: impl Iterator<Item = (&'a str, Vec<usize>)>,
    ignored: impl Fn(&str) -> bool,
) -> Result<(), LoadError> {
    let mut expected = expected_tensors(info, rules, naming, tied);
    for (name, shape) in found {
        match expected.remove(name) {
            Some(wanted) if wanted == shape => {}
            Some(wanted) => return Err(LoadError::Shape { name: name.to_owned(), found: shape, expected: wanted }),
            None if ignored(name) => {}
            None => return Err(LoadError::UnknownTensor { name: name.to_owned(), family: rules.family }),
        }
    }
    match expected.into_keys().next() {
        Some(name) => Err(LoadError::MissingTensor { name }),
        None => Ok(()),
    }
}

fn expected_tensors(info: &ModelInfo, rules: &FamilyRules, naming: Naming, tied: bool) -> BTreeMap<String, Vec<usize>> {
    let mut expected = BTreeMap::new();
    expected.insert(naming.embed().to_owned(), vec![info.vocab, info.hidden]);
    expected.insert(naming.norm().to_owned(), vec![info.hidden]);
    if !tied {
        expected.insert(naming.head().to_owned(), vec![info.vocab, info.hidden]);
    }
    for layer in 0..info.n_layers {
        expected.insert(naming.attn_norm(layer), vec![info.hidden]);
        expected.insert(naming.ffn_norm(layer), vec![info.hidden]);
        for linear in Linear::ALL {
            let (n_out, n_in) = info.linear_shape(linear);
            expected.insert(naming.linear(layer, linear, "weight"), vec![n_out, n_in]);
            if rules.qkv_bias && matches!(linear, Linear::Q | Linear::K | Linear::V) {
                expected.insert(naming.linear(layer, linear, "bias"), vec![n_out]);
            }
        }
    }
    expected
}

/// Checks that the facts fit together; everything later may multiply them without overflow.
///
/// # Errors
/// Names the first fact that is out of range.
pub(crate) fn check_facts(info: &ModelInfo) -> Result<(), LoadError> {
    let range = |key: &str, found: usize, max: usize| {
        if (1..=max).contains(&found) {
            Ok(())
        } else {
            Err(LoadError::config(key, found.to_string(), "no known model is like this; the file is damaged"))
        }
    };
    range("the number of layers", info.n_layers, LAYERS_MAX)?;
    range("the hidden size", info.hidden, WIDTH_MAX)?;
    range("the number of heads", info.n_heads, 4096)?;
    range("the number of key/value heads", info.n_kv_heads, info.n_heads)?;
    range("the head dimension", info.head_dim, 4096)?;
    range("the feed-forward size", info.ffn, WIDTH_MAX)?;
    range("the vocabulary", info.vocab, WIDTH_MAX)?;
    range("the context length", info.context, 1 << 24)?;
    if !info.n_heads.is_multiple_of(info.n_kv_heads) {
        let found = format!("{} for {} heads", info.n_kv_heads, info.n_heads);
        return Err(LoadError::config("the number of key/value heads", found, "it divides the number of heads"));
    }
    if !info.head_dim.is_multiple_of(2) {
        return Err(LoadError::config(
            "the head dimension",
            info.head_dim.to_string(),
            "rotary embedding needs it even",
        ));
    }
    if !(info.rms_eps > 0.0 && info.rms_eps < 1.0) {
        return Err(LoadError::config("the RMS epsilon", info.rms_eps.to_string(), "it lies between 0 and 1"));
    }
    if !(info.rope_theta > 1.0 && info.rope_theta.is_finite()) {
        return Err(LoadError::config("the rotary base", info.rope_theta.to_string(), "it is above 1"));
    }
    Ok(())
}

/// Checks that answers can end and that special tokens are tokens.
///
/// # Errors
/// Names the first that is not.
pub(crate) fn check_specials(info: &ModelInfo) -> Result<(), LoadError> {
    if info.eos.is_empty() {
        return Err(LoadError::config("the end-of-text token", "missing", "without one no answer would end"));
    }
    let tokens = info.eos.iter().chain(&info.bos);
    match tokens.into_iter().find(|&&id| id as usize >= info.vocab) {
        Some(id) => Err(LoadError::config("a special token", id.to_string(), "it is below the vocabulary size")),
        None => Ok(()),
    }
}

/// Source row of each row when rotary partners `2j`, `2j + 1` of a head become `j`, `j + head_dim / 2`.
fn rotate_half_rows(n_heads: usize, head_dim: usize) -> Vec<u32> {
    let half = head_dim / 2;
    let row = |(head, i): (usize, usize)| (head * head_dim + 2 * (i % half) + i / half) as u32;
    (0..n_heads).flat_map(|head| (0..head_dim).map(move |i| (head, i))).map(row).collect()
}

fn finite(source: &mut impl TensorSource, name: &str) -> Result<Vec<f32>, LoadError> {
    let values = source.vector(name)?;
    match values.iter().position(|value| !value.is_finite()) {
        Some(at) => Err(LoadError::tensor(name, &format!("value {at} is not finite; hint: the file is damaged"))),
        None => Ok(values),
    }
}

// === impl Naming ===

impl Naming {
    /// Token embedding.
    pub(crate) fn embed(self) -> &'static str {
        match self {
            Self::Gguf => "token_embd.weight",
            Self::HuggingFace => "model.embed_tokens.weight",
        }
    }

    /// Output head.
    pub(crate) fn head(self) -> &'static str {
        match self {
            Self::Gguf => "output.weight",
            Self::HuggingFace => "lm_head.weight",
        }
    }

    fn norm(self) -> &'static str {
        match self {
            Self::Gguf => "output_norm.weight",
            Self::HuggingFace => "model.norm.weight",
        }
    }

    fn attn_norm(self, layer: usize) -> String {
        match self {
            Self::Gguf => format!("blk.{layer}.attn_norm.weight"),
            Self::HuggingFace => format!("model.layers.{layer}.input_layernorm.weight"),
        }
    }

    fn ffn_norm(self, layer: usize) -> String {
        match self {
            Self::Gguf => format!("blk.{layer}.ffn_norm.weight"),
            Self::HuggingFace => format!("model.layers.{layer}.post_attention_layernorm.weight"),
        }
    }

    fn linear(self, layer: usize, linear: Linear, kind: &str) -> String {
        match self {
            Self::Gguf => format!("blk.{layer}.{}.{kind}", linear.gguf_name()),
            Self::HuggingFace => format!("model.layers.{layer}.{}.{kind}", linear.hf_path()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_the_inverse_of_the_converters_permutation() {
        // The converter: W.reshape(n_head, 2, d/2).swapaxes(1, 2), so row h·d + 2j + s of the file is
        // row h·d + s·d/2 + j of the original.
        let (n_heads, d) = (3, 8);
        let mut converted = vec![0; n_heads * d];
        for h in 0..n_heads {
            for s in 0..2 {
                for j in 0..d / 2 {
                    converted[h * d + 2 * j + s] = h * d + s * d / 2 + j;
                }
            }
        }
        let restored: Vec<usize> =
            rotate_half_rows(n_heads, d).into_iter().map(|row| converted[row as usize]).collect();
        assert_eq!(restored, (0..n_heads * d).collect::<Vec<_>>());
    }
}
