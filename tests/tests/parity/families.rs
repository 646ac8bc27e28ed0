//! Tiny random models of every family against candle's implementations, from the same files.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{llama, mistral, qwen2};
use model::info::Numerics;
use tests::tiny::{Random, TinyFamily, TinySpec, VOCAB};

use crate::lab::{self, Lab};

/// Logits spread over about 20; two float32 paths differ by rounding.
const LOGIT_DIFF_MAX: f32 = 1e-3;

/// Prompt lengths: one token, part of a page, over a page border, past the original context of the Llama 3 rule.
const LENGTHS: [usize; 4] = [1, 7, 40, 150];

fn weights(dir: &Path) -> VarBuilder<'static> {
    let stored = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu).expect("weights");
    let wide: HashMap<String, Tensor> =
        stored.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(DType::F32).expect("a float"))).collect();
    VarBuilder::from_tensors(wide, DType::F32, &Device::Cpu)
}

/// Logits of the last of `tokens`, as candle computes them.
fn candle_logits(spec: &TinySpec, dir: &Path, tokens: &[u32]) -> Vec<f32> {
    let tokens = Tensor::new(tokens, &Device::Cpu).expect("tokens").unsqueeze(0).expect("a batch of one");
    let logits = match spec.family {
        TinyFamily::Llama | TinyFamily::Llama3 => {
            let text = std::fs::read(dir.join("config.json")).expect("config");
            let config: llama::LlamaConfig = serde_json::from_slice(&text).expect("config");
            let config = config.into_config(false);
            let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).expect("cache");
            let model = llama::Llama::load(weights(dir), &config).expect("load");
            model.forward(&tokens, 0, &mut cache)
        }
        TinyFamily::Mistral => {
            let mut model = mistral::Model::new(&mistral_config(spec), weights(dir)).expect("load");
            model.forward(&tokens, 0)
        }
        TinyFamily::Qwen2 => {
            let mut model = qwen2::ModelForCausalLM::new(&qwen2_config(spec), weights(dir)).expect("load");
            model.forward(&tokens, 0)
        }
    };
    logits.and_then(|logits| logits.flatten_all()?.to_vec1::<f32>()).expect("candle computes")
}

fn mistral_config(spec: &TinySpec) -> mistral::Config {
    mistral::Config {
        vocab_size: VOCAB,
        hidden_size: spec.hidden(),
        intermediate_size: spec.ffn,
        num_hidden_layers: spec.n_layers,
        num_attention_heads: spec.n_heads,
        head_dim: None,
        num_key_value_heads: spec.n_kv_heads,
        hidden_act: Activation::Silu,
        max_position_embeddings: spec.context,
        rms_norm_eps: 1e-5,
        rope_theta: f64::from(spec.rope_theta),
        sliding_window: None,
        use_flash_attn: false,
    }
}

fn qwen2_config(spec: &TinySpec) -> qwen2::Config {
    qwen2::Config {
        vocab_size: VOCAB,
        hidden_size: spec.hidden(),
        intermediate_size: spec.ffn,
        num_hidden_layers: spec.n_layers,
        num_attention_heads: spec.n_heads,
        num_key_value_heads: spec.n_kv_heads,
        max_position_embeddings: spec.context,
        sliding_window: spec.context,
        max_window_layers: spec.n_layers,
        tie_word_embeddings: spec.tied,
        rope_theta: f64::from(spec.rope_theta),
        rms_norm_eps: 1e-5,
        use_sliding_window: false,
        hidden_act: Activation::Silu,
    }
}

fn compare(spec: &TinySpec) {
    let dir = spec.write_hf(&lab::folder("families"));
    let base = lab::load(&dir, Numerics::Exact);
    let mut lab = Lab::new(&base, 2, 64, 512, 1);
    let mut random = Random::new(spec.seed);
    for length in LENGTHS {
        let tokens: Vec<u32> = (0..length).map(|_| random.below(VOCAB) as u32).collect();
        let mut sequence = lab.sequence(&tokens, 0, None);
        let ours = lab.finish(&mut sequence);
        lab.end(sequence);
        let off = lab::distance(&ours, &candle_logits(spec, &dir, &tokens));
        println!("{} at {length} tokens: {off}", spec.name());
        assert!(off <= LOGIT_DIFF_MAX, "{} at {length} tokens differs by {off}", spec.name());
    }
}

#[test]
fn llama_agrees_with_candle() {
    compare(&TinySpec::llama());
}

#[test]
fn llama_3_rotary_scaling_agrees_with_candle() {
    compare(&TinySpec::llama3());
}

#[test]
fn mistral_in_bf16_agrees_with_candle() {
    compare(&TinySpec::mistral());
}

#[test]
fn qwen2_in_f16_agrees_with_candle() {
    compare(&TinySpec::qwen2());
}
