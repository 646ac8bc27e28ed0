//! What becomes of one request when nodes come and go (core). Driven by [`crate::forward`], one per request.
//!
//! It keeps the resume record: the tokens the client has. A *run* is one node working on the request, numbered by
//! its attempt. Normally there is one, the current. When its node stalls or is suspected, a second is started elsewhere
//! from the record, as *challenger*: the tokens are the same wherever they are computed, so whichever brings the next
//! one first is the current run from then on, and the other is cancelled.
//!
//! ```text
//! accepted = of the current run or the challenger, and the next of its choice; everything else is dropped
//! ```
//!
//! | the current run's node | what happens | paid from the retry budget |
//! |---|---|---|
//! | is dead, or another life of itself | next run elsewhere | no |
//! | is past its drain grace | next run elsewhere | no |
//! | lost the stream, failed | next run elsewhere; without budget when its death is known | yes |
//! | is suspected, or brings nothing for long | challenger elsewhere | yes |
//! | says that the tenant lives elsewhere | there, once | no |
//! | refuses | the other candidate | no |
//!
//! The tokens are a function of the request, of the content of its base, and of the arithmetic that computes it: another
//! content is never asked, and once the client has tokens, no other arithmetic ([`BasePin`]).
//!
//! A request whose runs ended twice with the death of their process, without getting further, is poison: it gets no
//! third node ([`quarantine`]).

use std::time::{Duration, Instant};

use shared::cluster::NodePhase;
use shared::error::{ErrorKind, RequestError};
use shared::id::{NodeId, TenantId};
use shared::request::{BasePin, Emitted};
use shared::token::TokenEvent;

use crate::membership::detector::Health;
use crate::route::{Candidate, Place, RoutingTable, no_node};

pub mod budget;
pub mod likeness;
pub mod quarantine;
mod run;

use budget::RetryBudget;
use likeness::no_like_node;
use quarantine::{Life, Mark, is_dead, lives};
use run::{Run, run_of};

/// Code of the error with which a node past its drain grace ends its streams.
pub const HAND_OVER: &str = "hand_over";

/// A stream that pauses for less is no stall: a step with long prompts takes that long on a slow machine.
pub const STALL_MIN: Duration = Duration::from_millis(250);

/// A pause of so many usual gaps is a stall.
const STALL_GAPS: u32 = 4;

/// Runs that may end badly or well; challengers that lose are not counted, the budget bounds them.
pub const ATTEMPTS_MAX: u32 = 3;

/// Different nodes a request may have harmed: those its runs ended on by anything but a drain, until it has shown by
/// progress that it harms none.
pub const NODES_MAX: usize = 2;

/// Challengers of one request.
const HEDGES_MAX: u32 = 3;

/// Tokens that may be under way when a node dies: less progress than this between two deaths is none.
const PROGRESS_TOKENS: usize = 16;

/// How long a request without a node waits for one. An honest refusal comes within 5 s of a double failure: 1 s until
/// it is noticed, 3 s here.
const HOLD_MAX: Duration = Duration::from_secs(3);

/// A challenger to a suspected node goes only where fewer places than these tenths are taken: death is told soon, and
/// a loaded cluster is not to be loaded twice.
const HEDGE_BUSY_TENTHS: u32 = 7;

/// Number of a run, from 1; unique within the request, it fences late events.
pub type Attempt = u32;

/// What an event means for the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It is the next one: pass it on. The run given lost the race and is to be cancelled.
    Deliver(Option<Attempt>),
    /// The client has it, or nobody wants it any more.
    Drop,
    /// The run broke the rules of the stream or failed in a way that another may not: call [`Failover::on_ended`].
    Ended,
}

/// How a run ended without finishing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The stream broke: the node may be dead or out of reach.
    Lost,
    /// The node's own word: it failed, or broke the rules of the stream.
    Failed(RequestError),
    /// The node takes nothing new; nothing ran.
    Refused(RequestError),
    /// The tenant lives elsewhere; nothing ran.
    Moved(NodeId),
}

/// What to do for the request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Start a run from [`Failover::emitted`].
    Start {
        /// Its number.
        attempt: Attempt,
        /// Where.
        node: NodeId,
        /// It was sent there by the former owner: not to be sent on again.
        redirected: bool,
    },
    /// End a run; its events are dropped from now on.
    Cancel(Attempt),
    /// The request was running where a process died; tell the quarantine.
    Mark,
    /// The request is poison; tell the quarantine and operators.
    Quarantine,
    /// Tell the client and forget the request.
    Fail(RequestError),
}

/// What a decision looks at besides the request.
#[derive(Debug)]
pub struct Around<'a> {
    /// Time.
    pub now: Instant,
    /// Who serves.
    pub table: &'a RoutingTable,
    /// What retries are left to all requests of this node.
    pub budget: &'a mut RetryBudget,
}

/// Without a run, looking for a node.
#[derive(Debug, Clone)]
struct Hold {
    since: Instant,
    /// Where the last run ended; its confirmed death makes the next one free.
    left: Option<(NodeId, u64)>,
    free: bool,
    error: RequestError,
}

/// The fate of one request.
#[derive(Debug)]
pub struct Failover {
    place: Place,
    tenant: TenantId,
    /// What the request was encoded for, and from the first token on whose arithmetic it is.
    pin: BasePin,
    emitted: Emitted,
    n_unfinished: usize,
    /// The client was told that it began, and whether the base stands in for its adapter.
    told_started: Option<bool>,
    told_prompt: bool,
    current: Option<Run>,
    challenger: Option<Run>,
    hold: Option<Hold>,
    over: bool,
    attempts: Attempt,
    n_runs: u32,
    n_hedges: u32,
    /// Nodes it may have harmed.
    nodes: Vec<NodeId>,
    refused: Vec<NodeId>,
    /// Lives that ended with it without getting further.
    deaths: Vec<Life>,
    stood_at: usize,
    gap: Option<Duration>,
    progress_at: Option<Instant>,
}

// === impl Failover ===

impl Failover {
    /// A request of `n` choices. `mark` is what the quarantine knows of it.
    pub fn new(place: Place, tenant: TenantId, n: u32, mark: Mark) -> Self {
        let n = n.max(1) as usize;
        Self {
            place,
            tenant,
            pin: BasePin::default(),
            emitted: Emitted(vec![Default::default(); n]),
            n_unfinished: n,
            told_started: None,
            told_prompt: false,
            current: None,
            challenger: None,
            hold: None,
            over: false,
            attempts: 0,
            n_runs: 0,
            n_hedges: 0,
            nodes: Vec::new(),
            refused: Vec::new(),
            deaths: mark.deaths,
            stood_at: mark.stood_at,
            gap: None,
            progress_at: None,
        }
    }

    /// As [`Self::new`], for a request that another entry node served until it died: what its client has is
    /// `emitted`, and its runs up to `attempt` are over. `fell_back`: the base stands in for its adapter.
    pub fn resumed(
        place: Place,
        tenant: TenantId,
        emitted: Emitted,
        attempt: Attempt,
        fell_back: bool,
        mark: Mark,
    ) -> Self {
        let n = u32::try_from(emitted.0.len()).unwrap_or(u32::MAX);
        let mut resumed = Self::new(place, tenant, n, mark);
        resumed.n_unfinished = emitted.0.iter().filter(|choice| !choice.finished).count().max(1);
        resumed.told_started = (!emitted.is_empty()).then_some(fell_back);
        resumed.told_prompt = !emitted.is_empty();
        (resumed.emitted, resumed.attempts) = (emitted, attempt);
        resumed
    }

    /// The same, bound to a model. Its arithmetic binds a request that has tokens.
    #[must_use]
    pub fn pinned(mut self, pin: BasePin) -> Self {
        self.pin = pin;
        if self.emitted.is_empty() {
            self.pin.numerics = None;
        }
        self
    }

    /// Whose arithmetic the tokens are of: those there are, or those of the run under way.
    pub fn numerics(&self) -> Option<&str> {
        let running = || self.current.as_ref().and_then(|run| run.numerics.as_deref());
        self.pin.numerics.as_deref().or_else(running)
    }

    /// What the client has.
    pub fn emitted(&self) -> &Emitted {
        &self.emitted
    }

    /// Lives of nodes that ended with it without getting further, the latest last.
    pub fn deaths(&self) -> &[Life] {
        &self.deaths
    }

    /// Finished, failed or given up: nothing follows.
    pub fn is_over(&self) -> bool {
        self.over
    }

    /// The run whose events are accepted.
    pub fn current(&self) -> Option<(Attempt, &NodeId)> {
        self.current.as_ref().map(|run| (run.attempt, &run.node))
    }

    /// The run that races it.
    pub fn challenger(&self) -> Option<(Attempt, &NodeId)> {
        self.challenger.as_ref().map(|run| (run.attempt, &run.node))
    }

    /// Runs so far, without challengers that lost.
    pub fn n_runs(&self) -> u32 {
        self.n_runs
    }

    /// Starts the first run.
    pub fn begin(&mut self, around: &mut Around<'_>) -> Vec<Command> {
        self.hold = Some(Hold { since: around.now, left: None, free: true, error: no_node() });
        let commands = self.place(around);
        // Nothing is lost yet, so there is nothing to wait for.
        if commands.is_empty() { self.give_up(no_node()) } else { commands }
    }

    /// Judges an event of a run. Allocates nothing but the record's growth.
    pub fn on_event(&mut self, now: Instant, attempt: Attempt, event: &TokenEvent) -> Verdict {
        let is = |run: &Option<Run>| run.as_ref().is_some_and(|run| run.attempt == attempt);
        let challenges = is(&self.challenger);
        if self.over || !(is(&self.current) || challenges) {
            return Verdict::Drop;
        }
        let run = if challenges { &mut self.challenger } else { &mut self.current };
        if let Some(run) = run {
            run.started = true;
        }
        if challenges && matches!(event, TokenEvent::Failed(_)) {
            // The race is about tokens; who cannot run only leaves it.
            return Verdict::Ended;
        }
        match self.judge(event) {
            Verdict::Deliver(_) => Verdict::Deliver(self.progressed(now, event, challenges)),
            other => other,
        }
    }

    /// The reader was busy with its client until now: silence before this moment is no stall.
    pub fn on_listening(&mut self, now: Instant) {
        self.progress_at = self.progress_at.map(|_| now);
    }

    /// A run ended without finishing.
    pub fn on_ended(&mut self, around: &mut Around<'_>, attempt: Attempt, end: End) -> Vec<Command> {
        if self.over {
            return Vec::new();
        }
        if self.challenger.as_ref().is_some_and(|run| run.attempt == attempt) {
            self.challenger = None;
            return Vec::new();
        }
        let Some(run) = self.current.take_if(|run| run.attempt == attempt) else { return Vec::new() };
        let hold =
            |free, error| Hold { since: around.now, left: Some((run.node.clone(), run.incarnation)), free, error };
        match end {
            End::Moved(to) if !run.redirected && self.may_go_on(around.table, &to) => {
                self.n_runs -= 1;
                let incarnation = around.table.members().get(&to).map_or(0, |member| member.incarnation);
                return vec![self.start(around.table, to, incarnation, true)];
            }
            End::Moved(_) => self.refused(&run, hold(true, no_node())),
            End::Refused(error) => self.refused(&run, hold(true, error)),
            End::Failed(error) if error.code == HAND_OVER => self.hold = Some(hold(true, no_node())),
            End::Failed(error) => {
                self.harm(&run.node);
                self.hold = Some(hold(false, error));
            }
            End::Lost => {
                self.harm(&run.node);
                self.hold = Some(hold(false, no_node()));
            }
        }
        self.after_end(around)
    }

    /// Looks at the nodes of its runs in a new table.
    pub fn on_table(&mut self, around: &mut Around<'_>) -> Vec<Command> {
        if self.over {
            return Vec::new();
        }
        let dead = |run: &mut Run| is_dead(around.table, &run.node, run.incarnation);
        let mut commands: Vec<Command> =
            self.challenger.take_if(dead).map(|run| Command::Cancel(run.attempt)).into_iter().collect();
        commands.extend(self.on_table_of_current(around));
        commands
    }

    fn on_table_of_current(&mut self, around: &mut Around<'_>) -> Vec<Command> {
        let Some(run) = self.current.clone() else { return self.place(around) };
        if is_dead(around.table, &run.node, run.incarnation) {
            return self.on_death(around, &run);
        }
        match around.table.members().get(&run.node) {
            Some(member) if member.phase == NodePhase::Leaving => {
                let error = RequestError::new(ErrorKind::Unavailable, HAND_OVER, "the node leaves");
                let mut commands = vec![Command::Cancel(run.attempt)];
                commands.extend(self.on_ended(around, run.attempt, End::Failed(error)));
                commands
            }
            Some(member) if member.health == Health::Suspect => self.challenge(around, HEDGE_BUSY_TENTHS),
            _ => Vec::new(),
        }
    }

    /// When [`Self::on_tick`] is due, if nothing happens before.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.over {
            return None;
        }
        let stalls = || self.progress_at.map(|at| at + self.stall_after());
        match &self.hold {
            // Budget may have come back, and the end of waiting is seen.
            Some(hold) => Some(self.progress_at.unwrap_or(hold.since) + STALL_MIN),
            None => {
                self.current.as_ref().filter(|run| run.n_tokens > 0 && self.challenger.is_none()).and_then(|_| stalls())
            }
        }
    }

    /// Lets time pass: a stall, or a wait for a node.
    pub fn on_tick(&mut self, around: &mut Around<'_>) -> Vec<Command> {
        if self.wake_at().is_none_or(|at| around.now < at) {
            return Vec::new();
        }
        self.progress_at = Some(around.now);
        match self.hold {
            Some(_) => self.place(around),
            // Every place may be taken: it is this or nothing.
            None => self.challenge(around, u32::MAX),
        }
    }

    fn stall_after(&self) -> Duration {
        self.gap.map_or(STALL_MIN, |gap| (gap * STALL_GAPS).max(STALL_MIN))
    }

    fn judge(&mut self, event: &TokenEvent) -> Verdict {
        let deliver_if = |new: bool| if new { Verdict::Deliver(None) } else { Verdict::Drop };
        match event {
            TokenEvent::Started { fell_back, .. } => match self.told_started {
                None => {
                    self.told_started = Some(*fell_back);
                    Verdict::Deliver(None)
                }
                Some(told) if told == *fell_back => Verdict::Drop,
                // The client was told of other weights than these.
                Some(_) => Verdict::Ended,
            },
            TokenEvent::Prompt { .. } => deliver_if(!std::mem::replace(&mut self.told_prompt, true)),
            TokenEvent::Token { choice, seq, id, .. } => match self.emitted.0.get_mut(*choice as usize) {
                Some(choice) if (*seq as usize) < choice.tokens.len() => Verdict::Drop,
                Some(choice) if *seq as usize == choice.tokens.len() && !choice.finished => {
                    choice.tokens.push(*id);
                    Verdict::Deliver(None)
                }
                _ => Verdict::Ended,
            },
            TokenEvent::Finished { choice, .. } => match self.emitted.0.get_mut(*choice as usize) {
                Some(choice) if choice.finished => Verdict::Drop,
                Some(choice) => {
                    choice.finished = true;
                    self.n_unfinished -= 1;
                    self.over = self.n_unfinished == 0;
                    Verdict::Deliver(None)
                }
                None => Verdict::Ended,
            },
            TokenEvent::Failed(error) if may_succeed_elsewhere(error) => Verdict::Ended,
            TokenEvent::Failed(_) => {
                self.over = true;
                Verdict::Deliver(None)
            }
        }
    }

    /// An accepted event decides the race. Returns the run that lost it.
    fn progressed(&mut self, now: Instant, event: &TokenEvent, challenges: bool) -> Option<Attempt> {
        if matches!(event, TokenEvent::Started { .. } | TokenEvent::Prompt { .. }) {
            return None;
        }
        let loser = self.challenger.take().map(|challenger| {
            if !challenges {
                return challenger.attempt;
            }
            self.n_runs += 1;
            let current = self.current.replace(challenger);
            current.map_or(0, |run| {
                self.harm(&run.node);
                run.attempt
            })
        });
        if let (Some(run), TokenEvent::Token { .. }) = (&mut self.current, event) {
            let gap = self.progress_at.filter(|_| run.n_tokens > 0).map(|at| now.saturating_duration_since(at));
            // A fifth of the new gap: a few slow steps in a row become usual, one does not.
            self.gap = gap.map(|gap| self.gap.map_or(gap, |usual| (usual * 4 + gap) / 5)).or(self.gap);
            run.n_tokens += 1;
            if self.pin.numerics.is_none() {
                self.pin.numerics.clone_from(&run.numerics);
            }
        }
        self.progress_at = Some(now);
        loser.filter(|attempt| *attempt > 0)
    }

    fn on_death(&mut self, around: &mut Around<'_>, run: &Run) -> Vec<Command> {
        let mut commands = vec![Command::Cancel(run.attempt)];
        self.current = None;
        let stands_at = self.emitted.n_tokens();
        if stands_at > self.stood_at + PROGRESS_TOKENS {
            (self.deaths, self.nodes) = (Vec::new(), Vec::new());
        }
        self.deaths.retain(|life| !lives(around.table, life));
        self.harm(&run.node);
        if run.started {
            self.deaths.push((run.node.clone(), run.incarnation));
            self.stood_at = stands_at;
            commands.push(Command::Mark);
        }
        if self.deaths.len() >= 2 {
            commands.push(Command::Quarantine);
            commands.extend(self.challenger.take().map(|run| Command::Cancel(run.attempt)));
            commands.extend(self.give_up(quarantine::refusal()));
            return commands;
        }
        let left = Some((run.node.clone(), run.incarnation));
        self.hold = Some(Hold { since: around.now, left, free: true, error: no_node() });
        commands.extend(self.after_end(around));
        commands
    }

    fn harm(&mut self, node: &NodeId) {
        if !self.nodes.contains(node) {
            self.nodes.push(node.clone());
        }
    }

    fn refused(&mut self, run: &Run, hold: Hold) {
        self.n_runs -= 1;
        self.refused.push(run.node.clone());
        self.hold = Some(hold);
    }

    /// The current run is over: its challenger takes its place, or a node is looked for.
    fn after_end(&mut self, around: &mut Around<'_>) -> Vec<Command> {
        self.progress_at = Some(around.now);
        if let Some(challenger) = self.challenger.take() {
            self.n_runs += 1;
            (self.current, self.hold) = (Some(challenger), None);
            return Vec::new();
        }
        if self.n_runs >= ATTEMPTS_MAX {
            let error = self.hold.take().map_or_else(no_node, |hold| hold.error);
            return self.give_up(error);
        }
        self.place(around)
    }

    /// Tries to end the wait for a node.
    fn place(&mut self, around: &mut Around<'_>) -> Vec<Command> {
        let Some(hold) = self.hold.clone() else { return Vec::new() };
        let left = hold.left.as_ref().map(|(node, _)| node);
        let known_dead = hold.left.as_ref().is_some_and(|(node, life)| is_dead(around.table, node, *life));
        let mut candidates = around.table.candidates(&self.place, &self.tenant);
        let n_candidates = candidates.len();
        candidates.retain(|candidate| self.may_go_on(around.table, &candidate.node));
        let error = if candidates.len() < n_candidates { no_like_node() } else { hold.error.clone() };
        // The node it just left only if it came back as another life, and after all others.
        let others = candidates.iter().filter(|c| Some(&c.node) != left);
        let again = candidates.iter().filter(|c| Some(&c.node) == left && known_dead);
        let next = others.chain(again).find(|candidate| self.may_use(candidate)).cloned();
        let refusals = self.refused.len();
        match next {
            Some(next) if hold.free || known_dead || around.budget.withdraw(around.now) => {
                self.hold = None;
                vec![self.start(around.table, next.node, next.incarnation, false)]
            }
            // Whoever may be asked has refused: waiting brings the same.
            None if refusals >= candidates.len().max(1) => self.give_up(error),
            _ if around.now.saturating_duration_since(hold.since) >= HOLD_MAX => self.give_up(error),
            _ => Vec::new(),
        }
    }

    fn may_go_on(&self, table: &RoutingTable, node: &NodeId) -> bool {
        likeness::may_go_on(&self.pin, table.says(node, &self.place.base))
    }

    fn may_use(&self, candidate: &Candidate) -> bool {
        let harmless = self.nodes.contains(&candidate.node) || self.nodes.len() < NODES_MAX;
        harmless && !self.refused.contains(&candidate.node)
    }

    fn challenge(&mut self, around: &mut Around<'_>, busy_tenths: u32) -> Vec<Command> {
        let Some(current) = &self.current else { return Vec::new() };
        if self.challenger.is_some() || self.n_hedges >= HEDGES_MAX || self.n_runs >= ATTEMPTS_MAX {
            return Vec::new();
        }
        // The node that is challenged counts: it is left when the challenger wins.
        let allowed = |c: &Candidate| self.nodes.contains(&c.node) || self.nodes.len() + 1 < NODES_MAX;
        let idle = |c: &Candidate| c.load.running.saturating_mul(10) <= c.load.places.saturating_mul(busy_tenths);
        let candidates = around.table.candidates(&self.place, &self.tenant);
        let other = candidates
            .into_iter()
            .filter(|c| self.may_go_on(around.table, &c.node))
            .find(|c| c.good && c.node != current.node && self.may_use(c) && allowed(c) && idle(c));
        let Some(other) = other.filter(|_| around.budget.withdraw(around.now)) else { return Vec::new() };
        self.n_hedges += 1;
        self.attempts += 1;
        let attempt = self.attempts;
        let run = run_of(around.table, &self.place, other.node.clone(), other.incarnation);
        self.challenger = Some(Run { attempt, ..run });
        vec![Command::Start { attempt, node: other.node, redirected: false }]
    }

    fn start(&mut self, table: &RoutingTable, node: NodeId, incarnation: u64, redirected: bool) -> Command {
        self.attempts += 1;
        self.n_runs += 1;
        let attempt = self.attempts;
        self.current = Some(Run { attempt, redirected, ..run_of(table, &self.place, node.clone(), incarnation) });
        Command::Start { attempt, node, redirected }
    }

    fn give_up(&mut self, error: RequestError) -> Vec<Command> {
        self.over = true;
        self.hold = None;
        vec![Command::Fail(error)]
    }
}

/// Errors that speak of the node, not of the request.
fn may_succeed_elsewhere(error: &RequestError) -> bool {
    matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Internal)
}

#[cfg(test)]
mod tests;
