//! Virtual token counters: how much service a class, tenant or route had, divided by its weight.
//!
//! The one with the smallest counter is served next (VTC, Sheng et al., OSDI'24, section 4). Integers, so
//! that the order is exact and the same on every machine.

/// Service received, in weighted tokens over weight, as 48.16 fixed point. 2^48 tokens at weight 1 are
/// eight thousand years at 1,000 tokens a second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VirtualTime(u64);

/// Fraction bits: a token still moves the counter of a tenant of weight 65,536.
const FRACTION_BITS: u32 = 16;

impl VirtualTime {
    /// `tokens` of service to someone of `weight` (0 counts as 1).
    pub fn of(tokens: u64, weight: u32) -> Self {
        let scaled = (u128::from(tokens) << FRACTION_BITS) / u128::from(weight.max(1));
        Self(u64::try_from(scaled).unwrap_or(u64::MAX))
    }

    /// Later by `by`.
    #[must_use]
    pub fn plus(self, by: Self) -> Self {
        Self(self.0.saturating_add(by.0))
    }

    /// Earlier by `by`, not before the beginning.
    #[must_use]
    pub fn minus(self, by: Self) -> Self {
        Self(self.0.saturating_sub(by.0))
    }

    /// Whole tokens at weight 1, for people and metrics.
    pub fn tokens(self) -> u64 {
        self.0 >> FRACTION_BITS
    }
}
