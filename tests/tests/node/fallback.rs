//! When the base may stand in for an adapter, and how everybody can see that it did.

use std::path::{Path, PathBuf};

use model::info::Linear;
use serde_json::{Value, json};
use tests::operator::{install, tenant};
use tests::process::{Answer, NodeProcess, NodeSpec, scratch};
use tests::tiny;

fn ask(node: &NodeProcess, key: &str, model: &str, stream: bool) -> Answer {
    let body = json!({"model": model, "prompt": "hello", "max_tokens": 4, "temperature": 0, "ignore_eos": true, "stream": stream});
    node.post("/v1/completions", key, &body)
}

/// The first event of a stream that was read to its end.
fn first_event(answer: &Answer) -> Value {
    let line = answer.text.lines().find_map(|line| line.strip_prefix("data: ")).expect("a stream has events");
    serde_json::from_str(line).expect("an event is JSON")
}

/// The four signs of an answer by the base: header, body, metric and usage record.
fn assert_base_stood_in(node: &NodeProcess, tenant: &str, key: &str) {
    let whole = ask(node, key, "support", false);
    assert_eq!(whole.status, 200, "{}", whole.text);
    assert_eq!(whole.header("x-tenantry-fallback"), Some("base"));
    assert_eq!(whole.header("x-tenantry-adapter"), None, "no adapter answered");
    assert_eq!(whole.body["tenantry"], json!({"fallback": "base", "base": "tiny"}));
    let by_base = ask(node, key, "tiny", false);
    assert_eq!(by_base.header("x-tenantry-fallback"), None, "the base asked for by name is no fallback");
    assert!(by_base.body.get("tenantry").is_none());
    assert_eq!(whole.body["choices"][0]["text"], by_base.body["choices"][0]["text"]);

    let streamed = ask(node, key, "support", true);
    assert_eq!(streamed.status, 200, "{}", streamed.text);
    assert_eq!(streamed.header("x-tenantry-fallback"), Some("base"));
    assert_eq!(streamed.header("x-tenantry-adapter"), None, "no adapter answered");
    assert_eq!(first_event(&streamed)["tenantry"]["fallback"], "base", "{}", streamed.text);

    let chat =
        json!({"model": "support", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": true});
    let chat = node.post("/v1/chat/completions", key, &chat);
    assert_eq!(chat.header("x-tenantry-fallback"), Some("base"));
    assert_eq!(first_event(&chat)["tenantry"]["fallback"], "base", "{}", chat.text);

    let line = format!("tenantry_fallbacks_total{{tenant=\"{tenant}\",task=\"support\"}} 3");
    let metrics = settled(|| node.metrics(), |metrics| metrics.contains(&line));
    assert!(metrics.contains(&line), "{metrics}");
    let of_task = |record: &&Value| record["tenant"] == tenant && record["task"] == "support";
    let records = settled(|| node.usage(), |records| records.iter().filter(of_task).count() >= 3);
    let records: Vec<_> = records.iter().filter(of_task).collect();
    assert_eq!(records.len(), 3, "{records:?}");
    assert!(
        records.iter().all(|record| record["fell_back"] == true && record["adapter"].is_null()),
        "billed as what answered: {records:?}"
    );
}

/// Records and metrics follow an answer by a moment: looks again for up to two seconds.
fn settled<T>(mut look: impl FnMut() -> T, done: impl Fn(&T) -> bool) -> T {
    for _ in 0..40 {
        let seen = look();
        if done(&seen) {
            return seen;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    look()
}

#[test]
fn a_task_without_adapter_follows_its_contract() {
    let folder = scratch("fallback");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let strict = node.tenant("strict", &["--task", "support"]);
    let refused = ask(&node, &strict, "support", false);
    assert_eq!((refused.status, refused.code()), (409, "adapter_not_ready"), "{}", refused.text);
    assert_eq!(refused.header("x-should-retry"), Some("false"), "waiting brings no adapter");
    assert_eq!(ask(&node, &strict, "support", true).status, 409, "streams are refused the same way");

    let lenient = node.tenant("lenient", &["--task", "support", "--fallback", "base"]);
    assert_base_stood_in(&node, "lenient", &lenient);
    for name in ["suport", "lenient-support-tiny-v1.0.0", "strict-support-tiny-v1.0.0", "gpt-4o"] {
        let answer = ask(&node, &lenient, name, false);
        assert_eq!((answer.status, answer.code()), (404, "model_not_found"), "{name} is nobody's name");
    }
    assert!(node.usage().iter().all(|record| record["tenant"] == "lenient"), "refusals are not billed");
}

/// Every stored adapter object below `folder`.
fn objects(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a readable folder") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() { found.extend(objects(&path)) } else { found.push(path) }
    }
    found
}

#[test]
fn a_damaged_adapter_file_is_an_error_or_the_base_but_never_a_guess() {
    let folder = scratch("damaged");
    // Without an object store there is no second copy.
    let spec = NodeSpec::tiny(&folder.join("model")).with("[adapters]\nobjects = \"\"");
    let mut node = NodeProcess::start(&folder, &spec);
    let strict = tenant(&node, "strict", &json!({}));
    let lenient = tenant(&node, "lenient", &json!({"fallback": "base"}));
    for (seed, name) in [(1, "strict-support-tiny-v1.0.0"), (2, "lenient-support-tiny-v1.0.0")] {
        install(&node, name, &tiny::adapter(seed, 4, &Linear::ALL));
    }
    assert_eq!(ask(&node, &strict, "support", false).status, 200);
    let files = objects(&node.data().join("adapters/objects"));
    assert_eq!(files.len(), 2);
    for path in files {
        let mut bytes = std::fs::read(&path).expect("readable");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).expect("writable");
    }
    // Memory still holds the good copy; a new process has only the disk.
    node.kill_and_restart();
    for stream in [false, true] {
        let refused = ask(&node, &strict, "support", stream);
        assert_eq!((refused.status, refused.code()), (503, "adapter_unavailable"), "{}", refused.text);
        assert!(!refused.text.contains('/'), "no path of the node's disk: {}", refused.text);
    }
    assert_base_stood_in(&node, "lenient", &lenient);
    // An upload of the same content heals it at once, however often it failed before.
    install(&node, "strict-support-tiny-v1.0.1", &tiny::adapter(1, 4, &Linear::ALL));
    let healed = ask(&node, &strict, "support", false);
    assert_eq!(healed.status, 200, "{}", healed.text);
    assert_eq!(healed.header("x-tenantry-adapter"), Some("strict-support-tiny-v1.0.1"));
}
