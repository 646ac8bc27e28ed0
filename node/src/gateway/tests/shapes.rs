//! Golden shapes of whole answers and models.

use std::sync::Arc;

use axum::http::Method;
use serde_json::json;
use shared::request::Grammar;
use shared::token::{FinishReason, TokenEvent};

use super::fake::{EOS, Fake, Script, emit, say};
use super::*;
use crate::gateway::backend::Input;

#[tokio::test]
async fn a_chat_completion_looks_like_openais() {
    let fake = Arc::new(Fake::saying("Hello é"));
    let answer = post(&fake, CHAT, &chat(json!({}))).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let mut body = answer.json();
    let id = body["id"].take();
    assert!(id.as_str().is_some_and(|id| id.starts_with("chatcmpl-") && id.len() == 9 + 32), "{id}");
    assert!(body["created"].take().as_u64().is_some_and(|at| at > 1_700_000_000));
    assert_eq!(
        body,
        json!({
            "id": null, "object": "chat.completion", "created": null, "model": "support",
            "choices": [{
                "index": 0, "message": {"role": "assistant", "content": "Hello é", "refusal": null},
                "logprobs": null, "finish_reason": "stop"
            }],
            "usage": {
                "prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11, "prompt_tokens_details": {"cached_tokens": 2}
            },
            "system_fingerprint": "cpu1-f32"
        })
    );
    assert_eq!(answer.header("x-tenantry-adapter"), "acme-support-smollm2-v1.0.0");
    assert_eq!(answer.header("x-tenantry-fallback"), "(absent)");
    assert_eq!(answer.header("x-ratelimit-remaining-tokens"), "990");
    assert_eq!(answer.header("x-ratelimit-reset-tokens"), "600ms");
    assert_eq!(answer.header("x-tenantry-queue-ms"), "7");
    assert!(answer.header("x-request-id").starts_with("req_"));
}

#[tokio::test]
async fn a_fallback_is_said_in_body_and_header() {
    let fake = Arc::new(Fake { fell_back: true, ..Fake::saying("x") });
    for (path, body) in [(CHAT, chat(json!({}))), (COMPLETIONS, completion(json!({})))] {
        let answer = post(&fake, path, &body).await;
        assert_eq!(answer.json()["tenantry"], json!({"fallback": "base", "base": "smollm2"}));
        assert_eq!(answer.header("x-tenantry-fallback"), "base");
        assert_eq!(answer.header("x-tenantry-adapter"), "(absent)");
    }
    let pieces = post(&fake, CHAT, &chat(json!({"stream": true}))).await.pieces();
    assert_eq!(pieces[0]["tenantry"]["fallback"], "base");
    assert_eq!(pieces[1].get("tenantry"), None);
}

#[tokio::test]
async fn a_fallback_decided_in_the_queue_is_said_too() {
    let fake = Arc::new(Fake::new(|request| {
        let mut events = say(request, b"x");
        events[0] =
            TokenEvent::Started { queue_wait: Duration::ZERO, cached_tokens: 0, fell_back: true, adapter_hit: None };
        Script::Emit(events)
    }));
    let answer = post(&fake, CHAT, &chat(json!({}))).await;
    assert_eq!(answer.json()["tenantry"]["fallback"], "base");
    assert_eq!(answer.header("x-tenantry-fallback"), "base");
    assert_eq!(answer.header("x-tenantry-adapter"), "(absent)");
    let answer = post(&fake, CHAT, &chat(json!({"stream": true}))).await;
    assert_eq!(answer.header("x-tenantry-fallback"), "base");
    assert_eq!(answer.pieces().iter().filter(|piece| piece.get("tenantry").is_some()).count(), 1);
}

#[tokio::test]
async fn chat_logprobs_and_ids_cover_every_token() {
    let fake = Arc::new(Fake::saying("a"));
    let body =
        chat(json!({"logprobs": true, "top_logprobs": 2, "return_token_ids": true, "n": 2, "prompt_logprobs": 1}));
    let body = post(&fake, CHAT, &body).await.json();
    assert_eq!(body["prompt_token_ids"], json!([72, 105]));
    assert_eq!(body["choices"][1]["token_ids"], json!([97, EOS]));
    assert_eq!(
        body["choices"][1]["logprobs"]["content"][0],
        json!({"token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": [
            {"token": "a", "logprob": -0.25, "bytes": [97]}, {"token": "b", "logprob": -1.25, "bytes": [98]}
        ]})
    );
    assert_eq!(body["choices"][0]["logprobs"]["content"][1]["token"], "<|im_end|>");
    assert_eq!(body["prompt_logprobs"][0], json!(null));
    assert_eq!(body["prompt_logprobs"][1]["105"]["rank"], 1);
    assert_eq!(body["usage"]["completion_tokens"], 4);
}

#[tokio::test]
async fn completions_answer_every_prompt_n_times() {
    let fake = Arc::new(Fake::saying("ok"));
    let body = completion(json!({"prompt": ["A", "B"], "n": 2, "echo": true, "logprobs": 0}));
    let answer = post(&fake, COMPLETIONS, &body).await;
    let body = answer.json();
    assert_eq!(body["object"], "text_completion");
    let texts: Vec<_> =
        body["choices"].as_array().expect("array").iter().map(|c| (c["index"].clone(), c["text"].clone())).collect();
    assert_eq!(json!(texts), json!([[0, "Aok"], [1, "Aok"], [2, "Bok"], [3, "Bok"]]));
    assert_eq!(
        body["choices"][2]["logprobs"],
        json!({
            "tokens": ["B", "o", "k", "<|im_end|>"], "token_logprobs": [null, -0.25, -0.25, -0.25],
            "top_logprobs": [null, {"o": -0.25}, {"k": -0.25}, {"<|im_end|>": -0.25}], "text_offset": [0, 1, 2, 3]
        })
    );
    assert_eq!(body["usage"]["prompt_tokens"], 2);
    let ids: Vec<_> = fake.seen.lock().iter().map(|request| request.id).collect();
    assert_ne!(ids[0], ids[1], "every prompt is a request of its own");
}

#[tokio::test]
async fn all_four_prompt_forms_are_understood() {
    let fake = Arc::new(Fake::saying("x"));
    for (prompt, inputs) in [
        (json!("A"), vec![Input::Text { text: "A".into(), add_special: true }]),
        (json!(["A"]), vec![Input::Text { text: "A".into(), add_special: true }]),
        (json!([65, 66]), vec![Input::Tokens(vec![65, 66])]),
        (json!([[65], [66]]), vec![Input::Tokens(vec![65]), Input::Tokens(vec![66])]),
    ] {
        fake.seen.lock().clear();
        let answer = post(&fake, COMPLETIONS, &completion(json!({"prompt": prompt, "echo": true}))).await;
        assert_eq!(answer.status, 200, "{}", answer.body);
        let seen: Vec<_> = fake.seen.lock().iter().map(|request| request.input.clone()).collect();
        assert_eq!(seen, inputs);
        assert_eq!(fake.seen.lock()[0].max_tokens, Some(16));
        assert!(answer.json()["choices"][0]["text"].as_str().expect("text").starts_with('A'));
    }
}

#[tokio::test]
async fn every_field_reaches_the_backend() {
    let fake = Arc::new(Fake::saying("{}"));
    let body = chat(json!({
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "kind"}]},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\":1}"}}
            ]},
            {"role": "tool", "tool_call_id": "c1", "content": "2", "unknown": true},
            {"role": "user", "name": "Ann", "content": "Hi"}
        ],
        "max_completion_tokens": 9, "min_tokens": 1, "ignore_eos": true, "stop": ["a", "b"], "stop_token_ids": [7],
        "temperature": 0.5, "top_p": 0, "top_k": -1, "min_p": 0.25, "repetition_penalty": 1.5, "presence_penalty": -1,
        "frequency_penalty": 1, "logit_bias": {"5": -100, "6": 1.5}, "seed": -1, "logprobs": true, "top_logprobs": 3,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
        "chat_template_kwargs": {"enable_thinking": false}, "user": "u", "metadata": {}, "something_new": [1],
        "cache_salt": "s", "priority": 3, "service_tier": "auto", "store": false, "modalities": ["text"], "n": 1
    }));
    let mut http = request(Method::POST, CHAT, body.to_string());
    http.headers_mut().insert("x-tenantry-timeout-ms", "1500".parse().expect("valid"));
    let answer = call(&fake, http).await;
    assert_eq!(answer.status, 200, "{}", answer.body);
    let seen = fake.seen.lock()[0].clone();
    let Input::Chat(input) = seen.input else { panic!("chat") };
    assert_eq!(
        json!(input.messages),
        json!([
            {"role": "system", "content": "Be\nkind"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "user", "name": "Ann", "content": "Hi"}
        ])
    );
    assert_eq!(json!(input.template_kwargs), json!({"enable_thinking": false}));
    assert_eq!((seen.max_tokens, seen.min_tokens, seen.ignore_eos), (Some(9), 1, true));
    assert_eq!((seen.stop, seen.stop_token_ids), (vec!["a".to_owned(), "b".to_owned()], vec![7]));
    assert_eq!(
        (seen.seed, seen.logprobs, seen.timeout),
        (Some(u64::MAX), Some(3), Some(std::time::Duration::from_millis(1500)))
    );
    assert_eq!(seen.grammar, Some(Grammar::JsonSchema("{\"type\":\"object\"}".to_owned())));
    let sampling = seen.sampling;
    assert_eq!((sampling.temperature, sampling.top_k, sampling.min_p), (0.5, 0, 0.25));
    assert!(sampling.top_p > 0.0 && sampling.top_p < 1e-30);
    assert_eq!((sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty), (1.5, -1.0, 1.0));
    assert_eq!(sampling.logit_bias, [(5, -100.0), (6, 1.5)]);
}

#[tokio::test]
async fn tool_calls_become_tool_calls() {
    let script = |request: &crate::gateway::backend::Prepared| {
        // The opening and closing tags are control tokens.
        let mut ids = vec![257];
        ids.extend(br#"{"name": "add", "arguments": {"a": 1}}"#.map(u32::from));
        ids.extend([258, EOS]);
        Script::Emit(emit(request, &ids, FinishReason::Stop))
    };
    let fake = Arc::new(Fake::new(script));
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]);
    let body = post(&fake, CHAT, &chat(json!({"tools": tools}))).await.json();
    let choice = &body["choices"][0];
    assert_eq!(choice["finish_reason"], "tool_calls");
    assert_eq!(choice["message"]["content"], json!(null));
    let call = &choice["message"]["tool_calls"][0];
    assert_eq!(call["function"], json!({"name": "add", "arguments": "{\"a\":1}"}));
    assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")));
    let pieces = post(&fake, CHAT, &chat(json!({"tools": tools, "stream": true}))).await.pieces();
    assert_eq!(pieces.len(), 3, "role, call, finish: {pieces:?}");
    assert_eq!(pieces[1]["choices"][0]["delta"]["tool_calls"][0]["index"], 0);
    assert_eq!(pieces[2]["choices"][0]["finish_reason"], "tool_calls");
    let body = post(&fake, CHAT, &chat(json!({"tools": tools, "tool_choice": "none"}))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], r#"{"name": "add", "arguments": {"a": 1}}"#);
}

#[tokio::test]
async fn stop_texts_are_cut_and_lengths_reported() {
    let fake = Arc::new(Fake::new(|request| {
        let ids = b"one END".map(u32::from);
        Script::Emit(emit(request, &ids, FinishReason::StopText { index: 0 }))
    }));
    let body = post(&fake, CHAT, &chat(json!({"stop": " END"}))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "one");
    assert_eq!(body["choices"][0]["finish_reason"], "stop");
    let fake = Arc::new(Fake::new(|request| Script::Emit(emit(request, &[0xE6], FinishReason::Length))));
    let body = post(&fake, COMPLETIONS, &completion(json!({}))).await.json();
    assert_eq!(body["choices"][0]["text"], "\u{fffd}", "half a character at the end is marked");
    assert_eq!(body["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn models_are_listed_and_found() {
    let fake = Arc::new(Fake::saying(""));
    let get = |path: &'static str| call(&fake, request(Method::GET, path, ""));
    let list = get("/v1/models").await.json();
    assert_eq!(list["object"], "list");
    assert_eq!(
        list["data"][0],
        json!({"id": "support", "object": "model", "created": 1_700_000_000, "owned_by": "acme",
            "root": "acme-support-smollm2-v1.0.0", "parent": "smollm2", "max_model_len": 2048})
    );
    assert_eq!(get("/v1/models/support").await.json(), list["data"][0]);
    let unknown = get("/v1/models/zeta").await;
    let submitted = post(&fake, CHAT, &chat(json!({"model": "zeta"}))).await;
    assert_eq!((unknown.status.as_u16(), &unknown.body), (404, &submitted.body), "the same bytes everywhere");
    assert_eq!(unknown.json()["error"]["code"], "model_not_found");
}

#[tokio::test]
async fn the_whole_answer_counts_tokens_that_have_no_text() {
    let fake = Arc::new(Fake::new(|request| Script::Emit(say(request, b""))));
    let body = post(&fake, CHAT, &chat(json!({}))).await.json();
    assert_eq!(body["choices"][0]["message"]["content"], "");
    assert_eq!(body["usage"]["completion_tokens"], 1);
}
