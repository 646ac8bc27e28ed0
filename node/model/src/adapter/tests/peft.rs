//! Config and weights together: names, shapes, ranks and values against the base.

use serde_json::json;

use super::super::{AdapterFiles, AdapterKind, AdapterLimits, check};
use super::{RANK, Tensor, assert_refused, pair, peft_files, peft_name, summary, tiny_info, tiny_tensors};
use crate::info::Linear;

#[test]
fn a_valid_adapter_is_summed_up() {
    let files = peft_files(&json!({}), &tiny_tensors());
    let found = summary(&files).unwrap();
    assert_eq!((found.kind, found.rank_max, found.modules, found.dora), (AdapterKind::Peft, RANK, 4, false));
    assert_eq!(found.bytes, files.bytes());
}

#[test]
fn every_linear_layer_can_be_adapted() {
    let info = tiny_info();
    let tensors: Vec<Tensor> = (0..info.n_layers)
        .flat_map(|layer| Linear::ALL.map(|linear| pair(&info, layer, linear, RANK)))
        .flatten()
        .collect();
    for targets in [json!("all-linear"), json!(Linear::ALL.map(|l| l.hf_path().rsplit('.').next().unwrap()))] {
        assert_eq!(summary(&peft_files(&json!({"target_modules": targets}), &tensors)).unwrap().modules, 14);
    }
}

#[test]
fn layers_and_modules_the_file_lacks_are_left_alone() {
    let info = tiny_info();
    let tensors = pair(&info, 1, Linear::V, RANK);
    assert_eq!(summary(&peft_files(&json!({}), &tensors)).unwrap().modules, 1);
}

#[test]
fn half_a_pair_is_refused() {
    for missing in 0..2 {
        let mut tensors = tiny_tensors();
        let name = tensors.remove(missing).name;
        assert_refused(&peft_files(&json!({}), &tensors), "invalid_lora_adapter", &name);
    }
}

#[test]
fn ranks_follow_pattern_and_file_must_agree() {
    let info = tiny_info();
    let config = json!({"rank_pattern": {"v_proj": 3}});
    let tensors: Vec<Tensor> = [pair(&info, 0, Linear::Q, 2), pair(&info, 0, Linear::V, 3)].concat();
    assert_eq!(summary(&peft_files(&config, &tensors)).unwrap().rank_max, 3);
    let tensors: Vec<Tensor> = pair(&info, 0, Linear::V, 2).to_vec();
    assert_refused(&peft_files(&config, &tensors), "invalid_lora_adapter", "expected [3, 8]");
    let [a, _] = pair(&info, 0, Linear::V, 3);
    let [_, b] = pair(&info, 0, Linear::V, 4);
    assert_refused(&peft_files(&config, &[a, b]), "invalid_lora_adapter", "lora_B");
}

#[test]
fn ranks_over_the_limit_are_refused_whatever_the_file_holds() {
    let files = peft_files(&json!({"r": 2_147_483_648_u64}), &tiny_tensors());
    assert_refused(&files, "lora_rank_limit_exceeded", "2147483648");
    let limits = AdapterLimits { rank_max: 1, ..AdapterLimits::default() };
    let files = peft_files(&json!({}), &tiny_tensors());
    assert_eq!(check(&files, &tiny_info(), &limits).unwrap_err().code(), "lora_rank_limit_exceeded");
}

#[test]
fn shapes_of_another_base_are_refused_with_both_shapes() {
    let mut tensors = tiny_tensors();
    tensors[0] = Tensor::new(&tensors[0].name, &[RANK, 10]);
    let files = peft_files(&json!({}), &tensors);
    assert_refused(&files, "lora_base_mismatch", "[2, 10]");
    assert_refused(&files, "lora_base_mismatch", "[2, 8]");
    let mut tensors = tiny_tensors();
    tensors[1] = Tensor::new(&tensors[1].name, &[9, RANK]);
    assert_refused(&peft_files(&json!({}), &tensors), "lora_base_mismatch", "[9, 2]");
    let mut tensors = tiny_tensors();
    tensors[1] = Tensor::new(&tensors[1].name, &[16]);
    assert_refused(&peft_files(&json!({}), &tensors), "lora_base_mismatch", "[16]");
}

#[test]
fn layers_beyond_the_base_are_refused() {
    let tensors = pair(&tiny_info(), 2, Linear::Q, RANK);
    assert_refused(&peft_files(&json!({}), &tensors), "lora_base_mismatch", "layers.2.");
    let files = peft_files(&json!({"layers_to_transform": [0, 2]}), &tiny_tensors());
    assert_refused(&files, "lora_base_mismatch", "layer 2");
}

#[test]
fn tensors_that_are_not_expected_are_refused_by_name() {
    for (name, code) in [
        ("x".to_owned(), "invalid_lora_adapter"),
        (peft_name(0, Linear::K, "lora_A.weight"), "invalid_lora_adapter"),
        (peft_name(0, Linear::Q, "lora_A.default.weight"), "invalid_lora_adapter"),
        (peft_name(0, Linear::Q, "lora_magnitude_vector"), "invalid_lora_adapter"),
        (peft_name(0, Linear::Q, "weight"), "invalid_lora_adapter"),
        ("base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight".to_owned(), "invalid_lora_adapter"),
        ("base_model.model.model.layers.+0.self_attn.q_proj.lora_A.weight".to_owned(), "invalid_lora_adapter"),
        ("base_model.model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(), "invalid_lora_adapter"),
        (peft_name(0, Linear::Q, "lora_B.bias"), "unsupported_lora_feature"),
        (peft_name(0, Linear::Q, "lora_diag"), "unsupported_lora_feature"),
        ("base_model.model.lm_head.weight".to_owned(), "unsupported_lora_feature"),
        ("base_model.model.model.embed_tokens.lora_embedding_A".to_owned(), "unsupported_lora_feature"),
    ] {
        let mut tensors = tiny_tensors();
        tensors.push(Tensor::new(&name, &[8]));
        assert_refused(&peft_files(&json!({}), &tensors), code, &name);
    }
}

#[test]
fn values_must_be_finite_and_of_ordinary_size() {
    for dtype in ["F32", "F16", "BF16"] {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 20_000.0, -20_000.0] {
            let mut tensors = tiny_tensors();
            let last = tensors.last_mut().unwrap();
            last.dtype = dtype;
            *last.values.last_mut().unwrap() = bad;
            let name = last.name.clone();
            assert_refused(&peft_files(&json!({}), &tensors), "invalid_lora_adapter", &name);
        }
        let mut tensors = tiny_tensors();
        tensors[0].dtype = dtype;
        tensors[0].values[0] = 9_984.0;
        assert!(summary(&peft_files(&json!({}), &tensors)).is_ok(), "{dtype}");
    }
}

#[test]
fn dora_needs_a_magnitude_per_output() {
    let info = tiny_info();
    let config = json!({"use_dora": true, "target_modules": ["q_proj"]});
    let with = |name: &str, shape: &[usize]| {
        let mut tensors = pair(&info, 0, Linear::Q, RANK).to_vec();
        tensors.push(Tensor::new(&peft_name(0, Linear::Q, name), shape));
        peft_files(&config, &tensors)
    };
    for name in ["lora_magnitude_vector", "lora_magnitude_vector.weight"] {
        assert!(summary(&with(name, &[8])).unwrap().dora);
    }
    assert_refused(&with("lora_magnitude_vector", &[7]), "lora_base_mismatch", "expected [8]");
    assert_refused(&with("lora_magnitude_vector", &[8, 1]), "lora_base_mismatch", "expected [8]");
    let without = peft_files(&config, &pair(&info, 0, Linear::Q, RANK));
    assert_refused(&without, "invalid_lora_adapter", "lora_magnitude_vector");
    let mut both = pair(&info, 0, Linear::Q, RANK).to_vec();
    both.push(Tensor::new(&peft_name(0, Linear::Q, "lora_magnitude_vector"), &[8]));
    both.push(Tensor::new(&peft_name(0, Linear::Q, "lora_magnitude_vector.weight"), &[8]));
    assert_refused(&peft_files(&config, &both), "invalid_lora_adapter", "mean the same");
}

#[test]
fn a_contradicting_base_name_is_refused_with_both_names() {
    let limits = |names: &[&str]| AdapterLimits {
        accepted_base_names: names.iter().map(|name| (*name).to_owned()).collect(),
        ..AdapterLimits::default()
    };
    let verdict = |name: serde_json::Value, names: &[&str]| {
        let files = peft_files(&json!({"base_model_name_or_path": name}), &tiny_tensors());
        check(&files, &tiny_info(), &limits(names)).map(|_| ())
    };
    assert!(verdict(json!("acme/Tiny-1"), &["tiny-1"]).is_ok());
    assert!(verdict(json!("/models/TINY-1/"), &["other", "acme/tiny-1"]).is_ok());
    assert!(verdict(json!("anything"), &[]).is_ok(), "no names given: shapes decide");
    assert!(verdict(json!(null), &["tiny-1"]).is_ok(), "no name stated: shapes decide");
    let error = verdict(json!("acme/Tiny-2"), &["tiny-1"]).unwrap_err();
    assert_eq!(error.code(), "lora_base_mismatch");
    assert!(error.to_string().contains("Tiny-2") && error.to_string().contains("tiny-1"), "{error}");
}

#[test]
fn missing_files_are_refused_by_name() {
    let AdapterFiles::Peft { config, weights } = peft_files(&json!({}), &tiny_tensors()) else { unreachable!() };
    let files = AdapterFiles::Peft { config: Vec::new(), weights };
    assert_refused(&files, "invalid_lora_adapter", "adapter_config.json is missing");
    let files = AdapterFiles::Peft { config, weights: Vec::new() };
    assert_refused(&files, "invalid_lora_adapter", "adapter_model.safetensors is missing");
}

#[test]
fn targets_the_base_lacks_altogether_are_refused() {
    let files = peft_files(&json!({"target_modules": ["c_attn"]}), &tiny_tensors());
    assert_refused(&files, "lora_base_mismatch", "target_modules");
}

#[test]
fn no_contract_allows_more_than_the_kernels_do() {
    let limits = AdapterLimits { rank_max: usize::MAX, ..AdapterLimits::default() };
    let files = peft_files(&json!({"r": 257}), &pair(&tiny_info(), 0, Linear::Q, 257));
    assert_eq!(check(&files, &tiny_info(), &limits).unwrap_err().code(), "lora_rank_limit_exceeded");
    let files = peft_files(&json!({"r": 256}), &pair(&tiny_info(), 0, Linear::Q, 256));
    assert_eq!(check(&files, &tiny_info(), &limits).unwrap().summary().rank_max, 256);
}
