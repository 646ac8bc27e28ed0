//! What a key's end means, and that no secret is ever written down (RELIABILITY S6, S7, E4).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use model::adapter::AdapterFiles;
use model::info::Linear;
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

fn node(name: &str) -> NodeProcess {
    let folder = scratch(name);
    NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS))
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { found.extend(files_below(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn a_revoked_key_is_refused_within_a_second_and_others_go_on() {
    let node = node("revoke");
    let first = operator::tenant(&node, "acme", &json!({}));
    let second = node.admin("POST", "/admin/v1/tenants/acme/keys", "{}");
    assert_eq!(second.status, 201, "{}", second.text);
    let second = second.body["key"].as_str().expect("a key").to_owned();
    for key in [&first, &second] {
        assert_eq!(node.get("/v1/models", key).status, 200);
    }
    let id = first.split('_').nth(1).expect("a key names its id");
    let revoked = node.admin("DELETE", &format!("/admin/v1/tenants/acme/keys/{id}"), "");
    assert_eq!(revoked.status, 200, "{}", revoked.text);
    let started = SystemClock.now();
    while node.get("/v1/models", &first).status == 200 {
        assert!(started.elapsed() < Duration::from_secs(1), "the key still works");
    }
    let answer = node.get("/v1/models", &first);
    assert_eq!((answer.status, answer.code()), (401, "invalid_api_key"));
    let guess = |id: &str| node.get("/v1/models", &format!("tnt_{id}_{}", "B".repeat(43))).text;
    assert_eq!(guess(id), guess("0123456789abcdef"), "only its holder learns that a key was revoked");
    assert_eq!(node.get("/v1/models", &second).status, 200);

    let brief = node.admin("POST", "/admin/v1/tenants/acme/keys", "{\"expires_in_s\": 1}");
    let brief = brief.body["key"].as_str().expect("a key").to_owned();
    thread::sleep(Duration::from_millis(2100));
    assert_eq!(node.get("/v1/models", &brief).status, 401, "an expired key");
}

#[test]
fn a_key_with_any_character_changed_is_refused() {
    let node = node("mutants");
    let key = operator::tenant(&node, "acme", &json!({}));
    let agent = operator::agent();
    let status = |key: &str| {
        let request = agent.get(format!("{}/v1/models", node.url())).header("authorization", format!("Bearer {key}"));
        request.call().expect("the node answers").status().as_u16()
    };
    assert_eq!(status(&key), 200);
    for place in 0..key.len() {
        let mut bytes = key.clone().into_bytes();
        bytes[place] = if bytes[place] == b'A' { b'B' } else { b'A' };
        let mutant = String::from_utf8(bytes).expect("ASCII");
        assert_eq!(status(&mutant), 401, "{place}");
        assert_eq!(status(&key[..place]), 401, "the first {place} characters");
    }
    for key in [format!("{key}A"), format!("{key}="), key.to_uppercase(), key.replace('_', "-"), key.repeat(2)] {
        assert_eq!(status(&key), 401);
    }
}

#[test]
fn a_suspended_tenant_gets_403_until_it_is_resumed() {
    let node = node("suspend");
    let key = operator::tenant(&node, "acme", &json!({}));
    let body = json!({"model": "tiny", "prompt": "hi", "max_tokens": 1});
    assert_eq!(node.post("/v1/completions", &key, &body).status, 200);
    assert_eq!(node.admin("POST", "/admin/v1/tenants/acme/suspend", "").status, 200);
    let chat =
        json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "stream": true});
    for answer in [node.post("/v1/completions", &key, &body), node.post("/v1/chat/completions", &key, &chat)] {
        assert_eq!((answer.status, answer.code()), (403, "tenant_suspended"), "{}", answer.text);
    }
    assert_eq!(node.admin("POST", "/admin/v1/tenants/acme/resume", "").status, 200);
    assert_eq!(node.post("/v1/completions", &key, &body).status, 200);
}

#[test]
fn a_deleted_tenant_leaves_nothing_and_its_successor_sees_nothing() {
    let node = node("erase");
    let bystander = operator::tenant(&node, "other", &json!({}));
    operator::install(&node, "other-t-tiny-v1.0.0", &tiny::adapter(8, 4, &Linear::ALL));
    let kept: BTreeSet<PathBuf> = files_below(&node.data().join("adapters")).into_iter().collect();
    let key = operator::tenant(&node, "acme", &json!({}));
    for (seed, name) in [(1, "acme-t-tiny-v1.0.0"), (2, "acme-t-tiny-v1.0.1"), (3, "acme-u-tiny-v1.0.0")] {
        operator::install(&node, name, &tiny::adapter(seed, 4, &Linear::ALL));
    }
    let answer = node.complete(&key, "acme-t-tiny-v1.0.0", "who is there", 8);
    assert!(files_below(&node.data().join("adapters")).len() >= kept.len() + 3);

    let deleted = node.admin("DELETE", "/admin/v1/tenants/acme", "");
    assert_eq!(deleted.status, 200, "{}", deleted.text);
    let refused = node.get("/v1/models", &key);
    assert_eq!((refused.status, refused.code()), (401, "invalid_api_key"));
    let left: BTreeSet<PathBuf> = files_below(&node.data().join("adapters")).into_iter().collect();
    assert_eq!(left, kept, "its adapter objects are gone");
    assert_eq!(node.admin("GET", "/admin/v1/tenants/acme", "").status, 404);

    let successor = operator::tenant(&node, "acme", &json!({}));
    assert_eq!(node.get("/v1/models", &key).status, 401, "the old key stays dead");
    let models = node.get("/v1/models", &successor);
    let ids: Vec<&Value> = models.body["data"].as_array().expect("a list").iter().map(|card| &card["id"]).collect();
    assert_eq!(ids, ["tiny"]);
    for name in ["t", "u", "acme-t-tiny-v1.0.0"] {
        let body = json!({"model": name, "prompt": "hi", "max_tokens": 1});
        assert_eq!(node.post("/v1/completions", &successor, &body).status, 404, "{name}");
    }
    // Its prompts are not in a cache that the successor can hit: the same prompt again is a first one.
    operator::install(&node, "acme-t-tiny-v1.0.0", &tiny::adapter(1, 4, &Linear::ALL));
    let hits = |node: &NodeProcess| operator::base_status(node)["engine"]["prefix_hits"].as_u64().expect("a count");
    let long = "a question that fills several pages of the cache, so that a second one like it is a hit for sure";
    let before = hits(&node);
    node.complete(&bystander, "t", long, 1);
    assert_eq!(node.complete(&successor, "t", "who is there", 8), answer, "same weights, same answer");
    node.complete(&successor, "t", long, 1);
    assert_eq!(hits(&node), before, "another tenant's prompt is not a hit");
    node.complete(&successor, "t", long, 1);
    assert!(hits(&node) > before, "one's own is");
}

#[test]
fn secrets_prompts_and_answers_are_written_nowhere() {
    const CANARY: &str = "zanzibar-quetzal-7741";
    let node = node("canary");
    let key = operator::tenant(&node, "acme", &json!({}));
    operator::install(&node, "acme-t-tiny-v1.0.0", &tiny::adapter(4, 4, &Linear::ALL));
    let AdapterFiles::Peft { weights, .. } = tiny::adapter(4, 4, &Linear::ALL) else { unreachable!() };
    let spoken = [
        ("/v1/completions", json!({"model": "t", "prompt": CANARY, "max_tokens": 4, "echo": true})),
        (
            "/v1/chat/completions",
            json!({"model": "t", "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}),
        ),
        (
            "/v1/chat/completions",
            json!({"model": "t", "stream": true, "messages": [{"role": "user", "content": CANARY}], "max_tokens": 4}),
        ),
        // Refusals are where prompts like to end up in logs.
        ("/v1/completions", json!({"model": CANARY, "prompt": "x", "max_tokens": 4})),
        ("/v1/completions", json!({"model": "t", "prompt": CANARY, "max_tokens": 10_000_000})),
        ("/v1/completions", json!({"model": "t", "prompt": CANARY, "max_tokens": 900, "stop": CANARY, CANARY: 1})),
        ("/v1/completions", json!({"model": "t", "prompt": "x", "tenant": CANARY})),
        ("/v1/chat/completions", json!({"model": "t", "messages": [{"role": CANARY, "content": CANARY}]})),
        (
            "/v1/chat/completions",
            json!({"model": "t", "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": CANARY, "type": CANARY}}}}),
        ),
    ];
    for (path, body) in &spoken {
        node.post(path, &key, body);
    }
    node.post_bytes("/v1/completions", &key, format!("{{\"prompt\": \"{CANARY}\",").as_bytes());
    node.post("/v1/completions", &format!("{key}x"), &spoken[0].1);
    node.admin("GET", &format!("/admin/v1/tenants/{CANARY}"), "");
    let admin_key = node.admin_key();
    thread::sleep(Duration::from_millis(300));

    // The last characters of a key are its secret's.
    let secret = &key[key.len() - 43..];
    let admin_secret = &admin_key[admin_key.len() - 43..];
    // 64 bytes of the weights: files at rest are sealed.
    let weights = &weights[weights.len() - 64..];
    let needles: [(&str, &[u8]); 5] = [
        ("the key", key.as_bytes()),
        ("the key's secret", &secret.as_bytes()[..24]),
        ("the admin key's secret", &admin_secret.as_bytes()[..24]),
        ("the prompt", CANARY.as_bytes()),
        ("the adapter's weights", weights),
    ];
    let mut places = vec![
        ("node.log".to_owned(), node.log().into_bytes()),
        ("/metrics".to_owned(), node.metrics().into_bytes()),
        ("/admin/v1/status".to_owned(), node.admin("GET", "/admin/v1/status", "").text.into_bytes()),
        ("/admin/v1/tenants".to_owned(), node.admin("GET", "/admin/v1/tenants", "").text.into_bytes()),
    ];
    for path in files_below(&node.data()) {
        if path.file_name().is_some_and(|name| name == "admin.key") {
            continue;
        }
        places.push((path.display().to_string(), fs::read(&path).expect("a readable file")));
    }
    assert!(places.len() > 7, "registry, journal and objects were looked at: {}", places.len());
    for (place, content) in &places {
        for (what, needle) in &needles {
            let found = content.windows(needle.len()).any(|window| window == *needle);
            assert!(!found, "{what} is in {place}");
        }
    }
    println!("{} places, {} bytes searched", places.len(), places.iter().map(|(_, bytes)| bytes.len()).sum::<usize>());
}
