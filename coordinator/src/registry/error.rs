//! Why the registry refuses a command or cannot carry it out.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use shared::error::{ErrorKind, RequestError};

/// Text known when the program was built, or read from another node's answer.
pub type Text = Cow<'static, str>;

/// A refused or failed command. Unless it says otherwise, nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum RegistryError {
    /// A value breaks a rule of its own.
    #[error("{field} is {found}, which is not allowed: {rule}")]
    Invalid {
        /// Which field.
        field: Text,
        /// What was found, shortened.
        found: String,
        /// The rule.
        rule: String,
    },
    /// The name is taken.
    #[error("{what} {name} exists already")]
    Exists {
        /// What kind of thing.
        what: Text,
        /// Its name.
        name: String,
    },
    /// There is no such thing.
    #[error("there is no {what} {name}")]
    NotFound {
        /// What kind of thing.
        what: Text,
        /// The name looked for.
        name: String,
    },
    /// Contradicts what is registered.
    #[error("{0}")]
    Conflict(String),
    /// Somebody else changed the tenant first.
    #[error("the tenant is at epoch {found}, not {expected}; hint: read it again and decide anew")]
    EpochMismatch {
        /// Epoch the command expected.
        expected: u64,
        /// Epoch found (0: no such tenant).
        found: u64,
    },
    /// A bound is reached.
    #[error("{what}: {max} is the most; hint: {hint}")]
    LimitReached {
        /// What there is too much of.
        what: Text,
        /// How many may be.
        max: usize,
        /// What to do.
        hint: Text,
    },
    /// Too many commands at once.
    #[error("{max} registry commands are waiting already; hint: retry in a second")]
    Busy {
        /// How many may wait.
        max: usize,
    },
    /// No node leads the registry, or the one that does cannot reach a majority. Reads and serving go on.
    #[error(
        "no node could take the change within {waited_ms} ms; hint: nothing was changed, look at tenantry ctl cluster"
    )]
    NoLeader {
        /// How long it was tried.
        waited_ms: u64,
    },
    /// The change was sent and no answer came: it may be applied, also later.
    #[error(
        "no answer within {waited_ms} ms; hint: read the tenant again before retrying, the change may have been kept"
    )]
    OutcomeUnknown {
        /// How long it was tried.
        waited_ms: u64,
    },
    /// The change was made, but this node cannot show it: it is cut off from the leader, or its own disk is full.
    #[error(
        "the change was made, but this node's own copy of the registry lacks it after {waited_ms} ms; hint: ask another node; an API key that was made with it cannot be shown any more, make another"
    )]
    CopyLate {
        /// How long it was waited for.
        waited_ms: u64,
    },
    /// The disk failed. The command may or may not have been applied: read the tenant before trying again.
    #[error(
        "the registry could not be written: {0}; hint: read the tenant again before retrying, the change may have been kept"
    )]
    Storage(String),
    /// The registry cannot be opened.
    #[error("cannot open the registry: {0}")]
    Open(String),
    /// The registry is being restarted; the outcome of a command that was under way is unknown.
    #[error("the registry is restarting; hint: read the tenant again before retrying, the change may have been kept")]
    Unavailable,
}

impl RegistryError {
    /// Class of the failure.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } => ErrorKind::Invalid,
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Exists { .. } | Self::Conflict(_) | Self::EpochMismatch { .. } | Self::LimitReached { .. } => {
                ErrorKind::Conflict
            }
            Self::Busy { .. }
            | Self::NoLeader { .. }
            | Self::OutcomeUnknown { .. }
            | Self::CopyLate { .. }
            | Self::Unavailable
            | Self::Open(_) => ErrorKind::Unavailable,
            Self::Storage(_) => ErrorKind::StorageFull,
        }
    }

    /// Stable code for the admin API.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "invalid_value",
            Self::Exists { .. } => "already_exists",
            Self::NotFound { .. } => "not_found",
            Self::Conflict(_) => "conflict",
            Self::EpochMismatch { .. } => "epoch_mismatch",
            Self::LimitReached { .. } => "limit_reached",
            Self::Busy { .. } => "registry_busy",
            Self::NoLeader { .. } => "registry_no_leader",
            Self::OutcomeUnknown { .. } => "registry_outcome_unknown",
            Self::CopyLate { .. } => "registry_copy_late",
            Self::Storage(_) => "registry_storage",
            Self::Open(_) | Self::Unavailable => "registry_unavailable",
        }
    }
}

impl From<RegistryError> for RequestError {
    fn from(error: RegistryError) -> Self {
        let request = Self::new(error.kind(), error.code(), error.to_string());
        match error {
            RegistryError::Invalid { field, .. } => Self { param: Some(field), ..request },
            RegistryError::Busy { .. } => request.retry_after(std::time::Duration::from_secs(1)),
            _ => request,
        }
    }
}
