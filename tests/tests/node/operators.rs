//! What operators do to tenants, keys and versions, and what clients then see.

use std::time::Duration;

use model::adapter::AdapterFiles;
use model::info::Linear;
use serde_json::json;
use tests::operator::{install, tenant, upload};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

fn status(node: &NodeProcess, key: &str) -> (u16, String) {
    let answer = node.post("/v1/completions", key, &json!({"model": "tiny", "prompt": "x", "max_tokens": 1}));
    (answer.status, answer.code().to_owned())
}

fn failed(node: &NodeProcess, words: &[&str]) -> String {
    let output = node.ctl_output(words);
    assert!(!output.status.success(), "ctl {words:?} should be refused");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn keys_come_expire_and_go_one_by_one() {
    let folder = scratch("keys");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let first = node.tenant("acme", &[]);
    let second = node.ctl(&["key", "add", "acme"]);
    let second_key = second["key"].as_str().expect("a key");
    let brief = node.ctl(&["key", "add", "acme", "--expires-in-s", "2"]);
    let brief_key = brief["key"].as_str().expect("a key");
    for key in [first.as_str(), second_key, brief_key] {
        assert_eq!(status(&node, key).0, 200);
    }
    let listed = node.ctl(&["key", "list", "acme"]);
    assert_eq!(listed.as_array().map(Vec::len), Some(3), "{listed}");
    for key in [first.as_str(), second_key, brief_key] {
        assert!(!listed.to_string().contains(key), "a list shows no secret");
    }
    node.ctl(&["key", "revoke", "acme", second["id"].as_str().expect("an id")]);
    assert_eq!(status(&node, second_key), (401, "invalid_api_key".to_owned()));
    assert_eq!(status(&node, &first).0, 200, "the other keys stay");
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(status(&node, brief_key), (401, "invalid_api_key".to_owned()), "two seconds are over");
    assert_eq!(status(&node, &first).0, 200);
    let text = failed(&node, &["key", "revoke", "acme", "nothing"]);
    assert!(text.contains("no such key"), "{text}");
    for key in [first.as_str(), second_key, brief_key] {
        assert!(!node.log().contains(key), "a log shows no secret");
    }
}

#[test]
fn tenants_are_changed_suspended_resumed_and_deleted() {
    let folder = scratch("tenants");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let key = node.tenant("acme", &[]);
    let bystander = node.tenant("other", &[]);
    let text = failed(&node, &["tenant", "create", "acme"]);
    assert!(text.contains("409") && text.contains("acme"), "{text}");

    let before = node.ctl(&["tenant", "show", "acme"]);
    let after = node.ctl(&["tenant", "set", "acme", "--tier", "premium", "--weight", "7", "--concurrency", "3"]);
    assert_eq!((&after["tier"], &after["weight"]), (&json!("premium"), &json!(7)));
    assert_eq!(after["limits"]["concurrency"], 3);
    assert_eq!(after["limits"]["queue_depth"], before["limits"]["queue_depth"], "what is left out stays");
    let epoch = before["epoch"].to_string();
    let text = failed(&node, &["tenant", "set", "acme", "--weight", "8", "--expected-epoch", &epoch]);
    assert!(text.contains("409"), "somebody changed it meanwhile: {text}");
    let text = failed(&node, &["tenant", "set", "acme", "--weight", "0"]);
    assert!(text.contains("weight"), "{text}");

    node.ctl(&["tenant", "suspend", "acme"]);
    assert_eq!(status(&node, &key), (403, "tenant_suspended".to_owned()));
    node.ctl(&["tenant", "resume", "acme"]);
    assert_eq!(status(&node, &key).0, 200);

    install(&node, "acme-support-tiny-v1.0.0", &tiny::adapter(1, 4, &Linear::ALL));
    assert!(failed(&node, &["tenant", "delete", "acme"]).contains("--yes"));
    node.ctl(&["tenant", "delete", "acme", "--yes"]);
    assert_eq!(status(&node, &key), (401, "invalid_api_key".to_owned()));
    assert!(failed(&node, &["tenant", "show", "acme"]).contains("404"));
    assert_eq!(status(&node, &bystander).0, 200);
    let objects = node.data().join("adapters/objects");
    let n_left: usize = std::fs::read_dir(objects)
        .expect("a store")
        .map(|entry| std::fs::read_dir(entry.expect("an entry").path()).map_or(0, Iterator::count))
        .sum();
    assert_eq!(n_left, 0, "its adapter files are gone");
    let listed = node.ctl(&["tenant", "list"]);
    assert_eq!(listed["tenants"].as_array().map(Vec::len), Some(1), "{listed}");
}

#[test]
fn a_version_never_changes_its_content() {
    let folder = scratch("versions");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let key = tenant(&node, "acme", &json!({}));
    let name = "acme-support-tiny-v1.0.0";
    install(&node, name, &tiny::adapter(1, 4, &Linear::ALL));
    let before = node.complete(&key, "support", "hello", 8);
    let again = upload(&node, name, &tiny::adapter(1, 4, &Linear::ALL));
    assert!(again.status == 201 || again.status == 200, "the same content again is no change: {}", again.text);
    let other = upload(&node, name, &tiny::adapter(2, 4, &Linear::ALL));
    assert_eq!(other.status, 409, "{}", other.text);
    assert!(other.body["error"]["message"].as_str().is_some_and(|text| text.contains(name)), "{}", other.text);
    assert_eq!(node.complete(&key, "support", "hello", 8), before);
    // A version that a task points at cannot be pulled away from under it.
    assert!(failed(&node, &["adapter", "remove", name]).contains("409"));
    node.ctl(&["task", "clear", "acme", "support"]);
    node.ctl(&["adapter", "remove", name]);
    assert_eq!(node.post("/v1/completions", &key, &json!({"model": name, "prompt": "x"})).status, 404);
    // Gone is gone: the name stays spent.
    let reused = upload(&node, name, &tiny::adapter(2, 4, &Linear::ALL));
    assert_eq!(reused.status, 409, "{}", reused.text);
}

#[test]
fn a_tree_of_adapters_is_imported_with_its_tenants() {
    let folder = scratch("import");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let tree = folder.join("adapters");
    let put = |tenant: &str, seed: u64| {
        let AdapterFiles::Peft { config, weights } = tiny::adapter(seed, 4, &Linear::ALL) else {
            panic!("generated adapters are PEFT files")
        };
        let dir = tree.join(tenant);
        std::fs::create_dir_all(&dir).expect("made");
        std::fs::write(dir.join("adapter_config.json"), config).expect("written");
        std::fs::write(dir.join("adapter_model.safetensors"), weights).expect("written");
    };
    put("acme", 1);
    put("baker", 2);
    let (tree, keys) = (tree.display().to_string(), folder.join("keys"));
    let acme = node.tenant("acme", &[]);
    let words = ["adapter", "import", &tree, "--task", "support", "--base", "tiny"];
    let output = node.ctl_output(&words);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!output.status.success() && said.contains("imported: acme-support-tiny-v1.0.0"), "{said}");
    assert!(said.contains("failed: baker") && said.contains("--create-with-keys-in"), "{said}");

    std::fs::write(folder.join("adapters/README"), "not a tenant").expect("written");
    let in_keys = keys.display().to_string();
    let output = node.ctl_output(&[&words[..], &["--create-with-keys-in", &in_keys]].concat());
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(said.contains("imported: acme-support-tiny-v1.0.0"), "the same content again is no change: {said}");
    assert!(said.contains("imported: baker-support-tiny-v1.0.0") && said.contains("skipped: "), "{said}");
    let baker = std::fs::read_to_string(keys.join("baker.key")).expect("a key file");
    assert_ne!(node.complete(&acme, "support", "hello", 8), node.complete(baker.trim(), "support", "hello", 8));
}
