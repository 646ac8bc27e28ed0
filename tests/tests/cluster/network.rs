//! A network that fails between nodes that do not.

use std::time::Duration;

use crate::fleet::Fleet;

/// Half a second until a silent node is dead, and the rest to compute again on a busy machine.
const PAUSE_MAX: Duration = Duration::from_millis(1500);

#[test]
fn streams_leave_a_node_that_their_entry_cannot_reach() {
    let (mut fleet, network) = Fleet::start_apart("partition");
    let pauses = fleet.undisturbed_by(0, |_| network.cut(0, 1, true));
    assert!(pauses.iter().all(|pause| *pause < PAUSE_MAX), "{pauses:?}");
    // While it lasts every door answers, though two of three nodes do not see each other.
    for door in [0, 1, 2] {
        fleet.undisturbed_by(door, |_| {});
    }
    network.cut(0, 1, false);
    fleet.undisturbed_by(1, |_| {});
}

#[test]
fn streams_leave_a_node_that_hears_their_entry_or_is_heard_and_not_both() {
    for (from, to) in [(0, 1), (1, 0)] {
        let (mut fleet, network) = Fleet::start_apart("one-way");
        let pauses = fleet.undisturbed_by(0, |_| network.cut_one_way(from, to, true));
        assert!(pauses.iter().all(|pause| *pause < PAUSE_MAX), "from {from} to {to}: {pauses:?}");
        for door in [0, 1, 2] {
            fleet.undisturbed_by(door, |_| {});
        }
        network.cut_one_way(from, to, false);
        fleet.undisturbed_by(1, |_| {});
    }
}

#[test]
fn a_network_that_loses_and_delays_packets_costs_time_only() {
    let (mut fleet, network) = Fleet::start_apart("loss");
    fleet.undisturbed_by(0, |_| network.make_bad(0.05, Duration::from_millis(5)));
    fleet.undisturbed_by(2, |_| network.make_bad(0.0, Duration::ZERO));
}
