//! Starting, being killed, draining, and refusing to start.

use std::process::Command;
use std::time::Duration;

use model::gguf::write::GgufWriter;
use serde_json::json;
use shared::clock::{Clock, SystemClock};
use tests::operator;
use tests::process::{NodeProcess, NodeSpec, binary, scratch};
use tests::tiny;

#[test]
fn tenants_keys_and_adapters_survive_kill_nine() {
    let folder = scratch("survive");
    let mut node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let key = node.tenant("acme", &["--task", "support", "--cost-center", "emea"]);
    let files = folder.join("adapter");
    tiny::adapter::write_adapter(&tiny::adapter(7, 8, &model::info::Linear::ALL), &files);
    node.adapter("acme-support-tiny-v1.0.0", &files);
    let before = node.complete(&key, "support", "hello there", 12);
    assert_ne!(before, node.complete(&key, "tiny", "hello there", 12), "the adapter changes the answer");
    let epoch = node.status()["registry"]["epoch"].clone();

    node.kill_and_restart();

    assert_eq!(node.status()["registry"]["epoch"], epoch);
    assert_eq!(node.complete(&key, "support", "hello there", 12), before, "same weights, same tokens");
    let shown = node.ctl(&["tenant", "show", "acme"]);
    assert_eq!(shown["cost_center"], "emea");
    assert_eq!(shown["tasks"][0]["version"], "acme-support-tiny-v1.0.0");
    let records = node.usage_of(1);
    assert!(
        records.iter().any(|record| record["tenant"] == "acme" && record["delivered"] == json!([12])),
        "{records:?}"
    );
}

#[test]
fn sigterm_finishes_running_streams_and_exits_with_zero() {
    let folder = scratch("drain");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let key = node.tenant("acme", &[]);
    let body = json!({"model": "tiny", "prompt": "count", "max_tokens": 200, "ignore_eos": true, "stream": true, "return_token_ids": true});
    let mut signalled = false;
    let events = node.stream("/v1/completions", &key, &body, |_| {
        if !signalled {
            node.signal("TERM");
            signalled = true;
        }
        true
    });
    let n_tokens: usize =
        events.iter().filter_map(|event| event["choices"][0]["token_ids"].as_array()).map(Vec::len).sum();
    assert_eq!(n_tokens, 200, "the stream ran to its end: {:?}", events.last());
    let mut node = node;
    assert!(node.wait().success(), "{}", node.log());
}

#[test]
fn a_stream_that_outlives_the_drain_time_is_told_and_billed() {
    let folder = scratch("cut");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with("[cluster]\ndrain_s = 0"));
    let key = node.tenant("acme", &[]);
    let body = json!({"model": "tiny", "prompt": "count", "n": 8, "max_tokens": 1000, "ignore_eos": true, "stream": true, "logprobs": 5});
    let mut n_seen = 0;
    let events = node.stream("/v1/completions", &key, &body, |_| {
        n_seen += 1;
        if n_seen == 1 {
            node.signal("TERM");
        }
        true
    });
    let last = events.last().expect("the stream began");
    assert_eq!(last["error"]["code"], "node_stopping", "{last}");
    let mut node = node;
    assert!(node.wait().success(), "{}", node.log());
    let records = node.usage();
    assert_eq!(records.len(), 1, "{records:?}");
    assert_eq!(records[0]["outcome"], "failed");
    assert_ne!(records[0]["prompt_tokens"], 0);
    let delivered: u64 =
        records[0]["delivered"].as_array().expect("per choice").iter().filter_map(|n| n.as_u64()).sum();
    assert!((1..8000).contains(&delivered), "{delivered}");
}

#[test]
fn a_second_sigterm_ends_the_drain_at_once() {
    let folder = scratch("twice-term");
    // Far longer than the test may take.
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")).with("[cluster]\ndrain_s = 600"));
    let key = node.tenant("acme", &[]);
    let body = json!({"model": "tiny", "prompt": "count", "n": 8, "max_tokens": 1000, "ignore_eos": true, "stream": true, "logprobs": 20});
    // Far more than are done before the second signal comes.
    let readers: Vec<_> =
        (0..60).map(|_| operator::start(node.http(), "/v1/completions", &key, &body.to_string())).collect();
    let logged = |what: &str| {
        let found = (0..200).any(|_| {
            std::thread::sleep(Duration::from_millis(25));
            node.log().contains(what)
        });
        assert!(found, "no {what:?} in the log:\n{}", node.log());
    };
    let begun = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(10));
        operator::base_status(&node)["engine"]["sequences_running"] != 0
    });
    assert!(begun, "the request runs");
    node.signal("TERM");
    logged("node stops");
    std::thread::sleep(Duration::from_millis(500));
    assert!(!node.log().contains("node stopped"), "the first signal waits for the request");
    let second = SystemClock.now();
    node.signal("TERM");
    logged("second signal");
    let mut node = node;
    assert!(node.wait().success(), "{}", node.log());
    assert!(second.elapsed() < Duration::from_secs(5), "{:?}", second.elapsed());
    let records = node.usage();
    // One that arrived after the first signal was refused and leaves none.
    assert!(records.len() <= readers.len());
    assert!(records.iter().any(|record| record["outcome"] == "failed"), "{records:?}");
}

#[test]
fn a_node_that_cannot_start_says_why_with_the_right_exit_code() {
    let folder = scratch("refuse");
    let config = folder.join("cluster.toml");
    let run = |text: &str| {
        std::fs::write(&config, text).expect("writable");
        let output =
            Command::new(binary()).args(["node", "--name", "a", "--config"]).arg(&config).output().expect("runs");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let node = "[[nodes]]\nname = \"a\"\nhttp = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\ndata = \"data\"\n";
    let (code, text) = run(&format!("{node}[engine]\nthread = 1\n"));
    assert_eq!(code, Some(78), "{text}");
    assert!(text.contains(":7:") && text.contains("thread"), "{text}");
    let (code, text) = run(&format!("{node}[[bases]]\nname = \"b\"\npath = \"nowhere.gguf\"\n"));
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("nowhere.gguf") && text.contains("fetch-model"), "{text}");
    let insecure = node.replacen("127.0.0.1:0", "0.0.0.0:8080", 1);
    let (code, text) = run(&format!("{insecure}[[bases]]\nname = \"b\"\npath = \"x\"\n"));
    assert_eq!(code, Some(78), "{text}");
    assert!(text.contains("without TLS"), "{text}");
}

#[test]
fn a_hostile_base_ends_the_node_with_its_name_before_it_serves() {
    let folder = scratch("hostile-base");
    let mut wraps = GgufWriter::default();
    wraps.text("general.architecture", "llama").tensor_info("token_embd.weight", &[1 << 59, 32], 8, 0);
    let mut bomb = GgufWriter::default();
    // An array of 2^56 texts.
    bomb.text("general.architecture", "llama").value("bomb", 9, &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    let node = "[[nodes]]\nname = \"a\"\nhttp = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\ndata = \"data\"\n";
    let config = folder.join("cluster.toml");
    std::fs::write(&config, format!("{node}[[bases]]\nname = \"b\"\npath = \"hostile.gguf\"\n")).expect("writable");
    for (named, file) in [("token_embd.weight", wraps), ("bomb", bomb)] {
        std::fs::write(folder.join("hostile.gguf"), file.finish()).expect("writable");
        let output =
            Command::new(binary()).args(["node", "--name", "a", "--config"]).arg(&config).output().expect("runs");
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("hostile.gguf") && text.contains(named) && text.contains("hint: "), "{text}");
        // A node that answers says so; a crash would say panicked, or nothing.
        assert!(!text.contains("node serves") && !text.contains("panicked"), "{text}");
    }
}

#[test]
fn two_processes_cannot_share_a_data_folder() {
    let folder = scratch("twice");
    let spec = NodeSpec::tiny(&folder.join("model"));
    let node = NodeProcess::start(&folder, &spec);
    let config = std::fs::read_to_string(folder.join("cluster.toml")).expect("written");
    let other = folder.join("other.toml");
    let free = |text: &str, address: String| text.replace(&address, "127.0.0.1:0");
    let config =
        free(&free(&config, node.http().to_string()), node.admin_url().trim_start_matches("http://").to_owned());
    std::fs::write(&other, config).expect("writable");
    let output = Command::new(binary()).args(["node", "--name", "a", "--config"]).arg(&other).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("registry"), "{text}");
}

#[test]
fn a_request_past_its_deadline_in_the_queue_gets_504_and_is_never_run() {
    let folder = scratch("deadline");
    let node = NodeProcess::start(
        &folder,
        &NodeSpec::tiny(&folder.join("model"))
            .with("[engine]\nsequences = 1\nrows_per_step = 16\nprefill_chunk = 16\nthreads = 1"),
    );
    let key = node.tenant("slow", &[]);
    let long =
        json!({"model": "tiny", "prompt": "x", "max_tokens": 1000, "ignore_eos": true, "stream": true, "logprobs": 5});
    let late = json!({"model": "tiny", "prompt": "x", "max_tokens": 400, "ignore_eos": true});
    let mut answers = Vec::new();
    // The second request is sent when the first has begun: it holds the only place for a long time.
    node.stream("/v1/completions", &key, &long, |_| {
        if answers.is_empty() {
            let request = tests::operator::agent().post(format!("{}/v1/completions", node.url()));
            let request = request.header("authorization", format!("Bearer {key}")).header("x-tenantry-timeout-ms", "1");
            let request = request.header("content-type", "application/json").send(late.to_string());
            answers.push(tests::process::read(request.expect("the node answers")));
        }
        true
    });
    assert_eq!((answers[0].status, answers[0].code()), (504, "queue_timeout"), "{}", answers[0].text);
    std::thread::sleep(Duration::from_millis(200));
    let timed_out: Vec<_> = node.usage_of(2).into_iter().filter(|record| record["outcome"] == "failed").collect();
    assert_eq!(timed_out.len(), 1);
    assert_eq!(timed_out[0]["delivered"], json!([0]));
}
