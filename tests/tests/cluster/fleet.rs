//! A cluster with tenants, the requests they send, and what those get when nobody disturbs them.

use std::time::Duration;

use serde_json::{Value, json};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::network::Network;
use tests::operator::{self, GENEROUS};
use tests::process::{Answer, NodeSpec, scratch, token_ids};

/// Tenants: enough that each of three nodes is home to some.
const N_TENANTS: usize = 9;
/// Long enough that a node goes away in mid-stream.
const N_TOKENS: u32 = 900;

pub(crate) struct Fleet {
    pub(crate) cluster: Cluster,
    pub(crate) keys: Vec<String>,
    /// The undisturbed answers, one per tenant.
    pub(crate) expected: Vec<Vec<u32>>,
}

// === impl Fleet ===

impl Fleet {
    /// Three nodes with a tiny model whose requests have been answered once through the first node. A node that is
    /// asked to leave hands its streams over at once.
    pub(crate) fn start(name: &str) -> Self {
        let folder = scratch(name);
        let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\ndrain_s = 0");
        Self::of(Cluster::start(&folder, &spec, 3))
    }

    /// The same with a network between the nodes that can be made bad.
    pub(crate) fn start_apart(name: &str) -> (Self, Network) {
        let folder = scratch(name);
        let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\ndrain_s = 0");
        let (cluster, network) = Cluster::start_apart(&folder, &spec, 3);
        (Self::of(cluster), network)
    }

    /// Tenants and their undisturbed answers for a running cluster.
    pub(crate) fn of(cluster: Cluster) -> Self {
        let tenant =
            |n: usize| operator::tenant(&cluster.nodes[0], &format!("tenant{n}"), &json!({"allow_base": true}));
        let keys = (0..N_TENANTS).map(tenant).collect();
        let mut fleet = Self { cluster, keys, expected: Vec::new() };
        fleet.wait_for_tenants();
        let streams: Vec<Streaming> = fleet.streams(0).collect();
        fleet.expected = streams.into_iter().map(|stream| complete(stream.join(), &fleet.cluster).ids).collect();
        fleet
    }

    /// Every node knows every key.
    fn wait_for_tenants(&self) {
        for node in &self.cluster.nodes {
            for key in &self.keys {
                let known = (0..100).any(|_| {
                    let status = node.get("/v1/models", key).status;
                    if status != 200 {
                        std::thread::sleep(Duration::from_millis(50));
                    }
                    status == 200
                });
                assert!(known, "node {} never heard of a tenant:\n{}", node.name(), self.cluster.logs());
            }
        }
    }

    /// What tenant `n` asks: half sample, and every third is bound to a schema.
    pub(crate) fn body(n: usize) -> Value {
        let mut body = json!({
            "model": "tiny", "prompt": format!("tell me about {n}"), "max_tokens": N_TOKENS, "seed": n,
            "temperature": if n.is_multiple_of(2) { 0.0 } else { 0.9 }, "ignore_eos": true,
        });
        if n % 3 == 2 {
            body["response_format"] = json!({"type": "json_schema", "json_schema": {"name": "list", "schema": {
                "type": "array", "items": {"type": "boolean"}, "minItems": 400
            }}});
        }
        body
    }

    /// Kills node `door` in mid-stream; every client goes on at `other`, from the last event it saw. Together they have
    /// what nobody disturbed.
    pub(crate) fn goes_on_elsewhere(&mut self, door: usize, other: usize) {
        let streams: Vec<Streaming> = self.streams(door).collect();
        while streams.iter().any(|stream| stream.n_tokens() < 5 && !stream.is_over()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.cluster.nodes[door].kill();
        let broken: Vec<Streamed> = streams.into_iter().map(Streaming::join).collect();
        let n_broken = broken.iter().filter(|streamed| streamed.finish.is_none()).count();
        assert!(n_broken > N_TENANTS / 2, "killed too late: {n_broken} streams were cut");
        let node = &self.cluster.nodes[other];
        let go_on = |(n, streamed): (usize, &Streamed)| {
            Streaming::go_on(node, &self.keys[n], &Self::body(n), streamed.last_event.clone())
        };
        let rest: Vec<Streaming> = broken.iter().enumerate().map(go_on).collect();
        for (n, (mut whole, rest)) in broken.into_iter().zip(rest).enumerate() {
            whole.ids.extend(complete(rest.join(), &self.cluster).ids);
            let at = whole.ids.iter().zip(&self.expected[n]).position(|(found, expected)| found != expected);
            assert_eq!((at, whole.ids.len()), (None, self.expected[n].len()), "tenant {n}:\n{}", self.cluster.logs());
        }
    }

    /// Kills node `door` in mid-stream under clients of the library, which know all nodes. They notice a pause and
    /// nothing else; returns the longest of each.
    pub(crate) fn survives_in_the_library(&mut self, door: usize) -> Vec<Duration> {
        let start = |(n, key): (usize, &String)| Streaming::by_library(self.cluster.library(door, key), &Self::body(n));
        let streams: Vec<Streaming> = self.keys.iter().enumerate().map(start).collect();
        while streams.iter().any(|stream| stream.n_tokens() < 5 && !stream.is_over()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.cluster.nodes[door].kill();
        let streamed: Vec<Streamed> =
            streams.into_iter().map(|stream| complete(stream.join(), &self.cluster)).collect();
        for (n, (streamed, expected)) in streamed.iter().zip(&self.expected).enumerate() {
            assert_eq!(&streamed.ids, expected, "tenant {n}:\n{}", self.cluster.logs());
        }
        streamed.iter().map(|streamed| streamed.gaps.iter().max().copied().unwrap_or_default()).collect()
    }

    /// Asks as the first tenant with an idempotency key; the tokens of the answer.
    pub(crate) fn keyed(&self, door: usize, idempotency_key: &str, body: &Value) -> Vec<u32> {
        let answer = self.send_keyed(door, idempotency_key, body);
        assert_eq!(answer.status, 200, "{}\n{}", answer.text, self.cluster.logs());
        token_ids(&answer.body["choices"][0])
    }

    /// The same, whatever the answer.
    pub(crate) fn send_keyed(&self, door: usize, idempotency_key: &str, body: &Value) -> Answer {
        let mut body = body.clone();
        body["return_token_ids"] = json!(true);
        let header = ("idempotency-key", idempotency_key);
        self.cluster.nodes[door].post_with("/v1/completions", &self.keys[0], header, &body)
    }

    /// One stream per tenant, through one node.
    pub(crate) fn streams(&self, door: usize) -> impl Iterator<Item = Streaming> + '_ {
        let node = &self.cluster.nodes[door];
        self.keys.iter().enumerate().map(move |(n, key)| Streaming::start(node, key, &Self::body(n)))
    }

    /// Starts a stream per tenant through node `door` and lets `disturb` loose once all have begun. Every stream must
    /// end as if nothing had happened. Returns the longest pause of each.
    pub(crate) fn undisturbed_by(&mut self, door: usize, disturb: impl FnOnce(&mut Cluster)) -> Vec<Duration> {
        let streams: Vec<Streaming> = self.streams(door).collect();
        while streams.iter().any(|stream| stream.n_tokens() < 5 && !stream.is_over()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        disturb(&mut self.cluster);
        let streamed: Vec<Streamed> =
            streams.into_iter().map(|stream| complete(stream.join(), &self.cluster)).collect();
        for (n, (streamed, expected)) in streamed.iter().zip(&self.expected).enumerate() {
            let at = streamed.ids.iter().zip(expected).position(|(found, expected)| found != expected);
            assert_eq!((at, streamed.ids.len()), (None, expected.len()), "tenant {n}:\n{}", self.cluster.logs());
        }
        streamed.iter().map(|streamed| streamed.gaps.iter().max().copied().unwrap_or_default()).collect()
    }
}

fn complete(streamed: Streamed, cluster: &Cluster) -> Streamed {
    assert_eq!((&streamed.error, streamed.finish.is_some()), (&None, true), "{}", cluster.logs());
    streamed
}
