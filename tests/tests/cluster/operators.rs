//! What an operator sees of a cluster, whichever of its nodes is away.

use std::process::{Command, Output};
use std::time::Duration;

use model::info::Linear;
use serde_json::{Value, json};
use tests::cluster::Cluster;
use tests::operator::{self, GENEROUS};
use tests::process::{NodeSpec, binary, scratch};
use tests::tiny;

const VERSION: &str = "acme-support-tiny-v1.0.0";

/// `tenantry ctl` for the cluster's file, no node named.
fn ctl(cluster: &Cluster, words: &[&str]) -> Output {
    let mut command = Command::new(binary());
    command.arg("ctl").arg("--config").arg(cluster.folder().join("cluster.toml")).args(words);
    command.output().expect("tenantry ctl runs")
}

fn json_of(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

/// Where the tenant's version is warm, by node.
fn warm(seen: &Value) -> &Value {
    &seen["tenants"][0]["warm"]
}

#[test]
fn an_operator_sees_what_is_warm_at_every_node_and_asks_another_when_the_first_is_down() {
    let folder = scratch("operators");
    let mut cluster = Cluster::start(&folder, &NodeSpec::tiny(&folder).with(GENEROUS), 3);
    let key = operator::tenant(&cluster.nodes[0], "acme", &json!({}));
    operator::install(&cluster.nodes[0], VERSION, &tiny::adapter(7, 4, &Linear::ALL));
    let answer = cluster.nodes[0].complete(&key, "support", "warm up", 4);
    assert_eq!(answer.len(), 4);
    let output = ctl(&cluster, &["cluster", "--tenants"]);
    let seen = json_of(&output);
    assert!(output.stderr.is_empty(), "the first node answered: {}", String::from_utf8_lossy(&output.stderr));
    let serves = seen["tenants"][0]["serves"].as_str().expect("somebody serves it");
    assert_eq!(warm(&seen)[serves], json!([VERSION]), "{seen}");
    let names: Vec<&String> = warm(&seen).as_object().expect("by node").keys().collect();
    assert_eq!(names, ["a", "b", "c"]);
    // Every node says the same of all.
    for node in &cluster.nodes {
        let body = node.admin("GET", "/admin/v1/cluster/tenants", "").body;
        assert_eq!(warm(&body)[serves], json!([VERSION]), "{body}");
        let nodes = node.admin("GET", "/admin/v1/cluster", "").body["nodes"].clone();
        let entry = nodes.as_array().expect("a list").iter().find(|entry| entry["name"] == serves).cloned();
        assert_eq!(entry.expect("it lives")["adapters_warm"], 1, "{nodes}");
    }

    // One that does not answer is not waited for.
    cluster.nodes[2].signal("STOP");
    let seen = cluster.nodes[1].admin("GET", "/admin/v1/cluster/tenants", "").body;
    cluster.nodes[2].signal("CONT");
    assert_eq!(warm(&seen)["c"], "unknown", "{seen}");

    cluster.nodes[0].kill();
    let output = ctl(&cluster, &["cluster"]);
    assert_eq!(json_of(&output)["node"], "b");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.starts_with("asking node b: node a: ") && said.contains("does not answer"), "{said}");
    // A change goes the same way, once there is a leader.
    let created = (0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        ctl(&cluster, &["tenant", "create", "other"]).status.success()
    });
    assert!(created, "{}", cluster.logs());
    cluster.nodes[1].kill();
    cluster.nodes[2].kill();
    let output = ctl(&cluster, &["status"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && ["node a", "node b", "node c"].iter().all(|name| said.contains(name)),
        "{said}"
    );
}

#[test]
fn a_node_joins_through_one_that_got_the_authority_while_it_was_running() {
    let folder = scratch("authority");
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\nca = \"authority\"\ndrain_s = 0");
    // They were let in by an authority that is not where the cluster file says.
    let mut cluster = Cluster::start(&folder, &spec, 3);
    cluster.nodes[2].kill();
    let certificate = cluster.nodes[2].data().join("peer.pem");
    std::fs::remove_file(&certificate).expect("it had one");
    let output = ctl(&cluster, &["ca", "invite", "c"]);
    assert!(!output.status.success(), "there is no authority yet");
    std::fs::rename(folder.join("ca"), folder.join("authority")).expect("the authority moves");
    let output = ctl(&cluster, &["ca", "invite", "c"]);
    let line = String::from_utf8(output.stdout).expect("text");
    let words: Vec<&str> = line.split_whitespace().skip(2).collect();
    assert_eq!(words[..2], ["join", "c"], "{line}");
    // Both nodes look once a second.
    let joined = (0..50).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        ctl(&cluster, &words).status.success()
    });
    assert!(joined && certificate.exists(), "{}", cluster.logs());
    cluster.nodes[2].restart();
    cluster.nodes[2].wait_ready();
}
