//! A task that changes its version under load: every answer is one version's or the other's, never a mix.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use model::info::Linear;
use serde_json::json;
use shared::clock::{Clock, SystemClock};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch, token_ids};
use tests::tiny;

#[test]
fn a_request_finishes_on_the_version_it_started_with() {
    let folder = scratch("versions");
    let spec = NodeSpec::tiny(&folder.join("model")).with(&format!("[adapters]\nslots = 1\n{GENEROUS}"));
    let node = NodeProcess::start(&folder, &spec);
    let key = operator::tenant(&node, "acme", &json!({}));
    let versions = ["acme-t-tiny-v1.0.0", "acme-t-tiny-v1.0.1"];
    operator::install(&node, versions[0], &tiny::adapter(1, 8, &Linear::ALL));
    let again = operator::upload(&node, versions[0], &tiny::adapter(2, 8, &Linear::ALL));
    assert_eq!(again.status, 409, "a version never changes its content: {}", again.text);
    operator::install(&node, versions[1], &tiny::adapter(2, 8, &Linear::ALL));
    let body = |model: &str| {
        json!({"model": model, "prompt": "the story of the day and the night that follows it", "max_tokens": 24,
               "temperature": 0, "ignore_eos": true, "return_token_ids": true})
        .to_string()
    };
    let agent = operator::agent();
    let alone = versions.map(|version| {
        let answer = operator::post(&agent, &node, "/v1/completions", &key, &body(version));
        token_ids(&answer.body["choices"][0])
    });
    assert_ne!(alone[0], alone[1]);

    let (over, n_answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let seen: BTreeSet<usize> = thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let (agent, mut seen) = (operator::agent(), BTreeSet::new());
                    while !over.load(Ordering::Relaxed) {
                        let answer = operator::post(&agent, &node, "/v1/completions", &key, &body("t"));
                        assert_eq!(answer.status, 200, "{}", answer.text);
                        let served = answer.header("x-tenantry-adapter").expect("an adapter served it");
                        let version = versions.iter().position(|name| *name == served).expect("a known version");
                        assert_eq!(token_ids(&answer.body["choices"][0]), alone[version], "{served}");
                        seen.insert(version);
                        n_answers.fetch_add(1, Ordering::Relaxed);
                    }
                    seen
                })
            })
            .collect();
        for flip in 0..60 {
            operator::point(&node, versions[flip % 2]);
            thread::sleep(Duration::from_millis(30));
        }
        over.store(true, Ordering::Relaxed);
        clients.into_iter().flat_map(|client| client.join().expect("answers hold")).collect()
    });
    println!("{} answers over 60 changes of version", n_answers.load(Ordering::Relaxed));
    assert_eq!(seen, BTreeSet::from([0, 1]), "both versions served");
    assert!(n_answers.load(Ordering::Relaxed) > 60);
}

#[test]
fn what_a_tenant_deletes_is_not_taken_from_another_with_the_same_files() {
    let folder = scratch("twins");
    let spec = NodeSpec::tiny(&folder.join("model")).with(&format!("[adapters]\nslots = 2\n{GENEROUS}"));
    let node = NodeProcess::start(&folder, &spec);
    let twin = tiny::adapter(3, 8, &Linear::ALL);
    let (left, right) = (operator::tenant(&node, "left", &json!({})), operator::tenant(&node, "right", &json!({})));
    operator::install(&node, "right-t-tiny-v1.0.0", &twin);
    let alone = node.complete(&right, "t", "same question", 12);

    let (over, n_answers) = (AtomicBool::new(false), AtomicUsize::new(0));
    let body = json!({"model": "t", "prompt": "same question", "max_tokens": 12, "temperature": 0, "ignore_eos": true,
                      "return_token_ids": true})
    .to_string();
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                let agent = operator::agent();
                while !over.load(Ordering::Relaxed) {
                    let started = SystemClock.now();
                    let answer = operator::post(&agent, &node, "/v1/completions", &right, &body);
                    assert_eq!(answer.status, 200, "{}", answer.text);
                    assert_eq!(token_ids(&answer.body["choices"][0]), alone);
                    assert!(started.elapsed() < Duration::from_secs(3), "it waited {:?}", started.elapsed());
                    n_answers.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        // The other tenant uses the same bytes and throws them away again, version by version.
        for i in 0..40 {
            let name = format!("left-t-tiny-v1.0.{i}");
            assert_eq!(operator::upload(&node, &name, &twin).status, 201);
            if i % 2 == 0 {
                assert_eq!(node.complete(&left, &name, "same question", 12), alone);
            }
            let removed = node.admin("DELETE", &format!("/admin/v1/tenants/left/adapters/{name}"), "");
            assert_eq!(removed.status, 200, "{}", removed.text);
        }
        operator::install(&node, "left-t-tiny-v2.0.0", &twin);
        assert_eq!(node.complete(&left, "t", "same question", 12), alone);
        assert_eq!(node.admin("DELETE", "/admin/v1/tenants/left", "").status, 200);
        thread::sleep(Duration::from_millis(200));
        over.store(true, Ordering::Relaxed);
    });
    println!("{} answers while a twin was deleted 41 times", n_answers.load(Ordering::Relaxed));
    assert_eq!(operator::base_status(&node)["adapters"]["failures"], 0);
    assert_eq!(node.get("/v1/models", &left).status, 401);
}
