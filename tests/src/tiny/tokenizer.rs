//! A byte-level BPE tokenizer with three special tokens and a handful of merges: enough for chat, stop strings
//! and tokens that end inside a character. As `tokenizer.json` parts and as GGUF lists.

use serde_json::{Map, Value, json};

/// The special tokens; their ids are their places.
const SPECIALS: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// Frequent English pieces, each made of two earlier tokens. `Ġ` is a space in the byte alphabet.
const MERGES: [(&str, &str); 30] = [
    ("Ġ", "t"),
    ("h", "e"),
    ("i", "n"),
    ("Ġ", "a"),
    ("r", "e"),
    ("o", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "s"),
    ("a", "t"),
    ("Ġ", "w"),
    ("o", "r"),
    ("e", "n"),
    ("Ġ", "o"),
    ("i", "s"),
    ("n", "d"),
    ("e", "s"),
    ("i", "t"),
    ("a", "l"),
    ("a", "r"),
    ("Ġ", "b"),
    ("Ġ", "in"),
    ("in", "g"),
    ("o", "u"),
    ("e", "d"),
    ("a", "n"),
    ("Ġa", "nd"),
    ("Ġ", "m"),
    ("Ġ", "f"),
    ("Ġ", "c"),
];

/// Tokens of every tiny model: 3 specials, 256 bytes, the merges. Not a multiple of 16 or 32, on purpose.
#[expect(clippy::identity_op, reason = "the three groups of the vocabulary, in order")]
pub const VOCAB: usize = 0 + SPECIALS.len() + 256 + MERGES.len();

/// The token that ends an answer: `<|im_end|>`.
pub const EOS_ID: u32 = 2;

/// ChatML without a default system prompt.
pub(super) const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
     message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}\
     {{ '<|im_start|>assistant\\n' }}{% endif %}";

/// All tokens by id.
pub(super) fn tokens() -> Vec<String> {
    let bytes = (0..=255_u8).map(|byte| byte_char(byte).to_string());
    let merged = MERGES.iter().map(|(a, b)| format!("{a}{b}"));
    SPECIALS.iter().map(|&text| text.to_owned()).chain(bytes).chain(merged).collect()
}

/// The merges as `a b` lines, best first.
pub(super) fn merges() -> Vec<String> {
    MERGES.iter().map(|(a, b)| format!("{a} {b}")).collect()
}

/// Whether a token is a special one.
pub(super) fn is_special(id: usize) -> bool {
    id < SPECIALS.len()
}

/// Content of `tokenizer.json`.
pub(super) fn tokenizer_json() -> Value {
    let vocab: Map<String, Value> = tokens().into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let added: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": vocab, "merges": merges()},
    })
}

/// Content of `tokenizer_config.json`.
pub(super) fn tokenizer_config() -> Value {
    json!({"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": false, "add_prefix_space": false,
           "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>",
           "clean_up_tokenization_spaces": false, "chat_template": CHAT_TEMPLATE})
}

/// The printable character that stands for a byte in byte-level BPE (GPT-2): itself if printable in Latin-1,
/// else the next of the code points from 256 on.
fn byte_char(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        return char::from(byte);
    }
    let place = (0..byte).filter(|&b| !printable(b)).count();
    char::from_u32(256 + place as u32).expect("256 to 323 are characters")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_merge_makes_a_token_of_two_earlier_ones() {
        let tokens = tokens();
        assert_eq!(tokens.len(), VOCAB);
        for (place, (a, b)) in MERGES.iter().enumerate() {
            let known = &tokens[..SPECIALS.len() + 256 + place];
            assert!(known.iter().any(|t| t == a) && known.iter().any(|t| t == b), "{a} {b}");
        }
    }

    #[test]
    fn the_byte_alphabet_has_256_different_characters() {
        let mut chars: Vec<char> = (0..=255).map(byte_char).collect();
        chars.sort_unstable();
        chars.dedup();
        assert_eq!(chars.len(), 256);
        assert_eq!(byte_char(b' '), 'Ġ');
        assert_eq!(byte_char(b'\n'), 'Ċ');
    }
}
