//! A token bucket in exact integers (core). Used by [`crate::admission`]; knows no tenants and no clock.
//!
//! The level is counted in units of 1/60,000,000,000 token: a rate of n tokens a minute adds n units a
//! nanosecond, so refilling in any number of steps gives the same level as in one.

use std::time::{Duration, Instant};

/// Units of one token: nanoseconds of a minute.
const UNITS_PER_TOKEN: i128 = 60_000_000_000;

/// How much a tenant may take at once and per minute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Tokens a full bucket holds; at least 1.
    pub burst: u64,
    /// Tokens that flow in per minute; at least 1.
    pub per_minute: u64,
}

/// A bucket that fills with time and is drained by use.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    rate: Rate,
    /// May be negative after use beyond the reservation.
    level_units: i128,
    at: Instant,
}

impl TokenBucket {
    /// A full bucket. A burst or rate of 0 counts as 1, so that it always fills again.
    pub fn new(rate: Rate, now: Instant) -> Self {
        let rate = Rate { burst: rate.burst.max(1), per_minute: rate.per_minute.max(1) };
        Self { rate, level_units: units(rate.burst), at: now }
    }

    /// Lets the time up to `now` flow in, at `rate` from now on. What was taken stays taken.
    pub fn refill(&mut self, rate: Rate, now: Instant) {
        let elapsed_ns = i128::try_from(now.saturating_duration_since(self.at).as_nanos()).unwrap_or(i128::MAX >> 64);
        self.level_units = self.level_units.saturating_add(elapsed_ns.saturating_mul(self.rate.per_minute.into()));
        self.at = self.at.max(now);
        self.rate = Rate { burst: rate.burst.max(1), per_minute: rate.per_minute.max(1) };
        self.level_units = self.level_units.min(units(self.rate.burst));
    }

    /// How long until `n` tokens can be taken; zero if now. `None` if a full bucket does not hold as many.
    pub fn wait_for(&self, n: u64) -> Option<Duration> {
        (n <= self.rate.burst).then(|| self.time_to(units(n)))
    }

    /// Takes `n` tokens, below zero if need be: the caller asked [`Self::wait_for`] or settles what was used.
    pub fn take(&mut self, n: u64) {
        self.level_units = self.level_units.saturating_sub(units(n));
    }

    /// Puts `n` tokens back, at most to the brim.
    pub fn put_back(&mut self, n: u64) {
        self.level_units = self.level_units.saturating_add(units(n)).min(units(self.rate.burst));
    }

    /// Whole tokens that can be taken now.
    pub fn remaining(&self) -> u64 {
        u64::try_from(self.level_units / UNITS_PER_TOKEN).unwrap_or(0)
    }

    /// How long until the bucket is full again.
    pub fn reset_in(&self) -> Duration {
        self.time_to(units(self.rate.burst))
    }

    /// Rounded up to a nanosecond, so that after exactly this long the level is reached.
    fn time_to(&self, level_units: i128) -> Duration {
        let missing = (level_units - self.level_units).max(0);
        let rate = i128::from(self.rate.per_minute);
        let ns = missing / rate + i128::from(missing % rate != 0);
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }
}

fn units(tokens: u64) -> i128 {
    i128::from(tokens) * UNITS_PER_TOKEN
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::now;
    use proptest::prelude::*;

    const RATE: Rate = Rate { burst: 3, per_minute: 60 };

    #[test]
    fn a_full_bucket_gives_its_burst_and_then_its_rate() {
        let start = now();
        let mut bucket = TokenBucket::new(RATE, start);
        for _ in 0..3 {
            assert_eq!(bucket.wait_for(1), Some(Duration::ZERO));
            bucket.take(1);
        }
        assert_eq!(bucket.wait_for(1), Some(Duration::from_secs(1)));
        assert_eq!((bucket.remaining(), bucket.reset_in()), (0, Duration::from_secs(3)));
        bucket.refill(RATE, start + Duration::from_millis(999));
        assert_eq!(bucket.wait_for(1), Some(Duration::from_millis(1)));
        bucket.refill(RATE, start + Duration::from_secs(1));
        assert_eq!(bucket.wait_for(1), Some(Duration::ZERO));
    }

    #[test]
    fn more_than_a_full_bucket_is_never_available() {
        assert_eq!(TokenBucket::new(RATE, now()).wait_for(4), None);
    }

    #[test]
    fn a_shrunken_contract_binds_at_once_and_a_grown_one_gives_nothing_away() {
        let start = now();
        let mut bucket = TokenBucket::new(RATE, start);
        bucket.refill(Rate { burst: 1, per_minute: 60 }, start);
        assert_eq!(bucket.remaining(), 1);
        bucket.refill(RATE, start);
        assert_eq!(bucket.remaining(), 1);
    }

    proptest! {
        #[test]
        fn waiting_exactly_as_long_as_told_is_enough_and_a_nanosecond_less_is_not(
            burst in 1_u64..1_000_000, per_minute in 1_u64..u64::from(u32::MAX), used in 0_u64..2_000_000, want in 1_u64..1_000_000,
        ) {
            let (start, rate) = (now(), Rate { burst, per_minute });
            let mut bucket = TokenBucket::new(rate, start);
            bucket.take(used);
            let want = want.min(burst);
            let wait = bucket.wait_for(want).expect("not more than the burst");
            let mut early = bucket.clone();
            bucket.refill(rate, start + wait);
            prop_assert_eq!(bucket.wait_for(want), Some(Duration::ZERO));
            if wait > Duration::ZERO {
                early.refill(rate, start + wait - Duration::from_nanos(1));
                prop_assert!(early.wait_for(want) > Some(Duration::ZERO));
            }
        }

        #[test]
        fn refilling_in_steps_equals_refilling_at_once(steps in proptest::collection::vec(0_u64..10_000_000_000, 0..20)) {
            let (start, rate) = (now(), Rate { burst: 1_000_000, per_minute: 977 });
            let mut many = TokenBucket::new(rate, start);
            many.take(1_000_000);
            let mut once = many.clone();
            let mut at = start;
            for ns in steps {
                at += Duration::from_nanos(ns);
                many.refill(rate, at);
            }
            once.refill(rate, at);
            prop_assert_eq!(many.level_units, once.level_units);
        }
    }
}
