//! Answers how clusters of 3, 10, 100 and 1,000 nodes behave, as JSON: `scripts/model` runs it and draws the plots.
//!
//! `model [NODES …]` looks at other sizes; a thousand tenants for each node.

use std::alloc::System;

use coordinator::route::{Expected, Routes};
use serde::Serialize;
use sim::model::cache::{Caches, caches};
use sim::model::gossip::{Gossip, Mistakes, gossip, mistakes};
use sim::model::peak::{Peak, Use, peak};
use sim::model::placement::{Placement, placement};
use sim::model::{Size, Speed, placed, ring_key, view};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Seed of everything that looks random.
const SEED: u64 = 1;
/// Tenants for each node.
const TENANTS_PER_NODE: usize = 1000;
/// Nodes whose caches are replayed.
const CACHES: usize = 10;
/// Heartbeats that one detector listens to: some weeks.
const BEATS: u64 = 20_000_000;

#[derive(Serialize)]
struct Report {
    speed: Speed,
    mistakes: Vec<Mistakes>,
    clusters: Vec<Cluster>,
}

#[derive(Serialize)]
struct Cluster {
    size: Size,
    placement: Placement,
    gossip: Gossip,
    caches: Caches,
    peak: Peak,
    peak_warmed: Peak,
}

fn bytes_in_use() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated.saturating_sub(stats.bytes_deallocated)
}

fn cluster(nodes: usize, speed: &Speed) -> Cluster {
    let size = Size { nodes, tenants: nodes * TENANTS_PER_NODE };
    let said = |what: &str| eprintln!("model: {nodes} nodes: {what}");
    said("placement");
    let placement = placement(size, &bytes_in_use);
    said("heartbeats");
    let gossip = gossip(nodes);
    said("caches");
    let mut routes = Routes::new(ring_key());
    routes.expect_tenants(Expected::new(&ring_key(), &placed(size.tenants)));
    let caches = caches(SEED, size, &routes.table(view(0..nodes)), CACHES);
    said("peak");
    let peak_of = |warm| peak(SEED, size, speed, Use { busy: 0.6, warm });
    Cluster { size, placement, gossip, caches, peak: peak_of(false), peak_warmed: peak_of(true) }
}

fn main() {
    let asked: Vec<usize> = std::env::args().skip(1).filter_map(|word| word.parse().ok()).collect();
    let nodes = if asked.is_empty() { vec![3, 10, 100, 1000] } else { asked };
    let speed = Speed::default();
    let mistakes = [0.01, 0.05, 0.2].map(|loss| mistakes(SEED, loss, BEATS)).to_vec();
    let clusters = nodes.into_iter().map(|nodes| cluster(nodes, &speed)).collect();
    let report = Report { speed, mistakes, clusters };
    println!("{}", serde_json::to_string_pretty(&report).expect("a report has text keys"));
}
