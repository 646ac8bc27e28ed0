//! The door for clients over QUIC (`tenantry/1`, and `h3` for the HTTP API): who may come in, and what is read from
//! them.
//!
//! Called by the node's shell, which brings the TLS certificate and what answers ([`ClientService`]). A client is
//! nobody until its key has been checked: until then one fixed-layout hello is read, and nothing else. What it asks
//! is the body of the HTTP API, so the gateway's parser judges it. Not here: keys, limits, tokens.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connection, Endpoint, EndpointConfig, IdleTimeout, Incoming, RecvStream, SendStream, ServerConfig, TransportConfig,
    VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::ResolvesServerCert;
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use shared::id::NodeId;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};
use wire::client::{Answer, Ask, Decoder, HELLO_BYTES, Hello};

use crate::endpoint::EndpointParts;
use crate::net::PeerNet;
use crate::serve::Gone;
use crate::stream::{code, protocol};

/// A client that says nothing for this long is gone; a client that wants to know sooner asks for less.
const IDLE: Duration = Duration::from_secs(30);
/// The key has arrived within this time, or the connection is held for nothing.
const HELLO_WAIT_MAX: Duration = Duration::from_secs(5);
/// A question has arrived within this time, or its stream is held for nothing.
const ASK_WAIT_MAX: Duration = Duration::from_secs(10);
/// A client that falls this far behind [`DRAIN_BYTES_PER_S`] is cut, so that it cannot hold KV pages.
const STALL_MAX: Duration = Duration::from_secs(10);
/// What a client takes at least: slower than a modem, faster than somebody who only means to hold on.
const DRAIN_BYTES_PER_S: u32 = 64;
/// Questions that a client may break off before they have arrived; every user changes his mind at times.
const ABANDONED_MAX: usize = 128;
/// Beyond these, its streams are taken on one by one at this pace: a stream that is opened and reset costs it nothing.
const ABANDONED_PAUSE: Duration = Duration::from_millis(20);
/// Exchanges of one client at once; twice what the largest tier runs unless configured otherwise. Each may make this node
/// hold some 200 KiB, in pieces of a question with holes between them.
const STREAMS_MAX: u32 = 32;
/// Bytes that one stream may have under way.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes that one client may have under way to this node; quinn's default has no bound.
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
/// Bytes under way to one client, kept until it has acknowledged them; an answer is a few kilobytes a second.
const SEND_WINDOW: u64 = 1024 * 1024;
/// Bytes that somebody may have under way before the key is known; one stream takes them.
const STRANGER_WINDOW: u32 = 4 * 1024;
/// HTTP over QUIC, RFC 9114.
const HTTP3_ALPN: &[u8] = b"h3";
/// Bytes that an HTTP/3 client may have under way to this node. Its keys come with its requests, so it is a stranger
/// with a body: enough to fill a line, little enough for thousands.
const HTTP3_WINDOW: u32 = 256 * 1024;
/// HTTP/3 needs three streams of its own: control and the two of header compression.
const HTTP3_UNI_STREAMS: u32 = 3;
/// Handshakes at once.
const INCOMING_MAX: usize = 1024;
/// From this many open handshakes on, addresses are validated first: nobody is made to answer for somebody else.
const VALIDATE_FROM: usize = 256;

/// Bounds that the cluster's file sets.
#[derive(Debug, Clone, Copy)]
pub struct ClientBounds {
    /// Connections open at once.
    pub connections: usize,
    /// Questions being read at once; each is up to 1 MiB.
    pub bodies: usize,
}

/// A refusal in the words of the HTTP API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// HTTP status.
    pub status: u16,
    /// Earliest sensible retry; 0 for none.
    pub retry_after_ms: u32,
    /// JSON body.
    pub json: Vec<u8>,
}

impl From<Failure> for Answer {
    fn from(Failure { status, retry_after_ms, json }: Failure) -> Self {
        Self::Failed { status, retry_after_ms, json }
    }
}

/// What answers clients.
pub trait ClientService: Send + Sync + 'static {
    /// Who a key stands for.
    type Tenant: Send + Sync + 'static;

    /// Checks a key.
    ///
    /// # Errors
    /// With what the client is told.
    fn authenticate(&self, key: &str) -> Result<Self::Tenant, Failure>;

    /// Answers one question: [`Answer::Accepted`] as soon as the request can be resumed, pieces, [`Answer::Done`]
    /// or [`Answer::Failed`]. The key was checked when the connection opened, so check again whether the tenant is
    /// still welcome.
    fn ask(
        &self,
        tenant: Arc<Self::Tenant>,
        from: SocketAddr,
        ask: Ask,
        answers: AnswerSink,
    ) -> impl Future<Output = ()> + Send;

    /// Serves HTTP/3 on a connection until it ends.
    fn http3(&self, connection: Connection) -> impl Future<Output = ()> + Send;
}

/// The door could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Certificate or key do not work.
    #[error("cannot use the certificate for clients: {0}")]
    Tls(String),
    /// The socket does not work.
    #[error("cannot use the clients' QUIC port: {0}")]
    Socket(#[from] io::Error),
}

/// The endpoint for clients, with a certificate that they can check by themselves.
///
/// # Errors
/// When certificate, key or socket cannot be used.
pub fn open(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    parts: EndpointParts,
) -> Result<Endpoint, OpenError> {
    let secret = blake3::derive_key("tenantry 2026 client door", key.secret_der());
    let provider = rustls::crypto::ring::default_provider();
    let certified = CertifiedKey::from_der(chain, key, &provider).map_err(|error| OpenError::Tls(error.to_string()))?;
    open_with(Arc::new(SingleCertAndKey::from(certified)), &secret, parts)
}

/// The endpoint for clients that know the cluster's authority: shows what this node shows to other nodes, renewals
/// included.
///
/// # Errors
/// When the socket cannot be used.
pub fn open_as_node(net: &PeerNet, parts: EndpointParts) -> Result<Endpoint, OpenError> {
    open_with(net.0.badge.clone(), &net.0.client_secret, parts)
}

fn open_with(
    shown: Arc<dyn ResolvesServerCert>,
    secret: &[u8; 32],
    parts: EndpointParts,
) -> Result<Endpoint, OpenError> {
    let tls_error = |error: &dyn std::fmt::Display| OpenError::Tls(error.to_string());
    let secret = |purpose: &str| blake3::derive_key(purpose, secret);
    // As between nodes: a restarted node can say that it has forgotten.
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &secret("tenantry 2026 client quic stateless reset"));
    let id_key = secret("tenantry 2026 client quic connection ids");
    let id_key = u64::from_le_bytes(*id_key.first_chunk().expect("32 bytes hold 8"));
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| tls_error(&error))?
        .with_no_client_auth()
        .with_cert_resolver(shown);
    tls.alpn_protocols = vec![wire::CLIENT_ALPN.to_vec(), HTTP3_ALPN.to_vec()];
    // Early data could be replayed.
    tls.max_early_data_size = 0;
    let tls = QuicServerConfig::try_from(tls).map_err(|error| tls_error(&error))?;
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("half a minute is a valid time-out")))
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(STRANGER_WINDOW))
        .send_window(SEND_WINDOW)
        .datagram_receive_buffer_size(None);
    let mut server = ServerConfig::with_crypto(Arc::new(tls));
    server.transport_config(Arc::new(transport));
    server.max_incoming(INCOMING_MAX);
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    config.rng_seed(parts.rng_seed);
    Ok(Endpoint::new_with_abstract_socket(config, Some(server), parts.socket, parts.runtime)?)
}

/// What all connections of a door share.
struct Door<S> {
    node: NodeId,
    service: Arc<S>,
    bodies: Semaphore,
}

/// Serves clients until the endpoint is closed.
pub async fn serve<S: ClientService>(endpoint: Endpoint, node: NodeId, service: Arc<S>, bounds: ClientBounds) {
    let connections = Arc::new(Semaphore::new(bounds.connections));
    let door = Arc::new(Door { node, service, bodies: Semaphore::new(bounds.bodies) });
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = connections.clone().try_acquire_owned() else {
            incoming.refuse();
            continue;
        };
        let n_open = bounds.connections - connections.available_permits();
        if n_open > VALIDATE_FROM && !incoming.remote_address_validated() {
            let _ = incoming.retry();
            continue;
        }
        let door = door.clone();
        tokio::spawn(async move {
            attend(door, incoming).await;
            drop(permit);
        });
    }
}

/// Serves one client until its connection ends. A client that fails is no matter for the log.
async fn attend<S: ClientService>(door: Arc<Door<S>>, incoming: Incoming) {
    let connecting = async { incoming.accept()?.await };
    let Ok(Ok(connection)) = timeout(HELLO_WAIT_MAX, connecting).await else { return };
    if protocol(&connection) == HTTP3_ALPN {
        connection.set_receive_window(VarInt::from_u32(HTTP3_WINDOW));
        connection.set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS_MAX));
        connection.set_max_concurrent_uni_streams(VarInt::from_u32(HTTP3_UNI_STREAMS));
        return door.service.http3(connection).await;
    }
    let Ok(Some(tenant)) = timeout(HELLO_WAIT_MAX, greet(&door, &connection)).await else {
        connection.close(code::REFUSED, b"no valid hello");
        return;
    };
    let tenant = Arc::new(tenant);
    let n_abandoned = Arc::new(AtomicUsize::new(0));
    while let Ok((send, receive)) = connection.accept_bi().await {
        let (door, tenant, connection, abandoned) =
            (door.clone(), tenant.clone(), connection.clone(), n_abandoned.clone());
        tokio::spawn(async move {
            match timeout(ASK_WAIT_MAX, read_ask(&door, receive)).await {
                Ok(Ok(ask)) => {
                    door.service.ask(tenant, connection.remote_address(), ask, AnswerSink::new(send)).await;
                }
                Ok(Err(NoAsk::Nonsense)) => connection.close(code::PROTOCOL, b"frames make no sense"),
                // Dropping the stream of one who is too slow says so.
                Ok(Err(NoAsk::Abandoned)) | Err(_) => {
                    abandoned.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
        // Streams that are not taken on use up what the client may open.
        if n_abandoned.load(Ordering::Relaxed) > ABANDONED_MAX {
            sleep(ABANDONED_PAUSE).await;
        }
    }
}

/// The first stream: the key, and whether it is good.
async fn greet<S: ClientService>(door: &Door<S>, connection: &Connection) -> Option<S::Tenant> {
    let (send, mut receive) = connection.accept_bi().await.ok()?;
    let mut answers = AnswerSink::new(send);
    let mut bytes = [0; HELLO_BYTES];
    receive.read_exact(&mut bytes).await.ok()?;
    let hello = Hello::decode(&bytes).ok()?;
    match door.service.authenticate(&hello.key) {
        Ok(tenant) => {
            connection.set_receive_window(VarInt::from_u32(CONNECTION_WINDOW));
            connection.set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS_MAX));
            answers.send(&[Answer::Welcome { node: door.node.to_string() }]).await.ok()?;
            answers.finish();
            Some(tenant)
        }
        Err(failure) => {
            answers.send(&[failure.into()]).await.ok()?;
            let received = answers.received();
            answers.finish();
            // Closed only once the client knows why.
            received.await;
            None
        }
    }
}

/// Why a stream holds no question.
enum NoAsk {
    /// The client broke it off.
    Abandoned,
    /// It holds something else.
    Nonsense,
}

/// The one question of a stream.
async fn read_ask<S>(door: &Door<S>, mut receive: RecvStream) -> Result<Ask, NoAsk> {
    let mut decoder = Decoder::default();
    // Nobody waits for a place who has not begun to speak.
    let mut chunk = read(&mut receive).await?;
    let _permit = door.bodies.acquire().await.expect("it is never closed");
    loop {
        let mut rest: &[u8] = &chunk;
        let frame = decoder.feed(&mut rest).map_err(|_| NoAsk::Nonsense)?;
        if let Some(frame) = frame {
            return Ask::decode(&frame).map_err(|_| NoAsk::Nonsense);
        }
        chunk = read(&mut receive).await?;
    }
}

async fn read(receive: &mut RecvStream) -> Result<Bytes, NoAsk> {
    match receive.read_chunk(STREAM_WINDOW as usize, true).await {
        Ok(Some(chunk)) => Ok(chunk.bytes),
        Ok(None) => Err(NoAsk::Nonsense),
        Err(_) => Err(NoAsk::Abandoned),
    }
}

/// How long a client is still waited for: a store of [`STALL_MAX`] that waiting uses up and bytes taken fill again.
struct Patience(Duration);

// === impl Patience ===

impl Patience {
    /// `n_bytes` were taken after `waited`.
    fn spend(&mut self, waited: Duration, n_bytes: usize) {
        let worth = Duration::from_secs(1) * u32::try_from(n_bytes).unwrap_or(u32::MAX) / DRAIN_BYTES_PER_S;
        self.0 = self.0.saturating_sub(waited).saturating_add(worth).min(STALL_MAX);
    }
}

/// Where the answers to a question go. Dropped before [`AnswerSink::finish`], it tells the client that the rest will
/// not come from this node.
pub struct AnswerSink {
    send: SendStream,
    frame: Vec<u8>,
    patience: Patience,
    is_finished: bool,
}

// === impl AnswerSink ===

impl AnswerSink {
    fn new(send: SendStream) -> Self {
        Self { send, frame: Vec::new(), patience: Patience(STALL_MAX), is_finished: false }
    }

    /// Sends answers in one go; waits while the client is behind, but not for ever.
    ///
    /// # Errors
    /// [`Gone`] when the client waits no more, or takes less than 64 bytes a second for ten seconds.
    pub async fn send(&mut self, answers: &[Answer]) -> Result<(), Gone> {
        self.frame.clear();
        answers.iter().for_each(|answer| answer.encode(&mut self.frame));
        let mut rest: &[u8] = &self.frame;
        while !rest.is_empty() {
            let began = Instant::now();
            let Ok(Ok(n_bytes)) = timeout(self.patience.0, self.send.write(rest)).await else { return Err(Gone) };
            self.patience.spend(began.elapsed(), n_bytes);
            rest = &rest[n_bytes..];
        }
        Ok(())
    }

    /// Ends when the client waits no more.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.send.stopped();
        async move {
            if let Ok(None) = stopped.await {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Ends when the client has all that was sent before the end, or is gone.
    fn received(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.send.stopped();
        async move {
            let _ = stopped.await;
        }
    }

    /// All is said.
    pub fn finish(mut self) {
        self.is_finished = true;
        let _ = self.send.finish();
    }
}

impl Drop for AnswerSink {
    fn drop(&mut self) {
        if !self.is_finished {
            let _ = self.send.reset(code::BROKEN_OFF);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seconds after which a client is cut that takes pieces of `n_bytes`, one after `pause` each; `None` when it is not
    /// within ten minutes.
    fn cut_after(n_bytes: usize, pause: Duration) -> Option<u64> {
        let (mut patience, mut at) = (Patience(STALL_MAX), Duration::ZERO);
        while at < Duration::from_secs(600) {
            if pause > patience.0 {
                return Some((at + patience.0).as_secs());
            }
            patience.spend(pause, n_bytes);
            at += pause;
        }
        None
    }

    #[test]
    fn a_client_is_cut_when_it_is_ten_seconds_behind_64_bytes_a_second() {
        let ms = Duration::from_millis;
        assert_eq!(cut_after(1 << 20, ms(60_000)), Some(10), "nothing for ten seconds");
        assert_eq!(cut_after(64, ms(999)), None);
        assert_eq!(cut_after(32, ms(1000)), Some(19));
        assert_eq!(cut_after(1, ms(1000)), Some(10));
        assert_eq!(cut_after(64 * 8, ms(9000)), Some(26), "steps do not hide a slow client");
    }
}
