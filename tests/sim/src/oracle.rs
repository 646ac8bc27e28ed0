//! What must hold, whatever is broken (RELIABILITY 2.12): checked while the simulation runs.
//!
//! | | invariant | where |
//! |---|---|---|
//! | I1 | the tokens of a choice are a prefix of what one undisturbed engine computes | at the client |
//! | I2 | every token reaches the client once, in order, whichever node it comes from | at the client |
//! | I3 | attempts of a request rise at an entry node, and what an older one left behind is dropped | at every start |
//! | I4 | a request runs on the adapter it was admitted with | in its tokens, which depend on it |
//! | I5 | places taken and places free are all places; none is taken when all is over | every step, at the end |
//! | I6 | tokens billed are tokens delivered, for every request answered in full; the last words of a node that died within 150 ms of the end count apart, and all of its record when another node died within 800 ms of it: two deaths before either is followed are one trouble too many | at the end |
//! | I7 | a node's epoch never falls | every step |
//! | I8 | no request runs after its deadline | in the engine |
//! | I9 | a bounded number of runs for every node that has the client | at every start |
//! | I10 | no queue passes its bound | every step |
//! | – | every request ends: in full, or with an honest refusal | at the client and at the end |
//! | – | an accepted request's record is found when its entry node is gone | at the client |

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use coordinator::journal::trail::BEHIND_TOKENS;
use shared::id::{NodeId, RequestId};

/// Runs that one entry node may start: three that count, three challengers, and a redirect or refusal of each of two
/// candidates.
const STARTS_MAX: usize = 8;

/// A node that dies this soon after a client had everything may take the last words on it along: usage reaches the disk
/// after 50 ms, the record its keeper within a message.
const LAST_WORD: Duration = Duration::from_millis(150);

/// By then a node's death is noticed and followed: its keeper has billed for it, and whose keeper it was has found another.
/// Five heartbeats are missed, and the disk waits 50 ms.
const BILLED: Duration = Duration::from_millis(800);

/// What a simulation saw. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Oracle(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    now: Duration,
    cut_off: BTreeSet<NodeId>,
    /// By request and entry node: attempts and where they ran.
    starts: BTreeMap<(RequestId, NodeId), Vec<(u32, NodeId)>>,
    unbilled: u64,
    /// When a node last said that a request is done; its client hears of it later.
    done: BTreeMap<RequestId, Duration>,
    entries: BTreeMap<RequestId, usize>,
    ids: BTreeMap<u128, RequestId>,
    epochs: BTreeMap<(NodeId, u64), u64>,
    outcomes: BTreeMap<u128, Ended>,
    deaths: Vec<(Duration, usize)>,
    /// Tokens of each choice: of several that speak of one request the furthest counts.
    billed: BTreeMap<RequestId, BTreeMap<u32, u64>>,
    unknown: usize,
    lost_records: Vec<u128>,
    moved: usize,
    gaps: Vec<Duration>,
    resume_gaps: Vec<Duration>,
    failures: BTreeMap<String, usize>,
    violations: Vec<String>,
}

#[derive(Debug)]
struct Ended {
    outcome: Outcome,
    received: u64,
}

/// How a request ended at its client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// In full, from this node at last.
    Complete {
        /// Which.
        at: usize,
    },
    /// With this error code.
    Refused(String),
}

/// What a simulation came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests answered in full.
    pub complete: usize,
    /// Requests refused, by error code.
    pub refused: BTreeMap<String, usize>,
    /// Runs beyond the first at each node that had the client.
    pub migrations: usize,
    /// Times that a client went on at another node.
    pub resumes: usize,
    /// Times that it had to begin anew, since no node knew its request.
    pub unknown: usize,
    /// Of these, requests that had been accepted long enough to be kept.
    pub lost_records: Vec<u128>,
    /// Answers that nodes ended with an error, by code; clients go on elsewhere.
    pub failures: BTreeMap<String, usize>,
    /// Longest pause between two tokens from one node that reached others.
    pub gap_max: Duration,
    /// Longest pause of a client that went on at another node.
    pub resume_gap_max: Duration,
    /// Tokens delivered, by the clients' count.
    pub delivered: u64,
    /// Of these, those that are billed.
    pub billed: u64,
    /// Those that are not: a node died before it could say its last word.
    pub unbilled: u64,
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

    /// Time passes.
    pub fn on_step(&self, now: Duration) {
        self.seen().now = now;
    }

    /// A node has the client of a request from now on.
    pub fn on_entry(&self, id: RequestId) {
        *self.seen().entries.entry(id).or_default() += 1;
    }

    /// A node says that its client has everything.
    pub fn on_done(&self, id: RequestId) {
        let mut seen = self.seen();
        let now = seen.now;
        seen.done.insert(id, now);
    }

    /// A client knows its request's id.
    pub fn on_accepted(&self, key: u128, id: RequestId) {
        let mut seen = self.seen();
        if let Some(before) = seen.ids.insert(key, id).filter(|before| *before != id) {
            seen.violations.push(format!("request {key} is {id} and was {before}"));
        }
    }

    /// A run is started by an entry node.
    pub fn on_start(&self, id: RequestId, attempt: u32, entry: &NodeId, node: &NodeId) {
        let mut seen = self.seen();
        let visits = seen.entries.get(&id).copied().unwrap_or(1);
        let starts = seen.starts.entry((id, entry.clone())).or_default();
        let last = starts.last().map_or(0, |(attempt, _)| *attempt);
        starts.push((attempt, node.clone()));
        let n = starts.len();
        // The same node may get its client back after it lost all memory.
        if attempt <= last && visits == 1 {
            seen.violations.push(format!("I3: attempt {attempt} of {id} starts after {last}"));
        }
        if n > STARTS_MAX * visits {
            seen.violations.push(format!("I9: {n} starts of {id} for {visits} visits"));
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

    /// A node's process ended.
    pub fn on_death(&self, node: usize) {
        let mut seen = self.seen();
        let now = seen.now;
        seen.deaths.push((now, node));
    }

    /// Usage reached a disk: tokens of each choice. `apart`: a node's own, whatever others said.
    pub fn bill(&self, id: RequestId, delivered: &[u32], apart: bool) {
        let mut seen = self.seen();
        let billed = seen.billed.entry(id).or_default();
        for (choice, n_tokens) in (0..).zip(delivered) {
            let of_choice = billed.entry(choice).or_default();
            let n_tokens = u64::from(*n_tokens);
            *of_choice = if apart { *of_choice + n_tokens } else { n_tokens.max(*of_choice) };
        }
    }

    /// A node ended an answer with an error.
    pub fn on_failed(&self, code: &str) {
        *self.seen().failures.entry(code.to_owned()).or_default() += 1;
    }

    /// No node knows a request any more; `lost`: it should be known.
    pub fn on_unknown(&self, key: u128, lost: bool) {
        let mut seen = self.seen();
        seen.unknown += 1;
        if lost {
            seen.lost_records.push(key);
        }
    }

    /// A client goes to another node.
    pub fn on_moved(&self) {
        self.seen().moved += 1;
    }

    /// A pause between two tokens at a client; `resumed` when the second is the first of another visit.
    pub fn on_gap(&self, node: &NodeId, resumed: bool, gap: Duration) {
        let mut seen = self.seen();
        if resumed {
            seen.resume_gaps.push(gap);
        } else if !seen.cut_off.contains(node) {
            // A node that reaches no other cannot bring tokens from them.
            seen.gaps.push(gap);
        }
    }

    /// A request ended at its client, which received so many tokens.
    pub fn on_outcome(&self, key: u128, outcome: Outcome, received: u64) {
        let mut seen = self.seen();
        let ended = Ended { outcome, received };
        if let Some(before) = seen.outcomes.insert(key, ended) {
            seen.violations.push(format!("{key} ended twice, first with {:?}", before.outcome));
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
    pub fn has_ended(&self, key: u128) -> bool {
        self.seen().outcomes.contains_key(&key)
    }

    /// Compares what is billed with what was delivered, when all usage has reached the disk.
    pub fn check_billing(&self) {
        let mut seen = self.seen();
        let Seen { outcomes, ids, billed, done, deaths, violations, unbilled, .. } = &mut *seen;
        for (key, Ended { outcome, received }) in outcomes.iter() {
            let Some((id, at)) = ids.get(key).and_then(|id| Some((id, done.get(id)?))) else { continue };
            let billed = billed_of(billed, *id);
            let Outcome::Complete { at: node } = outcome else { continue };
            let lost = received.saturating_sub(billed);
            let died = deaths.iter().find(|(when, who)| who == node && (*at..*at + LAST_WORD).contains(when));
            // The node's last words die with it, all of its record only with the record's keeper.
            let excused = died.is_some_and(|(died, _)| {
                let another = |(when, who): &(Duration, usize)| who != node && when.abs_diff(*died) < BILLED;
                lost <= 2 * BEHIND_TOKENS as u64 || deaths.iter().any(another)
            });
            *unbilled += lost;
            if billed > *received || lost > 0 && !excused {
                violations.push(format!("I6: {billed} tokens of request {key} are billed, {received} delivered"));
            }
        }
    }

    /// Everything.
    pub fn report(&self) -> Report {
        let seen = self.seen();
        let mut report = Report {
            migrations: seen.starts.values().map(|starts| starts.len() - 1).sum(),
            resumes: seen.moved,
            unknown: seen.unknown,
            unbilled: seen.unbilled,
            lost_records: seen.lost_records.clone(),
            failures: seen.failures.clone(),
            gap_max: seen.gaps.iter().copied().max().unwrap_or_default(),
            resume_gap_max: seen.resume_gaps.iter().copied().max().unwrap_or_default(),
            violations: seen.violations.clone(),
            ..Report::default()
        };
        for (key, ended) in &seen.outcomes {
            report.delivered += ended.received;
            report.billed += seen.ids.get(key).map_or(0, |id| billed_of(&seen.billed, *id));
            match &ended.outcome {
                Outcome::Complete { .. } => report.complete += 1,
                Outcome::Refused(code) => *report.refused.entry(code.clone()).or_default() += 1,
            }
        }
        report
    }
}

fn billed_of(billed: &BTreeMap<RequestId, BTreeMap<u32, u64>>, id: RequestId) -> u64 {
    billed.get(&id).into_iter().flat_map(BTreeMap::values).sum()
}
