//! Through whichever node a request comes in.

use serde_json::json;
use tests::cluster::Cluster;
use tests::operator::{GENEROUS, tenant};
use tests::process::{Answer, NodeSpec, scratch};

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

#[test]
fn a_line_that_is_full_refuses_through_any_node_and_its_refusals_cost_nothing() {
    let folder = scratch("full-line");
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[engine]\nthreads = 1");
    let cluster = Cluster::start(&folder, &spec, 3);
    let contract = json!({"concurrency": 1, "queue_depth": 2, "allow_base": true, "burst_requests": 100});
    let key = tenant(&cluster.nodes[0], "narrow", &contract);
    let long = json!({"model": "tiny", "prompt": "x", "max_tokens": 300, "temperature": 0, "ignore_eos": true});
    for node in &cluster.nodes {
        while node.get("/v1/models", &key).status != 200 {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
    let (mut n_served, mut n_refused) = (0, 0);
    for node in &cluster.nodes {
        let answers: Vec<Answer> = std::thread::scope(|scope| {
            let askers: Vec<_> = (0..12).map(|_| scope.spawn(|| node.post("/v1/completions", &key, &long))).collect();
            askers.into_iter().map(|asker| asker.join().expect("asks")).collect()
        });
        let (served, refused): (Vec<_>, Vec<_>) = answers.iter().partition(|answer| answer.status == 200);
        assert!(!served.is_empty() && !refused.is_empty(), "{} served through {}", served.len(), node.name());
        for answer in &refused {
            assert_eq!((answer.status, answer.code()), (429, "queue_full"), "{}", answer.text);
            assert!(answer.header("retry-after").is_some() && answer.header("x-ratelimit-limit-requests").is_some());
        }
        // Only what ran is billed, and refusals are counted as such and not as failures.
        let records = node.usage_of(served.len());
        assert_eq!(records.len(), served.len(), "{records:?}");
        let metrics = node.metrics();
        let counted: u64 = metrics
            .lines()
            .filter(|line| line.starts_with("tenantry_rejections_total{") && line.contains("\"queue_full\""))
            .map(|line| line.rsplit(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0))
            .sum();
        assert_eq!(counted, refused.len() as u64, "{metrics}");
        let failed =
            metrics.lines().any(|line| line.starts_with("tenantry_requests_total{") && line.contains("failed"));
        assert!(!failed, "{metrics}");
        (n_served, n_refused) = (n_served + served.len(), n_refused + refused.len());
    }
    println!("{n_served} served, {n_refused} refused");
}
