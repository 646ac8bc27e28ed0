//! Decides from one peer's heartbeats whether it lives (core). Held by [`super::Membership`], one per peer; it hears
//! no rumours: what counts is what arrives here.
//!
//! ```text
//! Absent ──beats──► Returning ──heard without a break──► Alive ◄──beat── Suspect ──5 missed──► Dead
//!                       ▲                                  └──3 missed / connection lost──►     │
//!                       └────────────────────────────── beat ─────────────────────────────────┘
//! ```
//! A peer that died often in the last minutes must be heard longer before it counts again: a flapping node moves
//! nobody's tenants to and fro.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use shared::cluster::Heartbeat;

/// Deaths remembered for damping; more change nothing, the wait has reached its maximum long before.
const DEATHS_REMEMBERED: usize = 16;

/// When a silent peer is suspected, dead, and trusted again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DetectorRules {
    /// Time between two heartbeats of a peer.
    pub interval: Duration,
    /// Missed heartbeats until no new work goes there.
    pub suspect_missed: u32,
    /// Missed heartbeats until its work goes on elsewhere.
    pub dead_missed: u32,
    /// Heard this long without a break before it counts (again).
    pub return_after: Duration,
    /// The same after a second death within [`Self::deaths_within`]; doubles with each further one.
    pub flap_wait: Duration,
    /// Longest such wait.
    pub flap_wait_max: Duration,
    /// Deaths older than this are forgotten.
    pub deaths_within: Duration,
}

impl DetectorRules {
    /// The rules for a heartbeat interval. A peer that is killed is noticed after 5 intervals. Of independent losses
    /// of 5 %, five in a row come every 3 million heartbeats: at 100 ms a peer is thought dead by mistake once in four
    /// days, and of losses of 1 % never.
    pub const fn with_interval(interval: Duration) -> Self {
        Self {
            interval,
            suspect_missed: 3,
            dead_missed: 5,
            return_after: interval.saturating_mul(3),
            flap_wait: Duration::from_secs(2),
            flap_wait_max: Duration::from_secs(60),
            deaths_within: Duration::from_secs(300),
        }
    }
}

/// What is thought of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Health {
    /// Heard lately.
    Alive,
    /// Silent for a moment: no new work, and what it has may be started elsewhere, too.
    Suspect,
    /// Heard again, not yet long enough: used when nobody else is there.
    Returning,
    /// Silent for long: its work goes on elsewhere.
    Dead,
    /// Never heard.
    Absent,
}

/// The failure detector of one peer.
#[derive(Debug, Clone)]
pub struct Detector {
    rules: DetectorRules,
    health: Health,
    last: Option<Heartbeat>,
    heard_at: Option<Instant>,
    /// Since when it is heard without a break.
    heard_since: Option<Instant>,
    deaths: VecDeque<Instant>,
}

impl Detector {
    /// A detector that has heard nothing.
    pub fn new(rules: DetectorRules) -> Self {
        Self { rules, health: Health::Absent, last: None, heard_at: None, heard_since: None, deaths: VecDeque::new() }
    }

    /// What is thought of the peer.
    pub fn health(&self) -> Health {
        self.health
    }

    /// Its last heartbeat.
    pub fn last(&self) -> Option<&Heartbeat> {
        self.last.as_ref()
    }

    /// When it was last heard.
    pub fn heard_at(&self) -> Option<Instant> {
        self.heard_at
    }

    /// Takes a heartbeat in. One that was overtaken, or is of a former life while a later one is alive, is ignored.
    pub fn on_heartbeat(&mut self, now: Instant, beat: Heartbeat) {
        let alive = matches!(self.health, Health::Alive | Health::Suspect);
        match &self.last {
            Some(last) if last.incarnation == beat.incarnation && beat.seq <= last.seq => return,
            // Only a clock that was set back makes a later life look older; its predecessor is silent by then.
            Some(last) if beat.incarnation < last.incarnation && alive => return,
            // Restarted faster than silence would have told.
            Some(last) if last.incarnation != beat.incarnation && alive => self.die(now),
            _ => {}
        }
        let broken = self.heard_at.is_none_or(|at| now.saturating_duration_since(at) > self.silence_suspect());
        if broken || matches!(self.health, Health::Dead | Health::Absent) {
            self.heard_since = Some(now);
        }
        self.last = Some(beat);
        self.heard_at = Some(now);
        self.health = match self.health {
            Health::Alive | Health::Suspect => Health::Alive,
            Health::Returning | Health::Dead | Health::Absent => Health::Returning,
        };
        self.settle(now);
    }

    /// The connection to the peer broke: silence would tell the same later.
    pub fn on_connection_lost(&mut self) {
        if self.health == Health::Alive {
            self.health = Health::Suspect;
        }
    }

    /// Lets time pass.
    pub fn on_tick(&mut self, now: Instant) {
        let Some(heard_at) = self.heard_at else { return };
        let silence = now.saturating_duration_since(heard_at);
        match self.health {
            Health::Alive | Health::Suspect if silence > self.silence_dead() => self.die(now),
            Health::Alive if silence > self.silence_suspect() => self.health = Health::Suspect,
            // It was never given anything, so this is no further death.
            Health::Returning if silence > self.silence_dead() => self.health = Health::Dead,
            _ => {}
        }
        self.settle(now);
    }

    /// The whole observer slept for `gap`: it heard nothing because it did not listen.
    pub fn on_overslept(&mut self, gap: Duration) {
        self.heard_at = self.heard_at.map(|at| at + gap);
        self.heard_since = self.heard_since.map(|at| at + gap);
    }

    fn silence_suspect(&self) -> Duration {
        self.rules.interval * self.rules.suspect_missed
    }

    fn silence_dead(&self) -> Duration {
        self.rules.interval * self.rules.dead_missed
    }

    fn die(&mut self, now: Instant) {
        self.health = Health::Dead;
        if self.deaths.len() == DEATHS_REMEMBERED {
            self.deaths.pop_front();
        }
        self.deaths.push_back(now);
    }

    /// Trusts a peer that was heard long enough.
    fn settle(&mut self, now: Instant) {
        let within = self.rules.deaths_within;
        self.deaths.retain(|at| now.saturating_duration_since(*at) <= within);
        let heard = self.heard_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        if self.health == Health::Returning && heard >= self.return_wait() {
            self.health = Health::Alive;
        }
    }

    fn return_wait(&self) -> Duration {
        match self.deaths.len() {
            0 | 1 => self.rules.return_after,
            n => self.rules.flap_wait.saturating_mul(1 << (n - 2).min(16)).min(self.rules.flap_wait_max),
        }
    }
}

#[cfg(test)]
mod tests;
