//! Who was turned away and why: counted, and told to the audit log.
//!
//! Called where connections are accepted and invitations redeemed. Whoever is refused learns as little as possible.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

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

/// How often each [`Refusal`] happened since the process started.
#[derive(Debug, Default)]
pub struct Refusals([AtomicU64; Refusal::ALL.len()]);

impl Refusals {
    /// So far.
    pub fn count(&self, reason: Refusal) -> u64 {
        self.0[reason as usize].load(Ordering::Relaxed)
    }

    /// Counts one that is not worth a line of its own.
    pub(crate) fn count_only(&self, reason: Refusal) {
        self.0[reason as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// Counts one and tells the audit log; `from` says where it came from, `detail` what was seen.
    pub fn note(&self, reason: Refusal, from: &dyn fmt::Display, detail: &dyn fmt::Display) {
        self.count_only(reason);
        tracing::warn!(target: "audit", %reason, %from, %detail, "refused a peer");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_is_counted_on_its_own() {
        let refusals = Refusals::default();
        for (reason, times) in Refusal::ALL.into_iter().zip(1..) {
            (0..times).for_each(|_| refusals.note(reason, &"somewhere", &"a test"));
        }
        for (reason, times) in Refusal::ALL.into_iter().zip(1..) {
            assert_eq!(refusals.count(reason), times, "{reason}");
        }
    }
}
