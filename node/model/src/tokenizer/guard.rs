//! Keeps what users wrote from becoming control tokens although it passes through a chat template.
//!
//! Before rendering, [`Guard::protect`] replaces every control-token text inside the conversation's strings
//! by a mark: a private-use character that occurs nowhere in the conversation, around a number. After
//! rendering, the only control-token texts left were written by the template; the output is cut there, then
//! the marks turn back into the original text and each piece is encoded as plain text. Merges run across the
//! restored text as if it had never been replaced. Fragments at the ends of a string that could complete a
//! control token together with neighbouring text (`<|im_` + `end|>` in two parts of one message) are marked
//! too. Values under the key `role` stay as they are: templates compare and assemble them, so the caller
//! admits only known roles.

use std::borrow::Cow;

use serde_json::Value;

use super::{Segment, Tokenizer};

/// Private-use characters to mark with: plane 15 has no meaning in any text we know.
const MARKS: std::ops::RangeInclusive<char> = '\u{F0000}'..='\u{F0FFF}';

/// Marks of one conversation.
#[derive(Debug)]
pub struct Guard<'a> {
    tokenizer: &'a Tokenizer,
    mark: char,
    originals: Vec<String>,
}

impl<'a> Guard<'a> {
    /// A guard for the given inputs; `None` when they contain all 4096 private characters it could mark with.
    pub fn new(tokenizer: &'a Tokenizer, inputs: &[&Value]) -> Option<Self> {
        let mut used = vec![false; 0x1000];
        inputs.iter().for_each(|input| note_marks(input, &mut used));
        let free = used.iter().position(|&used| !used)?;
        Some(Self { tokenizer, mark: MARKS.clone().nth(free)?, originals: Vec::new() })
    }

    /// A copy of `value` without control-token texts in its strings and keys.
    pub fn protect(&mut self, value: &Value) -> Value {
        match value {
            Value::String(text) => Value::String(self.protect_text(text).into_owned()),
            Value::Array(items) => Value::Array(items.iter().map(|item| self.protect(item)).collect()),
            Value::Object(entries) => {
                let protect = |(key, value): (&String, &Value)| match key.as_str() {
                    "role" => (key.clone(), value.clone()),
                    _ => (self.protect_text(key).into_owned(), self.protect(value)),
                };
                Value::Object(entries.iter().map(protect).collect())
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => value.clone(),
        }
    }

    /// Encodes what the template made of the protected values.
    pub fn encode(&self, rendered: &str) -> Vec<u32> {
        let mut segments = self.tokenizer.segments(rendered);
        for segment in &mut segments {
            if let Segment::Plain(text) = segment {
                *text = Cow::Owned(self.restore(text));
            }
        }
        self.tokenizer.encode_segments(&segments)
    }

    /// Puts the original texts back.
    pub fn restore(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some((before, after)) = rest.split_once(self.mark) {
            out.push_str(before);
            let original = after.split_once(self.mark).and_then(|(number, after)| {
                let number: usize = number.parse().ok()?;
                Some((self.originals.get(number)?, after))
            });
            // A template that cuts strings apart may leave half a mark: it carries no text any more.
            rest = after;
            if let Some((original, after)) = original {
                out.push_str(original);
                rest = after;
            }
        }
        out.push_str(rest);
        out
    }

    fn protect_text<'t>(&mut self, text: &'t str) -> Cow<'t, str> {
        let specials = &self.tokenizer.0.specials;
        let head = edge(specials.control_texts(), |token| head_fragment(text, token));
        let tail = edge(specials.control_texts(), |token| tail_fragment(text, token));
        if head == 0 && tail == 0 && !self.tokenizer.mentions_special(text) {
            return Cow::Borrowed(text);
        }
        let mut out = String::with_capacity(text.len() + 16);
        let mut at = 0;
        if head > 0 {
            self.push_mark(&text[..head], &mut out);
            at = head;
        }
        let end = text.len() - tail;
        // Scanning by text, without stripping, and from `at`: what the head mark covers is covered.
        while at < end {
            let found = specials.next_control(text, at).filter(|found| found.range.start < end);
            let Some(found) = found else { break };
            out.push_str(&text[at..found.range.start]);
            self.push_mark(&text[found.range.clone()], &mut out);
            at = found.range.end;
        }
        if at < end {
            out.push_str(&text[at..end]);
            at = end;
        }
        if at < text.len() {
            self.push_mark(&text[at..], &mut out);
        }
        Cow::Owned(out)
    }

    fn push_mark(&mut self, original: &str, out: &mut String) {
        out.push(self.mark);
        out.push_str(&self.originals.len().to_string());
        out.push(self.mark);
        self.originals.push(original.to_owned());
    }
}

/// Longest fragment over all tokens.
fn edge<'a>(tokens: impl Iterator<Item = &'a str>, fragment: impl Fn(&str) -> usize) -> usize {
    tokens.map(fragment).max().unwrap_or(0)
}

/// Bytes at the start of `text` that are a proper suffix of `token`.
fn head_fragment(text: &str, token: &str) -> usize {
    token.char_indices().skip(1).map(|(at, _)| &token[at..]).find(|suffix| text.starts_with(suffix)).map_or(0, str::len)
}

/// Bytes at the end of `text` that are a proper prefix of `token`.
fn tail_fragment(text: &str, token: &str) -> usize {
    token.char_indices().rev().map(|(at, _)| &token[..at]).find(|prefix| text.ends_with(prefix)).map_or(0, str::len)
}

fn note_marks(value: &Value, used: &mut [bool]) {
    let mut note = |text: &str| {
        text.chars().filter(|c| MARKS.contains(c)).for_each(|c| used[c as usize - *MARKS.start() as usize] = true);
    };
    match value {
        Value::String(text) => note(text),
        Value::Array(items) => items.iter().for_each(|item| note_marks(item, used)),
        Value::Object(entries) => entries.iter().for_each(|(key, value)| {
            note_marks(&Value::String(key.clone()), used);
            note_marks(value, used);
        }),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}
