//! Several bases: a node takes requests for one that it does not host, and nobody computes with another model's weights.

use std::time::Duration;

use serde_json::{Value, json};
use tests::cluster::Cluster;
use tests::operator::GENEROUS;
use tests::process::{Answer, NodeProcess, NodeSpec, scratch};
use tests::tiny::TinySpec;

use crate::fleet::Fleet;

/// Nodes `a` and `b` host the base of all tenants, `c` another one only.
fn start(name: &str) -> Fleet {
    let folder = scratch(name);
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\ndrain_s = 0");
    let spec = spec.with_base("second", TinySpec::qwen2().write_hf(&folder));
    let lines = ["bases = [\"tiny\"]", "", "bases = [\"second\"]"];
    Fleet::of(Cluster::start_with(&folder, &spec, &lines))
}

/// An answer without what differs from one time to the next.
fn lasting(answer: Answer) -> Value {
    assert_eq!(answer.status, 200, "{}", answer.text);
    let mut body = answer.body;
    for key in ["id", "created"] {
        body[key] = Value::Null;
    }
    for model in body["data"].as_array_mut().into_iter().flatten() {
        model["created"] = Value::Null;
    }
    body
}

#[test]
fn a_node_takes_requests_for_a_base_that_it_does_not_host() {
    let mut fleet = start("unhosted");
    let (key, nodes) = (&fleet.keys[0], &fleet.cluster.nodes);

    // Word for word what a host answers: template, tokens, texts, grammar, what is wrong.
    let schema = json!({"type": "object", "properties": {"yes": {"type": "boolean"}}, "required": ["yes"]});
    let chat = json!({
        "model": "tiny", "messages": [{"role": "user", "content": "say <|im_end|> yes"}], "max_tokens": 40, "seed": 5,
        "logprobs": true, "top_logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    });
    let ask = |node: &NodeProcess| lasting(node.post("/v1/chat/completions", key, &chat));
    // Once before, since what is in the prefix cache is counted in the answer.
    ask(&nodes[0]);
    assert_eq!(ask(&nodes[2]), ask(&nodes[0]));
    assert_eq!(lasting(nodes[2].get("/v1/models", key)), lasting(nodes[0].get("/v1/models", key)));
    assert!(lasting(nodes[2].get("/v1/models", key)).to_string().contains("\"max_model_len\":1024"));
    let long = json!({"model": "tiny", "prompt": "word ".repeat(3000), "max_tokens": 1});
    let [at_host, here] = [0, 2].map(|node| nodes[node].post("/v1/completions", key, &long));
    assert_eq!(
        (here.status, &here.body["error"]["message"]),
        (400, &at_host.body["error"]["message"]),
        "{}",
        here.text
    );

    // Its client's usage is recorded at the door, as ever.
    let n_records = nodes[2].usage().len() + fleet.keys.len();
    fleet.undisturbed_by(2, |_| {});
    assert_eq!(fleet.cluster.nodes[2].usage_of(n_records).len(), n_records);

    // A host dies in mid-stream: what came in here goes on at the other one.
    fleet.undisturbed_by(2, |cluster| cluster.nodes[0].kill());
    fleet.cluster.nodes[0].restart();
    fleet.cluster.nodes[0].wait_ready();

    // The door of the clients dies: they go on here, where nothing of their base is but its text.
    fleet.goes_on_elsewhere(1, 2);

    // The text is kept: a start needs nobody. What is missing now are hosts.
    fleet.cluster.nodes[0].kill();
    fleet.cluster.nodes[2].kill();
    fleet.cluster.nodes[2].restart();
    let node = &fleet.cluster.nodes[2];
    let code = || {
        let url = format!("{}/v1/completions", node.url());
        let request = tests::operator::agent().post(url).header("authorization", format!("Bearer {}", fleet.keys[0]));
        let body = json!({"model": "tiny", "prompt": "anybody", "max_tokens": 2}).to_string();
        let answer = request.header("content-type", "application/json").send(body).ok()?;
        Some(tests::process::read(answer).code().to_owned())
    };
    let found = (0..100).find_map(|_| {
        std::thread::sleep(Duration::from_millis(100));
        code().filter(|code| code != "registry_unknown")
    });
    assert_eq!(found.as_deref(), Some("no_node_alive"), "{}", node.log());
}

#[test]
fn a_node_with_another_model_under_the_same_name_computes_nothing_of_it() {
    let folder = scratch("unlike");
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\ndrain_s = 0");
    let other = NodeSpec { model: TinySpec { seed: 99, ..TinySpec::llama() }.write_hf(&folder), ..spec.clone() };
    let mut fleet = Fleet::of(Cluster::start_unlike(&folder, &[spec.clone(), spec, other]));

    // Through its door as through any other: it has fetched the text that the others mean.
    fleet.undisturbed_by(2, |_| {});
    for node in &fleet.cluster.nodes {
        let seen = node.ctl(&["cluster"]);
        for row in seen["nodes"].as_array().expect("a list") {
            let is_other = row["name"] == "c";
            assert_eq!(row["serves"]["tiny"]["left_out"], is_other, "seen by {}: {seen}", node.name());
            assert_eq!(row["home_of"] == 0, is_other, "seen by {}: {seen}", node.name());
        }
        assert!(node.log().contains("another content under this base's name"), "{}", node.log());
        let metrics = node.admin("GET", "/metrics", "").text;
        assert!(metrics.contains("tenantry_base_nodes_left_out{model_name=\"tiny\"} 1"), "{metrics}");
    }
}
