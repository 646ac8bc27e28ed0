//! Who asks next: the tenants of a run and the law by which requests fall on them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::random::Random;

/// One tenant, as the tenants file has it: a JSON array of these.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tenant {
    /// Name in the report.
    pub name: String,
    /// API key; empty sends none.
    #[serde(default, skip_serializing)]
    pub key: String,
    /// The request's `model`.
    pub model: String,
    /// Tenants of one group are summed up together; empty is a group too.
    #[serde(default)]
    pub group: String,
    /// Closed-loop streams of this tenant when requests are pinned; default 1.
    #[serde(default = "one")]
    pub streams: usize,
    /// Prompt tokens; default that of the run.
    #[serde(default)]
    pub prompt_tokens: Option<usize>,
    /// Output tokens; default that of the run.
    #[serde(default)]
    pub output_tokens: Option<usize>,
    /// Further fields of the request body, such as llama.cpp's `lora`.
    #[serde(default)]
    pub body: Map<String, Value>,
}

fn one() -> usize {
    1
}

/// How requests fall on tenants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Draw {
    /// Each tenant has streams of its own and is asked by nobody else.
    Pinned,
    /// Requests take the tenants in the order of the file, over and over; with one stream, one after the other.
    Cycle,
    /// Every request picks a tenant, all alike.
    Uniform,
    /// Every request picks; the tenant at place k (from 1) with a chance proportional to k to the power of −s.
    Zipf(f64),
    /// Every request picks; the first fifth of the tenants gets four fifths of the requests.
    EightyTwenty,
}

// === impl Draw ===

impl FromStr for Draw {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || format!("{text:?} is no law; hint: pinned, cycle, uniform, zipf:1.0 or 80-20");
        match text {
            "pinned" => Ok(Self::Pinned),
            "cycle" => Ok(Self::Cycle),
            "uniform" => Ok(Self::Uniform),
            "80-20" => Ok(Self::EightyTwenty),
            _ => {
                let s: f64 = text.strip_prefix("zipf:").and_then(|s| s.parse().ok()).ok_or_else(unknown)?;
                if s.is_finite() && (0.0..=10.0).contains(&s) { Ok(Self::Zipf(s)) } else { Err(unknown()) }
            }
        }
    }
}

impl fmt::Display for Draw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pinned => f.write_str("pinned"),
            Self::Cycle => f.write_str("cycle"),
            Self::Uniform => f.write_str("uniform"),
            Self::Zipf(s) => write!(f, "zipf:{s}"),
            Self::EightyTwenty => f.write_str("80-20"),
        }
    }
}

/// Picks tenants by a law.
#[derive(Debug, Clone)]
pub struct Picker {
    /// Requests taken so far, where they take turns.
    turn: Option<usize>,
    /// Chance of the places up to and with this one; the last is 1.
    cumulative: Vec<f64>,
}

// === impl Picker ===

impl Picker {
    /// For `n` tenants, at least one. Pinned runs that must pick all the same (open arrivals) pick uniformly.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn new(draw: Draw, n: usize) -> Self {
        assert!(n > 0, "a run has tenants");
        let n_heavy = n.div_ceil(5);
        let weight = |place: usize| match draw {
            Draw::Pinned | Draw::Cycle | Draw::Uniform => 1.0,
            Draw::Zipf(s) => (place as f64 + 1.0).powf(-s),
            Draw::EightyTwenty if place < n_heavy => 0.8 / n_heavy as f64,
            Draw::EightyTwenty => 0.2 / (n - n_heavy) as f64,
        };
        let total: f64 = (0..n).map(weight).sum();
        let mut sum = 0.0;
        let cumulative = (0..n).map(|place| {
            sum += weight(place) / total;
            sum
        });
        Self { turn: (draw == Draw::Cycle).then_some(0), cumulative: cumulative.collect() }
    }

    /// The place of the next tenant.
    pub fn pick(&mut self, random: &mut Random) -> usize {
        if let Some(turn) = &mut self.turn {
            *turn += 1;
            return (*turn - 1) % self.cumulative.len();
        }
        let at = random.unit();
        self.cumulative.partition_point(|&sum| sum <= at).min(self.cumulative.len() - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(draw: Draw, n: usize) -> Vec<f64> {
        let (mut picker, mut random) = (Picker::new(draw, n), Random::new(1));
        let mut counts = vec![0_u32; n];
        (0..100_000).for_each(|_| counts[picker.pick(&mut random)] += 1);
        counts.into_iter().map(|count| f64::from(count) / 100_000.0).collect()
    }

    #[test]
    fn zipf_gives_the_first_of_a_hundred_its_harmonic_share() {
        // 1 / H(100) = 0.19278, half of it for the second.
        let found = shares(Draw::Zipf(1.0), 100);
        assert!((found[0] - 0.1928).abs() < 0.005, "{}", found[0]);
        assert!((found[1] - 0.0964).abs() < 0.005, "{}", found[1]);
    }

    #[test]
    fn eighty_twenty_gives_a_fifth_of_the_tenants_four_fifths() {
        let found = shares(Draw::EightyTwenty, 100);
        let heavy: f64 = found[..20].iter().sum();
        assert!((heavy - 0.8).abs() < 0.01, "{heavy}");
    }

    #[test]
    fn uniform_gives_all_the_same() {
        assert!(shares(Draw::Uniform, 10).iter().all(|share| (share - 0.1).abs() < 0.005));
    }

    #[test]
    fn a_cycle_takes_tenants_in_order() {
        let (mut picker, mut random) = (Picker::new(Draw::Cycle, 3), Random::new(1));
        let places: Vec<usize> = (0..5).map(|_| picker.pick(&mut random)).collect();
        assert_eq!(places, [0, 1, 2, 0, 1]);
    }

    #[test]
    fn one_tenant_gets_everything_under_every_law() {
        for draw in [Draw::Pinned, Draw::Cycle, Draw::Uniform, Draw::Zipf(1.0), Draw::EightyTwenty] {
            assert_eq!(shares(draw, 1), [1.0], "{draw}");
        }
    }

    #[test]
    fn laws_read_what_they_print() {
        for draw in [Draw::Pinned, Draw::Cycle, Draw::Uniform, Draw::Zipf(1.2), Draw::EightyTwenty] {
            assert_eq!(draw.to_string().parse(), Ok(draw));
        }
        for wrong in ["", "zipf", "zipf:", "zipf:nan", "zipf:-1", "20-80"] {
            assert!(wrong.parse::<Draw>().is_err(), "{wrong}");
        }
    }
}
