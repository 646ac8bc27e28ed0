//! What a peer's heartbeats, and their absence, make the detector think.

use super::*;
use crate::testing::{beat, now};

const INTERVAL: Duration = Duration::from_millis(100);

struct Peer {
    detector: Detector,
    now: Instant,
    beat: Heartbeat,
}

impl Peer {
    fn new() -> Self {
        Self { detector: Detector::new(DetectorRules::with_interval(INTERVAL)), now: now(), beat: beat(1) }
    }

    fn alive() -> Self {
        let mut peer = Self::new();
        peer.beats(10);
        assert_eq!(peer.detector.health(), Health::Alive);
        peer
    }

    fn beats(&mut self, n: u32) -> Health {
        for _ in 0..n {
            self.now += INTERVAL;
            self.beat.seq += 1;
            self.detector.on_heartbeat(self.now, self.beat);
            self.detector.on_tick(self.now);
        }
        self.detector.health()
    }

    fn silence(&mut self, ms: u64) -> Health {
        for _ in 0..ms / 10 {
            self.now += Duration::from_millis(10);
            self.detector.on_tick(self.now);
        }
        self.detector.health()
    }

    fn restart(&mut self) {
        self.beat = beat(self.beat.incarnation + 1);
    }
}

#[test]
fn a_peer_counts_after_three_intervals_of_heartbeats() {
    let mut peer = Peer::new();
    assert_eq!(peer.detector.health(), Health::Absent);
    assert_eq!(peer.beats(3), Health::Returning);
    assert_eq!(peer.beats(1), Health::Alive);
}

#[test]
fn silence_is_suspected_after_three_and_deadly_after_five_intervals() {
    let mut peer = Peer::alive();
    assert_eq!(peer.silence(300), Health::Alive);
    assert_eq!(peer.silence(10), Health::Suspect);
    assert_eq!(peer.silence(190), Health::Suspect);
    assert_eq!(peer.silence(10), Health::Dead);
}

#[test]
fn a_suspect_that_is_heard_is_alive_at_once() {
    let mut peer = Peer::alive();
    assert_eq!(peer.silence(400), Health::Suspect);
    assert_eq!(peer.beats(1), Health::Alive);
}

#[test]
fn a_lost_connection_is_suspicious_until_the_next_heartbeat() {
    let mut peer = Peer::alive();
    peer.detector.on_connection_lost();
    assert_eq!(peer.detector.health(), Health::Suspect);
    assert_eq!(peer.beats(1), Health::Alive);
}

#[test]
fn a_fast_restart_is_a_death() {
    let mut peer = Peer::alive();
    peer.restart();
    assert_eq!(peer.beats(1), Health::Returning, "what the former life had is lost");
    assert_eq!(peer.beats(3), Health::Alive);
}

#[test]
fn late_datagrams_of_a_former_life_or_order_change_nothing() {
    let mut peer = Peer::alive();
    let old = peer.beat;
    peer.restart();
    peer.beats(5);
    let health = peer.detector.health();
    peer.detector.on_heartbeat(peer.now, Heartbeat { seq: old.seq + 100, ..old });
    assert_eq!(peer.detector.health(), health);
    assert_eq!(peer.detector.last().expect("heard").incarnation, old.incarnation + 1);
    // A repeated datagram does not keep a dead peer alive.
    let last = peer.beat;
    for _ in 0..60 {
        peer.now += Duration::from_millis(10);
        peer.detector.on_heartbeat(peer.now, last);
        peer.detector.on_tick(peer.now);
    }
    assert_eq!(peer.detector.health(), Health::Dead);
}

#[test]
fn a_life_with_a_clock_set_back_is_taken_once_the_former_is_dead() {
    let mut peer = Peer::alive();
    assert_eq!(peer.silence(600), Health::Dead);
    peer.beat = beat(0);
    assert_eq!(peer.beats(6), Health::Alive);
}

#[test]
fn a_flapping_peer_changes_sides_a_few_times_only() {
    let mut peer = Peer::alive();
    let (mut changes, mut was) = (0, true);
    for _ in 0..30 {
        for on in [false, true] {
            for _ in 0..10 {
                let health = if on { peer.beats(1) } else { peer.silence(100) };
                let is = matches!(health, Health::Alive | Health::Suspect);
                changes += u32::from(is != was);
                was = is;
            }
        }
    }
    assert!(changes <= 6, "{changes} changes of side in a minute");
    // It is taken back when it has stopped flapping.
    assert_eq!(peer.beats(700), Health::Alive);
}

#[test]
fn deaths_are_forgotten() {
    let mut peer = Peer::alive();
    for _ in 0..3 {
        peer.silence(1000);
        peer.beats(150);
    }
    peer.beats(3001);
    peer.silence(1000);
    assert_eq!(peer.beats(4), Health::Alive, "as after a first death");
}

#[test]
fn an_observer_that_slept_blames_nobody() {
    let mut peer = Peer::alive();
    let gap = Duration::from_secs(5);
    peer.now += gap;
    peer.detector.on_overslept(gap);
    peer.detector.on_tick(peer.now);
    assert_eq!(peer.detector.health(), Health::Alive);
    assert_eq!(peer.silence(600), Health::Dead, "but silence afterwards counts");
}
