//! HTTP/2 on the client port, spoken by curl: by prior knowledge on a plain port, by ALPN within TLS.

use std::process::Command;

use serde_json::{Value, json};
use tests::operator::tenant;
use tests::process::{NodeProcess, NodeSpec, scratch};

use super::tls::{Authority, SecureNode};

/// What curl prints after each answer, on a line of its own.
const TOLD: &str = "\n%{http_version} %{http_code} %{num_connects}\n";

fn curl(words: &[&str]) -> String {
    let output = Command::new("curl").args(["--silent", "--show-error", "--write-out", TOLD]).args(words).output();
    let output = output.expect("curl runs");
    assert!(output.status.success(), "curl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn post<'a>(how: &[&'a str], url: &'a str, key: &'a str, body: &'a str) -> String {
    let rest = ["--header", key, "--header", "content-type: application/json", "--data", body, url];
    curl(&[how, &rest].concat())
}

fn body(stream: bool) -> String {
    json!({"model": "tiny", "prompt": "x", "max_tokens": 5, "ignore_eos": true, "stream": stream}).to_string()
}

#[test]
fn prior_knowledge_serves_answers_streams_and_refusals() {
    let folder = scratch("h2");
    let node = NodeProcess::start(&folder, &NodeSpec::tiny(&folder.join("model")));
    let key = format!("authorization: Bearer {}", tenant(&node, "acme", &json!({})));
    let url = format!("{}/v1/completions", node.url());
    let how = ["--http2-prior-knowledge"];
    let text = post(&how, &url, &key, &body(false));
    let (answer, told) = text.trim_end().rsplit_once('\n').expect("two lines");
    assert_eq!(told, "2 200 1");
    let answer: Value = serde_json::from_str(answer).expect("JSON");
    assert_eq!(answer["usage"]["completion_tokens"], 5);

    let text = post(&how, &url, &key, &body(true));
    assert!(text.contains("data: [DONE]") && text.trim_end().ends_with("2 200 1"), "{text}");

    let refused = curl(&["--http2-prior-knowledge", &format!("{}/v1/models", node.url())]);
    assert!(refused.contains("invalid_api_key") && refused.contains("2 401"), "{refused}");
}

#[test]
fn tls_offers_http2_and_falls_back_to_http1_for_clients_that_do_not() {
    let folder = scratch("h2-tls");
    let authority = Authority::new(&folder, "ca");
    let node = SecureNode::start(&folder, &authority);
    let created = node.run(&["ctl", "--ca", "ca.pem", "tenant", "create", "acme"]);
    assert!(created.status.success(), "{}", String::from_utf8_lossy(&created.stderr));
    let created: Value = serde_json::from_slice(&created.stdout).expect("JSON");
    let key = format!("authorization: Bearer {}", created["key"]["key"].as_str().expect("a key"));
    let (url, ca) = (format!("https://{}/v1/completions", node.http), folder.join("ca.pem"));
    let ca = ca.to_str().expect("UTF-8");
    for (flag, version) in [("--http2", "2"), ("--http1.1", "1.1")] {
        let text = post(&["--cacert", ca, flag], &url, &key, &body(true));
        assert!(text.contains("data: [DONE]"), "{text}");
        assert!(text.trim_end().ends_with(&format!("{version} 200 1")), "{flag}: {text}");
    }
    // Ten answers over one connection: only the first one opens it.
    let one = body(false);
    let head =
        ["--cacert", ca, "--http2", "--header", &key, "--header", "content-type: application/json", "--data", &one];
    let text = curl(&[&head[..], &[url.as_str(); 10]].concat());
    let told: Vec<&str> = text.lines().filter(|line| line.starts_with("2 200")).collect();
    assert_eq!(told.len(), 10, "{text}");
    assert_eq!(told.iter().filter(|line| line.ends_with(" 1")).count(), 1, "{told:?}");
}
