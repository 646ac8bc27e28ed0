//! Facts about a model from its JSON files.

use serde_json::Value;
use shared::hash::ContentHash;

use super::token_text;
use crate::base::LoadError;
use crate::base::assemble;
use crate::base::family::{self, FamilyRules};
use crate::info::{ModelInfo, Numerics, RopeScaling};
use crate::tokenizer::Tokenizer;

/// The JSON files of a directory; absent ones are null.
#[derive(Debug)]
pub(super) struct Configs {
    /// `config.json`.
    pub(super) model: Value,
    /// `tokenizer_config.json`.
    pub(super) tokenizer: Value,
    /// `generation_config.json`.
    pub(super) generation: Value,
}

impl Configs {
    pub(super) fn family(&self) -> Result<&'static FamilyRules, LoadError> {
        let architecture = self.model["architectures"][0].as_str();
        family::of_hf(architecture.ok_or_else(|| missing("architectures"))?)
    }

    /// Reads and checks the facts; the hash is filled in later.
    pub(super) fn model_info(
        &self,
        rules: &FamilyRules,
        tokenizer: &Tokenizer,
        numerics: Numerics,
    ) -> Result<ModelInfo, LoadError> {
        self.refuse_unsupported()?;
        let (hidden, n_heads) = (self.need("hidden_size")?, self.need("num_attention_heads")?);
        let window = (rules.hf_window)(&self.model).map_or(usize::MAX, narrow);
        let (rope_theta, rope_scaling) = self.rope()?;
        let bos = self.bos(tokenizer);
        let info = ModelInfo {
            hash: ContentHash([0; 32]),
            family: rules.family,
            n_layers: self.need("num_hidden_layers")?,
            hidden,
            n_heads,
            n_kv_heads: self.maybe("num_key_value_heads").unwrap_or(n_heads),
            head_dim: self.maybe("head_dim").unwrap_or_else(|| hidden.checked_div(n_heads).unwrap_or(0)),
            ffn: self.need("intermediate_size")?,
            vocab: self.need("vocab_size")?,
            context: self.need("max_position_embeddings")?.min(window),
            rms_eps: self.model["rms_norm_eps"].as_f64().ok_or_else(|| missing("rms_norm_eps"))? as f32,
            rope_theta,
            rope_scaling,
            bos,
            add_bos: bos.is_some() && self.adds_bos(tokenizer),
            eos: self.ends(tokenizer),
            numerics,
        };
        assemble::check_facts(&info)?;
        assemble::check_specials(&info)?;
        Ok(info)
    }

    fn need(&self, key: &str) -> Result<usize, LoadError> {
        self.maybe(key).ok_or_else(|| missing(key))
    }

    fn maybe(&self, key: &str) -> Option<usize> {
        self.model[key].as_u64().map(narrow)
    }

    fn refuse_unsupported(&self) -> Result<(), LoadError> {
        let act = self.model["hidden_act"].as_str().unwrap_or("silu");
        if act != "silu" {
            return Err(LoadError::unsupported("hidden_act", act, "silu is"));
        }
        for key in ["attention_bias", "mlp_bias"] {
            if self.model[key] == true {
                return Err(LoadError::unsupported(key, "true", "models without it are read; Qwen2 brings its own"));
            }
        }
        for key in ["quantization_config", "compression_config"] {
            if !self.model[key].is_null() {
                let method = self.model[key]["quant_method"].as_str().unwrap_or("unknown");
                return Err(LoadError::unsupported(key, method, "f32, f16 and bf16 are; use a GGUF file for less"));
            }
        }
        let factor = self.model["partial_rotary_factor"].as_f64().unwrap_or(1.0);
        if factor != 1.0 {
            return Err(LoadError::unsupported("partial_rotary_factor", factor.to_string(), "1 is"));
        }
        Ok(())
    }

    /// Base and scaling of the rotary embedding. transformers 5 writes both under `rope_parameters`, older versions the
    /// base at the top and the scaling under `rope_scaling`.
    fn rope(&self) -> Result<(f64, RopeScaling), LoadError> {
        let [new, old] = ["rope_parameters", "rope_scaling"].map(|key| &self.model[key]);
        let scaling = if new.is_object() { new } else { old };
        let theta = [&new["rope_theta"], &old["rope_theta"], &self.model["rope_theta"]];
        let theta = theta.into_iter().find_map(Value::as_f64).unwrap_or(10_000.0);
        let kind = scaling["rope_type"].as_str().or_else(|| scaling["type"].as_str()).unwrap_or("default");
        let number = |key: &str| {
            let value = scaling[key].as_f64().filter(|value| value.is_finite() && *value > 0.0);
            value.ok_or_else(|| missing(&format!("rope {kind} scaling: {key}")))
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: number("factor")? as f32 },
            "llama3" => {
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    let found = format!("{low}, not below high_freq_factor {high}");
                    return Err(LoadError::config("low_freq_factor", found, "the ramp runs from low to high"));
                }
                RopeScaling::Llama3 {
                    factor: number("factor")? as f32,
                    low_freq_factor: low as f32,
                    high_freq_factor: high as f32,
                    original_context: number("original_max_position_embeddings")? as u32,
                }
            }
            other => return Err(LoadError::unsupported("rope scaling", other, "default, linear and llama3 are read")),
        };
        Ok((theta, scaling))
    }

    fn bos(&self, tokenizer: &Tokenizer) -> Option<u32> {
        let configured = [&self.model, &self.generation].into_iter().find_map(|config| config["bos_token_id"].as_u64());
        let by_text = || token_text(&self.tokenizer["bos_token"]).and_then(|text| tokenizer.id_of(text));
        configured.and_then(|id| u32::try_from(id).ok()).or_else(by_text)
    }

    fn adds_bos(&self, tokenizer: &Tokenizer) -> bool {
        match self.tokenizer["add_bos_token"].as_bool() {
            Some(adds) => adds,
            None => tokenizer.front_token().is_some(),
        }
    }

    /// Ends of an answer: what generation stops at, else what the model says, else the tokenizer's end token.
    fn ends(&self, tokenizer: &Tokenizer) -> Vec<u32> {
        let ids = |value: &Value| -> Vec<u32> {
            let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
            match value {
                Value::Array(ids) => ids.iter().filter_map(one).collect(),
                other => one(other).into_iter().collect(),
            }
        };
        let mut ends = ids(&self.generation["eos_token_id"]);
        if ends.is_empty() {
            ends = ids(&self.model["eos_token_id"]);
        }
        // A chat model whose configuration still names the end token of its base.
        let by_text = token_text(&self.tokenizer["eos_token"]).and_then(|text| tokenizer.id_of(text));
        ends.extend(by_text.filter(|id| !ends.contains(id)));
        ends
    }
}

fn missing(key: &str) -> LoadError {
    LoadError::config(key, "missing or of the wrong type", "config.json of this architecture has it")
}

/// Saturates: [`assemble::check_facts`] refuses what does not fit.
fn narrow(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}
