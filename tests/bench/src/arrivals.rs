//! When requests come: each stream as soon as its last answer is complete (closed loop), or at random times of
//! a given rate whatever the server does (Poisson process).

use std::time::Duration;

use crate::random::Random;

/// The process of a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arrivals {
    /// This many streams ask one request after the other.
    Closed {
        /// Streams over all tenants; ignored when they are pinned to tenants.
        n_streams: usize,
    },
    /// Independent requests.
    Poisson {
        /// Mean requests per second.
        rate_per_s: f64,
    },
}

/// Times of a Poisson process, counted from the start of the run.
#[derive(Debug, Clone)]
pub struct PoissonTimes {
    random: Random,
    rate_per_s: f64,
    at_s: f64,
}

// === impl PoissonTimes ===

impl PoissonTimes {
    /// A process of this rate, which must be positive.
    pub fn new(rate_per_s: f64, random: Random) -> Self {
        Self { random, rate_per_s, at_s: 0.0 }
    }
}

impl Iterator for PoissonTimes {
    type Item = Duration;

    /// Gaps are exponential: −ln(1 − u) / rate.
    fn next(&mut self) -> Option<Duration> {
        self.at_s += -(1.0 - self.random.unit()).ln() / self.rate_per_s;
        Some(Duration::from_secs_f64(self.at_s))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_per_second_have_mean_and_variance_of_the_rate() {
        let mut counts = vec![0_u32; 4000];
        for at in PoissonTimes::new(5.0, Random::new(3)) {
            let Some(count) = counts.get_mut(at.as_secs() as usize) else { break };
            *count += 1;
        }
        let n = counts.len() as f64;
        let mean = counts.iter().map(|&c| f64::from(c)).sum::<f64>() / n;
        let variance = counts.iter().map(|&c| (f64::from(c) - mean).powi(2)).sum::<f64>() / n;
        assert!((mean - 5.0).abs() < 0.15, "{mean}");
        assert!((variance - 5.0).abs() < 0.5, "{variance}");
    }
}
