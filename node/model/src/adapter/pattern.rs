//! The module patterns of `adapter_config.json`: Python regular expressions, evaluated only where Python and
//! this crate cannot disagree.
//!
//! Accepted is a small common core: letters, digits, `_` and plain punctuation, `.`, classes, groups, `|`,
//! single quantifiers, `^`, `$`, `\b` and the usual escapes. Look-around, back references, flags, possessive
//! quantifiers and the rest are refused by name, so that no pattern ever selects other modules than PEFT would.

use regex::{Regex, RegexBuilder};

use super::{AdapterError, quote};

/// Longest pattern. Exported ones name every layer in an alternation at most: a few KB.
const PATTERN_BYTES_MAX: usize = 8 << 10;
/// Compiled size of one pattern; a bounded repetition of a bounded repetition ends here.
const COMPILED_BYTES_MAX: usize = 256 << 10;
/// Groups inside groups.
const NESTING_MAX: u32 = 16;

/// How much of a module's name a pattern must cover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cover {
    /// All of it: `re.fullmatch(pattern, name)`, as `target_modules` and `exclude_modules`.
    Whole,
    /// All of it or what follows some dot: `re.match(r"(.*\.)?(pattern)$", name)`, as `rank_pattern` and `alpha_pattern`.
    Suffix,
}

/// A checked pattern.
#[derive(Debug)]
pub(super) enum Pattern {
    /// Only literals and `.`: compared byte by byte; `None` is any character. Exported rank patterns have one
    /// of these per module, too many to compile.
    Simple(Cover, Vec<Option<u8>>),
    /// Anything else.
    Regex(Box<Regex>),
}

// === impl Pattern ===

impl Pattern {
    /// Checks and compiles a pattern that `field` gives.
    pub(super) fn new(field: &str, text: &str, cover: Cover) -> Result<Self, AdapterError> {
        let refuse = |why: &str| {
            AdapterError::unsupported(
                field,
                quote(text),
                format!("{why}; use module names, or a regular expression of literals, classes, groups and |"),
            )
        };
        if text.is_empty() || text.len() > PATTERN_BYTES_MAX {
            return Err(refuse(&format!("patterns have 1 to {PATTERN_BYTES_MAX} bytes")));
        }
        if let Some(simple) = simple(text) {
            return Ok(Self::Simple(cover, simple));
        }
        check_core(text).map_err(|why| refuse(&why))?;
        let wrapped = match cover {
            Cover::Whole => format!("^(?:{text})$"),
            Cover::Suffix => format!(r"^(?:.*\.)?(?:{text})$"),
        };
        RegexBuilder::new(&wrapped)
            .size_limit(COMPILED_BYTES_MAX)
            .dfa_size_limit(COMPILED_BYTES_MAX)
            .nest_limit(NESTING_MAX + 4)
            .build()
            .map(|regex| Self::Regex(Box::new(regex)))
            .map_err(|error| match error {
                regex::Error::CompiledTooBig(_) => refuse("it is too large when compiled"),
                _ => refuse("it is not a valid regular expression here"),
            })
    }

    /// Whether the pattern selects a module by its full name, such as `model.layers.0.self_attn.q_proj`.
    pub(super) fn matches(&self, module: &str) -> bool {
        match self {
            Self::Regex(regex) => regex.is_match(module),
            Self::Simple(cover, literal) => {
                let name = module.as_bytes();
                let Some(start) = name.len().checked_sub(literal.len()) else { return false };
                let at_boundary = start == 0 || (*cover == Cover::Suffix && name[start - 1] == b'.');
                at_boundary
                    && name[start..].iter().zip(literal).all(|(byte, want)| want.is_none_or(|want| want == *byte))
            }
        }
    }
}

/// The pattern as literals and `.`, when it has nothing else.
fn simple(text: &str) -> Option<Vec<Option<u8>>> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'.' => None,
            b'\\' => match bytes.next()? {
                b'.' => Some(b'.'),
                _ => return None,
            },
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => Some(byte),
            _ => return None,
        });
    }
    Some(out)
}

/// Walks a pattern and names the first thing outside the common core of the two dialects.
fn check_core(text: &str) -> Result<(), String> {
    let mut rest = text;
    let mut depth = 0_u32;
    // Whether what stands before can be repeated: not after another quantifier, an anchor or an opening.
    let mut repeatable = false;
    while let Some(first) = rest.chars().next() {
        let mut taken = first.len_utf8();
        match first {
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '.' | '-' | '/' | ',' | ':' | '=' => repeatable = true,
            '\\' => {
                taken = 2;
                repeatable = escape(rest)?;
            }
            '[' => {
                taken = class(rest)?;
                repeatable = true;
            }
            '(' => {
                depth += 1;
                taken = open(rest)?;
                repeatable = false;
                if depth > NESTING_MAX {
                    return Err(format!("groups are nested deeper than {NESTING_MAX}"));
                }
            }
            ')' => {
                depth = depth.checked_sub(1).ok_or("a group is closed that was not opened")?;
                repeatable = true;
            }
            '|' | '^' | '$' => repeatable = false,
            '*' | '+' | '?' | '{' => {
                if !repeatable {
                    return Err(format!("{first:?} repeats nothing, an anchor or another repetition"));
                }
                taken = quantifier(rest)?;
                repeatable = false;
            }
            other => return Err(format!("{other:?} is not evaluated")),
        }
        rest = &rest[taken..];
    }
    if depth == 0 { Ok(()) } else { Err("a group is not closed".to_owned()) }
}

/// Whether the escape can be repeated; only those both dialects read alike.
fn escape(rest: &str) -> Result<bool, String> {
    match rest[1..].chars().next() {
        Some('d' | 'D' | 'w' | 'W' | 's' | 'S' | '.' | '-' | '\\' | '(' | ')' | '[' | ']' | '|' | '*' | '+' | '?') => {
            Ok(true)
        }
        Some('b' | 'B') => Ok(false),
        Some(other) => Err(format!("the escape \\{other} is not evaluated")),
        None => Err("it ends in a backslash".to_owned()),
    }
}

/// Bytes of a class such as `[a-z_.]`. Brackets, `&` and `~` inside mean different things in the two dialects.
fn class(rest: &str) -> Result<usize, String> {
    let mut chars = rest.char_indices().skip(1).peekable();
    if chars.peek().is_some_and(|(_, c)| *c == '^') {
        chars.next();
    }
    let mut previous = None;
    let mut is_empty = true;
    while let Some((at, c)) = chars.next() {
        match c {
            ']' if is_empty => return Err("a class is empty or starts with ]".to_owned()),
            ']' => return Ok(at + 1),
            '\\' => match chars.next() {
                Some((_, 'd' | 'w' | 's' | '.' | '-')) => {}
                _ => return Err("an escape inside a class is not evaluated".to_owned()),
            },
            '-' if previous == Some('-') => return Err("-- inside a class is not evaluated".to_owned()),
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '.' | '-' => {}
            other => return Err(format!("{other:?} inside a class is not evaluated")),
        }
        previous = Some(c);
        is_empty = false;
    }
    Err("a class is not closed".to_owned())
}

/// Bytes of an opening: `(` or `(?:`.
fn open(rest: &str) -> Result<usize, String> {
    if rest.starts_with("(?:") {
        Ok(3)
    } else if rest.starts_with("(?") {
        Err("groups other than ( and (?: are not evaluated".to_owned())
    } else {
        Ok(1)
    }
}

/// Bytes of a quantifier with its lazy mark: `*`, `+`, `?`, `{m}`, `{m,}`, `{m,n}`.
fn quantifier(rest: &str) -> Result<usize, String> {
    let mut taken = 1;
    if let Some(inside) = rest.strip_prefix('{') {
        let (bounds, _) = inside.split_once('}').ok_or("a { is not closed")?;
        let (low, high) = bounds.split_once(',').unwrap_or((bounds, ""));
        let is_number = |text: &str| (1..=4).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        if !is_number(low) || !(high.is_empty() || is_number(high)) {
            return Err("a repetition must be {m}, {m,} or {m,n}".to_owned());
        }
        taken = bounds.len() + 2;
    }
    if rest[taken..].starts_with('?') {
        taken += 1;
    }
    Ok(taken)
}
