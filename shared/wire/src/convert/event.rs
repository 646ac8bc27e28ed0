//! Token events and errors on the wire.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use shared::error::{ErrorKind, RequestError};
use shared::token::{FinishReason, PositionLogprobs, TokenEvent, TokenLogprob};

use crate::message as m;

/// Longest text of an error that is passed on; ours have a few hundred bytes.
const MESSAGE_BYTES_MAX: usize = 4096;
/// Longest code of an error.
const CODE_BYTES_MAX: usize = 64;
/// Codes kept from other nodes; there are about 40.
const CODES_MAX: usize = 256;
/// Stands for a code that cannot be kept.
const OTHER_CODE: &str = "upstream_error";

fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

pub(super) fn to_wire(event: &TokenEvent) -> m::TokenEvent {
    match event {
        TokenEvent::Started { queue_wait, cached_tokens, fell_back, adapter_hit } => {
            m::TokenEvent::Started(m::Started {
                queue_wait_us: us(*queue_wait),
                cached_tokens: *cached_tokens,
                fell_back: *fell_back,
                adapter_hit: *adapter_hit,
            })
        }
        TokenEvent::Prompt { logprobs } => {
            m::TokenEvent::Prompt(m::Prompt { logprobs: logprobs.iter().map(position_to_wire).collect() })
        }
        TokenEvent::Token { choice, seq, id, logprobs } => m::TokenEvent::Token(m::Token {
            choice: *choice,
            seq: *seq,
            id: *id,
            logprobs: logprobs.as_ref().map(position_to_wire),
        }),
        TokenEvent::Finished { choice, reason, compute } => m::TokenEvent::Finished(m::Finished {
            choice: *choice,
            reason: match reason {
                FinishReason::Stop => m::FinishReason::Stop,
                FinishReason::StopText { index } => {
                    m::FinishReason::StopText(u32::try_from(*index).unwrap_or(u32::MAX))
                }
                FinishReason::Length => m::FinishReason::Length,
            },
            compute_us: us(*compute),
        }),
        TokenEvent::Failed(error) => m::TokenEvent::Failed(error_to_wire(error)),
    }
}

pub(super) fn from_wire(event: m::TokenEvent) -> TokenEvent {
    match event {
        m::TokenEvent::Started(started) => TokenEvent::Started {
            queue_wait: Duration::from_micros(started.queue_wait_us),
            cached_tokens: started.cached_tokens,
            fell_back: started.fell_back,
            adapter_hit: started.adapter_hit,
        },
        m::TokenEvent::Prompt(prompt) => {
            TokenEvent::Prompt { logprobs: prompt.logprobs.into_iter().map(position_from_wire).collect() }
        }
        m::TokenEvent::Token(token) => TokenEvent::Token {
            choice: token.choice,
            seq: token.seq,
            id: token.id,
            logprobs: token.logprobs.map(position_from_wire),
        },
        m::TokenEvent::Finished(finished) => TokenEvent::Finished {
            choice: finished.choice,
            reason: match finished.reason {
                m::FinishReason::Stop => FinishReason::Stop,
                m::FinishReason::StopText(index) => FinishReason::StopText { index: index as usize },
                m::FinishReason::Length => FinishReason::Length,
            },
            compute: Duration::from_micros(finished.compute_us),
        },
        m::TokenEvent::Failed(error) => TokenEvent::Failed(error_from_wire(error)),
    }
}

fn position_to_wire(position: &PositionLogprobs) -> m::PositionLogprobs {
    let one = |token: &TokenLogprob| m::TokenLogprob { id: token.id, logprob: token.logprob };
    m::PositionLogprobs { chosen: one(&position.chosen), top: position.top.iter().map(one).collect() }
}

fn position_from_wire(position: m::PositionLogprobs) -> PositionLogprobs {
    let one = |token: m::TokenLogprob| TokenLogprob { id: token.id, logprob: token.logprob };
    PositionLogprobs { chosen: one(position.chosen), top: position.top.into_iter().map(one).collect() }
}

macro_rules! kinds {
    ($($kind:ident),*) => {
        fn kind_to_wire(kind: ErrorKind) -> m::ErrorKind {
            match kind { $(ErrorKind::$kind => m::ErrorKind::$kind),* }
        }

        fn kind_from_wire(kind: m::ErrorKind) -> ErrorKind {
            match kind { $(m::ErrorKind::$kind => ErrorKind::$kind),* }
        }
    };
}
kinds!(
    Invalid,
    Unauthenticated,
    Forbidden,
    NotFound,
    Conflict,
    TooLarge,
    Unprocessable,
    Throttled,
    Unavailable,
    Deadline,
    StorageFull,
    Internal
);

/// At most [`MESSAGE_BYTES_MAX`] of `text`: an error is told shortened rather than not at all.
fn shortened(text: &str) -> String {
    text[..text.floor_char_boundary(MESSAGE_BYTES_MAX)].to_owned()
}

pub(super) fn error_to_wire(error: &RequestError) -> m::Refused {
    m::Refused {
        kind: kind_to_wire(error.kind),
        code: error.code.to_owned(),
        message: shortened(&error.message),
        param: error.param.as_deref().map(shortened),
        retry_after_ms: error.retry_after.map(|after| u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
    }
}

pub(super) fn error_from_wire(error: m::Refused) -> RequestError {
    RequestError {
        kind: kind_from_wire(error.kind),
        code: interned(&error.code),
        message: Cow::Owned(error.message),
        param: error.param.map(Cow::Owned),
        retry_after: error.retry_after_ms.map(Duration::from_millis),
    }
}

/// Codes of errors as constants. They are few and live for ever, so each is kept once.
struct Codes(BTreeSet<&'static str>);

impl Codes {
    /// The code; [`OTHER_CODE`] for what is no code, or is one more than [`CODES_MAX`].
    fn intern(&mut self, code: &str) -> &'static str {
        let spelled = code.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_');
        if code.is_empty() || code.len() > CODE_BYTES_MAX || !spelled {
            return OTHER_CODE;
        }
        if let Some(found) = self.0.get(code) {
            return found;
        }
        if self.0.len() >= CODES_MAX {
            return OTHER_CODE;
        }
        let kept: &'static str = String::from(code).leak();
        self.0.insert(kept);
        kept
    }
}

fn interned(code: &str) -> &'static str {
    static KNOWN: Mutex<Codes> = Mutex::new(Codes(BTreeSet::new()));
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner).intern(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_come_back_as_they_were_and_their_number_is_bounded() {
        let mut codes = Codes(BTreeSet::new());
        assert_eq!(codes.intern("queue_full"), "queue_full");
        for other in ["Queue full\n", "", &"a".repeat(65)] {
            assert_eq!(codes.intern(other), OTHER_CODE);
        }
        let kept = (0..1000).filter(|number| codes.intern(&format!("code_{number}")) != OTHER_CODE).count();
        assert_eq!(kept, CODES_MAX - 1);
        assert_eq!(codes.intern("queue_full"), "queue_full");
    }
}
