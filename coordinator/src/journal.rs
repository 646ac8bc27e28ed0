//! Keeps what a request needs to go on when the node that holds its client dies (cores).
//!
//! ```text
//! entry node ── JournalOpen, JournalPut: at most 8 tokens or 50 ms behind ──► the request's keeper
//!     ✕
//! another node ◄── the client comes back with what it has
//!              ── JournalTake ──► keeper ── record ──► forward::Journey, from the record's tokens on
//! ```
//! The keeper is chosen by the request's id among the other nodes ([`keeper`]), so that whoever is asked to go on knows
//! whom to ask ([`whom_to_ask`]). Writing lags behind the client on purpose: what a record lacks is computed again, and
//! the same tokens come out. [`trail`] is the entry node's side, one per request, [`records`] the keeper's, one per
//! node, [`idempotency`] gives a request that is sent twice the same id. Driven by [`crate::forward`] and the node's
//! peer door; nothing here knows who may have a record: whoever takes one compares its tenant with the client's.

use shared::cluster::NodePhase;
use shared::id::{NodeId, RequestId};

use crate::membership::Member;
use crate::membership::detector::Health;
use crate::route::RoutingTable;

pub mod trail;
pub mod records;
pub mod idempotency;

/// Nodes that are asked for a record. A keeper is among the first two but when nodes came and went since; each that
/// came can put it one place back.
const ASKED_MAX: usize = 8;

/// Where an entry node keeps a request's record: the first other node that takes requests, or else the first that is
/// heard again. A node that was cut off trusts nobody for seconds afterwards, minutes if it happened often; meanwhile a
/// keeper that may vanish is better than none. A change of nodes changes the answer for some requests; a keeper that
/// still serves is kept all the same.
///
/// A record holds prompt and answer: of a tenant that is bound to a region it is kept there or nowhere.
pub fn keeper(table: &RoutingTable, id: RequestId, region: Option<&str>) -> Option<NodeId> {
    let others = table.members().iter().filter(|(node, member)| {
        *node != table.me()
            && lies_in(member, region)
            && member.phase == NodePhase::Serving
            && matches!(member.health, Health::Alive | Health::Returning)
    });
    others.max_by_key(|(node, member)| (member.takes_requests(), score(node, id))).map(|(node, _)| node.clone())
}

/// Which nodes may have a request's record, the likeliest first; this one may be among them. `region` is its tenant's.
/// All are asked at once and the record that is furthest counts ([`records::Found`]).
pub fn whom_to_ask(table: &RoutingTable, id: RequestId, region: Option<&str>) -> Vec<NodeId> {
    let gone = |health| matches!(health, Health::Dead | Health::Absent);
    let members = table.members().iter().filter(|(_, member)| !gone(member.health) && lies_in(member, region));
    let mut nodes: Vec<(u64, &NodeId)> = members.map(|(node, _)| (score(node, id), node)).collect();
    nodes.sort_unstable_by(|a, b| b.cmp(a));
    nodes.into_iter().take(ASKED_MAX).map(|(_, node)| node.clone()).collect()
}

fn lies_in(member: &Member, region: Option<&str>) -> bool {
    region.is_none() || region == member.spec.region.as_deref()
}

/// Rendezvous hashing: each request ranks the nodes in its own order, and a node that comes or goes changes no other's
/// rank.
fn score(node: &NodeId, id: RequestId) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&id.0.to_le_bytes()).update(node.as_str().as_bytes());
    u64::from_le_bytes(*hasher.finalize().as_bytes().first_chunk().expect("a hash has 32 bytes"))
}

#[cfg(test)]
pub(crate) mod tests;
