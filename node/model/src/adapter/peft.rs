//! PEFT directories: config and safetensors against a base model.
//!
//! Tensor names are derived from base and config, so every tensor of the file is either expected or refused.
//! A module that the config targets but the file lacks is left alone, as PEFT does with missing keys; at least
//! one module must be there, and each with all its tensors. PEFT files hold rows in the order used inside, on
//! every base: no permutation here.

use std::collections::BTreeMap;

use super::config::PeftConfig;
use super::pack::{CheckedModule, RowOrder};
use super::tensor::TensorView;
use super::{AdapterError, AdapterLimits, quote, safetensors};
use crate::info::{Linear, ModelInfo};

/// What PEFT puts in front of a module's name when it saves.
const PREFIX: &str = "base_model.model.";

/// Checks both files; the modules come in layer order, then in the order of [`Linear::ALL`].
pub(super) fn check<'a>(
    config: &[u8],
    weights: &'a [u8],
    info: &ModelInfo,
    limits: &AdapterLimits,
) -> Result<Vec<CheckedModule<'a>>, AdapterError> {
    let config = PeftConfig::parse(config)?;
    check_base(&config, info, limits)?;
    let expected = expected_modules(&config, info, limits)?;
    let mut found: BTreeMap<(usize, Linear), Parts<'a>> = BTreeMap::new();
    for (name, view) in safetensors::parse(weights)? {
        let (place, part) = judge_name(&name, &config, info, &expected)?;
        let parts = found.entry(place).or_default();
        let slot = match part {
            Part::A => &mut parts.a,
            Part::B => &mut parts.b,
            Part::Magnitude => &mut parts.magnitude,
        };
        if let Some((first, _)) = slot {
            return Err(AdapterError::invalid(format!("tensors {first} and {name} mean the same")));
        }
        *slot = Some((name, view));
    }
    let mut modules = Vec::with_capacity(found.len());
    for (place, parts) in found {
        modules.push(parts.finish(place, expected[&place], &config, info)?);
    }
    Ok(modules)
}

/// Full name of a module in the Hugging Face model.
fn module_name(layer: usize, linear: Linear) -> String {
    format!("model.layers.{layer}.{}", linear.hf_path())
}

/// Identity of the base, as far as the config states it.
fn check_base(config: &PeftConfig, info: &ModelInfo, limits: &AdapterLimits) -> Result<(), AdapterError> {
    let last_segment = |name: &str| name.trim_end_matches('/').rsplit(['/', '\\']).next().unwrap_or("").to_lowercase();
    if let Some(name) = &config.base_name
        && !limits.accepted_base_names.is_empty()
        && !limits.accepted_base_names.iter().any(|accepted| last_segment(accepted) == last_segment(name))
    {
        let accepted: Vec<String> = limits.accepted_base_names.iter().map(|name| quote(name)).collect();
        return Err(AdapterError::BaseMismatch(format!(
            "base_model_name_or_path is {}, this base is {}; hint: train on this base, or correct the name if it is the same model",
            quote(name),
            accepted.join(" or ")
        )));
    }
    match config.layers.iter().flatten().find(|layer| **layer >= info.n_layers) {
        None => Ok(()),
        Some(layer) => Err(AdapterError::BaseMismatch(format!(
            "layers_to_transform names layer {layer}, the base has layers 0 to {}",
            info.n_layers - 1
        ))),
    }
}

/// Rank of every module the config targets.
fn expected_modules(
    config: &PeftConfig,
    info: &ModelInfo,
    limits: &AdapterLimits,
) -> Result<BTreeMap<(usize, Linear), usize>, AdapterError> {
    for outside in ["lm_head", "model.embed_tokens"] {
        if config.targets(outside) {
            return Err(AdapterError::unsupported(
                "target_modules",
                outside,
                "only the seven linear layers of the blocks are served; leave out head and embeddings",
            ));
        }
    }
    let mut expected = BTreeMap::new();
    for layer in 0..info.n_layers {
        for linear in Linear::ALL {
            let module = module_name(layer, linear);
            if !config.targets(&module) {
                continue;
            }
            let asked = config.rank(&module);
            let rank = usize::try_from(asked)
                .ok()
                .filter(|rank| *rank <= limits.rank_max)
                .ok_or(AdapterError::Rank { module: module.clone(), found: asked, max: limits.rank_max })?;
            expected.insert((layer, linear), rank);
        }
    }
    if expected.is_empty() {
        let known: Vec<&str> = Linear::ALL.iter().map(|linear| linear.hf_path()).collect();
        return Err(AdapterError::BaseMismatch(format!(
            "target_modules select none of the base's linear layers ({})",
            known.join(", ")
        )));
    }
    Ok(expected)
}

/// A module's tensors by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    A,
    B,
    Magnitude,
}

/// Where a tensor belongs, or why it does not.
fn judge_name(
    name: &str,
    config: &PeftConfig,
    info: &ModelInfo,
    expected: &BTreeMap<(usize, Linear), usize>,
) -> Result<((usize, Linear), Part), AdapterError> {
    refuse_features(name)?;
    let unknown = || {
        AdapterError::invalid(format!(
            "tensor {} is not part of a LoRA adapter for this base; expected names like {PREFIX}{}.lora_A.weight",
            quote(name),
            module_name(0, Linear::Q)
        ))
    };
    let rest = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_prefix("model.layers.")).ok_or_else(unknown)?;
    let (index, rest) = rest.split_once('.').ok_or_else(unknown)?;
    // Only the canonical decimal form, so that no two names mean one layer.
    let layer = index.parse::<usize>().ok().filter(|layer| layer.to_string() == index).ok_or_else(unknown)?;
    if layer >= info.n_layers {
        return Err(AdapterError::BaseMismatch(format!(
            "tensor {} is for layer {layer}, the base has layers 0 to {}",
            quote(name),
            info.n_layers - 1
        )));
    }
    let found = Linear::ALL.into_iter().find_map(|linear| {
        let part = match rest.strip_prefix(linear.hf_path())? {
            ".lora_A.weight" => Part::A,
            ".lora_B.weight" => Part::B,
            ".lora_magnitude_vector" | ".lora_magnitude_vector.weight" => Part::Magnitude,
            _ => return None,
        };
        Some((linear, part))
    });
    let (linear, part) = found.ok_or_else(unknown)?;
    if !expected.contains_key(&(layer, linear)) {
        return Err(AdapterError::invalid(format!(
            "tensor {} is there, but adapter_config.json does not target {}",
            quote(name),
            module_name(layer, linear)
        )));
    }
    if part == Part::Magnitude && !config.dora {
        return Err(AdapterError::invalid(format!("tensor {} is there, but use_dora is not set", quote(name))));
    }
    Ok(((layer, linear), part))
}

/// Tensors of features that are not served, told apart from unknown names for the sake of the message.
fn refuse_features(name: &str) -> Result<(), AdapterError> {
    const FEATURES: [(&str, &str); 7] = [
        ("lora_embedding_", "LoRA on embeddings is not served"),
        ("lora_A.bias", "train with lora_bias=false"),
        ("lora_B.bias", "train with lora_bias=false"),
        ("lora_diag", "KaSA is not served"),
        ("modules_to_save", "full copies of modules are not served"),
        ("lm_head.", "a changed output head is not served"),
        ("embed_tokens.", "changed embeddings are not served; save with save_embedding_layers=False"),
    ];
    match FEATURES.iter().find(|(mark, _)| name.contains(mark)) {
        None => Ok(()),
        Some((_, hint)) => Err(AdapterError::unsupported("tensor", quote(name), *hint)),
    }
}

/// The tensors found for one module.
#[derive(Debug, Default)]
struct Parts<'a> {
    a: Option<(String, TensorView<'a>)>,
    b: Option<(String, TensorView<'a>)>,
    magnitude: Option<(String, TensorView<'a>)>,
}

// === impl Parts ===

impl<'a> Parts<'a> {
    /// Checks completeness, shapes, ranks and values.
    fn finish(
        self,
        (layer, linear): (usize, Linear),
        rank: usize,
        config: &PeftConfig,
        info: &ModelInfo,
    ) -> Result<CheckedModule<'a>, AdapterError> {
        let module = module_name(layer, linear);
        let missing = |part: &str| {
            AdapterError::invalid(format!("tensor {PREFIX}{module}.{part} is missing, others of its module are there"))
        };
        let a = self.a.ok_or_else(|| missing("lora_A.weight"))?;
        let b = self.b.ok_or_else(|| missing("lora_B.weight"))?;
        let (n_out, n_in) = info.linear_shape(linear);
        check_shape(&a, (rank, n_in), a.1.cols != n_in)?;
        check_shape(&b, (n_out, rank), b.1.rows != n_out)?;
        let magnitude = match (config.dora, self.magnitude) {
            (false, _) => None,
            (true, None) => return Err(missing("lora_magnitude_vector")),
            (true, Some((name, view))) if view.rank_one && view.rows == n_out => Some((name, view)),
            (true, Some((name, view))) => {
                return Err(AdapterError::BaseMismatch(format!(
                    "tensor {name} has shape {}, expected [{n_out}]",
                    view.shape()
                )));
            }
        };
        for (name, view) in [Some(&a), Some(&b), magnitude.as_ref()].into_iter().flatten() {
            view.check_values(name)?;
        }
        Ok(CheckedModule {
            layer,
            linear,
            rank,
            scale: config.scale(&module, rank),
            a: a.1,
            b: b.1,
            b_rows: RowOrder::HuggingFace,
            magnitude: magnitude.map(|(_, view)| view),
        })
    }
}

/// Refuses another shape than `[rows, cols]`: as another base when the base's side differs, else as a rank
/// that contradicts the config.
fn check_shape(
    (name, view): &(String, TensorView<'_>),
    (rows, cols): (usize, usize),
    other_base: bool,
) -> Result<(), AdapterError> {
    if !view.rank_one && (view.rows, view.cols) == (rows, cols) {
        return Ok(());
    }
    let text = format!("tensor {name} has shape {}, expected [{rows}, {cols}] from base and config", view.shape());
    if other_base { Err(AdapterError::BaseMismatch(text)) } else { Err(AdapterError::Invalid(text)) }
}
