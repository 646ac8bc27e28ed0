//! An adapter's files as one run of bytes, the form in which the store seals them.
//!
//! ```text
//! "TAB1" · kind (1 byte: 1 PEFT, 2 GGUF) · per file: length (8 bytes, little endian) · bytes
//! ```
//! Two files for PEFT (configuration, weights), one for GGUF; nothing may follow. What the files mean is
//! checked by `model::adapter`, never here.

use model::adapter::AdapterFiles;
use zeroize::Zeroizing;

const MAGIC: &[u8; 4] = b"TAB1";
const KIND_PEFT: u8 = 1;
const KIND_GGUF: u8 = 2;
const LENGTH_BYTES: usize = 8;

/// The bytes are not a bundle: truncated, or written by something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are not an adapter bundle")]
pub struct NotABundle {
    /// How many there are.
    pub bytes: usize,
}

/// Joins the files of an adapter. Wiped on drop: it is a copy of a tenant's weights.
pub fn encode(files: &AdapterFiles) -> Zeroizing<Vec<u8>> {
    let (kind, parts): (u8, &[&[u8]]) = match files {
        AdapterFiles::Peft { config, weights } => (KIND_PEFT, &[config, weights]),
        AdapterFiles::Gguf(bytes) => (KIND_GGUF, &[bytes]),
    };
    let n_bytes = MAGIC.len() + 1 + parts.iter().map(|part| LENGTH_BYTES + part.len()).sum::<usize>();
    let mut out = Zeroizing::new(Vec::with_capacity(n_bytes));
    out.extend_from_slice(MAGIC);
    out.push(kind);
    for part in parts {
        out.extend_from_slice(&(part.len() as u64).to_le_bytes());
        out.extend_from_slice(part);
    }
    out
}

/// Splits a bundle. Allocates no more than the bytes given.
///
/// # Errors
/// [`NotABundle`] for anything [`encode`] does not write.
pub fn decode(bytes: &[u8]) -> Result<AdapterFiles, NotABundle> {
    let bad = NotABundle { bytes: bytes.len() };
    let rest = bytes.strip_prefix(MAGIC).ok_or(bad)?;
    let (&kind, mut rest) = rest.split_first().ok_or(bad)?;
    let mut part = || -> Result<&[u8], NotABundle> {
        let (length, tail) = rest.split_first_chunk::<LENGTH_BYTES>().ok_or(bad)?;
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| bad)?;
        let (part, tail) = tail.split_at_checked(length).ok_or(bad)?;
        rest = tail;
        Ok(part)
    };
    let files = match kind {
        KIND_PEFT => {
            let (config, weights) = (part()?, part()?);
            AdapterFiles::Peft { config: config.to_vec(), weights: weights.to_vec() }
        }
        KIND_GGUF => AdapterFiles::Gguf(part()?.to_vec()),
        _ => return Err(bad),
    };
    if rest.is_empty() { Ok(files) } else { Err(bad) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peft() -> AdapterFiles {
        AdapterFiles::Peft { config: b"{}".to_vec(), weights: vec![7; 100] }
    }

    #[test]
    fn what_was_joined_comes_apart_the_same() {
        for files in [peft(), AdapterFiles::Gguf(vec![1, 2, 3]), AdapterFiles::Gguf(Vec::new())] {
            assert_eq!(decode(&encode(&files)), Ok(files));
        }
    }

    #[test]
    fn every_truncation_and_any_tail_is_refused() {
        let whole = encode(&peft());
        for length in 0..whole.len() {
            assert_eq!(decode(&whole[..length]), Err(NotABundle { bytes: length }));
        }
        let mut longer = whole.to_vec();
        longer.push(0);
        assert!(decode(&longer).is_err());
    }

    #[test]
    fn a_length_beyond_the_bytes_is_refused_without_allocating() {
        let mut bytes = encode(&AdapterFiles::Gguf(vec![1, 2, 3])).to_vec();
        bytes[5..13].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(decode(&bytes).is_err());
        bytes[4] = 9;
        assert!(decode(&bytes).is_err());
    }
}
