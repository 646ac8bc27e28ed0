//! How the texts of a vocabulary stand for bytes: GPT-2's byte characters or sentencepiece's `▁` and `<0x0A>`.

/// Space marker of sentencepiece.
const SPACE_MARK: char = '▁';

/// Which of the two conventions a vocabulary uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// Each character stands for one byte (GPT-2 `bytes_to_unicode`).
    ByteLevel,
    /// `▁` is a space, `<0xXX>` a byte, everything else itself.
    Sentencepiece {
        /// Whether encoding puts a space in front, which decoding takes off again.
        strip_first_space: bool,
    },
}

impl Alphabet {
    /// Appends the bytes a vocabulary text stands for.
    pub(super) fn append_bytes(self, text: &str, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => text.chars().for_each(|c| match byte_of(c) {
                Some(byte) => out.push(byte),
                // A damaged vocabulary: the character can only mean itself.
                None => out.extend(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }),
            Self::Sentencepiece { .. } => match byte_token(text) {
                Some(byte) => out.push(byte),
                None => out.extend(text.replace(SPACE_MARK, " ").as_bytes()),
            },
        }
    }
}

/// Inverse of GPT-2's table: printable Latin-1 stands for itself, the other 68 bytes for U+0100 and up, in order.
fn byte_of(c: char) -> Option<u8> {
    const SHIFTED: u32 = 0x100;
    match c as u32 {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ SHIFTED..0x121 => Some((code - SHIFTED) as u8),
        code @ 0x121..0x143 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

fn byte_token(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    if hex.len() == 2 { u8::from_str_radix(hex, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    use super::*;

    #[test]
    fn byte_characters_are_those_of_the_tokenizers_crate() {
        // Its table is private, but pre-tokenising text shows it: these characters cover all 256 bytes but
        // those that UTF-8 never contains.
        let text: String =
            (0..=0x7ff_u32).chain([0xfffd, 0x10000, 0x10_ffff, 0x4_0000]).filter_map(char::from_u32).collect();
        let mut pieces = PreTokenizedString::from(text.as_str());
        ByteLevel::new(false, false, false).pre_tokenize(&mut pieces).unwrap();
        let mut bytes = Vec::new();
        for (piece, _, _) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
            Alphabet::ByteLevel.append_bytes(piece, &mut bytes);
        }
        assert_eq!(bytes, text.as_bytes());
        let distinct: std::collections::BTreeSet<u8> = bytes.into_iter().collect();
        assert!(distinct.len() > 200);
    }

    #[test]
    fn sentencepiece_texts_become_bytes() {
        let bytes = |text: &str| {
            let mut out = Vec::new();
            Alphabet::Sentencepiece { strip_first_space: true }.append_bytes(text, &mut out);
            out
        };
        assert_eq!(bytes("▁the▁"), b" the ");
        assert_eq!(bytes("<0xE2>"), [0xe2]);
        assert_eq!(bytes("<0xE2"), b"<0xE2");
    }
}
