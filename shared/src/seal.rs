//! Envelope encryption of what a tenant stores: which key opens what, and how the bytes are laid out.
//!
//! ```text
//! cluster key ── wraps ──► tenant key ── wraps ──► data key (one per object) ── seals ──► content
//! (file, 0600)             (in the registry)       (in the object's header)
//! ```
//!
//! All of it is XChaCha20-Poly1305 with random nonces (24 bytes: collisions are not a concern). Each layer
//! authenticates where its bytes belong: a wrapped tenant key names its tenant, an object names its tenant
//! and its content hash, so bytes moved to another tenant or another name do not open. Destroying the one
//! wrapped tenant key makes every copy of everything sealed under it unreadable, backups included.
//!
//! The registry in `coordinator` keeps wrapped keys; the adapter store seals and opens objects. Not here:
//! streaming (objects are at most some hundred megabytes) and where anything is stored.

use std::fmt;
use std::path::Path;

use chacha20poly1305::aead::AeadInOut;
use chacha20poly1305::{KeyInit, Tag, XChaCha20Poly1305, XNonce};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::hash::ContentHash;
use crate::id::TenantId;

pub mod key_file;

/// Bytes of every symmetric key here.
pub const KEY_BYTES: usize = 32;
const NONCE_BYTES: usize = 24;
const TAG_BYTES: usize = 16;
/// Nonce, encrypted key, tag.
const WRAPPED_BYTES: usize = NONCE_BYTES + KEY_BYTES + TAG_BYTES;
/// Opens every sealed object, so that a foreign file is recognised before any decryption.
const MAGIC: &[u8; 4] = b"TSL1";
/// Magic, wrapped data key, nonce of the content.
const HEADER_BYTES: usize = MAGIC.len() + WRAPPED_BYTES + NONCE_BYTES;
/// How much longer a sealed object is than its plaintext.
pub const SEAL_OVERHEAD_BYTES: usize = HEADER_BYTES + TAG_BYTES;
/// First byte of a wrapped tenant key.
const WRAP_VERSION: u8 = 1;

/// Why sealed bytes did not open or a key could not be had.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// Too short or not ours: the file is truncated or was never sealed.
    #[error("{found_bytes} bytes are not a sealed object (at least {SEAL_OVERHEAD_BYTES} bytes that start with TSL1)")]
    NotSealed {
        /// Bytes found.
        found_bytes: usize,
    },
    /// Authentication failed: wrong key, wrong tenant, wrong content hash, or changed bytes.
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
}

/// A 32-byte secret that is wiped on drop and never shown.
struct Secret(Zeroizing<[u8; KEY_BYTES]>);

impl Secret {
    fn random() -> Self {
        let mut bytes = Zeroizing::new([0_u8; KEY_BYTES]);
        getrandom::fill(bytes.as_mut_slice()).expect("the operating system provides randomness");
        Self(bytes)
    }

    fn cipher(&self) -> XChaCha20Poly1305 {
        XChaCha20Poly1305::new_from_slice(self.0.as_slice()).expect("the key has 32 bytes")
    }

    /// Encrypts `inner` under this key; `aad` says where it belongs.
    fn wrap(&self, inner: &Self, aad: &[u8]) -> [u8; WRAPPED_BYTES] {
        let mut out = [0_u8; WRAPPED_BYTES];
        let (nonce, rest) = out.split_at_mut(NONCE_BYTES);
        let (body, tag) = rest.split_at_mut(KEY_BYTES);
        getrandom::fill(nonce).expect("the operating system provides randomness");
        body.copy_from_slice(inner.0.as_slice());
        tag.copy_from_slice(&encrypt(self, nonce, aad, body));
        out
    }

    fn unwrap(&self, wrapped: &[u8; WRAPPED_BYTES], aad: &[u8], what: &'static str) -> Result<Self, SealError> {
        let (nonce, rest) = wrapped.split_at(NONCE_BYTES);
        let (body, tag) = rest.split_at(KEY_BYTES);
        let mut key = Zeroizing::new([0_u8; KEY_BYTES]);
        key.copy_from_slice(body);
        decrypt(self, nonce, aad, key.as_mut_slice(), tag, what)?;
        Ok(Self(key))
    }
}

fn encrypt(key: &Secret, nonce: &[u8], aad: &[u8], buffer: &mut [u8]) -> [u8; TAG_BYTES] {
    let nonce = XNonce::try_from(nonce).expect("the nonce has 24 bytes");
    let tag = key
        .cipher()
        .encrypt_inout_detached(&nonce, aad, buffer.into())
        .expect("the cipher refuses only content beyond 256 GiB");
    tag.into()
}

fn decrypt(
    key: &Secret,
    nonce: &[u8],
    aad: &[u8],
    buffer: &mut [u8],
    tag: &[u8],
    what: &'static str,
) -> Result<(), SealError> {
    let nonce = XNonce::try_from(nonce).expect("the nonce has 24 bytes");
    let tag = Tag::try_from(tag).expect("the tag has 16 bytes");
    key.cipher().decrypt_inout_detached(&nonce, aad, buffer.into(), &tag).map_err(|_| SealError::DoesNotOpen { what })
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

    /// A fresh key that is stored nowhere; for tests and for `ctl`.
    pub fn random() -> Self {
        Self(Secret::random())
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

/// Seals `plaintext` for `tenant` under a fresh data key; the result is [`SEAL_OVERHEAD_BYTES`] longer.
///
/// `hash` is the content hash of the plaintext, under which the object is stored.
pub fn seal(key: &TenantKey, tenant: &TenantId, hash: &ContentHash, plaintext: &[u8]) -> Vec<u8> {
    let data_key = Secret::random();
    let mut out = Vec::with_capacity(plaintext.len() + SEAL_OVERHEAD_BYTES);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&key.0.wrap(&data_key, &place("data key", tenant, &hash.0)));
    let mut nonce = [0_u8; NONCE_BYTES];
    getrandom::fill(&mut nonce).expect("the operating system provides randomness");
    out.extend_from_slice(&nonce);
    let aad = content_aad(tenant, hash, &out);
    out.extend_from_slice(plaintext);
    let tag = encrypt(&data_key, &nonce, &aad, &mut out[HEADER_BYTES..]);
    out.extend_from_slice(&tag);
    out
}

/// Opens what [`seal`] made; the plaintext is wiped from memory on drop.
///
/// # Errors
/// [`SealError::NotSealed`] for bytes of another form; [`SealError::DoesNotOpen`] when key, tenant or hash
/// is not the one it was sealed with, or any bit was changed.
pub fn open(
    key: &TenantKey,
    tenant: &TenantId,
    hash: &ContentHash,
    sealed: &[u8],
) -> Result<Zeroizing<Vec<u8>>, SealError> {
    if sealed.len() < SEAL_OVERHEAD_BYTES || !sealed.starts_with(MAGIC) {
        return Err(SealError::NotSealed { found_bytes: sealed.len() });
    }
    let (header, rest) = sealed.split_at(HEADER_BYTES);
    let (body, tag) = rest.split_at(rest.len() - TAG_BYTES);
    let (wrapped, nonce) = header[MAGIC.len()..].split_at(WRAPPED_BYTES);
    let wrapped: &[u8; WRAPPED_BYTES] = wrapped.try_into().expect("split at the length of a wrapped key");
    let data_key = key.0.unwrap(wrapped, &place("data key", tenant, &hash.0), "the object's key")?;
    let mut plaintext = Zeroizing::new(body.to_vec());
    decrypt(&data_key, nonce, &content_aad(tenant, hash, header), &mut plaintext, tag, "the object")?;
    Ok(plaintext)
}

/// What the content's tag covers besides the content: its place and the whole header.
fn content_aad(tenant: &TenantId, hash: &ContentHash, header: &[u8]) -> Vec<u8> {
    let mut rest = hash.0.to_vec();
    rest.extend_from_slice(header);
    place("content", tenant, &rest)
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
