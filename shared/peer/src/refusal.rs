//! Who was turned away and why: counted, and told to the audit log.
//!
//! Called where connections are accepted and invitations redeemed. Whoever is refused learns as little as possible.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use shared::clock::Clock;

/// Why somebody is not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Refusal {
    /// No certificate was shown.
    NoCertificate,
    /// The certificate is no longer, or not yet, valid.
    Expired,
    /// Some other authority signed the certificate.
    WrongAuthority,
    /// The certificate is valid but names no node of this cluster: a client's, or a node that was taken out.
    NotANode,
    /// The certificate or the invitation is another node's than the one that is claimed.
    OtherNode,
    /// A node of another cluster, or one that holds another cluster's key.
    OtherCluster,
    /// Not our protocol: wrong version, broken frames, too slow to say hello.
    Protocol,
    /// The handshake failed otherwise.
    Handshake,
    /// The invitation was never given, or has been used.
    TokenUnknown,
    /// The invitation is too old.
    TokenExpired,
    /// Too many bad invitations from one address.
    TooMany,
}

impl Refusal {
    /// All of them, in declaration order.
    pub const ALL: [Self; 11] = [
        Self::NoCertificate,
        Self::Expired,
        Self::WrongAuthority,
        Self::NotANode,
        Self::OtherNode,
        Self::OtherCluster,
        Self::Protocol,
        Self::Handshake,
        Self::TokenUnknown,
        Self::TokenExpired,
        Self::TooMany,
    ];

    /// For logs and metric labels.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NoCertificate => "no_certificate",
            Self::Expired => "expired",
            Self::WrongAuthority => "wrong_authority",
            Self::NotANode => "not_a_node",
            Self::OtherNode => "other_node",
            Self::OtherCluster => "other_cluster",
            Self::Protocol => "protocol",
            Self::Handshake => "handshake",
            Self::TokenUnknown => "token_unknown",
            Self::TokenExpired => "token_expired",
            Self::TooMany => "too_many",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Lines in the audit log per second: who floods the port must not flood the disk.
const LINES_MAX: u32 = 20;
/// For how long that counts.
const WINDOW: Duration = Duration::from_secs(1);

/// How often each [`Refusal`] happened since the process started.
pub struct Refusals {
    counts: [AtomicU64; Refusal::ALL.len()],
    clock: Arc<dyn Clock>,
    lines: Mutex<Lines>,
}

/// The audit log in the present window.
struct Lines {
    since: Instant,
    n_said: u32,
    /// Since the last one that was said.
    n_unsaid: u64,
}

// === impl Refusals ===

impl Refusals {
    /// None so far.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let lines = Mutex::new(Lines { since: clock.now(), n_said: 0, n_unsaid: 0 });
        Self { counts: Default::default(), clock, lines }
    }

    /// So far.
    pub fn count(&self, reason: Refusal) -> u64 {
        self.counts[reason as usize].load(Ordering::Relaxed)
    }

    /// Counts one and tells the audit log, or, of many in a second, that there were many; `from` says where it came
    /// from, `detail` what was seen.
    pub fn note(&self, reason: Refusal, from: &dyn fmt::Display, detail: &dyn fmt::Display) {
        self.counts[reason as usize].fetch_add(1, Ordering::Relaxed);
        let next = self.lines.lock().unwrap_or_else(PoisonError::into_inner).next(self.clock.now());
        if let Some(n_unsaid) = next {
            tracing::warn!(target: "audit", %reason, %from, %detail, n_unsaid, "refused a peer");
        }
    }
}

impl Lines {
    /// Whether one more is said, and how many were not before it.
    fn next(&mut self, now: Instant) -> Option<u64> {
        if now.saturating_duration_since(self.since) >= WINDOW {
            (self.since, self.n_said) = (now, 0);
        }
        if self.n_said >= LINES_MAX {
            self.n_unsaid += 1;
            return None;
        }
        self.n_said += 1;
        Some(std::mem::take(&mut self.n_unsaid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::clock::SystemClock;

    #[test]
    fn every_reason_is_counted_on_its_own() {
        let refusals = Refusals::new(Arc::new(SystemClock));
        for (reason, times) in Refusal::ALL.into_iter().zip(1..) {
            (0..times).for_each(|_| refusals.note(reason, &"somewhere", &"a test"));
        }
        for (reason, times) in Refusal::ALL.into_iter().zip(1..) {
            assert_eq!(refusals.count(reason), times, "{reason}");
        }
    }

    #[test]
    fn of_many_in_a_second_the_log_says_how_many_it_left_out() {
        let start = SystemClock.now();
        let mut lines = Lines { since: start, n_said: 0, n_unsaid: 0 };
        let said: Vec<_> = (0..1000).map_while(|_| lines.next(start)).collect();
        assert_eq!(said, [0; LINES_MAX as usize]);
        assert_eq!((0..99).filter_map(|_| lines.next(start)).count(), 0);
        assert_eq!(lines.next(start + WINDOW), Some(100));
        assert_eq!(lines.next(start + WINDOW), Some(0));
    }
}
