//! Where a request goes (core): the published [`RoutingTable`] and the questions it answers.
//!
//! [`Routes`] makes a table from every new [`ClusterView`] and keeps the rings between views; the coordinator's actor
//! publishes it by `watch`, so that routing is a look-up in a value and never a message. A tenant has two candidates,
//! home and successor, whatever happens: a request that kills nodes can reach no third one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shared::cluster::{NodeLoad, NodePhase};
use shared::error::{ErrorKind, RequestError};
use shared::id::{BaseName, NodeId, TenantId};
use wire::node::ServedBase;

use crate::membership::detector::Health;
use crate::membership::{ClusterView, Member, MemberSpec};
use crate::ring::{Crowd, Owners, POINTS_PER_PART, Ring, RingKey};

/// The pool of nodes and tenants of which nothing else is said.
pub const DEFAULT_POOL: &str = "default";

/// Epoch of a request that was redirected once: whoever gets it serves it.
pub const SERVE_HERE: u64 = u64::MAX;

/// A home this busy (requests per place) hands new requests to its successor if that is half as busy: one batch runs
/// and another waits.
const SPILL_BUSY: f64 = 2.0;

/// Clients without a node to go to may come back after this: longer than a restart is noticed.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// What decides where a request may run.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// Base model.
    pub base: BaseName,
    /// Nodes of one kind.
    pub pool: String,
    /// Data boundary; `None` is anywhere.
    pub region: Option<String>,
}

impl Place {
    /// Anywhere in the default pool.
    pub fn anywhere(base: BaseName) -> Self {
        Self { base, pool: DEFAULT_POOL.to_owned(), region: None }
    }

    /// Whether a node of this kind may serve here.
    pub fn admits(&self, spec: &MemberSpec) -> bool {
        let region = self.region.is_none() || self.region == spec.region;
        region && spec.pool == self.pool && spec.bases.contains(&self.base)
    }
}

/// A tenant and what to expect of it, for bounding loads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedTenant {
    /// Who.
    pub tenant: TenantId,
    /// Where it may run.
    pub place: Place,
    /// Expected load in any unit.
    pub load: u64,
}

/// A node that may serve a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub node: NodeId,
    /// Which life of it.
    pub incarnation: u64,
    /// How busy it says it is.
    pub load: NodeLoad,
    /// Healthy and open for requests; others are for when there is nothing better.
    pub good: bool,
}

/// What an owner does with a request that another node sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Arrival {
    /// Serve it.
    Serve,
    /// The sender's table is older and its tenant lives elsewhere.
    Moved {
        /// Epoch of the table that says so.
        epoch: u64,
        /// Where to.
        to: NodeId,
    },
    /// This node takes nothing new.
    Refuse,
}

/// One node's view of who serves whom.
#[derive(Debug, Clone)]
pub struct RoutingTable {
    view: Arc<ClusterView>,
    rings: Arc<BTreeMap<Place, Ring>>,
}

impl RoutingTable {
    /// Rises with every change of who serves; never falls.
    pub fn epoch(&self) -> u64 {
        self.view.epoch
    }

    /// The node whose table it is.
    pub fn me(&self) -> &NodeId {
        &self.view.me
    }

    /// Every node of the configuration.
    pub fn members(&self) -> &BTreeMap<NodeId, Member> {
        &self.view.members
    }

    /// What a base is to all, as one of its hosts says.
    pub fn agreed(&self, base: &BaseName) -> Option<&ServedBase> {
        self.view.agreed(base)
    }

    /// What a node says of a base.
    pub fn says(&self, node: &NodeId, base: &BaseName) -> Option<&ServedBase> {
        self.members().get(node)?.says(base)
    }

    /// Nodes that say something else of a base than the others. One with another content is given nothing of it; one with
    /// other arithmetic only what begins there.
    pub fn unlike(&self) -> Vec<(&NodeId, &ServedBase)> {
        let mut found = Vec::new();
        for (node, member) in self.members() {
            for said in member.serves.iter().flat_map(|said| said.iter()) {
                let agreed = self.agreed(&said.name).map(|agreed| (agreed.hash, &agreed.numerics_id));
                if agreed != Some((said.hash, &said.numerics_id)) {
                    found.push((node, said));
                }
            }
        }
        found
    }

    /// Home and successor of a tenant, alive or not: where its adapters should be warm.
    pub fn owners(&self, place: &Place, tenant: &TenantId) -> Option<Owners<'_>> {
        self.rings.get(place)?.owners(tenant)
    }

    /// The rings.
    pub fn rings(&self) -> &BTreeMap<Place, Ring> {
        &self.rings
    }

    /// At most two nodes to try in this order: those that take requests before those that are doubtful, home before
    /// successor unless home is much busier. The dead, the draining and the absent are left out.
    pub fn candidates(&self, place: &Place, tenant: &TenantId) -> Vec<Candidate> {
        let Some(owners) = self.owners(place, tenant) else { return Vec::new() };
        let members = [Some(owners.home), owners.successor];
        let mut found: Vec<(u8, &Member)> = members
            .into_iter()
            .flatten()
            .filter_map(|id| self.view.members.get(id))
            .filter_map(|member| Some((doubt(member)?, member)))
            .collect();
        // Stable: home stays first among equals.
        found.sort_by_key(|(doubt, _)| *doubt);
        if let [(0, home), (0, successor)] = found[..]
            && spills(home.load, successor.load)
        {
            found.swap(0, 1);
        }
        found.iter().map(|(doubt, member)| candidate(member, *doubt == 0)).collect()
    }

    /// What to do with a request that came from a node whose table had `epoch`.
    pub fn on_arrival(&self, place: &Place, tenant: &TenantId, epoch: u64) -> Arrival {
        let me = self.me();
        if self.members().get(me).is_some_and(|member| member.phase != NodePhase::Serving) {
            return Arrival::Refuse;
        }
        // An older table of ours proves nothing about a newer one of the sender.
        if epoch >= self.epoch() {
            return Arrival::Serve;
        }
        let candidates = self.candidates(place, tenant);
        match candidates.first() {
            Some(first) if candidates.iter().all(|candidate| candidate.node != *me) => {
                Arrival::Moved { epoch: self.epoch(), to: first.node.clone() }
            }
            _ => Arrival::Serve,
        }
    }
}

/// Told to a client when no node can serve it.
pub fn no_node() -> RequestError {
    let message = "no node that may serve this tenant is alive at the moment; hint: retry shortly";
    RequestError::new(ErrorKind::Unavailable, "no_node_alive", message).retry_after(RETRY_AFTER)
}

/// 0 takes requests; more is worse; `None` cannot be used.
fn doubt(member: &Member) -> Option<u8> {
    match (member.phase, member.health) {
        (NodePhase::Serving, Health::Alive) => Some(0),
        (NodePhase::Serving, Health::Suspect) => Some(1),
        (NodePhase::Serving, Health::Returning) => Some(2),
        _ => None,
    }
}

fn candidate(member: &Member, good: bool) -> Candidate {
    Candidate { node: member.spec.id.clone(), incarnation: member.incarnation, load: member.load, good }
}

fn spills(home: NodeLoad, successor: NodeLoad) -> bool {
    home.waiting > 0 && busy(home) >= SPILL_BUSY && busy(successor) * 2.0 <= busy(home)
}

/// Requests per place.
fn busy(load: NodeLoad) -> f64 {
    f64::from(load.running + load.waiting) / f64::from(load.places.max(1))
}

/// The tenants of every place, ready to be balanced. Hashing a million takes a moment: made by whoever knows the
/// tenants, under no lock.
#[derive(Debug, Default)]
pub struct Expected(BTreeMap<Place, Crowd>);

impl Expected {
    /// These tenants, for rings of this key.
    pub fn new(key: &RingKey, tenants: &[PlacedTenant]) -> Self {
        let mut by_place = BTreeMap::<&Place, Vec<(&TenantId, u64)>>::new();
        for PlacedTenant { tenant, place, load } in tenants {
            by_place.entry(place).or_default().push((tenant, *load));
        }
        Self(by_place.into_iter().map(|(place, here)| (place.clone(), Crowd::new(key, here))).collect())
    }
}

/// Makes routing tables; keeps rings as long as their nodes and tenants stay.
#[derive(Debug)]
pub struct Routes {
    key: RingKey,
    tenants: Expected,
    /// Points by node, by place: what the rings were made of.
    made_of: BTreeMap<Place, BTreeMap<NodeId, u32>>,
    rings: Arc<BTreeMap<Place, Ring>>,
    tenants_changed: bool,
}

// === impl Routes ===

impl Routes {
    /// No nodes, no tenants.
    pub fn new(key: RingKey) -> Self {
        let rings = Arc::default();
        Self { key, tenants: Expected::default(), made_of: BTreeMap::new(), rings, tenants_changed: false }
    }

    /// The tenants changed; takes effect with the next table. Tenants not listed are placed by the ring alone.
    pub fn expect_tenants(&mut self, tenants: Expected) {
        self.tenants = tenants;
        self.tenants_changed = true;
    }

    /// The table of a view.
    pub fn table(&mut self, view: Arc<ClusterView>) -> RoutingTable {
        let made_of = self.places(&view);
        if std::mem::take(&mut self.tenants_changed) || made_of != self.made_of {
            let mut rings = BTreeMap::new();
            for (place, nodes) in &made_of {
                let ring = self.ring(place, nodes, &rings);
                rings.insert(place.clone(), ring);
            }
            (self.rings, self.made_of) = (Arc::new(rings), made_of);
        }
        RoutingTable { view, rings: self.rings.clone() }
    }

    /// The ring of a place. Rings of the same nodes share their points, those of places and those of before.
    fn ring(&self, place: &Place, nodes: &BTreeMap<NodeId, u32>, others: &BTreeMap<Place, Ring>) -> Ring {
        let known = || others.values().chain(self.rings.values());
        let mut ring = match (known().find(|ring| ring.nodes() == nodes), self.rings.get(place)) {
            (Some(same), _) => same.unbounded(),
            (None, Some(before)) => before.changed(nodes.clone()),
            (None, None) => Ring::new(&self.key, nodes.clone()),
        };
        if let Some(crowd) = self.tenants.0.get(place) {
            ring.balance(crowd);
        }
        ring
    }

    /// Every place there can be, with the nodes that serve it.
    fn places(&self, view: &ClusterView) -> BTreeMap<Place, BTreeMap<NodeId, u32>> {
        let mut places = BTreeMap::<Place, BTreeMap<NodeId, u32>>::new();
        for member in view.members.values() {
            let spec = &member.spec;
            for (base, region) in spec.bases.iter().flat_map(|base| [(base, None), (base, spec.region.clone())]) {
                places.entry(Place { base: base.clone(), pool: spec.pool.clone(), region }).or_default();
            }
        }
        for (place, nodes) in &mut places {
            let agreed = view.agreed(&place.base).map(|agreed| agreed.hash);
            // One of which nothing is known yet is taken at the cluster file's word.
            let alike = |member: &&Member| member.says(&place.base).is_none_or(|said| Some(said.hash) == agreed);
            let here = view.members.values().filter(|member| place.admits(&member.spec) && member.share > 0);
            let here = here.filter(alike);
            let points =
                |member: &Member| POINTS_PER_PART.saturating_mul(member.share).saturating_mul(member.spec.capacity);
            nodes.extend(here.map(|member| (member.spec.id.clone(), points(member))));
        }
        places
    }
}

#[cfg(test)]
mod tests;
