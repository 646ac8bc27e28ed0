//! Measures fairness on a real node with the real model: token shares of backlogged tenants, what a flood does
//! to its neighbours, what a reserved class notices, and what loading adapters does to a running stream. Prints
//! figures; decides nothing.
//!
//! `cargo run --release -p tests --example fairness -- shares|flood|reserve|loads [pairs] [seconds]`, with
//! `TENANTRY_BIN` naming the program to measure. Quiet machine, please: load from elsewhere shows up as noise. The
//! first second of every run is not counted, nor is the first run. `THREADS` sets the node's compute threads (with one,
//! node and clients can have a core each: `taskset`); `PAIRS` names a file of ratios that runs are added to, so that many
//! pairs can be measured in pieces.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use model::adapter::AdapterFiles;
use model::info::Linear;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::operator;
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny::{AdapterSpec, Random};

/// Start of a run that is not counted: its clients all begin at once.
const WARM_UP: Duration = Duration::from_secs(1);
const QUESTION: &str = "Please tell me in a few words where my order is and when it will arrive at my house.";

/// Times seen by one client group.
#[derive(Default)]
struct Seen {
    first_token_ms: Vec<f64>,
    gap_ms: Vec<f64>,
    n_requests: usize,
}

fn now() -> Instant {
    SystemClock.now()
}

/// One streamed request; times every token. Its answer has half to one and a half times `max_tokens`: were all equally
/// long, the streams of a class would fall into step, ask again at the same moment and wait for one another.
fn ask(node: &NodeProcess, key: &str, max_tokens: u32, salt: usize, seen: &mut Seen) {
    // In letters: prompts of 23 to 25 tokens. Digits are a token each, and their number grew with the runs.
    let letters: String = (0..6).map(|at| char::from(b'a' + (salt / 26_usize.pow(at) % 26) as u8)).collect();
    let prompt = format!("{letters}: {QUESTION}");
    let max_tokens = max_tokens / 2 + Random::new(salt as u64).below(max_tokens as usize + 1) as u32;
    let body = json!({"model": "smollm2", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": true,
        "temperature": 0, "stream": true, "return_token_ids": true});
    let started = now();
    let mut last = None;
    node.stream("/v1/completions", key, &body, |event: &Value| {
        let n_tokens = event["choices"][0]["token_ids"].as_array().map_or(0, Vec::len);
        if n_tokens > 0 {
            let at = now();
            match last.replace(at) {
                None => seen.first_token_ms.push(at.duration_since(started).as_secs_f64() * 1e3),
                Some(before) => seen.gap_ms.push(at.duration_since(before).as_secs_f64() * 1e3 / n_tokens as f64),
            }
        }
        true
    });
    seen.n_requests += 1;
}

/// Closed-loop clients per tenant until `stop`; returns what each tenant saw.
fn drive(
    node: &NodeProcess,
    clients: &BTreeMap<String, (String, usize)>,
    max_tokens: u32,
    seconds: u64,
) -> BTreeMap<String, Seen> {
    /// No run asks what an earlier one asked: the prefix cache would answer some and not others.
    static RUNS: AtomicUsize = AtomicUsize::new(0);
    let run = RUNS.fetch_add(1, Ordering::Relaxed);
    let stop = AtomicBool::new(false);
    let seen: BTreeMap<String, Arc<Mutex<Seen>>> =
        clients.keys().map(|tenant| (tenant.clone(), Arc::default())).collect();
    let counted_from = now() + WARM_UP;
    std::thread::scope(|scope| {
        for (tenant, (key, n_clients)) in clients {
            for client in 0..*n_clients {
                let (stop, seen) = (&stop, Arc::clone(&seen[tenant]));
                scope.spawn(move || {
                    let mut mine = Seen::default();
                    let mut round = (run * 64 + client) * 1024;
                    while !stop.load(Ordering::Relaxed) {
                        let early = now() < counted_from;
                        ask(node, key, max_tokens, round, &mut mine);
                        round += 1;
                        if early {
                            mine = Seen::default();
                        }
                    }
                    let mut all = seen.lock().expect("no client panicked");
                    all.first_token_ms.extend(mine.first_token_ms);
                    all.gap_ms.extend(mine.gap_ms);
                    all.n_requests += mine.n_requests;
                });
            }
        }
        std::thread::sleep(WARM_UP + Duration::from_secs(seconds));
        stop.store(true, Ordering::Relaxed);
    });
    seen.into_iter()
        .map(|(tenant, seen)| (tenant, std::mem::take(&mut *seen.lock().expect("no client panicked"))))
        .collect()
}

fn percentile(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(((sorted.len() as f64 - 1.0) * p).round() as usize).copied().unwrap_or(f64::NAN)
}

fn node(tables: &str) -> NodeProcess {
    let threads = std::env::var("THREADS").unwrap_or_else(|_| "0".to_owned());
    let engine = format!("[engine]\nthreads = {threads}\n");
    NodeProcess::start(&scratch("fairness"), &NodeSpec::real().with(&tables.replace("[engine]\n", &engine)))
}

const OPEN_LIMITS: [&str; 8] = [
    "--requests-per-minute",
    "1000000",
    "--burst-requests",
    "1000000",
    "--tokens-per-minute",
    "1000000000",
    "--deadline-ms",
    "600000",
];

fn tenant(node: &NodeProcess, id: &str, words: &[&str]) -> String {
    node.tenant(id, &[words, &OPEN_LIMITS].concat())
}

/// Token shares of tenants that always have work waiting, against their weights.
fn shares(weights: &[u32], seconds: u64) {
    let node = node("[engine]\nsequences = 8\n");
    let mut clients = BTreeMap::new();
    for (index, weight) in weights.iter().enumerate() {
        let id = format!("t{index}");
        let key = tenant(&node, &id, &["--weight", &weight.to_string(), "--concurrency", "8", "--queue-depth", "1000"]);
        clients.insert(id, (key, 12));
    }
    drive(&node, &clients, 16, seconds);
    // The first and last seconds are not backlogged for everyone; usage records have the time of each end.
    let records = node.usage();
    let ends: Vec<u64> = records.iter().filter_map(|record| record["at_ms"].as_u64()).collect();
    let (from, to) = (
        ends.iter().min().copied().unwrap_or(0) + 2000,
        ends.iter().min().copied().unwrap_or(0) + (seconds - 1) * 1000,
    );
    let mut tokens: BTreeMap<String, (u64, usize)> = BTreeMap::new();
    for record in records.iter().filter(|record| record["at_ms"].as_u64().is_some_and(|at| at >= from && at <= to)) {
        let delivered: u64 = record["delivered"].as_array().into_iter().flatten().filter_map(Value::as_u64).sum();
        let computed = record["prompt_tokens"].as_u64().unwrap_or(0) - record["cached_tokens"].as_u64().unwrap_or(0);
        let entry = tokens.entry(record["tenant"].as_str().unwrap_or_default().to_owned()).or_default();
        entry.0 += computed + 2 * delivered;
        entry.1 += 1;
    }
    let total: u64 = tokens.values().map(|(tokens, _)| tokens).sum();
    let weight_sum: u32 = weights.iter().sum();
    let mut worst = 0.0_f64;
    for (index, weight) in weights.iter().enumerate() {
        let (found, requests) = tokens.get(&format!("t{index}")).copied().unwrap_or_default();
        let share = found as f64 / total as f64;
        let ideal = f64::from(*weight) / f64::from(weight_sum);
        worst = worst.max((share / ideal - 1.0).abs());
        println!("  tenant {index} weight {weight}: {requests} requests, share {share:.4}, ideal {ideal:.4}");
    }
    println!("shares {weights:?}: worst deviation {:.2} %", worst * 100.0);
}

/// Ratios of the neighbours' times between two set-ups, run in turn.
fn compare(name: &str, pairs: usize, mut run: impl FnMut(bool) -> Seen) {
    let earlier = std::env::var("PAIRS").map(|path| std::fs::read_to_string(path).unwrap_or_default());
    let mut lines: Vec<String> = earlier.unwrap_or_default().lines().map(str::to_owned).collect();
    run(false);
    for pair in 0..pairs {
        let (base, other) = (run(false), run(true));
        let of = |seen: &Seen| {
            [percentile(&seen.first_token_ms, 0.95), percentile(&seen.gap_ms, 0.95), percentile(&seen.gap_ms, 0.5)]
        };
        let (base_ms, other_ms) = (of(&base), of(&other));
        let ratios: Vec<String> = (0..3).map(|metric| (other_ms[metric] / base_ms[metric]).to_string()).collect();
        lines.push(ratios.join(" "));
        println!(
            "  pair {pair}: p95 TTFT {:.0} -> {:.0} ms, p95 gap {:.1} -> {:.1} ms, p50 gap {:.1} -> {:.1} ms, requests {} -> {}",
            base_ms[0],
            other_ms[0],
            base_ms[1],
            other_ms[1],
            base_ms[2],
            other_ms[2],
            base.n_requests,
            other.n_requests
        );
    }
    if let Ok(path) = std::env::var("PAIRS") {
        std::fs::write(path, lines.join("\n") + "\n").expect("write the ratios");
    }
    for (metric, what) in ["p95 TTFT", "p95 gap", "p50 gap"].into_iter().enumerate() {
        let ratio = |line: &String| line.split(' ').nth(metric)?.parse().ok();
        let mut ratios: Vec<f64> = lines.iter().filter_map(ratio).collect();
        ratios.sort_by(f64::total_cmp);
        let (median, bound) = (percentile(&ratios, 0.5), ratios[median_bound_rank(ratios.len()) - 1]);
        println!("{name}: {what} ratio median {median:.3}, upper bound {bound:.3} ({} pairs)", ratios.len());
    }
}

/// The least rank whose value lies above the median with at least 95 % confidence (binomial): the ninth of ten; the
/// largest where there are too few.
fn median_bound_rank(n: usize) -> usize {
    let mut ways = 1.0;
    let mut above = 0.0;
    // From the largest down: the chance that so many of n values or more lie below the median.
    for rank in (1..=n).rev() {
        above += ways * 0.5_f64.powi(n as i32);
        if above > 0.05 {
            return (rank + 1).min(n);
        }
        ways *= rank as f64 / (n - rank + 1) as f64;
    }
    n
}

fn joined(mut seen: BTreeMap<String, Seen>, leave_out: &str) -> Seen {
    seen.remove(leave_out);
    seen.into_values().fold(Seen::default(), |mut all, one| {
        all.first_token_ms.extend(one.first_token_ms);
        all.gap_ms.extend(one.gap_ms);
        all.n_requests += one.n_requests;
        all
    })
}

/// Eight tenants with two sequences each; one of them has three clients, with which its two places are always taken and
/// its share is used up, or forty.
fn flood(pairs: usize, seconds: u64) {
    let node = node("[engine]\nsequences = 16\n");
    let ids: Vec<String> = (0..8).map(|index| format!("t{index}")).collect();
    let keys: Vec<String> =
        ids.iter().map(|id| tenant(&node, id, &["--concurrency", "2", "--queue-depth", "1000"])).collect();
    compare("flood at 20 times its share", pairs, |flooded| {
        let clients = ids.iter().zip(&keys).map(|(id, key)| {
            let n_clients = if id != "t0" {
                2
            } else if flooded {
                40
            } else {
                3
            };
            (id.clone(), (key.clone(), n_clients))
        });
        joined(drive(&node, &clients.collect(), 32, seconds), "t0")
    });
}

/// Two premium tenants alone, or beside a flood of shared ones.
fn reserve(pairs: usize, seconds: u64) {
    let reserve = std::env::var("RESERVE").unwrap_or_else(|_| "0.9".to_owned());
    let node = node(&format!("[engine]\nsequences = 16\n[tiers.premium]\nreserve = {reserve}\n"));
    let premium: Vec<(String, String)> = (0..2)
        .map(|index| format!("p{index}"))
        .map(|id| (id.clone(), tenant(&node, &id, &["--tier", "premium"])))
        .collect();
    let flooder = tenant(&node, "flood", &["--concurrency", "16", "--queue-depth", "1000"]);
    compare(&format!("flood beside a class with {reserve} of step time"), pairs, |flooded| {
        let mut clients: BTreeMap<String, (String, usize)> =
            premium.iter().map(|(id, key)| (id.clone(), (key.clone(), 2))).collect();
        if flooded {
            clients.insert("flood".to_owned(), (flooder.clone(), 32));
        }
        joined(drive(&node, &clients, 32, seconds), "flood")
    });
}

/// A stream of the base beside a tenant that asks four times a second, always for the same adapter or in turn for
/// more adapters than there are slots, each loaded from the disk again.
fn loads(pairs: usize, seconds: u64) {
    const N_ADAPTERS: usize = 6;
    let node = node("[engine]\nsequences = 16\n[adapters]\nslots = 2\nhost_mib = 1\n");
    let steady = tenant(&node, "steady", &[]);
    let keys: Vec<String> = (0..N_ADAPTERS)
        .map(|n| {
            let id = format!("loader{n}");
            let key = tenant(&node, &id, &[]);
            let name = format!("{id}-task-smollm2-v1.0.0");
            operator::install(&node, &name, &adapter(n as u64));
            key
        })
        .collect();
    compare("a stream beside loads from the disk", pairs, |loading| {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for n in 0.. {
                    let at = if loading { n % N_ADAPTERS } else { 0 };
                    let body = json!({"model": "task", "prompt": "Hello", "max_tokens": 1, "temperature": 0});
                    let due = now() + Duration::from_millis(250);
                    assert_eq!(node.post("/v1/completions", &keys[at], &body).status, 200);
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    std::thread::sleep(due.saturating_duration_since(now()));
                }
            });
            let clients = BTreeMap::from([("steady".to_owned(), (steady.clone(), 1))]);
            let seen = drive(&node, &clients, 200, seconds).remove("steady").expect("it was driven");
            stop.store(true, Ordering::Relaxed);
            seen
        })
    });
    let n_loads = node
        .metrics()
        .lines()
        .filter(|line| line.starts_with("tenantry_adapter_load_seconds_count"))
        .map(str::to_owned)
        .collect::<Vec<_>>();
    println!("{}", n_loads.join("\n"));
}

/// A rank-16 adapter on all linear layers of the real model, in f32: 19.5 MB.
fn adapter(seed: u64) -> AdapterFiles {
    let shapes = [
        (Linear::Q, 576, 576),
        (Linear::K, 192, 576),
        (Linear::V, 192, 576),
        (Linear::O, 576, 576),
        (Linear::Gate, 1536, 576),
        (Linear::Up, 1536, 576),
        (Linear::Down, 576, 1536),
    ];
    let spec = AdapterSpec::new(seed, 16, &shapes.map(|(linear, ..)| linear));
    let AdapterFiles::Peft { config, weights } = spec.files_for(30, &shapes) else { unreachable!("PEFT files") };
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["base_model_name_or_path"] = json!("SmolLM2-135M-Instruct");
    AdapterFiles::Peft { config: config.to_string().into_bytes(), weights }
}

fn main() {
    let words: Vec<String> = std::env::args().collect();
    let number = |at: usize, default: u64| words.get(at).and_then(|word| word.parse().ok()).unwrap_or(default);
    match words.get(1).map(String::as_str) {
        Some("shares") => {
            shares(&[1; 8], number(2, 40));
            shares(&[1, 2, 4], number(2, 40));
        }
        Some("flood") => flood(number(2, 10) as usize, number(3, 8)),
        Some("reserve") => reserve(number(2, 10) as usize, number(3, 8)),
        Some("loads") => loads(number(2, 10) as usize, number(3, 8)),
        _ => eprintln!("use: fairness shares [seconds] | flood|reserve|loads [pairs] [seconds]"),
    }
}
