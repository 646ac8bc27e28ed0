//! The random weights of a tiny model, scaled so that activations stay near 1 and the logits spread over a few units.

use half::{bf16, f16};
use model::info::Linear;

use super::random::Random;
use super::tokenizer::VOCAB;
use super::{Stored, TinyFamily, TinySpec};

/// One named weight.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Hugging Face name.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Values after rounding to the stored format.
    pub values: Vec<f32>,
}

/// All weights of a tiny model, in a fixed order.
#[derive(Debug, Clone)]
pub struct Tensors {
    /// The weights.
    pub all: Vec<Tensor>,
}

impl Tensors {
    /// Deterministic in `spec`.
    pub(super) fn generate(spec: &TinySpec) -> Self {
        let mut all = Vec::new();
        let mut add = |name: String, shape: Vec<usize>, mean: f32, scale: f32| {
            let n = shape.iter().product();
            let mut values = Random::labelled(spec.seed, &name).normals(n, scale);
            values.iter_mut().for_each(|value| *value = spec.stored.round(*value + mean));
            all.push(Tensor { name, shape, values });
        };
        let hidden = spec.hidden();
        add("model.embed_tokens.weight".into(), vec![VOCAB, hidden], 0.0, 1.0);
        for layer in 0..spec.n_layers {
            let prefix = format!("model.layers.{layer}");
            for linear in Linear::ALL {
                let (n_out, n_in) = spec.linear_shape(linear);
                // Variance 1/n_in keeps the size of activations; q and k are larger, so that attention has peaks.
                let gain = if matches!(linear, Linear::Q | Linear::K) { 1.5 } else { 1.0 };
                let name = format!("{prefix}.{}", linear.hf_path());
                add(format!("{name}.weight"), vec![n_out, n_in], 0.0, gain / (n_in as f32).sqrt());
                if spec.family == TinyFamily::Qwen2 && matches!(linear, Linear::Q | Linear::K | Linear::V) {
                    add(format!("{name}.bias"), vec![n_out], 0.0, 0.5);
                }
            }
            add(format!("{prefix}.input_layernorm.weight"), vec![hidden], 1.0, 0.1);
            add(format!("{prefix}.post_attention_layernorm.weight"), vec![hidden], 1.0, 0.1);
        }
        add("model.norm.weight".into(), vec![hidden], 1.0, 0.1);
        if !spec.tied {
            add("lm_head.weight".into(), vec![VOCAB, hidden], 0.0, 3.0 / (hidden as f32).sqrt());
        }
        Self { all }
    }

    /// The weight called `name`.
    ///
    /// # Panics
    /// When there is none.
    pub fn named(&self, name: &str) -> &Tensor {
        self.all.iter().find(|tensor| tensor.name == name).unwrap_or_else(|| panic!("no tensor {name}"))
    }
}

impl Stored {
    /// The value as it reads back from disk.
    pub(super) fn round(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::Bf16 => bf16::from_f32(value).to_f32(),
        }
    }
}
