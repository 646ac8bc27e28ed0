//! Which two nodes a tenant belongs to (core): consistent hashing over the tenant id.
//!
//! The `hashring` crate keeps the points; three things are added. The hash is a versioned function over explicit
//! bytes, keyed by the cluster's secret, so that every build on every machine agrees and no tenant can choose an id
//! that lands on a chosen node. Every point knows the next *other* node, so that a lookup gives home and successor
//! without walking. And loads are bounded: where the points alone would give a node too much, single tenants change
//! places with their successor. Called by [`crate::route`]; knows nothing of life and death.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hash, Hasher};

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
}

impl std::fmt::Debug for RingKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RingKey(…)")
    }
}

impl BuildHasher for RingKey {
    type Hasher = RingHasher;

    fn build_hasher(&self) -> RingHasher {
        RingHasher(blake3::Hasher::new_keyed(&self.0))
    }
}

/// Hashes the bytes it is given, nothing else.
pub struct RingHasher(blake3::Hasher);

impl Hasher for RingHasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let hash = self.0.finalize();
        let first = hash.as_bytes().first_chunk().expect("a hash has 32 bytes");
        u64::from_le_bytes(*first)
    }
}

/// A point of a node on the ring.
#[derive(Debug, Clone)]
struct Point {
    node: NodeId,
    index: u32,
    /// The next other node clockwise: it inherits what this point holds.
    successor: Option<NodeId>,
}

/// `std`'s implementations of `Hash` promise no bytes, so these are spelt out. Names hold no colon.
impl Hash for Point {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(b"node:");
        state.write(self.node.as_str().as_bytes());
        state.write(b":");
        state.write(&self.index.to_le_bytes());
    }
}

struct Key<'a>(&'a TenantId);

impl Hash for Key<'_> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write(b"tenant:");
        state.write(self.0.as_str().as_bytes());
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

/// A ring of nodes.
#[derive(Debug, Clone)]
pub struct Ring {
    ring: HashRing<Point, RingKey>,
    key: RingKey,
    points: BTreeMap<NodeId, u32>,
    swapped: BTreeSet<TenantId>,
}

// === impl Ring ===

impl Ring {
    /// A ring of nodes with so many points each. A node's points with lower numbers stay where they are when it gets
    /// more, so a growing share only ever takes tenants in.
    pub fn new(key: &RingKey, nodes: impl IntoIterator<Item = (NodeId, u32)>) -> Self {
        let nodes = nodes.into_iter().map(|(id, points)| (id, points.min(POINTS_MAX)));
        let points: BTreeMap<NodeId, u32> = nodes.filter(|(_, points)| *points > 0).collect();
        let of_node = |(node, n): (&NodeId, &u32)| {
            let node = node.clone();
            (0..*n).map(move |index| Point { node: node.clone(), index, successor: None })
        };
        let mut clockwise: Vec<Point> = points.iter().flat_map(of_node).collect();
        clockwise.sort_by_cached_key(|point| key.hash_one(point));
        link(&mut clockwise);
        let mut ring = HashRing::with_hasher(key.clone());
        ring.batch_add(clockwise);
        Self { ring, key: key.clone(), points, swapped: BTreeSet::new() }
    }

    /// Home and successor of a tenant; `None` for an empty ring.
    pub fn owners(&self, tenant: &TenantId) -> Option<Owners<'_>> {
        let point = self.ring.get(&Key(tenant))?;
        let plain = Owners { home: &point.node, successor: point.successor.as_ref() };
        Some(match plain.successor {
            Some(successor) if self.swapped.contains(tenant) => Owners { home: successor, successor: Some(plain.home) },
            _ => plain,
        })
    }

    /// The nodes in it, with their points.
    pub fn nodes(&self) -> &BTreeMap<NodeId, u32> {
        &self.points
    }

    /// Tenants that live at their successor so that no node gets more than 1.25 times its fair share.
    pub fn swapped(&self) -> &BTreeSet<TenantId> {
        &self.swapped
    }

    /// Bounds the nodes' loads, given what to expect of every tenant (in any unit, larger than 0 counts). The same
    /// tenants give the same result in any order. A tenant that alone exceeds a node's bound stays at its home: two
    /// nodes are all that one tenant may occupy.
    pub fn balance<'a>(&mut self, tenants: impl IntoIterator<Item = (&'a TenantId, u64)>) {
        self.swapped.clear();
        let mut order: Vec<(u64, u64, &TenantId)> = tenants
            .into_iter()
            .filter(|(_, load)| *load > 0)
            .map(|(tenant, load)| (load, self.key.hash_one(Key(tenant)), tenant))
            .collect();
        // Large ones first: small ones fill what is left. Position and name break ties alike everywhere.
        order.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)).then(a.2.cmp(b.2)));
        let total: u128 = order.iter().map(|(load, ..)| u128::from(*load)).sum();
        let all: u128 = self.points.values().map(|points| u128::from(*points)).sum();
        let bound = |points: u32| total * LOAD_BOUND_FOURTHS * u128::from(points) / (4 * all.max(1));
        let mut free: BTreeMap<&NodeId, u128> = self.points.iter().map(|(id, points)| (id, bound(*points))).collect();
        let mut swapped = BTreeSet::new();
        for (load, _, tenant) in order {
            let (load, Some(owners)) = (u128::from(load), self.owners(tenant)) else { return };
            let fits = |node: Option<&NodeId>| node.is_some_and(|node| free[node] >= load);
            let swap = !fits(Some(owners.home)) && fits(owners.successor);
            let node = if swap { owners.successor.unwrap_or(owners.home) } else { owners.home };
            if let Some(free) = free.get_mut(node) {
                *free = free.saturating_sub(load);
            }
            if swap {
                swapped.insert(tenant.clone());
            }
        }
        self.swapped = swapped;
    }
}

/// Tells every point the next other node clockwise.
fn link(clockwise: &mut [Point]) {
    let Some(first) = clockwise.first().map(|point| point.node.clone()) else { return };
    // Seen from the last point, what follows is the start of the ring.
    let mut next = first.clone();
    let mut after = clockwise.iter().map(|point| &point.node).find(|node| **node != first).cloned();
    for point in clockwise.iter_mut().rev() {
        if point.node != next {
            after = Some(std::mem::replace(&mut next, point.node.clone()));
        }
        point.successor = after.clone();
    }
}

#[cfg(test)]
mod tests;
