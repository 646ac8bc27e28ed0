//! The header every frame between nodes starts with, and how frames are cut out of a stream.
//!
//! ```text
//! magic "TNRY" · wire version u16 · type u16 · schema hash u64 · length u32 · body
//! ```
//!
//! Little endian, 20 bytes. All of it must match exactly what the reader expects in the version that both ends agreed
//! on; the length must be within the bound of the type. Only then is anything allocated, and never more than has arrived, twice. [`Decoder`] is pure:
//! the shells in `peer` feed it what the network brings, in pieces of any size.

use rkyv::util::AlignedVec;

use crate::version::{Spoken, Version};

/// Bytes before the body.
pub const HEADER_BYTES: usize = 20;

const MAGIC: [u8; 4] = *b"TNRY";

/// Bytes reserved for a body before any of it has arrived: most frames are smaller.
const BODY_BYTES_FIRST: usize = 4096;

/// `rkyv` reads in place, so bodies lie as its widest type asks.
const BODY_ALIGNMENT: usize = 16;

/// A type of message: its number, its layouts, and how large it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kind {
    /// Number of the type; never used again for another.
    pub id: u16,
    /// Fingerprints of its layout in [`Version::OLDEST`], if it was there, and in [`Version::NEWEST`].
    pub(crate) schemas: [Option<u64>; 2],
    /// Largest body in bytes.
    pub bytes_max: u32,
    /// For logs.
    pub name: &'static str,
}

impl Kind {
    /// Fingerprint of its layout in a version; `None` where there is no such message.
    pub fn schema(&self, version: Version) -> Option<u64> {
        match version {
            Version::V1 => self.schemas[0],
            Version::V2 => self.schemas[1],
        }
    }
}

/// Why bytes are not a frame that the reader takes. The connection they came on is not to be used any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not our protocol at all.
    #[error("frame starts with {found:02x?}; hint: the other end is no tenantry node")]
    Magic {
        /// The four bytes found.
        found: [u8; 4],
    },
    /// Another wire version than TLS agreed on.
    #[error("frame has wire version {found} where {agreed} was agreed on; this node speaks {}", Spoken::OURS)]
    Version {
        /// Version found.
        found: u16,
        /// Version of the connection.
        agreed: Version,
    },
    /// The other end is too old for this message.
    #[error("wire version {version}, which the other node speaks, has no {name}; hint: upgrade that node")]
    Missing {
        /// Which message.
        name: &'static str,
        /// Version of the connection.
        version: Version,
    },
    /// A message that has no place here, or of a later program.
    #[error("frame has type {found}, which is not expected here")]
    Type {
        /// Type found.
        found: u16,
    },
    /// Same name, other layout.
    #[error("{name} frame has schema {found:016x}, this node's is {expected:016x}; hint: run one release everywhere")]
    Schema {
        /// Which message.
        name: &'static str,
        /// Its schema here.
        expected: u64,
        /// Schema found.
        found: u64,
    },
    /// Larger than its type may be.
    #[error("{name} frame of {found} bytes, limit {max}")]
    Length {
        /// Which message.
        name: &'static str,
        /// Length claimed.
        found: u32,
        /// Limit of the type.
        max: u32,
    },
    /// The stream ended inside a frame.
    #[error("stream ended inside a frame, {missing} bytes short")]
    Truncated {
        /// Bytes that were still to come.
        missing: usize,
    },
    /// More than one message where one belongs.
    #[error("{n_bytes} bytes follow the message")]
    Trailing {
        /// How many.
        n_bytes: usize,
    },
    /// The body is not a value of its type.
    #[error("{name} frame does not hold what it says: {reason}")]
    Body {
        /// Which message.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
}

/// One frame whose header fits; the body is yet to be read.
#[derive(Debug)]
pub struct Frame {
    /// In which version it speaks.
    pub version: Version,
    /// Its type.
    pub kind: Kind,
    /// Its bytes.
    pub body: AlignedVec<BODY_ALIGNMENT>,
}

/// The header of a message of `n_bytes`.
pub(crate) fn header(version: Version, kind: Kind, n_bytes: u32) -> Result<[u8; HEADER_BYTES], FrameError> {
    let schema = kind.schema(version).ok_or(FrameError::Missing { name: kind.name, version })?;
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&version.number().to_le_bytes());
    header[6..8].copy_from_slice(&kind.id.to_le_bytes());
    header[8..16].copy_from_slice(&schema.to_le_bytes());
    header[16..].copy_from_slice(&n_bytes.to_le_bytes());
    Ok(header)
}

/// Type and body length that a header claims, if it is one of `kinds`.
fn check(header: &[u8; HEADER_BYTES], agreed: Version, kinds: &[Kind]) -> Result<(Kind, usize), FrameError> {
    let (magic, rest) = header.split_first_chunk::<4>().expect("the header has 20 bytes");
    let (version, rest) = rest.split_first_chunk::<2>().expect("16 bytes are left");
    let (id, rest) = rest.split_first_chunk::<2>().expect("14 bytes are left");
    let (schema, rest) = rest.split_first_chunk::<8>().expect("12 bytes are left");
    let (length, _) = rest.split_first_chunk::<4>().expect("4 bytes are left");
    if *magic != MAGIC {
        return Err(FrameError::Magic { found: *magic });
    }
    let version = u16::from_le_bytes(*version);
    if version != agreed.number() {
        return Err(FrameError::Version { found: version, agreed });
    }
    let id = u16::from_le_bytes(*id);
    let known = kinds.iter().find(|kind| kind.id == id).and_then(|kind| Some((*kind, kind.schema(agreed)?)));
    let (kind, expected) = known.ok_or(FrameError::Type { found: id })?;
    let schema = u64::from_le_bytes(*schema);
    if schema != expected {
        return Err(FrameError::Schema { name: kind.name, expected, found: schema });
    }
    let length = u32::from_le_bytes(*length);
    if length > kind.bytes_max {
        return Err(FrameError::Length { name: kind.name, found: length, max: kind.bytes_max });
    }
    Ok((kind, length as usize))
}

/// Cuts a stream into frames of the types that have a place on it.
#[derive(Debug)]
pub struct Decoder {
    version: Version,
    kinds: &'static [Kind],
    header: [u8; HEADER_BYTES],
    header_len: usize,
    /// The frame whose body is arriving, and its full length.
    open: Option<(Kind, usize)>,
    body: AlignedVec<BODY_ALIGNMENT>,
}

// === impl Decoder ===

impl Decoder {
    /// For a stream on which `kinds` may come, between ends of this program.
    pub fn new(kinds: &'static [Kind]) -> Self {
        Self::speaking(Version::NEWEST, kinds)
    }

    /// For a stream of a version on which `kinds` may come.
    pub fn speaking(version: Version, kinds: &'static [Kind]) -> Self {
        Self { version, kinds, header: [0; HEADER_BYTES], header_len: 0, open: None, body: AlignedVec::new() }
    }

    /// Takes what it needs from the front of `bytes`; a frame when one is complete.
    ///
    /// # Errors
    /// As soon as the header shows that the frame is not for this reader; then the stream is of no more use.
    pub fn feed(&mut self, bytes: &mut &[u8]) -> Result<Option<Frame>, FrameError> {
        let (kind, length) = match self.open {
            Some(open) => open,
            None => {
                let taken = bytes.split_off(..bytes.len().min(HEADER_BYTES - self.header_len)).unwrap_or_default();
                self.header[self.header_len..self.header_len + taken.len()].copy_from_slice(taken);
                self.header_len += taken.len();
                if self.header_len < HEADER_BYTES {
                    return Ok(None);
                }
                let open = check(&self.header, self.version, self.kinds)?;
                self.open = Some(open);
                self.body = AlignedVec::with_capacity(open.1.min(BODY_BYTES_FIRST));
                open
            }
        };
        let taken = bytes.split_off(..bytes.len().min(length - self.body.len())).unwrap_or_default();
        self.body.extend_from_slice(taken);
        if self.body.len() < length {
            return Ok(None);
        }
        self.open = None;
        self.header_len = 0;
        Ok(Some(Frame { version: self.version, kind, body: std::mem::take(&mut self.body) }))
    }

    /// To be called when the stream is at its end.
    ///
    /// # Errors
    /// When it ended inside a frame.
    pub fn finish(&self) -> Result<(), FrameError> {
        let missing = match self.open {
            Some((_, length)) => length - self.body.len(),
            None if self.header_len > 0 => HEADER_BYTES - self.header_len,
            None => return Ok(()),
        };
        Err(FrameError::Truncated { missing })
    }

    /// The one frame that `bytes` are, such as a datagram.
    ///
    /// # Errors
    /// As [`Self::feed`] and [`Self::finish`], and when something follows.
    pub fn only(version: Version, kinds: &'static [Kind], mut bytes: &[u8]) -> Result<Frame, FrameError> {
        let mut decoder = Self::speaking(version, kinds);
        match decoder.feed(&mut bytes)? {
            Some(_) if !bytes.is_empty() => Err(FrameError::Trailing { n_bytes: bytes.len() }),
            Some(frame) => Ok(frame),
            None => {
                decoder.finish()?;
                Err(FrameError::Truncated { missing: HEADER_BYTES })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// B8: whatever length a header claims, memory follows what has arrived.
    #[test]
    fn a_claimed_length_reserves_no_more_than_what_arrives_asks_for() {
        const KINDS: &[Kind] = &[Kind { id: 7, schemas: [None, Some(1)], bytes_max: u32::MAX, name: "Giant" }];
        let head = header(Version::NEWEST, KINDS[0], u32::MAX).expect("there is one");
        let mut decoder = Decoder::new(KINDS);
        let mut n_arrived = 0;
        assert!(decoder.feed(&mut head.as_slice()).expect("a header").is_none());
        assert!(decoder.body.capacity() <= BODY_BYTES_FIRST);
        for n_bytes in [1, 10, 4000, 100_000, 1 << 20] {
            assert!(decoder.feed(&mut vec![0; n_bytes].as_slice()).expect("more of it").is_none());
            n_arrived += n_bytes;
            let most = (2 * n_arrived).max(BODY_BYTES_FIRST);
            assert!(decoder.body.capacity() <= most, "{} bytes for {n_arrived}", decoder.body.capacity());
        }
        assert!(matches!(decoder.finish(), Err(FrameError::Truncated { .. })));
    }
}
