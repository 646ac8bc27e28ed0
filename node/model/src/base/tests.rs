//! A model file and the same model as a folder give the same base; damaged ones say what is wrong.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::*;
use crate::gguf::write::GgufWriter;
use crate::info::{Family, Linear, RopeScaling};

const LAYERS: usize = 2;
const HIDDEN: usize = 32;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 8;
const FFN: usize = 64;
const TOKENS: [&str; 8] = ["<|end|>", "a", "b", "c", "ab", "Ġ", "Ġa", "<|im_start|>"];

/// A folder that is removed with its content.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tenantry-base-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Distinct values per tensor and place.
fn values(name: &str, n: usize) -> Vec<f32> {
    let seed = name.bytes().fold(7_u32, |seed, byte| seed.wrapping_mul(31).wrapping_add(u32::from(byte)));
    (0..n as u32)
        .map(|i| (seed.wrapping_add(i.wrapping_mul(2_654_435_761)) >> 8) as f32 / (1 << 24) as f32 - 0.5)
        .collect()
}

/// `(hf name, gguf name, shape slowest first)` of every tensor.
fn tensors(bias: bool) -> Vec<(String, String, Vec<usize>)> {
    let mut all = vec![
        ("model.embed_tokens.weight".into(), "token_embd.weight".into(), vec![TOKENS.len(), HIDDEN]),
        ("model.norm.weight".into(), "output_norm.weight".into(), vec![HIDDEN]),
    ];
    for i in 0..LAYERS {
        let norms = [("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")];
        for (hf, gguf) in norms {
            all.push((format!("model.layers.{i}.{hf}.weight"), format!("blk.{i}.{gguf}.weight"), vec![HIDDEN]));
        }
        for linear in Linear::ALL {
            let shape = match linear {
                Linear::Q => vec![HEADS * HEAD_DIM, HIDDEN],
                Linear::K | Linear::V => vec![KV_HEADS * HEAD_DIM, HIDDEN],
                Linear::O => vec![HIDDEN, HEADS * HEAD_DIM],
                Linear::Gate | Linear::Up => vec![FFN, HIDDEN],
                Linear::Down => vec![HIDDEN, FFN],
            };
            let (hf, gguf) = (linear.hf_path(), linear.gguf_name());
            if bias && matches!(linear, Linear::Q | Linear::K | Linear::V) {
                all.push((format!("model.layers.{i}.{hf}.bias"), format!("blk.{i}.{gguf}.bias"), vec![shape[0]]));
            }
            all.push((format!("model.layers.{i}.{hf}.weight"), format!("blk.{i}.{gguf}.weight"), shape));
        }
    }
    all
}

/// As the converter does it: `reshape(heads, 2, d / 2, n_in).swapaxes(1, 2)`.
fn interleave(values: &[f32], heads: usize, n_in: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(values.len());
    for h in 0..heads {
        for j in 0..HEAD_DIM / 2 {
            for s in 0..2 {
                let row = h * HEAD_DIM + s * HEAD_DIM / 2 + j;
                out.extend(&values[row * n_in..(row + 1) * n_in]);
            }
        }
    }
    out
}

/// A GGUF file without tensors.
fn gguf_head(architecture: &str) -> GgufWriter {
    let mut file = GgufWriter::default();
    let key = |name: &str| format!("{architecture}.{name}");
    file.text("general.architecture", architecture).text("general.type", "model");
    file.uint(&key("block_count"), LAYERS as u32).uint(&key("context_length"), 128);
    file.uint(&key("embedding_length"), HIDDEN as u32).uint(&key("feed_forward_length"), FFN as u32);
    file.uint(&key("attention.head_count"), HEADS as u32).uint(&key("attention.head_count_kv"), KV_HEADS as u32);
    file.float(&key("attention.layer_norm_rms_epsilon"), 1e-5).float(&key("rope.freq_base"), 10_000.0);
    file.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "gpt-2");
    file.texts("tokenizer.ggml.tokens", &TOKENS).ints("tokenizer.ggml.token_type", &[3, 1, 1, 1, 1, 1, 1, 3]);
    file.texts("tokenizer.ggml.merges", &["a b", "Ġ a"]).uint("tokenizer.ggml.eos_token_id", 0);
    file.text("tokenizer.chat_template", "{{ eos_token }}{{ messages[0].content }}");
    file
}

fn gguf_tensors(file: &mut GgufWriter, architecture: &str, skip: &str) {
    for (hf, gguf, shape) in tensors(architecture == "qwen2") {
        if gguf == skip {
            continue;
        }
        let mut content = values(&hf, shape.iter().product());
        if architecture == "llama" && gguf.contains("attn_q.") {
            content = interleave(&content, HEADS, HIDDEN);
        } else if architecture == "llama" && gguf.contains("attn_k.") {
            content = interleave(&content, KV_HEADS, HIDDEN);
        }
        let dims: Vec<u64> = shape.iter().rev().map(|&dim| dim as u64).collect();
        file.tensor_f32(&gguf, &dims, &content);
    }
}

fn load_gguf(name: &str, file: &GgufWriter) -> Result<BaseModel, LoadError> {
    let folder = Folder::new(name);
    BaseModel::load(&folder.write("model.gguf", file.finish()), Numerics::Exact)
}

fn config(architecture: &str) -> Value {
    json!({
        "architectures": [architecture], "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "hidden_act": "silu",
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "intermediate_size": FFN,
        "vocab_size": TOKENS.len(), "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": true, "eos_token_id": 0,
    })
}

fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> =
        TOKENS.iter().zip(0..).map(|(&text, id)| (text.into(), json!(id))).collect();
    let added = |id: usize| json!({"id": id, "content": TOKENS[id], "special": true, "normalized": false});
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "added_tokens": [added(0), added(7)], "normalizer": null, "pre_tokenizer": bytes,
        "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "vocab": vocab, "merges": [["a", "b"], ["Ġ", "a"]]},
    })
}

/// A safetensors file of f32 tensors.
fn safetensors(names: &[(String, Vec<usize>)]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, shape) in names {
        let start = data.len();
        values(name, shape.iter().product()).iter().for_each(|value| data.extend(value.to_le_bytes()));
        header.insert(name.clone(), json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

fn hf_names(bias: bool) -> Vec<(String, Vec<usize>)> {
    tensors(bias).into_iter().map(|(hf, _, shape)| (hf, shape)).collect()
}

fn write_hf(folder: &Folder, config: &Value, names: &[(String, Vec<usize>)]) {
    folder.write("config.json", config.to_string());
    folder.write("tokenizer.json", tokenizer_json().to_string());
    folder.write(
        "tokenizer_config.json",
        json!({"eos_token": "<|end|>", "chat_template": "{{ eos_token }}"}).to_string(),
    );
    folder.write("model.safetensors", safetensors(names));
}

fn load_hf(name: &str, config: &Value, names: &[(String, Vec<usize>)]) -> Result<BaseModel, LoadError> {
    let folder = Folder::new(name);
    write_hf(&folder, config, names);
    BaseModel::load(&folder.0, Numerics::Exact)
}

fn rows(model: &BaseModel, layer: usize, linear: Linear) -> Vec<f32> {
    let matrix = model.weights.layers[layer].linear(linear);
    let mut out = vec![0.0; matrix.n_out() * matrix.n_in()];
    out.chunks_exact_mut(matrix.n_in()).enumerate().for_each(|(i, row)| matrix.row(i, row));
    out
}

#[test]
fn a_gguf_file_and_a_directory_of_the_same_model_load_alike() {
    for (architecture, hf_architecture, family) in
        [("llama", "LlamaForCausalLM", Family::Llama), ("qwen2", "Qwen2ForCausalLM", Family::Qwen2)]
    {
        let bias = family == Family::Qwen2;
        let mut file = gguf_head(architecture);
        gguf_tensors(&mut file, architecture, "");
        let gguf = load_gguf(&format!("alike-{architecture}"), &file).unwrap();
        let hf = load_hf(&format!("alike-hf-{architecture}"), &config(hf_architecture), &hf_names(bias)).unwrap();
        assert_eq!(gguf.info.family, family);
        assert_ne!(gguf.info.hash, hf.info.hash);
        assert_eq!(crate::info::ModelInfo { hash: hf.info.hash, ..gguf.info.clone() }, hf.info);
        for layer in 0..LAYERS {
            for linear in Linear::ALL {
                let name = format!("model.layers.{layer}.{}.weight", linear.hf_path());
                let (n_out, n_in) = hf.info.linear_shape(linear);
                assert_eq!(rows(&hf, layer, linear), values(&name, n_out * n_in), "{name} from the directory");
                assert_eq!(rows(&gguf, layer, linear), values(&name, n_out * n_in), "{name} from the file");
            }
            assert_eq!(gguf.weights.layers[layer].attn_norm, hf.weights.layers[layer].attn_norm);
            assert_eq!(gguf.weights.layers[layer].qkv_bias, hf.weights.layers[layer].qkv_bias);
            assert_eq!(gguf.weights.layers[layer].qkv_bias.is_some(), bias);
        }
        assert!(std::sync::Arc::ptr_eq(&hf.weights.embed, &hf.weights.head));
        assert_eq!(gguf.tokenizer.encode_rendered("ab a<|end|>"), hf.tokenizer.encode_rendered("ab a<|end|>"));
        assert_eq!(gguf.tokenizer.encode_rendered("ab a<|end|>"), [4, 6, 0]);
        let messages = [json!({"role": "user", "content": "c"})];
        let rendered = gguf.template.unwrap().render(&messages, None, true, &serde_json::Map::new()).unwrap();
        assert_eq!(rendered, "<|end|>c");
    }
}

#[test]
fn missing_unknown_and_misshapen_tensors_are_named() {
    let mut file = gguf_head("llama");
    gguf_tensors(&mut file, "llama", "blk.1.ffn_up.weight");
    let missing = load_gguf("missing", &file).unwrap_err();
    assert_eq!(missing, LoadError::MissingTensor { name: "blk.1.ffn_up.weight".into() });
    let misshapen = load_gguf("shape", file.clone().tensor_f32("blk.1.ffn_up.weight", &[32, 63], &[0.0; 32 * 63]));
    assert!(matches!(misshapen.unwrap_err(), LoadError::Shape { .. }));
    file.tensor_f32("blk.1.ffn_up.weight", &[32, 64], &[0.0; 32 * 64]).tensor_f32(
        "blk.0.attn_q_norm.weight",
        &[8],
        &[1.0; 8],
    );
    assert!(matches!(load_gguf("unknown", &file).unwrap_err(), LoadError::UnknownTensor { .. }));
    let mut names = hf_names(false);
    names.pop();
    let config = config("LlamaForCausalLM");
    assert!(matches!(load_hf("hf-missing", &config, &names).unwrap_err(), LoadError::MissingTensor { .. }));
    let names = [hf_names(false), vec![("model.layers.0.self_attn.o_proj.bias".into(), vec![HIDDEN])]].concat();
    assert!(matches!(load_hf("hf-unknown", &config, &names).unwrap_err(), LoadError::UnknownTensor { .. }));
    let names = [hf_names(false), vec![("model.layers.0.self_attn.rotary_emb.inv_freq".into(), vec![4])]].concat();
    assert!(load_hf("hf-ignored", &config, &names).is_ok());
}

#[test]
fn values_that_are_not_finite_are_refused() {
    let mut file = gguf_head("llama");
    gguf_tensors(&mut file, "llama", "output_norm.weight");
    file.tensor_f32("output_norm.weight", &[32], &[f32::NAN; 32]);
    assert!(matches!(load_gguf("nan", &file).unwrap_err(), LoadError::Tensor { .. }));
}

#[test]
fn what_would_change_the_results_is_refused_by_name() {
    let with = |edit: &dyn Fn(&mut GgufWriter)| {
        let mut file = gguf_head("llama");
        edit(&mut file);
        gguf_tensors(&mut file, "llama", "");
        load_gguf("refused", &file).unwrap_err().to_string()
    };
    assert!(
        with(&|file| {
            file.text("llama.rope.scaling.type", "yarn");
        })
        .contains("yarn")
    );
    assert!(
        with(&|file| {
            file.uint("llama.expert_count", 8);
        })
        .contains("expert_count")
    );
    assert!(
        with(&|file| {
            file.uint("llama.rope.dimension_count", 4);
        })
        .contains("rope.dimension_count")
    );
    assert!(load_gguf("arch", &gguf_head("mamba")).unwrap_err().to_string().contains("\"mamba\""));
    let refused = |key: &str, value: Value, named: &str| {
        let mut config = config("LlamaForCausalLM");
        config[key] = value;
        let error = load_hf("hf-refused", &config, &hf_names(false)).unwrap_err().to_string();
        assert!(error.contains(named), "{error}");
    };
    refused("architectures", json!(["GemmaForCausalLM"]), "GemmaForCausalLM");
    refused("rope_scaling", json!({"rope_type": "yarn", "factor": 4.0}), "yarn");
    refused("rope_scaling", json!({"type": "dynamic", "factor": 4.0}), "dynamic");
    refused("hidden_act", json!("gelu"), "gelu");
    refused("attention_bias", json!(true), "attention_bias");
    refused("quantization_config", json!({"quant_method": "gptq"}), "gptq");
    refused("num_attention_heads", json!(3), "key/value heads");
    refused("num_hidden_layers", json!(u64::MAX), "layers");
    refused("hidden_size", json!(0), "hidden size");
    refused("eos_token_id", json!(8), "special token");
    let mut small = config("LlamaForCausalLM");
    small["vocab_size"] = json!(4);
    let mut names = hf_names(false);
    names[0].1 = vec![4, HIDDEN];
    let error = load_hf("hf-vocabulary", &small, &names).unwrap_err().to_string();
    assert!(error.contains("8 tokens for 4 embedding rows"), "{error}");
}

#[test]
fn rope_rules_are_read_wherever_they_stand() {
    let scaling = |edit: Value| {
        let mut config = config("LlamaForCausalLM");
        config.as_object_mut().unwrap().extend(edit.as_object().unwrap().clone());
        let info = load_hf("rope", &config, &hf_names(false)).unwrap().info;
        (info.rope_theta, info.rope_scaling)
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 8192});
    let expected =
        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 8192 };
    assert_eq!(scaling(json!({"rope_theta": 5e5, "rope_scaling": llama3})), (5e5, expected.clone()));
    let mut new = llama3.clone();
    new["rope_theta"] = json!(5e5);
    assert_eq!(scaling(json!({"rope_theta": null, "rope_parameters": new})), (5e5, expected));
    let linear = scaling(json!({"rope_scaling": {"type": "linear", "factor": 2.0}}));
    assert_eq!(linear, (1e4, RopeScaling::Linear { factor: 2.0 }));
    let mut file = gguf_head("llama");
    gguf_tensors(&mut file, "llama", "");
    file.tensor_f32("rope_freqs.weight", &[4], &[1.0, 2.0, 4.0, 8.0]);
    let info = load_gguf("rope-freqs", &file).unwrap().info;
    assert_eq!(info.rope_scaling, RopeScaling::Divisors(vec![1.0, 2.0, 4.0, 8.0]));
}

#[test]
fn a_sliding_window_cuts_the_context() {
    let mut config = config("MistralForCausalLM");
    config["sliding_window"] = json!(48);
    assert_eq!(load_hf("window", &config, &hf_names(false)).unwrap().info.context, 48);
    config["sliding_window"] = Value::Null;
    assert_eq!(load_hf("no-window", &config, &hf_names(false)).unwrap().info.context, 128);
}

#[test]
fn shards_are_read_and_damage_is_refused() {
    let folder = Folder::new("shards");
    write_hf(&folder, &config("LlamaForCausalLM"), &[]);
    std::fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    let names = hf_names(false);
    let (first, second) = names.split_at(5);
    let map: serde_json::Map<String, Value> = names
        .iter()
        .enumerate()
        .map(|(i, (name, _))| (name.clone(), json!(if i < 5 { "a.safetensors" } else { "b.safetensors" })))
        .collect();
    folder.write("model.safetensors.index.json", json!({"weight_map": map}).to_string());
    folder.write("a.safetensors", safetensors(first));
    let whole = safetensors(second);
    folder.write("b.safetensors", &whole);
    assert!(BaseModel::load(&folder.0, Numerics::Exact).is_ok());
    for len in [0, 7, 8, 100, whole.len() - 1] {
        folder.write("b.safetensors", &whole[..len]);
        assert!(BaseModel::load(&folder.0, Numerics::Exact).is_err(), "{len} bytes");
    }
    folder.write("b.safetensors", [&u64::MAX.to_le_bytes(), &whole[8..]].concat());
    assert!(BaseModel::load(&folder.0, Numerics::Exact).is_err());
    let outside = json!({"weight_map": {"x": "../a.safetensors"}});
    folder.write("model.safetensors.index.json", outside.to_string());
    assert!(BaseModel::load(&folder.0, Numerics::Exact).unwrap_err().to_string().contains("plain name"));
    assert!(BaseModel::load(Path::new("/nonexistent/model"), Numerics::Exact).is_err());
}

#[test]
fn a_packed_copy_gives_the_same_weights_and_is_renewed_when_damaged() {
    let folder = Folder::new("panels");
    let mut file = gguf_head("llama");
    gguf_tensors(&mut file, "llama", "");
    let model = folder.write("model.gguf", file.finish());
    let panels = folder.0.join("panels");
    let load = |panels: Option<&Path>| BaseModel::load_shared(&model, Numerics::Exact, panels).expect("loads");
    let all_rows = |model: &BaseModel| -> Vec<Vec<f32>> {
        (0..LAYERS).flat_map(|layer| Linear::ALL.map(|linear| rows(model, layer, linear))).collect()
    };
    let expected = all_rows(&load(None));
    let copies = || std::fs::read_dir(&panels).expect("a folder").map(|entry| entry.expect("an entry").path());
    for round in ["written", "mapped"] {
        assert_eq!(all_rows(&load(Some(&panels))), expected, "{round}");
        assert_eq!(copies().count(), 1, "one file, nothing half-written");
    }
    let copy = copies().next().expect("the copy");
    let good = std::fs::read(&copy).expect("a file");
    let mut flipped = good.clone();
    flipped[200] ^= 1;
    for damaged in [&flipped[..], &good[..good.len() - 64], &good[..10], &[]] {
        // Renamed into place: a mapped file must not change.
        std::fs::write(folder.0.join("damaged"), damaged).expect("writable");
        std::fs::rename(folder.0.join("damaged"), &copy).expect("same disk");
        assert_eq!(all_rows(&load(Some(&panels))), expected, "{} bytes", damaged.len());
        assert_eq!(std::fs::read(&copy).expect("a file"), good, "renewed");
    }
    // A program with the same layout version that wrote another shape: the hash is right.
    let mut foreign = good.clone();
    foreign[64 + 8] ^= 1;
    let body = foreign.len() - 64;
    let hash = blake3::hash(&foreign[..body]);
    foreign[body..body + 32].copy_from_slice(hash.as_bytes());
    std::fs::write(folder.0.join("damaged"), foreign).expect("writable");
    std::fs::rename(folder.0.join("damaged"), &copy).expect("same disk");
    assert_eq!(all_rows(&load(Some(&panels))), expected, "another shape under a right hash");
    assert_eq!(std::fs::read(&copy).expect("a file"), good, "renewed");
    let no_folder = folder.write("a-file", "");
    assert_eq!(all_rows(&load(Some(&no_folder))), expected, "a copy that cannot be written is done without");
}

#[test]
fn what_earlier_programs_left_beside_a_packed_copy_is_removed() {
    let folder = Folder::new("leftovers");
    let mut file = gguf_head("llama");
    gguf_tensors(&mut file, "llama", "");
    let model = folder.write("model.gguf", file.finish());
    let panels = folder.0.join("panels");
    std::fs::create_dir(&panels).expect("writable");
    let put = |name: &str| std::fs::File::create(panels.join(name)).expect("writable");
    let [older, newer, being_written, foreign] = ["aa-0.panels", "aa-4000000000.panels", "aa-7.tmp", "notes.tmp"];
    for kept in [older, newer, being_written, foreign] {
        put(kept);
    }
    for abandoned in ["aa-8.tmp", "aa-9.tmp"] {
        put(abandoned).set_modified(std::time::SystemTime::UNIX_EPOCH).expect("own file");
    }
    BaseModel::load_shared(&model, Numerics::Exact, Some(&panels)).expect("loads");
    let entries = std::fs::read_dir(&panels).expect("a folder");
    let mut left: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("ASCII")).collect();
    left.sort();
    left.retain(|name| name.starts_with("aa-") || name == foreign);
    assert_eq!(left, [newer, being_written, foreign]);
}

#[test]
fn the_text_of_a_model_travels_without_its_weights_and_gives_the_same_tokens() {
    let mut file = gguf_head("llama");
    gguf_tensors(&mut file, "llama", "");
    let folder = Folder::new("text");
    let gguf = folder.write("model.gguf", file.finish());
    let hf = Folder::new("text-hf");
    write_hf(&hf, &config("LlamaForCausalLM"), &hf_names(false));
    for path in [&gguf, &hf.0] {
        let model = BaseModel::load(path, Numerics::Exact).expect("it loads");
        let block = crate::text::pack(path, model.info.hash).expect("it can be read");
        assert!(block.len() < 8 << 10, "{} bytes without weights", block.len());
        let text = crate::text::read(&block, Numerics::Exact).expect("our own");
        assert_eq!(text.info, model.info);
        let words = "ab a<|end|> c";
        assert_eq!(text.tokenizer.encode_rendered(words), model.tokenizer.encode_rendered(words));
        assert_eq!(text.template.is_some(), model.template.is_some());
        // Cut off anywhere or with another head, it is refused; changed elsewhere, it is at least no harm.
        for n_bytes in (0..block.len()).step_by(7) {
            crate::text::read(&block[..n_bytes], Numerics::Exact).expect_err("cut off");
            let mut changed = block.clone();
            changed[n_bytes] ^= 0x80;
            let read = crate::text::read(&changed, Numerics::Exact);
            assert!(n_bytes >= 8 || read.is_err(), "byte {n_bytes}");
        }
    }
}
