//! Server-sent events: the order of pieces, errors in mid-stream, clients that leave or do not read, and what a
//! socket refuses.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum_server::Handle;
use serde_json::json;
use shared::error::{ErrorKind, RequestError};
use shared::token::{FinishReason, TokenEvent};

use super::fake::{EOS, Fake, Script, emit, say};
use super::*;
use crate::gateway::limits::STALL_MAX;
use crate::gateway::listen::{self, Bounds};

#[tokio::test]
async fn a_chat_stream_is_role_text_finish_usage_done() {
    let fake = Arc::new(Fake::saying("hé"));
    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true}));
    let answer = post(&fake, CHAT, &body).await;
    assert_eq!(answer.header("content-type"), "text/event-stream; charset=utf-8");
    assert_eq!(answer.header("x-accel-buffering"), "no");
    assert_eq!(answer.header("x-tenantry-adapter"), "acme-support-smollm2-v1.0.0");
    let pieces = answer.pieces();
    let short: Vec<Value> = pieces
        .iter()
        .map(|piece| {
            json!([piece["choices"][0]["delta"], piece["choices"][0]["finish_reason"], piece["usage"]["total_tokens"]])
        })
        .collect();
    assert_eq!(
        json!(short),
        json!([
            [{"role": "assistant", "content": ""}, null, null],
            [{"content": "h"}, null, null],
            [{"content": "é"}, null, null],
            [{}, "stop", null],
            [null, null, 6]
        ])
    );
    assert_eq!(pieces[0]["prompt_token_ids"], json!([72, 105]));
    assert_eq!(pieces[2]["choices"][0]["token_ids"], json!([0xC3, 0xA9]), "both halves of the character");
    assert_eq!(pieces[3]["choices"][0]["token_ids"], json!([EOS]));
    assert!(pieces.iter().all(|piece| piece["object"] == "chat.completion.chunk" && piece["id"] == pieces[0]["id"]));
    assert_eq!(pieces[0].get("usage"), Some(&json!(null)), "null until the usage piece");
    assert_eq!(pieces[4]["choices"], json!([]));
    let plain = post(&fake, CHAT, &chat(json!({"stream": true}))).await.pieces();
    assert!(plain.iter().all(|piece| piece.get("usage").is_none()) && plain.len() == 4);
}

#[tokio::test]
async fn interleaved_choices_come_out_apart() {
    let fake = Arc::new(Fake::new(|request| {
        let mut events = say(request, b"");
        events.truncate(1);
        for (seq, pair) in (0..).zip([(b'a', b'x'), (b'b', b'y')]) {
            events.push(TokenEvent::Token { choice: 0, seq, id: pair.0.into(), logprobs: None });
            events.push(TokenEvent::Token { choice: 1, seq, id: pair.1.into(), logprobs: None });
        }
        for choice in [1, 0] {
            events.push(TokenEvent::Finished { choice, reason: FinishReason::Length, compute: Duration::ZERO });
        }
        Script::Emit(events)
    }));
    for (path, body) in
        [(CHAT, chat(json!({"stream": true, "n": 2}))), (COMPLETIONS, completion(json!({"stream": true, "n": 2})))]
    {
        let mut texts = [String::new(), String::new()];
        for piece in post(&fake, path, &body).await.pieces() {
            let choice = &piece["choices"][0];
            let text = choice["delta"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_default();
            texts[choice["index"].as_u64().expect("index") as usize].push_str(text);
        }
        assert_eq!(texts, ["ab", "xy"]);
    }
}

#[tokio::test]
async fn streamed_text_never_shows_a_stop_text() {
    let fake = Arc::new(Fake::new(|request| {
        Script::Emit(emit(request, &b"go EN END".map(u32::from), FinishReason::StopText { index: 0 }))
    }));
    let pieces =
        post(&fake, COMPLETIONS, &completion(json!({"stream": true, "stop": " END", "echo": true}))).await.pieces();
    let texts: Vec<_> = pieces.iter().map(|piece| piece["choices"][0]["text"].as_str().expect("text")).collect();
    assert_eq!(texts.concat(), "Higo EN");
    assert_eq!(texts[0], "Hi", "the echo comes first");
    assert_eq!(pieces.last().expect("piece")["choices"][0]["finish_reason"], "stop");
}

#[tokio::test]
async fn a_failure_before_the_first_token_keeps_its_status() {
    let late = RequestError::new(ErrorKind::Deadline, "queue_timeout", "waited too long");
    let fake = Arc::new(Fake::new(move |_| Script::Emit(vec![TokenEvent::Failed(late.clone())])));
    let answer = post(&fake, CHAT, &chat(json!({"stream": true}))).await;
    assert_eq!((answer.status.as_u16(), answer.json()["error"]["code"].as_str()), (504, Some("queue_timeout")));
    let fake = Arc::new(Fake::new(|_| Script::Emit(vec![])));
    let answer = post(&fake, CHAT, &chat(json!({"stream": true}))).await;
    assert_eq!((answer.status.as_u16(), answer.json()["error"]["code"].as_str()), (503, Some("engine_restarted")));
}

#[tokio::test]
async fn a_failure_in_mid_stream_is_an_error_piece() {
    for cut in [false, true] {
        let fake = Arc::new(Fake::new(move |request| {
            let mut events = say(request, b"ab");
            events.truncate(2);
            if !cut {
                events.push(TokenEvent::Failed(RequestError::internal()));
            }
            Script::Emit(events)
        }));
        let pieces = post(&fake, CHAT, &chat(json!({"stream": true}))).await.pieces();
        let last = pieces.last().expect("piece");
        assert_eq!(last["error"]["code"], if cut { "engine_restarted" } else { "internal_error" });
        assert_eq!(pieces[1]["choices"][0]["delta"]["content"], "a");
        let whole = post(&fake, CHAT, &chat(json!({}))).await;
        assert_eq!(whole.status.as_u16(), if cut { 503 } else { 500 });
    }
}

#[tokio::test]
async fn silence_is_filled_with_comments() {
    let fake = Arc::new(Fake::new(|_| Script::EmitThenHang(vec![])));
    let mut service = router_paced(fake.clone(), HASTY, BODY_BYTES);
    let response =
        service.call(request(axum::http::Method::POST, CHAT, chat(json!({"stream": true})).to_string())).await;
    let mut body = response.expect("infallible").into_body();
    let mut read = String::new();
    while !read.contains(": keep-alive\n\n: keep-alive\n\n") {
        let frame = body.frame().await.expect("frame").expect("data").into_data().expect("data");
        read.push_str(std::str::from_utf8(&frame).expect("UTF-8"));
    }
    assert!(read.contains("\"role\":\"assistant\""), "the stream begins although the queue says nothing yet");
    drop(body);
    until(|| fake.dropped.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test]
async fn a_client_that_reads_nothing_is_cut_and_its_request_ends() {
    let fake = Arc::new(Fake::new(|_| Script::Forever));
    let mut service = router_paced(fake.clone(), HASTY, BODY_BYTES);
    let response =
        service.call(request(axum::http::Method::POST, CHAT, chat(json!({"stream": true})).to_string())).await;
    let body = response.expect("infallible").into_body();
    until(|| fake.dropped.load(Ordering::SeqCst) == 1).await;
    assert!(body.collect().await.is_err(), "a cut stream must not look complete");
}

/// Waits in steps until it is so; fails after 20 s.
async fn until(so: impl Fn() -> bool) {
    for _ in 0..2000 {
        if so() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("never became true");
}

/// Bounds that no test reaches by accident.
const BOUNDS: Bounds =
    Bounds { connections_max: 4096, per_address_max: 4096, stall: STALL_MAX, header_wait: Duration::from_secs(30) };

fn serve(fake: &Arc<Fake>, bounds: Bounds) -> SocketAddr {
    serve_router(router(fake.clone(), BODY_BYTES), bounds)
}

fn serve_router(router: axum::Router, bounds: Bounds) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let address = listener.local_addr().expect("address");
    tokio::spawn(listen::serve(listener, None, Handle::new(), bounds, router));
    address
}

fn send(address: SocketAddr, head: &str, body: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("connect");
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
    let _ = socket.write_all(format!("{head}\r\n\r\n{body}").as_bytes());
    socket
}

fn stream_request(body: &Value) -> (String, String) {
    let body = body.to_string();
    let len = body.len();
    let head = format!("POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer acme-key\r\ncontent-length: {len}");
    (head, body)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_ends_its_request() {
    let fake = Arc::new(Fake::new(|request| {
        let mut events = say(request, b"ab");
        events.truncate(2);
        Script::EmitThenHang(events)
    }));
    let address = serve(&fake, BOUNDS);
    for (count, stream) in [(1, true), (2, false)] {
        let (head, body) = stream_request(&chat(json!({"stream": stream})));
        let mut socket = send(address, &head, &body);
        if stream {
            let mut first = [0; 16];
            socket.read_exact(&mut first).expect("the stream has begun");
            assert!(first.starts_with(b"HTTP/1.1 200"));
        } else {
            until(|| fake.seen.lock().len() == count).await;
        }
        drop(socket);
        until(|| fake.dropped.load(Ordering::SeqCst) == count).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_takes_nothing_is_closed() {
    // Only the socket's own rule can fire here: the pump's is an hour away.
    let fake = Arc::new(Fake::new(|_| Script::Forever));
    let patient = Pace { stall: Duration::from_secs(3600), ..Pace::default() };
    let bounds = Bounds { stall: Duration::from_millis(300), ..BOUNDS };
    let address = serve_router(router_paced(fake.clone(), patient, BODY_BYTES), bounds);
    let (head, body) = stream_request(&chat(json!({"stream": true})));
    let socket = send(address, &head, &body);
    until(|| fake.dropped.load(Ordering::SeqCst) == 1).await;
    drop(socket);
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_refuse_floods() {
    let fake = Arc::new(Fake::saying("x"));
    let address = serve(&fake, Bounds { connections_max: 2, header_wait: Duration::from_millis(300), ..BOUNDS });
    let answer = |mut socket: TcpStream| {
        let mut text = Vec::new();
        let _ = socket.read_to_end(&mut text);
        String::from_utf8_lossy(&text).lines().next().unwrap_or_default().to_owned()
    };
    let many: String = (0..10_000).map(|i| format!("\r\nx-{i}: y")).collect();
    let flood = tokio::task::spawn_blocking(move || {
        answer(send(address, &format!("GET /v1/models HTTP/1.1\r\nhost: x{many}"), ""))
    });
    let status = flood.await.expect("joined");
    assert!(status.is_empty() || status.contains("431"), "{status}");
    let smuggle = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer acme-key\r\ncontent-length: 5\r\ncontent-length: 6";
    let status = tokio::task::spawn_blocking(move || answer(send(address, smuggle, "hello!"))).await.expect("joined");
    assert!(status.contains("400"), "{status}");
    let slow = tokio::task::spawn_blocking(move || {
        let mut socket = TcpStream::connect(address).expect("connect");
        socket.set_read_timeout(Some(Duration::from_secs(10))).expect("timeout");
        socket.write_all(b"GET /healthz HTTP/1.1\r\n").expect("write");
        answer(socket)
    });
    let status = slow.await.expect("joined");
    assert!(status.is_empty() || status.contains("408"), "{status}");
    let full = tokio::task::spawn_blocking(move || {
        let held: Vec<_> = (0..2).map(|_| TcpStream::connect(address).expect("connect")).collect();
        std::thread::sleep(Duration::from_millis(100));
        let status = answer(send(address, "GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close", ""));
        drop(held);
        status
    });
    assert_eq!(full.await.expect("joined"), "HTTP/1.1 503 Service Unavailable", "the third connection is told why");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_bounded_per_address() {
    let fake = Arc::new(Fake::saying("x"));
    let address = serve(&fake, Bounds { per_address_max: 2, ..BOUNDS });
    let get = async |from: &str| {
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.bind(from.parse().expect("an address")).expect("loopback");
        let mut stream = socket.connect(address).await.expect("connects");
        let ask = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        // A refused connection may already be closed.
        let _ = tokio::io::AsyncWriteExt::write_all(&mut stream, ask).await;
        let mut text = Vec::new();
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut text).await;
        String::from_utf8_lossy(&text).into_owned()
    };
    assert!(get("127.0.0.1:0").await.starts_with("HTTP/1.1 200"));
    let held: Vec<_> = (0..2).map(|_| TcpStream::connect(address).expect("connect")).collect();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let refused = get("127.0.0.1:0").await;
    assert!(refused.starts_with("HTTP/1.1 503") && refused.contains("too_many_connections"), "{refused}");
    assert!(get("127.0.0.2:0").await.starts_with("HTTP/1.1 200"), "another address is served");
    drop(held);
    for _ in 0..100 {
        if get("127.0.0.1:0").await.starts_with("HTTP/1.1 200") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("closed connections give their places back");
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_on_their_way_are_bounded_by_what_has_arrived() {
    let fake = Arc::new(Fake::saying("x"));
    // A quarter for one tenant: 64 KiB.
    let address = serve_router(router_paced(fake.clone(), Pace::default(), 256 << 10), BOUNDS);
    let head = |bytes: usize| {
        format!(
            "POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer acme-key\r\nconnection: close\r\ncontent-length: {bytes}"
        )
    };
    let begin = move |claimed: usize, sent: usize| send(address, &head(claimed), &" ".repeat(sent));
    let outcome = tokio::task::spawn_blocking(move || {
        let claimed: Vec<_> = (0..8).map(|_| begin(1 << 20, 1)).collect();
        let holding = begin(100 << 10, 60 << 10);
        std::thread::sleep(Duration::from_millis(200));
        let read = |mut socket: TcpStream| {
            let mut text = Vec::new();
            let _ = socket.read_to_end(&mut text);
            String::from_utf8_lossy(&text).into_owned()
        };
        let over = read(begin(20 << 10, 20 << 10));
        drop((holding, claimed));
        std::thread::sleep(Duration::from_millis(200));
        let body = chat(json!({"user": "u".repeat(20 << 10)})).to_string();
        let after = read(send(address, &head(body.len()), &body));
        (over, after)
    });
    let (over, after) = outcome.await.expect("joined");
    assert!(over.starts_with("HTTP/1.1 429") && over.contains("too_many_bodies"), "{over}");
    assert!(over.to_lowercase().contains("retry-after: 1"), "{over}");
    assert!(after.starts_with("HTTP/1.1 200"), "{after}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_outlives_a_refusal_that_did_not_read_its_small_body() {
    let address = serve(&Arc::new(Fake::saying("a")), BOUNDS);
    let small = "x".repeat(2000);
    // Without a key, on no route, and a GET with a body: the answer comes before the body does.
    for head in [
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 2000",
        "POST /nowhere HTTP/1.1\r\nhost: x\r\nauthorization: Bearer acme-key\r\ncontent-length: 2000",
        "GET /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 2000",
    ] {
        let mut socket = send(address, head, "");
        let mut first = [0; 12];
        socket.read_exact(&mut first).expect("an answer before the body");
        tokio::time::sleep(Duration::from_millis(50)).await;
        socket.write_all(small.as_bytes()).expect("the body is taken");
        socket.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").expect("taken");
        let mut rest = String::new();
        socket.read_to_string(&mut rest).expect("UTF-8");
        assert!(rest.contains("HTTP/1.1 200"), "{head:?} then {rest:?}");
    }
    // What is too much to read for nobody ends its connection.
    let mut socket = send(address, "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 900000", "");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).expect("UTF-8");
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
}
