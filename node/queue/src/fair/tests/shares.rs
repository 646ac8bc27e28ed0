//! Who gets how much: shares under backlog, noisy neighbours, returning tenants.

use super::sim::{Rng, Sim, percentile};
use super::*;

/// Keeps `backlog` requests of each tenant waiting; shapes differ per tenant. Returns served tokens per tenant.
fn backlogged(weights: &[u32], steps: u64, config: FairConfig) -> Vec<u64> {
    let mut sim = Sim::new(config, 16, 64);
    let mut rng = Rng::new(1);
    for _ in 0..steps {
        for (n, &weight) in weights.iter().enumerate() {
            loop {
                let waiting =
                    sim.queue.stats(sim.now()).tenants.iter().find(|t| t.tenant == tenant(n)).map_or(0, |t| t.waiting);
                if waiting >= 4 {
                    break;
                }
                let (prompt, answer) = if n % 2 == 0 { (20 + rng.below(40), 60) } else { (200 + rng.below(200), 15) };
                let item = Item { weight, prompt_tokens: prompt as u32, ..item(sim.now(), 0, n) };
                assert!(sim.submit(item, answer));
            }
        }
        sim.step();
    }
    weights.iter().enumerate().map(|(n, _)| sim.served[&item(sim.now(), 0, n).route].weighted_tokens).collect()
}

fn assert_shares(served: &[u64], weights: &[u32], tolerance: f64) {
    let total: u64 = served.iter().sum();
    let total_weight: u32 = weights.iter().sum();
    for (&got, &weight) in served.iter().zip(weights) {
        let share = got as f64 / total as f64;
        let fair = f64::from(weight) / f64::from(total_weight);
        assert!((share / fair - 1.0).abs() <= tolerance, "share {share:.4}, fair {fair:.4}: {served:?}");
    }
}

#[test]
fn eight_equal_backlogged_tenants_get_equal_shares_whatever_their_requests_look_like() {
    let served = backlogged(&[1; 8], 6000, FairConfig::default());
    assert_shares(&served, &[1; 8], 0.05);
    let sum: f64 = served.iter().map(|&x| x as f64).sum();
    let squares: f64 = served.iter().map(|&x| (x as f64).powi(2)).sum();
    let jain = sum * sum / (8.0 * squares);
    println!("equal shares {served:?}, Jain index {jain:.5}");
    assert!(jain >= 0.99);
}

#[test]
fn weights_one_two_four_divide_the_engine_so() {
    let weights = [1, 2, 4];
    let served = backlogged(&weights, 8000, FairConfig::default());
    println!("weighted shares {served:?}");
    assert_shares(&served, &weights, 0.05);
}

#[test]
fn classes_share_by_their_own_weights_however_many_tenants_are_in_them() {
    let mut sim = Sim::new(FairConfig { class_weights: [1, 2, 1], ..FairConfig::default() }, 16, 64);
    let tiers = |n: usize| if n < 6 { Tier::Shared } else { [Tier::Premium, Tier::Isolated][n - 6] };
    for _ in 0..4000 {
        for n in 0..8 {
            while sim.queue.stats(sim.now()).tenants.iter().find(|t| t.tenant == tenant(n)).map_or(0, |t| t.waiting)
                < 16
            {
                assert!(sim.submit(Item { tier: tiers(n), prompt_tokens: 50, ..item(sim.now(), 0, n) }, 20));
            }
        }
        sim.step();
    }
    let served = |n: usize| sim.served[&item(sim.now(), 0, n).route].weighted_tokens;
    assert_shares(&[(0..6).map(served).sum(), served(6), served(7)], &[1, 2, 1], 0.05);
    assert_shares(&(0..6).map(served).collect::<Vec<_>>(), &[1; 6], 0.05);
}

/// Waits (steps) of seven tenants at half their fair share beside one that sends `flood` times its own.
fn neighbours_waits(flood: u64, seed: u64) -> Vec<u64> {
    let mut sim = Sim::new(FairConfig::default(), 16, 64);
    let mut rng = Rng::new(seed);
    // A request takes 1 + 20 of the 16 places' steps: 16 / 21 requests a step in all, a share is 1 / 8.
    let share_per_million = 1_000_000 * 16 / 21 / 8;
    for _ in 0..20_000 {
        for n in 0..8 {
            let rate = if n == 0 { share_per_million * flood } else { share_per_million / 2 };
            for _ in 0..rate / 1_000_000 + u64::from(rng.below(1_000_000) < rate % 1_000_000) {
                let item = Item { queue_depth: 64, concurrency: 4, prompt_tokens: 40, ..item(sim.now(), 0, n) };
                sim.submit(item, 20);
            }
        }
        sim.step();
    }
    sim.served
        .iter()
        .filter(|(route, _)| route.tenant != tenant(0))
        .flat_map(|(_, served)| served.waits_steps.clone())
        .collect()
}

#[test]
fn a_flood_of_twenty_times_its_share_hardly_delays_the_others() {
    let (at_share, flooding) = (neighbours_waits(1, 7), neighbours_waits(20, 7));
    let (calm, flood) = (percentile(&at_share, 95), percentile(&flooding, 95));
    println!(
        "neighbours' wait p95/max: {calm}/{} steps beside a tenant at its share, {flood}/{} beside a flood",
        percentile(&at_share, 100),
        percentile(&flooding, 100)
    );
    // The flood keeps its four places full, which the others feel as a busier batch, not as a queue.
    assert!(flood <= calm + 1, "{calm} → {flood}");
    assert!(percentile(&flooding, 100) <= 21, "nobody waits longer than one whole request of the flood");
}

#[test]
fn idleness_is_not_saved_up() {
    let mut b = Bench::new();
    for id in 0..100 {
        b.submit(b.item(id, 0));
    }
    for _ in 0..50 {
        b.next();
    }
    b.queue.charge(Tier::Shared, &b.item(0, 0).route, 0, 100_000);
    for id in 200..250 {
        b.submit(b.item(id, 1));
    }
    let next_ten: Vec<u128> = (0..10).filter_map(|_| b.next()).collect();
    let newcomer = next_ten.iter().filter(|&&id| id >= 200).count();
    assert_eq!(newcomer, 5, "level with the tenant that was served all along: {next_ten:?}");
}

#[test]
fn leaving_for_a_moment_does_not_wipe_out_a_debt() {
    let mut b = Bench::new();
    for id in 0..10 {
        b.submit(b.item(id, 0));
    }
    b.submit(b.item(100, 1));
    b.queue.charge(Tier::Shared, &b.item(100, 1).route, 0, 5_000);
    assert!(b.queue.cancel(RequestId(100)).is_some());
    b.submit(b.item(101, 1));
    let order: Vec<u128> = std::iter::from_fn(|| b.next()).collect();
    assert_eq!(order.last(), Some(&101), "{order:?}");
}

#[test]
fn credit_that_a_cap_prevents_from_being_used_is_bounded() {
    let mut b = Bench::new();
    b.queue.configure(FairConfig { credit_tokens_max: 100, ..FairConfig::default() });
    let capped = |b: &Bench, id| Item { concurrency: 1, ..b.item(id, 0) };
    for id in 0..50 {
        b.submit(capped(&b, id));
        b.submit(b.item(1000 + id, 1));
    }
    assert_eq!(b.next(), Some(0));
    b.queue.charge(Tier::Shared, &b.item(0, 1).route, 0, 100_000);
    b.queue.left(RequestId(0));
    // The cap is raised: the saved credit of at most 100 tokens is ten requests, then turns alternate.
    b.submit(Item { concurrency: 64, ..b.item(60, 0) });
    let next: Vec<u128> = (0..30).filter_map(|_| b.next()).collect();
    let own = next.iter().filter(|&&id| id < 1000).count();
    assert!((19..=21).contains(&own), "{own} of 30: {next:?}");
}
