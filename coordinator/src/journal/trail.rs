//! What of a request is kept elsewhere, and what is to be sent next (core). Held by the request's ride in
//! [`crate::forward`].
//!
//! One message is under way at a time; what comes meanwhile goes with the next. So a slow keeper makes the record lag
//! and nothing else, and nothing is queued: the tokens lie in the ride's own record until they are sent.

use std::time::{Duration, Instant};

use shared::id::{NodeId, RequestId};
use shared::request::Emitted;
use wire::node::JournalDelta;

use super::keeper;
use crate::failover::Attempt;
use crate::route::RoutingTable;

/// Tokens that the record may lack before they are sent: what a resume computes again at most, with those under way.
pub const BEHIND_TOKENS: usize = 8;

/// Time that a token may be missing in the record.
pub const BEHIND: Duration = Duration::from_millis(50);

/// Pause after the keeper could not be reached; a new table may name another one before.
const RETRY_AFTER: Duration = Duration::from_millis(250);

/// What to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Put {
    /// The whole record.
    Open,
    /// What the keeper lacks.
    Add(Vec<JournalDelta>),
}

/// What a keeper made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// It has it.
    Yes,
    /// It lacks what came before: the whole record is to be sent.
    Gap,
    /// Another node goes on with the request: this one's word counts no more.
    Taken,
    /// No answer.
    Unknown,
}

/// What the keeper has of a choice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Mark {
    n_tokens: usize,
    finished: bool,
}

/// See the module.
#[derive(Debug)]
pub struct Trail {
    id: RequestId,
    /// Its tenant's.
    region: Option<String>,
    keeper: Option<NodeId>,
    /// Which life of the keeper's process: another one has no record.
    life: u64,
    open: bool,
    /// What is sent once only has changed: no keeper has it yet.
    changed: bool,
    taken: bool,
    kept: Vec<Mark>,
    /// What the keeper will have when the message under way is answered.
    sending: Option<Vec<Mark>>,
    behind_since: Option<Instant>,
    not_before: Option<Instant>,
}

// === impl Trail ===

impl Trail {
    /// Nothing is kept yet; it may be in `region` only, if there is one.
    pub fn new(id: RequestId, region: Option<String>) -> Self {
        Self {
            id,
            region,
            keeper: None,
            life: 0,
            open: false,
            changed: false,
            taken: false,
            kept: Vec::new(),
            sending: None,
            behind_since: None,
            not_before: None,
        }
    }

    /// Who keeps the record.
    pub fn keeper(&self) -> Option<&NodeId> {
        self.keeper.as_ref()
    }

    /// Everything is kept that was, by the last answer.
    pub fn is_complete(&self, emitted: &Emitted) -> bool {
        self.open && self.kept == marks(emitted)
    }

    /// Another node goes on with the request.
    pub fn is_taken(&self) -> bool {
        self.taken
    }

    /// Looks for a keeper when there is none or it serves no more. A message under way to the former one is waited for no
    /// longer: nobody may be there to answer it.
    pub fn on_table(&mut self, table: &RoutingTable) {
        let life = |node: &NodeId| table.members().get(node).map_or(0, |member| member.incarnation);
        let serves = |node: &NodeId| table.members().get(node).is_some_and(|member| member.takes_requests());
        let next = self.keeper.clone().filter(serves).or_else(|| keeper(table, self.id, self.region.as_deref()));
        let next_life = next.as_ref().map_or(0, life);
        if (&next, next_life) != (&self.keeper, self.life) {
            (self.keeper, self.life, self.open) = (next, next_life, false);
            (self.sending, self.not_before) = (None, None);
        }
    }

    /// The request itself is another one from now on: the whole record is to be sent.
    pub fn on_change(&mut self) {
        (self.open, self.changed) = (false, true);
    }

    /// The client got more.
    pub fn on_progress(&mut self, now: Instant) {
        self.behind_since.get_or_insert(now);
    }

    /// What to send to whom now. Answered by [`Self::on_kept`] before anything else is sent.
    pub fn next(&mut self, now: Instant, emitted: &Emitted, attempt: Attempt) -> Option<(NodeId, Put)> {
        let waits = self.sending.is_some() || self.taken || self.not_before.is_some_and(|at| now < at);
        let keeper = self.keeper.clone().filter(|_| !waits)?;
        let now_has = marks(emitted);
        let put = if self.open {
            let lacks = |(mark, kept): (&Mark, &Mark)| mark.n_tokens - kept.n_tokens.min(mark.n_tokens);
            let n_tokens: usize = now_has.iter().zip(&self.kept).map(lacks).sum();
            let ended = now_has.iter().all(|mark| mark.finished);
            let due = self.behind_since.is_some_and(|since| now >= since + BEHIND);
            if now_has == self.kept {
                // What came was no token: there is nothing to wake up for.
                self.behind_since = None;
                return None;
            }
            if !(n_tokens >= BEHIND_TOKENS || ended || due) {
                return None;
            }
            Put::Add(self.deltas(emitted, attempt))
        } else {
            self.changed = false;
            Put::Open
        };
        (self.sending, self.behind_since, self.not_before) = (Some(now_has), None, None);
        Some((keeper, put))
    }

    /// When [`Self::next`] may have something to send that it does not have now.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.sending.is_some() || self.taken || self.keeper.is_none() {
            return None;
        }
        let due = if self.open { self.behind_since.map(|since| since + BEHIND) } else { self.not_before };
        due.map(|due| self.not_before.map_or(due, |at| at.max(due)))
    }

    /// How the last message fared. `from` is whom it was sent to: a keeper that was left meanwhile counts no more.
    pub fn on_kept(&mut self, now: Instant, from: &NodeId, kept: Kept) {
        if self.keeper.as_ref() != Some(from) {
            return;
        }
        let Some(sent) = self.sending.take() else { return };
        match kept {
            Kept::Yes => (self.open, self.kept) = (!self.changed, sent),
            Kept::Gap => self.open = false,
            Kept::Taken => self.taken = true,
            Kept::Unknown => {
                self.behind_since.get_or_insert(now);
                self.not_before = Some(now + RETRY_AFTER);
            }
        }
    }

    fn deltas(&self, emitted: &Emitted, attempt: Attempt) -> Vec<JournalDelta> {
        let lacking = (0..)
            .zip(&emitted.0)
            .zip(&self.kept)
            .filter(|((_, choice), kept)| choice.tokens.len() > kept.n_tokens || choice.finished != kept.finished);
        let delta = lacking.map(|((index, choice), kept)| JournalDelta {
            id: self.id,
            attempt,
            choice: index,
            from: u32::try_from(kept.n_tokens).unwrap_or(u32::MAX),
            tokens: choice.tokens.get(kept.n_tokens..).unwrap_or_default().to_vec(),
            finished: choice.finished,
        });
        delta.collect()
    }
}

fn marks(emitted: &Emitted) -> Vec<Mark> {
    emitted.0.iter().map(|choice| Mark { n_tokens: choice.tokens.len(), finished: choice.finished }).collect()
}
