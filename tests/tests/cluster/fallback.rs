//! An adapter that only some nodes can load: the base stands in for it, and stays.

use std::time::Duration;

use model::info::Linear;
use serde_json::{Value, json};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

const VERSION: &str = "acme-support-tiny-v1.0.0";
/// Long enough that a node goes away in mid-stream.
const N_TOKENS: u32 = 900;

fn until(what: &str, cluster: &Cluster, holds: impl Fn() -> bool) {
    let held = (0..200).any(|_| {
        let held = holds();
        if !held {
            std::thread::sleep(Duration::from_millis(50));
        }
        held
    });
    assert!(held, "{what}\n{}", cluster.logs());
}

/// Where a tenant lives, by number of the node: home, successor, the third one.
fn places(cluster: &Cluster, tenant: &str) -> Option<[usize; 3]> {
    let seen = cluster.nodes[0].admin("GET", "/admin/v1/cluster/tenants", "").body;
    let entry = seen["tenants"].as_array()?.iter().find(|entry| entry["tenant"] == tenant)?.clone();
    let node = |role: &str| cluster.nodes.iter().position(|node| entry[role] == node.name());
    let (home, successor) = (node("home")?, node("successor")?);
    Some([home, successor, 3 - home - successor])
}

fn body(model: &str) -> Value {
    json!({"model": model, "prompt": "tell me", "max_tokens": N_TOKENS, "temperature": 0, "ignore_eos": true})
}

/// A stream of the tenant's task that has begun.
fn begun(node: &NodeProcess, key: &str) -> Streaming {
    let stream = Streaming::start(node, key, &body("support"));
    while stream.n_tokens() < 5 && !stream.is_over() {
        std::thread::sleep(Duration::from_millis(1));
    }
    stream
}

fn assert_is(found: &[u32], expected: &Streamed, cluster: &Cluster) {
    let at = found.iter().zip(&expected.ids).position(|(found, expected)| found != expected);
    assert_eq!((at, found.len()), (None, expected.ids.len()), "{}", cluster.logs());
}

#[test]
fn an_answer_that_began_on_the_base_ends_on_it_though_another_node_has_the_adapter() {
    let folder = scratch("stays");
    let tables = "[cluster]\ndrain_s = 0\n\n[adapters]\nobjects = \"objects\"";
    let mut cluster = Cluster::start(&folder, &NodeSpec::tiny(&folder).with(GENEROUS).with(tables), 3);
    let contract = json!({"allow_base": true, "fallback": "base"});
    let key = operator::tenant(&cluster.nodes[0], "acme", &contract);
    until("the tenant lives somewhere", &cluster, || places(&cluster, "acme").is_some());
    let [home, successor, entry] = places(&cluster, "acme").expect("looked at above");
    for node in &cluster.nodes {
        until("every node knows the tenant", &cluster, || node.get("/v1/models", &key).status == 200);
    }
    let uploaded = operator::upload(&cluster.nodes[successor], VERSION, &tiny::adapter(7, 4, &Linear::ALL));
    assert_eq!(uploaded.status, 201, "{}", uploaded.text);
    // What is lost in the object store only the node that took the upload has.
    std::fs::remove_dir_all(folder.join("objects")).expect("it was there");
    operator::point(&cluster.nodes[successor], VERSION);
    for node in &cluster.nodes {
        let knows = || node.get("/v1/models/support", &key).body["root"] == VERSION;
        until("every node knows the version", &cluster, knows);
    }
    let by_base = Streaming::start(&cluster.nodes[entry], &key, &body("tiny")).join();

    // Its client's node dies: the one that goes on knows from the record.
    let stream = begun(&cluster.nodes[entry], &key);
    cluster.nodes[entry].kill();
    let cut = stream.join();
    assert_eq!(cut.finish, None, "killed too late");
    let rest = Streaming::go_on(&cluster.nodes[successor], &key, &body("support"), cut.last_event.clone()).join();
    assert_is(&[cut.ids, rest.ids].concat(), &by_base, &cluster);
    cluster.nodes[entry].restart();
    cluster.nodes[entry].wait_ready();

    // The node that computes it dies: its client's node remembers.
    let stream = begun(&cluster.nodes[entry], &key);
    cluster.nodes[home].kill();
    let whole = stream.join();
    assert_eq!(whole.error, None, "{}", cluster.logs());
    assert_is(&whole.ids, &by_base, &cluster);
    let anew = Streaming::start(&cluster.nodes[entry], &key, &body("support")).join();
    assert_ne!(anew.ids, by_base.ids, "a new request has the adapter");
}
