//! Text to tokens and back, from GGUF metadata or a `tokenizer.json`.
//!
//! The `tokenizers` crate does normalising, pre-tokenising and merging; this file decides which texts are
//! *control tokens* and who may write them. [`Tokenizer::encode_text`] is for what a user wrote: no control
//! token can come out. [`Tokenizer::encode_rendered`] is for text of which every part is trusted. A chat
//! template mixes both: see [`guard`] and [`crate::template::encode_chat`]. The word cache of the crate stays
//! off: it would keep one tenant's words in memory and make another tenant's requests measurably faster.
//! No tokens are added at either end; a caller that wants a beginning-of-text token puts it there.

mod alphabet;
mod gguf;
pub mod guard;
pub(crate) mod json;
mod specials;
mod detokenizer;

use std::path::Path;
use std::sync::Arc;

use tokenizers::normalizer::Range;
use tokenizers::{
    Model, ModelWrapper, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Token,
};

use self::alphabet::Alphabet;
use self::specials::{AddedText, Specials};
use crate::gguf::check::GgufFile;

pub use self::detokenizer::Detokenizer;

/// Why a tokenizer was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read.
    #[error("cannot read {file}: {reason}")]
    Read {
        /// Which file.
        file: String,
        /// What went wrong.
        reason: String,
    },
    /// A required part is absent.
    #[error("the tokenizer has no {what}; hint: convert or download the model again")]
    Missing {
        /// What is absent.
        what: &'static str,
    },
    /// A kind of tokenizer, pre-tokenizer or decoder that is not implemented.
    #[error("{what} {found:?} is not supported; hint: {supported}")]
    Unsupported {
        /// Which part.
        what: &'static str,
        /// Its name in the file.
        found: String,
        /// What would be read.
        supported: &'static str,
    },
    /// Parts that contradict one another.
    #[error("the tokenizer is damaged: {0}")]
    Damaged(String),
}

/// A tokenizer; cloning is cheap.
#[derive(Debug, Clone)]
pub struct Tokenizer(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    model: ModelWrapper,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    specials: Specials,
    alphabet: Alphabet,
    /// Bytes of all tokens, one after the other; empty for control tokens.
    bytes: Vec<u8>,
    /// Where the bytes of a token end, by id.
    ends: Vec<u32>,
    /// The token its post-processor puts in front of a text.
    front: Option<u32>,
}

/// What a loader found; [`Tokenizer::assemble`] checks it and builds the tables.
struct Parts {
    model: ModelWrapper,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    alphabet: Alphabet,
    /// Text as stored in the vocabulary, by id; `None` where no token has the id.
    texts: Vec<Option<String>>,
    added: Vec<AddedText>,
    front: Option<u32>,
}

/// A stretch of text to encode: one control token or plain text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Segment<'a> {
    /// A control token and the text it stands for.
    Control(u32, &'a str),
    /// Text in which control tokens do not count.
    Plain(std::borrow::Cow<'a, str>),
}

/// Longest text of one token: the longest real ones are runs of 512 spaces.
const TOKEN_BYTES_MAX: usize = 2048;

// === impl Tokenizer ===

impl Tokenizer {
    /// Builds the tokenizer described by GGUF metadata: byte-level BPE (`gpt2`) or sentencepiece (`llama`).
    ///
    /// # Errors
    /// Names the missing key, the unsupported kind or the contradiction.
    pub fn from_gguf(file: &GgufFile) -> Result<Self, TokenizerError> {
        Self::assemble(gguf::parts(file)?)
    }

    /// Reads a Hugging Face `tokenizer.json` with a BPE model.
    ///
    /// # Errors
    /// Names the unreadable file, the unsupported kind or the contradiction.
    pub fn from_json(path: &Path) -> Result<Self, TokenizerError> {
        Self::assemble(json::parts(path)?)
    }

    /// As [`Tokenizer::from_json`], from what the file holds; `path` is for messages.
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`].
    pub fn from_json_text(text: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        Self::assemble(json::parts_of(text, path)?)
    }

    fn assemble(parts: Parts) -> Result<Self, TokenizerError> {
        let Parts { model, normalizer, pre_tokenizer, alphabet, texts, added, front } = parts;
        let specials = Specials::new(added);
        let (mut bytes, mut ends) = (Vec::new(), Vec::with_capacity(texts.len()));
        for (id, text) in texts.iter().enumerate() {
            let text = text.as_deref().unwrap_or_default();
            if text.len() > TOKEN_BYTES_MAX {
                return Err(TokenizerError::Damaged(format!("token {id} has {} bytes", text.len())));
            }
            match specials.by_id(id as u32) {
                Some(added) if added.control => {}
                Some(added) => bytes.extend(added.text.as_bytes()),
                None => alphabet.append_bytes(text, &mut bytes),
            }
            let end = u32::try_from(bytes.len());
            ends.push(end.map_err(|_| TokenizerError::Damaged("the vocabulary has more than 4 GiB".to_owned()))?);
        }
        let inner = Inner { model, normalizer, pre_tokenizer, specials, alphabet, bytes, ends, front };
        Ok(Self(Arc::new(inner)))
    }

    /// Encodes untrusted text: what looks like a control token is encoded as plain text.
    pub fn encode_text(&self, text: &str) -> Vec<u32> {
        self.encode_segments(&[Segment::Plain(text.into())])
    }

    /// Encodes trusted text, in which control tokens written out count.
    pub fn encode_rendered(&self, text: &str) -> Vec<u32> {
        self.encode_segments(&self.segments(text))
    }

    /// Whether the text of any control token occurs in `text`.
    pub fn mentions_special(&self, text: &str) -> bool {
        self.0.specials.next_control(text, 0).is_some()
    }

    /// Raw bytes of a token, which may be part of a character; empty for control tokens and unknown ids.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        let ends = &self.0.ends;
        let Some(&end) = ends.get(id as usize) else { return &[] };
        let start = if id == 0 { 0 } else { ends[id as usize - 1] };
        &self.0.bytes[start as usize..end as usize]
    }

    /// Text of a control token; `None` for all others.
    pub fn special_text(&self, id: u32) -> Option<&str> {
        self.0.specials.by_id(id).filter(|added| added.control).map(|added| added.text.as_str())
    }

    /// Whether the token is a control token.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_text(id).is_some()
    }

    /// Ids of all control tokens, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        self.0.specials.control_ids()
    }

    /// Largest id plus one. A model may have more rows: it pads its table.
    pub fn vocab_size(&self) -> usize {
        self.0.ends.len()
    }

    /// Id of a token by its text as stored in the vocabulary (`Ġthe`, `<|im_end|>`).
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.0.specials.id_of(token).or_else(|| self.0.model.token_to_id(token))
    }

    /// Token that the file's own post-processor puts in front of a text, if it has one (`tokenizer.json` only).
    pub fn front_token(&self) -> Option<u32> {
        self.0.front
    }

    /// Text of tokens; bytes that are no UTF-8, or only part of a character, become U+FFFD.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            match self.special_text(id) {
                Some(_) if skip_special => {}
                Some(text) => bytes.extend(text.as_bytes()),
                None => bytes.extend(self.token_bytes(id)),
            }
        }
        let start = usize::from(self.strips_first_space() && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// Whether a text that begins with a token loses one leading space (sentencepiece puts it there).
    fn strips_first_space(&self) -> bool {
        matches!(self.0.alphabet, Alphabet::Sentencepiece { strip_first_space: true })
    }

    /// Splits trusted text at its control tokens.
    pub(crate) fn segments<'a>(&self, text: &'a str) -> Vec<Segment<'a>> {
        let mut segments = Vec::new();
        let mut at = 0;
        while let Some(found) = self.0.specials.next_control(text, at) {
            if found.range.start > at {
                segments.push(Segment::Plain(text[at..found.range.start].into()));
            }
            segments.push(Segment::Control(found.id, &text[found.range.clone()]));
            at = found.range.end;
        }
        if at < text.len() {
            segments.push(Segment::Plain(text[at..].into()));
        }
        segments
    }

    /// Encodes segments as one text, so that rules about its beginning apply once.
    pub(crate) fn encode_segments(&self, segments: &[Segment<'_>]) -> Vec<u32> {
        let mut text = String::new();
        let mut cuts = Vec::new();
        for segment in segments {
            let start = text.len();
            match segment {
                Segment::Control(id, written) => {
                    text.push_str(written);
                    cuts.push((start..text.len(), Some(*id)));
                }
                Segment::Plain(plain) => {
                    text.push_str(plain);
                    self.0.specials.cut_plain(&text, start, &mut cuts);
                }
            }
        }
        self.encode_cuts(&text, &cuts).unwrap_or_else(|error| {
            // Tokenising can only fail on tables that `assemble` and the builders have refused.
            shared::critical!("tokenizer failed: {error}");
            Vec::new()
        })
    }

    fn encode_cuts(&self, text: &str, cuts: &[(std::ops::Range<usize>, Option<u32>)]) -> tokenizers::Result<Vec<u32>> {
        let inner = &self.0;
        let mut pieces = PreTokenizedString::from(text);
        pieces.split(|_, whole: NormalizedString| {
            let piece = |(range, id): &(std::ops::Range<usize>, Option<u32>)| {
                let part = whole.slice(Range::Normalized(range.clone())).expect("cuts lie on characters of the text");
                (part, id.map(|id| vec![Token::new(id, String::new(), (0, 0))]))
            };
            Ok(cuts.iter().map(piece).collect::<Vec<_>>())
        })?;
        if let Some(normalizer) = &inner.normalizer {
            pieces.normalize(|piece| normalizer.normalize(piece))?;
        }
        if let Some(pre_tokenizer) = &inner.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        let mut ids = Vec::with_capacity(text.len() / 3);
        for (piece, _, tokens) in pieces.get_splits(OffsetReferential::Original, OffsetType::None) {
            match tokens {
                Some(tokens) => ids.extend(tokens.iter().map(|token| token.id)),
                None => ids.extend(inner.model.tokenize(piece)?.iter().map(|token| token.id)),
            }
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests;
