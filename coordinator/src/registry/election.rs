//! When a voter stands for election (core). Asked by [`super::replica`], which hears the leader.
//!
//! openraft elects by itself, but a node whose log once was behind another's waits 1.2 s longer from then on, and nodes
//! that stand at the same moment hinder one another: 2.7 s to the next write were usual. Here voters stand in turn as
//! soon as the leader's lease is over. One that lacks something is refused, and the next has its turn at once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Between two looks at the leader's silence.
pub(super) const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Between the turns of two voters: a vote is written to the disks of a majority in less.
const TURN: Duration = Duration::from_millis(150);

/// One voter's patience with its leader.
#[derive(Debug)]
pub(super) struct Patience {
    /// While a leader may still believe that it leads, no voter votes for another.
    lease: Duration,
    heard_at: Instant,
    leader: Option<u64>,
    not_before: Option<Instant>,
}

impl Patience {
    /// Starts to listen.
    pub(super) fn new(now: Instant, lease: Duration) -> Self {
        Self { lease, heard_at: now, leader: None, not_before: None }
    }

    /// The leader spoke.
    pub(super) fn on_leader(&mut self, now: Instant) {
        (self.heard_at, self.not_before) = (now, None);
    }

    /// Whether `me` should stand now. `leader` is whom it follows, as far as it knows; it may be itself.
    pub(super) fn on_tick(&mut self, now: Instant, me: u64, voters: &BTreeSet<u64>, leader: Option<u64>) -> bool {
        self.leader = leader.or(self.leader);
        if leader == Some(me) {
            self.on_leader(now);
            return false;
        }
        // Who is silent is not waited for; a voter that led itself may stand again.
        let silent = self.leader.filter(|leader| *leader != me);
        let turns: Vec<u64> = voters.iter().copied().filter(|voter| Some(*voter) != silent).collect();
        let Some(turn) = turns.iter().position(|voter| *voter == me) else { return false };
        // Openraft lets a single voter lead at once.
        if voters.len() == 1 {
            return false;
        }
        let turn = u32::try_from(turn).unwrap_or(u32::MAX);
        let due = self.heard_at + self.lease + LOOK_EVERY + TURN * turn;
        if now < self.not_before.map_or(due, |at| at.max(due)) {
            return false;
        }
        let n_turns = u32::try_from(turns.len()).unwrap_or(u32::MAX);
        self.not_before = Some(now + TURN * (n_turns + 1));
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::now;

    const LEASE: Duration = Duration::from_millis(600);

    /// When a voter stands within three seconds of the leader's last word, in ms.
    fn stands(me: u64, leader: Option<u64>) -> Vec<u64> {
        let (start, voters) = (now(), BTreeSet::from([1, 2, 3]));
        let mut patience = Patience::new(start, LEASE);
        let times = (0..60).map(|i| i * 50).filter(|ms| {
            let told = leader.filter(|_| *ms == 0);
            patience.on_tick(start + Duration::from_millis(*ms), me, &voters, told)
        });
        times.collect()
    }

    #[test]
    fn voters_stand_in_turn_when_the_lease_is_over() {
        assert_eq!(stands(1, Some(2))[..2], [650, 1100]);
        assert_eq!(stands(3, Some(2))[..2], [800, 1250]);
        assert_eq!([stands(1, None)[0], stands(2, None)[0], stands(3, None)[0]], [650, 800, 950], "nobody led yet");
        assert!(stands(4, Some(2)).is_empty(), "who does not vote does not stand");
    }

    #[test]
    fn a_leader_that_speaks_is_not_replaced() {
        let (start, voters) = (now(), BTreeSet::from([1, 2, 3]));
        let mut patience = Patience::new(start, LEASE);
        for i in 0..100 {
            let at = start + Duration::from_millis(100) * i;
            patience.on_leader(at);
            assert!(!patience.on_tick(at, 1, &voters, Some(2)));
        }
    }

    #[test]
    fn who_led_waits_as_long_as_others_before_it_stands_again() {
        let (start, voters) = (now(), BTreeSet::from([1, 2, 3]));
        let mut patience = Patience::new(start, LEASE);
        let later = start + 10 * LEASE;
        assert!(!patience.on_tick(later, 2, &voters, Some(2)));
        assert!(!patience.on_tick(later + LEASE, 2, &voters, None));
        assert!(patience.on_tick(later + LEASE + LOOK_EVERY + TURN, 2, &voters, None));
    }
}
