//! Many simulated clusters, each from a seed: what must hold holds, and what is broken on purpose is found.
//!
//! `SIM_SEEDS=n` runs n seeds of each kind, `SIM_SEED=s` replays one.

use std::time::Duration;

use sim::engine::Planted;
use sim::oracle::Report;
use sim::world::{Scenario, Trouble, run};

/// Seeds of each kind by default, 600 in all; more by `SIM_SEEDS`.
const SEEDS: u64 = 200;

/// Seeds beyond these that found something once.
fn known(trouble: Trouble) -> &'static [u64] {
    match trouble {
        // A keeper that answered late counted as if nobody remembered the request.
        Trouble::OneAtATime => &[1745],
        // The keeper died 270 ms before its entry node, which had just answered and not yet noticed: no node is left that
        // knows what was delivered, and it is billed by nobody.
        Trouble::Overlapping => &[808],
        Trouble::Rolling => &[],
    }
}

fn seeds(trouble: Trouble) -> Vec<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text: String| text.parse::<u64>().ok());
    match (number("SIM_SEED"), number("SIM_SEEDS").unwrap_or(SEEDS)) {
        (Some(seed), _) => vec![seed],
        (None, n) => (0..n).chain(known(trouble).iter().copied().filter(|seed| *seed >= n)).collect(),
    }
}

fn replay(test: &str, seed: u64) -> String {
    format!("replay: SIM_SEED={seed} cargo test --package sim --test seeds -- --exact {test} --nocapture")
}

fn each(test: &str, trouble: Trouble, judge: impl Fn(&Report) -> Option<String>) {
    let mut sum = Report::default();
    let (mut refused, mut gaps, mut resume_gaps) = (0, Vec::new(), Vec::new());
    for seed in seeds(trouble) {
        let report = run(Scenario { seed, trouble, planted: Planted::Nothing });
        let wrong = report.violations.first().cloned().or_else(|| judge(&report));
        assert!(wrong.is_none(), "seed {seed}: {}\n{report:#?}\n{}", wrong.unwrap_or_default(), replay(test, seed));
        refused += report.refused.values().sum::<usize>();
        sum.complete += report.complete;
        sum.migrations += report.migrations;
        sum.resumes += report.resumes;
        sum.unknown += report.unknown;
        sum.delivered += report.delivered;
        sum.billed += report.billed;
        gaps.push(report.gap_max);
        resume_gaps.push(report.resume_gap_max);
    }
    let of = |gaps: &mut Vec<Duration>, q: usize| {
        gaps.sort_unstable();
        gaps.get((gaps.len() * q).div_ceil(100).saturating_sub(1)).copied().unwrap_or_default()
    };
    eprintln!(
        "{test}: {} seeds, {} answered in full, {refused} refused, {} further runs, {} moves of clients to other nodes, \
         {} of them begun anew, {} tokens delivered, {} billed; longest pause of a seed: median {:?}, 99 % {:?}, worst \
         {:?}; of one whose client moved: median {:?}, 99 % {:?}, worst {:?}",
        gaps.len(),
        sum.complete,
        sum.migrations,
        sum.resumes,
        sum.unknown,
        sum.delivered,
        sum.billed,
        of(&mut gaps, 50),
        of(&mut gaps, 99),
        of(&mut gaps, 100),
        of(&mut resume_gaps, 50),
        of(&mut resume_gaps, 99),
        of(&mut resume_gaps, 100),
    );
}

/// Nothing failed, and every request that was accepted was found again.
fn nothing_failed(report: &Report) -> Option<String> {
    let lost = (!report.lost_records.is_empty()).then(|| "a record was lost".to_owned());
    (!report.refused.is_empty()).then(|| "a request failed".to_owned()).or(lost)
}

#[test]
fn one_trouble_at_a_time_fails_nothing() {
    each("one_trouble_at_a_time_fails_nothing", Trouble::OneAtATime, nothing_failed);
}

#[test]
fn rolling_restarts_fail_nothing() {
    each("rolling_restarts_fail_nothing", Trouble::Rolling, nothing_failed);
}

#[test]
fn overlapping_troubles_are_refused_honestly() {
    each("overlapping_troubles_are_refused_honestly", Trouble::Overlapping, |report| {
        let honest = ["quarantined", "deadline_exceeded", "gave_up"];
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
    let all = [
        Planted::ForgetsEmitted,
        Planted::RepeatsLast,
        Planted::IgnoresCancel,
        Planted::AcceptsOldAttempts,
        Planted::KeepsNothing,
        Planted::IgnoresHave,
        Planted::BillsEveryVisit,
        Planted::MixesAdapters,
    ];
    for planted in all {
        let found = (0..20).find_map(|seed| {
            let report = run(Scenario { seed, trouble: Trouble::OneAtATime, planted });
            let wrong = report.violations.first().cloned().or_else(|| nothing_failed(&report));
            wrong.map(|wrong| (seed, wrong))
        });
        eprintln!("{planted:?} is found: {found:?}");
        assert!(found.is_some(), "{planted:?} is not found by 20 seeds");
    }
}

#[test]
fn migrations_and_moves_happen_and_pauses_stay_short() {
    let report = run(Scenario { seed: 1, trouble: Trouble::OneAtATime, planted: Planted::Nothing });
    assert!(report.complete > 10 && report.resumes > 0 && report.migrations > 0, "{report:?}");
    assert!(report.gap_max < Duration::from_secs(2), "{report:?}");
}
