//! Lets a cluster of real nodes lose some while they work, with the real model, and says what came of every stream.
//! Prints one line per invariant and round; ends with 1 when one did not hold.
//!
//! `cargo run --release -p tests --example chaos -- MODE [rounds] [streams] [tokens]`, with `TENANTRY_BIN` naming the
//! program; `scripts/chaos/nodes` says which modes there are. Every stream is compared with what the same request got
//! undisturbed. `PROMPT` in the environment is the length of prompts in tokens.

mod disk;
mod long;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::network::Network;
use tests::operator::{self, GENEROUS};
use tests::process::{NodeSpec, scratch};

/// How long a frozen node stays so.
const FROZEN: Duration = Duration::from_secs(5);
/// Longest wait for every node to know every tenant.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);
/// Clients that ask without a pause while nodes are restarted.
const CLIENTS: usize = 8;
/// Tokens of made-up prompts: plain words of the vocabulary of 49,152, no control tokens.
const FIRST_WORD: usize = 1000;
const N_WORDS: usize = 40_000;
/// Between two restarts.
const BETWEEN: Duration = Duration::from_secs(2);

/// What is done to a node in mid-stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    /// kill -9 of a node that computes.
    Kill,
    /// SIGSTOP, later SIGCONT, of a node that computes.
    Freeze,
    /// SIGTERM of a node that computes.
    Leave,
    /// kill -9 of the node that holds the clients; they go on with `Last-Event-ID`.
    Entry,
    /// The same with the client library.
    Library,
    /// The node of the clients and one that computes do not reach each other.
    Partition,
    /// 5 % of all packets between nodes are lost, the rest is late by 5 ms.
    Loss,
}

struct Plan {
    disturbance: Disturbance,
    n_rounds: usize,
    n_streams: usize,
    n_tokens: u64,
}

/// The cluster, its tenants' keys, what each should get.
struct Bench {
    cluster: Cluster,
    network: Network,
    keys: Vec<String>,
    expected: Vec<Vec<u32>>,
    n_tokens: u64,
    /// Tokens of a prompt, when they are counted.
    prompt: Option<usize>,
}

/// Numbers that look random and are the same for a seed (splitmix64).
struct Dice(u64);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(default);
    let plan = |disturbance| Plan {
        disturbance,
        n_rounds: number(1, 10),
        n_streams: number(2, 32),
        n_tokens: number(3, 64) as u64,
    };
    let holds = match words.first().map(String::as_str) {
        Some("kill") => rounds(&plan(Disturbance::Kill)),
        Some("freeze") => rounds(&plan(Disturbance::Freeze)),
        Some("leave") => rounds(&plan(Disturbance::Leave)),
        Some("entry") => rounds(&plan(Disturbance::Entry)),
        Some("library") => rounds(&plan(Disturbance::Library)),
        Some("partition") => rounds(&plan(Disturbance::Partition)),
        Some("loss") => rounds(&plan(Disturbance::Loss)),
        Some("rolling") => rolling(number(1, 2)),
        Some("disk") => disk::run(number(1, 32), number(2, 64) as u64),
        Some("long") => {
            let minutes = words.get(1).and_then(|word| word.parse().ok()).unwrap_or(30.0);
            let seed = number(2, 1) as u64;
            long::run(minutes, seed)
        }
        _ => {
            eprintln!(
                "usage: chaos kill|freeze|leave|entry|library|partition|loss [rounds] [streams] [tokens]
       chaos rolling [rounds] | disk [streams] [tokens] | long [minutes] [seed]"
            );
            return ExitCode::from(2);
        }
    };
    println!("{}", if holds { "every invariant held" } else { "an invariant did not hold" });
    ExitCode::from(u8::from(!holds))
}

fn rounds(plan: &Plan) -> bool {
    let mut expected = None;
    let mut holds = true;
    let mut pauses = Vec::new();
    for round in 0..plan.n_rounds {
        for victim in [1, 2] {
            // A node that has just died gets few tenants for a while: every disturbance has a cluster of its own.
            let mut bench = Bench::start(plan.n_streams, plan.n_tokens, expected.take());
            holds &= bench.round(plan, round, victim, &mut pauses);
            expected = Some(bench.expected);
        }
    }
    let (p50, p99) = percentiles(&mut pauses);
    println!("longest pauses of all {} streams: p50 {p50} ms, p99 {p99} ms", pauses.len());
    holds
}

/// Median and 99th percentile, in milliseconds.
fn percentiles(pauses: &mut [Duration]) -> (u128, u128) {
    pauses.sort_unstable();
    let at = |share: f64| pauses.get(((pauses.len() as f64 * share) as usize).min(pauses.len().saturating_sub(1)));
    let ms = |share: f64| at(share).copied().unwrap_or_default().as_millis();
    (ms(0.5), ms(0.99))
}

/// Every node in turn gets SIGTERM and comes back, under clients of the library that never stop asking.
fn rolling(n_rounds: usize) -> bool {
    let mut bench = Bench::start(CLIENTS, 64, None);
    let (stop, n_asked, n_wrong) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    let configs: Vec<_> = (0..CLIENTS).map(|n| bench.cluster.library(n, &bench.keys[n])).collect();
    std::thread::scope(|scope| {
        for (n, config) in configs.iter().enumerate() {
            let (body, expected) = (bench.body(n), &bench.expected[n]);
            let (stop, n_asked, n_wrong) = (&stop, &n_asked, &n_wrong);
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let streamed = Streaming::by_library(config.clone(), &body).join();
                    n_asked.fetch_add(1, Ordering::Relaxed);
                    if streamed.error.is_some() || streamed.finish.is_none() || streamed.ids != *expected {
                        n_wrong.fetch_add(1, Ordering::Relaxed);
                        println!("  client {n}: {:?}, {} tokens", streamed.error, streamed.ids.len());
                    }
                }
            });
        }
        for _ in 0..n_rounds {
            for node in &mut bench.cluster.nodes {
                std::thread::sleep(BETWEEN);
                node.signal("TERM");
                let status = node.wait();
                println!("node {} ended with {status}", node.name());
                node.restart();
                node.wait_ready();
            }
        }
        std::thread::sleep(BETWEEN);
        stop.store(true, Ordering::Relaxed);
    });
    let (n_asked, n_wrong) = (n_asked.into_inner(), n_wrong.into_inner());
    println!("{n_rounds} rounds of three restarts: {n_asked} requests, {n_wrong} failed or differed");
    n_wrong == 0
}

/// What tenant `n` asks: a question of about 16 tokens, or so many tokens of any kind.
fn body(n: usize, n_tokens: u64, prompt: Option<usize>) -> Value {
    let mut dice = Dice(n as u64);
    let prompt = match prompt {
        None => json!(format!("Question {n}: why do rivers meander on their way to the sea?")),
        Some(length) => (0..length).map(|_| FIRST_WORD + dice.below(N_WORDS)).collect(),
    };
    json!({
        "model": "smollm2", "max_tokens": n_tokens, "seed": n, "ignore_eos": true,
        "prompt": prompt,
        "temperature": if n.is_multiple_of(2) { 0.0 } else { 0.9 },
    })
}

// === impl Dice ===

impl Dice {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % n as u64) as usize
    }
}

// === impl Bench ===

impl Bench {
    fn start(n_streams: usize, n_tokens: u64, expected: Option<Vec<Vec<u32>>>) -> Self {
        Self::start_in(&scratch("chaos"), n_streams, n_tokens, expected)
    }

    fn start_in(folder: &Path, n_streams: usize, n_tokens: u64, expected: Option<Vec<Vec<u32>>>) -> Self {
        let tables = "[engine]\nthreads = 1\nkv_mib = 256\n\n[cluster]\ndrain_s = 6";
        let spec = NodeSpec::real().with(GENEROUS).with(tables);
        let (cluster, network) = Cluster::start_apart(folder, &spec, 3);
        let tenant =
            |n: usize| operator::tenant(&cluster.nodes[0], &format!("tenant{n}"), &json!({"allow_base": true}));
        let keys: Vec<String> = (0..n_streams).map(tenant).collect();
        let prompt = std::env::var("PROMPT").ok().and_then(|n| n.parse().ok());
        let mut bench = Self { cluster, network, keys, expected: Vec::new(), n_tokens, prompt };
        bench.wait_for_tenants();
        let undisturbed = || bench.streams(0).into_iter().map(|stream| stream.join().ids).collect();
        bench.expected = expected.unwrap_or_else(undisturbed);
        bench
    }

    fn wait_for_tenants(&self) {
        let started = SystemClock.now();
        let knows_all =
            |node: &tests::process::NodeProcess| self.keys.iter().all(|key| node.get("/v1/models", key).status == 200);
        while !self.cluster.nodes.iter().all(knows_all) {
            assert!(SystemClock.now() - started < KNOWN_WITHIN, "{}", self.cluster.logs());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn body(&self, n: usize) -> Value {
        body(n, self.n_tokens, self.prompt)
    }

    /// A stream per tenant through a node.
    fn streams(&self, door: usize) -> Vec<Streaming> {
        let start = |(n, key): (usize, &String)| Streaming::start(&self.cluster.nodes[door], key, &self.body(n));
        self.keys.iter().enumerate().map(start).collect()
    }

    /// The same with the client library.
    fn streams_of_library(&self, door: usize) -> Vec<Streaming> {
        let start = |(n, key): (usize, &String)| Streaming::by_library(self.cluster.library(door, key), &self.body(n));
        self.keys.iter().enumerate().map(start).collect()
    }

    fn round(&mut self, plan: &Plan, round: usize, victim: usize, all_pauses: &mut Vec<Duration>) -> bool {
        let streams = match plan.disturbance {
            Disturbance::Library => self.streams_of_library(victim),
            Disturbance::Entry => self.streams(victim),
            _ => self.streams(0),
        };
        // A quarter of the way on average, some still in the queue.
        while streams.iter().map(Streaming::n_tokens).sum::<usize>() < streams.len() * plan.n_tokens as usize / 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let n_there = self.n_running(victim);
        self.disturb(plan.disturbance, victim);
        let mut streamed: Vec<Streamed> = streams.into_iter().map(Streaming::join).collect();
        if plan.disturbance == Disturbance::Entry {
            self.go_on_elsewhere(&mut streamed);
        }
        self.mend(plan.disturbance, victim);
        let n_failed = streamed.iter().filter(|one| one.error.is_some() || one.finish.is_none()).count();
        let n_equal = streamed.iter().zip(&self.expected).filter(|(one, expected)| one.ids == **expected).count();
        let mut pauses: Vec<Duration> = streamed.iter().filter_map(|one| one.gaps.iter().max().copied()).collect();
        let (p50, p99) = percentiles(&mut pauses);
        all_pauses.extend(pauses);
        let n = streamed.len();
        println!("round {round} node {victim}: {n_there} streams ran there, failed {n_failed} of {n}");
        println!("round {round} node {victim}: token ids as undisturbed {n_equal} of {n}");
        println!("round {round} node {victim}: longest pause p50 {p50} ms, p99 {p99} ms");
        for one in streamed.iter().filter_map(|one| one.error.as_ref()).take(3) {
            println!("  {one}");
        }
        n_failed == 0 && n_equal == n
    }

    /// What clients do whose connection broke: they ask the first node for what follows the last event they saw.
    fn go_on_elsewhere(&self, streamed: &mut [Streamed]) {
        let broken = streamed.iter_mut().zip(&self.keys).enumerate().filter(|(_, (one, _))| one.finish.is_none());
        let rest: Vec<(&mut Streamed, Streaming)> = broken
            .map(|(n, (one, key))| {
                // One that had seen nothing sends its request again.
                let rest = Streaming::go_on(&self.cluster.nodes[0], key, &self.body(n), one.last_event.clone());
                (one, rest)
            })
            .collect();
        println!("  {} of {} streams were cut", rest.len(), self.keys.len());
        for (one, rest) in rest {
            let rest = rest.join();
            one.gaps.push(rest.first);
            one.gaps.extend(rest.gaps);
            one.ids.extend(rest.ids);
            (one.finish, one.error) = (rest.finish, rest.error);
        }
    }

    /// Requests at a node, as the first one heard it last.
    fn n_running(&self, node: usize) -> u64 {
        let seen = self.cluster.nodes[0].admin("GET", "/admin/v1/cluster", "");
        let status = &seen.body["nodes"][node];
        status["running"].as_u64().unwrap_or(0) + status["waiting"].as_u64().unwrap_or(0)
    }

    fn disturb(&mut self, disturbance: Disturbance, victim: usize) {
        match disturbance {
            Disturbance::Kill | Disturbance::Entry | Disturbance::Library => self.cluster.nodes[victim].kill(),
            Disturbance::Partition => self.network.cut(0, victim, true),
            Disturbance::Loss => self.network.make_bad(0.05, Duration::from_millis(5)),
            Disturbance::Freeze => self.cluster.nodes[victim].signal("STOP"),
            Disturbance::Leave => self.cluster.nodes[victim].signal("TERM"),
        }
    }

    fn mend(&mut self, disturbance: Disturbance, victim: usize) {
        let node = &mut self.cluster.nodes[victim];
        match disturbance {
            Disturbance::Kill | Disturbance::Entry | Disturbance::Library => node.restart(),
            Disturbance::Partition => self.network.cut(0, victim, false),
            Disturbance::Loss => self.network.make_bad(0.0, Duration::ZERO),
            Disturbance::Freeze => {
                std::thread::sleep(FROZEN);
                node.signal("CONT");
            }
            Disturbance::Leave => {
                let status = node.wait();
                println!("node {victim} ended with {status}");
                node.restart();
            }
        }
        node.wait_ready();
    }
}
