//! Who is in the cluster, who of them lives, and how much of the ring each may have: one node's own view (core).
//!
//! Members come from the configuration; heartbeats say the rest. Every node judges for itself and nobody leads:
//! two views that differ for a moment send a request to a wrong owner, which is slow and never wrong. A view has an
//! epoch that rises with every change that matters for placement and never falls; suspicion alone changes no epoch.
//! Called by [`crate::actor`]; routes are made from it by [`crate::route`].

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::hash::ContentHash;
use shared::id::{BaseName, NodeId};
use wire::node::ServedBase;

pub mod detector;

use detector::{Detector, DetectorRules, Health};

/// A node that serves for less than this has cold caches: its share of the ring grows in quarters.
pub const SLOW_START: Duration = Duration::from_secs(30);

/// Shares of the ring are counted in these parts.
pub const SHARE_PARTS: u32 = 4;

/// A node dead for longer leaves the ring, so that its tenants have two living candidates again. Longer than a
/// restart takes, so that a restart moves nobody.
pub const RING_LEAVE_AFTER: Duration = Duration::from_secs(10);

/// What the configuration says of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemberSpec {
    /// Name.
    pub id: NodeId,
    /// Share of the ring in proportion to others, at least 1.
    pub capacity: u32,
    /// Nodes of one kind: a tenant lives in one pool (TIER-14, TIER-26).
    pub pool: String,
    /// Data boundary it lies in (RING-09).
    pub region: Option<String>,
    /// Base models it hosts.
    pub bases: Vec<BaseName>,
}

/// A member as seen at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// What the configuration says.
    pub spec: Arc<MemberSpec>,
    /// Whether it lives.
    pub health: Health,
    /// What it says it does.
    pub phase: NodePhase,
    /// Which life of its process: work given to another life is lost.
    pub incarnation: u64,
    /// Its part of the ring, 0…[`SHARE_PARTS`]; 0 is outside.
    pub share: u32,
    /// How busy it says it is.
    pub load: NodeLoad,
    /// The bases it says it serves; `None` before it has said so.
    pub serves: Option<Arc<[ServedBase]>>,
}

impl Member {
    /// What it says of a base.
    pub fn says(&self, base: &BaseName) -> Option<&ServedBase> {
        self.serves.as_ref()?.iter().find(|served| served.name == *base)
    }

    /// New requests may go there.
    pub fn takes_requests(&self) -> bool {
        self.health == Health::Alive && self.phase == NodePhase::Serving
    }
}

/// The cluster as one node sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterView {
    /// Rises with every change of who serves and of shares.
    pub epoch: u64,
    /// The node whose view it is.
    pub me: NodeId,
    /// Every node of the configuration, this one too.
    pub members: BTreeMap<NodeId, Member>,
}

// === impl ClusterView ===

impl ClusterView {
    /// The content of a base that counts, as one of its hosts says: that of most nodes that live, then of most that ever
    /// said, then of the first by name. Hosts with another one do not serve the base.
    pub fn agreed(&self, base: &BaseName) -> Option<&ServedBase> {
        let words = || self.members.values().filter_map(|member| Some((member, member.says(base)?)));
        let lives = |member: &Member| !matches!(member.health, Health::Dead | Health::Absent);
        let mut votes = BTreeMap::<ContentHash, (usize, usize)>::new();
        for (member, said) in words() {
            let (living, all) = votes.entry(said.hash).or_default();
            *living += usize::from(lives(member));
            *all += 1;
        }
        // `max_by_key` takes the last of equals, so the first by name comes last.
        let most = words().rev().max_by_key(|(_, said)| votes.get(&said.hash))?.1.hash;
        // Of those who say it, one that lives and has its text to give.
        let alike = words().rev().filter(|(_, said)| said.hash == most);
        alike.max_by_key(|(member, said)| (said.text.is_some(), lives(member))).map(|(_, said)| said)
    }
}

/// How far a view differs from the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Not at all.
    None,
    /// Somebody is busier or idler.
    Load,
    /// Where requests may go.
    Placement,
}

/// This node, in its own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    /// Which life of this process.
    pub incarnation: u64,
    /// What it does with requests.
    pub phase: NodePhase,
    /// How busy it is.
    pub load: NodeLoad,
}

/// The membership of one node.
#[derive(Debug)]
pub struct Membership {
    rules: DetectorRules,
    me: Arc<MemberSpec>,
    own: Own,
    started_at: Instant,
    ticked_at: Instant,
    beats_sent: u64,
    epoch: u64,
    epoch_heard: u64,
    peers: BTreeMap<NodeId, Peer>,
    /// What every node, this one too, says it serves.
    serves: BTreeMap<NodeId, Arc<[ServedBase]>>,
    view: Arc<ClusterView>,
}

#[derive(Debug)]
struct Peer {
    spec: Arc<MemberSpec>,
    detector: Detector,
    dead_since: Option<Instant>,
}

// === impl Membership ===

impl Membership {
    /// A membership that has heard nobody yet. `specs` holds every node, `me` among them.
    ///
    /// # Panics
    /// When `me` is not in `specs`: the configuration was checked for that.
    pub fn new(now: Instant, me: &NodeId, own: Own, specs: Vec<MemberSpec>, rules: DetectorRules) -> Self {
        let mut specs: BTreeMap<NodeId, Arc<MemberSpec>> =
            specs.into_iter().map(|spec| (spec.id.clone(), Arc::new(spec))).collect();
        let me = specs.remove(me).expect("a node starts with its own name from the configuration");
        let peer = |spec| Peer { spec, detector: Detector::new(rules), dead_since: None };
        let peers = specs.into_iter().map(|(id, spec)| (id, peer(spec))).collect();
        let view = ClusterView { epoch: 0, me: me.id.clone(), members: BTreeMap::new() };
        let mut membership = Self {
            rules,
            me,
            own,
            started_at: now,
            ticked_at: now,
            beats_sent: 0,
            epoch: 0,
            epoch_heard: 0,
            peers,
            serves: BTreeMap::new(),
            view: Arc::new(view),
        };
        let _ = membership.renew(now);
        membership
    }

    /// The present view.
    pub fn view(&self) -> Arc<ClusterView> {
        self.view.clone()
    }

    /// Takes a peer's heartbeat in. Names outside the configuration are ignored; the certificate vouched for `from`.
    pub fn on_heartbeat(&mut self, now: Instant, from: &NodeId, beat: Heartbeat) {
        if let Some(peer) = self.peers.get_mut(from) {
            self.epoch_heard = self.epoch_heard.max(beat.epoch);
            peer.detector.on_heartbeat(now, beat);
        }
    }

    /// A node, which may be this one, says what it serves.
    pub fn on_hello(&mut self, from: &NodeId, serves: Arc<[ServedBase]>) {
        self.serves.insert(from.clone(), serves);
    }

    /// The connection to a peer broke.
    pub fn on_connection_lost(&mut self, peer: &NodeId) {
        if let Some(peer) = self.peers.get_mut(peer) {
            peer.detector.on_connection_lost();
        }
    }

    /// Every other node of the configuration.
    pub fn peers(&self) -> impl Iterator<Item = &NodeId> {
        self.peers.keys()
    }

    /// Says what this node does now; heard by others with the next heartbeat. True when the phase changed.
    pub fn say(&mut self, phase: NodePhase, load: NodeLoad) -> bool {
        let changed = self.own.phase != phase;
        self.own = Own { phase, load, ..self.own };
        changed
    }

    /// Lets time pass and renews the view.
    pub fn on_tick(&mut self, now: Instant) -> Change {
        let gap = now.saturating_duration_since(self.ticked_at);
        self.ticked_at = now;
        let slept = gap > self.rules.interval * self.rules.suspect_missed;
        for peer in self.peers.values_mut() {
            if slept {
                peer.detector.on_overslept(gap);
            }
            peer.detector.on_tick(now);
            peer.dead_since = match peer.detector.health() {
                Health::Dead => peer.dead_since.or(Some(now)),
                Health::Returning => peer.dead_since,
                Health::Alive | Health::Suspect | Health::Absent => None,
            };
        }
        self.renew(now)
    }

    /// What to tell every other node now.
    pub fn heartbeat(&mut self, now: Instant) -> Heartbeat {
        self.beats_sent += 1;
        Heartbeat {
            incarnation: self.own.incarnation,
            seq: self.beats_sent,
            uptime_ms: ms(now.saturating_duration_since(self.started_at)),
            epoch: self.epoch,
            phase: self.own.phase,
            load: self.own.load,
        }
    }

    fn renew(&mut self, now: Instant) -> Change {
        let oldest = self.uptimes(now).max().unwrap_or_default();
        let members: BTreeMap<NodeId, Member> = self.members(now, oldest).collect();
        if members == self.view.members {
            return Change::None;
        }
        let old = &self.view.members;
        // Suspicion comes and goes; it moves nobody's home.
        let serves = |member: &Member| {
            let serves = matches!(member.health, Health::Alive | Health::Suspect) && member.phase == NodePhase::Serving;
            (serves, member.share, member.incarnation, member.serves.clone())
        };
        if !members.values().map(serves).eq(old.values().map(serves)) {
            self.epoch = self.epoch.max(self.epoch_heard) + 1;
        }
        let opens =
            |member: &Member| (member.health, member.phase, member.share, member.incarnation, member.serves.clone());
        let same = members.values().map(opens).eq(old.values().map(opens));
        let change = if same { Change::Load } else { Change::Placement };
        self.view = Arc::new(ClusterView { epoch: self.epoch, me: self.me.id.clone(), members });
        change
    }

    fn members(&self, now: Instant, oldest: Duration) -> impl Iterator<Item = (NodeId, Member)> {
        let me = Member {
            spec: self.me.clone(),
            health: Health::Alive,
            phase: self.own.phase,
            incarnation: self.own.incarnation,
            share: share(now.saturating_duration_since(self.started_at), oldest),
            load: self.own.load,
            serves: self.serves.get(&self.me.id).cloned(),
        };
        let member = move |peer: &Peer| {
            let serves = self.serves.get(&peer.spec.id).cloned();
            Member { serves, ..peer.member(now, oldest) }
        };
        let peers = self.peers.iter().map(move |(id, peer)| (id.clone(), member(peer)));
        peers.chain([(self.me.id.clone(), me)])
    }

    /// How long every living node has served.
    fn uptimes(&self, now: Instant) -> impl Iterator<Item = Duration> {
        let living = self.peers.values().filter(|peer| peer.detector.health() == Health::Alive);
        living.filter_map(move |peer| peer.uptime(now)).chain([now.saturating_duration_since(self.started_at)])
    }
}

impl Peer {
    fn member(&self, now: Instant, oldest: Duration) -> Member {
        let last = self.detector.last();
        let health = self.detector.health();
        let left = self.dead_since.is_some_and(|since| now.saturating_duration_since(since) > RING_LEAVE_AFTER);
        let share = match health {
            Health::Absent => 0,
            // Comes for the first time: it has no place to keep.
            Health::Returning if self.dead_since.is_none() => 0,
            _ if left => 0,
            _ => share(self.uptime(now).unwrap_or_default(), oldest),
        };
        Member {
            spec: self.spec.clone(),
            health,
            phase: last.map_or(NodePhase::Serving, |beat| beat.phase),
            incarnation: last.map_or(0, |beat| beat.incarnation),
            share,
            load: last.map(|beat| beat.load).unwrap_or_default(),
            serves: None,
        }
    }

    fn uptime(&self, now: Instant) -> Option<Duration> {
        let (last, heard_at) = (self.detector.last()?, self.detector.heard_at()?);
        Some(Duration::from_millis(last.uptime_ms) + now.saturating_duration_since(heard_at))
    }
}

/// The part of the ring for a node that has served for `uptime`, where the eldest has for `oldest`: nodes that start
/// together share alike from the first moment, one that joins them later comes in quarters.
fn share(uptime: Duration, oldest: Duration) -> u32 {
    // Nodes of one start hear one another with a delay; that is not youth.
    const SAME_START: Duration = Duration::from_secs(5);
    if uptime >= SLOW_START || oldest.saturating_sub(uptime) <= SAME_START {
        return SHARE_PARTS;
    }
    let quarter = SLOW_START / (SHARE_PARTS - 1);
    let passed = uptime.as_millis() / quarter.as_millis();
    1 + u32::try_from(passed).unwrap_or(SHARE_PARTS - 1).min(SHARE_PARTS - 1)
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
