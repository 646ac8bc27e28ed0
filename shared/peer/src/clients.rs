//! The door for clients over QUIC (`tenantry/1`): who may come in, and what is read from them.
//!
//! Called by the node's shell, which brings the TLS certificate and what answers ([`ClientService`]). A client is
//! nobody until its key has been checked: until then one fixed-layout hello is read, and nothing else. What it asks
//! is the body of the HTTP API, so the gateway's parser judges it. Not here: keys, limits, tokens.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connection, Endpoint, EndpointConfig, IdleTimeout, Incoming, RecvStream, SendStream, ServerConfig, TransportConfig,
    VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::version::TLS13;
use shared::id::NodeId;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use wire::client::{Answer, Ask, Decoder, HELLO_BYTES, Hello};

use crate::endpoint::EndpointParts;
use crate::serve::Gone;
use crate::stream::code;

/// A client that says nothing for this long is gone; a client that wants to know sooner asks for less.
const IDLE: Duration = Duration::from_secs(30);
/// The key has arrived within this time, or the connection is held for nothing.
const HELLO_WAIT_MAX: Duration = Duration::from_secs(5);
/// A question has arrived within this time, or its stream is held for nothing.
const ASK_WAIT_MAX: Duration = Duration::from_secs(10);
/// A client that takes nothing for this long is cut, so that it cannot hold KV pages.
const STALL_MAX: Duration = Duration::from_secs(10);
/// Exchanges of one client at once; above the concurrency of any tenant.
const STREAMS_MAX: u32 = 64;
/// Bytes that one stream may have under way.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes that one client may have under way; quinn's default has no bound.
const CONNECTION_WINDOW: u32 = 4 * 1024 * 1024;
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

/// The endpoint for clients.
///
/// # Errors
/// When certificate, key or socket cannot be used.
pub fn open(
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    parts: EndpointParts,
) -> Result<Endpoint, OpenError> {
    let tls_error = |error: &dyn std::fmt::Display| OpenError::Tls(error.to_string());
    let secret = |purpose: &str| blake3::derive_key(purpose, key.secret_der());
    // As between nodes: a restarted node can say that it has forgotten.
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &secret("tenantry 2026 client quic stateless reset"));
    let id_key = secret("tenantry 2026 client quic connection ids");
    let id_key = u64::from_le_bytes(*id_key.first_chunk().expect("32 bytes hold 8"));
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| tls_error(&error))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| tls_error(&error))?;
    tls.alpn_protocols = vec![wire::CLIENT_ALPN.to_vec()];
    // Early data could be replayed.
    tls.max_early_data_size = 0;
    let tls = QuicServerConfig::try_from(tls).map_err(|error| tls_error(&error))?;
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("half a minute is a valid time-out")))
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
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
    let Ok(Some(tenant)) = timeout(HELLO_WAIT_MAX, greet(&door, &connection)).await else {
        connection.close(code::REFUSED, b"no valid hello");
        return;
    };
    let tenant = Arc::new(tenant);
    while let Ok((send, receive)) = connection.accept_bi().await {
        let (door, tenant, connection) = (door.clone(), tenant.clone(), connection.clone());
        tokio::spawn(async move {
            match timeout(ASK_WAIT_MAX, read_ask(&door, receive)).await {
                Ok(Some(ask)) => {
                    let answers = AnswerSink { send, frame: Vec::new(), is_finished: false };
                    door.service.ask(tenant, connection.remote_address(), ask, answers).await;
                }
                Ok(None) => connection.close(code::PROTOCOL, b"frames make no sense"),
                // Too slow: dropping the stream says so.
                Err(_) => {}
            }
        });
    }
}

/// The first stream: the key, and whether it is good.
async fn greet<S: ClientService>(door: &Door<S>, connection: &Connection) -> Option<S::Tenant> {
    let (send, mut receive) = connection.accept_bi().await.ok()?;
    let mut answers = AnswerSink { send, frame: Vec::new(), is_finished: false };
    let mut bytes = [0; HELLO_BYTES];
    receive.read_exact(&mut bytes).await.ok()?;
    let hello = Hello::decode(&bytes).ok()?;
    match door.service.authenticate(&hello.key) {
        Ok(tenant) => {
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

/// The one question of a stream; `None` for anything else.
async fn read_ask<S>(door: &Door<S>, mut receive: RecvStream) -> Option<Ask> {
    let _permit = door.bodies.acquire().await.ok()?;
    let mut decoder = Decoder::default();
    let mut chunk = Bytes::new();
    let frame = loop {
        let mut rest: &[u8] = &chunk;
        let fed = decoder.feed(&mut rest);
        let n_taken = chunk.len() - rest.len();
        chunk.advance(n_taken);
        if let Some(frame) = fed.ok()? {
            break frame;
        }
        chunk = receive.read_chunk(STREAM_WINDOW as usize, true).await.ok()??.bytes;
    };
    Ask::decode(&frame).ok()
}

/// Where the answers to a question go. Dropped before [`AnswerSink::finish`], it tells the client that the rest will
/// not come from this node.
pub struct AnswerSink {
    send: SendStream,
    frame: Vec<u8>,
    is_finished: bool,
}

// === impl AnswerSink ===

impl AnswerSink {
    /// Sends answers in one go; waits while the client is behind, but not for ever.
    ///
    /// # Errors
    /// [`Gone`] when the client waits no more or has taken nothing for ten seconds.
    pub async fn send(&mut self, answers: &[Answer]) -> Result<(), Gone> {
        self.frame.clear();
        answers.iter().for_each(|answer| answer.encode(&mut self.frame));
        match timeout(STALL_MAX, self.send.write_all(&self.frame)).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(Gone),
        }
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
