//! Nodes of the program before this one, and of one that is too old or too new, next to nodes of this one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use peer::pki::node_name;
use peer::{Identity, PeerError, Refusal};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, Connection, Endpoint, ServerConfig};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::version::TLS13;
use shared::clock::{Clock, SystemClock};
use shared::request::Emitted;
use shared::token::{FinishReason, TokenEvent};
use tokio::time::timeout;
use wire::frame::{Decoder, Frame, FrameError, Kind};
use wire::node::{Answer, Hello, Message, Opening, Request, Response};
use wire::{Spoken, Version};

use crate::fixture::{Folder, heartbeat, hello, join, loopback, node, serving, start, token, token_of, until};

const SOON: Duration = Duration::from_secs(5);
const OLD: Version = Version::V1;

/// What a node has in its data folder, read as any program would.
struct Papers {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

fn papers(folder: &Folder, name: &str) -> Papers {
    let read = |file: &str| std::fs::read(folder.0.join(name).join(file)).expect("stored");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&read("ca.pem")).expect("PEM")).expect("an authority");
    Papers {
        chain: vec![CertificateDer::from_pem_slice(&read("peer.pem")).expect("PEM")],
        key: PrivateKeyDer::from_pem_slice(&read("peer.key")).expect("PEM"),
        roots: Arc::new(roots),
    }
}

/// A node of another program: it has a certificate and speaks the protocols it is told to.
fn other_program(folder: &Folder, name: &str, protocols: &[&[u8]]) -> Endpoint {
    join(&folder.0, name);
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let Papers { chain, key, roots } = papers(folder, name);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build();
    let mut server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_client_cert_verifier(verifier.expect("a verifier"))
        .with_single_cert(chain.clone(), key.clone_key())
        .expect("a pair");
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, key)
        .expect("a pair");
    server.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    client.alpn_protocols = server.alpn_protocols.clone();
    let server = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(server).expect("for QUIC")));
    let mut endpoint = Endpoint::server(server, ([127, 0, 0, 1], 0).into()).expect("a free port");
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(QuicClientConfig::try_from(client).expect("QUIC"))));
    endpoint
}

fn old_frame(message: &impl Message) -> Vec<u8> {
    let mut frame = Vec::new();
    message.encode_for(OLD, SystemClock.now(), &mut frame).expect("version 1 has it");
    frame
}

/// All frames of version 1 that arrive on a stream.
async fn old_frames(receive: &mut quinn::RecvStream, kinds: &'static [Kind]) -> Vec<Frame> {
    let bytes = receive.read_to_end(1 << 20).await.expect("whole");
    let (mut decoder, mut rest, mut frames) = (Decoder::speaking(OLD, kinds), bytes.as_slice(), Vec::new());
    while !rest.is_empty() {
        frames.extend(decoder.feed(&mut rest).expect("version 1"));
    }
    decoder.finish().expect("whole");
    frames
}

async fn ask_old(connection: &Connection, message: &impl Message, kinds: &'static [Kind]) -> Vec<Frame> {
    let (mut send, mut receive) = connection.open_bi().await.expect("a stream");
    send.write_all(&old_frame(message)).await.expect("sent");
    send.finish().expect("sent");
    timeout(SOON, old_frames(&mut receive, kinds)).await.expect("in time")
}

/// Answers as a node of version 1 did: greets, says that it is done, gives three tokens.
async fn serve_old(endpoint: Endpoint) {
    let connection = endpoint.accept().await.expect("dialled").await.expect("connected");
    while let Ok((mut send, mut receive)) = connection.accept_bi().await {
        const ALL: &[Kind] = Opening::KINDS;
        let bytes = receive.read_to_end(1 << 20).await.expect("whole");
        if let Ok(frame) = Decoder::only(OLD, Hello::KINDS, &bytes) {
            let greeting = Hello::decode(&frame, SystemClock.now()).expect("a hello of version 1");
            assert_eq!((greeting.node, greeting.wire), (node("a"), Spoken { oldest: 1, newest: 1 }));
            send.write_all(&old_frame(&hello("b"))).await.expect("sent");
        } else {
            let frame = Decoder::only(OLD, ALL, &bytes).expect("a frame of version 1");
            match Opening::decode(&frame, SystemClock.now()).expect("a message of version 1") {
                Opening::Request(_) => send.write_all(&old_frame(&Response::Done)).await.expect("sent"),
                Opening::Start(start) => {
                    let tokens = (0..3).map(|seq| TokenEvent::Token { choice: 0, seq, id: token(seq), logprobs: None });
                    let end = TokenEvent::Finished { choice: 0, reason: FinishReason::Length, compute: Duration::ZERO };
                    for event in tokens.chain([end]) {
                        let answer = Answer::Event { attempt: start.attempt, event };
                        send.write_all(&old_frame(&answer)).await.expect("sent");
                    }
                }
                Opening::Renew => panic!("version 1 has no such message"),
            }
        }
        send.finish().expect("sent");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_the_program_before_is_asked_in_its_version() {
    let folder = Folder::new();
    let a = join(&folder.0, "a");
    let old = other_program(&folder, "b", &[OLD.alpn()]);
    let address = old.local_addr().expect("bound");
    tokio::spawn(serve_old(old));
    let (net, _) = serving(&a, &[("b", address)], loopback());
    timeout(SOON, net.connected(&node("b"))).await.expect("connected");
    assert_eq!(net.version_of(&node("b")), Some(OLD));
    let greeting = net.hello_of(&node("b")).expect("it said hello");
    assert_eq!((greeting.wire.newest, greeting.has_authority), (1, false));
    let answer = net.call(&node("b"), &Request::DrainNotice { epoch: 1 }, SOON).await;
    assert!(matches!(answer, Ok(Response::Done)), "{answer:?}");
    let work = start(&SystemClock, 3, 1, Emitted::default());
    let mut exchange = net.start(&node("b"), &work, SOON).await.expect("taken on");
    for seq in 0..3 {
        let answer = exchange.recv().await.expect("alive").expect("a token");
        assert_eq!(token_of(&answer, seq), Some(token(seq)));
    }
    assert_eq!(token_of(&exchange.recv().await.expect("alive").expect("the end"), 3), None);
    assert!(net.datagram(&node("b"), &heartbeat(1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_the_program_before_is_answered_in_its_version() {
    let folder = Folder::new();
    let a = join(&folder.0, "a");
    let old = other_program(&folder, "b", &[OLD.alpn()]);
    let nowhere: SocketAddr = ([127, 0, 0, 1], 1).into();
    let parts = loopback();
    let address = parts.socket.local_addr().expect("bound");
    let (net, echo) = serving(&a, &[("b", nowhere)], parts);
    let connecting = old.connect(address, &node_name(&node("a"))).expect("valid");
    let connection = timeout(SOON, connecting).await.expect("in time").expect("let in");
    let frames = ask_old(&connection, &hello("b"), Hello::KINDS).await;
    let greeting = Hello::decode(&frames[0], SystemClock.now()).expect("a hello of version 1");
    assert_eq!(greeting.node, node("a"));
    let frames = ask_old(&connection, &Request::DrainNotice { epoch: 1 }, Response::KINDS).await;
    assert!(matches!(Response::decode(&frames[0], SystemClock.now()), Ok(Response::Done)));
    let frames = ask_old(&connection, &start(&SystemClock, 5, 1, Emitted::default()), Answer::KINDS).await;
    assert_eq!(frames.len(), 6);
    for (seq, frame) in (0..5).zip(&frames) {
        let answer = Answer::decode(frame, SystemClock.now()).expect("an answer");
        assert_eq!(token_of(&answer, seq), Some(token(seq)));
    }
    let beat = wire::node::encode_datagram_for(OLD, &heartbeat(7), SystemClock.now());
    connection.send_datagram(beat.into()).expect("sent");
    until("the heartbeat is heard", || echo.beats.load(std::sync::atomic::Ordering::SeqCst) == 7).await;
    assert!(Refusal::ALL.into_iter().all(|reason| net.refusals().count(reason) == 0));
    // What is said in the newer version on a connection of the older one is refused, and so is what it lacks.
    let beat = wire::node::encode_datagram_for(Version::V2, &heartbeat(8), SystemClock.now());
    connection.send_datagram(beat.into()).expect("sent");
    timeout(SOON, connection.closed()).await.expect("closed");
    until("it is refused", || net.refusals().count(Refusal::Protocol) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_without_a_version_in_common_refuse_each_other_by_name() {
    let folder = Folder::new();
    let a = join(&folder.0, "a");
    for protocol in [&b"tenantry-node/0"[..], b"tenantry-node/3"] {
        let other = other_program(&folder, "b", &[protocol]);
        let parts = loopback();
        let address = parts.socket.local_addr().expect("bound");
        let (net, _) = serving(&a, &[("b", other.local_addr().expect("bound"))], parts);
        let accepting = other.clone();
        tokio::spawn(async move {
            while let Some(incoming) = accepting.accept().await {
                let _ = incoming.await;
            }
        });
        let why = timeout(SOON, async {
            loop {
                match net.call(&node("b"), &Request::DrainNotice { epoch: 1 }, SOON).await {
                    Err(PeerError::NotConnected { why, .. }) if !why.contains("dialled") => break why,
                    Err(PeerError::NotConnected { .. }) => tokio::time::sleep(Duration::from_millis(10)).await,
                    other => panic!("{other:?}"),
                }
            }
        });
        let why = why.await.expect("in time");
        assert!(why.contains("none of wire versions 1 to 2; hint: upgrade"), "{why}");
        let dialled = other.connect(address, &node_name(&node("a"))).expect("valid").await;
        assert!(dialled.is_err());
        until("it is refused", || net.refusals().count(Refusal::Protocol) == 1).await;
    }
}

/// Two programs of which one is ahead take the newest version that both speak.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_the_next_program_is_met_in_the_version_of_this_one() {
    let folder = Folder::new();
    let a: Identity = join(&folder.0, "a");
    let next = other_program(&folder, "b", &[b"tenantry-node/3", Version::NEWEST.alpn()]);
    let parts = loopback();
    let address = parts.socket.local_addr().expect("bound");
    let (_net, _) = serving(&a, &[("b", ([127, 0, 0, 1], 1).into())], parts);
    let connecting = next.connect(address, &node_name(&node("a"))).expect("valid");
    let connection = timeout(SOON, connecting).await.expect("in time").expect("let in");
    let agreed = connection.handshake_data().expect("done").downcast::<quinn::crypto::rustls::HandshakeData>();
    let agreed = agreed.expect("by rustls").protocol.expect("agreed");
    assert_eq!(Version::of_alpn(&agreed), Some(Version::NEWEST));
    let old = Decoder::only(Version::NEWEST, Hello::KINDS, &old_frame(&hello("b"))).expect_err("another version");
    assert_eq!(old, FrameError::Version { found: 1, agreed: Version::NEWEST });
}
