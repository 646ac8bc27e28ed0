//! The whole router against a scripted backend: shapes, refusals, streams, and real sockets where it matters.

mod fake;
mod shapes;
mod refusals;
mod streams;
mod resumed;

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::Service;

use self::fake::Fake;
use super::limits::Pace;
use super::{router, router_paced};

/// Waits short enough for tests.
const HASTY: Pace = Pace {
    body_wait: Duration::from_millis(50),
    status_wait: Duration::from_millis(50),
    keep_alive: Duration::from_millis(50),
    stall: Duration::from_millis(300),
};

/// Room for the bodies of a test.
const BODY_BYTES: usize = 64 << 20;

/// A response, read to its end.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }

    /// The payloads of a stream, without its end mark, which must be there.
    fn pieces(&self) -> Vec<Value> {
        let mut payloads: Vec<&str> = self.body.split_terminator("\n\n").collect();
        assert_eq!(payloads.pop(), Some("data: [DONE]"), "{}", self.body);
        let payload = |text: &str| serde_json::from_str(text.strip_prefix("data: ").expect(text)).expect(text);
        payloads.into_iter().filter(|text| !text.starts_with(':')).map(payload).collect()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("(absent)", |value| value.to_str().expect("ASCII"))
    }
}

async fn call(fake: &Arc<Fake>, request: Request<Body>) -> Answer {
    call_router(router(fake.clone(), BODY_BYTES), request).await
}

async fn call_router(mut router: axum::Router, request: Request<Body>) -> Answer {
    let response = router.call(request).await.expect("infallible");
    let (parts, body) = response.into_parts();
    let bytes = body.collect().await.expect("body").to_bytes();
    let body = String::from_utf8(bytes.to_vec()).expect("UTF-8");
    Answer { status: parts.status, headers: parts.headers, body }
}

fn request(method: Method, path: &str, body: impl Into<Body>) -> Request<Body> {
    let builder = Request::builder().method(method).uri(path).header("content-type", "application/json");
    builder.header("authorization", "Bearer acme-key").body(body.into()).expect("valid")
}

async fn post(fake: &Arc<Fake>, path: &str, body: &Value) -> Answer {
    call(fake, request(Method::POST, path, body.to_string())).await
}

/// A chat request with further fields.
fn chat(more: Value) -> Value {
    let mut body = serde_json::json!({"model": "support", "messages": [{"role": "user", "content": "Hi"}]});
    body.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
    body
}

/// A completion request with further fields.
fn completion(more: Value) -> Value {
    let mut body = serde_json::json!({"model": "support", "prompt": "Hi"});
    body.as_object_mut().expect("object").extend(more.as_object().expect("object").clone());
    body
}

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
