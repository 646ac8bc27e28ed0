//! Which two nodes a tenant belongs to (core): consistent hashing over the tenant id.
//!
//! The `hashring` crate keeps the points; three things are added. The hash is a versioned function over explicit
//! bytes, keyed by the cluster's secret, so that every build on every machine agrees and no tenant can choose an id
//! that lands on a chosen node. Every point knows the next *other* node, so that a lookup gives home and successor
//! without walking. And loads are bounded: where the points alone would give a node too much, single tenants change
//! places with their successor.
//!
//! Everything is hashed once: points when a ring is made, tenants when a [`Crowd`] is, so that bounding the loads of a
//! million tenants on a thousand nodes goes through both in one pass. Called by [`crate::route`]; knows nothing of life
//! and death.

use std::collections::BTreeMap;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::Arc;

use hashring::HashRing;
use shared::id::{NodeId, TenantId};

/// Names the hash: keyed BLAKE3, first eight bytes, little-endian. Another function or other bytes need another name,
/// and every node must change at once.
const PURPOSE: &str = "tenantry 2026 ring v1";

/// Points of one part of one unit of capacity. With [`crate::membership::SHARE_PARTS`] of them, 256 points, a node's
/// share of the ring has a standard deviation of 1/√256, about 6 %.
pub const POINTS_PER_PART: u32 = 64;

/// Most points of one node: 64 units of capacity. Bounds what a configuration can make us build.
pub const POINTS_MAX: u32 = 16_384;

/// A node gets at most this many fourths of its fair share of the expected load.
const LOAD_BOUND_FOURTHS: u128 = 5;

/// The cluster's key for placing tenants.
#[derive(Clone, PartialEq, Eq)]
pub struct RingKey([u8; 32]);

impl RingKey {
    /// The key that belongs to a cluster's secret.
    pub fn derive(secret: &[u8]) -> Self {
        Self(blake3::derive_key(PURPOSE, secret))
    }

    /// Where a tenant lies on the ring.
    fn tenant(&self, tenant: &TenantId) -> u64 {
        self.position(&[b"tenant:", tenant.as_str().as_bytes()])
    }

    /// Where a node's point lies. Names hold no colon.
    fn point(&self, node: &NodeId, index: u32) -> u64 {
        self.position(&[b"node:", node.as_str().as_bytes(), b":", &index.to_le_bytes()])
    }

    fn position(&self, bytes: &[&[u8]]) -> u64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        bytes.iter().for_each(|bytes| _ = hasher.update(bytes));
        let hash = hasher.finalize();
        u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
    }
}

impl std::fmt::Debug for RingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RingKey(…)")
    }
}

/// Passes on a position: what `hashring` is given was hashed before.
#[derive(Debug, Clone, Copy, Default)]
struct Known(u64);

impl Hasher for Known {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = u64::from_ne_bytes(bytes.try_into().expect("only positions are written, and they have 8 bytes"));
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A point of a node on the ring. Nodes are named by their place among the ring's names.
#[derive(Debug, Clone, Copy)]
struct Point {
    position: u64,
    home: u32,
    /// The next other node clockwise: it inherits what this point holds. The home itself in a ring of one.
    successor: u32,
}

impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.position);
    }
}

/// The two nodes of a tenant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owners<'a> {
    /// Where it is served.
    pub home: &'a NodeId,
    /// Where it goes when its home cannot; absent in a ring of one.
    pub successor: Option<&'a NodeId>,
}

/// Tenants and what to expect of each, ready to be balanced on any ring of one key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Crowd {
    /// Position and load, by position.
    tenants: Vec<(u64, u64)>,
    /// Indices of tenants, large loads first: small ones fill what is left. Position breaks ties alike everywhere.
    order: Vec<u32>,
}

/// What nodes share a ring.
#[derive(Debug)]
struct Circle {
    ring: HashRing<Point, BuildHasherDefault<Known>>,
    /// The same points in order: `hashring` does not show its own.
    clockwise: Vec<Point>,
    key: RingKey,
    names: Vec<NodeId>,
    points: BTreeMap<NodeId, u32>,
}

/// A ring of nodes.
#[derive(Debug, Clone)]
pub struct Ring {
    circle: Arc<Circle>,
    /// Positions of tenants that live at their successor, rising.
    swapped: Vec<u64>,
}

// === impl Crowd ===

impl Crowd {
    /// Tenants with loads in any unit; those of 0 do not count. The same tenants give the same crowd in any order.
    pub fn new<'a>(key: &RingKey, tenants: impl IntoIterator<Item = (&'a TenantId, u64)>) -> Self {
        let tenants = tenants.into_iter().filter(|(_, load)| *load > 0);
        let mut tenants: Vec<(u64, u64)> = tenants.map(|(tenant, load)| (key.tenant(tenant), load)).collect();
        tenants.sort_unstable();
        // More than fit an index are more than fit a node's memory.
        tenants.truncate(u32::MAX as usize);
        let mut order: Vec<u32> = (0..).take(tenants.len()).collect();
        order.sort_unstable_by_key(|i| (std::cmp::Reverse(tenants[*i as usize].1), *i));
        Self { tenants, order }
    }

    fn total(&self) -> u128 {
        self.tenants.iter().map(|(_, load)| u128::from(*load)).sum()
    }
}

// === impl Ring ===

impl Ring {
    /// A ring of nodes with so many points each. A node's points with lower numbers stay where they are when it gets
    /// more, so a growing share only ever takes tenants in.
    pub fn new(key: &RingKey, nodes: impl IntoIterator<Item = (NodeId, u32)>) -> Self {
        Self::with(key, nodes, None)
    }

    /// The ring of other nodes, as [`Self::new`] makes it; takes over the points of those that stay as they are.
    pub fn changed(&self, nodes: impl IntoIterator<Item = (NodeId, u32)>) -> Self {
        Self::with(&self.circle.key, nodes, Some(&self.circle))
    }

    fn with(key: &RingKey, nodes: impl IntoIterator<Item = (NodeId, u32)>, old: Option<&Circle>) -> Self {
        let nodes = nodes.into_iter().map(|(id, points)| (id, points.min(POINTS_MAX)));
        let points: BTreeMap<NodeId, u32> = nodes.filter(|(_, points)| *points > 0).collect();
        let homes: BTreeMap<&NodeId, u32> = points.keys().zip(0..).collect();
        let stays = |(node, n): (&NodeId, &u32)| homes.get(node).copied().filter(|_| points.get(node) == Some(n));
        let known: Vec<Option<u32>> = old.into_iter().flat_map(|old| old.points.iter().map(stays)).collect();
        let known_point = |point: &Point| known[point.home as usize].map(|home| Point { home, ..*point });
        let mut clockwise: Vec<Point> =
            old.into_iter().flat_map(|old| old.clockwise.iter().filter_map(known_point)).collect();
        for ((node, n), home) in points.iter().zip(0..) {
            if !known.contains(&Some(home)) {
                let new = (0..*n).map(|index| Point { position: key.point(node, index), home, successor: home });
                clockwise.extend(new);
            }
        }
        // Stable, because that goes through what is in order already in one pass.
        clockwise.sort_by_key(|point| (point.position, point.home));
        link(&mut clockwise);
        let mut ring = HashRing::with_hasher(BuildHasherDefault::default());
        ring.batch_add(clockwise.clone());
        let names = points.keys().cloned().collect();
        Self { circle: Arc::new(Circle { ring, clockwise, key: key.clone(), names, points }), swapped: Vec::new() }
    }

    /// The same nodes without bounds; shares their points.
    pub fn unbounded(&self) -> Self {
        Self { circle: self.circle.clone(), swapped: Vec::new() }
    }

    /// Home and successor of a tenant; `None` for an empty ring.
    pub fn owners(&self, tenant: &TenantId) -> Option<Owners<'_>> {
        let Circle { ring, key, names, .. } = &*self.circle;
        let position = key.tenant(tenant);
        let Point { home, successor, .. } = *ring.get(&position)?;
        let (home, successor) = match self.swapped.binary_search(&position) {
            Ok(_) => (successor, home),
            Err(_) => (home, successor),
        };
        let other = (home != successor).then(|| &names[successor as usize]);
        Some(Owners { home: &names[home as usize], successor: other })
    }

    /// The nodes in it, with their points.
    pub fn nodes(&self) -> &BTreeMap<NodeId, u32> {
        &self.circle.points
    }

    /// How many tenants live at their successor so that no node gets more than 1.25 times its fair share.
    pub fn n_swapped(&self) -> usize {
        self.swapped.len()
    }

    /// Bounds the nodes' loads. A tenant that alone exceeds a node's bound stays at its home: two nodes are all that
    /// one tenant may occupy. The crowd must be of the ring's key.
    pub fn balance(&mut self, crowd: &Crowd) {
        self.swapped.clear();
        let Circle { clockwise, points, .. } = &*self.circle;
        if clockwise.is_empty() {
            return;
        }
        let all: u128 = points.values().map(|points| u128::from(*points)).sum();
        let total = crowd.total();
        let bound = |points: &u32| total * LOAD_BOUND_FOURTHS * u128::from(*points) / (4 * all.max(1));
        let mut free: Vec<u128> = points.values().map(bound).collect();
        let owners = owners_of(crowd, clockwise);
        for i in &crowd.order {
            let (position, load) = crowd.tenants[*i as usize];
            let (home, successor) = owners[*i as usize];
            let load = u128::from(load);
            let swap = free[home as usize] < load && free[successor as usize] >= load;
            let node = if swap { successor } else { home };
            free[node as usize] = free[node as usize].saturating_sub(load);
            if swap {
                self.swapped.push(position);
            }
        }
        self.swapped.sort_unstable();
    }
}

/// Home and successor by the points alone, of every tenant: both are sorted, so one walk round the ring finds all.
fn owners_of(crowd: &Crowd, clockwise: &[Point]) -> Vec<(u32, u32)> {
    let mut next = 0;
    let owners = crowd.tenants.iter().map(|(position, _)| {
        while clockwise.get(next).is_some_and(|point| point.position < *position) {
            next += 1;
        }
        // Behind the last point the ring begins again.
        let point = clockwise.get(next).unwrap_or(&clockwise[0]);
        (point.home, point.successor)
    });
    owners.collect()
}

/// Tells every point the next other node.
fn link(clockwise: &mut [Point]) {
    let Some(first) = clockwise.first().map(|point| point.home) else { return };
    // Seen from the last point, what follows is the start of the ring.
    let mut next = first;
    let mut after = clockwise.iter().map(|point| point.home).find(|home| *home != first).unwrap_or(first);
    for point in clockwise.iter_mut().rev() {
        if point.home != next {
            after = std::mem::replace(&mut next, point.home);
        }
        point.successor = after;
    }
}

#[cfg(test)]
mod tests;
