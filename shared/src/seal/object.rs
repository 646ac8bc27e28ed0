//! Sealed objects: content of any length in segments, so that it is sealed while it arrives and opened in place.
//!
//! ```text
//! header   "TSL2" · salt (32) · content bytes (8, little endian) · place tag (32) · checksum of these (32)
//! segment  at most 256 KiB of content, encrypted · tag (16)          … as many as the content needs
//! ```
//! Segments are AES-256-GCM under a key made from the tenant's key and the salt, which no other object shares; the
//! nonce is the segment's number. The place tag is a MAC by the tenant's key over salt, length, tenant and content
//! hash: it says that *this* content was stored under *this* hash, so whoever opens an object needs not hash it again.
//! It can only be made once the hash is known, which is why the header is written last.
//!
//! The checksum needs no key: it tells a damaged file from one that belongs to somebody else.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::{SealError, TAG_BYTES, TenantKey, place};
use crate::hash::ContentHash;
use crate::id::TenantId;

/// Content per segment: fits the second-level cache of a core, so that decrypting finds what reading brought.
pub const SEGMENT_BYTES: usize = 256 << 10;
/// Opens every sealed object, so that a foreign file is recognised before any decryption.
const MAGIC: &[u8; 4] = b"TSL2";
const SALT_BYTES: usize = 32;
const HASH_BYTES: usize = 32;
/// Magic, salt and length.
const FRONT_BYTES: usize = MAGIC.len() + SALT_BYTES + size_of::<u64>();
/// What the checksum covers.
const CHECKED_BYTES: usize = FRONT_BYTES + HASH_BYTES;
/// Length of the header.
pub const HEADER_BYTES: usize = CHECKED_BYTES + HASH_BYTES;

/// Bytes of a sealed object with `content_bytes` of content; `None` if that overflows.
pub fn sealed_bytes(content_bytes: u64) -> Option<u64> {
    let tags = content_bytes.div_ceil(SEGMENT_BYTES as u64).checked_mul(TAG_BYTES as u64)?;
    content_bytes.checked_add(tags)?.checked_add(HEADER_BYTES as u64)
}

/// The key of one object.
struct Segments {
    key: LessSafeKey,
    next: u64,
}

impl Segments {
    fn new(key: &TenantKey, tenant: &TenantId, salt: &[u8]) -> Self {
        let key = key.0.derive_for("tenantry 2026 object key", &place("object", tenant, salt));
        let key = UnboundKey::new(&AES_256_GCM, key.as_slice()).expect("the key has 32 bytes");
        Self { key: LessSafeKey::new(key), next: 0 }
    }

    /// Numbers never repeat under one key.
    fn nonce(&mut self) -> Nonce {
        let mut nonce = [0_u8; 12];
        nonce[..8].copy_from_slice(&self.next.to_le_bytes());
        self.next += 1;
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals content that arrives piece by piece.
pub struct Sealer {
    salt: [u8; SALT_BYTES],
    segments: Segments,
    content_bytes: u64,
}

// === impl Sealer ===

impl Sealer {
    /// A new object of `tenant`.
    pub fn new(key: &TenantKey, tenant: &TenantId) -> Self {
        let mut salt = [0_u8; SALT_BYTES];
        getrandom::fill(&mut salt).expect("the operating system provides randomness");
        Self { salt, segments: Segments::new(key, tenant, &salt), content_bytes: 0 }
    }

    /// Encrypts the next segment where it lies and appends its tag. All but the last have [`SEGMENT_BYTES`].
    ///
    /// # Panics
    /// When a segment is empty, too long, or follows a shorter one.
    pub fn seal_segment(&mut self, segment: &mut Vec<u8>) {
        assert!(self.content_bytes.is_multiple_of(SEGMENT_BYTES as u64), "only the last segment is shorter");
        assert!((1..=SEGMENT_BYTES).contains(&segment.len()), "a segment of {} bytes", segment.len());
        self.content_bytes += segment.len() as u64;
        let nonce = self.segments.nonce();
        self.segments
            .key
            .seal_in_place_append_tag(nonce, Aad::empty(), segment)
            .expect("the cipher refuses only content beyond 64 GiB");
    }

    /// The header, once the content hash is known; nothing may be sealed afterwards.
    pub fn header(self, key: &TenantKey, tenant: &TenantId, hash: &ContentHash) -> [u8; HEADER_BYTES] {
        let mut header = [0_u8; HEADER_BYTES];
        header[..MAGIC.len()].copy_from_slice(MAGIC);
        header[MAGIC.len()..][..SALT_BYTES].copy_from_slice(&self.salt);
        header[FRONT_BYTES - size_of::<u64>()..FRONT_BYTES].copy_from_slice(&self.content_bytes.to_le_bytes());
        let tag = place_tag(key, tenant, hash, &header[..FRONT_BYTES]);
        header[FRONT_BYTES..CHECKED_BYTES].copy_from_slice(tag.as_bytes());
        let checksum = blake3::hash(&header[..CHECKED_BYTES]);
        header[CHECKED_BYTES..].copy_from_slice(checksum.as_bytes());
        header
    }
}

/// A MAC that names owner, content and object.
fn place_tag(key: &TenantKey, tenant: &TenantId, hash: &ContentHash, front: &[u8]) -> blake3::Hash {
    let rest = [&hash.0, front].concat();
    blake3::keyed_hash(&key.derive("tenantry 2026 object place"), &place("place", tenant, &rest))
}

/// Opens an object segment by segment, in place.
pub struct Opener {
    segments: Segments,
    content_bytes: u64,
}

// === impl Opener ===

impl Opener {
    /// Reads a header.
    ///
    /// # Errors
    /// [`SealError::NotSealed`] for bytes of another form; [`SealError::Damaged`] when they were changed;
    /// [`SealError::DoesNotOpen`] when key, tenant or hash is not the one it was sealed with.
    pub fn new(key: &TenantKey, tenant: &TenantId, hash: &ContentHash, header: &[u8]) -> Result<Self, SealError> {
        let header: &[u8; HEADER_BYTES] = header
            .first_chunk()
            .filter(|header| header.starts_with(MAGIC))
            .ok_or(SealError::NotSealed { found_bytes: header.len() })?;
        let (checked, checksum) = header.split_at(CHECKED_BYTES);
        if blake3::hash(checked).as_bytes() != checksum {
            return Err(SealError::Damaged { what: "header" });
        }
        let (front, tag) = checked.split_at(FRONT_BYTES);
        let tag = blake3::Hash::from_slice(tag).expect("split at the length of a hash");
        // The comparison takes the same time wherever the first difference is.
        if place_tag(key, tenant, hash, front) != tag {
            return Err(SealError::DoesNotOpen { what: "the object" });
        }
        let (salt, length) = front[MAGIC.len()..].split_at(SALT_BYTES);
        let content_bytes = u64::from_le_bytes(length.try_into().expect("eight bytes are left"));
        Ok(Self { segments: Segments::new(key, tenant, salt), content_bytes })
    }

    /// Bytes of content.
    pub fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Decrypts the next segment (content and tag) where it lies; the content is at the front afterwards.
    ///
    /// # Errors
    /// [`SealError::Damaged`] when any bit was changed.
    pub fn open_segment(&mut self, segment: &mut [u8]) -> Result<(), SealError> {
        let nonce = self.segments.nonce();
        match self.segments.key.open_in_place(nonce, Aad::empty(), segment) {
            Ok(_) => Ok(()),
            Err(_) => Err(SealError::Damaged { what: "segment" }),
        }
    }
}

/// Seals content that is in memory.
pub fn seal(key: &TenantKey, tenant: &TenantId, hash: &ContentHash, content: &[u8]) -> Vec<u8> {
    let mut sealer = Sealer::new(key, tenant);
    let mut out = vec![0_u8; HEADER_BYTES];
    for part in content.chunks(SEGMENT_BYTES) {
        let mut segment = part.to_vec();
        sealer.seal_segment(&mut segment);
        out.extend_from_slice(&segment);
    }
    out[..HEADER_BYTES].copy_from_slice(&sealer.header(key, tenant, hash));
    out
}

/// Opens what [`seal`] made.
///
/// # Errors
/// As [`Opener`], and [`SealError::Damaged`] when the length is another one.
pub fn open(key: &TenantKey, tenant: &TenantId, hash: &ContentHash, sealed: &[u8]) -> Result<Vec<u8>, SealError> {
    let mut opener = Opener::new(key, tenant, hash, sealed)?;
    if sealed_bytes(opener.content_bytes) != Some(sealed.len() as u64) {
        return Err(SealError::Damaged { what: "length" });
    }
    let mut content = Vec::with_capacity(sealed.len());
    for part in sealed[HEADER_BYTES..].chunks(SEGMENT_BYTES + TAG_BYTES) {
        let mut segment = part.to_vec();
        opener.open_segment(&mut segment)?;
        content.extend_from_slice(&segment[..segment.len() - TAG_BYTES]);
    }
    Ok(content)
}
