//! Adapter files from outside: the malformed collection gives what `EXPECT.json` says, the real adapters of
//! the goldens are understood, and no file costs more memory than its size and a little. Nor does a hostile base.

#[cfg(target_os = "linux")]
mod memory;
#[cfg(target_os = "linux")]
mod bases;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use model::adapter::{AdapterError, AdapterFiles, AdapterKind, AdapterLimits, AdapterSummary, check};
use model::info::{Family, ModelInfo, Numerics, RopeScaling};
use shared::hash::ContentHash;

/// SmolLM2-135M-Instruct.
fn smollm2() -> ModelInfo {
    ModelInfo {
        hash: ContentHash::of(b"smollm2"),
        family: Family::Llama,
        n_layers: 30,
        hidden: 576,
        n_heads: 9,
        n_kv_heads: 3,
        head_dim: 64,
        ffn: 1536,
        vocab: 49_152,
        context: 8192,
        rms_eps: 1e-5,
        rope_theta: 1e5,
        rope_scaling: RopeScaling::None,
        bos: Some(1),
        add_bos: false,
        eos: vec![2],
        numerics: Numerics::Exact,
    }
}

fn limits() -> AdapterLimits {
    AdapterLimits { accepted_base_names: vec!["SmolLM2-135M-Instruct".to_owned()], ..AdapterLimits::default() }
}

/// A file's bytes; none when it is not there, as an upload without it.
fn bytes_of(path: &Path) -> Vec<u8> {
    if path.exists() { fs::read(path).unwrap() } else { Vec::new() }
}

/// A PEFT directory.
fn peft(folder: &Path) -> AdapterFiles {
    AdapterFiles::Peft {
        config: bytes_of(&folder.join("adapter_config.json")),
        weights: bytes_of(&folder.join("adapter_model.safetensors")),
    }
}

/// A case of the malformed collection. Cases about the config (`cfg_`) and the controls (`ok_`) share one good
/// weight file.
fn bad_case(name: &str) -> AdapterFiles {
    let folder = tests::data("bad");
    let AdapterFiles::Peft { config, weights } = peft(&folder.join(name)) else { unreachable!() };
    let shares_weights = name.starts_with("cfg_") || name.starts_with("ok_");
    let weights = if shares_weights { fs::read(folder.join("valid.safetensors")).unwrap() } else { weights };
    AdapterFiles::Peft { config, weights }
}

fn verdict(files: &AdapterFiles) -> Result<AdapterSummary, AdapterError> {
    check(files, &smollm2(), &limits()).map(|checked| checked.summary())
}

/// Code and a part of the text for every malformed case; what is not listed is accepted.
const REFUSED: [(&str, &str, &str); 28] = [
    ("cfg_missing", "invalid_lora_adapter", "adapter_config.json is missing"),
    ("cfg_not_json", "invalid_lora_adapter", "adapter_config.json"),
    ("cfg_no_r", "invalid_lora_adapter", "r is missing"),
    ("cfg_r_zero", "invalid_lora_adapter", "r = 0"),
    ("cfg_r_negative", "invalid_lora_adapter", "r = -"),
    ("cfg_r_huge", "lora_rank_limit_exceeded", "2147483648"),
    ("cfg_alpha_nan", "invalid_lora_adapter", "adapter_config.json"),
    ("cfg_ia3", "unsupported_lora_feature", "peft_type = \"IA3\""),
    ("cfg_dora_no_magnitude", "invalid_lora_adapter", "lora_magnitude_vector is missing"),
    ("cfg_wrong_base", "lora_base_mismatch", "meta-llama/Llama-3.3-8B"),
    ("cfg_modules_to_save", "unsupported_lora_feature", "modules_to_save"),
    ("cfg_fan_in_fan_out", "unsupported_lora_feature", "fan_in_fan_out"),
    ("st_missing", "invalid_lora_adapter", "adapter_model.safetensors is missing"),
    ("st_empty", "invalid_lora_adapter", "0 bytes"),
    ("st_truncated", "invalid_lora_adapter", "data"),
    ("st_trailing", "invalid_lora_adapter", "data"),
    ("st_header_len_huge", "invalid_lora_adapter", "9223372036854775808"),
    ("st_header_not_json", "invalid_lora_adapter", "header"),
    ("st_offsets_beyond", "invalid_lora_adapter", "data_offsets"),
    ("st_shape_lies", "invalid_lora_adapter", "shape"),
    ("st_dtype_unknown", "invalid_lora_adapter", "F4X"),
    ("w_int8", "unsupported_lora_feature", "I8"),
    ("w_f64", "unsupported_lora_feature", "F64"),
    ("w_nan", "invalid_lora_adapter", "NaN"),
    ("w_f32_over_f16", "invalid_lora_adapter", "1000000"),
    ("w_wrong_in_dim", "lora_base_mismatch", "640"),
    ("w_layer_99", "lora_base_mismatch", "layers.99."),
    ("w_no_tensors", "invalid_lora_adapter", "no tensors"),
];

#[test]
fn every_malformed_adapter_is_refused_with_a_reason_and_controls_load() {
    let text = fs::read_to_string(tests::data("bad/EXPECT.json")).unwrap();
    let expected: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();
    for (name, expectation) in &expected {
        let found = verdict(&bad_case(name));
        let refused = REFUSED.iter().find(|(case, _, _)| case == name);
        // What the collection leaves open ("accept or reject by rule") is decided by the list above.
        let is_open = expectation.contains(" or ");
        assert!(is_open || refused.is_some() == expectation.starts_with("reject"), "{name}: {expectation}");
        match (found, refused) {
            (Ok(summary), None) => assert_eq!((summary.modules, summary.rank_max), (4, 4), "{name}"),
            (Err(error), Some((_, code, part))) => {
                assert_eq!(error.code(), *code, "{name}: {error}");
                assert!(error.to_string().contains(part), "{name}: {error} does not name {part}");
            }
            (found, _) => panic!("{name}: {expectation}, found {found:?}"),
        }
    }
    assert_eq!(expected.len(), REFUSED.len() + 3, "the collection and the list above belong together");
}

#[test]
fn the_adapters_of_the_goldens_are_understood() {
    for (name, modules, rank_max, dora) in [
        ("brightcart", 60, 8, false),
        ("cedar-clinic", 120, 16, false),
        ("northbank", 120, 32, false),
        ("pixelforge-games", 210, 16, false),
        ("metrix-dora", 60, 8, true),
    ] {
        let summary =
            verdict(&peft(&tests::data("adapters").join(name))).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(
            (summary.kind, summary.modules, summary.rank_max, summary.dora),
            (AdapterKind::Peft, modules, rank_max, dora)
        );
    }
    let files = AdapterFiles::Gguf(fs::read(tests::data("adapters/harbor-logistics.f16.gguf")).unwrap());
    let summary = verdict(&files).unwrap();
    assert_eq!((summary.kind, summary.modules, summary.rank_max), (AdapterKind::Gguf, 210, 4));
}

#[test]
fn another_base_refuses_the_real_adapters_by_shape() {
    let other = ModelInfo { hidden: 640, n_heads: 10, ..smollm2() };
    let files = AdapterFiles::Gguf(fs::read(tests::data("adapters/harbor-logistics.f16.gguf")).unwrap());
    for files in [peft(&tests::data("adapters/brightcart")), files] {
        assert_eq!(check(&files, &other, &limits()).unwrap_err().code(), "lora_base_mismatch");
    }
}
