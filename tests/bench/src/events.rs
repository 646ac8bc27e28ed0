//! Counts what a stream of server-sent events carries, byte by byte and without parsing JSON: the generator must
//! not compete with the server it measures. It knows the few forms in which servers write completion chunks.

/// What the bytes so far said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// `usage.prompt_tokens`, once it came.
    pub prompt_tokens: Option<u64>,
    /// `usage.completion_tokens`, once it came.
    pub completion_tokens: Option<u64>,
    /// The stream's own end mark came.
    pub done: bool,
    /// An error event came.
    pub error: Option<String>,
}

/// Scans one answer.
#[derive(Debug, Default)]
pub struct Scanner {
    /// The line that has begun; bounded by [`LINE_BYTES_MAX`].
    line: Vec<u8>,
    seen: Seen,
}

/// Longest line kept. A chunk of one token has some hundred bytes; of a longer line only the head is looked at.
const LINE_BYTES_MAX: usize = 64 << 10;

// === impl Scanner ===

impl Scanner {
    /// Takes bytes as they come; returns how many events in them carried text.
    pub fn take(&mut self, mut bytes: &[u8]) -> usize {
        let mut n_texts = 0;
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.keep(&bytes[..end]);
            bytes = &bytes[end + 1..];
            n_texts += usize::from(self.line_ended());
            self.line.clear();
        }
        self.keep(bytes);
        n_texts
    }

    /// What was seen so far.
    pub fn seen(&self) -> &Seen {
        &self.seen
    }

    fn keep(&mut self, bytes: &[u8]) {
        let room = LINE_BYTES_MAX - self.line.len();
        self.line.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    /// True if the line is an event with text.
    fn line_ended(&mut self) -> bool {
        let Some(data) = self.line.strip_prefix(b"data:") else { return false };
        let data = data.trim_ascii();
        if data == b"[DONE]" {
            self.seen.done = true;
            return false;
        }
        if data.starts_with(b"{\"error\"") {
            self.seen.error = Some(String::from_utf8_lossy(&data[..data.len().min(200)]).into_owned());
            return false;
        }
        self.seen.prompt_tokens = number_after(data, b"\"prompt_tokens\":").or(self.seen.prompt_tokens);
        self.seen.completion_tokens = number_after(data, b"\"completion_tokens\":").or(self.seen.completion_tokens);
        has_text(data, b"\"text\":") || has_text(data, b"\"content\":")
    }
}

/// The bytes behind `key` and white space, if it occurs.
fn after<'a>(data: &'a [u8], key: &[u8]) -> Option<&'a [u8]> {
    let at = data.windows(key.len()).position(|window| window == key)?;
    Some(data[at + key.len()..].trim_ascii_start())
}

fn number_after(data: &[u8], key: &[u8]) -> Option<u64> {
    let digits = after(data, key)?;
    let end = digits.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(digits.len());
    std::str::from_utf8(&digits[..end]).ok()?.parse().ok()
}

fn has_text(data: &[u8], key: &[u8]) -> bool {
    after(data, key).is_some_and(|rest| rest.starts_with(b"\"") && !rest.starts_with(b"\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chunks as three servers write them: with and without blanks, with `text` and with `content`.
    const STREAM: &str = concat!(
        "data: {\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"}}]}\n\n",
        "data: {\"choices\":[{\"text\":\" a\",\"index\":0}]}\n\n",
        ": keep-alive\n\n",
        "data: {\"choices\": [{\"text\": \" b\", \"index\": 0}]}\r\n\r\n",
        "data: {\"choices\":[{\"delta\":{\"content\":\"c\"},\"index\":0}]}\n\n",
        "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":96,\"completion_tokens\":64}}\n\n",
        "data: [DONE]\n\n",
    );

    #[test]
    fn counts_texts_and_reads_usage_however_the_bytes_are_cut() {
        for size in 1..STREAM.len() {
            let mut scanner = Scanner::default();
            let n: usize = STREAM.as_bytes().chunks(size).map(|part| scanner.take(part)).sum();
            let seen = scanner.seen();
            assert_eq!((n, seen.prompt_tokens, seen.completion_tokens), (3, Some(96), Some(64)), "pieces of {size}");
            assert!(seen.done && seen.error.is_none());
        }
    }

    #[test]
    fn an_error_event_is_no_answer() {
        let mut scanner = Scanner::default();
        assert_eq!(scanner.take(b"data: {\"error\":{\"message\":\"gone\"}}\n\n"), 0);
        assert!(scanner.seen().error.as_deref().is_some_and(|text| text.contains("gone")));
    }

    #[test]
    fn an_endless_line_costs_bounded_memory() {
        let mut scanner = Scanner::default();
        (0..100).for_each(|_| _ = scanner.take(&[b'x'; 10_000]));
        assert!(scanner.line.len() <= LINE_BYTES_MAX);
    }
}
