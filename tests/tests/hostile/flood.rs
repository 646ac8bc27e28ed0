//! Ten thousand requests of one tenant: a full queue says so at once, whoever else comes is served, and what was
//! accepted is answered (RELIABILITY L6).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::json;
use shared::clock::{Clock, SystemClock};
use tests::operator;
use tests::process::{NodeProcess, NodeSpec, scratch};

use super::assert_serves;

const REQUESTS: usize = 10_000;
const CLIENTS: usize = 160;

#[derive(Default)]
struct Seen {
    answered: AtomicUsize,
    refused: AtomicUsize,
    refusals: Mutex<Vec<Duration>>,
}

fn percentile(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * share) as usize]
}

fn flood(node: &NodeProcess, key: &str) -> Seen {
    let (seen, next) = (Seen::default(), AtomicUsize::new(0));
    let body = json!({"model": "tiny", "prompt": "once upon a time", "max_tokens": 48, "ignore_eos": true}).to_string();
    thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                let agent = operator::agent();
                while next.fetch_add(1, Ordering::Relaxed) < REQUESTS {
                    let started = SystemClock.now();
                    let answer = operator::post(&agent, node, "/v1/completions", key, &body);
                    match answer.status {
                        200 => {
                            assert_eq!(answer.body["usage"]["completion_tokens"], 48);
                            seen.answered.fetch_add(1, Ordering::Relaxed);
                        }
                        429 => {
                            assert_eq!(answer.code(), "queue_full", "{}", answer.text);
                            let wait = answer.header("retry-after").and_then(|wait| wait.parse::<u64>().ok());
                            assert!(wait.is_some_and(|wait| wait >= 1), "{:?}", answer.headers);
                            assert!(answer.header("x-ratelimit-limit-requests").is_some(), "{:?}", answer.headers);
                            seen.refused.fetch_add(1, Ordering::Relaxed);
                            seen.refusals.lock().expect("no panic").push(started.elapsed());
                        }
                        other => panic!("{other}: {}", answer.text),
                    }
                }
            });
        }
    });
    seen
}

#[test]
fn a_flood_of_ten_thousand_is_refused_at_once_and_loses_nothing() {
    let folder = scratch("flood");
    // Rates out of the way; the depth of the queue is the default, 64.
    let rates =
        "[tiers.shared]\nrequests_per_minute = 1000000\ntokens_per_minute = 1000000000\nburst_requests = 1000000\n";
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(rates));
    let (key, neighbour) = (operator::tenant(&node, "flood", &json!({})), operator::tenant(&node, "other", &json!({})));
    assert_serves(&node, &neighbour);
    let before = node.resident_bytes();
    let (over, peak) = (AtomicBool::new(false), AtomicUsize::new(0));
    let started = SystemClock.now();
    let (seen, mut others) = thread::scope(|scope| {
        let other = scope.spawn(|| {
            let (agent, mut times) = (operator::agent(), Vec::new());
            let body = json!({"model": "tiny", "prompt": "hello", "max_tokens": 8, "ignore_eos": true}).to_string();
            while !over.load(Ordering::Relaxed) {
                let started = SystemClock.now();
                let answer = operator::post(&agent, &node, "/v1/completions", &neighbour, &body);
                assert_eq!(answer.status, 200, "the neighbour is served: {}", answer.text);
                times.push(started.elapsed());
                peak.fetch_max(node.resident_bytes() as usize, Ordering::Relaxed);
            }
            times
        });
        let seen = flood(&node, &key);
        over.store(true, Ordering::Relaxed);
        (seen, other.join().expect("the neighbour is served"))
    });
    let (answered, refused) = (seen.answered.into_inner(), seen.refused.into_inner());
    let mut refusals = seen.refusals.into_inner().expect("no panic");
    let grown = (peak.into_inner() as u64).saturating_sub(before);
    println!(
        "flood: {answered} answered, {refused} refused in {:?}; refusals p50 {:?} p99 {:?}; neighbour {} served, p50 {:?} p99 {:?}; memory +{} MiB at its peak",
        started.elapsed(),
        percentile(&mut refusals, 0.5),
        percentile(&mut refusals, 0.99),
        others.len(),
        percentile(&mut others, 0.5),
        percentile(&mut others, 0.99),
        grown >> 20
    );
    assert_eq!(answered + refused, REQUESTS, "every request got its answer");
    assert!(refused > REQUESTS / 4 && answered > 72, "{answered} {refused}");
    assert!(!others.is_empty());
    assert!(grown < 200 << 20, "{grown} bytes");

    thread::sleep(Duration::from_millis(300));
    let status = operator::base_status(&node);
    assert_eq!((&status["queue"]["waiting"], &status["engine"]["sequences_running"]), (&json!(0), &json!(0)));
    let records = node.usage();
    let of_flood: Vec<_> = records.iter().filter(|record| record["tenant"] == "flood").collect();
    assert_eq!(of_flood.len(), answered, "one usage record for each accepted request, none for a refused one");
    assert!(of_flood.iter().all(|record| record["delivered"] == json!([48])));
    assert_serves(&node, &key);
}
