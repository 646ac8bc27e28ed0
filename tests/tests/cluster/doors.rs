//! Through whichever node a request comes in.

use crate::fleet::Fleet;

#[test]
fn every_node_answers_every_tenant_alike_and_bills_once() {
    let mut fleet = Fleet::start("doors");
    for door in [1, 2] {
        fleet.undisturbed_by(door, |_| {});
    }
    // Nine streams through each node: a record each, where the client was.
    for node in &fleet.cluster.nodes {
        let records = node.usage_of(9);
        assert_eq!(records.len(), 9, "{records:?}");
        assert!(records.iter().all(|record| record["outcome"] == "finished"), "{records:?}");
    }
}
