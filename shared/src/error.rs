//! Errors of a request: few kinds, each with a stable code, a text that says what to do, and a retry hint.
//!
//! Components have their own error enums; each maps to an [`ErrorKind`] here, and one file in the gateway
//! maps kinds to HTTP. The `code` is API: clients match on it.

use std::borrow::Cow;
use std::time::Duration;

/// What class of failure a request met; decides the HTTP status and whether a retry can help.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The request itself is wrong (400).
    Invalid,
    /// No or wrong credential (401).
    Unauthenticated,
    /// The credential may not do this (403).
    Forbidden,
    /// Not there, or not visible to this tenant (404): both look the same.
    NotFound,
    /// Contradicts the present state (409); retrying the same request cannot help.
    Conflict,
    /// Body or prompt too large (413).
    TooLarge,
    /// Well-formed but cannot be processed (422).
    Unprocessable,
    /// Over a limit of the tenant's contract (429).
    Throttled,
    /// The node cannot serve this now (503).
    Unavailable,
    /// The deadline passed (504).
    Deadline,
    /// Storage is full (507).
    StorageFull,
    /// Our fault (500).
    Internal,
}

/// A failure that is told to a client.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    /// Class.
    pub kind: ErrorKind,
    /// Stable machine-readable code, such as `queue_full`.
    pub code: &'static str,
    /// What happened and what to do; never contains prompts, keys or another tenant's names.
    pub message: Cow<'static, str>,
    /// The request field at fault, such as `max_tokens`.
    pub param: Option<Cow<'static, str>>,
    /// Earliest sensible retry.
    pub retry_after: Option<Duration>,
}

impl RequestError {
    /// An error without field and retry hint.
    pub fn new(kind: ErrorKind, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { kind, code, message: message.into(), param: None, retry_after: None }
    }

    /// A wrong field of the request.
    pub fn field(
        code: &'static str,
        param: impl Into<Cow<'static, str>>,
        message: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self { param: Some(param.into()), ..Self::new(ErrorKind::Invalid, code, message) }
    }

    /// Adds a retry hint.
    #[must_use]
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// Our own fault: logged in full where it arose, told to the client without details.
    pub fn internal() -> Self {
        Self::new(
            ErrorKind::Internal,
            "internal_error",
            "the server failed to handle this request; it has been logged, please retry",
        )
    }
}

/// A broken invariant: panics where assertions are on, otherwise logs an error and counts
/// `tenantry_invariant_violations_total`-worthy events through `tracing` target `invariant`.
#[macro_export]
macro_rules! critical {
    ($($arg:tt)*) => {{
        if cfg!(debug_assertions) {
            panic!($($arg)*);
        }
        tracing::error!(target: "invariant", $($arg)*);
    }};
}
