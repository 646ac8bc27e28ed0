//! `adapter_config.json`: what each field means for the computation, or its refusal by name.
//!
//! Field meanings are PEFT's (huggingface/peft 0.21, `tuners/lora/config.py`). A field this file does not know
//! is accepted while it is off (null, false, zero or empty) and refused when it is set: newer versions add
//! fields all the time, and a set one may change the result.

use serde_json::{Map, Value};

use super::json::StrictValue;
use super::pattern::{Cover, Pattern};
use super::{AdapterError, quote};

/// Longest config. One that lists rank and alpha of every module of an 80-layer model has 70 KB; a JSON
/// value takes up to 40 times its text in memory.
pub const CONFIG_BYTES_MAX: usize = 128 << 10;
/// Patterns in one map: two per module of a 73-layer model.
const PATTERNS_MAX: usize = 1024;
/// Those of them that are not plain names and must be compiled.
const COMPILED_PATTERNS_MAX: usize = 64;
/// Largest `lora_alpha` and scale: far above use (alpha 16 to 512), and products stay finite.
const SCALE_ABS_MAX: f64 = 1e4;

/// Fields that change nothing at inference, whatever they hold. `revision` names a commit of the base, which
/// its shapes cannot tell; the sub-configurations belong to initialisation or training.
const IGNORED: [&str; 14] = [
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "velora_config",
];

/// Fields that PEFT acts on as soon as they are not null, even when empty.
const ONLY_NULL: [&str; 5] =
    ["alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "use_bdlora"];

/// The fields that decide the computation.
#[derive(Debug)]
pub(super) struct PeftConfig {
    /// `base_model_name_or_path`, when given.
    pub(super) base_name: Option<String>,
    /// `use_dora`.
    pub(super) dora: bool,
    /// `layers_to_transform`, when given.
    pub(super) layers: Option<Vec<usize>>,
    rank: u64,
    alpha: f64,
    rank_stabilised: bool,
    targets: Targets,
    exclude: Option<Targets>,
    rank_pattern: Vec<(Pattern, u64)>,
    alpha_pattern: Vec<(Pattern, f64)>,
}

/// A choice of modules.
#[derive(Debug)]
enum Targets {
    /// Every linear layer of the blocks.
    AllLinear,
    /// Full names, or what follows a dot.
    Names(Vec<String>),
    /// A regular expression over the full name.
    Regex(Pattern),
}

// === impl PeftConfig ===

impl PeftConfig {
    /// Reads and judges a config.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, AdapterError> {
        if bytes.len() > CONFIG_BYTES_MAX {
            return Err(AdapterError::Bytes { what: "adapter_config.json", found: bytes.len(), max: CONFIG_BYTES_MAX });
        }
        if bytes.is_empty() {
            return Err(AdapterError::invalid("adapter_config.json is missing or empty"));
        }
        let StrictValue(value) = serde_json::from_slice(bytes)
            .map_err(|error| AdapterError::invalid(format!("adapter_config.json: {error}")))?;
        let Value::Object(map) = value else {
            return Err(AdapterError::invalid("adapter_config.json is not a JSON object"));
        };
        Fields(&map).read()
    }

    /// Whether the config puts LoRA on a module, by its full name such as `model.layers.0.mlp.up_proj`.
    pub(super) fn targets(&self, module: &str) -> bool {
        let is_excluded = self.exclude.as_ref().is_some_and(|exclude| exclude.matches(module));
        !is_excluded && self.targets.matches(module) && self.covers_layer(module)
    }

    /// Rank of a module: the first `rank_pattern` that matches, else `r`.
    pub(super) fn rank(&self, module: &str) -> u64 {
        first_match(&self.rank_pattern, module).unwrap_or(self.rank)
    }

    /// Factor of `B·A` for a module of this rank: `alpha / r`, with rsLoRA `alpha / √r`.
    pub(super) fn scale(&self, module: &str, rank: usize) -> f32 {
        let alpha = first_match(&self.alpha_pattern, module).unwrap_or(self.alpha);
        let rank = rank as f64;
        (alpha / if self.rank_stabilised { rank.sqrt() } else { rank }) as f32
    }

    /// `layers_to_transform` restricts a list of names, but not a name that is given in full.
    fn covers_layer(&self, module: &str) -> bool {
        let Some(layers) = &self.layers else { return true };
        if matches!(&self.targets, Targets::Names(names) if names.iter().any(|name| name == module)) {
            return true;
        }
        let index = module.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
        index.and_then(|index| index.parse().ok()).is_some_and(|index: usize| layers.contains(&index))
    }
}

// === impl Targets ===

impl Targets {
    fn matches(&self, module: &str) -> bool {
        match self {
            Self::AllLinear => module.starts_with("model.layers."),
            Self::Regex(pattern) => pattern.matches(module),
            Self::Names(names) => names.iter().any(|name| {
                module.strip_suffix(name.as_str()).is_some_and(|front| front.is_empty() || front.ends_with('.'))
            }),
        }
    }
}

fn first_match<T: Copy>(patterns: &[(Pattern, T)], module: &str) -> Option<T> {
    patterns.iter().find(|(pattern, _)| pattern.matches(module)).map(|(_, value)| *value)
}

/// The parsed object, field by field.
struct Fields<'a>(&'a Map<String, Value>);

// === impl Fields ===

impl Fields<'_> {
    fn read(&self) -> Result<PeftConfig, AdapterError> {
        self.check_kind()?;
        self.check_base_unchanged()?;
        self.check_features_off()?;
        self.check_unknown_off()?;
        let config = PeftConfig {
            base_name: self.text("base_model_name_or_path")?.map(str::to_owned),
            dora: self.flag("use_dora")?,
            layers: self.layers()?,
            rank: rank("r", self.required("r")?)?,
            alpha: alpha("lora_alpha", self.required("lora_alpha")?)?,
            rank_stabilised: self.flag("use_rslora")?,
            targets: self.modules("target_modules")?.ok_or_else(|| {
                AdapterError::invalid(
                    "adapter_config.json: target_modules is missing or empty; list the adapted modules",
                )
            })?,
            exclude: self.modules("exclude_modules")?,
            rank_pattern: self.patterns("rank_pattern", rank)?,
            alpha_pattern: self.patterns("alpha_pattern", alpha)?,
        };
        self.check_layers_need_names(&config)?;
        Ok(config)
    }

    /// Kind of adapter and task.
    fn check_kind(&self) -> Result<(), AdapterError> {
        match self.required("peft_type")? {
            Value::String(kind) if kind == "LORA" => {}
            other => return Err(AdapterError::unsupported("peft_type", show(other), "only LORA adapters are served")),
        }
        match self.set("task_type") {
            None => Ok(()),
            Some(Value::String(task)) if task == "CAUSAL_LM" => Ok(()),
            Some(other) => {
                Err(AdapterError::unsupported("task_type", show(other), "only CAUSAL_LM adapters generate text"))
            }
        }
    }

    /// Initialisations that rewrite the base weights: the adapter alone is wrong on the original base.
    fn check_base_unchanged(&self) -> Result<(), AdapterError> {
        match self.set("init_lora_weights") {
            None | Some(Value::Bool(_)) => Ok(()),
            Some(Value::String(init)) if ["gaussian", "eva", "orthogonal", "mica"].contains(&init.as_str()) => Ok(()),
            Some(other) => Err(AdapterError::unsupported(
                "init_lora_weights",
                show(other),
                "this initialisation changes the base weights; convert the adapter with save_pretrained(…, path_initial_model_for_weight_conversion=…)",
            )),
        }
    }

    /// Features that change the computation and are not implemented.
    fn check_features_off(&self) -> Result<(), AdapterError> {
        const OFF: [(&str, &str); 8] = [
            ("fan_in_fan_out", "the base stores its weights as [out, in]; train with fan_in_fan_out=false"),
            ("lora_bias", "train with lora_bias=false"),
            ("modules_to_save", "full copies of modules are not served; adapt linear layers only"),
            ("trainable_token_indices", "changed embeddings are not served; adapt linear layers only"),
            ("target_parameters", "only linear modules are served"),
            ("use_qalora", "train with use_qalora=false"),
            ("layer_replication", "the served base has its own layers only"),
            ("megatron_config", "export the adapter without Megatron"),
        ];
        for (field, hint) in OFF {
            if let Some(value) = self.set(field).filter(|value| !is_off(value)) {
                return Err(AdapterError::unsupported(field, show(value), hint));
            }
        }
        for field in ONLY_NULL {
            if let Some(value) = self.set(field).filter(|value| **value != Value::Bool(false)) {
                return Err(AdapterError::unsupported(field, show(value), format!("train without {field}")));
            }
        }
        match self.set("bias") {
            None => Ok(()),
            Some(Value::String(bias)) if bias == "none" => Ok(()),
            Some(other) => Err(AdapterError::unsupported("bias", show(other), "train with bias=\"none\"")),
        }
    }

    /// A field from the future may stand there as long as it is off.
    fn check_unknown_off(&self) -> Result<(), AdapterError> {
        const READ: [&str; 15] = [
            "alpha_pattern",
            "base_model_name_or_path",
            "bias",
            "init_lora_weights",
            "lora_alpha",
            "peft_type",
            "r",
            "rank_pattern",
            "target_modules",
            "task_type",
            "use_dora",
            "use_rslora",
            "exclude_modules",
            "layers_pattern",
            "layers_to_transform",
        ];
        let is_known = |field: &str| READ.contains(&field) || IGNORED.contains(&field) || ONLY_NULL.contains(&field);
        match self.0.iter().find(|(field, value)| !is_known(field) && !is_off(value)) {
            None => Ok(()),
            Some((field, value)) => Err(AdapterError::unsupported(
                field.chars().take(80).collect::<String>(),
                show(value),
                "this field is not known here and may change the result; remove it or export with PEFT 0.21",
            )),
        }
    }

    /// PEFT refuses layer numbers beside a regular expression, so nothing says what they would mean.
    fn check_layers_need_names(&self, config: &PeftConfig) -> Result<(), AdapterError> {
        let pattern = self.set("layers_pattern").filter(|value| !is_off(value));
        if config.layers.is_some() && !matches!(config.targets, Targets::Names(_)) {
            return Err(AdapterError::invalid("layers_to_transform needs target_modules to be a list of names"));
        }
        let Some(pattern) = pattern else { return Ok(()) };
        if config.layers.is_none() {
            return Err(AdapterError::invalid("layers_pattern is set without layers_to_transform"));
        }
        let names: Vec<&Value> = match pattern {
            Value::Array(items) => items.iter().collect(),
            single => vec![single],
        };
        if names.iter().any(|name| *name == "layers" || *name == "model.layers") {
            Ok(())
        } else {
            Err(AdapterError::unsupported("layers_pattern", show(pattern), "the layers of this base are in `layers`"))
        }
    }

    /// `layers_to_transform`: a number, a list, or nothing.
    fn layers(&self) -> Result<Option<Vec<usize>>, AdapterError> {
        let wrong = |value: &Value| {
            AdapterError::invalid(format!("layers_to_transform = {}: expected layer numbers", show(value)))
        };
        let index = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok()).ok_or_else(|| wrong(value));
        match self.set("layers_to_transform") {
            None => Ok(None),
            Some(Value::Array(items)) if items.is_empty() => Ok(None),
            Some(Value::Array(items)) => items.iter().map(index).collect::<Result<_, _>>().map(Some),
            Some(single) => Ok(Some(vec![index(single)?])),
        }
    }

    /// `target_modules` or `exclude_modules`; `None` when absent or empty.
    fn modules(&self, field: &'static str) -> Result<Option<Targets>, AdapterError> {
        let wrong = |value: &Value| {
            AdapterError::invalid(format!(
                "{field} = {}: expected a list of module names or a regular expression",
                show(value)
            ))
        };
        match self.set(field) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) if field == "target_modules" && text.eq_ignore_ascii_case("all-linear") => {
                Ok(Some(Targets::AllLinear))
            }
            Some(Value::String(text)) => Ok(Some(Targets::Regex(Pattern::new(field, text, Cover::Whole)?))),
            Some(Value::Array(items)) if items.is_empty() => Ok(None),
            Some(Value::Array(items)) if items.len() > PATTERNS_MAX => Err(AdapterError::invalid(format!(
                "{field} lists {} names, at most {PATTERNS_MAX} are read",
                items.len()
            ))),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| item.as_str().filter(|name| !name.is_empty()).map(str::to_owned).ok_or_else(|| wrong(item)))
                .collect::<Result<_, _>>()
                .map(|names| Some(Targets::Names(names))),
            Some(other) => Err(wrong(other)),
        }
    }

    /// A map from module pattern to a value, in file order: the first match counts.
    fn patterns<T>(
        &self,
        field: &'static str,
        read: fn(&str, &Value) -> Result<T, AdapterError>,
    ) -> Result<Vec<(Pattern, T)>, AdapterError> {
        let map = match self.set(field) {
            None => return Ok(Vec::new()),
            Some(Value::Object(map)) => map,
            Some(other) => {
                return Err(AdapterError::invalid(format!("{field} = {}: expected an object", show(other))));
            }
        };
        if map.len() > PATTERNS_MAX {
            return Err(AdapterError::invalid(format!(
                "{field} has {} entries, at most {PATTERNS_MAX} are read",
                map.len()
            )));
        }
        let mut n_compiled = 0;
        let mut out = Vec::with_capacity(map.len());
        for (text, value) in map {
            let value = read(&format!("{field}[{}]", quote(text)), value)?;
            let pattern = Pattern::new(field, text, Cover::Suffix)?;
            n_compiled += usize::from(matches!(pattern, Pattern::Regex(_)));
            if n_compiled > COMPILED_PATTERNS_MAX {
                return Err(AdapterError::unsupported(
                    field,
                    format!("more than {COMPILED_PATTERNS_MAX} regular expressions"),
                    "use plain module names",
                ));
            }
            out.push((pattern, value));
        }
        Ok(out)
    }

    /// A field that is present and not null.
    fn set(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn required(&self, field: &str) -> Result<&Value, AdapterError> {
        self.set(field).ok_or_else(|| AdapterError::invalid(format!("adapter_config.json: {field} is missing")))
    }

    fn flag(&self, field: &str) -> Result<bool, AdapterError> {
        match self.set(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(other) => Err(AdapterError::invalid(format!("{field} = {}: expected true or false", show(other)))),
        }
    }

    fn text(&self, field: &str) -> Result<Option<&str>, AdapterError> {
        match self.set(field) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str()).filter(|text| !text.is_empty())),
            Some(other) => Err(AdapterError::invalid(format!("{field} = {}: expected a string", show(other)))),
        }
    }
}

/// A rank: a positive whole number.
fn rank(field: &str, value: &Value) -> Result<u64, AdapterError> {
    value.as_u64().filter(|rank| *rank > 0).ok_or_else(|| {
        AdapterError::invalid(format!(
            "adapter_config.json: {field} = {}: expected a whole number above 0",
            show(value)
        ))
    })
}

/// An alpha: a finite number of ordinary size.
fn alpha(field: &str, value: &Value) -> Result<f64, AdapterError> {
    value.as_f64().filter(|alpha| alpha.abs() <= SCALE_ABS_MAX).ok_or_else(|| {
        AdapterError::invalid(format!(
            "adapter_config.json: {field} = {}: expected a number of at most {SCALE_ABS_MAX} in magnitude",
            show(value)
        ))
    })
}

/// Null, false, zero or empty: the ways a feature is written when it is not used.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

fn show(value: &Value) -> String {
    const SHOWN_CHARS_MAX: usize = 80;
    let text = value.to_string();
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown
}
