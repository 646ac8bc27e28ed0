//! The node that holds the clients goes away: they go on at another one.

use std::time::Duration;

use serde_json::json;
use tests::process::token_ids;

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

#[test]
fn of_twenty_sendings_at_once_over_two_nodes_one_is_answered_and_billed() {
    let fleet = Fleet::start("at-once");
    let body = json!({"model": "tiny", "prompt": "at once", "max_tokens": 900, "temperature": 1.0, "ignore_eos": true, "return_token_ids": true});
    let before = [fleet.cluster.nodes[0].usage_of(9).len(), 0, 0];
    let answers: Vec<tests::process::Answer> = std::thread::scope(|scope| {
        let send = |n: usize| {
            let (fleet, body) = (&fleet, &body);
            scope.spawn(move || fleet.send_keyed(n % 2, "order 68", body))
        };
        let sendings: Vec<_> = (0..20).map(send).collect();
        sendings.into_iter().map(|sending| sending.join().expect("a client does not panic")).collect()
    });
    let (answered, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
    assert_eq!(answered.len(), 1, "{:?}", answers.iter().map(|answer| answer.status).collect::<Vec<_>>());
    for answer in refused {
        assert_eq!((answer.status, answer.code()), (409, "idempotency_key_in_use"), "{}", answer.text);
        assert_eq!((answer.header("retry-after"), answer.header("x-should-retry")), (Some("1"), None));
    }
    // Whoever comes back, at whatever node, gets the same.
    let expected = token_ids(&answered[0].body["choices"][0]);
    assert_eq!(expected.len(), 900);
    for node in [0, 1, 2] {
        assert_eq!(fleet.keyed(node, "order 68", &body), expected);
    }
    // One of the twenty and three who came back; what is billed is counted by request.
    let request = |record: &serde_json::Value| record["request"].as_str().map(str::to_owned);
    let records = fleet.cluster.nodes.iter().zip(before).flat_map(|(node, n)| node.usage_of(n + 1).split_off(n));
    let records: Vec<serde_json::Value> = records.collect();
    assert_eq!(records.len(), 4, "{records:?}");
    assert_eq!(records.iter().filter_map(request).collect::<std::collections::BTreeSet<_>>().len(), 1);
}
