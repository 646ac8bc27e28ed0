//! Nodes that die, freeze, or are asked to leave while they compute other nodes' streams.

use std::time::Duration;

use crate::fleet::Fleet;

/// Longest pause in a stream whose node went away: noticing takes at most half a second, the rest is computing again
/// on a busy machine.
const PAUSE_MAX: Duration = Duration::from_secs(2);

#[test]
fn killing_a_node_that_computes_streams_loses_no_token() {
    let mut fleet = Fleet::start("kill");
    for victim in [1, 2] {
        let pauses = fleet.undisturbed_by(0, |cluster| cluster.nodes[victim].kill());
        assert!(pauses.iter().all(|pause| *pause < PAUSE_MAX), "{pauses:?}");
        fleet.cluster.nodes[victim].restart();
        fleet.cluster.nodes[victim].wait_ready();
    }
}

#[test]
fn a_node_that_freezes_holds_no_stream_up_and_says_nothing_twice() {
    let mut fleet = Fleet::start("freeze");
    let pauses = fleet.undisturbed_by(0, |cluster| cluster.nodes[1].signal("STOP"));
    assert!(pauses.iter().all(|pause| *pause < PAUSE_MAX), "{pauses:?}");
    // What it wakes up with is old news.
    let node = &fleet.cluster.nodes[1];
    node.signal("CONT");
    fleet.undisturbed_by(0, |_| {});
}

#[test]
fn a_node_asked_to_leave_hands_its_streams_over() {
    let mut fleet = Fleet::start("leave");
    fleet.undisturbed_by(0, |cluster| cluster.nodes[2].signal("TERM"));
    assert!(fleet.cluster.nodes[2].wait().success(), "{}", fleet.cluster.logs());
    fleet.undisturbed_by(1, |_| {});
}
