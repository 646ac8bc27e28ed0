//! Stop texts: where in the bytes of an answer does one end, and how much text may still become one.
//!
//! The engine ends a choice with the [`StopMatch`] found here; the gateway runs the same matcher over the same
//! tokens to hold back text that may turn out to be a stop text, and to cut the answer. Works on bytes, so that
//! a stop text may span tokens and a token may hold half a character. One automaton per text
//! (Knuth, Morris, Pratt 1977): a byte costs a constant amount of work per text.

/// Where a stop text stood in the answer, in bytes from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StopMatch {
    /// Index into the request's stop texts.
    pub index: usize,
    /// First byte of the stop text: the answer's length.
    pub start: usize,
    /// One past its last byte.
    pub end: usize,
}

/// Looks for stop texts in an answer, token by token.
#[derive(Debug, Clone, Default)]
pub struct StopMatcher {
    texts: Vec<Automaton>,
    /// Tokens before which no stop text may end the answer.
    min_tokens: u32,
    n_tokens: u32,
    n_bytes: usize,
}

#[derive(Debug, Clone)]
struct Automaton {
    text: Box<[u8]>,
    /// `border[i]`: length of the longest proper border of `text[..=i]`.
    border: Box<[usize]>,
    /// Bytes of `text` that the answer's end matches; below `text.len()` between calls.
    matched: usize,
}

impl StopMatcher {
    /// A matcher at the start of an answer. Empty texts match nothing. A text that ends within the first
    /// `min_tokens` tokens is ignored.
    pub fn new(stop: &[String], min_tokens: u32) -> Self {
        Self {
            texts: stop.iter().map(|text| Automaton::new(text.as_bytes())).collect(),
            min_tokens,
            n_tokens: 0,
            n_bytes: 0,
        }
    }

    /// Takes the bytes of the next token. The earliest end wins; of texts that end together, the first in the list.
    /// After a match the answer is over.
    pub fn push(&mut self, token: &[u8]) -> Option<StopMatch> {
        self.n_tokens = self.n_tokens.saturating_add(1);
        let armed = self.n_tokens > self.min_tokens;
        for &byte in token {
            self.n_bytes += 1;
            let mut found = None;
            for (index, automaton) in self.texts.iter_mut().enumerate() {
                if automaton.push(byte) && found.is_none() {
                    found = Some(StopMatch { index, start: self.n_bytes - automaton.text.len(), end: self.n_bytes });
                }
            }
            if armed && found.is_some() {
                return found;
            }
        }
        None
    }

    /// Bytes at the end of the answer that may be the beginning of a stop text.
    pub fn held_back(&self) -> usize {
        self.texts.iter().map(|automaton| automaton.matched).max().unwrap_or(0)
    }

    /// Bytes from the answer's start that are certainly part of it: what a stream may send so far.
    pub fn safe_len(&self) -> usize {
        self.n_bytes - self.held_back()
    }

    /// Bytes seen.
    pub fn n_bytes(&self) -> usize {
        self.n_bytes
    }
}

impl Automaton {
    fn new(text: &[u8]) -> Self {
        let mut border = vec![0; text.len()];
        let mut length = 0;
        for at in 1..text.len() {
            while length > 0 && text[at] != text[length] {
                length = border[length - 1];
            }
            length += usize::from(text[at] == text[length]);
            border[at] = length;
        }
        Self { text: text.into(), border: border.into(), matched: 0 }
    }

    /// True when `text` ends at this byte.
    fn push(&mut self, byte: u8) -> bool {
        if self.text.is_empty() {
            return false;
        }
        while self.matched > 0 && self.text[self.matched] != byte {
            self.matched = self.border[self.matched - 1];
        }
        self.matched += usize::from(self.text[self.matched] == byte);
        let complete = self.matched == self.text.len();
        if complete {
            self.matched = self.border[self.matched - 1];
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stops(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    fn run(matcher: &mut StopMatcher, tokens: &[&[u8]]) -> Option<StopMatch> {
        tokens.iter().find_map(|token| matcher.push(token))
    }

    #[test]
    fn a_stop_text_may_span_tokens_and_characters() {
        let mut matcher = StopMatcher::new(&stops(&["ä\n\n"]), 0);
        let found = run(&mut matcher, &[b"x", b"\xc3", b"\xa4\n", b"\nrest"]);
        assert_eq!(found, Some(StopMatch { index: 0, start: 1, end: 5 }));
    }

    #[test]
    fn the_earliest_end_wins_then_the_first_in_the_list() {
        let mut matcher = StopMatcher::new(&stops(&["abcd", "bc", "c"]), 0);
        assert_eq!(run(&mut matcher, &[b"abcd"]), Some(StopMatch { index: 1, start: 1, end: 3 }));
    }

    #[test]
    fn text_that_may_become_a_stop_text_is_held_back() {
        let mut matcher = StopMatcher::new(&stops(&["</end>"]), 0);
        assert_eq!(matcher.push(b"hi </e"), None);
        assert_eq!((matcher.held_back(), matcher.safe_len()), (3, 3));
        assert_eq!(matcher.push(b"m>"), None);
        assert_eq!((matcher.held_back(), matcher.safe_len()), (0, 8));
    }

    #[test]
    fn stop_texts_within_the_minimum_are_ignored() {
        let mut matcher = StopMatcher::new(&stops(&["."]), 2);
        assert_eq!(run(&mut matcher, &[b".", b"."]), None);
        assert_eq!(matcher.push(b"a."), Some(StopMatch { index: 0, start: 3, end: 4 }));
    }

    proptest! {
        #[test]
        fn matches_equal_a_plain_search(
            texts in prop::collection::vec("[ab]{0,4}", 0..4),
            tokens in prop::collection::vec("[ab]{0,3}", 0..12),
        ) {
            let mut matcher = StopMatcher::new(&texts, 0);
            let mut answer = String::new();
            for token in &tokens {
                answer.push_str(token);
                let found = matcher.push(token.as_bytes());
                let expected = (1..=answer.len()).find_map(|end| {
                    let ends = |text: &String| !text.is_empty() && answer[..end].ends_with(text.as_str());
                    texts.iter().position(ends).map(|index| StopMatch { index, start: end - texts[index].len(), end })
                });
                prop_assert_eq!(found, expected);
                if found.is_some() {
                    break;
                }
                let held = (0..=answer.len()).rev().find(|&n| {
                    n == 0 || texts.iter().any(|text| text.len() > n && text.starts_with(&answer[answer.len() - n..]))
                });
                prop_assert_eq!(Some(matcher.held_back()), held);
            }
        }
    }
}
