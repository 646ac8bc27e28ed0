//! How often may a child fail before its failure is ours? (core; ractor has no restart intensity of its own)

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Failures tolerated within [`WINDOW`]: a fault that comes back faster is not cured by restarting.
pub const RESTARTS_MAX: usize = 3;
/// Time over which failures are counted.
pub const WINDOW: Duration = Duration::from_secs(10);

/// What a supervisor does about a failed child.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Start it again.
    Restart,
    /// Give up: the node leaves, its successor serves.
    Escalate,
}

/// Recent failures of one child.
#[derive(Debug, Default)]
pub struct RestartLimiter {
    failures: VecDeque<Instant>,
}

impl RestartLimiter {
    /// The child failed at `now`.
    pub fn on_failure(&mut self, now: Instant) -> Verdict {
        while self.failures.front().is_some_and(|&at| now.saturating_duration_since(at) > WINDOW) {
            self.failures.pop_front();
        }
        self.failures.push_back(now);
        if self.failures.len() > RESTARTS_MAX { Verdict::Escalate } else { Verdict::Restart }
    }
}

#[cfg(test)]
mod tests {
    use shared::clock::{Clock, ManualClock};

    use super::*;

    #[test]
    fn the_fourth_failure_within_the_window_escalates() {
        let clock = ManualClock::default();
        let mut limiter = RestartLimiter::default();
        for _ in 0..RESTARTS_MAX {
            assert_eq!(limiter.on_failure(clock.now()), Verdict::Restart);
            clock.advance(Duration::from_secs(1));
        }
        assert_eq!(limiter.on_failure(clock.now()), Verdict::Escalate);
    }

    #[test]
    fn rare_failures_never_escalate() {
        let clock = ManualClock::default();
        let mut limiter = RestartLimiter::default();
        for _ in 0..100 {
            assert_eq!(limiter.on_failure(clock.now()), Verdict::Restart);
            clock.advance(WINDOW / 2);
        }
    }
}
