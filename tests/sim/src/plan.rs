//! What a seed decides: who asks for what and when, and what breaks when.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::adapter::AdapterRef;
use shared::hash::ContentHash;
use shared::id::{BaseName, NodeId, RequestId, Route, TenantId};
use shared::request::{AdapterPin, Envelope, Generation};
use shared::tenant::Tier;

use crate::engine::QUEUE_MAX;
use crate::random::Random;
use crate::world::Trouble;

/// Requests begin after this: the nodes have found each other.
pub const WARM_UP_MS: u64 = 800;

/// Time a request may take.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Tenants that clients ask for.
pub const TENANTS: u64 = 12;

/// While this passes, the registry's leader is away; in ms.
pub const LEADER_AWAY_MS: Range<u64> = 20_000..620_000;

/// While this passes, a majority of those that vote on the registry is; in ms.
pub const MAJORITY_AWAY_MS: Range<u64> = 640_000..1_240_000;

/// Something that happens to nodes, at a time in ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// `kill -9`, and a new life.
    Crash(usize),
    /// Its new life.
    Bounce(usize),
    /// SIGTERM: it takes nothing new.
    Drain(usize),
    /// Its grace is over.
    Leave(usize),
    /// Nothing of or to the node arrives, until released: as if it were stopped.
    Hold(usize),
    /// It goes on, and what was held arrives.
    Release(usize),
    /// Nothing passes between it and other nodes; clients reach it.
    Cut(usize),
    /// What was cut is whole again.
    Mend(usize),
    /// Nothing passes between the two hosts; what was sent arrives afterwards, as QUIC's retransmissions would. turmoil's
    /// own partitions lose bytes of a TCP stream for ever. The host behind the last node is the clients'.
    Part(usize, usize),
    /// They meet again.
    Join(usize, usize),
    /// What passes between the two hosts takes longer.
    Slow(usize, usize),
    /// It takes as long as before.
    Swift(usize, usize),
    /// Whoever leads the registry is killed, and of the others that vote on it so many.
    KillLeader(usize),
    /// Whoever is down begins a new life.
    BounceAll,
}

/// A request of a client.
#[derive(Debug, Clone)]
pub struct Planned {
    /// When, in ms.
    pub at_ms: u64,
    /// The client's idempotency key, which is a number from 1.
    pub key: u128,
    /// Whose.
    pub tenant: u64,
    /// The node that is asked first.
    pub entry: usize,
    /// What.
    pub prompt: Arc<[u32]>,
    /// Choices.
    pub n: u32,
    /// Tokens of each.
    pub max_tokens: u32,
}

// === impl Planned ===

impl Planned {
    /// Its tenant.
    pub fn tenant(&self) -> TenantId {
        format!("tenant-{}", self.tenant).parse().expect("a valid name")
    }

    /// The adapter that its tenant's requests run on.
    pub fn adapter(&self) -> AdapterRef {
        AdapterRef { tenant: self.tenant(), hash: ContentHash::of(&self.tenant.to_le_bytes()) }
    }

    /// As the node admits it.
    pub fn envelope(&self, id: RequestId, now: Instant) -> Envelope {
        let generation =
            Generation { n: self.n, ignore_eos: true, ..Generation::new(self.prompt.clone(), self.max_tokens) };
        let name = format!("tenant-{}-support-stub-v1.0.0", self.tenant);
        // A tenant's name has a hyphen and a task's has none, so that the name of an adapter says which is which.
        let pin = AdapterPin { name: name.parse().expect("a valid name"), hash: self.adapter().hash };
        Envelope {
            id,
            route: Route { tenant: self.tenant(), task: Some("support".parse().expect("a valid name")) },
            tier: Tier::Shared,
            weight: 1,
            concurrency: 8,
            queue_depth: QUEUE_MAX,
            base: base(),
            pin: Default::default(),
            adapter: Some(pin),
            fell_back: false,
            cache_secret: [0; 32],
            generation: Arc::new(generation),
            contract_epoch: 1,
            admitted_at: now,
            deadline: now + DEADLINE,
        }
    }
}

/// Name of a node.
pub fn name(i: usize) -> NodeId {
    format!("n{i}").parse().expect("a valid name")
}

/// The only base.
pub fn base() -> BaseName {
    "stub".parse().expect("a valid base")
}

/// About thirty requests over seven seconds.
pub fn requests(random: &mut Random, n_nodes: usize) -> Vec<Planned> {
    let n = random.within(20, 40);
    requests_at(random, n_nodes, n, WARM_UP_MS..WARM_UP_MS + 7000)
}

/// A request a second from before the registry's troubles until after them.
pub fn steady_requests(random: &mut Random, n_nodes: usize) -> Vec<Planned> {
    let during = LEADER_AWAY_MS.start - 10_000..MAJORITY_AWAY_MS.end + 20_000;
    requests_at(random, n_nodes, (during.end - during.start) / 1000, during)
}

/// The registry's leader goes and comes back; then a majority does.
pub fn registry_troubles() -> Vec<(u64, Act)> {
    vec![
        (LEADER_AWAY_MS.start, Act::KillLeader(0)),
        (LEADER_AWAY_MS.end, Act::BounceAll),
        (MAJORITY_AWAY_MS.start, Act::KillLeader(1)),
        (MAJORITY_AWAY_MS.end, Act::BounceAll),
    ]
}

fn requests_at(random: &mut Random, n_nodes: usize, n: u64, during: Range<u64>) -> Vec<Planned> {
    let planned = |key: u64| Planned {
        at_ms: random.within(during.start, during.end),
        key: u128::from(key),
        tenant: random.within(0, TENANTS),
        prompt: (0..random.within(1, 6)).map(|_| (random.draw() % 49_152) as u32).collect(),
        n: 1 + u32::from(random.within(0, 4) == 0),
        max_tokens: random.within(10, 60) as u32,
        entry: random.within(0, n_nodes as u64) as usize,
    };
    (1..=n).map(planned).collect()
}

/// What breaks, in order.
pub fn troubles(random: &mut Random, n_nodes: usize, trouble: Trouble) -> Vec<(u64, Act)> {
    if trouble == Trouble::Rolling {
        return rolling(random, n_nodes);
    }
    let (mut acts, mut at) = (Vec::new(), WARM_UP_MS + 200);
    while at < 9000 {
        let node = random.within(0, n_nodes as u64) as usize;
        let other = (node + 1 + random.within(0, n_nodes as u64 - 1) as usize) % n_nodes;
        let lasts = random.within(100, 3000);
        let (begin, end) = match random.within(0, 7) {
            0 | 1 => (Act::Crash(node), Act::Bounce(node)),
            2 | 3 => (Act::Hold(node), Act::Release(node)),
            4 => (Act::Cut(node), Act::Mend(node)),
            5 => (Act::Drain(node), Act::Bounce(node)),
            _ => (Act::Part(node, other), Act::Join(node, other)),
        };
        acts.extend([(at, begin), (at + lasts, end)]);
        if matches!(begin, Act::Drain(_)) {
            acts.extend([(at + lasts / 3, Act::Leave(node)), (at + lasts * 2 / 3, Act::Crash(node))]);
        }
        at += match trouble {
            Trouble::OneAtATime | Trouble::Rolling => lasts + random.within(1200, 2500),
            Trouble::Overlapping => random.within(100, 1500),
        };
    }
    acts.sort_by_key(|(at, _)| *at);
    acts
}

/// What lost packets do to connections that repeat them: every few milliseconds a link stands still until its packet
/// is sent again, once or twice as late, and now and then one is slow for a while. The clients' links are among them.
pub fn weather(random: &mut Random, n_nodes: usize, until_ms: u64) -> Vec<(u64, Act)> {
    let (mut acts, mut at) = (Vec::new(), WARM_UP_MS);
    while at < until_ms {
        let a = random.within(0, n_nodes as u64) as usize;
        let b = (a + 1 + random.within(0, n_nodes as u64) as usize) % (n_nodes + 1);
        let (begin, end, lasts) = match random.within(0, 12) {
            0 => (Act::Slow(a, b), Act::Swift(a, b), random.within(200, 1000)),
            1 | 2 => (Act::Part(a, b), Act::Join(a, b), random.within(60, 200)),
            _ => (Act::Part(a, b), Act::Join(a, b), random.within(20, 60)),
        };
        acts.extend([(at, begin), (at + lasts, end)]);
        at += random.within(20, 80);
    }
    acts
}

/// Every node is drained, leaves, ends and comes back, one after the other.
fn rolling(random: &mut Random, n_nodes: usize) -> Vec<(u64, Act)> {
    let mut at = WARM_UP_MS + 200;
    let mut acts = Vec::new();
    for node in 0..n_nodes {
        let steps = [Act::Drain(node), Act::Leave(node), Act::Crash(node), Act::Bounce(node)];
        for act in steps {
            acts.push((at, act));
            at += random.within(200, 600);
        }
        at += random.within(800, 1500);
    }
    acts
}
