//! From vocabulary to frames and back, by hand: what comes in is checked for meaning, not only for shape.
//!
//! [`envelope`] and [`event`] hold the two large ones. A peer is authenticated but may be broken: names are parsed
//! again, numbers are bounded, and nothing here panics on what a frame says.

mod envelope;
mod event;

use std::fmt;
use std::time::Instant;

use shared::adapter::AdapterRef;
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::hash::ContentHash;
use shared::id::RequestId;

use crate::frame::{Frame, FrameError, Kind};
use crate::message::{self as m, Body, read, write};
use crate::node::{
    Answer, Hello, JournalDelta, JournalRecord, Message, Opening, Progress, Renewal, Request, Resident, Response,
    ServedBase, Start, TextPiece,
};
use crate::version::{Spoken, Version};

/// Nodes a redirect may name.
const MOVED_MAX: usize = 8;
/// Bases a node may serve.
const BASES_MAX: usize = 256;

/// A value of the right shape without a meaning.
#[derive(Debug)]
struct Meaningless(String);

impl<E: fmt::Display> From<E> for Meaningless {
    fn from(error: E) -> Self {
        Self(error.to_string())
    }
}

impl Meaningless {
    fn at(self, kind: Kind) -> FrameError {
        FrameError::Body { name: kind.name, reason: self.0 }
    }
}

/// An error when `holds` is false.
fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), Meaningless> {
    if holds { Ok(()) } else { Err(Meaningless(what())) }
}

/// A decoder was given other kinds than those of the message it reads.
fn unexpected(frame: &Frame) -> FrameError {
    FrameError::Type { found: frame.kind.id }
}

impl Message for Hello {
    const KINDS: &'static [Kind] = &[m::Hello::KIND];

    fn encode_for(&self, version: Version, _: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let (cluster, node, incarnation) = (self.cluster.clone(), self.node.to_string(), self.incarnation);
        match version {
            Version::V1 => {
                let base = |base: &ServedBase| {
                    let (name, numerics_id) = (base.name.to_string(), base.numerics_id.clone());
                    m::v1::ServedBase { name, hash: base.hash.0, numerics_id }
                };
                let bases = self.bases.iter().map(base).collect();
                write(version, &m::v1::Hello { cluster, node, incarnation, bases }, out)
            }
            Version::V2 => {
                let base = |base: &ServedBase| {
                    let (name, numerics_id) = (base.name.to_string(), base.numerics_id.clone());
                    let text = base.text.map(|text| text.0);
                    m::ServedBase { name, hash: base.hash.0, text, numerics_id }
                };
                let bases = self.bases.iter().map(base).collect();
                let Spoken { oldest: wire_oldest, newest: wire_newest } = self.wire;
                let has_authority = self.has_authority;
                let hello = m::Hello { cluster, node, incarnation, bases, wire_oldest, wire_newest, has_authority };
                write(version, &hello, out)
            }
        }
    }

    fn decode(frame: &Frame, _: Instant) -> Result<Self, FrameError> {
        let hello: m::Hello = match frame.version {
            Version::V1 => {
                let m::v1::Hello { cluster, node, incarnation, bases } = read(frame)?;
                let base = |base: m::v1::ServedBase| {
                    let m::v1::ServedBase { name, hash, numerics_id } = base;
                    m::ServedBase { name, hash, text: None, numerics_id }
                };
                let bases = bases.into_iter().map(base).collect();
                // Whoever speaks version 1 when more is offered speaks nothing else.
                let number = Version::V1.number();
                let (wire_oldest, wire_newest, has_authority) = (number, number, false);
                m::Hello { cluster, node, incarnation, bases, wire_oldest, wire_newest, has_authority }
            }
            Version::V2 => read(frame)?,
        };
        let checked = || -> Result<Self, Meaningless> {
            ensure(hello.bases.len() <= BASES_MAX, || format!("{} bases, limit {BASES_MAX}", hello.bases.len()))?;
            let base = |base: m::ServedBase| -> Result<ServedBase, Meaningless> {
                let (hash, text) = (ContentHash(base.hash), base.text.map(ContentHash));
                Ok(ServedBase { name: base.name.parse()?, hash, text, numerics_id: base.numerics_id })
            };
            Ok(Self {
                cluster: hello.cluster,
                node: hello.node.parse()?,
                incarnation: hello.incarnation,
                bases: hello.bases.into_iter().map(base).collect::<Result<_, _>>()?,
                wire: Spoken { oldest: hello.wire_oldest, newest: hello.wire_newest },
                has_authority: hello.has_authority,
            })
        };
        checked().map_err(|error| error.at(frame.kind))
    }
}

impl Message for Heartbeat {
    const KINDS: &'static [Kind] = &[m::Heartbeat::KIND];

    fn encode_for(&self, version: Version, _: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let beat = m::Heartbeat {
            incarnation: self.incarnation,
            seq: self.seq,
            uptime_ms: self.uptime_ms,
            epoch: self.epoch,
            phase: match self.phase {
                NodePhase::Serving => m::Phase::Serving,
                NodePhase::Draining => m::Phase::Draining,
                NodePhase::Leaving => m::Phase::Leaving,
            },
            running: self.load.running,
            places: self.load.places,
            waiting: self.load.waiting,
        };
        write(version, &beat, out)
    }

    fn decode(frame: &Frame, _: Instant) -> Result<Self, FrameError> {
        let beat: m::Heartbeat = read(frame)?;
        Ok(Self {
            incarnation: beat.incarnation,
            seq: beat.seq,
            uptime_ms: beat.uptime_ms,
            epoch: beat.epoch,
            phase: match beat.phase {
                m::Phase::Serving => NodePhase::Serving,
                m::Phase::Draining => NodePhase::Draining,
                m::Phase::Leaving => NodePhase::Leaving,
            },
            load: NodeLoad { running: beat.running, places: beat.places, waiting: beat.waiting },
        })
    }
}

impl Message for Start {
    const KINDS: &'static [Kind] = &[m::Start::KIND];

    fn encode_for(&self, version: Version, now: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        let start = m::Start {
            envelope: envelope::to_wire(&self.envelope, now),
            attempt: self.attempt,
            epoch: self.epoch,
            emitted: envelope::emitted_to_wire(&self.emitted),
            pin: envelope::pin_to_wire(&self.envelope.pin),
        };
        match version {
            Version::V1 => write(version, &m::v1::Start::from(start), out),
            Version::V2 => write(version, &start, out),
        }
    }

    fn decode(frame: &Frame, now: Instant) -> Result<Self, FrameError> {
        let start: m::Start = match frame.version {
            Version::V1 => read::<m::v1::Start>(frame)?.into(),
            Version::V2 => read(frame)?,
        };
        let checked = || -> Result<Self, Meaningless> {
            let envelope = envelope::from_wire(start.envelope, start.pin, now)?;
            Ok(Self {
                emitted: envelope::emitted_from_wire(start.emitted, &envelope.generation)?,
                envelope,
                attempt: start.attempt,
                epoch: start.epoch,
            })
        };
        checked().map_err(|error| error.at(frame.kind))
    }
}

impl Message for Answer {
    const KINDS: &'static [Kind] = &[m::Event::KIND, m::Moved::KIND, m::Refused::KIND];

    fn encode_for(&self, version: Version, _: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Event { attempt, event } => {
                write(version, &m::Event { attempt: *attempt, event: event::to_wire(event) }, out)
            }
            Self::Moved { epoch, to } => {
                write(version, &m::Moved { epoch: *epoch, to: to.iter().map(ToString::to_string).collect() }, out)
            }
            Self::Refused(error) => write(version, &event::error_to_wire(error), out),
        }
    }

    fn decode(frame: &Frame, _: Instant) -> Result<Self, FrameError> {
        match frame.kind.id {
            id if id == m::Event::KIND.id => {
                let m::Event { attempt, event } = read(frame)?;
                Ok(Self::Event { attempt, event: event::from_wire(event) })
            }
            id if id == m::Moved::KIND.id => {
                let m::Moved { epoch, to } = read(frame)?;
                let checked = || -> Result<Self, Meaningless> {
                    ensure(to.len() <= MOVED_MAX, || format!("{} nodes, limit {MOVED_MAX}", to.len()))?;
                    Ok(Self::Moved { epoch, to: to.iter().map(|node| node.parse()).collect::<Result<_, _>>()? })
                };
                checked().map_err(|error| error.at(frame.kind))
            }
            id if id == m::Refused::KIND.id => Ok(Self::Refused(event::error_from_wire(read(frame)?))),
            _ => Err(unexpected(frame)),
        }
    }
}

impl Message for Request {
    const KINDS: &'static [Kind] = &[
        m::Raft::KIND,
        m::Admin::KIND,
        m::Warm::KIND,
        m::JournalOpen::KIND,
        m::JournalPut::KIND,
        m::JournalTake::KIND,
        m::DrainNotice::KIND,
        m::Probe::KIND,
        m::AskResidents::KIND,
        m::AskBaseText::KIND,
    ];

    fn encode_for(&self, version: Version, now: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Raft { group, bytes } => write(version, &m::Raft { group: *group, bytes: bytes.clone() }, out),
            Self::Admin { bytes } => write(version, &m::Admin { bytes: bytes.clone() }, out),
            Self::Warm { epoch, base, adapter } => {
                let (base, tenant) = (base.to_string(), adapter.tenant.to_string());
                write(version, &m::Warm { epoch: *epoch, base, tenant, hash: adapter.hash.0 }, out)
            }
            Self::JournalOpen(record) => {
                let record = record_to_wire(record, now);
                match version {
                    Version::V1 => write(version, &m::v1::JournalOpen { record: record.into() }, out),
                    Version::V2 => write(version, &m::JournalOpen { record }, out),
                }
            }
            Self::JournalPut(deltas) => {
                write(version, &m::JournalPut { deltas: deltas.iter().map(delta_to_wire).collect() }, out)
            }
            Self::JournalTake { id } => write(version, &m::JournalTake { id: id.0 }, out),
            Self::DrainNotice { epoch } => write(version, &m::DrainNotice { epoch: *epoch }, out),
            Self::Probe { id, attempt } => write(version, &m::Probe { id: id.0, attempt: *attempt }, out),
            Self::Residents => write(version, &m::AskResidents { reserved: 0 }, out),
            Self::BaseText { text, offset } => write(version, &m::AskBaseText { text: text.0, offset: *offset }, out),
        }
    }

    fn decode(frame: &Frame, now: Instant) -> Result<Self, FrameError> {
        Ok(match frame.kind.id {
            id if id == m::Raft::KIND.id => {
                let m::Raft { group, bytes } = read(frame)?;
                Self::Raft { group, bytes }
            }
            id if id == m::Admin::KIND.id => Self::Admin { bytes: read::<m::Admin>(frame)?.bytes },
            id if id == m::Warm::KIND.id => {
                let warm: m::Warm = read(frame)?;
                let checked = || -> Result<Self, Meaningless> {
                    let adapter = AdapterRef { tenant: warm.tenant.parse()?, hash: ContentHash(warm.hash) };
                    Ok(Self::Warm { epoch: warm.epoch, base: warm.base.parse()?, adapter })
                };
                checked().map_err(|error| error.at(frame.kind))?
            }
            id if id == m::JournalOpen::KIND.id => {
                let record = match frame.version {
                    Version::V1 => read::<m::v1::JournalOpen>(frame)?.record.into(),
                    Version::V2 => read::<m::JournalOpen>(frame)?.record,
                };
                let record = record_from_wire(record, now);
                Self::JournalOpen(Box::new(record.map_err(|error| error.at(frame.kind))?))
            }
            id if id == m::JournalPut::KIND.id => {
                Self::JournalPut(read::<m::JournalPut>(frame)?.deltas.into_iter().map(delta_from_wire).collect())
            }
            id if id == m::JournalTake::KIND.id => {
                Self::JournalTake { id: RequestId(read::<m::JournalTake>(frame)?.id) }
            }
            id if id == m::DrainNotice::KIND.id => Self::DrainNotice { epoch: read::<m::DrainNotice>(frame)?.epoch },
            id if id == m::Probe::KIND.id => {
                let m::Probe { id, attempt } = read(frame)?;
                Self::Probe { id: RequestId(id), attempt }
            }
            id if id == m::AskResidents::KIND.id => {
                let _: m::AskResidents = read(frame)?;
                Self::Residents
            }
            id if id == m::AskBaseText::KIND.id => {
                let m::AskBaseText { text, offset } = read(frame)?;
                Self::BaseText { text: ContentHash(text), offset }
            }
            _ => return Err(unexpected(frame)),
        })
    }
}

impl Message for Response {
    const KINDS: &'static [Kind] = &[
        m::RaftReply::KIND,
        m::AdminReply::KIND,
        m::Done::KIND,
        m::Journal::KIND,
        m::ProbeReply::KIND,
        m::Residents::KIND,
        m::BaseText::KIND,
        m::Refused::KIND,
    ];

    fn encode_for(&self, version: Version, now: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Raft { bytes } => write(version, &m::RaftReply { bytes: bytes.clone() }, out),
            Self::Admin { bytes } => write(version, &m::AdminReply { bytes: bytes.clone() }, out),
            Self::Done => write(version, &m::Done { reserved: 0 }, out),
            Self::Journal(record) => {
                let record = record.as_deref().map(|record| record_to_wire(record, now));
                match version {
                    Version::V1 => write(version, &m::v1::Journal { record: record.map(Into::into) }, out),
                    Version::V2 => write(version, &m::Journal { record }, out),
                }
            }
            Self::Probe(Progress { known, running, n_tokens }) => {
                write(version, &m::ProbeReply { known: *known, running: *running, n_tokens: *n_tokens }, out)
            }
            Self::Residents(adapters) => {
                let adapters = adapters.iter().map(resident_to_wire).collect();
                write(version, &m::Residents { adapters }, out)
            }
            Self::BaseText(TextPiece { total, bytes }) => {
                write(version, &m::BaseText { total: *total, bytes: bytes.clone() }, out)
            }
            Self::Refused(error) => write(version, &event::error_to_wire(error), out),
        }
    }

    fn decode(frame: &Frame, now: Instant) -> Result<Self, FrameError> {
        Ok(match frame.kind.id {
            id if id == m::RaftReply::KIND.id => Self::Raft { bytes: read::<m::RaftReply>(frame)?.bytes },
            id if id == m::AdminReply::KIND.id => Self::Admin { bytes: read::<m::AdminReply>(frame)?.bytes },
            id if id == m::Done::KIND.id => {
                let _: m::Done = read(frame)?;
                Self::Done
            }
            id if id == m::Journal::KIND.id => {
                let record = match frame.version {
                    Version::V1 => read::<m::v1::Journal>(frame)?.record.map(Into::into),
                    Version::V2 => read::<m::Journal>(frame)?.record,
                };
                let record = record.map(|record| record_from_wire(record, now)).transpose();
                Self::Journal(record.map_err(|error| error.at(frame.kind))?.map(Box::new))
            }
            id if id == m::ProbeReply::KIND.id => {
                let m::ProbeReply { known, running, n_tokens } = read(frame)?;
                Self::Probe(Progress { known, running, n_tokens })
            }
            id if id == m::Residents::KIND.id => {
                let adapters = read::<m::Residents>(frame)?.adapters.into_iter().map(resident_from_wire);
                Self::Residents(adapters.collect::<Result<_, _>>().map_err(|error| error.at(frame.kind))?)
            }
            id if id == m::BaseText::KIND.id => {
                let m::BaseText { total, bytes } = read(frame)?;
                Self::BaseText(TextPiece { total, bytes })
            }
            id if id == m::Refused::KIND.id => Self::Refused(event::error_from_wire(read(frame)?)),
            _ => return Err(unexpected(frame)),
        })
    }
}

impl Message for Opening {
    const KINDS: &'static [Kind] =
        &concat::<{ 2 + Request::KINDS.len() }>(&[m::Start::KIND, m::Renew::KIND], Request::KINDS);

    fn encode_for(&self, version: Version, now: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Start(start) => start.encode_for(version, now, out),
            Self::Request(request) => request.encode_for(version, now, out),
            Self::Renew => write(version, &m::Renew { reserved: 0 }, out),
        }
    }

    fn decode(frame: &Frame, now: Instant) -> Result<Self, FrameError> {
        if frame.kind.id == m::Start::KIND.id {
            return Ok(Self::Start(Box::new(Start::decode(frame, now)?)));
        }
        if frame.kind.id == m::Renew::KIND.id {
            let _: m::Renew = read(frame)?;
            return Ok(Self::Renew);
        }
        Ok(Self::Request(Request::decode(frame, now)?))
    }
}

impl Message for Renewal {
    const KINDS: &'static [Kind] = &[m::Renewed::KIND, m::Refused::KIND];

    fn encode_for(&self, version: Version, _: Instant, out: &mut Vec<u8>) -> Result<(), FrameError> {
        match self {
            Self::Certificate(certificate) => write(version, &m::Renewed { certificate: certificate.clone() }, out),
            Self::Refused(error) => write(version, &event::error_to_wire(error), out),
        }
    }

    fn decode(frame: &Frame, _: Instant) -> Result<Self, FrameError> {
        match frame.kind.id {
            id if id == m::Renewed::KIND.id => Ok(Self::Certificate(read::<m::Renewed>(frame)?.certificate)),
            id if id == m::Refused::KIND.id => Ok(Self::Refused(event::error_from_wire(read(frame)?))),
            _ => Err(unexpected(frame)),
        }
    }
}

/// The kinds of both.
const fn concat<const N: usize>(first: &[Kind], second: &[Kind]) -> [Kind; N] {
    let mut all = [first[0]; N];
    let mut at = 0;
    while at < N {
        all[at] = if at < first.len() { first[at] } else { second[at - first.len()] };
        at += 1;
    }
    all
}

fn record_to_wire(record: &JournalRecord, now: Instant) -> m::JournalRecord {
    m::JournalRecord {
        envelope: envelope::to_wire(&record.envelope, now),
        attempt: record.attempt,
        answer: record.answer.clone(),
        emitted: envelope::emitted_to_wire(&record.emitted),
        pin: envelope::pin_to_wire(&record.envelope.pin),
    }
}

fn record_from_wire(record: m::JournalRecord, now: Instant) -> Result<JournalRecord, Meaningless> {
    let envelope = envelope::from_wire(record.envelope, record.pin, now)?;
    Ok(JournalRecord {
        emitted: envelope::emitted_from_wire(record.emitted, &envelope.generation)?,
        envelope,
        attempt: record.attempt,
        answer: record.answer,
    })
}

fn delta_to_wire(delta: &JournalDelta) -> m::JournalDelta {
    m::JournalDelta {
        id: delta.id.0,
        attempt: delta.attempt,
        choice: delta.choice,
        from: delta.from,
        tokens: delta.tokens.clone(),
        finished: delta.finished,
    }
}

fn resident_to_wire(resident: &Resident) -> m::Resident {
    let Resident { base, adapter } = resident;
    m::Resident { base: base.to_string(), tenant: adapter.tenant.to_string(), hash: adapter.hash.0 }
}

fn resident_from_wire(resident: m::Resident) -> Result<Resident, Meaningless> {
    let adapter = AdapterRef { tenant: resident.tenant.parse()?, hash: ContentHash(resident.hash) };
    Ok(Resident { base: resident.base.parse()?, adapter })
}

fn delta_from_wire(delta: m::JournalDelta) -> JournalDelta {
    JournalDelta {
        id: RequestId(delta.id),
        attempt: delta.attempt,
        choice: delta.choice,
        from: delta.from,
        tokens: delta.tokens,
        finished: delta.finished,
    }
}

#[cfg(test)]
mod tests;
