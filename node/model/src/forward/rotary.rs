//! Rotary frequencies of a model (Su et al. 2021), with the long-context rules of its family.

use std::f64::consts::TAU;

use crate::info::{ModelInfo, RopeScaling};

/// Radians per position for each rotary pair, `[head_dim / 2]`: `theta^(-2i / head_dim)`, then the scaling rule.
pub(crate) fn inverse_frequencies(info: &ModelInfo) -> Vec<f64> {
    let plain = (0..info.head_dim / 2).map(|pair| info.rope_theta.powf(-((2 * pair) as f64) / info.head_dim as f64));
    match &info.rope_scaling {
        RopeScaling::None => plain.collect(),
        RopeScaling::Linear { factor } => plain.map(|frequency| frequency / f64::from(*factor)).collect(),
        RopeScaling::Divisors(divisors) => {
            plain.zip(divisors).map(|(frequency, divisor)| frequency / f64::from(*divisor)).collect()
        }
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let [factor, low, high] = [factor, low_freq_factor, high_freq_factor].map(|x| f64::from(*x));
            plain.map(|frequency| llama3(frequency, factor, low, high, f64::from(*original_context))).collect()
        }
    }
}

/// Llama 3.1: frequencies that turn at least `high` times within the original context stay, those that turn at
/// most `low` times are divided by `factor`, and between the two the divided and the plain one are mixed linearly.
fn llama3(frequency: f64, factor: f64, low: f64, high: f64, original_context: f64) -> f64 {
    let turns = original_context * frequency / TAU;
    if turns > high {
        return frequency;
    }
    if turns < low {
        return frequency / factor;
    }
    let kept = (turns - low) / (high - low);
    kept * frequency + (1.0 - kept) * frequency / factor
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama3_scaling_keeps_fast_and_divides_slow_frequencies() {
        // The numbers of Llama 3.1 8B.
        let scaled = |pair: i32| {
            let plain = 500_000_f64.powf(-f64::from(2 * pair) / 128.0);
            (plain, llama3(plain, 8.0, 1.0, 4.0, 8192.0))
        };
        let (plain, kept) = scaled(0);
        assert_eq!(plain, kept);
        let (plain, divided) = scaled(63);
        assert!((plain / divided - 8.0).abs() < 1e-12);
        let (plain, mixed) = scaled(32);
        assert!(mixed < plain && mixed > plain / 8.0);
    }
}
