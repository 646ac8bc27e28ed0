//! What a hop between nodes costs, with the real model: the first token and the speed through the node that serves a
//! tenant and through another one, over HTTP/1.1, the client library and HTTP/3. Prints figures; decides nothing.
//!
//! `cargo run --release -p tests --example forwarding -- [requests]`, with `TENANTRY_BIN` naming the program. The ways
//! are taken in turn, so that what disturbs the machine disturbs all. Over QUIC all streams share one connection,
//! over HTTP/1.1 each has its own. Quiet machine, please.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use client::{Client, Endpoint, Event};
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::http3::Http3;
use tests::operator::{self, GENEROUS};
use tests::process::{NodeSpec, scratch};
use tokio::task::JoinSet;

/// Streams at once where the speed is measured.
const STREAMS: usize = 16;
const N_TOKENS: u32 = 64;
/// First requests that are not counted.
const WARM_UP: usize = 5;

/// By what a client speaks to a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    Http1,
    Library,
    Http3,
}

/// A way into the cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    name: &'static str,
    door: Door,
    to_owner: bool,
}

const WAYS: [Way; 6] = [
    Way { name: "HTTP/1.1, owner", door: Door::Http1, to_owner: true },
    Way { name: "HTTP/1.1, other", door: Door::Http1, to_owner: false },
    Way { name: "library, owner", door: Door::Library, to_owner: true },
    Way { name: "library, other", door: Door::Library, to_owner: false },
    Way { name: "HTTP/3, owner", door: Door::Http3, to_owner: true },
    Way { name: "HTTP/3, other", door: Door::Http3, to_owner: false },
];

fn main() {
    let n_requests = std::env::args().nth(1).and_then(|word| word.parse().ok()).unwrap_or(100);
    let folder = scratch("forwarding");
    let spec = NodeSpec::real().with(GENEROUS).with("[engine]\nthreads = 1\nkv_mib = 256");
    let cluster = Cluster::start(&folder, &spec, 3);
    let key = operator::tenant(&cluster.nodes[0], "acme", &json!({"allow_base": true, "concurrency": 32}));
    while cluster.nodes.iter().any(|node| node.get("/v1/models", &key).status != 200) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let seen = cluster.nodes[0].admin("GET", "/admin/v1/cluster/tenants", "").body;
    let serves = seen["tenants"][0]["serves"].as_str().expect("somebody serves it").to_owned();
    let owner = cluster.nodes.iter().position(|node| node.name() == serves).expect("one of ours");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let (mut clients, mut connections) = (Vec::new(), Vec::new());
    for node in 0..cluster.nodes.len() {
        let _entered = runtime.enter();
        let config = cluster.library(node, &key);
        connections.push(runtime.block_on(Http3::connect(&config)));
        clients.push(Client::new(config).expect("a client"));
    }
    let bench = Bench { cluster, key, owner, runtime, clients, connections };

    let mut first = WAYS.map(|_| Vec::new());
    for n in 0..n_requests + WARM_UP {
        for (way, first) in WAYS.iter().zip(&mut first) {
            let took = bench.first_token(*way, n);
            if n >= WARM_UP {
                first.push(took.as_secs_f64() * 1e3);
            }
        }
    }
    println!("first token of a 96-token prompt, one request at a time, {n_requests} each:");
    let base = first[0].clone();
    for (way, first) in WAYS.iter().zip(&mut first) {
        let (p50, p99) = (percentile(first, 0.5), percentile(first, 0.99));
        let (base50, base99) = (percentile(&mut base.clone(), 0.5), percentile(&mut base.clone(), 0.99));
        println!("  {}: p50 {p50:.2} ms ({:+.2}), p99 {p99:.2} ms ({:+.2})", way.name, p50 - base50, p99 - base99);
    }

    let mut speeds = WAYS.map(|_| Vec::new());
    for round in 0..6 {
        for (way, speeds) in WAYS.iter().zip(&mut speeds) {
            speeds.push(bench.speed(*way, round));
        }
    }
    println!("{STREAMS} streams of {N_TOKENS} tokens at once, six rounds each, the median:");
    let base = percentile(&mut speeds[0].clone(), 0.5);
    for (way, speeds) in WAYS.iter().zip(&mut speeds) {
        let median = percentile(speeds, 0.5);
        println!("  {}: {median:.0} tokens a second, {:.3} of HTTP/1.1 at the owner", way.name, median / base);
    }
}

struct Bench {
    cluster: Cluster,
    key: String,
    owner: usize,
    runtime: tokio::runtime::Runtime,
    /// One connection to each node.
    clients: Vec<Client>,
    connections: Vec<Http3>,
}

impl Bench {
    fn node(&self, way: Way) -> usize {
        if way.to_owner { self.owner } else { (self.owner + 1) % self.cluster.nodes.len() }
    }

    /// No two prompts are alike, or the prefix cache would answer.
    fn body(way: Way, n: usize, max_tokens: u32) -> Value {
        let salt = n * 97 + way.door as usize * 31 + usize::from(way.to_owner) * 17;
        let prompt: Vec<u32> = (0..96).map(|at| 1000 + ((salt * 13 + at * 7) % 40_000) as u32).collect();
        json!({
            "model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true,
            "stream": true, "return_token_ids": true,
        })
    }

    /// From asking to the first token, on a connection that is open.
    fn first_token(&self, way: Way, n: usize) -> Duration {
        let (node, body) = (self.node(way), Self::body(way, n, 4));
        let (started, mut first, mut last) = (SystemClock.now(), None, Value::Null);
        let mut see = |event: &Value| {
            last = event.clone();
            if first.is_none() && n_tokens(event) > 0 {
                first = Some(SystemClock.now() - started);
            }
        };
        match way.door {
            Door::Http1 => drop(self.cluster.nodes[node].stream("/v1/completions", &self.key, &body, |event| {
                see(event);
                true
            })),
            Door::Library => self.runtime.block_on(by_library(self.clients[node].clone(), body, see)),
            Door::Http3 => self.runtime.block_on(self.connections[node].stream("/v1/completions", &body, see)),
        }
        first.unwrap_or_else(|| panic!("{}: no token came: {last}", way.name))
    }

    /// Tokens a second of many streams at once.
    fn speed(&self, way: Way, round: usize) -> f64 {
        let node = self.node(way);
        let bodies = (0..STREAMS).map(|n| Self::body(way, 10_000 + round * STREAMS + n, N_TOKENS));
        let started = SystemClock.now();
        let n_seen = if way.door == Door::Http1 {
            let start = |body| Streaming::start(&self.cluster.nodes[node], &self.key, &body);
            let streams: Vec<Streaming> = bodies.map(start).collect();
            let streamed: Vec<Streamed> = streams.into_iter().map(Streaming::join).collect();
            streamed.iter().map(|one| one.ids.len()).sum()
        } else {
            self.runtime.block_on(async {
                let seen = Arc::new(AtomicUsize::new(0));
                let mut tasks = JoinSet::new();
                for body in bodies {
                    let (client, http3) = (self.clients[node].clone(), self.connections[node].clone());
                    let counter = Arc::clone(&seen);
                    let count = move |event: &Value| _ = counter.fetch_add(n_tokens(event), Ordering::Relaxed);
                    tasks.spawn(async move {
                        match way.door {
                            Door::Library => by_library(client, body, count).await,
                            _ => http3.stream("/v1/completions", &body, count).await,
                        }
                    });
                }
                tasks.join_all().await;
                seen.load(Ordering::Relaxed)
            })
        };
        assert_eq!(n_seen, STREAMS * N_TOKENS as usize, "{}", self.cluster.logs());
        n_seen as f64 / (SystemClock.now() - started).as_secs_f64()
    }
}

fn n_tokens(event: &Value) -> usize {
    event["choices"][0]["token_ids"].as_array().map_or(0, Vec::len)
}

async fn by_library(client: Client, body: Value, mut on_event: impl FnMut(&Value)) {
    let mut stream = client.ask(Endpoint::Completions, body.to_string().into_bytes());
    while let Some(event) = stream.next().await.expect("the node answers") {
        if let Event::Piece(piece) = event {
            on_event(&serde_json::from_slice(&piece.json).expect("an event is JSON"));
        }
    }
}

fn percentile(values: &mut [f64], share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)]
}
