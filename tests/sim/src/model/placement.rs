//! How even the ring is, who moves when nodes come and go, and what a routing table costs. Nothing here is modelled:
//! these are the coordinator's rings and tables, made for many names.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::Instant;

use coordinator::route::{Expected, Routes, RoutingTable};
use serde::Serialize;
use shared::clock::{Clock, SystemClock};
use shared::id::{NodeId, TenantId};

use super::{Size, load, node, place, placed, ring_key, tenant, view};

/// What the ring makes of a cluster.
#[derive(Debug, Clone, Serialize)]
pub struct Placement {
    /// Largest expected load of a node over the mean, by the ring's points alone.
    pub imbalance_by_points: f64,
    /// The same with bounded loads.
    pub imbalance: f64,
    /// Smallest expected load of a node over the mean.
    pub least: f64,
    /// Share of tenants that live at their successor for that.
    pub swapped: f64,
    /// Share of tenants that moved when a node joined; at best 1 of (nodes + 1).
    pub moved_on_join: f64,
    /// Share of tenants that then moved between two nodes that were there before.
    pub moved_beside_join: f64,
    /// Share of tenants that moved when a node left the ring; at best 1 of nodes.
    pub moved_on_leave: f64,
    /// Share of tenants that then moved between two nodes that stayed.
    pub moved_beside_leave: f64,
    /// Hashing and sorting the tenants, outside of any lock, in ms.
    pub expect_ms: f64,
    /// The first table of these nodes and tenants, in ms.
    pub table_ms: f64,
    /// The table after one node joined, in ms.
    pub table_after_join_ms: f64,
    /// The table after the tenants changed, in ms.
    pub table_after_tenants_ms: f64,
    /// A table in which only loads of nodes differ, in ms.
    pub table_of_loads_ms: f64,
    /// Home and successor of one tenant, in ns.
    pub look_up_ns: f64,
    /// Memory that the table and what makes it hold, in MiB.
    pub table_mib: f64,
}

fn ms_since(start: Instant) -> f64 {
    SystemClock.now().duration_since(start).as_secs_f64() * 1e3
}

/// Looks. `bytes_in_use` is the allocator's answer to how much is allocated.
pub fn placement(size: Size, bytes_in_use: &dyn Fn() -> usize) -> Placement {
    let tenants: Vec<TenantId> = (0..size.tenants).map(tenant).collect();
    let mut plain = Routes::new(ring_key());
    let by_points = imbalances(&plain.table(view(0..size.nodes)), &tenants, size.nodes).1;
    drop(plain);

    let before = bytes_in_use();
    let mut routes = Routes::new(ring_key());
    let listed = placed(size.tenants);
    let start = SystemClock.now();
    let expected = Expected::new(&ring_key(), &listed);
    let expect_ms = ms_since(start);
    drop(listed);
    routes.expect_tenants(expected);
    let (first, table_ms) = timed(&mut routes, 0..size.nodes);
    let table_mib = bytes_in_use().saturating_sub(before) as f64 / f64::from(1 << 20);
    let (_, table_of_loads_ms) = timed(&mut routes, 0..size.nodes);
    let start = SystemClock.now();
    for tenant in &tenants {
        black_box(first.owners(&place(), tenant));
    }
    let look_up_ns = ms_since(start) * 1e6 / size.tenants as f64;
    let (least, imbalance) = imbalances(&first, &tenants, size.nodes);
    let (joined, table_after_join_ms) = timed(&mut routes, 0..size.nodes + 1);
    let (moved_on_join, moved_beside_join) = moved(&first, &joined, &tenants, &node(size.nodes));
    let (left, _) = timed(&mut routes, 1..size.nodes);
    let (moved_on_leave, moved_beside_leave) = moved(&first, &left, &tenants, &node(0));
    routes.expect_tenants(Expected::new(&ring_key(), &placed(size.tenants)));
    let (_, table_after_tenants_ms) = timed(&mut routes, 1..size.nodes);
    Placement {
        imbalance_by_points: by_points,
        imbalance,
        least,
        swapped: first.rings()[&place()].n_swapped() as f64 / size.tenants as f64,
        moved_on_join,
        moved_beside_join,
        moved_on_leave,
        moved_beside_leave,
        expect_ms,
        table_ms,
        table_after_join_ms,
        table_after_tenants_ms,
        table_of_loads_ms,
        look_up_ns,
        table_mib,
    }
}

fn timed(routes: &mut Routes, nodes: std::ops::Range<usize>) -> (RoutingTable, f64) {
    let view = view(nodes);
    let start = SystemClock.now();
    let table = routes.table(view);
    (table, ms_since(start))
}

/// Smallest and largest load of a node over the mean.
fn imbalances(table: &RoutingTable, tenants: &[TenantId], nodes: usize) -> (f64, f64) {
    let mut loads: BTreeMap<NodeId, u64> = (0..nodes).map(|i| (node(i), 0)).collect();
    let place = place();
    for (i, tenant) in tenants.iter().enumerate() {
        let owners = table.owners(&place, tenant).expect("there are nodes");
        *loads.get_mut(owners.home).expect("one of the nodes") += load(i);
    }
    let mean = loads.values().sum::<u64>() as f64 / nodes as f64;
    let of = |load: Option<&u64>| load.map_or(0.0, |load| *load as f64 / mean);
    (of(loads.values().min()), of(loads.values().max()))
}

/// Shares of tenants that moved, and that moved without need: neither from nor to the node that came or went.
fn moved(before: &RoutingTable, after: &RoutingTable, tenants: &[TenantId], node: &NodeId) -> (f64, f64) {
    let place = place();
    let (mut moved, mut beside) = (0, 0);
    for tenant in tenants {
        let home = |table: &RoutingTable| table.owners(&place, tenant).map(|owners| owners.home.clone());
        let (old, new) = (home(before), home(after));
        moved += usize::from(old != new);
        beside += usize::from(old != new && old.as_ref() != Some(node) && new.as_ref() != Some(node));
    }
    let share = |n: usize| n as f64 / tenants.len().max(1) as f64;
    (share(moved), share(beside))
}
