//! What the tokens of a base model look like as bytes: shared by stop matching and grammars.
//!
//! Built once per base model from its tokenizer; immutable afterwards. It does not tokenize text.

/// Bytes of every token id, which ids are control tokens, and which end an answer.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    bytes: Vec<Box<[u8]>>,
    special: Vec<bool>,
    eos: Vec<u32>,
}

impl Vocabulary {
    /// A vocabulary of `tokens.len()` ids. A token is (its bytes, whether it is a control token).
    /// `eos` are the ids that end an answer.
    ///
    /// # Panics
    /// When an id in `eos` is not in the vocabulary: the model loader checks that.
    pub fn new(tokens: impl IntoIterator<Item = (Vec<u8>, bool)>, eos: Vec<u32>) -> Self {
        let (bytes, special): (Vec<Box<[u8]>>, Vec<bool>) =
            tokens.into_iter().map(|(bytes, special)| (bytes.into_boxed_slice(), special)).unzip();
        assert!(eos.iter().all(|&id| (id as usize) < bytes.len()), "every end-of-answer id is in the vocabulary");
        Self { bytes, special, eos }
    }

    /// Number of token ids.
    pub fn n_tokens(&self) -> usize {
        self.bytes.len()
    }

    /// What the token adds to the answer's text: nothing for control tokens and for ids outside the vocabulary.
    pub fn text(&self, id: u32) -> &[u8] {
        if self.is_special(id) { &[] } else { self.spelling(id) }
    }

    /// How the token is spelled, control tokens included; empty outside the vocabulary.
    pub fn spelling(&self, id: u32) -> &[u8] {
        self.bytes.get(id as usize).map_or(&[], |bytes| bytes)
    }

    /// Whether the id is a control token, which never stands for text.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }

    /// Ids that end an answer.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }
}
