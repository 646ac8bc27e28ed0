//! Who is not let in, and what is not read: six strangers, and nodes whose frames make no sense.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use peer::pki::{NodeKey, node_name};
use peer::{Ca, PeerNet, Refusal};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, ConnectionError, Endpoint, VarInt};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{RootCertStore, version::TLS13};
use shared::clock::{Clock, SystemClock};
use tokio::time::timeout;
use wire::Version;
use wire::frame::{Decoder, FrameError};
use wire::node::{Hello, Message, Request, Response};

use crate::fixture::{Folder, authority, hello, join, loopback, node, serving_with, until};

const SOON: Duration = Duration::from_secs(5);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A cluster of a, b and c, of which a is up; and somebody with an endpoint of their own.
struct Scene {
    folder: Folder,
    net: PeerNet,
    address: SocketAddr,
}

fn scene() -> Scene {
    scene_with(true)
}

/// With the authority at a, who shows no certificate gets past TLS: the weaker of both.
fn scene_with(has_authority: bool) -> Scene {
    let folder = Folder::new();
    let a = join(&folder.0, "a");
    let nowhere: SocketAddr = ([127, 0, 0, 1], 1).into();
    let parts = loopback();
    let address = parts.socket.local_addr().expect("bound");
    let authority = has_authority.then(|| authority(&folder.0));
    let (net, _) = serving_with(&a, &[("b", nowhere), ("c", nowhere)], parts, authority);
    Scene { folder, net, address }
}

impl Scene {
    fn ca(&self) -> Ca {
        Ca::load_or_create(&self.folder.0.join("ca"), SystemClock.wall()).expect("an authority")
    }

    /// A stranger's key (PEM) and a certificate for it from `ca`.
    fn certified(&self, ca: &Ca, name: &str, now: Duration, validity: Duration) -> (String, String) {
        let data = self.folder.0.join("stranger");
        let key = NodeKey::load_or_create(&data).expect("a key");
        let certificate = ca.certify(name, &key.public(), now, validity).expect("certified");
        (std::fs::read_to_string(data.join("peer.key")).expect("stored"), certificate)
    }

    /// Connects as whoever `shown` (key, certificate) says, and waits for a while.
    async fn knock(&self, shown: Option<(String, String)>, alpn: &[u8]) -> Option<(Endpoint, Connection)> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.ca().pem().as_bytes()).expect("PEM")).expect("an authority");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .expect("TLS 1.3")
            .with_root_certificates(roots);
        let mut tls = match shown {
            None => builder.with_no_client_auth(),
            Some((key, certificate)) => {
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
                let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM");
                builder.with_client_auth_cert(vec![certificate], key).expect("a pair")
            }
        };
        tls.alpn_protocols = vec![alpn.to_vec()];
        let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).expect("for QUIC")));
        let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).expect("a free port");
        let connecting = endpoint.connect_with(config, self.address, &node_name(&node("a"))).expect("valid");
        let connection = timeout(SOON, connecting).await.expect("in time").ok()?;
        Some((endpoint, connection))
    }

    /// As [`Self::knock`], then says hello as `name`.
    async fn greet(&self, shown: (String, String), hello: &Hello) -> Option<(Endpoint, Connection)> {
        let (endpoint, connection) = self.knock(Some(shown), Version::NEWEST.alpn()).await?;
        let mut frame = Vec::new();
        hello.encode(SystemClock.now(), &mut frame).expect("small");
        let answer = ask(&connection, &[&frame]).await?;
        Decoder::only(Version::NEWEST, Hello::KINDS, &answer).ok()?;
        Some((endpoint, connection))
    }

    /// Somebody was refused for `reason`, once, and for nothing else.
    async fn refused(&self, reason: Refusal) {
        until(reason.as_str(), || self.net.refusals().count(reason) == 1).await;
        let n_all: u64 = Refusal::ALL.into_iter().map(|reason| self.net.refusals().count(reason)).sum();
        assert_eq!(n_all, 1);
    }
}

/// Writes pieces to a new stream; what comes back, if anything does.
async fn ask(connection: &Connection, pieces: &[&[u8]]) -> Option<Vec<u8>> {
    let work = async {
        let (mut send, mut receive) = connection.open_bi().await.ok()?;
        for piece in pieces {
            send.write_all(piece).await.ok()?;
            tokio::task::yield_now().await;
        }
        send.finish().ok()?;
        receive.read_to_end(1 << 20).await.ok().filter(|answer| !answer.is_empty())
    };
    timeout(SOON, work).await.expect("in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_no_certificate_is_refused() {
    for has_authority in [false, true] {
        let scene = scene_with(has_authority);
        if let Some((_endpoint, connection)) = scene.knock(None, Version::NEWEST.alpn()).await {
            timeout(SOON, connection.closed()).await.expect("closed");
        }
        scene.refused(Refusal::NoCertificate).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_may_only_join_has_one_stream_for_one_invitation() {
    let scene = scene();
    let mut frame = Vec::new();
    Request::DrainNotice { epoch: 1 }.encode(SystemClock.now(), &mut frame).expect("small");
    let (_endpoint, connection) = scene.knock(None, wire::JOIN_ALPN).await.expect("anybody may knock");
    let (mut send, mut receive) = connection.open_bi().await.expect("one stream");
    assert!(timeout(Duration::from_millis(300), connection.open_bi()).await.is_err(), "a second stream");
    send.write_all(&frame).await.expect("sent");
    let _ = send.finish();
    assert!(receive.read_to_end(1 << 20).await.is_err(), "a frame of nodes was answered");
    timeout(SOON, connection.closed()).await.expect("closed");
    scene.refused(Refusal::Protocol).await;
    let (_endpoint, connection) = scene.knock(None, wire::JOIN_ALPN).await.expect("anybody may knock");
    let (mut send, mut receive) = connection.open_bi().await.expect("one stream");
    let flood = vec![0; 1 << 20];
    assert!(timeout(SOON, send.write_all(&flood)).await.expect("it ends").is_err(), "a mebibyte was taken");
    assert!(receive.read_to_end(1 << 20).await.is_err(), "it was answered");
    timeout(SOON, connection.closed()).await.expect("closed");
    let silent = scene.knock(None, wire::JOIN_ALPN).await.expect("anybody may knock");
    timeout(SOON, silent.1.closed()).await.expect("who says nothing is not kept");
    let nobody_joins_here = scene_with(false);
    assert!(nobody_joins_here.knock(None, wire::JOIN_ALPN).await.is_none());
    nobody_joins_here.refused(Refusal::Protocol).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_shows_an_expired_certificate_is_refused() {
    let scene = scene();
    let shown = scene.certified(&scene.ca(), &node_name(&node("b")), SystemClock.wall() - 3 * DAY, DAY);
    assert!(scene.greet(shown, &hello("b")).await.is_none());
    scene.refused(Refusal::Expired).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_was_certified_by_another_authority_is_refused() {
    let scene = scene();
    let other = Ca::load_or_create(&scene.folder.0.join("other"), SystemClock.wall()).expect("another authority");
    let shown = scene.certified(&other, &node_name(&node("b")), SystemClock.wall(), DAY);
    assert!(scene.greet(shown, &hello("b")).await.is_none());
    // Both authorities have the same name, so that it is the signature that does not fit.
    until("refused", || {
        [Refusal::WrongAuthority, Refusal::Handshake].iter().any(|reason| scene.net.refusals().count(*reason) == 1)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_s_certificate_opens_no_node_s_door() {
    let scene = scene();
    let shown = scene.certified(&scene.ca(), "b.client.tenantry", SystemClock.wall(), DAY);
    assert!(scene.greet(shown, &hello("b")).await.is_none());
    scene.refused(Refusal::NotANode).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_claims_to_be_another_is_refused() {
    let scene = scene();
    let shown = scene.certified(&scene.ca(), &node_name(&node("b")), SystemClock.wall(), DAY);
    assert!(scene.greet(shown.clone(), &hello("c")).await.is_none());
    scene.refused(Refusal::OtherNode).await;
    assert!(scene.greet(shown, &hello("b")).await.is_some(), "under its own name it gets in");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_another_cluster_or_none_is_refused() {
    let scene = scene();
    let shown = scene.certified(&scene.ca(), &node_name(&node("b")), SystemClock.wall(), DAY);
    let other = Hello { cluster: "other".into(), ..hello("b") };
    assert!(scene.greet(shown, &other).await.is_none());
    scene.refused(Refusal::OtherCluster).await;
    let stranger = scene.certified(&scene.ca(), &node_name(&node("zz")), SystemClock.wall(), DAY);
    assert!(scene.greet(stranger, &hello("zz")).await.is_none(), "not in the cluster's file");
    until("refused", || scene.net.refusals().count(Refusal::NotANode) == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_protocol_version_is_refused() {
    let scene = scene();
    let shown = scene.certified(&scene.ca(), &node_name(&node("b")), SystemClock.wall(), DAY);
    assert!(scene.knock(Some(shown), b"tenantry-node/3").await.is_none());
    scene.refused(Refusal::Protocol).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_that_make_no_sense_end_the_connection() {
    let mut good = Vec::new();
    Request::DrainNotice { epoch: 1 }.encode(SystemClock.now(), &mut good).expect("small");
    let changed = |at: usize, byte: u8| {
        let mut frame = good.clone();
        frame[at] = byte;
        frame
    };
    let mut giant = good.clone();
    giant[16..20].copy_from_slice(&u32::MAX.to_le_bytes());
    let mut response = Vec::new();
    Response::Done.encode(SystemClock.now(), &mut response).expect("small");
    let broken = [
        ("magic", changed(0, b'X')),
        ("version", changed(4, 1)),
        ("type", changed(6, 0xee)),
        ("schema", changed(9, good[9] ^ 1)),
        ("a length beyond the limit", giant),
        ("a response where a request belongs", response),
        ("half a frame", good[..good.len() - 1].to_vec()),
        ("two frames", [good.clone(), good.clone()].concat()),
        ("nothing at all", Vec::new()),
    ];
    for (what, frame) in broken {
        let scene = scene();
        let shown = scene.certified(&scene.ca(), &node_name(&node("b")), SystemClock.wall(), DAY);
        let (_endpoint, connection) = scene.greet(shown, &hello("b")).await.expect("let in");
        assert!(ask(&connection, &[&frame]).await.is_none(), "{what} was answered");
        match timeout(SOON, connection.closed()).await.expect("closed") {
            ConnectionError::ApplicationClosed(close) => assert_eq!(close.error_code, VarInt::from_u32(3), "{what}"),
            other => panic!("{what}: {other}"),
        }
        scene.refused(Refusal::Protocol).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_byte_by_byte_is_answered_and_a_broken_datagram_ends_the_connection() {
    let scene = scene();
    let shown = scene.certified(&scene.ca(), &node_name(&node("b")), SystemClock.wall(), DAY);
    let (_endpoint, connection) = scene.greet(shown, &hello("b")).await.expect("let in");
    let mut frame = Vec::new();
    Request::DrainNotice { epoch: 1 }.encode(SystemClock.now(), &mut frame).expect("small");
    let pieces: Vec<&[u8]> = frame.chunks(1).collect();
    let answer = ask(&connection, &pieces).await.expect("answered");
    let answer = Decoder::only(Version::NEWEST, Response::KINDS, &answer).expect("a response");
    assert!(matches!(Response::decode(&answer, SystemClock.now()), Ok(Response::Done)));
    assert!(matches!(Decoder::only(Version::NEWEST, Request::KINDS, b""), Err(FrameError::Truncated { .. })));
    connection.send_datagram(bytes::Bytes::from_static(b"beat")).expect("sent");
    timeout(SOON, connection.closed()).await.expect("closed");
    scene.refused(Refusal::Protocol).await;
}
