//! The registry's leader, then a majority of those that vote on it, is away for ten minutes each: serving goes on.
//!
//! `SIM_SEED=s` chooses the seed.

use std::time::Duration;

use coordinator::registry::error::RegistryError;
use sim::plan::{LEADER_AWAY_MS, MAJORITY_AWAY_MS};
use sim::registry::{Change, Told};
use sim::world::run_without_registry;

/// A change is tried this long before its caller is told.
const TRIED_FOR: Duration = Duration::from_secs(10);

#[test]
fn ten_minutes_without_leader_and_without_majority_fail_no_request_and_lose_no_change() {
    let seed = std::env::var("SIM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let (report, minutes) = run_without_registry(seed);
    assert!(report.violations.is_empty(), "seed {seed}: {report:#?}");
    assert!(report.refused.is_empty() && report.complete > 1000, "seed {seed}: {report:#?}");
    let changes: Vec<Change> = minutes.changes().into_values().collect();
    let ms = Duration::from_millis;
    let within = |change: &&Change, from: Duration, to: Duration| change.asked_at >= from && change.asked_at < to;
    let count = |from, to, is: fn(&Told) -> bool| {
        changes.iter().filter(|change| within(change, from, to) && is(&change.told)).count()
    };
    let is_done = |told: &Told| *told == Told::Done;
    let is_refused = |told: &Told| matches!(told, Told::Failed(RegistryError::NoLeader { .. }));
    let is_unclear = |told: &Told| matches!(told, Told::Nothing | Told::Failed(_));
    let (leader_went, leader_came) = (ms(LEADER_AWAY_MS.start), ms(LEADER_AWAY_MS.end));
    let (most_went, most_came) = (ms(MAJORITY_AWAY_MS.start), ms(MAJORITY_AWAY_MS.end));
    let without_leader = count(leader_went, leader_came, is_done);
    let without_majority = count(most_went, most_came, is_refused);
    let longest =
        changes.iter().filter(|change| is_done(&change.told)).map(|change| change.took).max().unwrap_or_default();
    let back = changes.iter().filter(|change| change.asked_at >= most_came && is_done(&change.told));
    let back = back.map(|change| change.asked_at + change.took - most_came).min().expect("changes are taken again");
    println!(
        "registry away, seed {seed}: {} requests answered in full, 0 failed, {} further runs, {} moves of clients; of \
         changes {} acknowledged ({without_leader} without the first leader), longest after {longest:?}; without a \
         majority {without_majority} refused, the first taken {back:?} after it was back; {} unclear; 0 lost",
        report.complete,
        report.migrations,
        report.resumes,
        count(Duration::ZERO, Duration::MAX, is_done),
        count(Duration::ZERO, Duration::MAX, is_unclear) - count(Duration::ZERO, Duration::MAX, is_refused),
    );
    assert_eq!(count(leader_went + TRIED_FOR, leader_came, is_refused), 0, "two voters of three take changes");
    assert!(without_leader > 400, "{without_leader}");
    assert_eq!(count(most_went + TRIED_FOR, most_came - TRIED_FOR, is_done), 0, "one voter of three takes none");
    assert!(without_majority > 100, "{without_majority}");
    assert!(back < Duration::from_secs(3), "{back:?}");
}
