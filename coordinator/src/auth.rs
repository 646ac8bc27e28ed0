//! Credentials: how API keys are made, spelled, hashed and compared, and what a valid one proves.
//!
//! A key is `tnt_<key id: 16 hex>_<secret: 43 base64url>`. The registry stores a BLAKE3 hash of it keyed with
//! a pepper derived from the cluster key, so a copied database is useless without that file. The secret has
//! 256 random bits; nothing slower than one keyed hash is needed. The prefix lets scanners find leaked keys.
//!
//! Called by the registry's snapshot (tenants) and the admin port (operator). Rates and contracts are not here.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::{InvalidId, TenantId};
use shared::seal::key_file::{self, KeyFileError};
use shared::seal::{ClusterKey, TenantKey};
use shared::tenant::TenantContract;

use crate::registry::snapshot::TenantView;

const PREFIX: &str = "tnt_";
const ADMIN_PREFIX: &str = "tnt_admin_";
const KEY_ID_CHARS: usize = 16;
const SECRET_BYTES: usize = 32;
/// 32 bytes in base64url without padding.
const SECRET_CHARS: usize = 43;
/// Characters of a whole tenant key.
pub const API_KEY_CHARS: usize = PREFIX.len() + KEY_ID_CHARS + 1 + SECRET_CHARS;

/// What a tenant's key may do. None of them reaches the admin port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scope {
    /// Send requests to models.
    Infer,
    /// Upload adapter versions and point tasks at them.
    Adapters,
    /// Read the tenant's own metrics and usage.
    Metrics,
}

impl Scope {
    /// The name used in records and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Infer => "infer",
            Self::Adapters => "adapters",
            Self::Metrics => "metrics",
        }
    }
}

/// The public half of a key: names it in lists, logs and revocations.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct KeyId(pub [u8; 8]);

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for KeyId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let plain = text.len() == KEY_ID_CHARS && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        let number = if plain { u64::from_str_radix(text, 16).ok() } else { None };
        number.map(|number| Self(number.to_be_bytes())).ok_or_else(|| InvalidId {
            what: "key id",
            found: text.chars().take(80).collect(),
            rule: "use 16 hex digits",
        })
    }
}

impl TryFrom<String> for KeyId {
    type Error = InvalidId;

    fn try_from(text: String) -> Result<Self, InvalidId> {
        text.parse()
    }
}

impl From<KeyId> for String {
    fn from(id: KeyId) -> String {
        id.to_string()
    }
}

/// Keyed hash of a key: what is stored instead of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct KeyHash(ContentHash);

impl KeyHash {
    fn matches(&self, other: &Self) -> bool {
        self.0.0.ct_eq(&other.0.0).into()
    }
}

/// The key of the key hashes; derived from the cluster key, so all nodes agree and it is stored nowhere.
pub struct Pepper(Zeroizing<[u8; 32]>);

impl Pepper {
    /// The pepper of a cluster.
    pub fn of(cluster: &ClusterKey) -> Self {
        Self(cluster.derive("tenantry 2026 api key pepper"))
    }

    fn hash(&self, id: KeyId, secret: &str) -> KeyHash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&id.0);
        hasher.update(secret.as_bytes());
        KeyHash(ContentHash(*hasher.finalize().as_bytes()))
    }

    /// A hash that no key has: compared against when a key id is unknown, so that both cases cost the same.
    pub(crate) fn decoy(&self) -> KeyHash {
        KeyHash(ContentHash(blake3::derive_key("tenantry 2026 decoy key hash", self.0.as_slice())))
    }
}

impl fmt::Debug for Pepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pepper(..)")
    }
}

/// What the registry stores about a key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyRecord {
    /// Public half.
    pub id: KeyId,
    /// Keyed hash of the whole.
    pub hash: KeyHash,
    /// What it may do.
    pub scopes: BTreeSet<Scope>,
    /// Wall seconds since 1970.
    pub created_at_s: u64,
    /// Wall seconds since 1970 from which it is refused; `None` never expires.
    pub expires_at_s: Option<u64>,
    /// When it was revoked; kept so that its use can be told from an unknown key.
    pub revoked_at_s: Option<u64>,
}

impl KeyRecord {
    /// Whether the key still opens anything.
    pub fn is_live(&self, now_s: u64) -> bool {
        self.revoked_at_s.is_none() && self.expires_at_s.is_none_or(|at| now_s < at)
    }
}

/// A whole API key, known only to who created it. Shown once, stored nowhere, wiped on drop.
pub struct ApiKey(Zeroizing<String>);

impl ApiKey {
    /// A fresh key and the record to store for it.
    pub fn generate(
        pepper: &Pepper,
        scopes: BTreeSet<Scope>,
        created_at_s: u64,
        expires_at_s: Option<u64>,
    ) -> (Self, KeyRecord) {
        let mut id = [0_u8; 8];
        getrandom::fill(&mut id).expect("the operating system provides randomness");
        let (id, secret) = (KeyId(id), random_secret());
        let hash = pepper.hash(id, &secret);
        let text = Zeroizing::new(format!("{PREFIX}{id}_{}", secret.as_str()));
        (Self(text), KeyRecord { id, hash, scopes, created_at_s, expires_at_s, revoked_at_s: None })
    }

    /// The text to hand to the tenant, once.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(..)")
    }
}

fn random_secret() -> Zeroizing<String> {
    let mut bytes = Zeroizing::new([0_u8; SECRET_BYTES]);
    getrandom::fill(bytes.as_mut_slice()).expect("the operating system provides randomness");
    Zeroizing::new(URL_SAFE_NO_PAD.encode(bytes.as_slice()))
}

/// Splits a presented key; `None` if it does not have the form of one.
fn parse(presented: &str) -> Option<(KeyId, &str)> {
    if presented.len() != API_KEY_CHARS || !presented.is_ascii() {
        return None;
    }
    let (id, rest) = presented.strip_prefix(PREFIX)?.split_at(KEY_ID_CHARS);
    Some((id.parse().ok()?, rest.strip_prefix('_')?))
}

/// Finds who a presented key belongs to. `find` returns the stored record of a key id.
///
/// Costs one keyed hash and one constant-time comparison whether or not the key id exists.
pub(crate) fn verify<'a, T>(
    pepper: &Pepper,
    decoy: &KeyHash,
    presented: &str,
    now_s: u64,
    find: impl FnOnce(KeyId) -> Option<(&'a KeyRecord, T)>,
) -> Result<(&'a KeyRecord, T), AuthError> {
    let (id, secret) = parse(presented).ok_or(AuthError::Invalid)?;
    let computed = pepper.hash(id, secret);
    let found = find(id);
    let stored = found.as_ref().map_or(decoy, |(record, _)| &record.hash);
    let matches = computed.matches(stored);
    let (record, owner) = found.filter(|_| matches).ok_or(AuthError::Invalid)?;
    // Only the holder of the secret learns why it stopped working.
    if record.revoked_at_s.is_some() {
        Err(AuthError::Revoked)
    } else if !record.is_live(now_s) {
        Err(AuthError::Expired)
    } else {
        Ok((record, owner))
    }
}

/// Why a credential proves nothing. All are 401 `invalid_api_key`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AuthError {
    /// Unknown, malformed or wrong: these look the same.
    #[error("the API key is not valid; hint: send `Authorization: Bearer tnt_…` with a key your operator gave you")]
    Invalid,
    /// The right secret of a revoked key.
    #[error("this API key was revoked; hint: ask your operator for a new one")]
    Revoked,
    /// The right secret of a key past its end.
    #[error("this API key has expired; hint: ask your operator for a new one")]
    Expired,
}

impl From<AuthError> for RequestError {
    fn from(error: AuthError) -> Self {
        Self::new(ErrorKind::Unauthenticated, "invalid_api_key", error.to_string())
    }
}

/// Proof that a request comes from a tenant. Only a registry snapshot makes one, from a valid key; nothing
/// else in a request can name a tenant.
#[derive(Clone)]
pub struct AuthedTenant {
    view: Arc<TenantView>,
    key_id: KeyId,
    scopes: BTreeSet<Scope>,
}

impl AuthedTenant {
    pub(crate) fn new(view: Arc<TenantView>, key: &KeyRecord) -> Self {
        Self { view, key_id: key.id, scopes: key.scopes.clone() }
    }

    /// Who.
    pub fn tenant(&self) -> &TenantId {
        &self.contract().tenant
    }

    /// The contract at the moment of authentication, stamped with its epoch.
    pub fn contract(&self) -> &Arc<TenantContract> {
        &self.view.record().contract
    }

    /// Which key was presented.
    pub fn key_id(&self) -> KeyId {
        self.key_id
    }

    /// What the key may do.
    pub fn scopes(&self) -> &BTreeSet<Scope> {
        &self.scopes
    }

    /// Keys the tenant's prefix cache; a tenant created anew has another one.
    pub fn cache_secret(&self) -> &[u8; 32] {
        self.view.cache_secret()
    }

    /// Seals and opens what the tenant stores.
    pub fn tenant_key(&self) -> &Arc<TenantKey> {
        self.view.key()
    }

    /// Refuses with 403 `insufficient_scope` unless the key may do this.
    ///
    /// # Errors
    /// When the key lacks the scope.
    pub fn require(&self, scope: Scope) -> Result<(), RequestError> {
        if self.scopes.contains(&scope) {
            return Ok(());
        }
        let message = format!("this API key lacks the scope `{}`; hint: use a key that has it", scope.as_str());
        Err(RequestError::new(ErrorKind::Forbidden, "insufficient_scope", message))
    }
}

impl fmt::Debug for AuthedTenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AuthedTenant({}, key {})", self.tenant(), self.key_id)
    }
}

/// The node's check of the operator's credential.
///
/// The credential is a file (`admin.key`, mode 0600, created at first start) and not a registry record: the
/// operator's tools on the machine read it, it works before any tenant exists, and replacing the file and
/// restarting replaces the key. Only its hash stays in memory.
pub struct AdminKey {
    pepper: Pepper,
    hash: KeyHash,
}

/// Proof that a request comes from the operator. Only [`AdminKey::verify`] makes one.
#[derive(Debug, Clone)]
pub struct AuthedAdmin(());

impl AdminKey {
    /// Reads `path`, or creates it with a fresh key.
    ///
    /// # Errors
    /// When the file cannot be used; the message names it and never the key.
    pub fn load_or_create(path: &Path, cluster: &ClusterKey) -> Result<Self, KeyFileError> {
        let fresh = || Zeroizing::new(format!("{ADMIN_PREFIX}{}", random_secret().as_str()));
        let text = key_file::load_or_create(path, fresh)?;
        let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        let is_key = text
            .strip_prefix(ADMIN_PREFIX)
            .is_some_and(|secret| secret.len() == SECRET_CHARS && secret.bytes().all(plain));
        if !is_key {
            let expected = "an admin key (tnt_admin_ and 43 base64url characters)";
            return Err(KeyFileError::Malformed { path: path.to_owned(), expected });
        }
        let pepper = Pepper(cluster.derive("tenantry 2026 admin key pepper"));
        let hash = pepper.hash(KeyId([0; 8]), &text);
        Ok(Self { pepper, hash })
    }

    /// Checks a presented key in constant time.
    ///
    /// # Errors
    /// [`AuthError::Invalid`] for any other text.
    pub fn verify(&self, presented: &str) -> Result<AuthedAdmin, AuthError> {
        // The cut bounds the hashing of a hostile header; no key is that long.
        let presented = if presented.len() > 2 * API_KEY_CHARS { "" } else { presented };
        let matches = self.pepper.hash(KeyId([0; 8]), presented).matches(&self.hash);
        if matches { Ok(AuthedAdmin(())) } else { Err(AuthError::Invalid) }
    }
}

impl fmt::Debug for AdminKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminKey(..)")
    }
}

#[cfg(test)]
mod tests;
