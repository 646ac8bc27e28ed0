//! Behaviour of the adapter check and of packing, on tiny files made here.
//!
//! The real adapters and the malformed collection are judged in the `tests` crate.

mod config;
mod fuzz;
mod gguf;
mod packing;
mod patterns;
mod peft;
mod safetensors;

use half::{bf16, f16};
use serde_json::{Value, json};
use shared::hash::ContentHash;

use super::{AdapterError, AdapterFiles, AdapterLimits, AdapterSummary, check};
use crate::info::{Family, Linear, ModelInfo, Numerics, RopeScaling};

/// Rank of the tiny adapters.
const RANK: usize = 2;

/// Two layers, hidden 8, heads 2 and 1 of 4, feed-forward 12.
fn tiny_info() -> ModelInfo {
    ModelInfo {
        hash: ContentHash::of(b"tiny"),
        family: Family::Llama,
        n_layers: 2,
        hidden: 8,
        n_heads: 2,
        n_kv_heads: 1,
        head_dim: 4,
        ffn: 12,
        vocab: 16,
        context: 64,
        rms_eps: 1e-5,
        rope_theta: 1e4,
        rope_scaling: RopeScaling::None,
        bos: None,
        add_bos: false,
        eos: vec![0],
        numerics: Numerics::Exact,
    }
}

/// A tensor to be written into a tiny file.
#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl Tensor {
    fn new(name: &str, shape: &[usize]) -> Self {
        let n: usize = shape.iter().product();
        // Distinct small values that every dtype holds exactly.
        let values = (0..n).map(|i| (i as f32 % 64.0 - 20.0) / 16.0).collect();
        Self { name: name.to_owned(), dtype: "F32", shape: shape.to_vec(), values }
    }

    fn bytes(&self) -> Vec<u8> {
        match self.dtype {
            "F16" => self.values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            "BF16" => self.values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            "F64" => self.values.iter().flat_map(|v| f64::from(*v).to_le_bytes()).collect(),
            "I8" => self.values.iter().map(|v| *v as i8 as u8).collect(),
            _ => self.values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }
}

fn peft_name(layer: usize, linear: Linear, part: &str) -> String {
    format!("base_model.model.model.layers.{layer}.{}.{part}", linear.hf_path())
}

/// The pair of one module.
fn pair(info: &ModelInfo, layer: usize, linear: Linear, rank: usize) -> [Tensor; 2] {
    let (n_out, n_in) = info.linear_shape(linear);
    [
        Tensor::new(&peft_name(layer, linear, "lora_A.weight"), &[rank, n_in]),
        Tensor::new(&peft_name(layer, linear, "lora_B.weight"), &[n_out, rank]),
    ]
}

/// Pairs of q and v in both layers.
fn tiny_tensors() -> Vec<Tensor> {
    let info = tiny_info();
    (0..2).flat_map(|layer| [Linear::Q, Linear::V].map(|linear| pair(&info, layer, linear, RANK))).flatten().collect()
}

fn safetensors_file(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    header.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend(tensor.bytes());
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        header.insert(tensor.name.clone(), entry);
    }
    raw_file(&Value::Object(header).to_string(), &data)
}

fn raw_file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

/// A config for q and v with `changes` put over it.
fn config_json(changes: &Value) -> Vec<u8> {
    let mut config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "acme/Tiny-1",
        "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none",
        "lora_dropout": 0.05, "inference_mode": true,
    });
    for (key, value) in changes.as_object().expect("changes are an object") {
        config[key] = value.clone();
    }
    config.to_string().into_bytes()
}

fn peft_files(changes: &Value, tensors: &[Tensor]) -> AdapterFiles {
    AdapterFiles::Peft { config: config_json(changes), weights: safetensors_file(tensors) }
}

fn summary(files: &AdapterFiles) -> Result<AdapterSummary, AdapterError> {
    check(files, &tiny_info(), &AdapterLimits::default()).map(|checked| checked.summary())
}

/// Asserts a refusal with this code whose text names `part`.
#[track_caller]
fn assert_refused(files: &AdapterFiles, code: &str, part: &str) {
    let error = summary(files).expect_err("must be refused");
    assert_eq!(error.code(), code, "{error}");
    assert!(error.to_string().contains(part), "{error} does not name {part}");
}

#[test]
fn content_hash_depends_on_kind_split_and_bytes() {
    let peft = |config: &[u8], weights: &[u8]| {
        AdapterFiles::Peft { config: config.to_vec(), weights: weights.to_vec() }.content_hash()
    };
    let hashes = [
        peft(b"ab", b"c"),
        peft(b"a", b"bc"),
        peft(b"", b"abc"),
        AdapterFiles::Gguf(b"abc".to_vec()).content_hash(),
        ContentHash::of(b"abc"),
    ];
    for (i, hash) in hashes.iter().enumerate() {
        assert!(!hashes[..i].contains(hash), "hash {i} repeats");
    }
    assert_eq!(peft(b"ab", b"c"), hashes[0]);
}

#[test]
fn debug_output_of_files_shows_no_content() {
    let files = AdapterFiles::Peft { config: b"secret".to_vec(), weights: vec![1; 10] };
    assert_eq!(format!("{files:?}"), "AdapterFiles(peft, 16 bytes)");
}

#[test]
fn files_over_the_byte_limit_are_refused_unread() {
    let files = AdapterFiles::Gguf(vec![0; 101]);
    let limits = AdapterLimits { bytes_max: 100, ..AdapterLimits::default() };
    let error = check(&files, &tiny_info(), &limits).expect_err("too large");
    assert_eq!(error.code(), "lora_byte_limit_exceeded");
    assert!(error.to_string().contains("101") && error.to_string().contains("100"), "{error}");
}
