//! Identifiers: how they are spelled, parsed, shown and ordered.
//!
//! Every identifier is a newtype, so that a task cannot be passed where a tenant is meant. Parsing is
//! strict; an identifier that exists is valid. Stored paths never use these strings (they use content
//! hashes), so the rules serve people, URLs and metric labels.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Longest name of a tenant, task, base or node, in bytes: fits a DNS label.
pub const NAME_BYTES_MAX: usize = 63;

/// Why a string is not an identifier.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {found:?} is not valid: {rule}")]
pub struct InvalidId {
    /// Which identifier was expected.
    pub what: &'static str,
    /// The text found, cut to 80 characters.
    pub found: String,
    /// The rule it breaks.
    pub rule: &'static str,
}

fn invalid(what: &'static str, found: &str, rule: &'static str) -> InvalidId {
    InvalidId { what, found: found.chars().take(80).collect(), rule }
}

/// `[a-z0-9]`, then `[a-z0-9]` or one of `extra`, at most [`NAME_BYTES_MAX`] bytes, not ending in `extra`.
fn check_name(what: &'static str, text: &str, extra: &[u8], rule: &'static str) -> Result<(), InvalidId> {
    let bytes = text.as_bytes();
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let ends_plain = matches!((bytes.first(), bytes.last()), (Some(&a), Some(&z)) if plain(a) && plain(z));
    let all_allowed = bytes.iter().all(|&b| plain(b) || extra.contains(&b));
    if ends_plain && all_allowed && bytes.len() <= NAME_BYTES_MAX { Ok(()) } else { Err(invalid(what, text, rule)) }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $extra:literal, $rule:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                check_name($what, text, $extra, $rule)?;
                Ok(Self(Arc::from(text)))
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0.as_ref().to_owned()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type! {
    /// A customer of the SaaS: `acme`, `baker-legal`.
    TenantId, "tenant id", b"-", "use a-z, 0-9 and inner '-', at most 63 characters"
}
name_type! {
    /// A tenant's own name for a purpose: `support`, `legal.de`. No hyphen, so that adapter names parse.
    TaskName, "task name", b"._", "use a-z, 0-9 and inner '.' or '_', no '-', at most 63 characters"
}
name_type! {
    /// A base model of the cluster: `smollm2`, `llama3.1`. No hyphen, so that adapter names parse.
    BaseName, "base name", b"._", "use a-z, 0-9 and inner '.' or '_', no '-', at most 63 characters"
}
name_type! {
    /// A node of the cluster, as named in `cluster.toml`.
    NodeId, "node name", b"-", "use a-z, 0-9 and inner '-', at most 63 characters"
}
name_type! {
    /// A group of nodes that serves a group of tenants: `default`, `clinics`.
    PoolName, "pool name", b"-", "use a-z, 0-9 and inner '-', at most 63 characters"
}
name_type! {
    /// Where a node stands, as contracts name it: `eu-west`.
    RegionName, "region name", b"-", "use a-z, 0-9 and inner '-', at most 63 characters"
}

/// The full name of an adapter version: `{client}-{task}-{base}-v{major}.{minor}.{patch}` (VER-01).
///
/// `client` is the tenant id. Ordered by client, task, base, then version.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AdapterName {
    /// The owning tenant.
    pub client: TenantId,
    /// What the adapter is for.
    pub task: TaskName,
    /// The base model it was trained on.
    pub base: BaseName,
    /// (major, minor, patch).
    pub version: (u32, u32, u32),
}

impl FromStr for AdapterName {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        const RULE: &str =
            "use {client}-{task}-{base}-v{major}.{minor}.{patch}, for example acme-support-smollm2-v1.0.0";
        let bad = || invalid("adapter name", text, RULE);
        let (stem, version) = text.rsplit_once("-v").ok_or_else(bad)?;
        let (rest, base) = stem.rsplit_once('-').ok_or_else(bad)?;
        let (client, task) = rest.rsplit_once('-').ok_or_else(bad)?;
        let mut parts = version.split('.').map(|part| {
            let canonical = part == "0" || !part.starts_with('0');
            let digits = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
            if canonical && digits { part.parse::<u32>().ok() } else { None }
        });
        let mut next = || parts.next().flatten().ok_or_else(bad);
        let version = (next()?, next()?, next()?);
        if parts.next().is_some() {
            return Err(bad());
        }
        Ok(Self {
            client: client.parse().map_err(|_| bad())?,
            task: task.parse().map_err(|_| bad())?,
            base: base.parse().map_err(|_| bad())?,
            version,
        })
    }
}

impl TryFrom<String> for AdapterName {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<AdapterName> for String {
    fn from(name: AdapterName) -> String {
        name.to_string()
    }
}

impl fmt::Display for AdapterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.version;
        write!(f, "{}-{}-{}-v{major}.{minor}.{patch}", self.client, self.task, self.base)
    }
}

impl fmt::Debug for AdapterName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// One request, unique in the cluster: 128 random bits, shown as 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u128);

impl RequestId {
    /// A fresh id from the operating system's randomness.
    pub fn random() -> Self {
        let mut bytes = [0_u8; 16];
        getrandom::fill(&mut bytes).expect("the operating system provides randomness");
        Self(u128::from_le_bytes(bytes))
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A tenant's line of traffic for one purpose: what is queued, limited and metered together.
///
/// `task` is `None` for requests that go to the base model.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Route {
    /// Who.
    pub tenant: TenantId,
    /// What for; `None` is the base model.
    pub task: Option<TaskName>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapter_names_with_hyphenated_clients_round_trip() {
        for text in ["acme-support-llama3-v2.1.0", "baker-legal-contracts-mistral-v1.3.2", "a-b-c-v0.0.0"] {
            let name: AdapterName = text.parse().expect(text);
            assert_eq!(name.to_string(), text);
        }
        let name: AdapterName = "cedar-clinic-intake-smollm2-v1.0.12".parse().expect("valid");
        assert_eq!(name.client.as_str(), "cedar-clinic");
        assert_eq!(name.task.as_str(), "intake");
        assert_eq!(name.version, (1, 0, 12));
    }

    #[test]
    fn malformed_adapter_names_are_refused() {
        for text in [
            "",
            "acme",
            "acme-support-v1.0.0",
            "acme-support-llama3-v1.0",
            "acme-support-llama3-v1.0.0.0",
            "acme-support-llama3-v01.0.0",
            "acme-support-llama3-v1.0.x",
            "Acme-support-llama3-v1.0.0",
            "-support-llama3-v1.0.0",
            "acme-../etc-llama3-v1.0.0",
            "acme-support-llama3-v1.0.99999999999",
        ] {
            assert!(text.parse::<AdapterName>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn names_reject_paths_case_and_length() {
        for text in ["", ".", "..", "a/b", "A", "a b", "-a", "a-", "ä", &"a".repeat(64)] {
            assert!(text.parse::<TenantId>().is_err(), "{text:?} was accepted");
        }
        assert!("a".repeat(63).parse::<TenantId>().is_ok());
    }
}
