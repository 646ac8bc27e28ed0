//! What only a cluster has: ids of another's streams, another's idempotency keys, the QUIC door. None tells one tenant
//! anything of another, and reaching for it disturbs nobody (RELIABILITY S5).

use std::io::{BufRead, BufReader};

use client::{Client, ClientError, Endpoint};
use model::info::Linear;
use serde_json::{Value, json};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::operator::{self, GENEROUS};
use tests::process::{NodeProcess, NodeSpec, scratch, token_ids};
use tests::tiny;

use super::matrix::visible;

struct Scene {
    cluster: Cluster,
    victim: String,
    thief: String,
}

fn scene(name: &str) -> Scene {
    let folder = scratch(name);
    let cluster = Cluster::start(&folder, &NodeSpec::tiny(&folder).with(GENEROUS), 3);
    let first = &cluster.nodes[0];
    let [victim, thief] = ["victim", "thief"].map(|id| operator::tenant(first, id, &json!({"allow_base": true})));
    operator::install(first, "victim-secret-tiny-v1.0.0", &tiny::adapter(1, 4, &Linear::ALL));
    for node in &cluster.nodes {
        while [&victim, &thief].iter().any(|key| node.get("/v1/models", key).status != 200) {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
    Scene { cluster, victim, thief }
}

fn complete(streamed: Streamed) -> Vec<u32> {
    assert_eq!((&streamed.error, streamed.finish.is_some()), (&None, true));
    streamed.ids
}

/// Reads a stream until `n` tokens are there; what it has, the id of its last event, and the rest, which waits.
fn begin(node: &NodeProcess, key: &str, body: &Value, n: usize) -> (Vec<u32>, String, impl BufRead + use<>) {
    let request = operator::agent().post(format!("{}/v1/completions", node.url()));
    let request = request.header("authorization", format!("Bearer {key}")).header("content-type", "application/json");
    let mut body = body.clone();
    (body["stream"], body["return_token_ids"]) = (json!(true), json!(true));
    let response = request.send(body.to_string()).expect("the node answers");
    let mut reader = BufReader::new(response.into_body().into_reader());
    let (mut ids, mut last, mut line) = (Vec::new(), String::new(), String::new());
    // An empty line ends an event.
    while ids.len() < n || !line.trim_end().is_empty() {
        line.clear();
        assert!(reader.read_line(&mut line).expect("the stream goes on") > 0, "it ended after {} tokens", ids.len());
        if let Some(id) = line.strip_prefix("id: ") {
            last = id.trim_end().to_owned();
        } else if let Some(data) = line.strip_prefix("data: ") {
            let event: Value = serde_json::from_str(data).expect("an event is JSON");
            ids.extend(event["choices"][0]["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64));
        }
    }
    (ids.into_iter().map(|id| id as u32).collect(), last, reader)
}

#[test]
fn anothers_last_event_id_is_as_unknown_as_nobodys_and_its_owner_still_goes_on() {
    let Scene { mut cluster, victim, thief } = scene("foreign-position");
    let body = json!({"model": "tiny", "prompt": "tell me", "max_tokens": 900, "temperature": 0.9, "seed": 7, "ignore_eos": true});
    let expected = complete(Streaming::start(&cluster.nodes[0], &victim, &body).join());
    let (mut ids, position, waiting) = begin(&cluster.nodes[1], &victim, &body, 30);
    let (request, rest) = position.split_once('/').expect("request and place");
    let unknown = format!("{}/{rest}", "0123456789abcdef".repeat(2));
    assert_eq!((request.len(), position.len()), (32, unknown.len()));
    let mut streamed = body.clone();
    streamed["stream"] = json!(true);
    for node in &cluster.nodes {
        for path in ["/v1/completions", "/v1/chat/completions"] {
            let reach = |id: &str| node.post_with(path, &thief, ("last-event-id", id), &streamed);
            let (theirs, nobodys) = (reach(&position), reach(&unknown));
            assert_eq!((theirs.status, theirs.code()), (404, "stream_gone"), "{path}: {}", theirs.text);
            assert_eq!(visible(&theirs), visible(&nobodys), "{path} at {}", node.name());
        }
    }
    cluster.nodes[1].kill();
    drop(waiting);
    ids.extend(complete(Streaming::go_on(&cluster.nodes[2], &victim, &body, Some(position)).join()));
    assert_eq!(ids, expected, "{}", cluster.logs());
}

#[test]
fn one_idempotency_key_of_two_tenants_names_two_requests() {
    let Scene { cluster, victim, thief } = scene("shared-key");
    let body = |prompt: &str| json!({"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 1.0, "ignore_eos": true, "return_token_ids": true});
    let ask = |node: usize, key: &str, prompt: &str| {
        let header = ("idempotency-key", "order 66");
        let answer = cluster.nodes[node].post_with("/v1/completions", key, header, &body(prompt));
        assert_eq!(answer.status, 200, "{}\n{}", answer.text, cluster.logs());
        (answer.body["id"].clone(), token_ids(&answer.body["choices"][0]))
    };
    let theirs = ask(0, &victim, "mine");
    // The same words under the same key, at the node that answered them and at others: a request of one's own.
    let own = ask(0, &thief, "mine");
    assert!(own.0 != theirs.0 && own.1 != theirs.1, "{own:?} {theirs:?}");
    assert_eq!(ask(1, &thief, "mine"), own);
    assert_eq!(ask(2, &victim, "mine"), theirs);
    // Other words are refused to whoever used the key for these, and to nobody else.
    let late = operator::tenant(&cluster.nodes[0], "late", &json!({"allow_base": true}));
    let other = ask(0, &late, "another");
    assert!(other.0 != theirs.0 && other.0 != own.0);
    let header = ("idempotency-key", "order 66");
    let refused = cluster.nodes[0].post_with("/v1/completions", &thief, header, &body("another"));
    assert_eq!((refused.status, refused.code()), (422, "idempotency_key_reused"), "{}", refused.text);
    assert_eq!(ask(1, &victim, "mine"), theirs);
}

#[tokio::test]
async fn the_quic_door_knows_no_more_of_anothers_names_than_of_nobodys() {
    let Scene { cluster, thief, victim } = scene("quic-names");
    let client = Client::new(cluster.library(0, &thief)).expect("a valid configuration");
    let ask = async |endpoint, model: &str| {
        let body = match endpoint {
            Endpoint::Chat => json!({"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}),
            Endpoint::Completions => json!({"model": model, "prompt": "hi", "max_tokens": 2}),
        };
        let mut stream = client.ask(endpoint, body.to_string().into_bytes());
        loop {
            match stream.next().await {
                Ok(Some(_)) => {}
                Ok(None) => return Ok(()),
                Err(ClientError::Refused { status, retry_after_ms, json }) => {
                    return Err((status, retry_after_ms, String::from_utf8(json).expect("JSON")));
                }
                Err(error) => panic!("{model}: {error}"),
            }
        }
    };
    let unknown_key = format!("tnt_0000000000000000_{}", "A".repeat(43));
    for (foreign, unknown) in [
        ("secret", "absent"),
        ("victim-secret-tiny-v1.0.0", "nobody-absent-tiny-v1.0.0"),
        ("victim-secret-tiny-v1.0.0", "victim-secret-tiny-v9.9.9"),
        ("victim-secret", "nobody-absent"),
        ("victim/secret", "nobody/absent"),
        ("victim", "nobody"),
        (&victim, &unknown_key),
    ] {
        for endpoint in [Endpoint::Chat, Endpoint::Completions] {
            let theirs = ask(endpoint, foreign).await.expect_err("it is not one's own");
            assert!(theirs.0 == 404 && theirs.2.contains("model_not_found"), "{foreign}: {theirs:?}");
            assert_eq!(theirs, ask(endpoint, unknown).await.expect_err("nobody has it"), "{foreign}");
        }
    }
    for endpoint in [Endpoint::Chat, Endpoint::Completions] {
        ask(endpoint, "tiny").await.expect("the door serves what the contract allows");
    }
}
