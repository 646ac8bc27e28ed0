//! Envelope encryption of what a tenant stores: which key opens what. [`object`] lays the bytes out.
//!
//! ```text
//! cluster key ── wraps ──► tenant key ── with a salt, makes ──► object key ── seals ──► content
//! (file, 0600)             (in the registry)                    (salt in the object's header)
//! ```
//!
//! All of it is AES-256-GCM. Every key seals one thing only: it is made from the secret above it and 32 random
//! bytes, so nonces need not be random. Each layer authenticates where its bytes belong: a wrapped tenant key names
//! its tenant, an object names its tenant and its content hash, so bytes moved to another tenant or another name do
//! not open. Destroying the one wrapped tenant key makes every copy of everything sealed under it unreadable, backups
//! included.
//!
//! The registry in `coordinator` keeps wrapped keys; the adapter store seals and opens objects. Not here: where
//! anything is stored.

use std::fmt;
use std::path::{Path, PathBuf};

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::hash::ContentHash;
use crate::id::TenantId;

pub mod key_file;
pub mod object;

pub use object::{open, seal};

/// Bytes of every symmetric key here.
pub const KEY_BYTES: usize = 32;
/// Bytes that authenticate one sealed run of bytes.
pub const TAG_BYTES: usize = 16;
/// Salt, encrypted key, tag.
const WRAPPED_BYTES: usize = 2 * KEY_BYTES + TAG_BYTES;
/// First byte of a wrapped tenant key.
const WRAP_VERSION: u8 = 1;

/// Why sealed bytes did not open or a key could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Too short or not ours: the file is truncated or was never sealed.
    #[error(
        "{found_bytes} bytes are not a sealed object (at least {} bytes that start with TSL2)",
        object::HEADER_BYTES
    )]
    NotSealed {
        /// Bytes found.
        found_bytes: usize,
    },
    /// Bytes of an object were changed, whoever it belongs to.
    #[error("the sealed object is damaged ({what})")]
    Damaged {
        /// Which check found it.
        what: &'static str,
    },
    /// Authentication failed: wrong key, wrong tenant, wrong content hash, or a changed wrapped key.
    #[error("{what} does not open: the key is another one, it belongs elsewhere, or its bytes were changed")]
    DoesNotOpen {
        /// Which layer refused.
        what: &'static str,
    },
    /// A wrapped key written by a newer version.
    #[error("wrapped key has version {found}, this program reads {WRAP_VERSION}; hint: upgrade this node")]
    UnknownVersion {
        /// Version byte found.
        found: u8,
    },
    /// The key file is missing, unreadable, too open or malformed.
    #[error(transparent)]
    KeyFile(#[from] key_file::KeyFileError),
    /// Where a cluster key was to be put lies another one.
    #[error(
        "{} holds another cluster key, under which this node may have stored tenants; hint: found the cluster with \
         this node's data folder, or join with an empty one",
        path.display()
    )]
    OtherKey {
        /// Which file.
        path: PathBuf,
    },
}

/// A 32-byte secret that is wiped on drop and never shown.
struct Secret(Zeroizing<[u8; KEY_BYTES]>);

impl Secret {
    fn random() -> Self {
        let mut bytes = Zeroizing::new([0_u8; KEY_BYTES]);
        getrandom::fill(bytes.as_mut_slice()).expect("the operating system provides randomness");
        Self(bytes)
    }

    /// A 32-byte secret made from this one for one purpose and place.
    fn derive_for(&self, purpose: &str, place: &[u8]) -> Zeroizing<[u8; KEY_BYTES]> {
        let mut hasher = blake3::Hasher::new_derive_key(purpose);
        hasher.update(self.0.as_slice());
        hasher.update(place);
        Zeroizing::new(*hasher.finalize().as_bytes())
    }

    /// The cipher that wraps one key; the salt makes it one of a kind, so its nonce is zero.
    fn wrapper(&self, salt: &[u8], aad: &[u8]) -> LessSafeKey {
        let key = self.derive_for("tenantry 2026 key wrap", &[salt, aad].concat());
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key.as_slice()).expect("the key has 32 bytes"))
    }

    /// Encrypts `inner` under this key; `aad` says where it belongs.
    fn wrap(&self, inner: &Self, aad: &[u8]) -> [u8; WRAPPED_BYTES] {
        let mut out = [0_u8; WRAPPED_BYTES];
        let (salt, rest) = out.split_at_mut(KEY_BYTES);
        let (body, tag) = rest.split_at_mut(KEY_BYTES);
        getrandom::fill(salt).expect("the operating system provides randomness");
        body.copy_from_slice(inner.0.as_slice());
        let made = self
            .wrapper(salt, aad)
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key([0; 12]), Aad::from(aad), body)
            .expect("the cipher refuses only content beyond 64 GiB");
        tag.copy_from_slice(made.as_ref());
        out
    }

    fn unwrap(&self, wrapped: &[u8; WRAPPED_BYTES], aad: &[u8], what: &'static str) -> Result<Self, SealError> {
        let (salt, sealed) = wrapped.split_at(KEY_BYTES);
        let mut sealed = Zeroizing::new(sealed.to_vec());
        let opened =
            self.wrapper(salt, aad).open_in_place(Nonce::assume_unique_for_key([0; 12]), Aad::from(aad), &mut sealed);
        let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
        key.copy_from_slice(opened.map_err(|_| SealError::DoesNotOpen { what })?);
        Ok(Self(key))
    }
}

/// Names the owner and the place of some sealed bytes, with lengths, so that no two places share a spelling.
fn place(layer: &str, tenant: &TenantId, rest: &[u8]) -> Vec<u8> {
    let mut aad = Vec::with_capacity(layer.len() + tenant.as_str().len() + rest.len() + 24);
    for part in [layer.as_bytes(), tenant.as_str().as_bytes(), rest] {
        aad.extend_from_slice(&(part.len() as u64).to_le_bytes());
        aad.extend_from_slice(part);
    }
    aad
}

/// The cluster's root secret: wraps tenant keys and keys the hashes of API keys.
///
/// Every node of a cluster holds the same one. Losing it makes every adapter unreadable and every API key
/// invalid, so it belongs in a backup of its own, apart from the data directory.
pub struct ClusterKey(Secret);

impl ClusterKey {
    /// Reads the key from `path`, or creates the file (mode 0600) with a fresh key if there is none.
    ///
    /// # Errors
    /// When the file cannot be read or created, is readable by others, or does not hold 64 hex digits.
    pub fn load_or_create(path: &Path) -> Result<Self, SealError> {
        let text = key_file::load_or_create(path, || Zeroizing::new(to_hex(Secret::random().0.as_slice())))?;
        Self::parse(path, &text)
    }

    /// Reads the key from `path`, which must exist.
    ///
    /// # Errors
    /// As [`ClusterKey::load_or_create`], and when there is no such file.
    pub fn load(path: &Path) -> Result<Self, SealError> {
        Self::parse(path, &key_file::load(path)?)
    }

    fn parse(path: &Path, text: &str) -> Result<Self, SealError> {
        let mut bytes = Zeroizing::new([0_u8; KEY_BYTES]);
        if from_hex(text, bytes.as_mut_slice()) {
            Ok(Self(Secret(bytes)))
        } else {
            Err(key_file::KeyFileError::Malformed { path: path.to_owned(), expected: "64 hex digits" }.into())
        }
    }

    /// Puts the key into `path` (mode 0600). The same key there already is fine; another one stays.
    ///
    /// # Errors
    /// [`SealError::OtherKey`], and as [`ClusterKey::load_or_create`].
    pub fn store(&self, path: &Path) -> Result<(), SealError> {
        let text = key_file::load_or_create(path, || Zeroizing::new(to_hex(self.0.0.as_slice())))?;
        let is_same = Self::parse(path, &text)?.fingerprint() == self.fingerprint();
        if is_same { Ok(()) } else { Err(SealError::OtherKey { path: path.to_owned() }) }
    }

    /// A fresh key that is stored nowhere; for tests and for `ctl`.
    pub fn random() -> Self {
        Self(Secret::random())
    }

    /// The key that [`ClusterKey::reveal`] gave.
    pub fn from_bytes(bytes: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        Self(Secret(bytes))
    }

    /// The key itself, for a node that is being let into the cluster and for nobody else.
    pub fn reveal(&self) -> &[u8; KEY_BYTES] {
        &self.0.0
    }

    /// A 32-byte secret for one purpose, the same on every node. `purpose` is a constant of the program.
    pub fn derive(&self, purpose: &str) -> Zeroizing<[u8; KEY_BYTES]> {
        Zeroizing::new(blake3::derive_key(purpose, self.0.0.as_slice()))
    }

    /// Tells two cluster keys apart without revealing either; stored beside what the key protects.
    pub fn fingerprint(&self) -> ContentHash {
        ContentHash(*self.derive("tenantry 2026 cluster key fingerprint"))
    }

    /// Wraps a tenant's key for storage.
    pub fn wrap(&self, tenant: &TenantId, key: &TenantKey) -> WrappedKey {
        WrappedKey(self.0.wrap(&key.0, &place("tenant key", tenant, &[WRAP_VERSION])))
    }

    /// Gets a tenant's key back.
    ///
    /// # Errors
    /// [`SealError::DoesNotOpen`] for another cluster's key, another tenant's wrapped key or changed bytes.
    pub fn unwrap(&self, tenant: &TenantId, wrapped: &WrappedKey) -> Result<TenantKey, SealError> {
        let key = self.0.unwrap(&wrapped.0, &place("tenant key", tenant, &[WRAP_VERSION]), "the tenant's key")?;
        Ok(TenantKey(key))
    }
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterKey(..)")
    }
}

/// One tenant's secret: everything the tenant stores is readable only through it.
pub struct TenantKey(Secret);

impl TenantKey {
    /// A fresh key.
    pub fn random() -> Self {
        Self(Secret::random())
    }

    /// A 32-byte secret for one purpose (such as the prefix cache), which dies with this key.
    pub fn derive(&self, purpose: &str) -> Zeroizing<[u8; KEY_BYTES]> {
        Zeroizing::new(blake3::derive_key(purpose, self.0.0.as_slice()))
    }
}

impl fmt::Debug for TenantKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TenantKey(..)")
    }
}

/// A tenant's key as the registry stores it: useless without the cluster key. Spelled as hex, version first.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct WrappedKey([u8; WRAPPED_BYTES]);

impl fmt::Debug for WrappedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WrappedKey(..)")
    }
}

impl Drop for WrappedKey {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl From<WrappedKey> for String {
    fn from(wrapped: WrappedKey) -> String {
        format!("{WRAP_VERSION:02x}{}", to_hex(&wrapped.0))
    }
}

impl TryFrom<String> for WrappedKey {
    type Error = SealError;

    fn try_from(text: String) -> Result<Self, SealError> {
        let text = Zeroizing::new(text);
        let mut bytes = [0_u8; 1 + WRAPPED_BYTES];
        if !from_hex(&text, &mut bytes) {
            return Err(SealError::NotSealed { found_bytes: text.len() / 2 });
        }
        if bytes[0] != WRAP_VERSION {
            return Err(SealError::UnknownVersion { found: bytes[0] });
        }
        let mut wrapped = [0_u8; WRAPPED_BYTES];
        wrapped.copy_from_slice(&bytes[1..]);
        Ok(Self(wrapped))
    }
}

fn to_hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        write!(text, "{byte:02x}").expect("writing to a string succeeds");
    }
    text
}

/// Fills `out` from exactly as many lower-case hex digits as it needs; false if `text` is anything else.
fn from_hex(text: &str, out: &mut [u8]) -> bool {
    let digit = |b: u8| match b {
        b'0'..=b'9' => Some(b - b'0'),
        b'a'..=b'f' => Some(b - b'a' + 10),
        _ => None,
    };
    if text.len() != out.len() * 2 {
        return false;
    }
    text.as_bytes().chunks_exact(2).zip(out).all(|(pair, slot)| {
        let (Some(high), Some(low)) = (digit(pair[0]), digit(pair[1])) else { return false };
        *slot = high << 4 | low;
        true
    })
}

#[cfg(test)]
mod tests;
