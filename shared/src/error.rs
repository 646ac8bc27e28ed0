//! Errors of a request: few kinds, each with a stable code, a text that says what to do, and a retry hint.
//!
//! Components have their own error enums; each maps to an [`ErrorKind`] here, and one file in the gateway
//! maps kinds to HTTP. The `code` is API: clients match on it.

use std::borrow::Cow;
use std::sync::atomic::{AtomicU64, Ordering};
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

static VIOLATIONS: AtomicU64 = AtomicU64::new(0);

/// Broken invariants of this process so far: `tenantry_invariant_violations_total`.
pub fn violations() -> u64 {
    VIOLATIONS.load(Ordering::Relaxed)
}

/// Counts a broken invariant; called by [`violation!`](crate::violation) only, which also says what broke.
pub fn count_violation() {
    VIOLATIONS.fetch_add(1, Ordering::Relaxed);
}

/// A broken invariant whose request is refused: counts it and logs an error under the `tracing` target `invariant`.
/// Takes what `tracing::error!` takes.
#[macro_export]
macro_rules! violation {
    ($($arg:tt)*) => {{
        $crate::error::count_violation();
        tracing::error!(target: "invariant", $($arg)*);
    }};
}

/// A broken invariant that only a bug of ours can cause: a [`violation!`](crate::violation) that panics where
/// assertions are on.
#[macro_export]
macro_rules! critical {
    ($($arg:tt)*) => {{
        $crate::violation!($($arg)*);
        if cfg!(debug_assertions) {
            panic!($($arg)*);
        }
    }};
}

#[cfg(test)]
mod tests {
    use super::violations;

    #[test]
    fn every_broken_invariant_is_counted() {
        let before = violations();
        crate::violation!(slot = 3, "a lease is not the pinned one");
        let critical = std::panic::catch_unwind(|| crate::critical!("slot {} came twice", 3));
        assert_eq!(critical.is_err(), cfg!(debug_assertions));
        assert_eq!(violations(), before + 2);
    }
}
