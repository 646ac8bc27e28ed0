//! How fast a line moves, and so when a refused client should come back.
//!
//! Pure; the fair queue keeps one per tenant and one for the node.

use std::time::{Duration, Instant};

use shared::id::RequestId;

/// Shortest hint: below this, clients' own back-off (0.5 s and up) is longer anyway.
pub const RETRY_AFTER_MIN: Duration = Duration::from_secs(1);
/// Longest hint. The common client SDKs ignore hints above 120 s and then do not retry at all.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(60);
/// Weight of the newest interval in the moving average: the last eight or so picks count.
const NEWEST: f64 = 0.125;

/// Moving average of the time between picks.
#[derive(Debug, Clone, Copy, Default)]
pub struct DrainRate {
    last: Option<Instant>,
    interval_s: f64,
}

impl DrainRate {
    /// A request left the line at `now`.
    pub fn record(&mut self, now: Instant) {
        if let Some(last) = self.last {
            let interval_s = now.saturating_duration_since(last).as_secs_f64();
            self.interval_s = if self.interval_s == 0.0 {
                interval_s
            } else {
                self.interval_s + NEWEST * (interval_s - self.interval_s)
            };
        }
        self.last = Some(now);
    }

    /// When a line of `waiting` requests will be half gone, spread by ±25 % per request so that refused
    /// clients do not come back together. The spread is a function of the id: no randomness here.
    pub fn retry_after(&self, waiting: usize, id: RequestId) -> Duration {
        let estimate_s = self.interval_s * waiting as f64 / 2.0;
        let clamped_s = estimate_s.clamp(RETRY_AFTER_MIN.as_secs_f64(), RETRY_AFTER_MAX.as_secs_f64());
        let spread = 0.75 + (id.0 % 501) as f64 / 1000.0;
        Duration::from_secs_f64(clamped_s * spread)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::clock::{Clock, ManualClock};

    #[test]
    fn the_hint_follows_the_speed_of_the_line_within_its_limits() {
        let clock = ManualClock::default();
        let mut rate = DrainRate::default();
        assert!(rate.retry_after(64, RequestId(250)) >= Duration::from_secs_f64(0.99));
        for _ in 0..50 {
            rate.record(clock.now());
            clock.advance(Duration::from_millis(500));
        }
        let hint_s = rate.retry_after(64, RequestId(250)).as_secs_f64();
        assert!((hint_s - 16.0).abs() < 0.1, "64 waiting, 2 per second, half of it: 16 s, found {hint_s}");
        assert!(rate.retry_after(1_000_000, RequestId(500)) <= RETRY_AFTER_MAX.mul_f64(1.26));
    }

    #[test]
    fn refused_clients_are_spread_by_a_quarter_each_way() {
        let rate = DrainRate { last: None, interval_s: 1.0 };
        let hints: Vec<f64> = (0..1000).map(|id| rate.retry_after(20, RequestId(id)).as_secs_f64()).collect();
        let (low, high) = hints.iter().fold((f64::MAX, 0.0_f64), |(low, high), &h| (low.min(h), high.max(h)));
        assert!((7.5..7.6).contains(&low) && (12.4..=12.5).contains(&high), "{low} … {high}");
    }
}
