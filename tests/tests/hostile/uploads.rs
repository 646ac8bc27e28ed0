//! Adapter uploads that are broken, oversized or misnamed, over the admin port: refused with the code that says
//! why, and the node neither dies nor grows (RELIABILITY B10-B13).

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use model::adapter::AdapterFiles;
use model::info::Linear;
use serde_json::json;
use shared::clock::{Clock, SystemClock};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch};
use tests::tiny;

use super::assert_serves;

/// The parts of an upload of a case; a file that the case lacks is not sent.
fn parts(case: &str) -> Vec<(&'static str, Vec<u8>)> {
    let folder = tests::data("bad").join(case);
    let shares_weights = case.starts_with("cfg_") || case.starts_with("ok_");
    let weights =
        if shares_weights { tests::data("bad/valid.safetensors") } else { folder.join("adapter_model.safetensors") };
    [("config", folder.join("adapter_config.json")), ("weights", weights)]
        .into_iter()
        .filter_map(|(part, path)| Some((part, fs::read(path).ok()?)))
        .collect()
}

#[test]
fn every_malformed_adapter_is_refused_over_the_admin_port_with_a_code() {
    let folder = scratch("malformed");
    let node = NodeProcess::start(&folder, &NodeSpec::real().with(GENEROUS));
    let key = operator::tenant(&node, "acme", &json!({}));
    let expected = fs::read_to_string(tests::data("bad/EXPECT.json")).expect("the collection");
    let expected: BTreeMap<String, String> = serde_json::from_str(&expected).expect("JSON");
    let codes = ["invalid_lora_adapter", "unsupported_lora_feature", "lora_base_mismatch", "lora_rank_limit_exceeded"];
    let before = node.resident_bytes();
    let mut accepted = Vec::new();
    for (i, (case, expectation)) in expected.iter().enumerate() {
        let parts = parts(case);
        let borrowed: Vec<(&str, &[u8])> = parts.iter().map(|(name, bytes)| (*name, bytes.as_slice())).collect();
        let path = format!("/admin/v1/tenants/acme/adapters/acme-bad-smollm2-v1.0.{i}");
        let started = SystemClock.now();
        let answer = operator::form(&node, &path, &borrowed);
        assert!(started.elapsed() < Duration::from_secs(2), "{case} took {:?}", started.elapsed());
        let is_open = expectation.contains(" or ");
        if answer.status == 201 {
            assert!(is_open || expectation.starts_with("accept"), "{case} was accepted: {expectation}");
            accepted.push(case.as_str());
            continue;
        }
        assert!(is_open || expectation.starts_with("reject"), "{case}: {}", answer.text);
        assert!((400..500).contains(&answer.status), "{case}: {} {}", answer.status, answer.text);
        // Without one of its files it is not even an upload.
        let known = if parts.len() == 2 { &codes[..] } else { &["invalid_body"] };
        assert!(known.contains(&answer.code()), "{case}: {}", answer.text);
    }
    let grown = node.resident_bytes().saturating_sub(before);
    println!("{} cases, accepted {accepted:?}, memory +{} MiB", expected.len(), grown >> 20);
    assert!(accepted.contains(&"ok_control"), "the collection's control is fine: {accepted:?}");
    assert!(grown < 64 << 20, "{grown} bytes");
    let shown = node.admin("GET", "/admin/v1/tenants/acme", "").body;
    assert_eq!(
        shown["adapters"].as_array().map(Vec::len),
        Some(accepted.len()),
        "only what was accepted is registered"
    );
    let body = json!({"model": "smollm2", "prompt": "hi", "max_tokens": 1});
    assert_eq!(node.post("/v1/completions", &key, &body).status, 200);
    assert!(!node.log().contains("panicked"), "{}", node.log());
}

#[test]
fn an_upload_takes_no_more_memory_than_its_file() {
    const FILE_BYTES: usize = 100 << 20;
    let folder = scratch("large");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS));
    operator::tenant(&node, "acme", &json!({}));
    let AdapterFiles::Peft { config, .. } = tiny::adapter(1, 2, &Linear::ALL) else { unreachable!() };
    // A header that fits its file; the tensor in it is no LoRA tensor, which the check notices after all is read.
    let header = format!(r#"{{"x":{{"dtype":"F32","shape":[{},1],"data_offsets":[0,{FILE_BYTES}]}}}}"#, FILE_BYTES / 4);
    let weights = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; FILE_BYTES]].concat();
    node.forget_peak();
    let before = node.peak_bytes();
    for (parts, bytes) in [
        (&[("config", config.as_slice()), ("weights", &weights)][..], weights.len()),
        (&[("weights", weights.as_slice()), ("config", &config)], weights.len()),
        (&[("gguf", weights.as_slice())], weights.len()),
        // Never checked, so never in memory as a whole.
        (&[("weights", weights.as_slice()), ("other", &config)], 0),
    ] {
        node.forget_peak();
        let answer = operator::form(&node, "/admin/v1/tenants/acme/adapters/acme-big-tiny-v1.0.0", parts);
        assert!((400..500).contains(&answer.status), "{} {}", answer.status, answer.text);
        let grown = node.peak_bytes().saturating_sub(before);
        println!("{} with parts of {bytes} bytes: peak +{} KiB", answer.code(), grown >> 10);
        assert!(grown <= bytes as u64 + (16 << 20), "{grown} bytes for a file of {bytes}");
    }
    assert_eq!(fs::read_dir(node.data().join("adapters/tmp")).expect("listed").count(), 0);
    assert_eq!(fs::read_dir(node.data().join("adapters/objects")).expect("listed").count(), 0);
}

/// Names that come and go with the same bytes under them: whatever is registered at the end can be served.
#[test]
fn bytes_survive_the_removal_of_another_name_for_them_at_the_same_time() {
    const ROUNDS: usize = 30;
    let folder = scratch("crossing");
    let mut node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with(GENEROUS));
    let key = operator::tenant(&node, "acme", &json!({}));
    let files = tiny::adapter(1, 2, &Linear::ALL);
    for round in 0..ROUNDS {
        let (old, new) = (format!("acme-chat-tiny-v1.0.{round}"), format!("acme-chat-tiny-v1.0.{}", round + 1));
        if round == 0 {
            assert_eq!(operator::upload(&node, &old, &files).status, 201);
        }
        let removed = std::thread::scope(|scope| {
            let upload = scope.spawn(|| operator::upload(&node, &new, &files));
            let removed = node.admin("DELETE", &format!("/admin/v1/tenants/acme/adapters/{old}"), "");
            assert_eq!(upload.join().expect("ended").status, 201);
            removed
        });
        assert_eq!(removed.status, 200, "{}", removed.text);
        let body = json!({"model": new, "prompt": "hi", "max_tokens": 1});
        let answer = node.post("/v1/completions", &key, &body);
        assert_eq!(answer.status, 200, "round {round}: {}", answer.text);
    }
    let objects = node.data().join("adapters/objects");
    let shards = || fs::read_dir(&objects).expect("listed").flatten().map(|shard| shard.path());
    let files = || shards().flat_map(|shard| fs::read_dir(shard).expect("listed").flatten().map(|file| file.path()));
    let found: Vec<_> = files().collect();
    assert_eq!(found.len(), 1, "one content, one file");
    // What a crash between two steps leaves is gone after the next start; what has a name is not.
    fs::copy(&found[0], found[0].with_file_name("0".repeat(64))).expect("copied");
    fs::write(node.data().join("adapters/tmp/7"), b"half").expect("written");
    node.kill_and_restart();
    assert_eq!(files().collect::<Vec<_>>(), found);
    assert_eq!(fs::read_dir(node.data().join("adapters/tmp")).expect("listed").count(), 0);
    let body = json!({"model": format!("acme-chat-tiny-v1.0.{ROUNDS}"), "prompt": "hi", "max_tokens": 1});
    assert_eq!(node.post("/v1/completions", &key, &body).status, 200);
}

#[test]
fn uploads_that_are_no_uploads_are_4xx_and_leave_no_file() {
    let folder = scratch("uploads");
    let spec = NodeSpec::tiny(&folder.join("model")).with(&format!("[adapters]\nfile_mib_max = 1\n{GENEROUS}"));
    let node = NodeProcess::start(&folder, &spec);
    let key = operator::tenant(&node, "acme", &json!({}));
    let AdapterFiles::Peft { config, weights } = tiny::adapter(1, 2, &Linear::ALL) else { unreachable!() };
    let good = "/admin/v1/tenants/acme/adapters/acme-t-tiny-v1.0.0";
    let objects = |node: &NodeProcess| walk(&node.data().join("adapters"));
    let before = objects(&node);
    type Parts<'a> = Vec<(&'a str, &'a [u8])>;
    let forms: Vec<(&str, Parts<'_>)> = vec![
        ("no parts", vec![]),
        ("config alone", vec![("config", &config)]),
        ("weights alone", vec![("weights", &weights)]),
        ("weights twice", vec![("config", &config), ("weights", &weights), ("weights", &weights)]),
        ("both kinds", vec![("config", &config), ("weights", &weights), ("gguf", b"GGUF")]),
        ("unknown part", vec![("../../etc/passwd", b"x")]),
        ("gguf of nothing", vec![("gguf", b"")]),
        (
            "gguf of noise",
            vec![("gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff")],
        ),
        ("swapped", vec![("config", &weights), ("weights", &config)]),
    ];
    for (what, parts) in &forms {
        let answer = operator::form(&node, good, parts);
        assert!((400..500).contains(&answer.status), "{what}: {} {}", answer.status, answer.text);
        assert!(!answer.code().is_empty(), "{what}: {}", answer.text);
    }
    let large = vec![0_u8; 3 << 20];
    // Beyond the limit the node stops reading, so a client that is still sending may see a cut connection.
    if let Some(answer) = operator::try_form(&node, good, &[("config", &config), ("weights", &large)]) {
        assert_eq!((answer.status, answer.code()), (413, "lora_byte_limit_exceeded"), "{}", answer.text);
    }
    let both: &[(&str, &[u8])] = &[("config", &config), ("weights", &weights)];
    for name in [
        "other-t-tiny-v1.0.0",
        "acme-t-tiny",
        "acme-t-tiny-v1",
        "..%2f..%2fescape-t-tiny-v1.0.0",
        "acme-t-absent-v1.0.0",
        "ACME-t-tiny-v1.0.0",
        "acme-t-tiny-v1.0.0%00",
        "acme-t-tiny-v99999999999.0.0",
        "acme--tiny-v1.0.0",
        "%2e%2e",
    ] {
        let answer = operator::form(&node, &format!("/admin/v1/tenants/acme/adapters/{name}"), both);
        assert!(
            (400..=503).contains(&answer.status) && answer.status != 500,
            "{name}: {} {}",
            answer.status,
            answer.text
        );
    }
    let answer = operator::form(&node, "/admin/v1/tenants/nobody/adapters/nobody-t-tiny-v1.0.0", both);
    assert_eq!(answer.status, 404, "{}", answer.text);
    for (method, path, body) in [
        ("POST", "/admin/v1/tenants", "{\"id\": \"../up\"}"),
        ("POST", "/admin/v1/tenants", "{\"id\": \"acme\"}"),
        ("POST", "/admin/v1/tenants", "{\"id\": \"x\", \"contract\": {\"weight\": 0}}"),
        ("POST", "/admin/v1/tenants", "{\"id\": \"x\", \"contract\": {\"weight\": -1}}"),
        ("POST", "/admin/v1/tenants", "{\"id\": \"x\", \"contract\": {\"bases\": []}}"),
        ("POST", "/admin/v1/tenants", "{\"id\": \"x\", \"contract\": {\"bases\": [\"absent\"]}}"),
        ("POST", "/admin/v1/tenants", "{\"id\": \"x\", \"contract\": {\"concurrency\": 0}}"),
        ("POST", "/admin/v1/tenants", "{\"id\": \"x\", \"what\": 1}"),
        ("POST", "/admin/v1/tenants", "not json"),
        ("PUT", "/admin/v1/tenants/acme/tasks/t", "{\"version\": \"other-t-tiny-v1.0.0\"}"),
        ("PUT", "/admin/v1/tenants/acme/tasks/t", "{\"version\": \"acme-t-tiny-v7.0.0\"}"),
        ("PUT", "/admin/v1/tenants/acme/tasks/UP", "{}"),
        ("DELETE", "/admin/v1/tenants/acme/keys/0000000000000000", ""),
        ("DELETE", "/admin/v1/tenants/acme/keys/x", ""),
        ("DELETE", "/admin/v1/tenants/nobody", ""),
        ("PATCH", "/admin/v1/tenants/nobody", "{}"),
    ] {
        let answer = node.admin(method, path, body);
        assert!((400..500).contains(&answer.status), "{method} {path} {body}: {} {}", answer.status, answer.text);
    }
    assert_eq!(objects(&node), before, "nothing refused is kept");
    assert_eq!(operator::form(&node, good, both).status, 201, "and the good one is taken");
    assert_serves(&node, &key);
}

fn walk(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { found.extend(walk(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}
