//! What tenants notice of a neighbour that floods, and what a class with reserved step time notices of everybody else:
//! the whole path from fair queue to token, in virtual time. `cargo run --example fairness` measures the same on a real
//! node; here the figures are the same on every machine, so they can be asserted.

mod bench;

use bench::{Clients, Seen, VirtualNode, percentile};
use shared::tenant::Tier;

/// As the project's fairness figure has it: nobody's times grow by more than a tenth.
const RATIO_MAX: f64 = 1.10;
const N_SEEDS: u64 = 9;
const SECONDS: u64 = 60;
const METRICS: [&str; 3] = ["p95 first token", "p95 gap", "p50 gap"];

fn tenant(n: usize, tier: Tier, n_clients: usize, concurrency: u32) -> Clients {
    let tenant = format!("{}{n}", tier.as_str()).parse().expect("valid");
    Clients { tenant, tier, n_clients, concurrency, n_prompt: 27, n_answer_min: 20 }
}

fn figures(seen: &[Seen]) -> [f64; 3] {
    let mut all = Seen::default();
    seen.iter().for_each(|seen| all.add(seen));
    [percentile(&all.first_token_ms, 0.95), percentile(&all.gap_ms, 0.95), percentile(&all.gap_ms, 0.5)]
}

/// How much the times of the tenants at `watched` grow from the first set of clients to the second: medians over seeds.
fn growth(reserves: [f64; 3], calm: &[Clients], busy: &[Clients], watched: std::ops::Range<usize>) -> [f64; 3] {
    let pairs: Vec<[f64; 3]> = (0..N_SEEDS)
        .map(|seed| {
            let mut node = VirtualNode::new(reserves, seed);
            let (before, after) = (node.drive(calm, SECONDS), node.drive(busy, SECONDS));
            assert!(after.iter().all(|seen| seen.n_requests > 0), "everybody gets on");
            let (before, after) = (figures(&before[watched.clone()]), figures(&after[watched.clone()]));
            std::array::from_fn(|metric| after[metric] / before[metric])
        })
        .collect();
    let medians =
        std::array::from_fn(|metric| percentile(&pairs.iter().map(|pair| pair[metric]).collect::<Vec<_>>(), 0.5));
    METRICS.iter().zip(medians).for_each(|(name, median)| println!("{name}: {median:.3} times"));
    medians
}

/// Two premium tenants, and with them one that floods.
fn premium_and_flood() -> (Vec<Clients>, Vec<Clients>) {
    let premium: Vec<Clients> = (0..2).map(|n| tenant(n, Tier::Premium, 2, 4)).collect();
    let flood = tenant(0, Tier::Shared, 32, 16);
    (premium.clone(), [premium, vec![flood]].concat())
}

#[test]
fn tenants_do_not_notice_a_neighbour_that_floods() {
    let calm: Vec<Clients> = (0..8).map(|n| tenant(n, Tier::Shared, 2, 2)).collect();
    let mut busy = calm.clone();
    busy[0].n_clients = 40;
    let growth = growth([0.0; 3], &calm, &busy, 1..8);
    assert!(growth.iter().all(|ratio| *ratio <= RATIO_MAX), "{growth:?}");
}

#[test]
fn a_class_with_reserved_time_does_not_notice_a_flood_of_another() {
    let (calm, busy) = premium_and_flood();
    let growth = growth([0.0, 0.95, 0.0], &calm, &busy, 0..2);
    assert!(growth.iter().all(|ratio| *ratio <= RATIO_MAX), "{growth:?}");
}

#[test]
fn a_class_without_reserved_time_notices_it() {
    let (calm, busy) = premium_and_flood();
    let growth = growth([0.0; 3], &calm, &busy, 0..2);
    assert!(growth.iter().all(|ratio| *ratio > RATIO_MAX), "{growth:?}");
}
