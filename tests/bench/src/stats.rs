//! What many numbers say: percentiles and evenness.

use serde::Serialize;

/// A distribution, in the unit of its values. All fields are 0 when there was no value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Spread {
    /// Number of values.
    pub n: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

// === impl Spread ===

impl Spread {
    /// Of these values, in any order.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let Some(&max) = values.last() else { return Self::default() };
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let [p50, p95, p99] = [0.5, 0.95, 0.99].map(|p| percentile(&values, p));
        Self { n: values.len(), mean, p50, p95, p99, max }
    }
}

/// The value below which the share `p` of the sorted values lies, between two of them by straight line (type 7
/// of Hyndman and Fan, as numpy does). 0 when there is none.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let at = p * sorted.len().saturating_sub(1) as f64;
    let (low, part) = (at.floor() as usize, at.fract());
    match (sorted.get(low), sorted.get(low + 1)) {
        (Some(a), Some(b)) => a + (b - a) * part,
        (Some(a), None) => *a,
        _ => 0.0,
    }
}

/// Jain's index: (Σx)² / (n Σx²). 1 when all are equal, 1/n when one has everything, 1 for none.
pub fn jain(values: &[f64]) -> f64 {
    let (sum, squares): (f64, f64) = values.iter().fold((0.0, 0.0), |(sum, squares), x| (sum + x, squares + x * x));
    if squares > 0.0 { sum * sum / (values.len() as f64 * squares) } else { 1.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn percentiles_are_numpys() {
        // numpy.percentile([1, 2, 4, 8], [50, 95, 99]) = 3, 7.4, 7.88
        let spread = Spread::of(vec![8.0, 1.0, 4.0, 2.0]);
        assert_eq!((spread.n, spread.mean, spread.max, spread.p50), (4, 3.75, 8.0, 3.0));
        assert!((spread.p95 - 7.4).abs() < 1e-12 && (spread.p99 - 7.88).abs() < 1e-12);
    }

    #[test]
    fn nothing_gives_zeros() {
        assert_eq!(Spread::of(Vec::new()), Spread::default());
        assert_eq!(jain(&[]), 1.0);
    }

    #[test]
    fn jain_is_one_for_equals_and_one_nth_for_a_monopoly() {
        assert!((jain(&[3.0; 7]) - 1.0).abs() < 1e-12);
        assert!((jain(&[5.0, 0.0, 0.0, 0.0]) - 0.25).abs() < 1e-12);
    }

    proptest! {
        #[test]
        fn percentiles_rise_and_stay_inside(values in proptest::collection::vec(0.0_f64..1e6, 1..200)) {
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let s = Spread::of(values);
            prop_assert!(least <= s.p50 && s.p50 <= s.p95 && s.p95 <= s.p99 && s.p99 <= s.max);
        }
    }
}
