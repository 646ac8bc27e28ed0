//! Many more adapters than places in memory, under load; and what a hit and a miss cost.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use model::adapter::AdapterFiles;
use model::info::Linear;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::operator::{GENEROUS, agent, base_status, install, post, tenant};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny::{self, AdapterSpec};

const TENANTS: usize = 100;
/// How long the load lasts: long enough to see memory grow, and minutes with `TENANTRY_LONG` set.
fn load_time() -> Duration {
    Duration::from_secs(if std::env::var_os("TENANTRY_LONG").is_some() { 200 } else { 21 })
}

const THREADS: u64 = 16;

/// A next number of a simple generator: the pattern of a load, nothing more.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

#[test]
fn a_hundred_adapters_share_fifteen_places_without_errors_or_growth() {
    let folder = scratch("hundred");
    let spec = NodeSpec::tiny(&folder.join("model"))
        .with("[adapters]\nslots = 15\nhost_mib = 1\n[engine]\nkv_mib = 32")
        .with(GENEROUS);
    let node = NodeProcess::start(&folder, &spec);
    let keys: Vec<String> = (0..TENANTS)
        .map(|index| {
            let key = tenant(&node, &format!("t{index}"), &json!({}));
            install(&node, &format!("t{index}-chat-tiny-v1.0.0"), &tiny::adapter(index as u64, 16, &Linear::ALL));
            key
        })
        .collect();
    let load = load_time();
    let served = AtomicU64::new(0);
    let running = AtomicBool::new(true);
    let started = SystemClock.now();
    let resident: Vec<(Duration, u64)> = std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (node, keys, served, running) = (&node, &keys, &served, &running);
            scope.spawn(move || {
                let agent = agent();
                let mut state = thread + 1;
                while running.load(Ordering::Relaxed) {
                    // Four of five requests go to a fifth of the tenants.
                    let hot = next(&mut state) % 5 < 4;
                    let index = if hot { next(&mut state) % 20 } else { 20 + next(&mut state) % 80 } as usize;
                    let body = json!({"model": "chat", "prompt": "hello there", "max_tokens": 8, "ignore_eos": true});
                    let answer = post(&agent, node, "/v1/completions", &keys[index], &body.to_string());
                    assert_eq!(answer.status, 200, "tenant {index}: {}", answer.text);
                    assert_eq!(
                        answer.header("x-tenantry-adapter"),
                        Some(format!("t{index}-chat-tiny-v1.0.0").as_str())
                    );
                    served.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let mut resident = Vec::new();
        while started.elapsed() < load {
            std::thread::sleep(Duration::from_millis(250));
            resident.push((started.elapsed(), node.resident_bytes()));
        }
        running.store(false, Ordering::Relaxed);
        resident
    });
    // Medians: what is kept for ever moves them, a moment with many requests at once does not.
    let usual = |from: f64, to: f64| {
        let within = |at: &Duration| (from..to).contains(&(at.as_secs_f64() / load.as_secs_f64()));
        let samples = resident.iter().filter(|(at, _)| within(at)).map(|&(_, bytes)| bytes);
        let mut samples: Vec<u64> = samples.collect();
        samples.sort_unstable();
        samples[samples.len() / 2]
    };
    let (first, middle, last) = (usual(0.0, 0.33), usual(0.33, 0.66), usual(0.66, 2.0));
    let adapters = base_status(&node)["adapters"].clone();
    let served = served.load(Ordering::Relaxed);
    println!(
        "{served} requests in {:?}; resident {} → {} → {} KiB; {adapters}",
        started.elapsed(),
        first >> 10,
        middle >> 10,
        last >> 10
    );
    let count = |name: &str| adapters[name].as_u64().expect("a count");
    assert_eq!(count("hits") + count("misses"), served, "every request was one or the other");
    assert!(count("hits") > 0 && count("misses") > 0);
    assert!(count("evictions") + 15 >= TENANTS as u64, "every adapter had its turn: {adapters}");
    assert!(count("resident") <= 15 && count("failures") == 0, "{adapters}");
    assert!(last <= middle + middle / 20, "memory grows: {middle} → {last}");
}

/// The same files, declaring another base.
fn trained_on(files: AdapterFiles, base: &str) -> AdapterFiles {
    let AdapterFiles::Peft { config, weights } = files else { panic!("generated adapters are PEFT files") };
    let mut config: Value = serde_json::from_slice(&config).expect("JSON");
    config["base_model_name_or_path"] = json!(base);
    AdapterFiles::Peft { config: config.to_string().into_bytes(), weights }
}

/// Milliseconds to the first token, as the node measured it.
fn first_token_ms(node: &NodeProcess, key: &str) -> f64 {
    let body = json!({"model": "chat", "prompt": "hi", "max_tokens": 1, "temperature": 0});
    let answer = node.post("/v1/completions", key, &body);
    assert_eq!(answer.status, 200, "{}", answer.text);
    let queue = answer.header("x-tenantry-queue-ms").expect("a time").parse::<f64>().expect("a number");
    assert!(queue >= 0.0);
    queue
}

fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// Prints the times and judges only the counters: times belong to the machine.
#[test]
fn real_adapters_load_from_disk_once_per_miss() {
    const ROUNDS: usize = 8;
    let folder = scratch("loads");
    // Two places and no host memory for three adapters in turn: every request is a miss that goes to disk.
    let tables = "[adapters]\nslots = 2\nhost_mib = 0\nloads_at_once = 1\n[engine]\nkv_mib = 64";
    let node = NodeProcess::start(&folder, &NodeSpec::real().with(tables).with(GENEROUS));
    let shapes: Vec<(Linear, usize, usize)> = Linear::ALL
        .into_iter()
        .map(|linear| match linear {
            Linear::Q | Linear::O => (linear, 576, 576),
            Linear::K | Linear::V => (linear, 192, 576),
            Linear::Gate | Linear::Up => (linear, 1536, 576),
            Linear::Down => (linear, 576, 1536),
        })
        .collect();
    let keys: Vec<String> = (0..3)
        .map(|index| {
            let key = tenant(&node, &format!("t{index}"), &json!({}));
            let files =
                AdapterSpec { strength: 0.1, ..AdapterSpec::new(index, 16, &Linear::ALL) }.files_for(30, &shapes);
            install(&node, &format!("t{index}-chat-smollm2-v1.0.0"), &trained_on(files, "smollm2"));
            key
        })
        .collect();
    let misses: Vec<f64> = (0..3 * ROUNDS).map(|turn| first_token_ms(&node, &keys[turn % 3])).collect();
    let before: Value = base_status(&node)["adapters"].clone();
    let hits: Vec<f64> = (0..3 * ROUNDS).map(|_| first_token_ms(&node, &keys[2])).collect();
    let after: Value = base_status(&node)["adapters"].clone();
    let count = |adapters: &Value, name: &str| adapters[name].as_u64().expect("a count");
    assert_eq!(count(&before, "misses"), 3 * ROUNDS as u64, "{before}");
    assert!(count(&before, "loads") >= 3 * ROUNDS as u64, "{before}");
    assert_eq!(count(&after, "hits"), count(&before, "hits") + 3 * ROUNDS as u64, "{after}");
    assert_eq!(count(&after, "loads"), count(&before, "loads"), "a hit loads nothing");
    let (misses, hits) = (sorted(misses), sorted(hits));
    println!(
        "wait before the batch, ms: miss p50 {} max {}; hit p50 {} max {}",
        misses[12], misses[23], hits[12], hits[23]
    );
    for line in node.metrics().lines().filter(|line| line.starts_with("tenantry_adapter_load_seconds")) {
        println!("{line}");
    }
}
