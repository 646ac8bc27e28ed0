//! Random LoRA adapters for tiny models, as the files PEFT would write.

use std::fs;
use std::path::Path;

use model::adapter::AdapterFiles;
use model::info::Linear;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::json;

use super::TinySpec;
use super::random::Random;

/// Writes the files of a PEFT adapter (or `adapter.gguf`) into `dir`, which is created.
pub fn write_adapter(files: &AdapterFiles, dir: &Path) {
    fs::create_dir_all(dir).expect("create the adapter directory");
    match files {
        AdapterFiles::Peft { config, weights } => {
            fs::write(dir.join("adapter_config.json"), config).expect("write the config");
            fs::write(dir.join("adapter_model.safetensors"), weights).expect("write the weights");
        }
        AdapterFiles::Gguf(bytes) => fs::write(dir.join("adapter.gguf"), bytes).expect("write the adapter"),
    }
}

/// Reads an adapter of the test data: the PEFT folder `path`, or else the file `path` + `.f16.gguf`.
pub fn read_adapter(path: &Path) -> AdapterFiles {
    let read = |path: &Path| fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    if path.is_dir() {
        let (config, weights) = (path.join("adapter_config.json"), path.join("adapter_model.safetensors"));
        return AdapterFiles::Peft { config: read(&config), weights: read(&weights) };
    }
    AdapterFiles::Gguf(read(&path.with_added_extension("f16.gguf")))
}

/// What kind of adapter to make.
#[derive(Debug, Clone)]
pub struct AdapterSpec {
    /// Seed of the weights.
    pub seed: u64,
    /// Rank of every pair.
    pub rank: usize,
    /// `lora_alpha`; the delta is scaled by alpha / rank.
    pub alpha: f32,
    /// Linear layers it changes.
    pub targets: Vec<Linear>,
    /// Size of the delta relative to the output of the base layer; 1.0 is strong enough to change most tokens.
    pub strength: f32,
}

impl AdapterSpec {
    /// A strong adapter with alpha = 2 × rank.
    pub fn new(seed: u64, rank: usize, targets: &[Linear]) -> Self {
        Self { seed, rank, alpha: 2.0 * rank as f32, targets: targets.to_vec(), strength: 1.0 }
    }

    /// The PEFT files for a model of `spec`'s sizes.
    pub fn files(&self, spec: &TinySpec) -> AdapterFiles {
        let shapes: Vec<(Linear, usize, usize)> = self
            .targets
            .iter()
            .map(|&linear| {
                let (n_out, n_in) = spec.linear_shape(linear);
                (linear, n_out, n_in)
            })
            .collect();
        self.files_for(spec.n_layers, &shapes)
    }

    /// The PEFT files for `n_layers` layers whose target linears are `(linear, n_out, n_in)`: for models that are
    /// not tiny.
    pub fn files_for(&self, n_layers: usize, shapes: &[(Linear, usize, usize)]) -> AdapterFiles {
        let mut tensors: Vec<(String, Vec<usize>, Vec<u8>)> = Vec::new();
        for layer in 0..n_layers {
            for &(linear, n_out, n_in) in shapes {
                let name = format!("base_model.model.model.layers.{layer}.{}", linear.hf_path());
                // A x has variance 1 per rank; B sums `rank` of them and is scaled by alpha / rank afterwards.
                let scale_a = 1.0 / (n_in as f32).sqrt();
                let scale_b = self.strength * self.rank as f32 / self.alpha / (self.rank as f32).sqrt();
                let mut add = |suffix: &str, shape: [usize; 2], scale: f32| {
                    let name = format!("{name}.{suffix}.weight");
                    let values = Random::labelled(self.seed, &name).normals(shape[0] * shape[1], scale);
                    tensors.push((name, shape.to_vec(), values.iter().flat_map(|v| v.to_le_bytes()).collect()));
                };
                add("lora_A", [self.rank, n_in], scale_a);
                add("lora_B", [n_out, self.rank], scale_b);
            }
        }
        let views = tensors.iter().map(|(name, shape, bytes)| {
            (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).expect("shape fits the bytes"))
        });
        let weights = safetensors::serialize(views, None).expect("serialize the adapter");
        AdapterFiles::Peft { config: serde_json::to_vec_pretty(&self.config()).expect("JSON"), weights }
    }

    fn config(&self) -> serde_json::Value {
        let targets: Vec<&str> = self
            .targets
            .iter()
            .map(|linear| linear.hf_path().rsplit('.').next().expect("a path has a last part"))
            .collect();
        json!({
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "bias": "none",
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "target_modules": targets,
            "use_rslora": false, "use_dora": false, "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": false,
            "inference_mode": true, "init_lora_weights": true, "modules_to_save": null, "peft_version": "0.21.2",
        })
    }
}
