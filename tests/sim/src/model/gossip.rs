//! What all-to-all heartbeats cost and how often they are wrong: the real membership of one node of many, and the real
//! detector of one peer over a lossy path.

use std::time::Duration;

use coordinator::membership::detector::{Detector, DetectorRules, Health};
use coordinator::membership::{Membership, Own};
use serde::Serialize;
use shared::clock::{Clock, SystemClock};
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use wire::node::encode_datagram;

use super::{node, spec};
use crate::random::Random;

/// Time between heartbeats.
const INTERVAL: Duration = Duration::from_millis(100);

/// What a heartbeat adds to its frame on the wire: IPv4 and UDP 28, QUIC's short header with a connection id of eight
/// bytes and a packet number of two 11, the datagram frame 3, the seal 16.
const AROUND_BYTES: usize = 28 + 11 + 3 + 16;

/// CPU time of one heartbeat, sent and heard over the nodes' QUIC on loopback, in µs (`cargo run --package peer
/// --example heartbeats`).
const NETWORK_US: f64 = 37.0;

/// What heartbeats cost one node.
#[derive(Debug, Clone, Serialize)]
pub struct Gossip {
    /// Heartbeats that a node sends in a second; it hears as many.
    pub sent_per_s: usize,
    /// Bytes of one on the wire.
    pub bytes: usize,
    /// What a node sends, in Mbit/s.
    pub sent_mbit_s: f64,
    /// What all nodes send, in Gbit/s.
    pub all_gbit_s: f64,
    /// Taking one heartbeat in, decoding included, in ns.
    pub heard_ns: f64,
    /// One tick of the membership (20 a second), in µs.
    pub tick_us: f64,
    /// Share of one core for all this.
    pub core_share: f64,
    /// The same with what the network takes.
    pub core_share_with_network: f64,
}

/// Heartbeats of a node among `nodes`.
pub fn gossip(nodes: usize) -> Gossip {
    let mut now = SystemClock.now();
    let own = Own { incarnation: 1, phase: NodePhase::Serving, load: NodeLoad::default() };
    let specs = (0..nodes).map(spec).collect();
    let mut membership = Membership::new(now, &node(0), own, specs, DetectorRules::with_interval(INTERVAL));
    let names: Vec<_> = (1..nodes).map(node).collect();
    let rounds = (200_000 / nodes).clamp(20, 2000) as u64;
    let (mut hearing, mut ticking, mut bytes) = (Duration::ZERO, Duration::ZERO, 0);
    for seq in 1..=rounds {
        let load = NodeLoad { running: (seq % 8) as u32, places: 8, waiting: 0 };
        let beat = Heartbeat { incarnation: 1, seq, uptime_ms: seq * 100, epoch: 1, phase: NodePhase::Serving, load };
        let datagram = encode_datagram(&beat, now);
        bytes = datagram.len() + AROUND_BYTES;
        let start = SystemClock.now();
        for name in &names {
            let beat = wire::node::decode_datagram(&datagram, now).expect("it was encoded a line above");
            membership.on_heartbeat(now, name, beat);
        }
        hearing += SystemClock.now().duration_since(start);
        for _ in 0..2 {
            now += INTERVAL / 2;
            let start = SystemClock.now();
            let _ = membership.on_tick(now);
            ticking += SystemClock.now().duration_since(start);
        }
    }
    let sent_per_s = 10 * (nodes - 1);
    let heard_ns = hearing.as_nanos() as f64 / (rounds as f64 * names.len() as f64);
    let tick_us = ticking.as_nanos() as f64 / 1e3 / (2.0 * rounds as f64);
    let core_share = heard_ns * sent_per_s as f64 / 1e9 + tick_us * 20.0 / 1e6;
    let sent_mbit_s = (sent_per_s * bytes * 8) as f64 / 1e6;
    Gossip {
        sent_per_s,
        bytes,
        sent_mbit_s,
        all_gbit_s: sent_mbit_s * nodes as f64 / 1e3,
        heard_ns,
        tick_us,
        core_share,
        core_share_with_network: core_share + NETWORK_US * sent_per_s as f64 / 1e6,
    }
}

/// How often one node is wrong about one peer that lives.
#[derive(Debug, Clone, Serialize)]
pub struct Mistakes {
    /// Share of heartbeats that are lost, each for itself.
    pub loss: f64,
    /// Times an hour that it is suspected.
    pub suspected_per_h: f64,
    /// Times an hour that it is thought dead.
    pub dead_per_h: f64,
}

/// Lets one detector listen for so many heartbeats, delayed by up to 10 ms.
pub fn mistakes(seed: u64, loss: f64, beats: u64) -> Mistakes {
    let mut random = Random::new(seed);
    let start = SystemClock.now();
    let mut detector = Detector::new(DetectorRules::with_interval(INTERVAL));
    let (mut suspected, mut dead, mut health) = (0_u64, 0_u64, Health::Absent);
    for seq in 1..=beats {
        let sent_ms = seq * 100;
        let lost = (random.draw() >> 11) as f64 / (1_u64 << 53) as f64 <= loss;
        if !lost {
            let load = NodeLoad::default();
            let beat = Heartbeat { incarnation: 1, seq, uptime_ms: sent_ms, epoch: 1, phase: NodePhase::Serving, load };
            detector.on_heartbeat(start + Duration::from_millis(sent_ms + random.within(0, 10)), beat);
        }
        for tick_ms in [sent_ms + 30, sent_ms + 80] {
            detector.on_tick(start + Duration::from_millis(tick_ms));
            let seen = std::mem::replace(&mut health, detector.health());
            suspected += u64::from(health == Health::Suspect && seen == Health::Alive);
            dead += u64::from(health == Health::Dead && matches!(seen, Health::Alive | Health::Suspect));
        }
    }
    let hours = beats as f64 / 36_000.0;
    Mistakes { loss, suspected_per_h: suspected as f64 / hours, dead_per_h: dead as f64 / hours }
}
