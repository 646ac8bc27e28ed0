//! Lets a cluster of real nodes lose some while they work, with the real model, and says what came of every stream.
//! Prints one line per invariant and round; ends with 1 when one did not hold.
//!
//! `cargo run --release -p tests --example chaos -- MODE [rounds] [streams] [tokens]`, with `TENANTRY_BIN` naming the
//! program; `scripts/chaos/nodes` says which modes there are. Every stream is compared with what the same request got
//! undisturbed. `PROMPT` in the environment is the length of prompts in tokens.

mod clients;
mod disk;
mod long;
mod upgrade;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::bills::{self, Tokens};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::namespaces::{Namespaces, PLAIN_HTTP, again_with_namespaces};
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
/// How long a node that is asked to leave goes on with its clients, in seconds.
const DRAIN_S: u32 = 6;
/// Between two restarts.
const BETWEEN: Duration = Duration::from_secs(2);
/// Keepers bill what a dead node delivered a minute after its last word, and a little.
const BILLED_AFTER: Duration = Duration::from_secs(75);
/// Tokens that may be on their way to a client when its node dies.
const UNDER_WAY: u64 = 16;
/// Set when nodes are to be in network namespaces, instead of having relays between them.
const NAMESPACES: &str = "NAMESPACES";

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
    /// One of the two reaches the other and is not reached by it; which one alternates between rounds.
    OneWay,
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
    wires: Wires,
    keys: Vec<String>,
    /// What clients of this cluster got.
    got: Tokens,
    expected: Vec<Vec<u32>>,
    n_tokens: u64,
    /// Tokens of a prompt, when they are counted.
    prompt: Option<usize>,
}

/// What lies between nodes.
enum Wires {
    Relays(Network),
    Namespaces(Namespaces),
}

/// Numbers that look random and are the same for a seed (splitmix64).
struct Dice(u64);

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if std::env::var_os(NAMESPACES).is_some() {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        if let Some(status) = again_with_namespaces(&words) {
            return ExitCode::from(u8::from(!status.success()));
        }
    }
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
        Some("oneway") => rounds(&plan(Disturbance::OneWay)),
        Some("loss") => rounds(&plan(Disturbance::Loss)),
        Some("rolling") => rolling(number(1, 2)),
        Some("disk") => disk::run(number(1, 32), number(2, 64) as u64),
        Some("long") => {
            let minutes = words.get(1).and_then(|word| word.parse().ok()).unwrap_or(30.0);
            let seed = number(2, 1) as u64;
            long::run(minutes, seed)
        }
        Some("upgrade") => upgrade::run(number(1, 16), number(2, 64) as u64),
        _ => {
            eprintln!(
                "usage: chaos kill|freeze|leave|entry|library|partition|oneway|loss [rounds] [streams] [tokens]
       chaos rolling [rounds] | disk [streams] [tokens] | long [minutes] [seed] | upgrade [streams] [tokens]"
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
    let seen = clients::under_clients(&mut bench, CLIENTS, |cluster, _| {
        for turn in 0..n_rounds * cluster.nodes.len() {
            std::thread::sleep(BETWEEN);
            let node = &mut cluster.nodes[turn % 3];
            node.signal("TERM");
            let status = node.wait();
            println!("node {} ended with {status}", node.name());
            node.restart();
            node.wait_ready();
        }
        std::thread::sleep(BETWEEN);
    });
    println!("{n_rounds} rounds of three restarts");
    seen.say() & bench.bills(0)
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

// === impl Wires ===

impl Wires {
    /// Three nodes and what lies between them.
    fn start(folder: &Path, tables: &str) -> (Cluster, Self) {
        let spec = NodeSpec::real();
        if std::env::var_os(NAMESPACES).is_none() {
            let (cluster, network) = Cluster::start_apart(folder, &spec.with(GENEROUS).with(tables), 3);
            return (cluster, Self::Relays(network));
        }
        let namespaces = Namespaces::new(3).expect("network namespaces; hint: run as root, or allow user namespaces");
        let cluster = Cluster::start_in(&namespaces, folder, &spec.with(PLAIN_HTTP).with(GENEROUS).with(tables), 3);
        (cluster, Self::Namespaces(namespaces))
    }

    fn cut(&self, one: usize, other: usize, is_cut: bool) {
        self.cut_one_way(one, other, is_cut);
        self.cut_one_way(other, one, is_cut);
    }

    fn cut_one_way(&self, from: usize, to: usize, is_cut: bool) {
        match self {
            Self::Relays(network) => network.cut_one_way(from, to, is_cut),
            Self::Namespaces(namespaces) => namespaces.cut_one_way(from, to, is_cut),
        }
    }

    fn make_bad(&self, lost: f64, delay: Duration) {
        match self {
            Self::Relays(network) => network.make_bad(lost, delay),
            Self::Namespaces(_) => eprintln!("packets are lost by relays only; hint: unset {NAMESPACES}"),
        }
    }
}

// === impl Bench ===

impl Bench {
    fn start(n_streams: usize, n_tokens: u64, expected: Option<Vec<Vec<u32>>>) -> Self {
        Self::start_in(&scratch("chaos"), n_streams, n_tokens, expected)
    }

    fn start_in(folder: &Path, n_streams: usize, n_tokens: u64, expected: Option<Vec<Vec<u32>>>) -> Self {
        Self::start_with(folder, DRAIN_S, n_streams, n_tokens, expected)
    }

    fn start_with(
        folder: &Path,
        drain_s: u32,
        n_streams: usize,
        n_tokens: u64,
        expected: Option<Vec<Vec<u32>>>,
    ) -> Self {
        let tables = format!("[engine]\nthreads = 1\nkv_mib = 256\n\n[cluster]\ndrain_s = {drain_s}");
        let (cluster, wires) = Wires::start(folder, &tables);
        let tenant =
            |n: usize| operator::tenant(&cluster.nodes[0], &format!("tenant{n}"), &json!({"allow_base": true}));
        let keys: Vec<String> = (0..n_streams).map(tenant).collect();
        let prompt = std::env::var("PROMPT").ok().and_then(|n| n.parse().ok());
        let mut bench = Self { cluster, wires, keys, got: Tokens::new(), expected: Vec::new(), n_tokens, prompt };
        bench.wait_for_tenants();
        bench.expected = expected.unwrap_or_else(|| {
            let streamed: Vec<Streamed> = bench.streams(0).into_iter().map(Streaming::join).collect();
            streamed.iter().enumerate().for_each(|(n, one)| bench.count(n, one.ids.len() as u64));
            streamed.into_iter().map(|one| one.ids).collect()
        });
        bench
    }

    /// Tenant `n` got tokens.
    fn count(&mut self, n: usize, n_tokens: u64) {
        *self.got.entry(format!("tenant{n}")).or_default() += n_tokens;
    }

    /// Prints what the nodes' journals say next to what clients got; true when nothing is unbilled and nothing billed
    /// twice, but for so many tokens that nobody can know of.
    fn bills(&self, excused: u64) -> bool {
        let bill = bills::settle(&self.cluster.nodes, &self.got, BILLED_AFTER);
        println!("unbilled: {} of {} tokens that clients got", bill.unbilled, bill.got);
        println!("billed beyond what clients got: {} tokens", bill.beyond);
        if excused > 0 {
            println!("  up to {excused} of either were under way to clients whose connection broke");
        }
        bill.unbilled <= excused && bill.beyond <= excused
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
        self.disturb(plan.disturbance, round, victim);
        let mut streamed: Vec<Streamed> = streams.into_iter().map(Streaming::join).collect();
        let n_anew = match plan.disturbance {
            Disturbance::Entry => self.go_on_elsewhere(&mut streamed),
            _ => 0,
        };
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
        streamed.iter().enumerate().for_each(|(n, one)| self.count(n, one.ids.len() as u64));
        self.bills(n_anew * UNDER_WAY) & (n_failed == 0 && n_equal == n)
    }

    /// What clients do whose connection broke: they ask the first node for what follows the last event they saw.
    /// Returns how many had seen none.
    fn go_on_elsewhere(&self, streamed: &mut [Streamed]) -> u64 {
        let broken = streamed.iter_mut().zip(&self.keys).enumerate().filter(|(_, (one, _))| one.finish.is_none());
        let rest: Vec<(&mut Streamed, Streaming)> = broken
            .map(|(n, (one, key))| {
                // One that had seen nothing sends its request again.
                let rest = Streaming::go_on(&self.cluster.nodes[0], key, &self.body(n), one.last_event.clone());
                (one, rest)
            })
            .collect();
        println!("  {} of {} streams were cut", rest.len(), self.keys.len());
        let n_anew = rest.iter().filter(|(one, _)| one.last_event.is_none()).count() as u64;
        for (one, rest) in rest {
            let rest = rest.join();
            one.gaps.push(rest.first);
            one.gaps.extend(rest.gaps);
            one.ids.extend(rest.ids);
            (one.finish, one.error) = (rest.finish, rest.error);
        }
        n_anew
    }

    /// Requests at a node, as the first one heard it last.
    fn n_running(&self, node: usize) -> u64 {
        let seen = self.cluster.nodes[0].admin("GET", "/admin/v1/cluster", "");
        let status = &seen.body["nodes"][node];
        status["running"].as_u64().unwrap_or(0) + status["waiting"].as_u64().unwrap_or(0)
    }

    fn disturb(&mut self, disturbance: Disturbance, round: usize, victim: usize) {
        match disturbance {
            Disturbance::Kill | Disturbance::Entry | Disturbance::Library => self.cluster.nodes[victim].kill(),
            Disturbance::Partition => self.wires.cut(0, victim, true),
            Disturbance::OneWay if round.is_multiple_of(2) => self.wires.cut_one_way(0, victim, true),
            Disturbance::OneWay => self.wires.cut_one_way(victim, 0, true),
            Disturbance::Loss => self.wires.make_bad(0.05, Duration::from_millis(5)),
            Disturbance::Freeze => self.cluster.nodes[victim].signal("STOP"),
            Disturbance::Leave => self.cluster.nodes[victim].signal("TERM"),
        }
    }

    fn mend(&mut self, disturbance: Disturbance, victim: usize) {
        let node = &mut self.cluster.nodes[victim];
        match disturbance {
            Disturbance::Kill | Disturbance::Entry | Disturbance::Library => node.restart(),
            Disturbance::Partition => self.wires.cut(0, victim, false),
            // The cluster ends with its round.
            Disturbance::OneWay => {}
            Disturbance::Loss => self.wires.make_bad(0.0, Duration::ZERO),
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
