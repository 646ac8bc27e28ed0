//! The cluster as this node sees it, and how a node leaves it.
//!
//! Every node answers for its own view: two nodes may differ for a moment, and that is worth seeing.

use std::collections::BTreeMap;

use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode};
use coordinator::membership::Member;
use coordinator::membership::detector::Health;
use coordinator::registry::record::AdapterRecord;
use coordinator::registry::snapshot::TenantView;
use coordinator::registry::status::{Role, Status};
use coordinator::route::RoutingTable;
use serde_json::{Value, json};
use shared::cluster::NodePhase;
use shared::error::{ErrorKind, RequestError};
use shared::id::{BaseName, NodeId};
use wire::node::{Resident, ServedBase};

use super::api::DrainNode;
use super::{Json, Shared, failed};
use crate::app::App;
use crate::cluster::{ClusterNode, place};
use crate::gateway::reply;

/// In place of what a node did not say in time.
const UNKNOWN: &str = "unknown";

pub(super) async fn show(State(admin): Shared) -> Response<Body> {
    let Some(cluster) = admin.app.cluster() else { return failed(&alone()) };
    let warm = Warm::look(&admin.app, cluster).await;
    let table = cluster.coordinator().tables().borrow().clone();
    let homes = homes(&admin.app, &table);
    let nodes = table.members().values().map(|member| {
        let homes = homes.get(&member.spec.id).copied().unwrap_or_default();
        node_status(cluster, &table, member, homes, warm.count(&member.spec.id))
    });
    let body = json!({
        "node": table.me(),
        "epoch": table.epoch(),
        "nodes": nodes.collect::<Vec<_>>(),
        "registry": registry_status(&admin.app.registry().status().borrow()),
    });
    reply::json(StatusCode::OK, &body)
}

/// Who serves whom, and what of theirs is in which node's memory.
pub(super) async fn tenants(State(admin): Shared) -> Response<Body> {
    let app = &admin.app;
    let Some(cluster) = app.cluster() else { return failed(&alone()) };
    let warm = Warm::look(app, cluster).await;
    let table = cluster.coordinator().tables().borrow().clone();
    let snapshot = app.registry().snapshot();
    let views = snapshot.tenants();
    let placed = views.iter().flat_map(|view| {
        let (contract, table, warm) = (view.contract(), &table, &warm);
        contract.bases.iter().map(move |base| {
            let place = place(base, contract);
            let owners = table.owners(&place, &contract.tenant);
            let serves = table.candidates(&place, &contract.tenant).into_iter().next();
            json!({
                "tenant": contract.tenant,
                "base": base,
                "serves": serves.map(|candidate| candidate.node),
                "home": owners.as_ref().map(|owners| owners.home),
                "successor": owners.as_ref().and_then(|owners| owners.successor),
                "warm": warm.of(view, base),
            })
        })
    });
    reply::json(
        StatusCode::OK,
        &json!({"node": table.me(), "epoch": table.epoch(), "tenants": placed.collect::<Vec<_>>()}),
    )
}

/// The node hands over what it has and ends, as on SIGTERM.
pub(super) async fn drain(State(admin): Shared, body: Result<Json<DrainNode>, Response<Body>>) -> Response<Body> {
    let wanted = match body {
        Ok(Json(body)) => body.node,
        Err(refusal) => return refusal,
    };
    let me = &admin.app.node().name;
    if wanted != *me {
        let message = format!("this is node {me}, not {wanted}; hint: ask the node that is to end");
        return failed(&RequestError::new(ErrorKind::Conflict, "another_node", message));
    }
    admin.app.ask_to_end();
    reply::json(StatusCode::ACCEPTED, &json!({"node": me, "draining": true}))
}

/// What is in the memory of every node that lives; `None` for one that does not say.
struct Warm(BTreeMap<NodeId, Option<Vec<Resident>>>);

impl Warm {
    async fn look(app: &App, cluster: &ClusterNode) -> Self {
        let mut residents = cluster.residents().await;
        residents.insert(app.node().name.clone(), Some(app.residents()));
        Self(residents)
    }

    /// Adapters of a node.
    fn count(&self, node: &NodeId) -> Value {
        match self.0.get(node) {
            Some(Some(residents)) => residents.len().into(),
            _ => UNKNOWN.into(),
        }
    }

    /// Versions of a tenant for a base, by node.
    fn of(&self, view: &TenantView, base: &BaseName) -> Value {
        let tenant = &view.contract().tenant;
        let of = |(node, residents): (&NodeId, &Option<Vec<Resident>>)| {
            let Some(residents) = residents else { return (node.to_string(), UNKNOWN.into()) };
            let is_warm = |adapter: &&AdapterRecord| {
                let is = |resident: &Resident| resident.base == *base && resident.adapter.hash == adapter.hash;
                residents.iter().any(|resident| is(resident) && resident.adapter.tenant == *tenant)
            };
            let adapters = view.record().adapters.values().filter(|adapter| adapter.base == *base);
            let names: Vec<String> = adapters.filter(is_warm).map(|adapter| adapter.name.to_string()).collect();
            (node.to_string(), names.into())
        };
        Value::Object(self.0.iter().map(of).collect())
    }
}

fn alone() -> RequestError {
    let message = "this node is alone; hint: list more [[nodes]] in cluster.toml";
    RequestError::new(ErrorKind::NotFound, "no_cluster", message)
}

/// Tenants and bases that each node is home to, and successor of.
fn homes(app: &App, table: &RoutingTable) -> BTreeMap<NodeId, [u64; 2]> {
    let mut homes = BTreeMap::<NodeId, [u64; 2]>::new();
    for view in app.registry().snapshot().tenants() {
        let contract = view.contract();
        for base in &contract.bases {
            let Some(owners) = table.owners(&place(base, contract), &contract.tenant) else { continue };
            homes.entry(owners.home.clone()).or_default()[0] += 1;
            if let Some(successor) = owners.successor {
                homes.entry(successor.clone()).or_default()[1] += 1;
            }
        }
    }
    homes
}

fn node_status(
    cluster: &ClusterNode,
    table: &RoutingTable,
    member: &Member,
    [home, successor]: [u64; 2],
    warm: Value,
) -> Value {
    let (spec, load) = (&member.spec, member.load);
    json!({
        "name": spec.id,
        "health": health(member.health),
        "phase": phase(member.phase),
        "connected": spec.id == *table.me() || cluster.net().is_connected(&spec.id),
        "incarnation": member.incarnation,
        "share": member.share,
        "capacity": spec.capacity,
        "pool": spec.pool,
        "region": spec.region,
        "bases": spec.bases,
        "serves": serves(table, member),
        "home_of": home,
        "successor_of": successor,
        "adapters_warm": warm,
        "running": load.running,
        "places": load.places,
        "waiting": load.waiting,
    })
}

/// What a node says of its bases, and whether that is what the others mean; `null` before it has said so. Of another
/// content it serves nothing, streams do not move between unlike arithmetics.
fn serves(table: &RoutingTable, member: &Member) -> Value {
    let Some(said) = &member.serves else { return Value::Null };
    let of = |said: &ServedBase| {
        let agreed = table.agreed(&said.name);
        let told = json!({
            "hash": said.hash.to_string(),
            "numerics": said.numerics_id,
            "left_out": agreed.is_some_and(|agreed| agreed.hash != said.hash),
            "other_arithmetic": agreed.is_some_and(|agreed| agreed.numerics_id != said.numerics_id),
        });
        (said.name.to_string(), told)
    };
    Value::Object(said.iter().map(of).collect())
}

fn registry_status(status: &Status) -> Value {
    let members = status.members.iter();
    let members = members.map(|member| json!({"node": member.node, "votes": member.votes, "behind": member.behind}));
    json!({
        "role": match status.role {
            Role::Leader => "leader",
            Role::Follower => "follower",
            Role::Candidate => "candidate",
            Role::Learner => "learner",
        },
        "term": status.term,
        "leader": status.leader,
        "applied": status.applied,
        "last": status.last,
        "members": members.collect::<Vec<_>>(),
    })
}

fn health(health: Health) -> &'static str {
    match health {
        Health::Alive => "alive",
        Health::Suspect => "suspect",
        Health::Returning => "returning",
        Health::Dead => "dead",
        Health::Absent => "absent",
    }
}

fn phase(phase: NodePhase) -> &'static str {
    match phase {
        NodePhase::Serving => "serving",
        NodePhase::Draining => "draining",
        NodePhase::Leaving => "leaving",
    }
}
