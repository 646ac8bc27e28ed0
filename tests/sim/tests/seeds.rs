//! Many simulated clusters, each from a seed: what must hold holds, and what is broken on purpose is found.
//!
//! `SIM_SEEDS=n` runs n seeds of each kind, `SIM_SEED=s` replays one.

use std::time::Duration;

use sim::engine::Planted;
use sim::oracle::Report;
use sim::world::{Scenario, Trouble, run};

/// Seeds of each kind by default, 500 in all; more by `SIM_SEEDS`.
const SEEDS: u64 = 250;

fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
    match number("SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("SIM_SEEDS").unwrap_or(SEEDS),
    }
}

fn replay(test: &str, seed: u64) -> String {
    format!("replay: SIM_SEED={seed} cargo test --package sim --test seeds -- --exact {test} --nocapture")
}

fn each(test: &str, trouble: Trouble, judge: impl Fn(&Report) -> Option<String>) {
    let (mut complete, mut refused, mut entries, mut migrations, mut gaps) = (0, 0, 0, 0, Vec::new());
    for seed in seeds() {
        let report = run(Scenario { seed, trouble, planted: Planted::Nothing });
        let wrong = report.violations.first().cloned().or_else(|| judge(&report));
        assert!(wrong.is_none(), "seed {seed}: {}\n{report:#?}\n{}", wrong.unwrap_or_default(), replay(test, seed));
        complete += report.complete;
        refused += report.refused.values().sum::<usize>();
        entries += report.entry_died;
        migrations += report.migrations;
        gaps.push(report.gap_max);
    }
    gaps.sort_unstable();
    let of = |q: usize| gaps.get((gaps.len() * q).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default();
    eprintln!(
        "{test}: {} seeds, {complete} answered in full, {refused} refused, {entries} lost with their entry node, \
         {migrations} further runs, longest pause of a seed: median {:?}, 99 % {:?}, worst {:?}",
        gaps.len(),
        of(50),
        of(99),
        of(100)
    );
}

#[test]
fn one_trouble_at_a_time_fails_nothing() {
    each("one_trouble_at_a_time_fails_nothing", Trouble::OneAtATime, |report| {
        (!report.refused.is_empty()).then(|| "a request failed".to_owned())
    });
}

#[test]
fn overlapping_troubles_are_refused_honestly() {
    each("overlapping_troubles_are_refused_honestly", Trouble::Overlapping, |report| {
        let honest = ["no_node_alive", "quarantined", "draining"];
        let other = report.refused.keys().find(|code| !honest.contains(&code.as_str()));
        other.map(|code| format!("refused with {code}"))
    });
}

#[test]
fn the_same_seed_gives_the_same_outcome() {
    for seed in 0..5 {
        let scenario = Scenario { seed, trouble: Trouble::Overlapping, planted: Planted::Nothing };
        assert_eq!(run(scenario), run(scenario), "seed {seed}");
    }
}

#[test]
fn planted_mistakes_are_found() {
    for planted in [Planted::ForgetsEmitted, Planted::RepeatsLast, Planted::IgnoresCancel] {
        let found = (0..20).find(|seed| {
            let report = run(Scenario { seed: *seed, trouble: Trouble::OneAtATime, planted });
            !report.violations.is_empty()
        });
        eprintln!("{planted:?} is found by seed {found:?}");
        assert!(found.is_some(), "{planted:?} is not found by 20 seeds");
    }
}

#[test]
fn migrations_happen_and_pauses_stay_short() {
    let report = run(Scenario { seed: 1, trouble: Trouble::OneAtATime, planted: Planted::Nothing });
    assert!(report.complete > 10, "{report:?}");
    assert!(report.gap_max < Duration::from_secs(2), "{report:?}");
}
