//! Tokenizers from GGUF metadata, as the model's own Hugging Face tokenizer would do it.
//!
//! `tokenizer.ggml.model` says which of two constructions holds: `gpt2` is byte-level BPE with a
//! pre-tokenizer named by `tokenizer.ggml.pre`, `llama` is sentencepiece BPE with byte fallback, whose merges
//! follow from the scores. An unknown name is refused: a guess would give slightly wrong tokens.

use std::collections::HashMap;

use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::{NFC, Prepend, Sequence as NormalizerSequence};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::alphabet::Alphabet;
use super::specials::AddedText;
use super::{Parts, TOKEN_BYTES_MAX, TokenizerError};
use crate::gguf::check::{GgufFile, Texts};

/// Pre-tokenizer of Llama 3.
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Pre-tokenizer of Qwen2: as Llama 3, but digits one by one.
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
);

/// Token types of `tokenizer.ggml.token_type`.
mod token_type {
    pub(super) const UNKNOWN: u64 = 2;
    pub(super) const CONTROL: u64 = 3;
    pub(super) const USER_DEFINED: u64 = 4;
    pub(super) const UNUSED: u64 = 5;
}

/// Reads the metadata.
pub(super) fn parts(file: &GgufFile) -> Result<Parts, TokenizerError> {
    let kind = file.text("tokenizer.ggml.model").ok_or(TokenizerError::Missing { what: "tokenizer.ggml.model" })?;
    let tokens = file.texts("tokenizer.ggml.tokens").filter(|tokens| !tokens.is_empty());
    let tokens = tokens.ok_or(TokenizerError::Missing { what: "tokenizer.ggml.tokens" })?;
    if let Some(long) = tokens.iter().find(|token| token.len() > TOKEN_BYTES_MAX) {
        return Err(TokenizerError::Damaged(format!(
            "a token has {} bytes, the limit is {TOKEN_BYTES_MAX}",
            long.len()
        )));
    }
    let types = match file.numbers("tokenizer.ggml.token_type") {
        Some(types) => types.uints().filter(|types| types.len() == tokens.len()),
        None => Some(Vec::new()),
    };
    let types = types.ok_or_else(|| TokenizerError::Damaged("token_type does not fit the tokens".to_owned()))?;
    match kind {
        "gpt2" => byte_level(file, tokens, &types),
        "llama" => sentencepiece(file, tokens, &types),
        other => Err(TokenizerError::Unsupported {
            what: "tokenizer.ggml.model",
            found: other.to_owned(),
            supported: "gpt2 (byte-level BPE) and llama (sentencepiece) are read",
        }),
    }
}

fn byte_level(file: &GgufFile, tokens: &Texts, types: &[u64]) -> Result<Parts, TokenizerError> {
    let pre = file.text("tokenizer.ggml.pre").unwrap_or("default");
    let (pre_tokenizer, normalizer, ignore_merges) = pre_tokenizer(pre)?;
    let merges =
        file.texts("tokenizer.ggml.merges").ok_or(TokenizerError::Missing { what: "tokenizer.ggml.merges" })?;
    let split = |merge: &str| merge.split_once(' ').map(|(left, right)| (left.to_owned(), right.to_owned()));
    let merges: Option<Merges> = merges.iter().map(split).collect();
    let merges = merges.ok_or_else(|| TokenizerError::Damaged("a merge is not two tokens and a space".to_owned()))?;
    let model = BPE::builder()
        .vocab_and_merges(vocab(tokens), merges)
        .cache_capacity(0)
        .ignore_merges(ignore_merges)
        .build()
        .map_err(|error| TokenizerError::Damaged(error.to_string()))?;
    Ok(Parts {
        model: model.into(),
        normalizer,
        pre_tokenizer: Some(pre_tokenizer),
        alphabet: Alphabet::ByteLevel,
        texts: tokens.iter().map(|token| Some(token.to_owned())).collect(),
        added: added(tokens, types),
        front: None,
    })
}

/// Pre-tokenizer, normalizer and whether whole words in the vocabulary need no merges.
fn pre_tokenizer(pre: &str) -> Result<(PreTokenizerWrapper, Option<NormalizerWrapper>, bool), TokenizerError> {
    let by_regex = |regex: &str| {
        let split = Split::new(SplitPattern::Regex(regex.to_owned()), SplitDelimiterBehavior::Isolated, false);
        let split = split.map_err(|error| TokenizerError::Damaged(error.to_string()))?;
        let steps: Vec<PreTokenizerWrapper> = vec![split.into(), ByteLevel::new(false, true, false).into()];
        Ok::<PreTokenizerWrapper, TokenizerError>(Sequence::new(steps).into())
    };
    let gpt2 = ByteLevel::new(false, true, true);
    match pre {
        "default" | "gpt-2" | "gpt2" => Ok((gpt2.into(), None, false)),
        "smollm" | "starcoder" | "refact" | "codeshell" => {
            Ok((Sequence::new(vec![Digits::new(true).into(), gpt2.into()]).into(), None, false))
        }
        "llama-bpe" | "llama3" | "llama-v3" => Ok((by_regex(LLAMA3)?, None, true)),
        "qwen2" | "deepseek-r1-qwen" => Ok((by_regex(QWEN2)?, Some(NFC.into()), false)),
        other => Err(TokenizerError::Unsupported {
            what: "tokenizer.ggml.pre",
            found: other.to_owned(),
            supported: "default, gpt-2, smollm, starcoder, llama-bpe and qwen2 are read; \
                        a Hugging Face directory brings its own tokenizer.json",
        }),
    }
}

fn sentencepiece(file: &GgufFile, tokens: &Texts, types: &[u64]) -> Result<Parts, TokenizerError> {
    if file.flag("tokenizer.ggml.remove_extra_whitespaces") == Some(true) {
        return Err(TokenizerError::Unsupported {
            what: "tokenizer.ggml.remove_extra_whitespaces",
            found: "true".to_owned(),
            supported: "Llama 2 and Mistral models keep white space",
        });
    }
    let scores = file.numbers("tokenizer.ggml.scores").and_then(|scores| scores.floats());
    let scores = scores.filter(|scores| scores.len() == tokens.len());
    let scores = scores.ok_or(TokenizerError::Missing { what: "tokenizer.ggml.scores for every token" })?;
    let vocab = vocab(tokens);
    let merges = merges_from_scores(tokens, types, &scores);
    let unknown = (0..types.len()).find(|&id| types[id] == token_type::UNKNOWN).and_then(|id| tokens.get(id));
    let mut builder =
        BPE::builder().vocab_and_merges(vocab, merges).cache_capacity(0).fuse_unk(true).byte_fallback(true);
    if let Some(unknown) = unknown {
        builder = builder.unk_token(unknown.to_owned());
    }
    let model = builder.build().map_err(|error| TokenizerError::Damaged(error.to_string()))?;
    let space_first = file.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = Replace::new(" ", "▁").map_err(|error| TokenizerError::Damaged(error.to_string()))?;
    let mut steps: Vec<NormalizerWrapper> = Vec::new();
    if space_first {
        steps.push(Prepend::new("▁".to_owned()).into());
    }
    steps.push(replace.into());
    Ok(Parts {
        model: model.into(),
        normalizer: Some(NormalizerSequence::new(steps).into()),
        pre_tokenizer: None,
        alphabet: Alphabet::Sentencepiece { strip_first_space: space_first },
        texts: tokens.iter().map(|token| Some(token.to_owned())).collect(),
        added: added(tokens, types),
        front: None,
    })
}

/// Every way to split a token into two others is a merge; the token's score decides its rank. Ties go to the
/// longer left half, as in Hugging Face's conversion of sentencepiece models.
fn merges_from_scores(tokens: &Texts, types: &[u64], scores: &[f32]) -> Merges {
    let ids: HashMap<&str, u32> = tokens.iter().zip(0_u32..).collect();
    let mut merges: Vec<(f32, &str, &str)> = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        if matches!(types.get(id), Some(&(token_type::CONTROL | token_type::UNKNOWN | token_type::UNUSED))) {
            continue;
        }
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let known = splits.filter(|(left, right)| ids.contains_key(left) && ids.contains_key(right));
        merges.extend(known.map(|(left, right)| (scores[id], left, right)));
    }
    merges.sort_by(|a, b| {
        b.0.total_cmp(&a.0)
            .then_with(|| b.1.chars().count().cmp(&a.1.chars().count()))
            .then_with(|| b.2.chars().count().cmp(&a.2.chars().count()))
    });
    merges.into_iter().map(|(_, left, right)| (left.to_owned(), right.to_owned())).collect()
}

fn vocab(tokens: &Texts) -> Vocab {
    // The first of equal texts wins, as in llama.cpp; padding tokens may repeat.
    let mut vocab = Vocab::default();
    for (id, token) in tokens.iter().enumerate() {
        vocab.entry(token.to_owned()).or_insert(id as u32);
    }
    vocab
}

fn added(tokens: &Texts, types: &[u64]) -> Vec<AddedText> {
    let token = |(id, &kind): (usize, &u64)| {
        let text = tokens.get(id).filter(|text| !text.is_empty())?.to_owned();
        let control = match kind {
            token_type::CONTROL | token_type::UNKNOWN => true,
            // Some converters mark turn markers as ordinary additions; their shape gives them away.
            token_type::USER_DEFINED => text.starts_with("<|") && text.ends_with("|>"),
            _ => return None,
        };
        Some(AddedText { id: id as u32, text, control, lstrip: false, rstrip: false })
    };
    types.iter().enumerate().filter_map(token).collect()
}
