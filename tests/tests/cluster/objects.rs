//! Adapter files in a bucket of somebody else's server.

use model::info::Linear;
use serde_json::json;
use shared::clock::{Clock, SystemClock};
use tests::cluster::Cluster;
use tests::operator::{GENEROUS, install, tenant};
use tests::process::{NodeSpec, scratch};
use tests::tiny;

/// The server is named by AWS_ENDPOINT and the rest as `scripts/test` does; TENANTRY_TEST_S3=s3://bucket/prefix.
#[test]
fn every_node_serves_an_adapter_from_the_bucket_and_keeps_a_copy() {
    let Ok(url) = std::env::var("TENANTRY_TEST_S3") else {
        return println!("skipped: TENANTRY_TEST_S3 names no bucket; hint: scripts/test starts one");
    };
    let folder = scratch("bucket");
    let objects = format!("[adapters]\nobjects = \"{url}/{}\"", std::process::id());
    let cluster = Cluster::start(&folder, &NodeSpec::tiny(&folder).with(GENEROUS).with(&objects), 3);
    let keys: Vec<String> = (0..6)
        .map(|n| {
            let key = tenant(&cluster.nodes[0], &format!("tenant{n}"), &json!({}));
            install(&cluster.nodes[0], &format!("tenant{n}-task-tiny-v1.0.0"), &tiny::adapter(n, 8, &Linear::ALL));
            key
        })
        .collect();
    let body = json!({"model": "task", "prompt": "hello", "max_tokens": 4, "temperature": 0, "return_token_ids": true});
    let ask = |door: usize, key: &String| {
        while cluster.nodes[door].get("/v1/models", key).status != 200 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let started = SystemClock.now();
        let answer = cluster.nodes[door].post("/v1/completions", key, &body);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text, cluster.logs());
        (tests::process::token_ids(&answer.body["choices"][0]), SystemClock.now() - started)
    };
    for key in &keys {
        let (first, cold) = ask(0, key);
        let (again, warm) = ask(2, key);
        assert_eq!(first, again);
        println!("first answer {cold:?}, warm {warm:?}");
    }
    assert!(!folder.join(".tenantry/objects").exists(), "there is no folder beside the bucket");
}
