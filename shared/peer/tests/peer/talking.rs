//! Calls, work, cancellation and heartbeats over real UDP on loopback.

use std::sync::atomic::Ordering;
use std::time::Duration;

use peer::PeerError;
use shared::clock::SystemClock;
use shared::request::Emitted;
use tokio::time::timeout;
use wire::node::{Request, Response};

use crate::fixture::{Echo, Folder, heartbeat, join, loopback, node, serving, start, token, token_of, until};

const SOON: Duration = Duration::from_secs(5);

struct Pair {
    a: peer::PeerNet,
    #[expect(dead_code, reason = "keeps the other end alive")]
    b: peer::PeerNet,
    at_b: std::sync::Arc<Echo>,
    _folder: Folder,
}

async fn pair() -> Pair {
    let folder = Folder::new();
    let (a, b) = (join(&folder.0, "a"), join(&folder.0, "b"));
    let (parts_a, parts_b) = (loopback(), loopback());
    let address = |parts: &peer::EndpointParts| parts.socket.local_addr().expect("bound");
    let (at_a, at_b) = (address(&parts_a), address(&parts_b));
    let (a, _) = serving(&a, &[("b", at_b)], parts_a);
    let (b, echo) = serving(&b, &[("a", at_a)], parts_b);
    timeout(SOON, a.connected(&node("b"))).await.expect("connected");
    Pair { a, b, at_b: echo, _folder: folder }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_and_streams_and_heartbeats_arrive() {
    let pair = pair().await;
    let b = node("b");
    assert_eq!(pair.a.hello_of(&b).expect("connected").node, b);
    let bytes: Vec<u8> = (0..1_000_000).map(|n: u32| n as u8).collect();
    let request = Request::Raft { group: 0, bytes: bytes.clone() };
    let Ok(Response::Raft { bytes: answer }) = pair.a.call(&b, &request, SOON).await else { panic!("answered") };
    assert!(answer.iter().rev().eq(&bytes));
    let mut exchange =
        pair.a.start(&b, &start(&SystemClock, 2000, 1, Emitted::default()), SOON).await.expect("taken on");
    let mut n_tokens = 0;
    while let Some(answer) = timeout(SOON, exchange.recv()).await.expect("in time").expect("alive") {
        let Some(id) = token_of(&answer, n_tokens) else { continue };
        assert_eq!(id, token(n_tokens));
        n_tokens += 1;
    }
    assert_eq!(n_tokens, 2000);
    assert!((1..=20).all(|seq| pair.a.datagram(&b, &heartbeat(seq))));
    until("the last heartbeat", || pair.at_b.beats.load(Ordering::SeqCst) == 20).await;
    assert_eq!(pair.at_b.hellos.load(Ordering::SeqCst), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn work_that_nobody_waits_for_is_cancelled() {
    let pair = pair().await;
    let endless = start(&SystemClock, u32::MAX / 2, 1, Emitted::default());
    let mut exchange = pair.a.start(&node("b"), &endless, SOON).await.expect("taken on");
    exchange.recv().await.expect("alive").expect("a token");
    drop(exchange);
    until("cancellation", || pair.at_b.cancelled.load(Ordering::SeqCst) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_does_not_read_holds_the_sender_back() {
    let pair = pair().await;
    let endless = start(&SystemClock, u32::MAX / 2, 1, Emitted::default());
    let mut exchange = pair.a.start(&node("b"), &endless, SOON).await.expect("taken on");
    exchange.recv().await.expect("alive").expect("a token");
    tokio::time::sleep(Duration::from_millis(500)).await;
    // A frame has more than 50 bytes, and 256 KiB may be under way.
    let n_sent = pair.at_b.sent.load(Ordering::SeqCst);
    assert!(n_sent < 6000, "{n_sent} tokens were sent to a receiver that read one");
    let request = Request::Raft { group: 0, bytes: vec![1, 2] };
    assert!(pair.a.call(&node("b"), &request, SOON).await.is_ok(), "a call passes what is held back");
    for seq in 1..20_000 {
        let answer = timeout(SOON, exchange.recv()).await.expect("it goes on once it is read");
        token_of(&answer.expect("alive").expect("endless"), seq);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_cannot_be_answered_say_why() {
    let pair = pair().await;
    let request = Request::DrainNotice { epoch: 1 };
    let unknown = pair.a.call(&node("x"), &request, SOON).await.expect_err("no such node");
    assert!(matches!(unknown, PeerError::Unknown { .. }), "{unknown}");
    let hangs = Request::Admin { bytes: Vec::new() };
    let late = pair.a.call(&node("b"), &hangs, Duration::from_millis(100)).await.expect_err("it never answers");
    assert!(matches!(late, PeerError::Late { .. }), "{late}");
    let large = Request::Raft { group: 0, bytes: vec![0; 17 << 20] };
    let large = pair.a.call(&node("b"), &large, SOON).await.expect_err("larger than a frame");
    assert!(matches!(large, PeerError::Frame { .. }), "{large}");
    assert!(matches!(pair.a.call(&node("b"), &request, SOON).await, Ok(Response::Done)), "the connection is whole");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_says_good_bye_is_gone_at_once_and_found_again() {
    let folder = Folder::new();
    let (a, b) = (join(&folder.0, "a"), join(&folder.0, "b"));
    let parts = loopback();
    let address = parts.socket.local_addr().expect("bound");
    let (first, _) = serving(&b, &[("a", ([127, 0, 0, 1], 1).into())], parts);
    let (a, _) = serving(&a, &[("b", address)], loopback());
    timeout(SOON, a.connected(&node("b"))).await.expect("connected");
    first.close().await;
    until("the good-bye", || !a.is_connected(&node("b"))).await;
    let error = a.call(&node("b"), &Request::DrainNotice { epoch: 1 }, SOON).await.expect_err("gone");
    assert!(matches!(error, PeerError::NotConnected { .. }), "{error}");
    drop(first);
    // The socket closes with the endpoint's driver, a moment later.
    let parts = loop {
        if let Ok(parts) = peer::EndpointParts::bind(address) {
            break parts;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    let (_second, _) = serving(&b, &[("a", ([127, 0, 0, 1], 1).into())], parts);
    timeout(SOON, a.connected(&node("b"))).await.expect("found again");
}
