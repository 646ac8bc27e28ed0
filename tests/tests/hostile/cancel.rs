//! A thousand clients that start and go away: all they held comes back at once (RELIABILITY L10).

use std::io::Read;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use model::info::Linear;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny::{self, Random};

use super::{assert_serves, scaled};

fn held(node: &NodeProcess) -> [Value; 5] {
    let status = operator::base_status(node);
    [
        status["engine"]["sequences_running"].clone(),
        status["engine"]["sequences_preempted"].clone(),
        status["engine"]["kv_pages_used"].clone(),
        status["queue"]["waiting"].clone(),
        status["adapters"]["leased"].clone(),
    ]
}

fn body(i: usize, stream: bool) -> String {
    let prompt = "tell me a long story ".repeat(1 + i % 20);
    json!({"model": if i.is_multiple_of(3) { "tiny" } else { "t" }, "prompt": prompt, "max_tokens": 400, "ignore_eos": true,
           "n": 1 + i % 3, "stream": stream})
    .to_string()
}

#[test]
fn a_thousand_clients_that_go_away_leave_nothing_behind() {
    let folder = scratch("cancel");
    let tables = format!("[adapters]\nslots = 2\n{GENEROUS}concurrency = 64\n");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(&tables));
    let keys: Vec<String> = (0..6)
        .map(|i| {
            let key = operator::tenant(&node, &format!("t{i}"), &json!({}));
            operator::install(&node, &format!("t{i}-t-tiny-v1.0.0"), &tiny::adapter(i, 8, &Linear::ALL));
            key
        })
        .collect();
    let nothing = held(&node);
    assert!(nothing.iter().all(|count| *count == 0), "{nothing:?}");

    let (next, n) = (AtomicUsize::new(0), scaled(1000));
    thread::scope(|scope| {
        for client in 0..24 {
            let (next, keys, node) = (&next, &keys, &node);
            scope.spawn(move || {
                let mut random = Random::new(client);
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    if i >= n {
                        break;
                    }
                    let stream = !i.is_multiple_of(4);
                    let key = &keys[random.below(keys.len())];
                    let mut socket = operator::start(node.http(), "/v1/completions", key, &body(i, stream));
                    thread::sleep(Duration::from_micros(1000 + random.below(19_000) as u64));
                    if stream && random.below(2) == 0 {
                        // Has read something before it goes.
                        socket.set_read_timeout(Some(Duration::from_millis(5))).expect("a timeout");
                        let _ = socket.read(&mut [0; 512]);
                    }
                }
            });
        }
    });
    let gone = SystemClock.now();
    let mut last = held(&node);
    while last != nothing {
        assert!(gone.elapsed() < Duration::from_secs(1), "still held a second later: {last:?}");
        thread::sleep(Duration::from_millis(10));
        last = held(&node);
    }
    println!("cancel storm: everything back after {:?}", gone.elapsed());

    // As many pages as ever can be used: a leak of any would show here, and the node still answers everyone.
    for key in &keys {
        assert_eq!(node.complete(key, "t", "hello", 4).len(), 4);
    }
    assert_eq!(held(&node), nothing);
    thread::sleep(Duration::from_millis(300));
    let records = node.usage();
    let cancelled = records.iter().filter(|record| record["outcome"] == "cancelled").count();
    println!("{} usage records, {cancelled} cancelled", records.len());
    assert!(cancelled > n / 2, "clients that went away are accounted for: {cancelled}");
    assert_serves(&node, &keys[0]);
}
