//! Writes a tiny model as a Hugging Face directory.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use super::tokenizer::{self, VOCAB};
use super::{Stored, TinyFamily, TinySpec};

pub(super) fn write(spec: &TinySpec, dir: &Path) -> PathBuf {
    let dir = dir.join(spec.name());
    fs::create_dir_all(&dir).expect("create the model directory");
    let json = |name: &str, value: &Value| {
        fs::write(dir.join(name), serde_json::to_vec_pretty(value).expect("JSON")).expect("write a model file");
    };
    json("config.json", &config(spec));
    json("generation_config.json", &json!({"bos_token_id": 1, "eos_token_id": tokenizer::EOS_ID}));
    json("tokenizer.json", &tokenizer::tokenizer_json());
    json("tokenizer_config.json", &tokenizer::tokenizer_config());

    let stored: Vec<(String, Vec<usize>, Vec<u8>)> = spec
        .tensors()
        .all
        .into_iter()
        .map(|tensor| (tensor.name, tensor.shape, spec.stored.bytes(&tensor.values)))
        .collect();
    let views = stored.iter().map(|(name, shape, bytes)| {
        (name.as_str(), TensorView::new(spec.stored.dtype(), shape.clone(), bytes).expect("shape fits the bytes"))
    });
    let bytes = safetensors::serialize(views, None).expect("serialize weights");
    fs::write(dir.join("model.safetensors"), bytes).expect("write weights");
    dir
}

/// `config.json`, in the form of transformers 4 for Llama and of transformers 5 (`rope_parameters`) for Qwen2.
fn config(spec: &TinySpec) -> Value {
    let (architecture, model_type) = match spec.family {
        TinyFamily::Llama | TinyFamily::Llama3 => ("LlamaForCausalLM", "llama"),
        TinyFamily::Mistral => ("MistralForCausalLM", "mistral"),
        TinyFamily::Qwen2 => ("Qwen2ForCausalLM", "qwen2"),
    };
    let dtype = match spec.stored {
        Stored::F32 => "float32",
        Stored::F16 => "float16",
        Stored::Bf16 => "bfloat16",
    };
    let mut config = json!({
        "architectures": [architecture], "model_type": model_type, "hidden_act": "silu",
        "hidden_size": spec.hidden(), "intermediate_size": spec.ffn, "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads, "num_key_value_heads": spec.n_kv_heads,
        "max_position_embeddings": spec.context, "rms_norm_eps": 1e-5, "vocab_size": VOCAB,
        "bos_token_id": 1, "eos_token_id": tokenizer::EOS_ID, "tie_word_embeddings": spec.tied, "torch_dtype": dtype,
    });
    let more = match spec.family {
        TinyFamily::Llama => json!({"rope_theta": spec.rope_theta, "rope_scaling": null}),
        TinyFamily::Llama3 => json!({"rope_theta": spec.rope_theta, "rope_scaling": llama3_scaling()}),
        TinyFamily::Mistral => json!({"rope_theta": spec.rope_theta, "sliding_window": null}),
        TinyFamily::Qwen2 => json!({
            "rope_parameters": {"rope_theta": spec.rope_theta, "rope_type": "default"},
            "use_sliding_window": false, "sliding_window": null, "max_window_layers": spec.n_layers,
        }),
    };
    let fields = config.as_object_mut().expect("an object");
    fields.extend(more.as_object().expect("an object").clone());
    config
}

/// Llama 3.x scaling whose three frequency ranges all occur with a head of 16.
fn llama3_scaling() -> Value {
    json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64})
}

impl Stored {
    fn dtype(self) -> Dtype {
        match self {
            Self::F32 => Dtype::F32,
            Self::F16 => Dtype::F16,
            Self::Bf16 => Dtype::BF16,
        }
    }

    fn bytes(self, values: &[f32]) -> Vec<u8> {
        match self {
            Self::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            Self::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            Self::Bf16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
        }
    }
}
