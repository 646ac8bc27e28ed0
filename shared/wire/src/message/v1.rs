//! Layouts of version 1 that have changed since. They bear the names they had: a fingerprint holds the name, too.

use super::{Body, EmittedChoice, Envelope};
use crate::frame::Kind;
use crate::schema::wire_type;

wire_type! {
    struct Hello {
        cluster: String,
        node: String,
        incarnation: u64,
        bases: Vec<ServedBase>,
    }
}

wire_type! {
    struct ServedBase {
        name: String,
        hash: [u8; 32],
        numerics_id: String,
    }
}

wire_type! {
    struct Start {
        envelope: Envelope,
        attempt: u32,
        epoch: u64,
        emitted: Vec<EmittedChoice>,
    }
}

wire_type! {
    struct JournalRecord {
        envelope: Envelope,
        attempt: u32,
        answer: Vec<u8>,
        emitted: Vec<EmittedChoice>,
    }
}

wire_type! {
    struct JournalOpen {
        record: JournalRecord,
    }
}

wire_type! {
    struct Journal {
        record: Option<JournalRecord>,
    }
}

/// They are frames of the same types.
macro_rules! bodies {
    ($($name:ident),*) => { $(impl Body for $name { const KIND: Kind = super::$name::KIND; })* };
}
bodies!(Hello, Start, JournalOpen, Journal);

// === from version 1 and back ===

impl From<Start> for super::Start {
    fn from(Start { envelope, attempt, epoch, emitted }: Start) -> Self {
        Self { envelope, attempt, epoch, emitted, pin: super::BasePin::NONE }
    }
}

impl From<super::Start> for Start {
    fn from(super::Start { envelope, attempt, epoch, emitted, pin: _ }: super::Start) -> Self {
        Self { envelope, attempt, epoch, emitted }
    }
}

impl From<JournalRecord> for super::JournalRecord {
    fn from(JournalRecord { envelope, attempt, answer, emitted }: JournalRecord) -> Self {
        Self { envelope, attempt, answer, emitted, pin: super::BasePin::NONE }
    }
}

impl From<super::JournalRecord> for JournalRecord {
    fn from(super::JournalRecord { envelope, attempt, answer, emitted, pin: _ }: super::JournalRecord) -> Self {
        Self { envelope, attempt, answer, emitted }
    }
}
