//! Random damage to valid tiny files: refused or accepted, never a panic.

use serde_json::json;

use super::super::{AdapterFiles, AdapterLimits, check};
use super::gguf::Recipe;
use super::{config_json, peft_files, tiny_info, tiny_tensors};
use crate::info::Linear;

/// Changes per kind of file.
const MUTATIONS: u64 = 20_000;

/// A small generator, so that a failing case is named by its number alone.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*, Vigna 2016.
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// One to four changes: a flipped bit, another byte, a cut, a doubled or dropped stretch, a digit changed.
fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(bytes.len());
        // Half of the changes go to the header, where the structure is.
        let at = if random.next().is_multiple_of(2) { at.min(random.below(400)) } else { at };
        match random.below(7) {
            _ if bytes.is_empty() => return,
            0 => bytes[at] ^= 1 << random.below(8),
            1 => bytes[at] = random.next() as u8,
            2 => bytes.truncate(at),
            3 => {
                let end = (at + random.below(64)).min(bytes.len());
                let stretch = bytes[at..end].to_vec();
                bytes.splice(at..at, stretch);
            }
            4 => {
                let end = (at + random.below(64)).min(bytes.len());
                bytes.drain(at..end);
            }
            5 => bytes[at] = b"{}[]\",:0123456789e.-\\"[random.below(21)],
            _ => {
                if let Some(digit) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                    *digit = b'0' + random.below(10) as u8;
                }
            }
        }
    }
}

/// Counts the accepted among all damaged files; `damage` makes the case of a number.
fn survivors(damage: impl Fn(&mut Random) -> AdapterFiles) -> u64 {
    let (info, limits) = (tiny_info(), AdapterLimits::default());
    (1..=MUTATIONS)
        .filter(|seed| {
            let files = damage(&mut Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15)));
            match check(&files, &info, &limits) {
                Ok(checked) => checked.summary().modules > 0,
                Err(error) => {
                    assert!(error.to_string().len() < 2_000, "seed {seed}: long message");
                    false
                }
            }
        })
        .count() as u64
}

#[test]
fn damaged_safetensors_never_panic() {
    let AdapterFiles::Peft { config, weights } = peft_files(&json!({}), &tiny_tensors()) else { unreachable!() };
    let accepted = survivors(|random| {
        let mut weights = weights.clone();
        mutate(&mut weights, random);
        AdapterFiles::Peft { config: config.clone(), weights }
    });
    // A changed mantissa is still a valid adapter; anything else is not.
    assert!(accepted > 0 && accepted < MUTATIONS / 2, "{accepted} of {MUTATIONS} accepted");
}

#[test]
fn damaged_configs_never_panic() {
    let AdapterFiles::Peft { weights, .. } = peft_files(&json!({}), &tiny_tensors()) else { unreachable!() };
    let config = config_json(&json!({
        "target_modules": r".*\.(?:q|v)_proj", "rank_pattern": {"[qv]_proj": 2}, "alpha_pattern": {"layers.0.*": 8},
        "use_rslora": true, "layers_to_transform": null,
    }));
    let accepted = survivors(|random| {
        let mut config = config.clone();
        mutate(&mut config, random);
        AdapterFiles::Peft { config, weights: weights.clone() }
    });
    assert!(accepted > 0 && accepted < MUTATIONS, "{accepted} of {MUTATIONS} accepted");
}

#[test]
fn damaged_gguf_files_never_panic() {
    let file = Recipe::tiny(&tiny_info(), &[(0, Linear::Q), (1, Linear::Down)]).file();
    let accepted = survivors(|random| {
        let mut file = file.clone();
        mutate(&mut file, random);
        AdapterFiles::Gguf(file)
    });
    assert!(accepted > 0 && accepted < MUTATIONS, "{accepted} of {MUTATIONS} accepted");
}
