//! Pools and regions: who may serve whom, through whichever node a request comes in.

use serde_json::json;
use tests::cluster::Cluster;
use tests::operator::{GENEROUS, tenant};
use tests::process::{NodeProcess, NodeSpec, scratch};

fn create(node: &NodeProcess, id: &str, contract: &serde_json::Value) -> tests::process::Answer {
    node.admin("POST", "/admin/v1/tenants", &json!({"id": id, "contract": contract}).to_string())
}

#[test]
fn a_tenant_of_a_pool_or_a_region_is_served_there_and_nowhere_else() {
    let folder = scratch("places");
    let spec = NodeSpec::tiny(&folder).with(GENEROUS);
    let lines = ["", "pool = \"fast\"\nregion = \"eu\"", "region = \"us\""];
    let mut cluster = Cluster::start_with(&folder, &spec, &lines);
    let door = &cluster.nodes[0];

    // Contracts that no node can keep are refused when they are made, not at the first request.
    for (id, contract, field) in [
        ("lost", json!({"pool": "slow"}), "contract.pool"),
        ("apart", json!({"region": "eu"}), "contract.region"),
        ("far", json!({"pool": "fast", "region": "us"}), "contract.region"),
    ] {
        let refused = create(door, id, &contract);
        assert_eq!((refused.status, refused.code()), (400, "invalid_value"), "{}", refused.text);
        assert_eq!(refused.body["error"]["param"], field, "{}", refused.text);
    }

    let keys = [
        ("b", tenant(door, "rapid", &json!({"pool": "fast", "allow_base": true}))),
        ("c", tenant(door, "statesman", &json!({"region": "us", "allow_base": true}))),
    ];
    let refused = door.admin("PATCH", "/admin/v1/tenants/rapid", &json!({"contract": {"region": "us"}}).to_string());
    assert_eq!((refused.status, refused.code()), (400, "invalid_value"), "{}", refused.text);

    let body = json!({"model": "tiny", "prompt": "where am I", "max_tokens": 8, "temperature": 0});
    for node in &cluster.nodes {
        for (_, key) in &keys {
            while node.get("/v1/models", key).status != 200 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            let answer = node.post("/v1/completions", key, &body);
            assert_eq!(answer.status, 200, "through {}: {}\n{}", node.name(), answer.text, cluster.logs());
        }
    }
    let seen = cluster.nodes[2].admin("GET", "/admin/v1/cluster/tenants", "").body;
    for ((home, _), id) in keys.iter().zip(["rapid", "statesman"]) {
        let row = seen["tenants"].as_array().into_iter().flatten().find(|row| row["tenant"] == id);
        assert_eq!(row.expect("listed")["serves"], *home, "{seen}");
    }

    // The pool's only node is gone: its tenants are told so, and nobody else computes for them.
    cluster.nodes[1].kill();
    let answer = cluster.nodes[0].post("/v1/completions", &keys[0].1, &body);
    assert_eq!((answer.status, answer.code()), (503, "no_node_alive"), "{}", answer.text);
    assert_eq!(cluster.nodes[0].post("/v1/completions", &keys[1].1, &body).status, 200);
}

#[test]
fn a_node_alone_serves_no_tenant_of_another_region() {
    let folder = scratch("alone-region");
    let spec = NodeSpec::tiny(&folder).with(GENEROUS);
    let node = NodeProcess::start(&folder, &spec);
    let refused = create(&node, "acme", &json!({"region": "eu"}));
    assert_eq!((refused.status, refused.code()), (400, "invalid_value"), "{}", refused.text);
    assert_eq!(refused.body["error"]["param"], "contract.region");
}
