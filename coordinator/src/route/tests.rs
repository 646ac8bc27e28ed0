//! Who is asked, in which order, and who sends a request on.

use super::*;
use crate::membership::{MemberSpec, SHARE_PARTS};
use crate::testing::spec_of_node;

fn id(i: usize) -> NodeId {
    format!("n{i}").parse().expect("valid name")
}

fn base() -> BaseName {
    "smollm2".parse().expect("valid base")
}

fn tenant(i: usize) -> TenantId {
    format!("tenant-{i}").parse().expect("valid tenant")
}

fn member(spec: MemberSpec) -> Member {
    let load = NodeLoad { running: 0, places: 8, waiting: 0 };
    Member {
        spec: spec.into(),
        health: Health::Alive,
        phase: NodePhase::Serving,
        incarnation: 1,
        share: SHARE_PARTS,
        load,
        serves: None,
    }
}

/// Nodes n0 … of the default pool, changed by `change`, seen by n0.
fn table(n: usize, change: impl Fn(usize, &mut Member, &mut MemberSpec)) -> RoutingTable {
    let members = (0..n).map(|i| {
        let mut spec = spec_of_node(&id(i), 1);
        let mut seen = member(spec.clone());
        change(i, &mut seen, &mut spec);
        (id(i), Member { spec: spec.into(), ..seen })
    });
    let view = ClusterView { epoch: 7, me: id(0), members: members.collect() };
    Routes::new(RingKey::derive(b"test")).table(Arc::new(view))
}

fn place() -> Place {
    Place::anywhere(base())
}

fn asked(table: &RoutingTable, place: &Place, i: usize) -> Vec<NodeId> {
    table.candidates(place, &tenant(i)).into_iter().map(|candidate| candidate.node).collect()
}

#[test]
fn a_tenant_has_two_candidates_home_first() {
    let table = table(5, |_, _, _| {});
    for i in 0..100 {
        let owners = table.owners(&place(), &tenant(i)).expect("five nodes");
        assert_eq!(asked(&table, &place(), i), [owners.home.clone(), owners.successor.expect("five").clone()]);
    }
}

#[test]
fn the_dead_the_draining_and_the_absent_are_not_asked() {
    for out in [
        (Health::Dead, NodePhase::Serving),
        (Health::Alive, NodePhase::Draining),
        (Health::Alive, NodePhase::Leaving),
        (Health::Absent, NodePhase::Serving),
    ] {
        let table = table(4, |i, member, _| {
            if i == 2 {
                (member.health, member.phase) = out
            }
        });
        for i in 0..100 {
            let asked = asked(&table, &place(), i);
            assert!(!asked.contains(&id(2)) && !asked.is_empty(), "{asked:?}");
        }
    }
}

#[test]
fn the_doubtful_are_asked_last() {
    for health in [Health::Suspect, Health::Returning] {
        let table = table(2, |i, member, _| {
            if i == 1 {
                member.health = health
            }
        });
        for i in 0..50 {
            assert_eq!(asked(&table, &place(), i), [id(0), id(1)]);
            assert!(!table.candidates(&place(), &tenant(i))[1].good);
        }
    }
}

#[test]
fn a_busy_home_hands_on_to_an_idle_successor() {
    let busy = NodeLoad { running: 8, places: 8, waiting: 8 };
    for (of_one, of_others, spilt) in [
        (busy, NodeLoad { running: 2, places: 8, waiting: 0 }, true),
        (busy, busy, false),
        (NodeLoad { waiting: 0, ..busy }, NodeLoad::default(), false),
    ] {
        let plain = table(2, |_, _, _| {});
        let loaded = table(2, |i, member, _| member.load = if i == 1 { of_one } else { of_others });
        for i in 0..50 {
            let mut expected = asked(&plain, &place(), i);
            if spilt && expected[0] == id(1) {
                expected.reverse();
            }
            assert_eq!(asked(&loaded, &place(), i), expected);
        }
    }
}

#[test]
fn pools_regions_and_bases_are_boundaries() {
    let table = table(6, |i, _, spec| {
        if i >= 4 {
            spec.pool = "dedicated".into();
        }
        spec.region = Some(if i % 2 == 0 { "eu" } else { "us" }.into());
        if i == 3 {
            spec.bases = vec!["qwen2".parse().expect("valid")];
        }
    });
    let at = |pool: &str, region: Option<&str>, base: &str| Place {
        base: base.parse().expect("valid"),
        pool: pool.into(),
        region: region.map(Into::into),
    };
    for i in 0..100 {
        let within = |place: Place, allowed: &[usize]| {
            let asked = asked(&table, &place, i);
            assert_eq!(asked.len(), allowed.len().min(2), "{place:?}");
            assert!(asked.iter().all(|node| allowed.iter().any(|i| id(*i) == *node)), "{place:?}: {asked:?}");
        };
        within(at("default", None, "smollm2"), &[0, 1, 2]);
        within(at("default", Some("eu"), "smollm2"), &[0, 2]);
        within(at("default", Some("us"), "smollm2"), &[1]);
        within(at("default", None, "qwen2"), &[3]);
        within(at("dedicated", Some("eu"), "smollm2"), &[4]);
        within(at("dedicated", None, "smollm2"), &[4, 5]);
        within(at("nowhere", None, "smollm2"), &[]);
    }
}

#[test]
fn a_stale_sender_is_redirected_once() {
    let table = table(5, |_, _, _| {});
    let foreign = (0..100).find(|i| !asked(&table, &place(), *i).contains(&id(0))).expect("three of five");
    let to = asked(&table, &place(), foreign)[0].clone();
    assert_eq!(table.on_arrival(&place(), &tenant(foreign), 6), Arrival::Moved { epoch: 7, to });
    for epoch in [7, 8, SERVE_HERE] {
        assert_eq!(table.on_arrival(&place(), &tenant(foreign), epoch), Arrival::Serve);
    }
    let own = (0..100).find(|i| asked(&table, &place(), *i)[1] == id(0)).expect("one of five");
    assert_eq!(table.on_arrival(&place(), &tenant(own), 0), Arrival::Serve, "the successor serves, too");
}

#[test]
fn a_draining_node_refuses_whoever_asks() {
    let table = table(3, |i, member, _| {
        if i == 0 {
            member.phase = NodePhase::Draining
        }
    });
    for epoch in [0, SERVE_HERE] {
        assert_eq!(table.on_arrival(&place(), &tenant(1), epoch), Arrival::Refuse);
    }
}

#[test]
fn heavy_tenants_are_balanced_and_rings_are_kept() {
    let view = |epoch| {
        let members = (0..3).map(|i| (id(i), member(spec_of_node(&id(i), 1)))).collect();
        Arc::new(ClusterView { epoch, me: id(0), members })
    };
    let mut routes = Routes::new(RingKey::derive(b"test"));
    let before = routes.table(view(1));
    assert!(Arc::ptr_eq(&before.rings, &routes.table(view(2)).rings), "same nodes, same rings");
    // Everything that lives at n1 is heavy.
    let heavy = |i: &usize| *before.owners(&place(), &tenant(*i)).expect("three").home == id(1);
    let placed = |i| PlacedTenant { tenant: tenant(i), place: place(), load: if heavy(&i) { 10 } else { 1 } };
    let placed: Vec<PlacedTenant> = (0..300).map(placed).collect();
    routes.expect_tenants(Expected::new(&RingKey::derive(b"test"), &placed));
    let after = routes.table(view(3));
    assert!(Arc::ptr_eq(&after.rings, &routes.table(view(4)).rings), "same tenants, same rings");
    let left = (0..300).filter(heavy).filter(|i| *after.owners(&place(), &tenant(*i)).expect("three").home != id(1));
    assert!(left.count() > 20);
}

#[test]
fn the_content_that_most_living_nodes_serve_is_the_base_and_others_get_nothing_of_it() {
    let says = |content: u8| {
        let hash = shared::hash::ContentHash([content; 32]);
        Some([ServedBase { name: base(), hash, text: None, numerics_id: "x".to_owned() }].into())
    };
    let contents = |contents: &'static [u8], dead: &'static [usize]| {
        table(contents.len(), move |i, seen, _| {
            seen.serves = says(contents[i]);
            if dead.contains(&i) {
                seen.health = Health::Dead;
            }
        })
    };
    let agreed = |table: &RoutingTable| table.agreed(&base()).map(|said| said.hash.0[0]);
    let odd = contents(&[1, 2, 1], &[]);
    assert_eq!(agreed(&odd), Some(1));
    assert!((0..50).all(|i| !asked(&odd, &place(), i).contains(&id(1))), "it is on no ring");
    assert_eq!(odd.unlike().into_iter().map(|(node, _)| node.clone()).collect::<Vec<_>>(), [id(1)]);
    // Ties go to who lives, then to more words, then to the first.
    assert_eq!(agreed(&contents(&[1, 2], &[])), Some(1));
    assert_eq!(agreed(&contents(&[1, 2], &[0])), Some(2));
    assert_eq!(agreed(&contents(&[2, 1, 1], &[1])), Some(1));
    // Who has said nothing yet is believed.
    let silent = table(2, |i, seen, _| seen.serves = if i == 0 { says(1) } else { None });
    assert!((0..50).any(|i| asked(&silent, &place(), i)[0] == id(1)));
}
