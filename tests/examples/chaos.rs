//! Lets a cluster of real nodes lose some while they work, with the real model, and says what came of every stream.
//! Prints one line per invariant and round; ends with 1 when one did not hold.
//!
//! `cargo run --release -p tests --example chaos -- kill|freeze|leave [rounds] [streams] [tokens]`, with
//! `TENANTRY_BIN` naming the program. Every stream is compared with what the same request got undisturbed.

use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeSpec, scratch};

/// How long a frozen node stays so.
const FROZEN: Duration = Duration::from_secs(5);
/// Longest wait for every node to know every tenant.
const KNOWN_WITHIN: Duration = Duration::from_secs(10);

/// What is done to a node in mid-stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Disturbance {
    Kill,
    Freeze,
    Leave,
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
    keys: Vec<String>,
    expected: Vec<Vec<u32>>,
    n_tokens: u64,
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(default);
    let disturbance = match words.first().map(String::as_str) {
        Some("kill") => Disturbance::Kill,
        Some("freeze") => Disturbance::Freeze,
        Some("leave") => Disturbance::Leave,
        _ => {
            eprintln!("usage: chaos kill|freeze|leave [rounds] [streams] [tokens]");
            return ExitCode::from(2);
        }
    };
    let plan = Plan { disturbance, n_rounds: number(1, 10), n_streams: number(2, 32), n_tokens: number(3, 64) as u64 };
    let mut expected = None;
    let mut holds = true;
    for round in 0..plan.n_rounds {
        for victim in [1, 2] {
            // A node that has just died gets few tenants for a while: every disturbance has a cluster of its own.
            let mut bench = Bench::start(&plan, expected.take());
            holds &= bench.round(&plan, round, victim);
            expected = Some(bench.expected);
        }
    }
    println!("{}", if holds { "every invariant held" } else { "an invariant did not hold" });
    ExitCode::from(u8::from(!holds))
}

// === impl Bench ===

impl Bench {
    fn start(plan: &Plan, expected: Option<Vec<Vec<u32>>>) -> Self {
        let folder = scratch("chaos");
        let tables = "[engine]\nthreads = 1\nkv_mib = 256\n\n[cluster]\ndrain_s = 6";
        let spec = NodeSpec::real().with(GENEROUS).with(tables);
        let cluster = Cluster::start(&folder, &spec, 3);
        let tenant =
            |n: usize| operator::tenant(&cluster.nodes[0], &format!("tenant{n}"), &json!({"allow_base": true}));
        let keys: Vec<String> = (0..plan.n_streams).map(tenant).collect();
        let mut bench = Self { cluster, keys, expected: Vec::new(), n_tokens: plan.n_tokens };
        bench.wait_for_tenants();
        let undisturbed = || bench.streams().into_iter().map(|stream| stream.join().ids).collect();
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
        json!({
            "model": "smollm2", "max_tokens": self.n_tokens, "seed": n, "ignore_eos": true,
            "prompt": format!("Question {n}: why do rivers meander on their way to the sea?"),
            "temperature": if n.is_multiple_of(2) { 0.0 } else { 0.9 },
        })
    }

    /// A stream per tenant through the first node.
    fn streams(&self) -> Vec<Streaming> {
        let start = |(n, key): (usize, &String)| Streaming::start(&self.cluster.nodes[0], key, &self.body(n));
        self.keys.iter().enumerate().map(start).collect()
    }

    fn round(&mut self, plan: &Plan, round: usize, victim: usize) -> bool {
        let streams = self.streams();
        // A quarter of the way on average, some still in the queue.
        while streams.iter().map(Streaming::n_tokens).sum::<usize>() < streams.len() * plan.n_tokens as usize / 4 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let n_there = self.n_running(victim);
        self.disturb(plan.disturbance, victim);
        let streamed: Vec<Streamed> = streams.into_iter().map(Streaming::join).collect();
        self.mend(plan.disturbance, victim);
        let n_failed = streamed.iter().filter(|one| one.error.is_some() || one.finish.is_none()).count();
        let n_equal = streamed.iter().zip(&self.expected).filter(|(one, expected)| one.ids == **expected).count();
        let mut pauses: Vec<Duration> = streamed.iter().filter_map(|one| one.gaps.iter().max().copied()).collect();
        pauses.sort_unstable();
        let at = |share: f64| pauses.get(((pauses.len() as f64 * share) as usize).min(pauses.len() - 1)).copied();
        let (p50, p99) = (at(0.5).unwrap_or_default(), at(0.99).unwrap_or_default());
        let n = streamed.len();
        println!("round {round} node {victim}: {n_there} streams ran there, failed {n_failed} of {n}");
        println!("round {round} node {victim}: token ids as undisturbed {n_equal} of {n}");
        println!("round {round} node {victim}: longest pause p50 {} ms, p99 {} ms", p50.as_millis(), p99.as_millis());
        for one in streamed.iter().filter_map(|one| one.error.as_ref()).take(3) {
            println!("  {one}");
        }
        n_failed == 0 && n_equal == n
    }

    /// Requests at a node, as the first one heard it last.
    fn n_running(&self, node: usize) -> u64 {
        let seen = self.cluster.nodes[0].admin("GET", "/admin/v1/cluster", "");
        let status = &seen.body["nodes"][node];
        status["running"].as_u64().unwrap_or(0) + status["waiting"].as_u64().unwrap_or(0)
    }

    fn disturb(&mut self, disturbance: Disturbance, victim: usize) {
        match disturbance {
            Disturbance::Kill => self.cluster.nodes[victim].kill(),
            Disturbance::Freeze => self.cluster.nodes[victim].signal("STOP"),
            Disturbance::Leave => self.cluster.nodes[victim].signal("TERM"),
        }
    }

    fn mend(&mut self, disturbance: Disturbance, victim: usize) {
        let node = &mut self.cluster.nodes[victim];
        match disturbance {
            Disturbance::Kill => node.restart(),
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
