//! Tokens to text while they arrive: characters that span tokens are held back until they are complete.
//!
//! One per answer, owned by whoever streams it. It knows nothing of stop strings or control tokens beyond
//! showing none of the latter.

use super::Tokenizer;

/// Incremental decoder of one answer. The texts it returns, put together, are `Tokenizer::decode` of all tokens.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    /// At most three bytes between calls: the beginning of a character.
    pending: Vec<u8>,
    /// Whether the next byte may be the space that sentencepiece puts in front of a text.
    at_start: bool,
}

impl Detokenizer {
    /// For a text of its own, such as a chat answer.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        Self { tokenizer: tokenizer.clone(), pending: Vec::new(), at_start: tokenizer.strips_first_space() }
    }

    /// For text that goes on from a prompt: a leading space belongs to it.
    pub fn continuing(tokenizer: &Tokenizer) -> Self {
        Self { at_start: false, ..Self::new(tokenizer) }
    }

    /// Adds a token; returns the text that is complete now. Control tokens show nothing.
    pub fn push(&mut self, id: u32) -> String {
        let mut bytes = self.tokenizer.token_bytes(id);
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend(bytes);
        let complete = complete_bytes(&self.pending);
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        text
    }

    /// Bytes held back.
    pub fn n_pending(&self) -> usize {
        self.pending.len()
    }

    /// The rest: U+FFFD for an incomplete character, otherwise nothing.
    pub fn finish(&mut self) -> String {
        let pending = std::mem::take(&mut self.pending);
        String::from_utf8_lossy(&pending).into_owned()
    }
}

/// Length of the part that later bytes cannot change.
fn complete_bytes(bytes: &[u8]) -> usize {
    let mut at = 0;
    loop {
        match std::str::from_utf8(&bytes[at..]) {
            Ok(_) => return bytes.len(),
            Err(error) => match error.error_len() {
                Some(invalid) => at += error.valid_up_to() + invalid,
                None => return at + error.valid_up_to(),
            },
        }
    }
}
