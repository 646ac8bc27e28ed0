//! The records that a node keeps for other nodes' requests (core). Held by the node behind one short lock, filled and
//! asked by its peer door, and by itself when a client comes back to the very node that keeps its record.
//!
//! A record belongs to one entry node at a time. Taking it hands a copy out under a higher attempt and changes nothing
//! here, since whoever takes it may find that it is not its client's. The next that opens it under a higher attempt owns
//! it, be its copy from here or from another keeper, and what the former entry node still sends is refused.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use shared::error::{ErrorKind, RequestError};
use shared::id::{NodeId, RequestId};
use shared::request::Emitted;
use wire::node::{JournalDelta, JournalRecord};

use super::trail::Kept;
use crate::membership::detector::Health;
use crate::route::RoutingTable;

/// How long after its last word a record is kept: as long as a client may take to come back.
pub const KEPT_FOR: Duration = Duration::from_secs(60);

/// Records of a node; those that were silent for longest go first.
const RECORDS_MAX: usize = 16_384;

/// Bytes of all records of a node: sixteen thousand of usual size, fewer with long prompts.
const BYTES_MAX: usize = 256 << 20;

/// What a take adds to the attempt: more than one entry node's runs can ever count.
const ATTEMPTS_OF_AN_ENTRY: u32 = 16;

/// Told to an entry node whose request goes on elsewhere.
pub const TAKEN: &str = "journal_taken";

/// Told to an entry node that must send the whole record.
pub const GAP: &str = "journal_gap";

#[derive(Debug)]
struct Entry {
    record: JournalRecord,
    /// The entry node that writes it.
    owner: NodeId,
    /// Which life of that node's process, as first seen by [`Records::orphans`].
    owner_life: Option<u64>,
    /// What it holds was handed out to be billed.
    is_billed: bool,
    /// Highest attempt under which a copy was handed out; 0 when none was.
    handed_out: u32,
    at: Instant,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Records {
    entries: BTreeMap<RequestId, Entry>,
    bytes: usize,
}

/// How an entry node understands a keeper's refusal.
pub fn understood(error: &RequestError) -> Kept {
    match error.code {
        TAKEN => Kept::Taken,
        GAP => Kept::Gap,
        _ => Kept::Unknown,
    }
}

/// What came of asking the nodes that may keep a request's record.
#[derive(Debug, Default)]
pub struct Found {
    /// Of their records the one that counts: the furthest.
    pub record: Option<JournalRecord>,
    /// One of them did not answer. It may be the keeper: what nobody else knows is not forgotten yet.
    pub is_one_silent: bool,
}

impl<E> FromIterator<Result<Option<JournalRecord>, E>> for Found {
    /// Of each node's answer; an error is none.
    fn from_iter<I: IntoIterator<Item = Result<Option<JournalRecord>, E>>>(answers: I) -> Self {
        let mut is_one_silent = false;
        let heard = answers.into_iter().map(|answer| answer.inspect_err(|_| is_one_silent = true));
        let records = heard.filter_map(|answer| answer.ok().flatten());
        let record = records.max_by_key(|record| (record.attempt, record.emitted.n_tokens()));
        Self { record, is_one_silent }
    }
}

// === impl Records ===

impl Records {
    /// Keeps a whole record of `from`.
    ///
    /// # Errors
    /// [`TAKEN`] when another node goes on with the request.
    pub fn open(&mut self, now: Instant, from: &NodeId, record: JournalRecord) -> Result<(), RequestError> {
        let mut handed_out = 0;
        if let Some(entry) = self.entries.get(&record.envelope.id) {
            let known = entry.record.attempt;
            if record.attempt < known || entry.owner != *from && record.attempt == known {
                return Err(taken());
            }
            handed_out = entry.handed_out;
        }
        self.remove(&record.envelope.id);
        self.bytes += bytes(&record);
        let id = record.envelope.id;
        let entry = Entry { record, owner: from.clone(), owner_life: None, is_billed: false, handed_out, at: now };
        self.entries.insert(id, entry);
        self.make_room(now);
        Ok(())
    }

    /// Adds to a record. What it has already is not added again.
    ///
    /// # Errors
    /// [`TAKEN`] when another node goes on with the request, [`GAP`] when something before it is missing.
    pub fn put(&mut self, now: Instant, from: &NodeId, delta: &JournalDelta) -> Result<(), RequestError> {
        let Some(entry) = self.entries.get_mut(&delta.id) else { return Err(gap()) };
        if entry.owner != *from || delta.attempt < entry.record.attempt {
            return Err(taken());
        }
        let Some(choice) = entry.record.emitted.0.get_mut(delta.choice as usize) else { return Err(gap()) };
        let Some(known) = choice.tokens.len().checked_sub(delta.from as usize) else { return Err(gap()) };
        let new = delta.tokens.get(known..).unwrap_or_default();
        choice.tokens.extend_from_slice(new);
        choice.finished |= delta.finished;
        (entry.record.attempt, entry.at, entry.is_billed) = (delta.attempt, now, false);
        self.bytes += size_of_val(new);
        Ok(())
    }

    /// A copy of a record for a node that may go on with its request. The former entry node writes on until that node
    /// opens the record itself; each copy has a higher attempt than all before.
    pub fn take(&mut self, now: Instant, id: RequestId) -> Option<JournalRecord> {
        let entry = self.entries.get_mut(&id)?;
        if is_over(now, entry) {
            return None;
        }
        entry.handed_out = entry.handed_out.max(entry.record.attempt).saturating_add(ATTEMPTS_OF_AN_ENTRY);
        Some(JournalRecord { attempt: entry.handed_out, ..entry.record.clone() })
    }

    /// Forgets what nobody comes back for. Called now and then.
    pub fn forget(&mut self, now: Instant) {
        let over: Vec<RequestId> =
            self.entries.iter().filter(|(_, entry)| is_over(now, entry)).map(|(id, _)| *id).collect();
        over.iter().for_each(|id| _ = self.remove(id));
    }

    /// Records of nodes that died, once each: what they hold was delivered, and the node may have died before it could
    /// bill that. Called more often than processes restart.
    pub fn orphans(&mut self, table: &RoutingTable) -> Vec<JournalRecord> {
        self.unbilled(|entry| {
            let Some(owner) = table.members().get(&entry.owner) else { return true };
            let life = entry.owner_life.replace(owner.incarnation);
            owner.health == Health::Dead || life.is_some_and(|life| life != owner.incarnation)
        })
    }

    /// All records that nobody billed from here: for a node that leaves, whose copies will not outlive their owners.
    pub fn before_leaving(&mut self) -> Vec<JournalRecord> {
        self.unbilled(|_| true)
    }

    fn unbilled(&mut self, mut is_due: impl FnMut(&mut Entry) -> bool) -> Vec<JournalRecord> {
        let due = self.entries.values_mut().filter_map(|entry| {
            let is_due = is_due(entry) && !entry.is_billed && entry.record.emitted.n_tokens() > 0;
            entry.is_billed |= is_due;
            is_due.then(|| entry.record.clone())
        });
        due.collect()
    }

    /// Records that are kept.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// None is kept.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn remove(&mut self, id: &RequestId) -> Option<JournalRecord> {
        let entry = self.entries.remove(id)?;
        self.bytes = self.bytes.saturating_sub(bytes(&entry.record));
        Some(entry.record)
    }

    fn make_room(&mut self, now: Instant) {
        while self.entries.len() > RECORDS_MAX || self.bytes > BYTES_MAX && self.entries.len() > 1 {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| (!is_over(now, entry), entry.at));
            let Some(oldest) = oldest.map(|(id, _)| *id) else { return };
            self.remove(&oldest);
        }
    }
}

/// Nobody comes back for it. One that is not finished may still run until its deadline.
fn is_over(now: Instant, entry: &Entry) -> bool {
    let runs_until = if is_finished(&entry.record.emitted) { entry.at } else { entry.record.envelope.deadline };
    now > entry.at.max(runs_until) + KEPT_FOR
}

fn is_finished(emitted: &Emitted) -> bool {
    emitted.0.iter().all(|choice| choice.finished)
}

/// What a record takes, roughly.
fn bytes(record: &JournalRecord) -> usize {
    const FIXED: usize = 1024;
    let generation = &record.envelope.generation;
    let texts: usize = generation.stop.iter().map(String::len).sum();
    let tokens = generation.prompt.len() + record.emitted.n_tokens();
    FIXED + 4 * tokens + 8 * generation.sampling.logit_bias.len() + texts + record.answer.len()
}

fn taken() -> RequestError {
    RequestError::new(ErrorKind::Conflict, TAKEN, "another node goes on with this request")
}

fn gap() -> RequestError {
    RequestError::new(ErrorKind::NotFound, GAP, "the record lacks what comes before; hint: send it whole")
}
