//! Which versions of everything between nodes there are, and how two ends agree on one.
//!
//! A program speaks two: its own and the one before, for the time of an upgrade. Two ends take the newest that both
//! speak: TLS agrees on it (ALPN) before a byte of ours is sent, and every frame says it again. What a version lacks
//! is not sent to those who speak it; what changed since is converted.

use std::fmt;

/// A version of everything between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// Without renewal of certificates; a hello says nothing of versions.
    V1 = 1,
    /// A hello says which versions a node speaks and whether it has the authority; certificates are renewed.
    V2 = 2,
}

// === impl Version ===

impl Version {
    /// Newest first: in this order they are offered.
    pub const ALL: [Self; 2] = [Self::V2, Self::V1];
    /// What this program speaks with its like.
    pub const NEWEST: Self = Self::ALL[0];
    /// The oldest it understands.
    pub const OLDEST: Self = Self::ALL[Self::ALL.len() - 1];

    /// As it stands in frames.
    pub const fn number(self) -> u16 {
        self as u16
    }

    /// The protocol that TLS agrees on.
    pub const fn alpn(self) -> &'static [u8] {
        match self {
            Self::V1 => b"tenantry-node/1",
            Self::V2 => b"tenantry-node/2",
        }
    }

    /// The version of a protocol that TLS has agreed on; `None` for a protocol that is not one between nodes.
    pub fn of_alpn(alpn: &[u8]) -> Option<Self> {
        Self::ALL.into_iter().find(|version| version.alpn() == alpn)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.number())
    }
}

/// The versions that a node speaks, as it says itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spoken {
    /// Number of the oldest.
    pub oldest: u16,
    /// Number of the newest: below [`Version::NEWEST`], the node is yet to be upgraded.
    pub newest: u16,
}

impl Spoken {
    /// By this program.
    pub const OURS: Self = Self { oldest: Version::OLDEST.number(), newest: Version::NEWEST.number() };
}

impl fmt::Display for Spoken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} to {}", self.oldest, self.newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn protocols_name_their_versions() {
        for version in Version::ALL {
            assert_eq!(version.alpn(), format!("tenantry-node/{version}").as_bytes());
            assert_eq!(Version::of_alpn(version.alpn()), Some(version));
        }
        for other in [&b"tenantry-node/0"[..], b"tenantry-node/3", b"tenantry-node/1\0", b"", crate::JOIN_ALPN] {
            assert_eq!(Version::of_alpn(other), None);
        }
        assert!(Version::ALL.is_sorted_by(|a, b| a > b));
        assert_eq!(Version::NEWEST.number() - Version::OLDEST.number(), 1, "its own and the one before");
    }
}
