//! How often one address may bring a bad invitation: a pure core, asked by [`super::door`].
//!
//! Secrets of 256 bits are not guessed; this keeps those who try from costing anything.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Bad invitations from one address within [`WINDOW`]: an operator's typing errors.
pub(super) const FAILURES_MAX: u32 = 10;
/// How long they count.
pub(super) const WINDOW: Duration = Duration::from_secs(60);
/// Addresses kept in mind; of more, the one that failed longest ago is forgotten.
const ADDRESSES_MAX: usize = 1024;

struct Failures {
    count: u32,
    since: Instant,
}

/// Who has failed lately.
#[derive(Default)]
pub(super) struct Bounds(BTreeMap<IpAddr, Failures>);

// === impl Bounds ===

impl Bounds {
    /// Whether somebody may try.
    pub(super) fn may(&mut self, from: IpAddr, now: Instant) -> bool {
        let from = subject(from);
        if self.0.get(&from).is_some_and(|failures| now.saturating_duration_since(failures.since) >= WINDOW) {
            self.0.remove(&from);
        }
        self.0.get(&from).is_none_or(|failures| failures.count < FAILURES_MAX)
    }

    pub(super) fn failed(&mut self, from: IpAddr, now: Instant) {
        let from = subject(from);
        if self.0.len() >= ADDRESSES_MAX && !self.0.contains_key(&from) {
            let oldest = self.0.iter().min_by_key(|(_, failures)| failures.since).map(|(address, _)| *address);
            oldest.map(|address| self.0.remove(&address));
        }
        let failures = self.0.entry(from).or_insert(Failures { count: 0, since: now });
        failures.count = failures.count.saturating_add(1);
    }
}

/// Whoever has one IPv6 address has the whole network of 64 bits behind it.
fn subject(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into(),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::clock::{Clock, SystemClock};

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn an_address_that_fails_too_often_has_to_wait_and_others_do_not() {
        let (mut bounds, now) = (Bounds::default(), SystemClock.now());
        let (bad, good) = (address("10.0.0.1"), address("10.0.0.2"));
        for _ in 0..FAILURES_MAX {
            assert!(bounds.may(bad, now));
            bounds.failed(bad, now);
        }
        assert!(!bounds.may(bad, now));
        assert!(!bounds.may(bad, now));
        assert!(bounds.may(good, now));
        assert!(!bounds.may(address("::ffff:10.0.0.1"), now), "the same address");
        assert!(bounds.may(bad, now + WINDOW));
    }

    #[test]
    fn a_network_of_ipv6_addresses_is_one() {
        let (mut bounds, now) = (Bounds::default(), SystemClock.now());
        for last in 0..FAILURES_MAX {
            bounds.failed(address(&format!("2001:db8::{last:x}")), now);
        }
        assert!(!bounds.may(address("2001:db8::ffff"), now));
        assert!(bounds.may(address("2001:db8:0:1::1"), now));
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_is_forgotten() {
        let (mut bounds, start) = (Bounds::default(), SystemClock.now());
        for n in 0..3 * ADDRESSES_MAX as u32 {
            bounds.failed(IpAddr::from(n.to_be_bytes()), start + Duration::from_millis(n.into()));
        }
        assert_eq!(bounds.0.len(), ADDRESSES_MAX);
        assert!(bounds.0.contains_key(&IpAddr::from((3 * ADDRESSES_MAX as u32 - 1).to_be_bytes())));
    }
}
