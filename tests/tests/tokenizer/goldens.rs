//! Every prompt and every answer of the goldens.

use std::io::BufReader;
use std::path::PathBuf;
use std::sync::LazyLock;

use model::base::BaseModel;
use model::gguf::check::{self, Limits};
use model::info::{Family, Numerics, RopeScaling};
use model::template::encode_chat;
use model::tokenizer::{Detokenizer, Tokenizer};
use serde_json::{Map, Value, json};

pub(crate) static BASE: LazyLock<BaseModel> =
    LazyLock::new(|| BaseModel::load(&tests::model_file(), Numerics::Exact).expect("the real model loads"));

const FILES: [&str; 7] =
    ["base", "brightcart", "cedar-clinic", "harbor-logistics", "metrix-dora", "northbank", "pixelforge-games"];

fn cases() -> Vec<(String, Value)> {
    let mut cases = Vec::new();
    for file in FILES {
        let text =
            std::fs::read_to_string(tests::data(&format!("goldens/{file}.json"))).expect("goldens are committed");
        let golden: Value = serde_json::from_str(&text).expect("goldens are JSON");
        for case in golden["cases"].as_array().expect("goldens have cases") {
            cases.push((format!("{file}/{}", case["id"].as_str().unwrap_or("?")), case.clone()));
        }
    }
    assert_eq!(cases.len(), 7 * 9);
    cases
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list of ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn check_prompts(tokenizer: &Tokenizer) {
    for (name, case) in cases() {
        let rendered = case["rendered"].as_str().expect("a rendered text");
        assert_eq!(tokenizer.encode_rendered(rendered), ids(&case["prompt_token_ids"]), "{name}");
        assert_eq!(tokenizer.decode(&ids(&case["prompt_token_ids"]), false), rendered, "{name}");
    }
}

#[test]
fn the_gguf_tokenizer_gives_the_golden_ids() {
    check_prompts(&BASE.tokenizer);
}

#[test]
fn conversations_render_and_encode_as_golden() {
    let template = BASE.template.as_ref().expect("the model has a chat template");
    for (name, case) in cases() {
        let Some(messages) = case["messages"].as_array() else {
            let prompt = case["prompt"].as_str().expect("raw cases have a prompt");
            assert_eq!(BASE.tokenizer.encode_text(prompt), ids(&case["prompt_token_ids"]), "{name}");
            continue;
        };
        let rendered = template.render(messages, None, true, &Map::new()).expect("the golden conversation renders");
        assert_eq!(rendered, case["rendered"].as_str().expect("a rendered text"), "{name}");
        let encoded = encode_chat(template, &BASE.tokenizer, messages, None, true, &Map::new());
        assert_eq!(encoded.expect("the golden conversation encodes"), ids(&case["prompt_token_ids"]), "{name}");
    }
}

#[test]
fn answers_decode_as_golden_at_once_and_token_by_token() {
    for (name, case) in cases() {
        let new = ids(&case["new_token_ids"]);
        let end = case["eos_index"].as_u64().map_or(new.len(), |end| end as usize);
        let expected = case["text"].as_str().expect("an answer");
        assert_eq!(BASE.tokenizer.decode(&new[..end], true), expected, "{name}");
        let mut detokenizer = Detokenizer::new(&BASE.tokenizer);
        let mut streamed = String::new();
        for &id in &new[..end] {
            let piece = detokenizer.push(id);
            assert!(!piece.contains('\u{fffd}'), "{name}: a partial character was shown early");
            streamed.push_str(&piece);
        }
        streamed.push_str(&detokenizer.finish());
        assert_eq!(streamed, expected, "{name}");
    }
}

#[test]
fn the_facts_of_the_model_are_those_of_its_config() {
    let info = &BASE.info;
    assert_eq!((info.family, info.n_layers, info.hidden, info.ffn), (Family::Llama, 30, 576, 1536));
    assert_eq!((info.n_heads, info.n_kv_heads, info.head_dim), (9, 3, 64));
    assert_eq!((info.vocab, info.context), (49152, 8192));
    assert_eq!((info.rope_theta, &info.rope_scaling, info.rms_eps), (100_000.0, &RopeScaling::None, 1e-5));
    assert_eq!((info.bos, info.add_bos, info.eos.first()), (Some(1), false, Some(&2)));
    assert_eq!(info.hash, shared::hash::ContentHash::of(&std::fs::read(tests::model_file()).expect("it was loaded")));
    assert_eq!(BASE.tokenizer.vocab_size(), 49152);
    assert_eq!(BASE.tokenizer.special_ids(), (0..=16).collect::<Vec<_>>());
    assert!(std::sync::Arc::ptr_eq(&BASE.weights.embed, &BASE.weights.head), "the head is tied");
}

/// The model's own `tokenizer.json` (3.5 MB) is not committed; this one has its structure, with vocabulary and
/// merges taken from the GGUF file. `TENANTRY_TOKENIZER_JSON` names another one to test.
#[test]
fn a_tokenizer_json_gives_the_golden_ids() {
    let path = match std::env::var_os("TENANTRY_TOKENIZER_JSON") {
        Some(path) => PathBuf::from(path),
        None => write_tokenizer_json(),
    };
    let tokenizer = Tokenizer::from_json(&path).expect("the tokenizer loads");
    check_prompts(&tokenizer);
    assert_eq!(tokenizer.vocab_size(), BASE.tokenizer.vocab_size());
    assert_eq!(tokenizer.special_ids(), BASE.tokenizer.special_ids());
    for id in 0..tokenizer.vocab_size() as u32 {
        assert_eq!(tokenizer.token_bytes(id), BASE.tokenizer.token_bytes(id), "token {id}");
    }
}

fn write_tokenizer_json() -> PathBuf {
    let file = std::fs::File::open(tests::model_file()).expect("the model is there");
    let n_bytes = file.metadata().expect("it has a size").len();
    let header = check::read(BufReader::new(file), n_bytes, &Limits::BASE).expect("the header is sound");
    let texts =
        |key| header.texts(key).expect("the tokenizer is complete").iter().map(str::to_owned).collect::<Vec<_>>();
    let vocab: Map<String, Value> =
        texts("tokenizer.ggml.tokens").into_iter().zip(0..).map(|(t, id)| (t, json!(id))).collect();
    let added: Vec<Value> = BASE
        .tokenizer
        .special_ids()
        .into_iter()
        .map(|id| json!({"id": id, "content": BASE.tokenizer.special_text(id), "special": true, "normalized": false}))
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level]},
        "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "fuse_unk": false, "byte_fallback": false,
                  "vocab": vocab, "merges": texts("tokenizer.ggml.merges")},
    });
    let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("tokenizer.json");
    std::fs::write(&path, json.to_string()).expect("the target folder can be written");
    path
}
