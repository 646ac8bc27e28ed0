//! An adapter's files as one run of bytes, the form in which the store seals them.
//!
//! ```text
//! PEFT   weights · configuration · length of the configuration (8 bytes, little endian) · 1
//! GGUF   file · 2
//! ```
//! The large file stands first, so that it is written as it arrives and stays where it was read. What the files mean
//! is checked by `model::adapter`, never here.

use model::adapter::AdapterFiles;

const KIND_PEFT: u8 = 1;
const KIND_GGUF: u8 = 2;

/// The bytes are not a bundle: truncated, or written by something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes are not an adapter bundle")]
pub struct NotABundle {
    /// How many there are.
    pub bytes: usize,
}

/// What follows the files: of a PEFT adapter with this configuration, or of a GGUF file.
pub(crate) fn tail(config: Option<&[u8]>) -> Vec<u8> {
    match config {
        Some(config) => [(config.len() as u64).to_le_bytes().as_slice(), &[KIND_PEFT]].concat(),
        None => vec![KIND_GGUF],
    }
}

/// Splits a bundle in place: the large file keeps the buffer.
///
/// # Errors
/// [`NotABundle`] for anything else.
pub(crate) fn split(mut bytes: Vec<u8>) -> Result<AdapterFiles, NotABundle> {
    let bad = NotABundle { bytes: bytes.len() };
    match bytes.pop() {
        Some(KIND_GGUF) => Ok(AdapterFiles::Gguf(bytes)),
        Some(KIND_PEFT) => {
            let (rest, length) = bytes.split_last_chunk().ok_or(bad)?;
            let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| bad)?;
            let (end, at) = (rest.len(), rest.len().checked_sub(length).ok_or(bad)?);
            bytes.truncate(end);
            let config = bytes.split_off(at);
            Ok(AdapterFiles::Peft { config, weights: bytes })
        }
        _ => Err(bad),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn join(large: &[u8], config: Option<&[u8]>) -> Vec<u8> {
        [large, config.unwrap_or_default(), &tail(config)].concat()
    }

    #[test]
    fn what_was_joined_comes_apart_the_same() {
        let peft = AdapterFiles::Peft { config: b"{}".to_vec(), weights: vec![7; 100] };
        assert_eq!(split(join(&[7; 100], Some(b"{}"))), Ok(peft));
        assert_eq!(split(join(&[], Some(b""))), Ok(AdapterFiles::Peft { config: Vec::new(), weights: Vec::new() }));
        assert_eq!(split(join(b"GGUF", None)), Ok(AdapterFiles::Gguf(b"GGUF".to_vec())));
    }

    #[test]
    fn what_is_cut_or_claims_more_than_there_is_is_refused() {
        assert!(split(Vec::new()).is_err() && split(vec![9]).is_err() && split(vec![0, KIND_PEFT]).is_err());
        let mut bytes = join(b"weights", Some(b"{}"));
        let at = bytes.len() - 9;
        bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(split(bytes).is_err());
    }
}
