//! Adapters that PEFT itself wrote, on tiny models, against the logits PEFT computed with them.
//!
//! `tests/data/peft` holds one folder per kind of adapter and `goldens.json`; `tests/python/make_peft_goldens.py`
//! makes them and names what each kind is there for. The models are generated here and recognised by their hash.
//! The shipped adapters on the real model are judged in `parity`; malformed files in `adapters`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::adapter::{self, AdapterFiles, AdapterLimits, LoraAdapter};
use model::base::BaseModel;
use model::forward::{Runtime, RuntimeOptions, kv_layout};
use model::info::Numerics;
use model::step::{Forward, Run, Step};
use serde_json::{Value, json};
use tests::tiny::{self, TinySpec};

/// Largest difference of a logit. The logits spread over about 20 units and come out of four layers of float32
/// sums in another order than PEFT's: PEFT's own float32 is within 1.1e-5 of its float64 (`float64_difference` in
/// the goldens), and ours was within 1e-5 of PEFT's when this was written. Ten times that leaves room for another
/// machine's sums, and every mistake worth finding is far above it: see the last four tests.
const LOGIT_DIFF_MAX: f32 = 1e-4;

/// Rows of one step: the prompt of 12 tokens is computed in two chunks.
const ROWS_MAX: usize = 8;

/// Four layers, so that half of them can be left out. The seeds name the models in the goldens.
fn specs() -> [TinySpec; 2] {
    [TinySpec { seed: 21, n_layers: 4, ..TinySpec::llama() }, TinySpec { seed: 22, n_layers: 4, ..TinySpec::qwen2() }]
}

/// Writes a model. Tests run at the same time, so each has its own copy; the script that makes the goldens reads
/// the one of no test (`""`).
fn model_folder(test: &str, spec: &TinySpec) -> PathBuf {
    spec.write_hf(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("peft").join(test))
}

fn goldens() -> Value {
    let text = std::fs::read(tests::data("peft/goldens.json")).expect("goldens of PEFT");
    serde_json::from_slice(&text).expect("JSON")
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().expect("a list").iter().map(|x| x.as_f64().expect("a number") as f32).collect()
}

/// Both models, ready to compute the prompt of the goldens.
struct Bench {
    goldens: Value,
    models: Vec<(String, Arc<BaseModel>, Runtime)>,
}

// === impl Bench ===

impl Bench {
    fn new(test: &str) -> Self {
        let models = specs().map(|spec| {
            let base = BaseModel::load(&model_folder(test, &spec), Numerics::Exact).expect("a tiny model");
            let base = Arc::new(base);
            let kv_bytes = kv_layout(&base.info).bytes_per_page();
            let options =
                RuntimeOptions { threads: 1, rows_max: ROWS_MAX, kv_bytes, n_logits_max: 1, poison_freed_pages: true };
            let runtime = Runtime::new(base.clone(), options).expect("a runtime");
            (spec.name(), base, runtime)
        });
        Self { goldens: goldens(), models: models.into() }
    }

    fn cases(&self) -> Vec<Value> {
        self.goldens["cases"].as_array().expect("a list of cases").clone()
    }

    fn model(&mut self, name: &Value) -> &mut (String, Arc<BaseModel>, Runtime) {
        self.models.iter_mut().find(|(model, ..)| name == model.as_str()).expect("a model of the goldens")
    }

    /// The adapter of `case`, its config changed by `edit`, with what check says about it.
    fn adapter(&mut self, case: &Value, edit: &dyn Fn(&mut Value)) -> (Arc<LoraAdapter>, usize) {
        let name = case["name"].as_str().expect("a name");
        let mut files = tiny::read_adapter(&tests::data("peft").join(name));
        if let AdapterFiles::Peft { config, .. } = &mut files {
            let mut value = serde_json::from_slice(config).expect("a config");
            let before = Value::clone(&value);
            edit(&mut value);
            // Unedited files stay as PEFT wrote them, byte for byte.
            if value != before {
                *config = serde_json::to_vec(&value).expect("JSON");
            }
        }
        let (_, base, _) = self.model(&case["base"]);
        let limits = AdapterLimits {
            accepted_base_names: vec![case["base"].as_str().expect("a base").to_owned()],
            ..AdapterLimits::default()
        };
        let checked = adapter::check(&files, &base.info, &limits).unwrap_or_else(|error| panic!("{name}: {error}"));
        let packed =
            checked.pack(files.content_hash(), &base.weights).unwrap_or_else(|error| panic!("{name}: {error}"));
        (Arc::new(packed), checked.summary().modules)
    }

    /// Logits of the last token of the prompt.
    fn logits(&mut self, model: &Value, adapter: Option<&Arc<LoraAdapter>>) -> Vec<f32> {
        let prompt: Vec<u32> = self.goldens["prompt"]
            .as_array()
            .expect("a list")
            .iter()
            .map(|id| id.as_u64().expect("a token") as u32)
            .collect();
        let (_, _, runtime) = self.model(model);
        let mut last = Vec::new();
        for (chunk, tokens) in prompt.chunks(ROWS_MAX).enumerate() {
            let run = Run {
                tokens: tokens.to_vec(),
                start: chunk * ROWS_MAX,
                pages: vec![0],
                adapter: adapter.cloned(),
                logits: vec![tokens.len() - 1],
            };
            last = runtime.forward(&Step { runs: vec![run] }).to_vec();
        }
        runtime.page_freed(0);
        last
    }

    /// Largest difference between the goldens of `case` and the adapter with its config changed by `edit`.
    fn off(&mut self, case: &Value, edit: &dyn Fn(&mut Value)) -> f32 {
        let (adapter, _) = self.adapter(case, edit);
        let ours = self.logits(&case["base"], Some(&adapter));
        distance(&ours, &floats(&case["logits"]))
    }
}

/// Largest absolute difference.
fn distance(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.iter().chain(theirs).all(|x| x.is_finite()), "a logit is not finite");
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn the_models_are_the_ones_the_goldens_were_made_on() {
    let folders = specs().map(|spec| (spec.name(), model_folder("", &spec)));
    let goldens = goldens();
    for (name, folder) in folders {
        let bytes = std::fs::read(folder.join("model.safetensors")).expect("weights");
        let hash = blake3::hash(&bytes).to_hex();
        assert_eq!(goldens["models"][&name]["safetensors_blake3"], hash.as_str(), "{name}: make the goldens again");
    }
}

#[test]
fn the_base_models_agree_with_transformers() {
    let mut bench = Bench::new("base");
    for spec in specs() {
        let theirs = floats(&bench.goldens["models"][spec.name()]["logits"]);
        let off = distance(&bench.logits(&json!(spec.name()), None), &theirs);
        println!("{}: {off:.1e}", spec.name());
        assert!(off <= LOGIT_DIFF_MAX, "{} differs by {off}", spec.name());
    }
}

#[test]
fn every_kind_of_adapter_computes_what_peft_computes() {
    let mut bench = Bench::new("kinds");
    let cases = bench.cases();
    assert!(cases.len() >= 25, "the goldens hold every kind");
    let mut wrong = Vec::new();
    for case in &cases {
        let name = case["name"].as_str().expect("a name");
        let (adapter, modules) = bench.adapter(case, &|_| ());
        assert_eq!(json!(modules), case["modules"], "modules of {name}");
        let off = distance(&bench.logits(&case["base"], Some(&adapter)), &floats(&case["logits"]));
        println!("{name}: {off:.1e}, rank {}, {modules} modules", adapter.rank_max);
        if off > LOGIT_DIFF_MAX {
            wrong.push(format!("{name} differs by {off}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_goldens_notice_a_missing_adapter() {
    let mut bench = Bench::new("missing");
    for case in bench.cases() {
        let base = bench.logits(&case["base"], None);
        let off = distance(&base, &floats(&case["logits"]));
        assert!(off > 1000.0 * LOGIT_DIFF_MAX, "{}: the base differs by {off} only", case["name"]);
    }
}

#[test]
fn the_goldens_notice_every_alpha_off_by_two_percent() {
    let mut bench = Bench::new("alpha");
    let raise = |value: &mut Value| *value = json!(value.as_f64().expect("an alpha") * 1.02);
    let edit = |config: &mut Value| {
        raise(&mut config["lora_alpha"]);
        config["alpha_pattern"].as_object_mut().expect("a map").values_mut().for_each(raise);
    };
    for case in bench.cases() {
        let off = bench.off(&case, &edit);
        assert!(off > 20.0 * LOGIT_DIFF_MAX, "{}: alpha + 2 % makes a difference of {off} only", case["name"]);
    }
}

#[test]
fn the_goldens_notice_an_ignored_scaling_field() {
    let mut bench = Bench::new("scaling");
    let mut seen = 0;
    for case in bench.cases() {
        for (field, off) in [("use_rslora", json!(false)), ("alpha_pattern", json!({}))] {
            let (mut is_set, folder) = (false, tests::data("peft").join(case["name"].as_str().expect("a name")));
            if let AdapterFiles::Peft { config, .. } = tiny::read_adapter(&folder) {
                let config: Value = serde_json::from_slice(&config).expect("a config");
                is_set = config[field] != off;
            }
            if is_set {
                seen += 1;
                let difference = bench.off(&case, &|config| config[field] = off.clone());
                assert!(difference > 1000.0 * LOGIT_DIFF_MAX, "{} without {field}: {difference}", case["name"]);
            }
        }
    }
    assert!(seen >= 8, "the kinds set these fields");
}

/// Measured by the script: the same adapter in PEFT, with the bias of q, k and v inside the scale of DoRA.
#[test]
fn the_goldens_notice_a_bias_scaled_by_dora() {
    let goldens = goldens();
    let cases = goldens["cases"].as_array().expect("a list of cases");
    let off: Vec<f64> = cases.iter().filter_map(|case| case["bias_order_difference"].as_f64()).collect();
    assert!(off.len() >= 3, "Qwen2 with DoRA is among the kinds");
    assert!(off.iter().all(|off| *off > 1000.0 * f64::from(LOGIT_DIFF_MAX)), "{off:?}");
}
