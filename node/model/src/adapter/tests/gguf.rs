//! GGUF LoRA files: keys, names, shapes and types.

use super::super::{AdapterFiles, AdapterKind, AdapterLimits, check};
use super::{RANK, assert_refused, summary, tiny_info};
use crate::info::{Family, Linear, ModelInfo};

/// What a tiny GGUF file is made of.
#[derive(Clone)]
pub(super) struct Recipe {
    pub(super) keys: Vec<(&'static str, Key)>,
    /// Name, dimensions in ggml order, ggml type code, bytes.
    pub(super) tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

#[derive(Clone)]
pub(super) enum Key {
    Text(&'static str),
    Float(f32),
    Uints(Vec<u32>),
}

impl Recipe {
    pub(super) fn tiny(info: &ModelInfo, modules: &[(usize, Linear)]) -> Self {
        let mut tensors = Vec::new();
        for (layer, linear) in modules {
            let (n_out, n_in) = info.linear_shape(*linear);
            for (half, dims) in [("lora_a", [n_in, RANK]), ("lora_b", [RANK, n_out])] {
                let name = format!("blk.{layer}.{}.weight.{half}", linear.gguf_name());
                let values = (0..dims[0] * dims[1]).flat_map(|i| (i as f32 / 8.0).to_le_bytes()).collect();
                tensors.push((name, dims.map(|dim| dim as u64).to_vec(), 0, values));
            }
        }
        let keys = vec![
            ("general.architecture", Key::Text("llama")),
            ("general.type", Key::Text("adapter")),
            ("adapter.type", Key::Text("lora")),
            ("adapter.lora.alpha", Key::Float(8.0)),
        ];
        Self { keys, tensors }
    }

    pub(super) fn key(mut self, name: &'static str, value: Option<Key>) -> Self {
        self.keys.retain(|(key, _)| *key != name);
        self.keys.extend(value.map(|value| (name, value)));
        self
    }

    pub(super) fn file(&self) -> Vec<u8> {
        let text = |out: &mut Vec<u8>, text: &str| {
            out.extend((text.len() as u64).to_le_bytes());
            out.extend(text.as_bytes());
        };
        let mut out = b"GGUF".to_vec();
        out.extend(3_u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (key, value) in &self.keys {
            text(&mut out, key);
            match value {
                Key::Text(value) => {
                    out.extend(8_u32.to_le_bytes());
                    text(&mut out, value);
                }
                Key::Float(value) => {
                    out.extend(6_u32.to_le_bytes());
                    out.extend(value.to_le_bytes());
                }
                Key::Uints(values) => {
                    out.extend(9_u32.to_le_bytes());
                    out.extend(4_u32.to_le_bytes());
                    out.extend((values.len() as u64).to_le_bytes());
                    values.iter().for_each(|value| out.extend(value.to_le_bytes()));
                }
            }
        }
        let mut data = Vec::new();
        for (name, dims, dtype, bytes) in &self.tensors {
            text(&mut out, name);
            out.extend((dims.len() as u32).to_le_bytes());
            dims.iter().for_each(|dim| out.extend(dim.to_le_bytes()));
            out.extend(dtype.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(32), 0);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(data);
        out
    }

    fn files(&self) -> AdapterFiles {
        AdapterFiles::Gguf(self.file())
    }
}

fn tiny() -> Recipe {
    Recipe::tiny(&tiny_info(), &[(0, Linear::Q), (1, Linear::Down)])
}

#[test]
fn a_valid_file_is_summed_up() {
    let found = summary(&tiny().files()).unwrap();
    assert_eq!((found.kind, found.rank_max, found.modules, found.dora), (AdapterKind::Gguf, RANK, 2, false));
}

#[test]
fn files_of_another_kind_or_architecture_are_refused() {
    let with = |key, value| tiny().key(key, value).files();
    assert_refused(&with("general.type", Some(Key::Text("model"))), "unsupported_lora_feature", "general.type");
    assert_refused(&with("general.type", None), "invalid_lora_adapter", "general.type");
    assert_refused(&with("adapter.type", Some(Key::Text("control"))), "unsupported_lora_feature", "adapter.type");
    assert_refused(&with("general.architecture", Some(Key::Text("gemma"))), "lora_base_mismatch", "gemma");
    assert_refused(&with("general.architecture", None), "lora_base_mismatch", "general.architecture");
    let alora = with("adapter.alora.invocation_tokens", Some(Key::Uints(vec![1])));
    assert_refused(&alora, "unsupported_lora_feature", "adapter.alora.invocation_tokens");
    assert_refused(
        &with("adapter.lora.alpha", Some(Key::Float(f32::NAN))),
        "invalid_lora_adapter",
        "adapter.lora.alpha",
    );
    assert_refused(&with("adapter.lora.alpha", Some(Key::Text("8"))), "invalid_lora_adapter", "adapter.lora.alpha");
    assert_refused(&AdapterFiles::Gguf(b"GGUG".to_vec()), "invalid_lora_adapter", "GGUF");
}

#[test]
fn qwen2_files_fit_qwen2_bases_only() {
    let qwen = ModelInfo { family: Family::Qwen2, ..tiny_info() };
    let limits = AdapterLimits::default();
    let files = tiny().key("general.architecture", Some(Key::Text("qwen2"))).files();
    assert!(check(&files, &qwen, &limits).is_ok());
    assert!(check(&tiny().files(), &qwen, &limits).is_err());
    assert_refused(&files, "lora_base_mismatch", "qwen2");
}

#[test]
fn tensors_without_a_place_are_refused_by_name() {
    for (name, code) in [
        ("token_embd.weight.lora_a", "unsupported_lora_feature"),
        ("output.weight.lora_a", "unsupported_lora_feature"),
        ("blk.0.attn_norm.weight", "unsupported_lora_feature"),
        ("blk.0.attn_q.weight.lora_c", "invalid_lora_adapter"),
        ("blk.0.attn_q.lora_a", "invalid_lora_adapter"),
        ("blk.00.attn_k.weight.lora_a", "invalid_lora_adapter"),
        ("blk.0.attn_qkv.weight.lora_a", "invalid_lora_adapter"),
        ("blk.2.attn_k.weight.lora_a", "lora_base_mismatch"),
    ] {
        let mut recipe = tiny();
        recipe.tensors.push((name.to_owned(), vec![8, 2], 0, vec![0; 64]));
        assert_refused(&recipe.files(), code, name);
    }
}

#[test]
fn halves_must_both_be_there_and_agree() {
    for missing in 0..2 {
        let mut recipe = tiny();
        let name = recipe.tensors.remove(missing).0;
        assert_refused(&recipe.files(), "invalid_lora_adapter", &name);
    }
    let mut recipe = tiny();
    recipe.tensors[0].1 = vec![8, 3];
    recipe.tensors[0].3 = vec![0; 96];
    assert_refused(&recipe.files(), "invalid_lora_adapter", "rank 3");
    let mut recipe = tiny();
    recipe.tensors[0].1 = vec![16, 2];
    recipe.tensors[0].3 = vec![0; 128];
    assert_refused(&recipe.files(), "lora_base_mismatch", "[16, 2], expected [8, 2]");
    let mut recipe = tiny();
    recipe.tensors[1].1 = vec![2, 9];
    recipe.tensors[1].3 = vec![0; 72];
    assert_refused(&recipe.files(), "lora_base_mismatch", "[2, 9], expected [2, 8]");
    let recipe = Recipe { tensors: Vec::new(), ..tiny() };
    assert_refused(&recipe.files(), "invalid_lora_adapter", "no tensors");
}

#[test]
fn quantised_and_broken_values_are_refused() {
    let mut recipe = tiny();
    // Q8_0: a row of 32 in 34 bytes.
    recipe.tensors[0] = ("blk.0.attn_q.weight.lora_a".to_owned(), vec![32, 2], 8, vec![0; 68]);
    assert_refused(&recipe.files(), "unsupported_lora_feature", "Q8_0");
    let mut recipe = tiny();
    recipe.tensors[1].3[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert_refused(&recipe.files(), "invalid_lora_adapter", "blk.0.attn_q.weight.lora_b");
}

#[test]
fn ranks_over_the_limit_are_refused() {
    let limits = AdapterLimits { rank_max: 1, ..AdapterLimits::default() };
    assert_eq!(check(&tiny().files(), &tiny_info(), &limits).unwrap_err().code(), "lora_rank_limit_exceeded");
}
