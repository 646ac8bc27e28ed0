//! The node that holds the clients goes away: they go on at another one.

use std::time::Duration;

use serde_json::json;

use crate::fleet::Fleet;

/// A client takes 1.5 s to believe that a silent node is gone.
const PAUSE_MAX: Duration = Duration::from_secs(4);

#[test]
fn clients_whose_node_dies_go_on_at_another_from_the_last_event_they_saw() {
    let mut fleet = Fleet::start("entry");
    fleet.goes_on_elsewhere(1, 0);
    // Each was cut once and goes on once: what the first node delivered and died with is in the second one's record.
    let records = fleet.cluster.nodes[0].usage_of(18);
    let mut delivered: Vec<u64> = records.iter().filter_map(|record| record["delivered"][0].as_u64()).collect();
    delivered.sort_unstable();
    assert!(delivered.len() >= 18 && delivered[9] > 5, "{records:?}");
}

#[test]
fn the_client_library_goes_on_by_itself() {
    let mut fleet = Fleet::start("library");
    let pauses = fleet.survives_in_the_library(1);
    assert!(pauses.iter().all(|pause| *pause < PAUSE_MAX), "{pauses:?}");
}

#[test]
fn a_request_sent_twice_is_the_same_request_at_any_node() {
    let fleet = Fleet::start("twice");
    let body = json!({"model": "tiny", "prompt": "once", "max_tokens": 40, "temperature": 1.0, "ignore_eos": true});
    let ask = |node: usize| fleet.keyed(node, "order 66", &body);
    let (first, again, other) = (ask(1), ask(2), fleet.keyed(1, "order 67", &body));
    assert_eq!(first, again, "no seed was given: the key decides");
    assert_ne!(first, other);
}
