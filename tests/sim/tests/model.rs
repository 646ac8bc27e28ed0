//! The thousand-node model in short: a few sizes, what must hold at each, and the same figures from the same seed.
//! `scripts/model` has the long form.

use coordinator::route::{Expected, Routes};
use sim::model::cache::caches;
use sim::model::gossip::{gossip, mistakes};
use sim::model::peak::{Use, peak};
use sim::model::placement::placement;
use sim::model::{Size, Speed, placed, ring_key, view};

const SIZES: [Size; 3] =
    [Size { nodes: 3, tenants: 3000 }, Size { nodes: 10, tenants: 10_000 }, Size { nodes: 60, tenants: 30_000 }];

#[test]
fn loads_are_bounded_and_few_tenants_move_at_any_size() {
    for size in SIZES {
        let found = placement(size, &|| 0);
        eprintln!("{size:?}: {found:?}");
        assert!(found.imbalance <= 1.26, "{size:?}: {}", found.imbalance);
        assert!(found.moved_on_join <= 1.3 / (size.nodes + 1) as f64, "{size:?}: {}", found.moved_on_join);
        assert!(found.moved_on_leave <= 1.4 / size.nodes as f64, "{size:?}: {}", found.moved_on_leave);
    }
}

#[test]
fn prewarming_halves_cold_sessions_wherever_the_ring_puts_tenants() {
    let size = Size { nodes: 20, tenants: 4000 };
    let mut routes = Routes::new(ring_key());
    routes.expect_tenants(Expected::new(&ring_key(), &placed(size.tenants)));
    let found = caches(1, size, &routes.table(view(0..size.nodes)), 3);
    eprintln!("{found:?}");
    assert!(found.prewarmed.cold_sessions * 2 <= found.lru.cold_sessions);
    assert!(found.prewarmed.loads * 10 <= found.lru.loads * 13);
    assert!(found.prewarmed.hit_rate() > found.lru.hit_rate());
}

#[test]
fn a_death_at_the_peak_loses_nothing_and_passes() {
    for nodes in [3, 12] {
        let size = Size { nodes, tenants: nodes * 200 };
        let run = |warm| peak(7, size, &Speed::default(), Use { busy: 0.6, warm });
        let (cold, warmed) = (run(false), run(true));
        eprintln!("{nodes} nodes: {cold:#?}");
        assert_eq!((cold.refused, cold.unfinished), (0, 0));
        assert!((300.0..700.0).contains(&cold.noticed_ms), "{}", cold.noticed_ms);
        let (before, after) = (&cold.phases[0], &cold.phases[4]);
        assert!(after.first_token_ms_p99 < 1.5 * before.first_token_ms_p99, "{before:?} {after:?}");
        assert!(warmed.phases[1].hits >= cold.phases[1].hits, "warming moved tenants does not hurt");
        assert_eq!(format!("{cold:?}"), format!("{:?}", run(false)), "the same seed gives the same figures");
    }
}

#[test]
fn heartbeats_grow_with_the_square_of_the_nodes_and_are_seldom_wrong() {
    let (ten, hundred) = (gossip(10), gossip(100));
    assert!((100.0..125.0).contains(&(hundred.all_gbit_s / ten.all_gbit_s)));
    let lossless = mistakes(1, 0.0, 100_000);
    assert!(lossless.suspected_per_h == 0.0 && lossless.dead_per_h == 0.0, "{lossless:?}");
    let lossy = mistakes(1, 0.05, 500_000);
    assert!(lossy.suspected_per_h > 1.0 && lossy.dead_per_h < 1.0, "{lossy:?}");
}
