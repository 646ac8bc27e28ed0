//! Tokens that are matched as texts before anything else is done: control tokens and other added tokens.
//!
//! The leftmost match wins, among those the longest, as in the `tokenizers` crate. Whether a control token
//! counts is the caller's decision; other added tokens (such as runs of spaces) always count.

use std::collections::BTreeMap;
use std::ops::Range;

/// One added token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct AddedText {
    /// Its id.
    pub(super) id: u32,
    /// Its text, never empty.
    pub(super) text: String,
    /// Whether only the node may write it.
    pub(super) control: bool,
    /// Swallows white space before it.
    pub(super) lstrip: bool,
    /// Swallows white space after it.
    pub(super) rstrip: bool,
}

/// A place in a text where an added token stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) id: u32,
    pub(super) range: Range<usize>,
}

/// All added tokens of a tokenizer.
#[derive(Debug)]
pub(super) struct Specials {
    /// By first byte, then longest first.
    added: Vec<AddedText>,
    /// Range of `added` by first byte; 256 entries.
    by_first: Vec<Range<usize>>,
    by_id: BTreeMap<u32, usize>,
}

impl Specials {
    pub(super) fn new(mut added: Vec<AddedText>) -> Self {
        added.retain(|token| !token.text.is_empty());
        let first = |token: &AddedText| token.text.as_bytes()[0];
        added.sort_by(|a, b| {
            first(a).cmp(&first(b)).then(b.text.len().cmp(&a.text.len())).then_with(|| a.text.cmp(&b.text))
        });
        added.dedup_by(|later, earlier| later.text == earlier.text);
        let mut by_first = vec![0..0; 256];
        for (idx, token) in added.iter().enumerate() {
            let range = &mut by_first[first(token) as usize];
            *range = if range.start == range.end { idx..idx + 1 } else { range.start..idx + 1 };
        }
        let by_id = added.iter().enumerate().map(|(idx, token)| (token.id, idx)).collect();
        Self { added, by_first, by_id }
    }

    pub(super) fn by_id(&self, id: u32) -> Option<&AddedText> {
        self.by_id.get(&id).map(|&idx| &self.added[idx])
    }

    pub(super) fn id_of(&self, text: &str) -> Option<u32> {
        let range = self.by_first[*text.as_bytes().first()? as usize].clone();
        self.added[range].iter().find(|token| token.text == text).map(|token| token.id)
    }

    pub(super) fn control_ids(&self) -> Vec<u32> {
        self.by_id.iter().filter(|&(_, &idx)| self.added[idx].control).map(|(&id, _)| id).collect()
    }

    /// Texts of the control tokens.
    pub(super) fn control_texts(&self) -> impl Iterator<Item = &str> {
        self.added.iter().filter(|token| token.control).map(|token| token.text.as_str())
    }

    /// The first control token at or after byte `from`.
    pub(super) fn next_control(&self, text: &str, from: usize) -> Option<Found> {
        self.next(text, from, true)
    }

    /// Cuts `text[from..]`, in which control tokens do not count, at the other added tokens.
    pub(super) fn cut_plain(&self, text: &str, from: usize, cuts: &mut Vec<(Range<usize>, Option<u32>)>) {
        let mut at = from;
        while let Some(found) = self.next(text, at, false) {
            if found.range.start > at {
                cuts.push((at..found.range.start, None));
            }
            at = found.range.end;
            cuts.push((found.range, Some(found.id)));
        }
        if at < text.len() {
            cuts.push((at..text.len(), None));
        }
    }

    fn next(&self, text: &str, from: usize, control: bool) -> Option<Found> {
        let bytes = text.as_bytes();
        for at in from..bytes.len() {
            let range = self.by_first[bytes[at] as usize].clone();
            let candidates = self.added[range].iter().filter(|token| token.control == control);
            for token in candidates {
                if bytes[at..].starts_with(token.text.as_bytes()) {
                    return Some(token.found(text, from, at));
                }
            }
        }
        None
    }
}

impl AddedText {
    /// Extends the match at byte `at` over the white space it swallows, but not before `from`.
    fn found(&self, text: &str, from: usize, at: usize) -> Found {
        let mut range = at..at + self.text.len();
        if self.lstrip {
            range.start = from + text[from..range.start].trim_end().len();
        }
        if self.rstrip {
            range.end = text.len() - text[range.end..].trim_start().len();
        }
        Found { id: self.id, range }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str, control: bool) -> AddedText {
        AddedText { id, text: text.to_owned(), control, lstrip: false, rstrip: false }
    }

    #[test]
    fn the_leftmost_then_longest_token_is_found() {
        let specials = Specials::new(vec![token(1, "<a>", true), token(2, "<a><b>", true), token(3, "é", false)]);
        assert_eq!(specials.next_control("x<a><b><a>", 0), Some(Found { id: 2, range: 1..7 }));
        assert_eq!(specials.next_control("x<a><b><a>", 7), Some(Found { id: 1, range: 7..10 }));
        assert_eq!(specials.next_control("é<", 0), None);
        let mut cuts = Vec::new();
        specials.cut_plain("<a>é!", 0, &mut cuts);
        assert_eq!(cuts, [(0..3, None), (3..5, Some(3)), (5..6, None)]);
    }

    #[test]
    fn stripping_tokens_swallow_white_space() {
        let mut mask = token(7, "<m>", true);
        (mask.lstrip, mask.rstrip) = (true, true);
        let specials = Specials::new(vec![mask]);
        assert_eq!(specials.next_control("a \n<m>  b", 0), Some(Found { id: 7, range: 1..8 }));
    }
}
