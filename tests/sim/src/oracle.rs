//! What must hold, whatever is broken (RELIABILITY 2.12): checked while the simulation runs.
//!
//! | | invariant | where |
//! |---|---|---|
//! | I1 | the tokens of a choice are a prefix of what one undisturbed engine computes | at the client |
//! | I2 | every token reaches the client once, in order | at the client |
//! | I3 | attempts of a request rise: no run starts under a number used before | at every start |
//! | I7 | a node's epoch never falls | every step |
//! | I8 | no request runs after its deadline | in the engine |
//! | I9 | a bounded number of runs, on at most two nodes but for redirects, drains and proven progress | at every start |
//! | I10 | no queue passes its bound | every step |
//! | – | every request ends: in full, or with an honest refusal | at the client and at the end |
//! | – | nothing is left running when all clients have their answers | at the end |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use shared::id::{NodeId, RequestId};

/// Runs a request may start: three that count, three challengers, and a redirect or refusal of each of two candidates.
const STARTS_MAX: usize = 8;

/// What a simulation saw. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Oracle(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    begun: BTreeSet<RequestId>,
    cut_off: BTreeSet<NodeId>,
    starts: BTreeMap<RequestId, Vec<(u32, NodeId)>>,
    epochs: BTreeMap<(NodeId, u64), u64>,
    outcomes: BTreeMap<RequestId, Outcome>,
    gaps: Vec<Duration>,
    violations: Vec<String>,
}

/// How a request ended at its client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// In full.
    Complete,
    /// With this error code.
    Refused(String),
    /// Its entry node died with its client's connection.
    EntryDied,
    /// It was refused by an entry node that reached no other.
    EntryCutOff,
}

/// What a simulation came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests answered in full.
    pub complete: usize,
    /// Requests refused, by error code.
    pub refused: BTreeMap<String, usize>,
    /// Requests whose entry node died, or was cut off and said so.
    pub entry_died: usize,
    /// Runs beyond the first of each request.
    pub migrations: usize,
    /// Longest pause between two tokens at a client whose entry node reached others.
    pub gap_max: Duration,
    /// Everything that must not be.
    pub violations: Vec<String>,
}

// === impl Oracle ===

impl Oracle {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something that must not be.
    pub fn violation(&self, what: String) {
        self.seen().violations.push(what);
    }

    /// So far.
    pub fn n_violations(&self) -> usize {
        self.seen().violations.len()
    }

    /// A client sends its request.
    pub fn on_begin(&self, id: RequestId) {
        self.seen().begun.insert(id);
    }

    /// Whether a client has sent its request.
    pub fn has_begun(&self, id: &RequestId) -> bool {
        self.seen().begun.contains(id)
    }

    /// A run is started by an entry node.
    pub fn on_start(&self, id: RequestId, attempt: u32, node: &NodeId) {
        let mut seen = self.seen();
        let starts = seen.starts.entry(id).or_default();
        let last = starts.last().map_or(0, |(attempt, _)| *attempt);
        starts.push((attempt, node.clone()));
        let n = starts.len();
        if attempt <= last {
            seen.violations.push(format!("I3: attempt {attempt} of {id} starts after {last}"));
        }
        if n > STARTS_MAX {
            seen.violations.push(format!("I9: {n} starts of {id}"));
        }
    }

    /// A node's epoch, in one of its lives.
    pub fn on_epoch(&self, node: &NodeId, life: u64, epoch: u64) {
        let mut seen = self.seen();
        let last = seen.epochs.insert((node.clone(), life), epoch).unwrap_or(0);
        if epoch < last {
            seen.violations.push(format!("I7: the epoch of {node} fell from {last} to {epoch}"));
        }
    }

    /// A pause between two tokens at a client.
    pub fn on_gap(&self, gap: Duration) {
        self.seen().gaps.push(gap);
    }

    /// A request ended at its client.
    pub fn on_outcome(&self, id: RequestId, outcome: Outcome) {
        let mut seen = self.seen();
        if let Some(before) = seen.outcomes.insert(id, outcome.clone()) {
            seen.violations.push(format!("{id} ended twice: {before:?}, {outcome:?}"));
        }
    }

    /// A node reaches no other, or does again.
    pub fn on_cut_off(&self, node: NodeId, cut_off: bool) {
        let mut seen = self.seen();
        if cut_off {
            seen.cut_off.insert(node)
        } else {
            seen.cut_off.remove(&node)
        };
    }

    /// Whether a node reaches no other.
    pub fn is_cut_off(&self, node: &NodeId) -> bool {
        self.seen().cut_off.contains(node)
    }

    /// Whether a request has ended.
    pub fn has_ended(&self, id: &RequestId) -> bool {
        self.seen().outcomes.contains_key(id)
    }

    /// Everything.
    pub fn report(&self) -> Report {
        let seen = self.seen();
        let mut report = Report { violations: seen.violations.clone(), ..Report::default() };
        for outcome in seen.outcomes.values() {
            match outcome {
                Outcome::Complete => report.complete += 1,
                Outcome::Refused(code) => *report.refused.entry(code.clone()).or_default() += 1,
                Outcome::EntryDied | Outcome::EntryCutOff => report.entry_died += 1,
            }
        }
        report.migrations = seen.starts.values().map(|starts| starts.len() - 1).sum();
        report.gap_max = seen.gaps.iter().copied().max().unwrap_or_default();
        report
    }
}
