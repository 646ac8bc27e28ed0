//! Tokens → text that may be shown: never half a character, never text that may turn out to be a stop text.
//!
//! Pure. The engine decides *that* an answer ends; this file only decides what of it may be sent already and
//! where it is cut. Used by [`super::assemble`].

/// Bytes → characters, keeping an incomplete last character back.
#[derive(Debug, Clone, Default)]
pub struct Utf8Stream {
    pending: Vec<u8>,
}

impl Utf8Stream {
    /// Adds bytes; returns the characters that are complete. Bytes that can never become a character are U+FFFD.
    pub fn push(&mut self, bytes: &[u8]) -> String {
        self.pending.extend_from_slice(bytes);
        let mut text = String::new();
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(valid));
                    rest = after;
                    let Some(n_bad) = error.error_len() else { break };
                    text.push('\u{fffd}');
                    rest = &rest[n_bad..];
                }
            }
        }
        self.pending = rest.to_vec();
        text
    }

    /// The end: U+FFFD if a character is incomplete.
    pub fn finish(&mut self) -> String {
        if std::mem::take(&mut self.pending).is_empty() { String::new() } else { "\u{fffd}".to_owned() }
    }
}

/// Holds back text from where a stop text may begin.
#[derive(Debug, Clone)]
pub struct StopGate {
    stops: Vec<String>,
    held: String,
    /// Bytes of `held` that were there before the last push: stop texts inside them did not end the answer
    /// (the engine ignores them below `min_tokens`).
    judged: usize,
}

impl StopGate {
    /// A gate for these texts, none empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new(), judged: 0 }
    }

    /// Adds text; returns what cannot be part of a stop text that is still possible.
    pub fn push(&mut self, text: &str) -> String {
        self.judged = self.held.len();
        self.held.push_str(text);
        let cut = self.earliest_possible();
        let passed: String = self.held.drain(..cut).collect();
        self.judged = self.judged.saturating_sub(cut);
        passed
    }

    /// The end of an answer: cut before the stop text of this index, or whole.
    pub fn finish(&mut self, stop_idx: Option<usize>) -> String {
        let mut rest = std::mem::take(&mut self.held);
        if let Some(at) = stop_idx.and_then(|idx| self.stops.get(idx)).and_then(|stop| rest.find(stop)) {
            rest.truncate(at);
        }
        rest
    }

    fn earliest_possible(&self) -> usize {
        let whole = self.stops.iter().flat_map(|stop| {
            self.held.match_indices(stop.as_str()).find(|(at, found)| at + found.len() > self.judged).map(|(at, _)| at)
        });
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let begun = (from..self.held.len()).find(|&at| {
            self.held.is_char_boundary(at) && self.stops.iter().any(|stop| stop.starts_with(&self.held[at..]))
        });
        whole.chain(begun).min().unwrap_or(self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn characters_split_over_tokens_come_out_whole() {
        let text = "naïve 日本 👩‍🚀 x";
        let mut stream = Utf8Stream::default();
        let mut out = String::new();
        for byte in text.bytes() {
            let piece = stream.push(&[byte]);
            assert!(!piece.contains('\u{fffd}'));
            out.push_str(&piece);
        }
        assert_eq!(out + &stream.finish(), text);
    }

    #[test]
    fn impossible_and_unfinished_bytes_become_replacement_characters() {
        let mut stream = Utf8Stream::default();
        assert_eq!(stream.push(b"a\xffb\xe6\x97"), "a\u{fffd}b");
        assert_eq!(stream.finish(), "\u{fffd}");
        assert_eq!(stream.finish(), "");
    }

    fn gate(stops: &[&str]) -> StopGate {
        StopGate::new(stops.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn possible_stop_text_is_held_back_and_released_when_it_is_none() {
        let mut stop = gate(&["END", "\n\n"]);
        assert_eq!(stop.push("the E"), "the ");
        assert_eq!(stop.push("N"), "");
        assert_eq!(stop.push("ough\n"), "ENough");
        assert_eq!(stop.push("x END"), "\nx ");
        assert_eq!(stop.finish(Some(0)), "");
    }

    #[test]
    fn text_after_a_stop_text_in_the_same_token_is_cut() {
        let mut stop = gate(&["b", "cd"]);
        assert_eq!(stop.push("aabcd"), "aa");
        assert_eq!(stop.finish(Some(0)), "");
        let mut stop = gate(&["cd"]);
        assert_eq!(stop.push("aabcde"), "aab");
        assert_eq!(stop.finish(Some(0)), "");
    }

    #[test]
    fn stop_text_that_did_not_end_the_answer_is_shown() {
        let mut stop = gate(&["END"]);
        assert_eq!(stop.push("x END"), "x ");
        assert_eq!(stop.push(" y"), "END y");
        assert_eq!(stop.finish(None), "");
    }

    proptest! {
        /// Against the obvious definition: everything before the first stop text, however the text is split.
        #[test]
        fn any_splitting_shows_the_text_before_the_first_stop(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 1..4),
        ) {
            let mut stop = StopGate::new(stops.clone());
            let (mut shown, mut all) = (String::new(), String::new());
            for piece in &pieces {
                all.push_str(piece);
                shown.push_str(&stop.push(piece));
                let first = stops.iter().enumerate().filter_map(|(idx, s)| all.find(s.as_str()).map(|at| (at, idx))).min();
                if let Some((at, idx)) = first {
                    shown.push_str(&stop.finish(Some(idx)));
                    prop_assert_eq!(&shown, &all[..at]);
                    return Ok(());
                }
                prop_assert!(all.starts_with(&shown));
            }
            shown.push_str(&stop.finish(None));
            prop_assert_eq!(shown, all);
        }
    }
}
