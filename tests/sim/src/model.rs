//! How a thousand nodes and a million tenants behave: the coordinator's own cores over modelled nodes.
//!
//! | question | where | real | modelled |
//! |---|---|---|---|
//! | how even is the ring, who moves, what does a table cost? | [`placement`] | ring, bounded loads, routes | – |
//! | what do heartbeats cost, how often are they wrong? | [`gossip`] | membership, detector, the datagram's bytes | loss and delay |
//! | what does a cache of adapters hit, with and without pre-warming? | [`cache`] | ring, activity, plans | weeks of sessions, an LRU |
//! | what do clients see at the peak, when a node dies and when it comes back? | [`peak`] | membership, routes | queues, batches, loads of adapters |
//!
//! Times of steps, prompts and loads are [`Speed`], measured on a real node. Time is an event queue's; the same size
//! and seed give the same figures, but for what is measured of the cores themselves. What is not modelled: the network
//! between nodes (a forwarded request costs a millisecond or two), the registry, and views of the cluster that differ.

use std::collections::BTreeMap;
use std::sync::Arc;

use coordinator::membership::detector::Health;
use coordinator::membership::{ClusterView, Member, MemberSpec, SHARE_PARTS};
use coordinator::ring::RingKey;
use coordinator::route::{Place, PlacedTenant};
use serde::Serialize;
use shared::cluster::{NodeLoad, NodePhase};
use shared::id::{BaseName, NodeId, TenantId};

use crate::random::mix;

pub mod placement;
pub mod gossip;
pub mod trace;
pub mod cache;
pub mod peak;

/// How large a cluster is.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Size {
    /// Nodes.
    pub nodes: usize,
    /// Tenants; one adapter each.
    pub tenants: usize,
}

/// How fast a node is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Speed {
    /// Time of a decoding step, by rows: `(rows, ms)`, rising.
    pub steps: Vec<(f64, f64)>,
    /// Time of one more prompt token in a step, in ms.
    pub prompt_token_ms: f64,
    /// Until an adapter that is not in memory is, in ms.
    pub load_ms: f64,
    /// Sequences in a batch.
    pub places: u32,
}

impl Default for Speed {
    /// A node of two cores with SmolLM2-135M and an adapter per row (MEASUREMENTS, "Speed of the engine").
    fn default() -> Self {
        let steps = vec![(1.0, 3.145), (4.0, 5.05), (16.0, 14.4), (32.0, 22.5)];
        Self { steps, prompt_token_ms: 0.28, load_ms: 30.0, places: 32 }
    }
}

impl Speed {
    /// Time of a step with so many decoding rows and prompt tokens, in ms; linear between what was measured.
    pub fn step_ms(&self, rows: usize, prompt_tokens: usize) -> f64 {
        let rows = rows as f64;
        let decode = match self.steps.iter().position(|(at, _)| *at >= rows) {
            _ if rows == 0.0 => 0.0,
            Some(0) => self.steps[0].1,
            Some(i) => {
                let ((a, from), (b, to)) = (self.steps[i - 1], self.steps[i]);
                from + (to - from) * (rows - a) / (b - a)
            }
            None => self.steps.last().map_or(1.0, |(at, ms)| ms * rows / at),
        };
        decode + self.prompt_token_ms * prompt_tokens as f64
    }
}

/// The key of the modelled cluster's ring.
pub fn ring_key() -> RingKey {
    RingKey::derive(b"model")
}

/// Where everybody lives.
pub fn place() -> Place {
    Place::anywhere(base())
}

fn base() -> BaseName {
    "stub".parse().expect("a valid base")
}

/// Name of a node.
pub fn node(i: usize) -> NodeId {
    format!("n{i}").parse().expect("a valid name")
}

/// Name of a tenant.
pub fn tenant(i: usize) -> TenantId {
    format!("tenant-{i}").parse().expect("a valid name")
}

/// A fifth of the tenants have four fifths of the load.
pub fn load(i: usize) -> u64 {
    if is_heavy(i) { 16 } else { 1 }
}

/// Whether a tenant is of that fifth.
pub fn is_heavy(i: usize) -> bool {
    mix(i as u64).is_multiple_of(5)
}

/// Every tenant, for bounding loads.
pub fn placed(tenants: usize) -> Arc<[PlacedTenant]> {
    let place = place();
    (0..tenants).map(|i| PlacedTenant { tenant: tenant(i), place: place.clone(), load: load(i) }).collect()
}

fn spec(i: usize) -> MemberSpec {
    MemberSpec { id: node(i), capacity: 1, pool: place().pool, region: None, bases: vec![base()] }
}

/// A view in which these nodes serve.
pub fn view(nodes: impl IntoIterator<Item = usize>) -> Arc<ClusterView> {
    let member = |i| Member {
        spec: Arc::new(spec(i)),
        health: Health::Alive,
        phase: NodePhase::Serving,
        incarnation: 1,
        share: SHARE_PARTS,
        load: NodeLoad { running: 0, places: 8, waiting: 0 },
        serves: None,
    };
    let members: BTreeMap<NodeId, Member> = nodes.into_iter().map(|i| (node(i), member(i))).collect();
    Arc::new(ClusterView { epoch: 1, me: node(0), members })
}

/// The value below which so many per cent of the sorted samples lie.
pub fn percentile(sorted: &[f64], per_cent: f64) -> f64 {
    let at = (sorted.len() as f64 * per_cent / 100.0).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(0.0)
}
