//! Writes a tiny model as GGUF with candle's writer and quantisers, so that our reader is tested on files that
//! our code did not make.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use model::info::Linear;

use super::tokenizer::{self, VOCAB};
use super::{TinyFamily, TinySpec, tensors};

/// Which number formats the weight matrices get. Norms and biases are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantisation {
    /// All f32.
    F32,
    /// All f16.
    F16,
    /// All of one block format.
    All(GgmlDType),
    /// As llama.cpp's Q4_K_M: Q4K, with Q6K for v, down and the head.
    Q4KM,
    /// As llama.cpp's Q5_K_M: Q5K, with Q6K for v, down and the head.
    Q5KM,
}

impl Quantisation {
    fn dtype(self, name: &str) -> GgmlDType {
        let finer = name.contains("v_proj") || name.contains("down_proj") || name == "lm_head.weight";
        match self {
            Self::F32 => GgmlDType::F32,
            Self::F16 => GgmlDType::F16,
            Self::All(dtype) => dtype,
            Self::Q4KM if finer => GgmlDType::Q6K,
            Self::Q5KM if finer => GgmlDType::Q6K,
            Self::Q4KM => GgmlDType::Q4K,
            Self::Q5KM => GgmlDType::Q5K,
        }
    }
}

/// Blocks that do not divide the row fall back, as llama.cpp does: K-quants to blocks of 32, those to f16.
fn fitting(dtype: GgmlDType, n_in: usize) -> GgmlDType {
    let fallback = match dtype {
        GgmlDType::Q2K | GgmlDType::Q3K | GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        GgmlDType::Q6K => GgmlDType::Q8_0,
        other => other,
    };
    let fits = |dtype: &GgmlDType| n_in.is_multiple_of(dtype.block_size());
    [dtype, fallback].into_iter().find(fits).unwrap_or(GgmlDType::F16)
}

pub(super) fn write(spec: &TinySpec, dir: &Path, quantisation: Quantisation) -> PathBuf {
    std::fs::create_dir_all(dir).expect("create the folder of the file");
    let path = dir.join(format!("{}.{quantisation:?}.gguf", spec.name()).replace(['(', ')'], "_"));
    let tensors: Vec<(String, QTensor)> = spec
        .tensors()
        .all
        .iter()
        .map(|tensor| {
            let n_in = *tensor.shape.last().expect("a weight has a shape");
            let dtype =
                if tensor.shape.len() == 2 { fitting(quantisation.dtype(&tensor.name), n_in) } else { GgmlDType::F32 };
            let values = permuted(spec, tensor);
            let dense = Tensor::from_vec(values, tensor.shape.clone(), &Device::Cpu).expect("shape fits");
            (gguf_name(&tensor.name), QTensor::quantize(&dense, dtype).expect("the row is whole blocks"))
        })
        .collect();
    let metadata = metadata(spec);
    let metadata: Vec<(&str, &Value)> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut file = BufWriter::new(File::create(&path).expect("create the GGUF file"));
    gguf_file::write(&mut file, &metadata, &tensors).expect("write the GGUF file");
    path
}

/// Rows of q and k in the order of llama.cpp's Llama files: rotary pairs next to each other. Others unchanged.
fn permuted(spec: &TinySpec, tensor: &tensors::Tensor) -> Vec<f32> {
    let llama = matches!(spec.family, TinyFamily::Llama | TinyFamily::Llama3 | TinyFamily::Mistral);
    let rotary = tensor.name.contains("q_proj") || tensor.name.contains("k_proj");
    if !(llama && rotary) {
        return tensor.values.clone();
    }
    let (n_out, n_in) = (tensor.shape[0], tensor.shape[1]);
    let half = spec.head_dim / 2;
    (0..n_out)
        .flat_map(|row| {
            let (head, place) = (row / spec.head_dim, row % spec.head_dim);
            let from = head * spec.head_dim + (place % 2) * half + place / 2;
            tensor.values[from * n_in..][..n_in].iter().copied()
        })
        .collect()
}

fn gguf_name(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("model.layers.") {
        let (layer, rest) = rest.split_once('.').expect("layer and rest");
        for linear in Linear::ALL {
            if let Some(suffix) = rest.strip_prefix(linear.hf_path()) {
                return format!("blk.{layer}.{}{suffix}", linear.gguf_name());
            }
        }
        let norm = if rest.starts_with("input_layernorm") { "attn_norm" } else { "ffn_norm" };
        return format!("blk.{layer}.{norm}.weight");
    }
    match name {
        "model.embed_tokens.weight" => "token_embd.weight".into(),
        "model.norm.weight" => "output_norm.weight".into(),
        "lm_head.weight" => "output.weight".into(),
        other => panic!("no GGUF name for {other}"),
    }
}

fn metadata(spec: &TinySpec) -> Vec<(String, Value)> {
    let arch = if spec.family == TinyFamily::Qwen2 { "qwen2" } else { "llama" };
    let strings = |list: Vec<String>| Value::Array(list.into_iter().map(Value::String).collect());
    let kinds = (0..VOCAB).map(|id| Value::I32(if tokenizer::is_special(id) { 3 } else { 1 })).collect();
    let number = |n: usize| Value::U32(n as u32);
    let of_arch = [
        ("block_count", number(spec.n_layers)),
        ("context_length", number(spec.context)),
        ("embedding_length", number(spec.hidden())),
        ("feed_forward_length", number(spec.ffn)),
        ("attention.head_count", number(spec.n_heads)),
        ("attention.head_count_kv", number(spec.n_kv_heads)),
        ("attention.layer_norm_rms_epsilon", Value::F32(1e-5)),
        ("rope.dimension_count", number(spec.head_dim)),
        ("rope.freq_base", Value::F32(spec.rope_theta)),
        ("vocab_size", number(VOCAB)),
    ];
    let general = [
        ("general.architecture", Value::String(arch.into())),
        ("general.name", Value::String(spec.name())),
        ("tokenizer.ggml.model", Value::String("gpt2".into())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".into())),
        ("tokenizer.ggml.tokens", strings(tokenizer::tokens())),
        ("tokenizer.ggml.token_type", Value::Array(kinds)),
        ("tokenizer.ggml.merges", strings(tokenizer::merges())),
        ("tokenizer.ggml.bos_token_id", Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", Value::U32(tokenizer::EOS_ID)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.chat_template", Value::String(tokenizer::CHAT_TEMPLATE.into())),
    ];
    let of_arch = of_arch.map(|(key, value)| (format!("{arch}.{key}"), value));
    general.map(|(key, value)| (key.to_owned(), value)).into_iter().chain(of_arch).collect()
}
