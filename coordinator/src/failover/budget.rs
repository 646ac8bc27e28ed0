//! How much may be tried twice (core): retries, challengers and suspected stalls of all requests of an entry node
//! together stay within a tenth of the fresh requests, so that trouble is never answered with twice the load.
//! Shared by the requests of a node behind one short lock; confirmed deaths and drains are not paid from it.

use std::time::Instant;

/// What a fresh request pays in.
const PER_REQUEST: f64 = 0.1;

/// What time pays in, per second: a quiet node may retry, too.
const PER_SECOND: f64 = 1.0;

/// Most that is saved: a quiet hour does not pay for a storm.
const SAVED_MAX: f64 = 50.0;

/// Retries that are left.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    saved: f64,
    at: Instant,
}

// === impl RetryBudget ===

impl RetryBudget {
    /// A budget with ten retries to start with.
    pub fn new(now: Instant) -> Self {
        Self { saved: 10.0, at: now }
    }

    /// A fresh request was admitted.
    pub fn deposit(&mut self) {
        self.saved = (self.saved + PER_REQUEST).min(SAVED_MAX);
    }

    /// Takes one retry; false when none is left.
    pub fn withdraw(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.saved = (self.saved + passed * PER_SECOND).min(SAVED_MAX);
        let enough = self.saved >= 1.0;
        if enough {
            self.saved -= 1.0;
        }
        enough
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::now;

    #[test]
    fn retries_stay_within_a_tenth_of_the_requests_and_one_a_second() {
        let start = now();
        let mut budget = RetryBudget::new(start);
        let mut granted = 0;
        for i in 0..10_000_u32 {
            budget.deposit();
            granted += u32::from(budget.withdraw(start + Duration::from_millis(u64::from(i))));
        }
        assert!((1000..=1000 + 10 + 10 + 1).contains(&granted), "{granted} of 10,000 in 10 s");
    }

    #[test]
    fn savings_are_bounded() {
        let start = now();
        let mut budget = RetryBudget::new(start);
        let later = start + Duration::from_secs(86_400);
        assert_eq!((0..1000).filter(|_| budget.withdraw(later)).count(), 50);
    }
}
