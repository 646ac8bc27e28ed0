//! One tenant's copy of an adapter: which it is, and where it is on a node.
//!
//! Queue and adapter cache speak of copies, never of content alone: equal files of two tenants are loaded, kept
//! and forgotten apart, so that neither can notice the other. Not here: who may use a copy (registry), which
//! version it is (its name), and what its weights are.

use std::fmt;

use crate::hash::ContentHash;
use crate::id::TenantId;

/// Which adapter: whose copy of which content.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct AdapterRef {
    /// Who uploaded it; decides which key opens the files.
    pub tenant: TenantId,
    /// The content.
    pub hash: ContentHash,
}

impl AdapterRef {
    /// The copy's identity.
    pub fn id(&self) -> AdapterId {
        let mut hasher = blake3::Hasher::new_derive_key("tenantry 2026 adapter id");
        hasher.update(&(self.tenant.as_str().len() as u64).to_le_bytes());
        hasher.update(self.tenant.as_str().as_bytes());
        hasher.update(&self.hash.0);
        AdapterId(*hasher.finalize().as_bytes())
    }
}

/// Identity of one tenant's copy: a function of tenant and content that reveals neither. Shown as 64 hex digits;
/// also the name of the stored object.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterId(pub [u8; 32]);

impl fmt::Display for AdapterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AdapterId {
    /// The first 12 hex digits, for log lines.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0[..6].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Where an adapter is, as far as a queued request cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// In the engine; may be leased now.
    Ready,
    /// On its way: a slot is assigned, its load is queued or running.
    Loading,
    /// Asked for, but every slot is leased or promised to someone ahead.
    NoSlot,
    /// Nobody asked for it yet, or it was evicted.
    Absent,
    /// It could not be loaded lately, and is asked for again after a back-off. The request is handed out in its
    /// turn, so that its owner can refuse it or let the base answer.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_other_tenants_and_other_content_have_other_identities() {
        let of = |tenant: &str, content: &[u8]| {
            let tenant = tenant.parse().expect("tenant");
            AdapterRef { tenant, hash: ContentHash::of(content) }.id()
        };
        assert_eq!(of("acme", b"a"), of("acme", b"a"));
        assert_ne!(of("acme", b"a"), of("baker", b"a"));
        assert_ne!(of("acme", b"a"), of("acme", b"b"));
        let id = of("acme", b"a");
        assert!(id.to_string().len() == 64 && id.to_string().starts_with(&format!("{id:?}")));
    }
}
