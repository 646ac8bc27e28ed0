//! What an operator sees of a cluster, whichever of its nodes is away.

use std::process::{Command, Output};
use std::time::Duration;

use model::info::Linear;
use serde_json::{Value, json};
use tests::cluster::Cluster;
use tests::operator::{self, GENEROUS};
use tests::process::{NodeSpec, binary, scratch};
use tests::tiny;

use crate::fleet::Fleet;

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

#[test]
fn a_node_that_is_drained_hands_over_its_streams_and_ends() {
    let mut fleet = Fleet::start("drain");
    let said = ctl(&fleet.cluster, &["drain", "d"]);
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("node d"), "{said:?}");
    // Only the node itself ends itself.
    let other = fleet.cluster.nodes[0].admin("POST", "/admin/v1/drain", &json!({"node": "c"}).to_string());
    assert_eq!((other.status, other.code()), (409, "another_node"));

    fleet.undisturbed_by(0, |cluster| {
        let output = ctl(cluster, &["drain", "c"]);
        assert_eq!(json_of(&output), json!({"node": "c", "draining": true}));
    });
    assert!(fleet.cluster.nodes[2].wait().success(), "{}", fleet.cluster.logs());
    let health = |cluster: &Cluster| -> Vec<Value> {
        let seen = json_of(&ctl(cluster, &["cluster"]));
        assert_eq!(seen["node"], "a");
        seen["nodes"].as_array().expect("a list").iter().map(|node| node["health"].clone()).collect()
    };
    let is_gone = (0..50).any(|_| {
        std::thread::sleep(Duration::from_millis(100));
        let health = health(&fleet.cluster);
        health[..2] == [json!("alive"), json!("alive")] && ["dead", "absent"].map(Value::from).contains(&health[2])
    });
    assert!(is_gone, "{:?}", health(&fleet.cluster));
    fleet.undisturbed_by(1, |_| {});
    fleet.cluster.nodes[2].restart();
    fleet.cluster.nodes[2].wait_ready();
    fleet.undisturbed_by(2, |_| {});
}

#[test]
fn a_conversation_over_quic_goes_to_any_node_that_lives() {
    let folder = scratch("chat-quic");
    let mut cluster = Cluster::start(&folder, &NodeSpec::tiny(&folder).with(GENEROUS), 3);
    let key = operator::tenant(&cluster.nodes[0], "acme", &json!({"allow_base": true}));
    std::fs::write(folder.join("acme.key"), key).expect("the scratch folder is writable");
    std::fs::write(folder.join("wrong.key"), "tny_wrong").expect("the scratch folder is writable");
    let chat = |key_file: &str, way: [&str; 2]| {
        let mut command = Command::new(binary());
        command.current_dir(&folder).args(["chat", "--key-file", key_file, "--model", "tiny", "--temperature", "0"]);
        command.args(["--max-tokens", "24"]).args(way).arg("hello there").output().expect("tenantry chat runs")
    };
    let (url, quic) = (cluster.nodes[1].url(), ["--quic", "cluster.toml"]);
    let over_http = chat("acme.key", ["--url", &url]);
    assert!(over_http.status.success() && over_http.stdout.len() > 10, "{over_http:?}");
    assert_eq!(chat("acme.key", quic).stdout, over_http.stdout, "{}", cluster.logs());
    // The first node of the file does not answer: another one is asked, within seconds.
    cluster.nodes[0].kill();
    let answered = chat("acme.key", quic);
    assert_eq!(answered.stdout, over_http.stdout, "{answered:?}\n{}", cluster.logs());
    let refused = chat("wrong.key", quic);
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && refused.stdout.is_empty() && !said.is_empty(), "{said}");
}

#[test]
fn an_invitation_lets_one_node_in_once_and_the_audit_log_has_both() {
    let folder = scratch("invitation");
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\nca = \"ca\"\ndrain_s = 0");
    let mut cluster = Cluster::start(&folder, &spec, 3);
    cluster.nodes[2].kill();
    let data = cluster.nodes[2].data();
    let forget = || {
        for file in ["peer.pem", "peer.key"] {
            std::fs::remove_file(data.join(file)).expect("it had one");
        }
    };
    forget();
    let output = ctl(&cluster, &["ca", "invite", "c"]);
    let line = String::from_utf8(output.stdout).expect("text");
    let words: Vec<&str> = line.split_whitespace().skip(2).collect();
    assert_eq!(words[..2], ["join", "c"], "{line}");
    let token = *words.last().expect("a token");
    let audited = |what: &str| cluster.nodes[..2].iter().map(|node| node.log().matches(what).count()).sum::<usize>();

    // For somebody else it is worth nothing, and it stays good for whom it names.
    let as_other = ctl(&cluster, &["join", "b", "--token", token]);
    assert!(!as_other.status.success(), "{as_other:?}");
    let joined = ctl(&cluster, &words);
    assert!(joined.status.success(), "{joined:?}\n{}", cluster.logs());
    assert_eq!(audited("let a node in by invitation"), 1, "{}", cluster.logs());
    // Who has read it over the operator's shoulder comes too late.
    forget();
    let again = ctl(&cluster, &words);
    let said = String::from_utf8_lossy(&again.stderr);
    assert!(!again.status.success() && !data.join("peer.pem").exists(), "{said}");
    assert_eq!(audited("let a node in by invitation"), 1);
    assert!(audited("token_unknown") >= 1, "{said}\n{}", cluster.logs());
    assert!(!cluster.logs().contains(token), "no secret is in a log");

    let words = ctl(&cluster, &["ca", "invite", "c"]);
    let line = String::from_utf8(words.stdout).expect("text");
    let words: Vec<&str> = line.split_whitespace().skip(2).collect();
    assert!(ctl(&cluster, &words).status.success(), "{}", cluster.logs());
    cluster.nodes[2].restart();
    cluster.nodes[2].wait_ready();
    let roll = json_of(&ctl(&cluster, &["ca", "list"]));
    let names: Vec<&Value> = roll["nodes"].as_array().expect("a list").iter().map(|entry| &entry["node"]).collect();
    assert!(names.contains(&&json!("c")) && roll["invitations"] == json!([]), "{roll}");
}
