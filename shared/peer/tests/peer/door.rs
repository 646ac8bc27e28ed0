//! A door for clients whose service counts, and guests who knock at it over any socket.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use peer::clients::{self, AnswerSink, ClientBounds, ClientService, Failure};
use peer::pki::NodeKey;
use peer::{Ca, EndpointParts};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint, EndpointConfig, RecvStream, TransportConfig};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use shared::clock::{Clock, SystemClock};
use tokio::time::Instant;
use wire::client::{Answer, Ask, Decoder, Endpoint as Call, Hello, Piece};

use crate::fixture::node;

pub(crate) const KEY: &str = "tk_test";
pub(crate) const NAME: &str = "nodes.example";
/// Bytes of JSON in each piece.
const PIECE_BYTES: usize = 100;

/// Answers "N" with N pieces of one token each.
#[derive(Default)]
pub(crate) struct Teller {
    pub(crate) asked: AtomicUsize,
    /// Bytes of pieces that the network has taken.
    pub(crate) taken: AtomicU64,
    /// After how long it was told that a client is gone.
    pub(crate) cut: Mutex<Vec<Duration>>,
    /// Before each piece.
    pub(crate) pause: Option<Duration>,
}

impl ClientService for Teller {
    type Tenant = ();

    fn authenticate(&self, key: &str) -> Result<(), Failure> {
        let failure = Failure { status: 401, retry_after_ms: 0, json: b"{}".to_vec() };
        if key == KEY { Ok(()) } else { Err(failure) }
    }

    async fn ask(&self, _: Arc<()>, _: SocketAddr, ask: Ask, mut answers: AnswerSink) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let Ask::New { body, .. } = ask else { panic!("nobody resumes here") };
        let n_pieces: u32 = String::from_utf8(body).expect("text").parse().expect("a number");
        let began = Instant::now();
        for first in 0..n_pieces {
            if let Some(pause) = self.pause {
                tokio::time::sleep(pause).await;
            }
            let json = vec![b' '; PIECE_BYTES];
            let piece = Piece { choice: 0, first, n_tokens: 1, opens: false, ends: false, json };
            if answers.send(&[Answer::Piece(piece)]).await.is_err() {
                self.cut.lock().expect("no panic").push(began.elapsed());
                return;
            }
            self.taken.fetch_add(PIECE_BYTES as u64, Ordering::SeqCst);
        }
        if answers.send(&[Answer::Done]).await.is_ok() {
            answers.finish();
        }
    }

    async fn http3(&self, connection: quinn::Connection) {
        connection.close(0_u32.into(), b"not here");
    }
}

/// A certificate for the door, and the authority that signed it.
pub(crate) struct Papers {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    ca: CertificateDer<'static>,
}

pub(crate) fn papers(folder: &Path) -> Papers {
    let now = SystemClock.wall();
    let ca = Ca::load_or_create(&folder.join("ca"), now).expect("an authority");
    let public = NodeKey::load_or_create(folder).expect("a key").public();
    let certificate = ca.certify(NAME, &public, now, Duration::from_secs(600)).expect("certified");
    let key = std::fs::read(folder.join("peer.key")).expect("stored");
    let parse = |pem: &str| CertificateDer::from_pem_slice(pem.as_bytes()).expect("PEM");
    let key = PrivateKeyDer::from_pem_slice(&key).expect("PEM");
    Papers { chain: vec![parse(&certificate)], key, ca: parse(ca.pem()) }
}

/// Opens the door and serves at it.
pub(crate) fn serving(papers: &Papers, parts: EndpointParts, teller: &Arc<Teller>) -> Endpoint {
    let endpoint = clients::open(papers.chain.clone(), papers.key.clone_key(), parts).expect("a door");
    let bounds = ClientBounds { connections: 1024, bodies: 4 };
    tokio::spawn(clients::serve(endpoint.clone(), node("a"), teller.clone(), bounds));
    endpoint
}

/// How a guest dials.
pub(crate) fn dialling(papers: &Papers, transport: TransportConfig) -> ClientConfig {
    dialling_as(papers, transport, wire::CLIENT_ALPN)
}

/// How somebody dials who speaks `protocol`.
pub(crate) fn dialling_as(papers: &Papers, transport: TransportConfig, protocol: &[u8]) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(papers.ca.clone()).expect("an authority");
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .expect("TLS 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![protocol.to_vec()];
    tls.enable_early_data = true;
    let mut config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("for QUIC")));
    config.transport_config(Arc::new(transport));
    config
}

/// A guest's endpoint on loopback.
pub(crate) fn guest() -> Endpoint {
    Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port")
}

/// A guest's endpoint on another network.
pub(crate) fn guest_on(parts: EndpointParts) -> Endpoint {
    let mut config = EndpointConfig::default();
    config.rng_seed(parts.rng_seed);
    Endpoint::new_with_abstract_socket(config, None, parts.socket, parts.runtime).expect("an endpoint")
}

/// Says the key; false if that was the end of it.
pub(crate) async fn greet(connection: &Connection) -> bool {
    let Ok((mut send, mut receive)) = connection.open_bi().await else { return false };
    if send.write_all(&Hello { key: KEY.into() }.encode()).await.is_err() || send.finish().is_err() {
        return false;
    }
    let bytes = receive.read_to_end(1000).await.unwrap_or_default();
    matches!(answers(&bytes).as_slice(), [Answer::Welcome { .. }])
}

/// Asks for `n_pieces`.
pub(crate) async fn ask(connection: &Connection, n_pieces: u32) -> RecvStream {
    let (mut send, receive) = connection.open_bi().await.expect("a stream");
    send.write_all(&question(n_pieces)).await.expect("sent");
    send.finish().expect("sent");
    receive
}

pub(crate) fn question(n_pieces: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    let body = n_pieces.to_string().into_bytes();
    Ask::New { idempotency_key: 1, endpoint: Call::Chat, body }.encode(&mut frame);
    frame
}

pub(crate) fn answers(mut bytes: &[u8]) -> Vec<Answer> {
    let (mut decoder, mut found) = (Decoder::default(), Vec::new());
    while let Some(frame) = decoder.feed(&mut bytes).expect("frames") {
        found.push(Answer::decode(&frame).expect("answers"));
    }
    found
}

/// Reads an answer to its end: `n_pieces` in order, then the end.
pub(crate) async fn read_whole(mut receive: RecvStream, n_pieces: u32) {
    let bytes = receive.read_to_end(1 << 24).await.expect("whole");
    let answers = answers(&bytes);
    assert_eq!(answers.len(), n_pieces as usize + 1);
    for (first, answer) in (0..n_pieces).zip(&answers) {
        assert!(matches!(answer, Answer::Piece(piece) if piece.first == first), "in order");
    }
    assert!(matches!(answers.last(), Some(Answer::Done)));
}
