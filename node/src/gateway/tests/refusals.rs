//! What is refused, how it is said, and that nothing reaches the backend: keys, routes, sizes, JSON, ranges.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::Bytes;
use axum::http::Method;
use futures_util::stream;
use serde_json::json;
use shared::error::{ErrorKind, RequestError};
use utoipa::OpenApi;

use super::fake::{Fake, Script};
use super::*;
use crate::gateway::auth::OPEN_PATHS;
use crate::gateway::limits::*;
use crate::gateway::openapi::Document;

/// All four keys, always.
fn error_of(answer: &Answer) -> Value {
    let body = answer.json();
    let error = body["error"].as_object().unwrap_or_else(|| panic!("no error: {body}"));
    let keys: Vec<_> = error.keys().cloned().collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    body["error"].clone()
}

#[tokio::test]
async fn every_route_but_health_and_documents_needs_a_key() {
    let fake = Arc::new(Fake::saying("x"));
    let document = serde_json::to_value(Document::openapi()).expect("serialises");
    let mut walked = 0;
    for (path, operations) in document["paths"].as_object().expect("paths") {
        let path = path.replace("{model}", "support");
        for method in operations.as_object().expect("operations").keys() {
            let method: Method = method.to_ascii_uppercase().parse().expect("method");
            let open = OPEN_PATHS.contains(&path.as_str());
            for key in [None, Some("Bearer "), Some("Bearer wrong"), Some("Basic acme-key"), Some("acme-key")] {
                let mut http = request(method.clone(), &path, "{}");
                http.headers_mut().remove("authorization");
                if let Some(key) = key {
                    http.headers_mut().insert("authorization", key.parse().expect("header"));
                }
                let answer = call(&fake, http).await;
                assert_eq!(answer.status == 401, !open, "{method} {path} {key:?}: {}", answer.status);
                if !open {
                    assert_eq!(error_of(&answer)["code"], "invalid_api_key");
                }
            }
            let status = call(&fake, request(method.clone(), &path, "{}")).await.status;
            assert!(
                status != 404 && status != 405 && status != 401,
                "{method} {path} is documented but answers {status}"
            );
            walked += 1;
        }
    }
    assert_eq!(walked, 11);
    for path in ["/", "/metrics", "/v1/unknown", "/admin/tenants", "/healthz/", "//healthz", "/v1/models/a/b"] {
        let mut http = request(Method::GET, path, "");
        assert_eq!(call(&fake, request(Method::GET, path, "")).await.status, 404, "{path} with a key");
        http.headers_mut().remove("authorization");
        assert_eq!(call(&fake, http).await.status, 401, "{path} without a key");
    }
    assert_eq!(call(&fake, request(Method::DELETE, CHAT, "")).await.status, 405);
    assert!(fake.seen.lock().is_empty());
}

#[tokio::test]
async fn naming_another_tenant_is_refused_and_reported() {
    let fake = Arc::new(Fake::saying("x"));
    for header in ["x-tenant-id", "x-tenant"] {
        for (tenant, status) in [("acme", 200), ("baker", 403)] {
            let mut http = request(Method::POST, CHAT, chat(json!({})).to_string());
            http.headers_mut().insert(header, tenant.parse().expect("header"));
            assert_eq!(call(&fake, http).await.status, status);
        }
    }
    for (tenant, status) in [(json!("acme"), 200), (json!(null), 200), (json!("baker"), 403), (json!(7), 403)] {
        assert_eq!(post(&fake, CHAT, &chat(json!({"tenant": tenant}))).await.status, status);
        assert_eq!(post(&fake, COMPLETIONS, &completion(json!({"tenant_id": tenant}))).await.status, status);
    }
    assert_eq!(fake.impersonations.load(Ordering::SeqCst), 6);
    let mut twice = request(Method::GET, "/v1/models", "");
    twice.headers_mut().append("authorization", "Bearer baker-key".parse().expect("header"));
    assert_eq!(call(&fake, twice).await.status, 401, "two keys are no key");
}

#[tokio::test]
async fn bodies_over_one_mebibyte_are_refused_however_they_come() {
    let fake = Arc::new(Fake::saying("x"));
    let padding = |len: usize| {
        let empty = chat(json!({"user": ""})).to_string().len();
        chat(json!({"user": "x".repeat(len - empty)})).to_string()
    };
    assert_eq!(call(&fake, request(Method::POST, CHAT, padding(BODY_BYTES_MAX))).await.status, 200);
    let answer = call(&fake, request(Method::POST, CHAT, padding(BODY_BYTES_MAX + 1))).await;
    assert_eq!((answer.status.as_u16(), error_of(&answer)["code"].as_str()), (413, Some("body_too_large")));
    let endless = stream::repeat_with(|| Ok::<_, std::io::Error>(Bytes::from_static(&[b' '; 4096])));
    assert_eq!(call(&fake, request(Method::POST, CHAT, Body::from_stream(endless))).await.status, 413);
    let mut lying = request(Method::POST, CHAT, "{}");
    lying.headers_mut().insert("content-length", "99999999999".parse().expect("header"));
    assert_eq!(call(&fake, lying).await.status, 413);
    let broken = stream::iter([Err::<Bytes, _>(std::io::Error::other("gone"))]);
    assert_eq!(call(&fake, request(Method::POST, CHAT, Body::from_stream(broken))).await.status, 400);
}

#[tokio::test]
async fn a_body_that_never_ends_is_cut() {
    let fake = Arc::new(Fake::saying("x"));
    let silent = stream::pending::<Result<Bytes, std::io::Error>>();
    let http = request(Method::POST, CHAT, Body::from_stream(silent));
    let answer = call_router(router_paced(fake, HASTY, BODY_BYTES), http).await;
    assert_eq!((answer.status.as_u16(), error_of(&answer)["code"].as_str()), (408, Some("body_timeout")));
}

#[tokio::test]
async fn hostile_bodies_are_400_and_never_500() {
    let fake = Arc::new(Fake::saying("x"));
    let deep = format!("{{\"model\":\"support\",\"messages\":{}{}}}", "[".repeat(10_000), "]".repeat(10_000));
    for body in [
        deep.as_str(),
        "",
        "null",
        "[]",
        "{",
        "{\"model\": NaN}",
        "{\"temperature\": 1e400}",
        "\u{feff}{}",
        "{\"a\":\"\\ud83d\"}",
        "{\"model\":\"support\",\"model\":\"other\"}",
        "{}",
        "{\"model\":\"\"}",
        "{\"model\":7,\"messages\":[]}",
        "{\"model\":\"support\"}",
        "{\"model\":\"support\",\"messages\":[]}",
        "{\"model\":\"support\",\"messages\":[1]}",
        "{\"model\":\"support\",\"messages\":[{\"role\":\"root\",\"content\":\"\"}]}",
        "{\"model\":\"support\",\"messages\":[{\"role\":\"user\"}]}",
        "{\"model\":\"support\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\"}]}]}",
        "{\"model\":\"support\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]}",
        "{\"model\":\"support\",\"messages\":[{\"role\":\"tool\",\"content\":\"\"}]}",
    ] {
        let answer = call(&fake, request(Method::POST, CHAT, body.to_owned())).await;
        assert_eq!(answer.status, 400, "{body:.80}: {}", answer.body);
        error_of(&answer);
    }
    let many = json!(vec![json!({"role": "user", "content": ""}); MESSAGES_MAX + 1]);
    assert_eq!(post(&fake, CHAT, &chat(json!({"messages": many}))).await.status, 400);
    for body in [
        json!({"prompt": []}),
        json!({"prompt": ""}),
        json!({"prompt": [[]]}),
        json!({"prompt": [1, "a"]}),
        json!({"prompt": [-1]}),
        json!({"prompt": [4294967296_u64]}),
        json!({"prompt": {"a": 1}}),
        json!({"prompt": vec!["a"; PROMPTS_MAX + 1]}),
        json!({"prompt": vec!["a"; 16], "n": 8}),
        json!({"prompt": [true]}),
    ] {
        let answer = post(&fake, COMPLETIONS, &completion(body.clone())).await;
        assert_eq!(answer.status, 400, "{body}");
        error_of(&answer);
    }
    assert!(fake.seen.lock().is_empty());
}

/// A client generated from the document must be able to leave out whatever has a default.
#[test]
fn the_document_asks_for_no_field_that_may_be_left_out() {
    let document = serde_json::to_value(Document::openapi()).expect("serialises");
    let required = |schema: &str| {
        let schema = &document["components"]["schemas"][schema];
        let parts = schema["allOf"].as_array().cloned().unwrap_or_else(|| vec![schema.clone()]);
        let listed = |part: &Value| match part["$ref"].as_str() {
            Some(path) => document.pointer(&path[1..]).expect("a part of the document")["required"].clone(),
            None => part["required"].clone(),
        };
        let names: BTreeSet<String> = parts
            .iter()
            .flat_map(|part| listed(part).as_array().cloned().unwrap_or_default())
            .map(|name| name.as_str().expect("a name").to_owned())
            .collect();
        names.into_iter().collect::<Vec<_>>()
    };
    assert_eq!(required("ChatRequest"), ["messages", "model"]);
    assert_eq!(required("CompletionRequest"), ["model", "prompt"]);
    assert!(required("StreamOptions").is_empty());
}

/// The document's own bounds, tested against the parser: every numeric field of both endpoints.
#[tokio::test]
async fn every_numeric_field_is_range_checked_as_documented() {
    let fake = Arc::new(Fake::saying("x"));
    let document = serde_json::to_value(Document::openapi()).expect("serialises");
    let mut checked = 0;
    for (path, schema) in [(CHAT, "ChatRequest"), (COMPLETIONS, "CompletionRequest")] {
        for (name, property) in properties(&document, schema) {
            let (Some(min), Some(max)) = (property["minimum"].as_f64(), property["maximum"].as_f64()) else { continue };
            checked += 1;
            let send = async |value: Value| {
                let mut more = json!({name.as_str(): value});
                if name == "top_logprobs" {
                    more["logprobs"] = json!(true);
                }
                if name == "min_tokens" && path == COMPLETIONS {
                    more["max_tokens"] = json!(TOKENS_MAX);
                }
                if name == "best_of" {
                    more["n"] = more["best_of"].clone();
                }
                let body = if path == CHAT { chat(more) } else { completion(more) };
                post(&fake, path, &body).await
            };
            for good in [json!(min), json!(max), json!(null)] {
                let answer = send(good.clone()).await;
                assert_eq!(answer.status, 200, "{path} {name} = {good}: {}", answer.body);
            }
            for bad in [
                json!(min - 1.0),
                json!(max + 1.0),
                json!(1e308),
                json!(-1e308),
                json!("1"),
                json!([1]),
                json!({}),
                json!(true),
                json!(u64::MAX),
            ] {
                let answer = send(bad.clone()).await;
                assert_eq!(answer.status, 400, "{path} {name} = {bad}");
                let error = error_of(&answer);
                let blamed = error["param"].as_str().expect("param");
                assert!(blamed == name || (name == "best_of" && blamed == "n"), "{path} {name} = {bad}: {error}");
            }
        }
    }
    assert!(checked >= 24, "only {checked} numeric fields are documented with bounds");
    for (seed, status) in
        [(json!(i64::MIN), 200), (json!(i64::MAX), 200), (json!(u64::MAX), 400), (json!(1e308), 400), (json!("1"), 400)]
    {
        assert_eq!(post(&fake, CHAT, &chat(json!({"seed": seed}))).await.status, status, "seed {seed}");
    }
}

/// Properties of a schema, those of flattened parts included.
fn properties(document: &Value, schema: &str) -> Vec<(String, Value)> {
    let schema = &document["components"]["schemas"][schema];
    let parts = schema["allOf"].as_array().cloned().unwrap_or_else(|| vec![schema.clone()]);
    let mut all = Vec::new();
    for part in parts {
        if let Some(reference) = part["$ref"].as_str() {
            all.extend(properties(document, reference.rsplit('/').next().expect("name")));
        }
        all.extend(
            part["properties"].as_object().into_iter().flatten().map(|(name, value)| (name.clone(), value.clone())),
        );
    }
    all
}

#[tokio::test]
async fn other_fields_are_bounded_too() {
    let fake = Arc::new(Fake::saying("x"));
    let biases = |n: usize| (0..n).map(|id| (id.to_string(), json!(1))).collect::<serde_json::Map<_, _>>();
    for (more, param) in [
        (json!({"stop": vec!["a"; STOP_MAX + 1]}), "stop"),
        (json!({"stop": "a".repeat(STOP_BYTES_MAX + 1)}), "stop"),
        (json!({"stop": [""]}), "stop"),
        (json!({"stop": 5}), "stop"),
        (json!({"stop_token_ids": [-1]}), "stop_token_ids"),
        (json!({"stop_token_ids": vec![1; STOP_TOKEN_IDS_MAX + 1]}), "stop_token_ids"),
        (json!({"logit_bias": biases(LOGIT_BIAS_MAX + 1)}), "logit_bias"),
        (json!({"logit_bias": {"a": 1}}), "logit_bias"),
        (json!({"logit_bias": {"-1": 1}}), "logit_bias"),
        (json!({"logit_bias": {"1": 100.5}}), "logit_bias"),
        (json!({"logit_bias": {"1": "x"}}), "logit_bias"),
        (json!({"logit_bias": [1]}), "logit_bias"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (json!({"max_tokens": 3, "max_completion_tokens": 4}), "max_tokens"),
        (json!({"max_tokens": 3, "min_tokens": 4}), "min_tokens"),
        (json!({"stream": "yes"}), "stream"),
        (json!({"stream_options": {"include_usage": 1}}), "stream_options.include_usage"),
        (json!({"stream": true, "prompt_logprobs": 1}), "prompt_logprobs"),
        (json!({"model": "m".repeat(MODEL_BYTES_MAX + 1)}), "model"),
        (json!({"response_format": {"type": "xml"}}), "response_format.type"),
        (json!({"response_format": {"type": "json_schema"}}), "response_format.json_schema"),
        (
            json!({"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": "x".repeat(SCHEMA_BYTES_MAX)}}}}),
            "response_format.json_schema.schema",
        ),
        (json!({"chat_template_kwargs": {"messages": []}}), "chat_template_kwargs.messages"),
    ] {
        let answer = post(&fake, CHAT, &chat(more.clone())).await;
        assert_eq!(answer.status, 400, "{param}: {}", answer.body);
        assert_eq!(error_of(&answer)["param"], param);
    }
    assert!(fake.seen.lock().is_empty());
}

#[tokio::test]
async fn fields_that_would_change_the_answer_are_refused_by_name() {
    let fake = Arc::new(Fake::saying("x"));
    for (name, value) in [
        ("audio", json!({})),
        ("modalities", json!(["audio"])),
        ("prediction", json!({})),
        ("web_search_options", json!({})),
        ("functions", json!([{}])),
        ("function_call", json!("auto")),
        ("service_tier", json!("flex")),
        ("reasoning_effort", json!("high")),
        ("store", json!(true)),
        ("chat_template", json!("x")),
        ("guided_regex", json!("a*")),
        ("continue_final_message", json!(true)),
        ("use_beam_search", json!(true)),
        ("lora_path", json!("/etc")),
        ("max_new_tokens", json!(5)),
        ("stop_regex", json!("a+")),
        ("no_repeat_ngram_size", json!(3)),
        ("random_seed", json!(7)),
        ("best_of", json!(2)),
    ] {
        let answer = post(&fake, CHAT, &chat(json!({name: value}))).await;
        let error = error_of(&answer);
        assert_eq!(
            (answer.status.as_u16(), &error["code"], &error["param"]),
            (400, &json!("unsupported_parameter"), &json!(name))
        );
    }
    for (name, value) in [("suffix", json!("x")), ("best_of", json!(2)), ("tools", json!([{}]))] {
        let error = error_of(&post(&fake, COMPLETIONS, &completion(json!({name: value}))).await);
        assert_eq!((&error["code"], &error["param"]), (&json!("unsupported_parameter"), &json!(name)));
    }
    let answer = post(&fake, "/v1/embeddings", &json!({"model": "support", "input": "x"})).await;
    assert_eq!((answer.status.as_u16(), answer.header("x-should-retry")), (501, "false"));
    assert_eq!(error_of(&answer)["code"], "not_implemented");
}

#[tokio::test]
async fn refusals_of_admission_keep_their_status_and_headers() {
    let fake = Arc::new(Fake::new(|_| {
        let error = RequestError::new(ErrorKind::Throttled, "queue_full", "full").retry_after(Duration::from_secs(3));
        Script::Refuse(error)
    }));
    for stream in [false, true] {
        let answer = post(&fake, CHAT, &chat(json!({"stream": stream}))).await;
        assert_eq!((answer.status.as_u16(), answer.header("retry-after")), (429, "3"));
        assert_eq!(answer.header("x-ratelimit-limit-requests"), "60");
        assert_eq!(error_of(&answer)["code"], "queue_full");
    }
}

#[tokio::test]
async fn headers_are_checked_before_use() {
    let fake = Arc::new(Fake::saying("x"));
    for (id, kept) in [("abc-1", true), ("a b", false), ("\"<script>", false), (&"x".repeat(129), false)] {
        let mut http = request(Method::GET, "/v1/models", "");
        http.headers_mut().insert("x-request-id", id.parse().expect("header"));
        assert_eq!(call(&fake, http).await.header("x-request-id") == id, kept);
    }
    for wait in ["0", "-1", "x", "99999999999999999999", "3600001"] {
        let mut http = request(Method::POST, CHAT, chat(json!({})).to_string());
        http.headers_mut().insert("x-tenantry-timeout-ms", wait.parse().expect("header"));
        assert_eq!(call(&fake, http).await.status, 400);
    }
    for (kind, status) in [("application/json; charset=utf-8", 200), ("text/plain", 415), ("multipart/form-data", 415)]
    {
        let mut http = request(Method::POST, CHAT, chat(json!({})).to_string());
        http.headers_mut().insert("content-type", kind.parse().expect("header"));
        assert_eq!(call(&fake, http).await.status, status, "{kind}");
    }
}

#[tokio::test]
async fn a_panic_is_a_500_and_nothing_more() {
    let fake = Arc::new(Fake::new(|_| panic!("the script says so")));
    let answer = post(&fake, CHAT, &chat(json!({}))).await;
    assert_eq!((answer.status.as_u16(), error_of(&answer)["code"].as_str()), (500, Some("internal_error")));
    assert!(!answer.body.contains("script"));
}

#[tokio::test]
async fn readiness_tells_every_check() {
    let fake = Arc::new(Fake::saying("x"));
    assert_eq!(call(&fake, request(Method::GET, "/healthz", "")).await.status, 200);
    for path in ["/readyz", "/health"] {
        let answer = call(&fake, request(Method::GET, path, "")).await;
        assert_eq!(answer.status, 503);
        assert_eq!(
            answer.json(),
            json!({"status": "not_ready", "checks": [{"name": "base_loaded", "ok": false, "detail": "loading"}]})
        );
    }
}
