//! Clients that mean harm or have a bug: bodies, numbers, schemas, floods, disconnections, files. The node
//! answers each with a 4xx that says why, keeps serving, and gives back what it took (RELIABILITY B, L).
//!
//! Real processes and, where a client library would be too polite, raw sockets.

mod bodies;
mod cancel;
mod flood;
mod numbers;
mod schemas;
mod uploads;

use serde_json::json;
use tests::process::NodeProcess;

/// `n`, or ten times as many where there is time.
fn scaled(n: usize) -> usize {
    if std::env::var_os("TENANTRY_LONG").is_some() { 10 * n } else { n }
}

/// The node still serves this key, and nothing in it panicked.
fn assert_serves(node: &NodeProcess, key: &str) {
    let answer = node.post("/v1/completions", key, &json!({"model": "tiny", "prompt": "hi", "max_tokens": 2}));
    assert_eq!(answer.status, 200, "{}", answer.text);
    assert!(!node.log().contains("panicked"), "{}", node.log());
}
