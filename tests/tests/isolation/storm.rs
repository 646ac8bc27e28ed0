//! More adapters than slots, many clients, cancellations and retries: what comes out is what each tenant gets
//! alone, token for token and log-probability for log-probability (RELIABILITY S1, S2, S3).
//!
//! In debug builds, as here, freed KV pages and slots are filled with NaN, so that a read of anything freed shows.

use std::io::{BufRead, BufReader};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use model::adapter::AdapterFiles;
use model::info::Linear;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::operator::{self, GENEROUS};
use tests::process::{Answer, NodeProcess, NodeSpec, scratch, token_ids};
use tests::tiny::{self, Random};

use super::scaled;

const CLIENTS: usize = 16;

/// A request and the answer its tenant gets when it is alone.
struct Job {
    key: String,
    body: Value,
    alone: Heard,
}

/// What of an answer must not depend on others.
#[derive(Debug, PartialEq)]
struct Heard {
    token_ids: Vec<u32>,
    text: String,
    logprobs: Value,
    adapter: String,
}

impl Heard {
    fn of(answer: &Answer) -> Self {
        assert_eq!(answer.status, 200, "{}", answer.text);
        let choice = &answer.body["choices"][0];
        Self {
            token_ids: token_ids(choice),
            text: choice["text"].as_str().expect("a text").to_owned(),
            logprobs: choice["logprobs"].clone(),
            adapter: answer.header("x-tenantry-adapter-hash").unwrap_or("base").to_owned(),
        }
    }
}

/// The four shapes of adapter and several ranks, in turn.
fn tiny_adapter(i: usize) -> AdapterFiles {
    let targets: [&[Linear]; 4] =
        [&Linear::ALL, &[Linear::Q, Linear::V], &[Linear::Gate, Linear::Up, Linear::Down], &[Linear::O]];
    tiny::adapter(1000 + i as u64, [1, 2, 4, 8, 16, 3, 32, 7][i % 8], targets[(i / 8) % 4])
}

/// Prompts of one tenant: one short, one of several KV pages, and one that shares the long one's beginning. All
/// tenants send the same texts, which is what a cache that mixes tenants up would need.
fn bodies(model: &str, tenant: usize, n_tokens: usize) -> Vec<Value> {
    let story = "the cat sat on the mat and then it went to the store for a pint of milk and some bread";
    let prompts = ["hi", story, &format!("{story}, but it was closed")];
    let body = |(i, prompt): (usize, &&str)| {
        let temperature = [0.0, 0.9, 0.0][i];
        json!({"model": model, "prompt": prompt, "max_tokens": n_tokens + i, "temperature": temperature,
               "seed": 7 + tenant, "ignore_eos": true, "return_token_ids": true, "logprobs": 2})
    };
    prompts.iter().enumerate().map(body).collect()
}

/// Every tenant's answers with nobody else there.
fn alone(node: &NodeProcess, tenants: &[String], n_tokens: usize) -> Vec<Job> {
    let agent = operator::agent();
    let mut jobs = Vec::new();
    for (i, key) in tenants.iter().enumerate() {
        for body in bodies("t", i, n_tokens) {
            let answer = operator::post(&agent, node, "/v1/completions", key, &body.to_string());
            jobs.push(Job { key: key.clone(), body, alone: Heard::of(&answer) });
        }
    }
    jobs
}

/// What happened in a storm.
#[derive(Debug, Default)]
struct Tally {
    answered: AtomicUsize,
    streamed: AtomicUsize,
    cancelled: AtomicUsize,
    different: AtomicUsize,
}

fn storm(node: &NodeProcess, jobs: &[Job], n_requests: usize) -> Tally {
    let (tally, next) = (Tally::default(), AtomicUsize::new(0));
    thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (tally, next) = (&tally, &next);
            scope.spawn(move || {
                let (agent, mut random) = (operator::agent(), Random::new(client as u64));
                while next.fetch_add(1, Ordering::Relaxed) < n_requests {
                    let job = &jobs[random.below(jobs.len())];
                    if random.below(10) == 0 {
                        give_up(node, job, Duration::from_micros(random.below(8000) as u64));
                        tally.cancelled.fetch_add(1, Ordering::Relaxed);
                    }
                    let same = if random.below(6) == 0 {
                        tally.streamed.fetch_add(1, Ordering::Relaxed);
                        streamed(&agent, node, job) == job.alone.token_ids
                    } else {
                        let answer = operator::post(&agent, node, "/v1/completions", &job.key, &job.body.to_string());
                        Heard::of(&answer) == job.alone
                    };
                    tally.answered.fetch_add(1, Ordering::Relaxed);
                    tally.different.fetch_add(usize::from(!same), Ordering::Relaxed);
                }
            });
        }
    });
    tally
}

/// A client that goes away; the request is made again afterwards.
fn give_up(node: &NodeProcess, job: &Job, after: Duration) {
    let mut body = job.body.clone();
    body["stream"] = json!(true);
    let socket = operator::start(node.http(), "/v1/completions", &job.key, &body.to_string());
    thread::sleep(after);
    drop(socket);
}

fn streamed(agent: &ureq::Agent, node: &NodeProcess, job: &Job) -> Vec<u32> {
    let mut body = job.body.clone();
    body["stream"] = json!(true);
    let request = agent
        .post(format!("{}/v1/completions", node.url()))
        .header("authorization", format!("Bearer {}", job.key))
        .header("content-type", "application/json");
    let response = request.send(body.to_string()).expect("the node answers");
    assert_eq!(response.status(), 200);
    let mut ids = Vec::new();
    for line in BufReader::new(response.into_body().into_reader()).lines() {
        let line = line.expect("a stream ends with [DONE]");
        let Some(data) = line.strip_prefix("data: ").filter(|data| *data != "[DONE]") else { continue };
        let event: Value = serde_json::from_str(data).expect("an event is JSON");
        assert!(event["error"].is_null(), "{event}");
        if event["choices"][0]["token_ids"].is_array() {
            ids.extend(token_ids(&event["choices"][0]));
        }
    }
    ids
}

fn tiny_tenants(node: &NodeProcess, n: usize) -> Vec<String> {
    let install = |i: usize| {
        let key = operator::tenant(node, &format!("t{i}"), &json!({}));
        operator::install(node, &format!("t{i}-t-tiny-v1.0.0"), &tiny_adapter(i));
        key
    };
    (0..n).map(install).collect()
}

/// Runs a storm and checks that it was one.
fn weather(node: &NodeProcess, jobs: &[Job], n_requests: usize, what: &str) -> (Tally, Value) {
    let before = operator::base_status(node);
    let started = SystemClock.now();
    let tally = storm(node, jobs, n_requests);
    let took = started.elapsed();
    let after = operator::base_status(node);
    let grown =
        |of: &str, what: &str| after[of][what].as_u64().expect("a count") - before[of][what].as_u64().expect("a count");
    let counts = json!({
        "loads": grown("adapters", "loads"), "evictions": grown("adapters", "evictions"),
        "hits": grown("adapters", "hits"), "misses": grown("adapters", "misses"),
        "prefix_hits": grown("engine", "prefix_hits"), "steps": grown("engine", "steps"),
        "failures": after["adapters"]["failures"],
    });
    println!("{what}: {tally:?} in {took:?}; {counts}");
    assert_eq!(tally.different.load(Ordering::Relaxed), 0, "answers differ from those alone: {tally:?}");
    assert_eq!(tally.answered.load(Ordering::Relaxed), n_requests);
    assert_eq!(counts["failures"], 0);
    (tally, counts)
}

#[test]
fn in_a_storm_of_64_adapters_over_4_slots_everyone_gets_what_they_get_alone() {
    let folder = scratch("storm");
    let spec = NodeSpec::tiny(&folder.join("model")).with(&format!("[adapters]\nslots = 4\n{GENEROUS}"));
    let node = NodeProcess::start(&folder, &spec);
    let tenants = tiny_tenants(&node, 64);
    let jobs = alone(&node, &tenants, 4);
    let different: std::collections::BTreeSet<&Vec<u32>> =
        jobs.iter().skip(1).step_by(3).map(|job| &job.alone.token_ids).collect();
    assert!(different.len() > 60, "adapters are told apart by their answers: {}", different.len());

    let n_requests = scaled(10_000);
    let (tally, counts) = weather(&node, &jobs, n_requests, "storm");

    assert!(tally.cancelled.load(Ordering::Relaxed) > n_requests / 20, "{tally:?}");
    for what in ["loads", "evictions", "prefix_hits"] {
        assert!(counts[what].as_u64() > Some(300), "{what}: {counts}");
    }
}

#[test]
fn a_storm_without_prefix_cache_gives_the_same_answers() {
    let folder = scratch("storm-bare");
    let tables = format!(
        "[adapters]\nslots = 4\nhost_mib = 1\n[engine]\nprefix_cache_share = 0.0\nprefill_chunk = 16\nrows_per_step = 32\nsequences = 8\nkv_mib = 8\n{GENEROUS}"
    );
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(&tables));
    let tenants = tiny_tenants(&node, 24);
    let bare = alone(&node, &tenants, 4);
    let (_, counts) = weather(&node, &bare, scaled(1500), "storm without cache");
    assert_eq!(counts["prefix_hits"], 0);
    drop(node);

    // The same with a cache, with other chunks, from a second process: answers are a property of the weights.
    let folder = scratch("storm-cached");
    let spec = NodeSpec::tiny(&folder.join("model")).with(GENEROUS);
    let node = NodeProcess::start(&folder, &spec);
    let tenants = tiny_tenants(&node, 24);
    let cached = alone(&node, &tenants, 4);
    for (bare, cached) in bare.iter().zip(&cached) {
        assert_eq!(bare.alone, cached.alone, "{}", bare.body);
    }
}

#[test]
fn the_real_model_gives_every_tenant_its_own_answer_with_three_slots() {
    let folder = scratch("storm-real");
    let spec = NodeSpec::real().with(&format!("[adapters]\nslots = 3\n{GENEROUS}"));
    let node = NodeProcess::start(&folder, &spec);
    let names = ["brightcart", "cedar-clinic", "northbank", "pixelforge-games", "metrix-dora", "harbor-logistics"];
    let mut tenants = Vec::new();
    // Ten tenants; the last four hold copies of the first four's files.
    for i in 0..10 {
        let files = tiny::read_adapter(&tests::data("adapters").join(names[i % names.len()]));
        tenants.push(operator::tenant(&node, &format!("t{i}"), &json!({})));
        operator::install(&node, &format!("t{i}-t-smollm2-v1.0.0"), &files);
    }
    let agent = operator::agent();
    let mut jobs = Vec::new();
    for key in &tenants {
        for (prompt, temperature) in [("Where is my order?", 0.0), ("Hello, I have a question about", 0.8)] {
            let body = json!({"model": "t", "prompt": prompt, "max_tokens": 3, "temperature": temperature, "seed": 5,
                              "ignore_eos": true, "return_token_ids": true, "logprobs": 2});
            let answer = operator::post(&agent, &node, "/v1/completions", key, &body.to_string());
            jobs.push(Job { key: key.clone(), body, alone: Heard::of(&answer) });
        }
    }
    let of = |tenant: usize| &jobs[2 * tenant + 1].alone;
    assert_eq!(of(6), of(0), "a copy of an adapter under another tenant answers alike");
    assert_ne!(of(0).logprobs, of(1).logprobs);

    let (_, counts) = weather(&node, &jobs, scaled(500), "real model");
    assert!(counts["evictions"].as_u64() > Some(20), "{counts}");
}
