//! What each field of `adapter_config.json` means or why it is refused; pattern rules against Python's `re`.

use serde_json::{Value, json};

use super::super::config::PeftConfig;
use super::super::pattern::{Cover, Pattern};
use super::{assert_refused, config_json, peft_files, tiny_tensors};

const Q0: &str = "model.layers.0.self_attn.q_proj";
const GATE0: &str = "model.layers.0.mlp.gate_proj";
const GATE10: &str = "model.layers.10.mlp.gate_proj";

fn parse(changes: &Value) -> PeftConfig {
    PeftConfig::parse(&config_json(changes)).unwrap()
}

#[track_caller]
fn assert_config_refused(changes: &Value, code: &str, part: &str) {
    let error = PeftConfig::parse(&config_json(changes)).map(|_| ()).expect_err("must be refused");
    assert_eq!(error.code(), code, "{changes}: {error}");
    assert!(error.to_string().contains(part), "{error} does not name {part}");
}

#[test]
fn plain_config_gives_alpha_over_rank() {
    let config = parse(&json!({}));
    assert!(config.targets(Q0) && !config.targets(GATE0));
    assert_eq!((config.rank(Q0), config.scale(Q0, 2)), (2, 2.0));
}

#[test]
fn rank_stabilised_scale_is_alpha_over_root_of_rank() {
    let config = parse(&json!({"use_rslora": true, "lora_alpha": 32, "r": 16}));
    assert_eq!(config.scale(Q0, 16), 8.0);
    let config = parse(&json!({"use_rslora": true, "lora_alpha": 32, "r": 32}));
    assert!((config.scale(Q0, 32) - 5.656_854).abs() < 1e-6);
}

#[test]
fn first_matching_pattern_decides_rank_and_alpha() {
    let config = parse(&json!({
        "r": 8, "lora_alpha": 16, "target_modules": "all-linear",
        "rank_pattern": {"layers\\.0\\.mlp\\.gate_proj": 2, "gate_proj": 3, "q_proj": 16},
        "alpha_pattern": {"q_proj": 24.5},
    }));
    assert_eq!(config.rank(GATE0), 2);
    assert_eq!(config.rank(GATE10), 3, "10 is not matched by layers\\.0");
    assert_eq!(config.rank(Q0), 16);
    assert_eq!(config.scale(Q0, 16), 24.5 / 16.0);
    assert_eq!(config.scale(GATE0, 2), 8.0);
}

#[test]
fn patterns_match_whole_segments_at_the_end_only() {
    let matches = |pattern: &str, name: &str| Pattern::new("f", pattern, Cover::Suffix).unwrap().matches(name);
    assert!(matches("q_proj", Q0) && matches("self_attn.q_proj", Q0) && matches(Q0, Q0));
    assert!(!matches("proj", Q0), "not after a dot");
    assert!(!matches("self_attn", Q0), "not at the end");
    assert!(matches("self_attn.q.proj", Q0), "an unescaped dot is any character");
    assert!(!matches(r"self_attn\.q\.proj", Q0));
    assert!(!matches("xmodel.layers.0.self_attn.q_proj", Q0));
    assert!(matches("^model.*q_proj", Q0) && !matches("^layers.*q_proj", Q0));
    assert!(matches("q_proj|k_proj", Q0), "an alternation is grouped");
    assert!(matches("layers.[0-3].self_attn.[qv]_proj$", Q0));
}

#[test]
fn target_regex_must_cover_the_whole_name() {
    let regex = |text: &str| parse(&json!({"target_modules": text})).targets(Q0);
    assert!(regex(r".*\.(q|v)_proj") && regex(r"model\.layers\.\d+\.self_attn\.q_proj"));
    assert!(!regex("q_proj") && !regex(r".*q_pro"));
    // The pattern that Unsloth writes.
    assert!(regex(
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|k_proj)))"
    ));
}

#[test]
fn expressions_the_two_dialects_read_differently_are_refused() {
    for text in [
        "(?=q)q_proj",
        "(?!v).*",
        r"(q)\1",
        "(?i)Q_PROJ",
        "(?P<n>q)_proj",
        "q*+_proj",
        "q**",
        "[[]q]",
        "[a&&b]",
        "[]a]",
        r"\p{L}",
        r"\Aq",
        r"q_proj\Z",
        "q{,3}",
        "{2}",
        "q{2}{3}",
        "^*",
        "(q",
        "q)",
        "[q",
        r"q\",
        "é",
        "q{99999}",
        "q{2",
        "(?:",
        "x~y",
        "[a--b]",
        "#",
        " q",
    ] {
        assert_config_refused(&json!({"target_modules": text}), "unsupported_lora_feature", "target_modules");
        assert_config_refused(&json!({"rank_pattern": {text: 4}}), "unsupported_lora_feature", "rank_pattern");
    }
    assert_config_refused(&json!({"rank_pattern": {"": 4}}), "unsupported_lora_feature", "rank_pattern");
}

#[test]
fn expressions_that_explode_when_compiled_are_refused() {
    for text in
        ["((a{999}){999}){999}", "(?:.{1000}){1000}", &"(".repeat(4_000), &"(a|".repeat(3_000), &"a".repeat(9_000)]
    {
        assert_config_refused(&json!({"target_modules": text}), "unsupported_lora_feature", "target_modules");
    }
    let many: serde_json::Map<String, Value> = (0..65).map(|i| (format!("(a|b){i}"), json!(2))).collect();
    assert_config_refused(&json!({"rank_pattern": many}), "unsupported_lora_feature", "rank_pattern");
    let plain: serde_json::Map<String, Value> = (0..1_000).map(|i| (format!("model.layers.{i}.q"), json!(2))).collect();
    parse(&json!({"rank_pattern": plain}));
}

#[test]
fn target_list_matches_full_names_and_suffixes() {
    let targets = |list: Value, name: &str| parse(&json!({"target_modules": list})).targets(name);
    assert!(targets(json!(["self_attn.q_proj"]), Q0) && targets(json!([Q0]), Q0));
    assert!(targets(json!(["dense", "q_proj"]), Q0), "names the base lacks are passed over");
    assert!(!targets(json!(["proj"]), Q0) && !targets(json!(["self_attn"]), Q0));
    assert!(targets(json!("ALL-Linear"), GATE0) && !targets(json!("all-linear"), "lm_head"));
}

#[test]
fn excluded_modules_are_left_alone() {
    let config = parse(&json!({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}));
    assert!(!config.targets(Q0) && config.targets(GATE0));
    let config = parse(&json!({"target_modules": "all-linear", "exclude_modules": r".*layers\.0\..*"}));
    assert!(!config.targets(GATE0) && config.targets(GATE10));
}

#[test]
fn layers_restrict_names_but_not_full_names() {
    let config = parse(&json!({"target_modules": ["gate_proj", Q0], "layers_to_transform": [10]}));
    assert!(!config.targets(GATE0) && config.targets(GATE10) && config.targets(Q0));
    let config = parse(&json!({"target_modules": ["gate_proj"], "layers_to_transform": 0, "layers_pattern": "layers"}));
    assert!(config.targets(GATE0) && !config.targets(GATE10));
    assert!(parse(&json!({"layers_to_transform": []})).targets(Q0), "an empty list restricts nothing");
    let error = json!({"target_modules": ".*q_proj", "layers_to_transform": [0]});
    assert_config_refused(&error, "invalid_lora_adapter", "layers_to_transform");
    assert_config_refused(&json!({"layers_to_transform": [-1]}), "invalid_lora_adapter", "layers_to_transform");
    let error = json!({"layers_to_transform": [0], "layers_pattern": "blocks"});
    assert_config_refused(&error, "unsupported_lora_feature", "layers_pattern");
    assert_config_refused(&json!({"layers_pattern": "layers"}), "invalid_lora_adapter", "layers_pattern");
}

#[test]
fn features_that_change_the_result_are_refused_by_name() {
    for (field, value) in [
        ("peft_type", json!("IA3")),
        ("task_type", json!("SEQ_CLS")),
        ("fan_in_fan_out", json!(true)),
        ("bias", json!("all")),
        ("bias", json!("lora_only")),
        ("lora_bias", json!(true)),
        ("modules_to_save", json!(["lm_head"])),
        ("trainable_token_indices", json!([1, 2])),
        ("target_parameters", json!(["experts"])),
        ("use_qalora", json!(true)),
        ("layer_replication", json!([[0, 1]])),
        ("megatron_config", json!({"a": 1})),
        ("use_bdlora", json!({})),
        ("arrow_config", json!({})),
        ("kasa_config", json!({})),
        ("monteclora_config", json!({"num_samples": 2})),
        ("alora_invocation_tokens", json!([])),
        ("init_lora_weights", json!("pissa")),
        ("init_lora_weights", json!("pissa_niter_16")),
        ("init_lora_weights", json!("olora")),
        ("init_lora_weights", json!("corda")),
        ("init_lora_weights", json!("loftq")),
        ("init_lora_weights", json!("lora_ga")),
        ("init_lora_weights", json!("something_new")),
        ("brand_new_flag", json!(true)),
        ("brand_new_number", json!(0.5)),
        ("brand_new_list", json!([0])),
    ] {
        assert_config_refused(&json!({field: value}), "unsupported_lora_feature", field);
    }
}

#[test]
fn fields_that_are_off_or_only_concern_training_are_accepted() {
    parse(&json!({
        "brand_new_flag": null, "brand_new_bool": false, "brand_new_count": 0, "brand_new_name": "", "brand_new_list": [],
        "brand_new_map": {}, "fan_in_fan_out": false, "modules_to_save": null, "trainable_token_indices": null,
        "use_bdlora": null, "arrow_config": null, "alora_invocation_tokens": null, "megatron_core": "megatron.core",
        "eva_config": {"rho": 2.0}, "corda_config": {"x": 1}, "loftq_config": {"loftq_bits": 4}, "qalora_group_size": 16,
        "revision": "main", "auto_mapping": {"a": "b"}, "peft_version": "0.21.2", "velora_config": {"num_groups": 2},
        "lora_dropout": 0.1, "runtime_config": {"ephemeral_gpu_offload": false}, "ensure_weight_tying": true,
        "task_type": null, "init_lora_weights": "gaussian", "lora_bias": false,
    }));
    for init in [json!(true), json!(false), json!(null), json!("eva"), json!("orthogonal"), json!("mica")] {
        parse(&json!({"init_lora_weights": init}));
    }
}

#[test]
fn wrong_types_and_missing_fields_are_refused_by_name() {
    for (field, value) in [
        ("r", json!(null)),
        ("r", json!(0)),
        ("r", json!(-4)),
        ("r", json!(2.0)),
        ("r", json!("2")),
        ("r", json!(true)),
        ("lora_alpha", json!(null)),
        ("lora_alpha", json!("16")),
        ("lora_alpha", json!(1e300)),
        ("lora_alpha", json!(true)),
        ("peft_type", json!(null)),
        ("use_rslora", json!("yes")),
        ("use_dora", json!(1)),
        ("base_model_name_or_path", json!(5)),
        ("target_modules", json!(null)),
        ("target_modules", json!([])),
        ("target_modules", json!("")),
        ("target_modules", json!([5])),
        ("target_modules", json!({"q_proj": 1})),
        ("rank_pattern", json!(["q_proj"])),
        ("rank_pattern", json!({"q_proj": 0})),
        ("alpha_pattern", json!({"q_proj": null})),
        ("layers_to_transform", json!("0")),
    ] {
        assert_config_refused(&json!({field: value}), "invalid_lora_adapter", field);
    }
}

#[test]
fn text_that_is_not_one_json_object_is_refused() {
    let deep = "[".repeat(100_000);
    for text in ["", "{", "[]", "null", "{} {}", "{\"r\": NaN}", "{\"r\":1,\"r\":2}", "\u{feff}{}", &deep] {
        let error = PeftConfig::parse(text.as_bytes()).map(|_| ()).expect_err("must be refused");
        assert_eq!(error.code(), "invalid_lora_adapter", "{error}");
        assert!(error.to_string().contains("adapter_config.json"), "{error}");
    }
    assert_eq!(PeftConfig::parse(&vec![b' '; 200_000]).map(|_| ()).unwrap_err().code(), "lora_byte_limit_exceeded");
    let twice = br#"{"peft_type":"LORA","r":2,"lora_alpha":4,"target_modules":["q_proj"],"rank_pattern":{"q_proj":2,"q_proj":4}}"#;
    assert!(PeftConfig::parse(twice).map(|_| ()).unwrap_err().to_string().contains("twice"));
}

#[test]
fn head_and_embeddings_cannot_be_targets() {
    for target in [json!(["q_proj", "lm_head"]), json!(["embed_tokens", "v_proj"]), json!(".*")] {
        let files = peft_files(&json!({"target_modules": target}), &tiny_tensors());
        assert_refused(&files, "unsupported_lora_feature", "target_modules");
    }
}
