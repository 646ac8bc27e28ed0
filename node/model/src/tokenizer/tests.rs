//! Tokens of text and of templates, control tokens that users cannot write, and text that streams whole.

use super::*;
use crate::gguf::check::{Limits, parse};
use crate::gguf::write::GgufWriter;

/// A sentencepiece tokenizer in which every text can be written.
fn sentencepiece() -> Tokenizer {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let pieces = ["▁", "h", "e", "l", "o", "▁h", "he", "ll", "▁he", "▁hell", "▁hello", "lo", "llo", "é"];
    tokens.extend(pieces.map(str::to_owned));
    let mut types = vec![2, 3, 3];
    types.extend([6; 256]);
    types.extend([1; 14]);
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let mut file = GgufWriter::default();
    file.text("tokenizer.ggml.model", "llama").texts("tokenizer.ggml.tokens", &tokens);
    file.ints("tokenizer.ggml.token_type", &types).floats("tokenizer.ggml.scores", &scores);
    Tokenizer::from_gguf(&parse(&file.finish(), &Limits::BASE).unwrap()).unwrap()
}

fn byte_level(pre: &str) -> Result<Tokenizer, TokenizerError> {
    let tokens = ["<|end|>", "a", "1", "Ġ", "11", "aa", "<tool>", "é", "Ã", "©"];
    let mut file = GgufWriter::default();
    file.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", pre).texts("tokenizer.ggml.tokens", &tokens);
    file.ints("tokenizer.ggml.token_type", &[3, 1, 1, 1, 1, 1, 4, 1, 1, 1]);
    file.texts("tokenizer.ggml.merges", &["1 1", "a a"]);
    Tokenizer::from_gguf(&parse(&file.finish(), &Limits::BASE).unwrap())
}

#[test]
fn pre_tokenizers_cut_digits_as_their_models_do() {
    assert_eq!(byte_level("gpt-2").unwrap().encode_text("1111"), [4, 4]);
    assert_eq!(byte_level("smollm").unwrap().encode_text("1111"), [2, 2, 2, 2]);
    assert_eq!(byte_level("qwen2").unwrap().encode_text("1111"), [2, 2, 2, 2]);
    assert_eq!(byte_level("llama-bpe").unwrap().encode_text("1111"), [4, 2, 2]);
    let error = byte_level("tekken").unwrap_err();
    assert!(error.to_string().contains("\"tekken\""), "{error}");
}

#[test]
fn control_tokens_count_only_in_trusted_text() {
    let tokenizer = byte_level("gpt-2").unwrap();
    assert_eq!(tokenizer.encode_rendered("a<|end|>a"), [1, 0, 1]);
    assert!(!tokenizer.encode_text("a<|end|>a").contains(&0));
    // Other added tokens are ordinary text that happens to be one token.
    assert_eq!(tokenizer.encode_text("a<tool>"), [1, 6]);
    assert_eq!(tokenizer.token_bytes(6), b"<tool>");
    assert_eq!((tokenizer.special_text(0), tokenizer.token_bytes(0)), (Some("<|end|>"), [].as_slice()));
    assert_eq!((tokenizer.special_text(6), tokenizer.is_special(0)), (None, true));
    assert_eq!(tokenizer.decode(&[1, 0, 3, 1, 99], true), "a a");
    assert_eq!(tokenizer.decode(&[1, 0], false), "a<|end|>");
    assert_eq!(tokenizer.token_bytes(99), b"");
}

#[test]
fn characters_across_tokens_are_held_back() {
    let tokenizer = byte_level("gpt-2").unwrap();
    let mut detokenizer = Detokenizer::new(&tokenizer);
    assert_eq!(detokenizer.push(1), "a");
    assert_eq!((detokenizer.push(8), detokenizer.n_pending()), (String::new(), 1));
    assert_eq!(detokenizer.push(9), "é");
    assert_eq!(detokenizer.push(8), "");
    assert_eq!(detokenizer.push(1), "\u{fffd}a", "a byte that begins nothing is shown as such");
    assert_eq!(detokenizer.push(8), "");
    assert_eq!((detokenizer.finish(), detokenizer.finish()), ("\u{fffd}".to_owned(), String::new()));
}

#[test]
fn sentencepiece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = sentencepiece();
    let ids = tokenizer.encode_text("hello h€");
    let texts: Vec<&[u8]> = ids.iter().map(|&id| tokenizer.token_bytes(id)).collect();
    // "he" scores above "ll", "lo" and "llo", "▁h" above "he": ▁h, e → ▁he, ll → ▁hell, o → ▁hello.
    let expected: [&[u8]; 5] = [b" hello", b" h", b"\xe2", b"\x82", b"\xac"];
    assert_eq!(texts, expected);
    assert_eq!(tokenizer.decode(&ids, true), "hello h€");
    let streamed = |mut detokenizer: Detokenizer| ids.iter().map(|&id| detokenizer.push(id)).collect::<String>();
    assert_eq!(streamed(Detokenizer::new(&tokenizer)), "hello h€");
    assert_eq!(streamed(Detokenizer::continuing(&tokenizer)), " hello h€");
    assert_eq!(tokenizer.encode_rendered("<s>")[0], 1);
}

#[test]
fn damaged_tables_are_refused() {
    let mut file = GgufWriter::default();
    file.text("tokenizer.ggml.model", "gpt2").texts("tokenizer.ggml.tokens", &["a", "b"]);
    let load = |file: &GgufWriter| Tokenizer::from_gguf(&parse(&file.finish(), &Limits::BASE).unwrap());
    assert!(matches!(load(&file).unwrap_err(), TokenizerError::Missing { what: "tokenizer.ggml.merges" }));
    for merges in [["ab"], ["a x"]] {
        assert!(matches!(load(file.clone().texts("tokenizer.ggml.merges", &merges)), Err(TokenizerError::Damaged(_))));
    }
    file.texts("tokenizer.ggml.merges", &[""; 0]);
    assert!(load(&file).is_ok());
    assert!(matches!(load(file.clone().ints("tokenizer.ggml.token_type", &[1])), Err(TokenizerError::Damaged(_))));
    let mut other = GgufWriter::default();
    other.text("tokenizer.ggml.model", "t5").texts("tokenizer.ggml.tokens", &["a"]);
    assert!(load(&other).unwrap_err().to_string().contains("\"t5\""));
    assert!(Tokenizer::from_json(std::path::Path::new("/nonexistent/tokenizer.json")).is_err());
}
