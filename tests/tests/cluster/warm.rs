//! Adapters that are warm where their tenants go next.

use std::time::Duration;

use model::info::Linear;
use serde_json::json;
use tests::cluster::Cluster;
use tests::operator::{GENEROUS, install, tenant};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

const N_TENANTS: usize = 9;

/// Loads that `node` began because another one told it to.
fn hinted(node: &NodeProcess) -> u64 {
    let metrics = node.metrics();
    let line = metrics.lines().find(|line| line.starts_with("tenantry_prewarms_total{") && line.contains("\"hint\""));
    line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
}

#[test]
fn a_node_that_leaves_names_its_tenants_adapters_to_those_who_get_them_full_or_not() {
    let folder = scratch("warm");
    // Two places each: whoever gets a tenant more has to give up one that is not asked for.
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\ndrain_s = 3\n[adapters]\nslots = 2");
    let cluster = Cluster::start(&folder, &spec, 3);
    let keys: Vec<String> = (0..N_TENANTS)
        .map(|n| {
            let key = tenant(&cluster.nodes[0], &format!("tenant{n}"), &json!({}));
            install(
                &cluster.nodes[0],
                &format!("tenant{n}-task-tiny-v1.0.0"),
                &tiny::adapter(n as u64, 4, &[Linear::Q]),
            );
            key
        })
        .collect();
    let body = json!({"model": "task", "prompt": "hello", "max_tokens": 2, "temperature": 0});
    let ask = |node: &NodeProcess, key: &str| node.post("/v1/completions", key, &body).status;
    for node in &cluster.nodes {
        while keys.iter().any(|key| node.get("/v1/models", key).status != 200) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    let seen = cluster.nodes[0].admin("GET", "/admin/v1/cluster/tenants", "").body;
    let serves = |n: usize| {
        let rows = seen["tenants"].as_array().into_iter().flatten();
        let row = rows.into_iter().find(|row| row["tenant"] == format!("tenant{n}")).expect("listed");
        row["serves"].as_str().expect("a node").to_owned()
    };
    // Each fills its places with tenants that it will not be asked for again; those of node b become habits.
    keys.iter().for_each(|key| assert_eq!(ask(&cluster.nodes[0], key), 200, "{}", cluster.logs()));
    let of_b: Vec<&String> = (0..N_TENANTS).filter(|&n| serves(n) == "b").map(|n| &keys[n]).collect();
    assert!(!of_b.is_empty(), "{seen}");
    for _ in 0..8 {
        of_b.iter().for_each(|key| assert_eq!(ask(&cluster.nodes[0], key), 200));
    }
    assert_eq!((hinted(&cluster.nodes[0]), hinted(&cluster.nodes[2])), (0, 0));
    cluster.nodes[1].signal("TERM");
    let warmed = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        hinted(&cluster.nodes[0]) + hinted(&cluster.nodes[2]) > 0
    });
    assert!(warmed, "nobody warmed anything:\n{}", cluster.logs());
    of_b.iter().for_each(|key| assert_eq!(ask(&cluster.nodes[0], key), 200, "{}", cluster.logs()));
}
