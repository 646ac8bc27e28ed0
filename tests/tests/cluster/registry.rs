//! Tenants and adapters are the whole cluster's, whoever of the nodes is away.

use std::time::Duration;

use model::info::Linear;
use serde_json::json;
use tests::cluster::Cluster;
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

/// Longest wait for a change to reach a node.
const KNOWN_WITHIN: usize = 200;

fn start(name: &str) -> Cluster {
    let folder = scratch(name);
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\ndrain_s = 0");
    Cluster::start(&folder, &spec, 3)
}

/// Waits until a node lets a key in.
fn learns(node: &NodeProcess, key: &str) -> bool {
    (0..KNOWN_WITHIN).any(|_| {
        let known = node.get("/v1/models", key).status == 200;
        if !known {
            std::thread::sleep(Duration::from_millis(50));
        }
        known
    })
}

#[test]
fn changes_go_on_when_the_node_that_orders_them_is_killed() {
    let mut cluster = start("leader");
    let before = operator::tenant(&cluster.nodes[0], "before", &json!({"allow_base": true}));
    assert!(cluster.nodes.iter().all(|node| learns(node, &before)), "{}", cluster.logs());
    let status = cluster.nodes[0].admin("GET", "/admin/v1/cluster", "").body;
    let leader = status["registry"]["leader"].as_str().expect("there is a leader").to_owned();
    let killed = cluster.nodes.iter().position(|node| node.name() == leader).expect("one of ours");
    cluster.nodes[killed].kill();
    let (asked, other) = ((killed + 1) % 3, (killed + 2) % 3);
    // Reads go on at once, changes as soon as there is another leader.
    assert_eq!(cluster.nodes[asked].get("/v1/models", &before).status, 200);
    let after = operator::tenant(&cluster.nodes[asked], "after", &json!({"allow_base": true}));
    assert!(learns(&cluster.nodes[other], &after), "{}", cluster.logs());
    cluster.nodes[killed].restart();
    cluster.nodes[killed].wait_ready();
    for key in [&before, &after] {
        assert!(learns(&cluster.nodes[killed], key), "what it missed it learns:\n{}", cluster.logs());
    }
}

#[test]
fn an_adapter_uploaded_at_one_node_answers_at_every_node_and_after_any_of_them_died() {
    let mut cluster = start("adapters");
    let key = operator::tenant(&cluster.nodes[0], "acme", &json!({"allow_base": true}));
    let files = tiny::adapter(7, 4, &Linear::ALL);
    let uploaded = operator::upload(&cluster.nodes[0], "acme-support-tiny-v1.0.0", &files);
    assert_eq!(uploaded.status, 201, "{}", uploaded.text);
    let point = json!({"version": "acme-support-tiny-v1.0.0"}).to_string();
    let pointed = cluster.nodes[1].admin("PUT", "/admin/v1/tenants/acme/tasks/support", &point);
    assert_eq!(pointed.status, 200, "{}", pointed.text);
    let knows = |node: &NodeProcess| node.get("/v1/models/support", &key).status == 200;
    for node in &cluster.nodes {
        let known = (0..KNOWN_WITHIN).any(|_| {
            std::thread::sleep(Duration::from_millis(20));
            knows(node)
        });
        assert!(known, "{}", cluster.logs());
    }
    let ask = |node: &NodeProcess, model: &str| node.complete(&key, model, "tell me", 24);
    let expected = ask(&cluster.nodes[0], "support");
    assert_ne!(expected, ask(&cluster.nodes[0], "tiny"), "the adapter does something");
    for node in &cluster.nodes {
        assert_eq!(ask(node, "support"), expected);
    }
    for killed in 0..3 {
        cluster.nodes[killed].kill();
        for alive in (0..3).filter(|node| *node != killed) {
            assert_eq!(ask(&cluster.nodes[alive], "support"), expected, "without node {killed}:\n{}", cluster.logs());
        }
        cluster.nodes[killed].restart();
        cluster.nodes[killed].wait_ready();
    }
}
