//! GGUF LoRA files: the same adapter with llama.cpp's names, a single alpha, and its row order.
//!
//! A file of the `llama` architecture keeps the output rows of q and k as llama.cpp's base files do; packing
//! puts them back into the order used inside. The header goes through the strict reader of [`crate::gguf::check`]
//! first. A GGUF file states no name of its base that could be relied on: architecture and shapes decide.

use std::collections::BTreeMap;

use candle_core::quantized::GgmlDType;

use super::pack::{CheckedModule, RowOrder};
use super::tensor::{Dtype, TensorView};
use super::{AdapterError, AdapterLimits, quote};
use crate::gguf::check::{GgufFile, Limits, TensorDesc, parse};
use crate::info::{Family, Linear, ModelInfo};

/// Largest alpha, as for PEFT files; `alpha·√r` of a folded rsLoRA adapter stays far below.
const ALPHA_ABS_MAX: f64 = 1e4;

/// Checks a file; the modules come in layer order, then in the order of [`Linear::ALL`].
pub(super) fn check<'a>(
    bytes: &'a [u8],
    info: &ModelInfo,
    limits: &AdapterLimits,
) -> Result<Vec<CheckedModule<'a>>, AdapterError> {
    let file = parse(bytes, &Limits::ADAPTER).map_err(|error| AdapterError::invalid(format!("GGUF file: {error}")))?;
    let alpha = check_metadata(&file, info)?;
    let mut found: BTreeMap<(usize, Linear), Halves<'a>> = BTreeMap::new();
    for tensor in file.tensors() {
        let (place, is_a) = judge_name(&tensor.name, info)?;
        let view = view(tensor, bytes)?;
        let halves = found.entry(place).or_default();
        *(if is_a { &mut halves.a } else { &mut halves.b }) = Some(view);
    }
    if found.is_empty() {
        return Err(AdapterError::invalid("the GGUF file holds no tensors"));
    }
    found.into_iter().map(|(place, halves)| halves.finish(place, alpha, info, limits)).collect()
}

/// The keys that say what the file is; returns alpha, 0 when there is none.
fn check_metadata(file: &GgufFile, info: &ModelInfo) -> Result<f64, AdapterError> {
    for (key, wanted) in [("general.type", "adapter"), ("adapter.type", "lora")] {
        match file.text(key) {
            Some(found) if found == wanted => {}
            Some(found) => {
                return Err(AdapterError::unsupported(
                    key,
                    quote(found),
                    format!("a LoRA file has {key} = {wanted:?}"),
                ));
            }
            None => {
                return Err(AdapterError::invalid(format!(
                    "GGUF key {key} is missing; a LoRA file has {wanted:?} there"
                )));
            }
        }
    }
    let wanted = match info.family {
        Family::Llama | Family::Mistral => "llama",
        Family::Qwen2 => "qwen2",
    };
    let found = file.text("general.architecture").unwrap_or("");
    if found != wanted {
        return Err(AdapterError::BaseMismatch(format!(
            "general.architecture is {}, this base is {wanted:?}",
            quote(found)
        )));
    }
    if file.value("adapter.alora.invocation_tokens").is_some() {
        return Err(AdapterError::unsupported(
            "adapter.alora.invocation_tokens",
            "set",
            "activated LoRA is not served",
        ));
    }
    const ALPHA: &str = "adapter.lora.alpha";
    let Some(value) = file.value(ALPHA) else { return Ok(0.0) };
    value.as_float().filter(|alpha| alpha.abs() <= ALPHA_ABS_MAX).ok_or_else(|| {
        AdapterError::invalid(format!("{ALPHA} must be a float of at most {ALPHA_ABS_MAX} in magnitude"))
    })
}

/// Layer, linear and half (true for `lora_a`) of a tensor, or why it has no place.
fn judge_name(name: &str, info: &ModelInfo) -> Result<((usize, Linear), bool), AdapterError> {
    let unknown = || {
        AdapterError::invalid(format!(
            "tensor {} is not part of a LoRA adapter for this base; expected names like blk.0.{}.weight.lora_a",
            quote(name),
            Linear::Q.gguf_name()
        ))
    };
    let is_outside = ["token_embd.", "output."].iter().any(|front| name.starts_with(front));
    if is_outside || name.contains("_norm.") || name.contains(".bias") {
        return Err(AdapterError::unsupported(
            "tensor",
            quote(name),
            "only the seven linear layers of the blocks are served; leave out head, embeddings, norms and biases",
        ));
    }
    let (index, rest) = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.')).ok_or_else(unknown)?;
    // Only the canonical decimal form, so that no two names mean one layer.
    let layer = index.parse::<usize>().ok().filter(|layer| layer.to_string() == index).ok_or_else(unknown)?;
    let (stem, half) = rest.rsplit_once(".weight.").ok_or_else(unknown)?;
    let linear = Linear::ALL.into_iter().find(|linear| linear.gguf_name() == stem).ok_or_else(unknown)?;
    let is_a = match half {
        "lora_a" => true,
        "lora_b" => false,
        _ => return Err(unknown()),
    };
    if layer >= info.n_layers {
        return Err(AdapterError::BaseMismatch(format!(
            "tensor {} is for layer {layer}, the base has layers 0 to {}",
            quote(name),
            info.n_layers - 1
        )));
    }
    Ok(((layer, linear), is_a))
}

/// The tensor's bytes as a row-major matrix; the header check has placed them inside the file.
fn view<'a>(tensor: &TensorDesc, bytes: &'a [u8]) -> Result<TensorView<'a>, AdapterError> {
    let dtype = match tensor.dtype {
        GgmlDType::F32 => Dtype::F32,
        GgmlDType::F16 => Dtype::F16,
        GgmlDType::BF16 => Dtype::Bf16,
        other => {
            return Err(AdapterError::unsupported(
                format!("type of tensor {}", quote(&tensor.name)),
                format!("{other:?}"),
                "store the weights as F32, F16 or BF16",
            ));
        }
    };
    // ggml counts dimensions from the fastest, and drops trailing ones of 1 (a rank-1 half may have one).
    let (cols, rows) = match *tensor.dims.as_slice() {
        [cols] => (cols, 1),
        [cols, rows] | [cols, rows, 1] | [cols, rows, 1, 1] => (cols, rows),
        _ => {
            return Err(AdapterError::invalid(format!(
                "tensor {} has dimensions {:?}, expected two",
                quote(&tensor.name),
                tensor.dims
            )));
        }
    };
    let place = |at: u64| usize::try_from(at).expect("the header check keeps tensors inside the file");
    Ok(TensorView {
        dtype,
        rows,
        cols,
        rank_one: false,
        bytes: &bytes[place(tensor.bytes.start)..place(tensor.bytes.end)],
    })
}

/// The two halves of one module.
#[derive(Debug, Default)]
struct Halves<'a> {
    a: Option<TensorView<'a>>,
    b: Option<TensorView<'a>>,
}

// === impl Halves ===

impl<'a> Halves<'a> {
    /// Checks completeness, shapes, rank and values.
    fn finish(
        self,
        (layer, linear): (usize, Linear),
        alpha: f64,
        info: &ModelInfo,
        limits: &AdapterLimits,
    ) -> Result<CheckedModule<'a>, AdapterError> {
        let name = |half: &str| format!("blk.{layer}.{}.weight.{half}", linear.gguf_name());
        let missing =
            |half: &str| AdapterError::invalid(format!("tensor {} is missing, its other half is there", name(half)));
        let a = self.a.ok_or_else(|| missing("lora_a"))?;
        let b = self.b.ok_or_else(|| missing("lora_b"))?;
        let (n_out, n_in) = info.linear_shape(linear);
        let rank = b.cols;
        if rank > limits.rank_max {
            return Err(AdapterError::Rank { module: name("lora_b"), found: rank as u64, max: limits.rank_max });
        }
        for (half, view, sides, fits) in
            [("lora_a", &a, (n_in, a.rows), a.cols == n_in), ("lora_b", &b, (rank, n_out), b.rows == n_out)]
        {
            if !fits {
                return Err(AdapterError::BaseMismatch(format!(
                    "tensor {} has dimensions [{}, {}], expected [{}, {}]",
                    name(half),
                    view.cols,
                    view.rows,
                    sides.0,
                    sides.1
                )));
            }
        }
        if a.rows != rank {
            return Err(AdapterError::invalid(format!(
                "tensor {} has rank {}, {} has rank {rank}",
                name("lora_a"),
                a.rows,
                name("lora_b")
            )));
        }
        a.check_values(&name("lora_a"))?;
        b.check_values(&name("lora_b"))?;
        // As llama.cpp: no alpha, or 0, means the product is used as it is.
        let scale = if alpha == 0.0 { 1.0 } else { alpha / rank as f64 };
        Ok(CheckedModule {
            layer,
            linear,
            rank,
            scale: scale as f32,
            a,
            b,
            b_rows: row_order(linear, info),
            magnitude: None,
        })
    }
}

/// llama.cpp's converter interleaves rotary partners in q and k of the `llama` architecture, and only there.
fn row_order(linear: Linear, info: &ModelInfo) -> RowOrder {
    match (info.family, linear) {
        (Family::Llama | Family::Mistral, Linear::Q | Linear::K) => RowOrder::Interleaved { head_dim: info.head_dim },
        _ => RowOrder::HuggingFace,
    }
}
