//! Streams that go on: from every event id the rest is what it would have been.

use std::sync::Arc;

use serde_json::json;
use shared::token::FinishReason;

use super::fake::{CONTROL, EOS, Fake, Script, emit};
use super::*;

/// Events of a stream, `(id, data)`.
fn events(answer: &Answer) -> Vec<(String, String)> {
    let mut events: Vec<&str> = answer.body.split_terminator("\n\n").collect();
    assert_eq!(events.pop(), Some("data: [DONE]"), "{}", answer.body);
    let split = |text: &str| {
        let (id, data) = text.strip_prefix("id: ")?.split_once("\ndata: ")?;
        Some((id.to_owned(), without_call_ids(data)))
    };
    events.into_iter().map(|text| split(text).unwrap_or_else(|| (String::new(), text.to_owned()))).collect()
}

/// Ids of tool calls are drawn where they are written.
fn without_call_ids(data: &str) -> String {
    let mut value: Value = serde_json::from_str(data).expect(data);
    if let Some(calls) = value["choices"][0]["delta"]["tool_calls"].as_array_mut() {
        calls.iter_mut().for_each(|call| call["id"] = json!("call"));
    }
    value.to_string()
}

fn going_on(path: &str, body: &Value, id: &str) -> Request<Body> {
    let mut request = request(Method::POST, path, body.to_string());
    request.headers_mut().insert("last-event-id", id.parse().expect("ASCII"));
    request
}

/// Umlauts in halves, a stop text that almost comes, a tool call.
fn fake() -> Arc<Fake> {
    let call = |name: &str| 256 + CONTROL.iter().position(|one| *one == name).expect("a control token") as u32;
    Arc::new(Fake {
        keeps: true,
        ..Fake::new(move |request| {
            let text = "hé, ENDE? ü".bytes().map(u32::from);
            let object = r#"{"name": "order", "arguments": {"id": 7}}"#.bytes().map(u32::from);
            let calls = [call("<tool_call>")].into_iter().chain(object).chain([call("</tool_call>")]);
            let ids: Vec<u32> = text.chain(calls).chain([EOS]).collect();
            Script::Emit(emit(request, &ids, FinishReason::Stop))
        })
    })
}

#[tokio::test]
async fn from_every_event_the_rest_is_what_it_would_have_been() {
    let tools = json!([{"type": "function", "function": {"name": "order", "parameters": {"type": "object"}}}]);
    let more = json!({"stream": true, "n": 2, "stop": ["ENDER"], "return_token_ids": true, "logprobs": true,
        "stream_options": {"include_usage": true}});
    let with_tools = json!({"stream": true, "tools": tools});
    let text = json!({"stream": true, "n": 2, "stop": ["ENDER"], "echo": true, "logprobs": 1});
    for (path, body) in [(CHAT, chat(more)), (CHAT, chat(with_tools)), (COMPLETIONS, completion(text))] {
        let fake = fake();
        let whole = events(&post(&fake, path, &body).await);
        assert!(whole.len() > 5, "{whole:?}");
        for (index, (id, _)) in whole.iter().enumerate().filter(|(_, (id, _))| !id.is_empty()) {
            let rest = call(&fake, going_on(path, &body, id)).await;
            assert_eq!(rest.status, StatusCode::OK, "{}", rest.body);
            assert_eq!(events(&rest), whole[index + 1..], "after {id}");
        }
    }
}

#[tokio::test]
async fn a_client_that_has_nothing_gets_everything_again() {
    let fake = fake();
    let body = chat(json!({"stream": true}));
    let whole = events(&post(&fake, CHAT, &body).await);
    let nothing = format!("{}/", whole[0].0.split_once('/').expect("an id").0);
    assert_eq!(events(&call(&fake, going_on(CHAT, &body, &nothing)).await), whole);
}

#[tokio::test]
async fn nobody_goes_on_with_what_is_not_known_or_not_theirs() {
    let fake = fake();
    let body = chat(json!({"stream": true}));
    let whole = events(&post(&fake, CHAT, &body).await);
    let unknown = call(&fake, going_on(CHAT, &body, &format!("{}/1", "7".repeat(32)))).await;
    assert_eq!(
        (unknown.status, unknown.json()["error"]["code"].as_str()),
        (StatusCode::NOT_FOUND, Some("stream_gone"))
    );
    let mut theirs = going_on(CHAT, &body, &whole[1].0);
    theirs.headers_mut().insert("authorization", "Bearer globex-key".parse().expect("ASCII"));
    assert_eq!(call(&fake, theirs).await.body, unknown.body);
    assert_eq!(call(&fake, going_on(CHAT, &body, "yesterday")).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn what_a_silent_node_may_remember_is_asked_for_again_later_and_begun_at_once() {
    let fake = Arc::new(Fake { one_is_silent: true, ..Arc::into_inner(fake()).expect("nobody else has it") });
    let body = chat(json!({"stream": true}));
    let resumed = call(&fake, going_on(CHAT, &body, &format!("{}/1", "7".repeat(32)))).await;
    assert_eq!(resumed.status, StatusCode::SERVICE_UNAVAILABLE, "{}", resumed.body);
    assert_eq!(
        call(&fake, with_key(&body)).await.status,
        StatusCode::OK,
        "a new request does not wait for a dead node"
    );
}

fn with_key(body: &Value) -> Request<Body> {
    let mut request = request(Method::POST, CHAT, body.to_string());
    request.headers_mut().insert("idempotency-key", "order 66".parse().expect("ASCII"));
    request
}

#[tokio::test]
async fn an_idempotency_key_stands_for_one_request() {
    let fake = fake();
    let body = chat(json!({"stream": true}));
    let first = call(&fake, with_key(&body)).await;
    let again = call(&fake, with_key(&body)).await;
    assert_eq!(events(&first), events(&again));
    let other = call(&fake, with_key(&chat(json!({"stream": true, "temperature": 0})))).await;
    assert_eq!(other.status, StatusCode::UNPROCESSABLE_ENTITY, "{}", other.body);
    assert_eq!(other.json()["error"]["code"], "idempotency_key_reused");
}

#[tokio::test]
async fn a_request_that_is_being_answered_is_not_begun_again() {
    let fake = Arc::new(Fake { keeps: true, ..Fake::new(|_| Script::EmitThenHang(Vec::new())) });
    let body = chat(json!({"stream": true}));
    let (door, sending) = (Arc::clone(&fake), with_key(&body));
    let first = tokio::spawn(async move { call(&door, sending).await });
    while fake.seen.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let again = call(&fake, with_key(&body)).await;
    assert_eq!((again.status, fake.seen.lock().len()), (StatusCode::CONFLICT, 1), "{}", again.body);
    assert_eq!(again.json()["error"]["code"], "idempotency_key_in_use");
    let (after, should) = (again.header("retry-after"), again.header("x-should-retry"));
    assert_eq!((after, should), ("1", "(absent)"), "a client may try again by itself");
    // Its client leaves: it may be asked for again.
    first.abort();
    assert!(first.await.is_err(), "it had not ended");
    assert!(fake.claimed.lock().is_empty());
}
