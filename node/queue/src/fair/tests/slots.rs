//! More adapters than slots, and queues of ten thousand tenants.

use super::sim::{Sim, percentile};
use super::*;

fn storm(n_tenants: usize, n_slots: usize, steps: u64, pass_tokens_max: u64) -> Sim {
    let mut sim = Sim::new(FairConfig { pass_tokens_max, ..FairConfig::default() }, 16, n_slots);
    for n in 0..n_tenants {
        for _ in 0..3 {
            sim.submit(Item { adapter: Some(adapter(n)), prompt_tokens: 40, ..item(sim.now(), 0, n) }, 20);
        }
    }
    let mut finished_before = vec![0; n_tenants];
    for _ in 0..steps {
        sim.step();
        for (n, before) in finished_before.iter_mut().enumerate() {
            let finished = sim.served.get(&item(sim.now(), 0, n).route).map_or(0, |served| served.finished);
            for _ in *before..finished {
                sim.submit(Item { adapter: Some(adapter(n)), prompt_tokens: 40, ..item(sim.now(), 0, n) }, 20);
            }
            *before = finished;
        }
    }
    sim
}

#[test]
fn nobody_starves_when_sixty_four_adapters_want_four_slots() {
    let sim = storm(64, 4, 20_000, 500);
    let served: Vec<u64> = sim.served.values().map(|served| served.weighted_tokens).collect();
    let waits: Vec<u64> = sim.served.values().flat_map(|served| served.waits_steps.clone()).collect();
    let (least, most) = (served.iter().min().expect("served"), served.iter().max().expect("served"));
    println!(
        "64 adapters, 4 slots: {} loads, tokens {least}…{most}, wait p95/max {}/{} steps",
        sim.slots.loads,
        percentile(&waits, 95),
        percentile(&waits, 100)
    );
    assert_eq!(served.len(), 64);
    assert!(*least as f64 >= 0.8 * *most as f64, "{least} … {most}");
}

#[test]
fn passing_is_bounded_and_a_larger_bound_loads_less_often() {
    let (tight, loose) = (storm(8, 4, 5_000, 100), storm(8, 4, 5_000, 5_000));
    println!("loads with little passing {}, with much {}", tight.slots.loads, loose.slots.loads);
    assert!(loose.slots.loads * 2 < tight.slots.loads);
    for sim in [tight, loose] {
        assert_eq!(sim.served.len(), 8, "everybody was served");
    }
}

#[test]
fn residents_pass_one_who_waits_for_a_slot_only_so_far() {
    let mut b = Bench::new();
    b.queue.configure(FairConfig { pass_tokens_max: 100, ..FairConfig::default() });
    b.view.set(adapter(0), Residency::NoSlot);
    b.view.set(adapter(1), Residency::Ready);
    b.submit(Item { adapter: Some(adapter(0)), ..b.item(0, 0) });
    for id in 1..40 {
        b.submit(Item { adapter: Some(adapter(1)), ..b.item(id, 1) });
    }
    b.submit(b.item(100, 2));
    let picked = ids(std::iter::from_fn(|| b.next()));
    // Ten tokens each, at most 100 ahead: 0, 10 … 100 are eleven picks. The base request holds no slot.
    assert_eq!(picked, ids((1..=11).chain([100])));
    assert!(b.queue.draining());
    assert_eq!(b.queue.wanted(1), [adapter(0)]);
    b.view.set(adapter(0), Residency::Loading);
    assert!(b.next().is_some(), "who waits for a load holds nobody back");
    b.view.set(adapter(0), Residency::Ready);
    assert_eq!(b.next(), Some(0));
    assert!(!b.queue.draining());
}

#[test]
fn ten_thousand_backlogged_tenants_cost_microseconds_a_pick() {
    use shared::clock::SystemClock;
    let mut b = Bench::new();
    for n in 0..10_000 {
        // Only every five-hundredth adapter is resident; the others wait for slots.
        let state = if n % 500 == 499 { Residency::Ready } else { Residency::NoSlot };
        b.view.states.insert(adapter(n), state);
        b.submit(Item { adapter: Some(adapter(n)), ..b.item(n as u128, n) });
    }
    b.queue.configure(FairConfig { waiting_max: 20_000, ..FairConfig::default() });
    for n in 0..10_000 {
        if n % 500 == 499 {
            for extra in 0..50 {
                b.submit(Item { adapter: Some(adapter(n)), ..b.item((10_000 + n * 50 + extra) as u128, n) });
            }
        }
    }
    let mut first_calls = 0;
    let started = SystemClock.now();
    while b.next().is_none() {
        first_calls += 1;
        assert!(first_calls <= 10, "10,000 lines are parked a thousand a call");
    }
    let parking_us = started.elapsed().as_micros();
    let started = SystemClock.now();
    for _ in 0..1000 {
        assert!(b.next().is_some());
    }
    let pick_us = started.elapsed().as_micros() as f64 / 1000.0;
    let started = SystemClock.now();
    for _ in 0..1000 {
        assert_eq!(b.queue.wanted(32).len(), 32);
    }
    let wanted_us = started.elapsed().as_micros() as f64 / 1000.0;
    println!(
        "10,000 tenants: parking all {parking_us} µs, then {pick_us:.2} µs a pick, {wanted_us:.2} µs for 32 wanted"
    );
    assert!(pick_us < 200.0, "far above the few microseconds measured: {pick_us}");
}
