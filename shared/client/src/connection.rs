//! One connection to one of several nodes: dialled when needed, and to the next node when one does not answer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, Bytes};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Connection, IdleTimeout, RecvStream, SendStream, TransportConfig, VarInt};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::version::TLS13;
use tokio::sync::Mutex;
use tokio::time::timeout;
use wire::client::{Answer, Ask, Decoder, Endpoint, Hello, KEY_BYTES_MAX};

use crate::stream::Stream;

/// A node that is not heard of for this long is gone.
const IDLE: Duration = Duration::from_millis(1500);
/// Something is said at least this often: three chances within [`IDLE`].
const KEEP_ALIVE: Duration = Duration::from_millis(400);
/// A node that takes longer to let us in is passed over.
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(2);
/// Bytes of answers under way.
const WINDOW: u32 = 4 * 1024 * 1024;

/// Where a node is and which name its certificate has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeAddress {
    /// Its `clients_quic` address.
    pub address: SocketAddr,
    /// DNS name or IP address in its certificate.
    pub name: String,
}

/// What a client must know.
#[derive(Clone)]
pub struct ClientConfig {
    /// Nodes of one cluster; the first that answers is used.
    pub nodes: Vec<NodeAddress>,
    /// API key.
    pub key: String,
    /// Whom to believe who a node is.
    pub roots: Vec<CertificateDer<'static>>,
}

/// Why there is no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ClientError {
    /// The configuration does not work.
    #[error("cannot use the client's configuration: {0}")]
    Config(String),
    /// The cluster said no.
    #[error("refused with status {status}: {}", String::from_utf8_lossy(json))]
    Refused {
        /// As over HTTP.
        status: u16,
        /// Earliest sensible retry; 0 for none.
        retry_after_ms: u32,
        /// The error, JSON as over HTTP.
        json: Vec<u8>,
    },
    /// No node could be reached for so long that the answer cannot be resumed.
    #[error("no node answered for {} s: {why}", waited.as_secs())]
    Unreachable {
        /// How long.
        waited: Duration,
        /// What the last attempt met.
        why: String,
    },
}

/// One attempt did not get further; another node may.
#[derive(Debug, Clone)]
pub(crate) enum Setback {
    /// Worth another attempt.
    Transient(String),
    /// Not worth one.
    Final(ClientError),
}

impl<E: std::error::Error> From<E> for Setback {
    fn from(error: E) -> Self {
        Self::Transient(error.to_string())
    }
}

pub(crate) struct Inner {
    endpoint: quinn::Endpoint,
    quic: quinn::ClientConfig,
    nodes: Vec<NodeAddress>,
    key: String,
    current: Mutex<Current>,
}

/// The connection in use, and the node to try first when there is none.
#[derive(Default)]
struct Current {
    connection: Option<Connection>,
    next_node: usize,
}

/// A tenant's way into the cluster. Cheap to clone.
#[derive(Clone)]
pub struct Client(pub(crate) Arc<Inner>);

// === impl Client ===

impl Client {
    /// Must be called inside a tokio runtime; connects when first asked.
    ///
    /// # Errors
    /// [`ClientError::Config`] when nodes, key or roots cannot be used.
    pub fn new(config: ClientConfig) -> Result<Self, ClientError> {
        let wrong = |what: &dyn std::fmt::Display| ClientError::Config(what.to_string());
        if config.nodes.is_empty() || config.key.is_empty() || config.key.len() > KEY_BYTES_MAX {
            return Err(wrong(&"name at least one node and a key of at most 256 bytes"));
        }
        let mut roots = RootCertStore::empty();
        for root in config.roots {
            roots.add(root).map_err(|error| wrong(&error))?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(|error| wrong(&error))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        tls.alpn_protocols = vec![wire::CLIENT_ALPN.to_vec()];
        let mut transport = TransportConfig::default();
        transport
            .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("seconds are a valid time-out")))
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_concurrent_bidi_streams(VarInt::from_u32(0))
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .receive_window(VarInt::from_u32(WINDOW));
        let tls = QuicClientConfig::try_from(tls).map_err(|error| wrong(&error))?;
        let mut quic = quinn::ClientConfig::new(Arc::new(tls));
        quic.transport_config(Arc::new(transport));
        let any: SocketAddr = match config.nodes[0].address {
            SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
            SocketAddr::V6(_) => ([0; 16], 0).into(),
        };
        let endpoint = quinn::Endpoint::client(any).map_err(|error| wrong(&error))?;
        let current = Mutex::default();
        Ok(Self(Arc::new(Inner { endpoint, quic, nodes: config.nodes, key: config.key, current })))
    }

    /// Asks. The body is the JSON of the HTTP call; it is answered as a stream whatever it says about that.
    /// Nothing is sent before the stream is first read.
    pub fn ask(&self, endpoint: Endpoint, body: Vec<u8>) -> Stream {
        let mut key = [0; 16];
        getrandom::fill(&mut key).expect("the operating system provides randomness");
        Stream::new(self.clone(), Ask::New { idempotency_key: u128::from_le_bytes(key), endpoint, body })
    }
}

// === impl Inner ===

impl Inner {
    /// How many nodes there are to try.
    pub(crate) fn n_nodes(&self) -> usize {
        self.nodes.len()
    }

    /// A stream on which `ask` was said, at whichever node answers.
    pub(crate) async fn open(&self, ask: &Ask) -> Result<(Connection, Answers), Setback> {
        let connection = self.connection().await?;
        let (send, receive) = connection.open_bi().await?;
        let mut frame = Vec::new();
        ask.encode(&mut frame);
        let mut whole = Whole(send, false);
        whole.0.write_all(&frame).await?;
        whole.1 = true;
        Ok((connection, Answers::new(receive)))
    }

    /// Leaves a node that did not work for the next one; others may have left it already.
    pub(crate) async fn leave(&self, connection: &Connection) {
        let mut current = self.current.lock().await;
        if current.connection.as_ref().is_some_and(|used| used.stable_id() == connection.stable_id()) {
            current.connection = None;
            current.next_node += 1;
        }
    }

    /// The connection in use, or a new one to the next node that lets us in. All streams wait for the same one.
    async fn connection(&self) -> Result<Connection, Setback> {
        let mut current = self.current.lock().await;
        if let Some(connection) = &current.connection {
            if connection.close_reason().is_none() {
                return Ok(connection.clone());
            }
            current.connection = None;
            current.next_node += 1;
        }
        let node = &self.nodes[current.next_node % self.nodes.len()];
        let connected = match timeout(CONNECT_WAIT_MAX, self.connect(node)).await {
            Ok(connected) => connected,
            Err(_) => Err(Setback::Transient(format!("{} did not answer in time", node.address))),
        };
        match connected {
            Ok(connection) => {
                current.connection = Some(connection.clone());
                Ok(connection)
            }
            Err(setback) => {
                current.next_node += 1;
                Err(setback)
            }
        }
    }

    async fn connect(&self, node: &NodeAddress) -> Result<Connection, Setback> {
        let connection = self.endpoint.connect_with(self.quic.clone(), node.address, &node.name)?.await?;
        let (mut send, receive) = connection.open_bi().await?;
        send.write_all(&Hello { key: self.key.clone() }.encode()).await?;
        let _ = send.finish();
        match Answers::new(receive).next().await? {
            Some(Answer::Welcome { node }) => {
                tracing::debug!(node, "connected");
                Ok(connection)
            }
            Some(Answer::Failed { status, retry_after_ms, json }) => Err(refused(status, retry_after_ms, json)),
            other => Err(Setback::Transient(format!("{other:?} in place of a welcome"))),
        }
    }
}

/// A question that is given up half-way must not look complete: quinn finishes what is merely dropped, and the node would
/// take what is there for nonsense and close the connection with all its streams.
struct Whole(SendStream, bool);

impl Drop for Whole {
    fn drop(&mut self) {
        let _ = if self.1 { self.0.finish() } else { self.0.reset(VarInt::from_u32(0)) };
    }
}

/// A refusal; one that is about the node rather than the request is worth another node, and one that says when to come
/// back: an earlier sending of the request is still being answered, to nobody.
pub(crate) fn refused(status: u16, retry_after_ms: u32, json: Vec<u8>) -> Setback {
    let error = ClientError::Refused { status, retry_after_ms, json };
    if status == 503 || status == 409 && retry_after_ms > 0 {
        Setback::Transient(error.to_string())
    } else {
        Setback::Final(error)
    }
}

/// Bytes taken from quinn at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// The receiving side of a stream. Dropping it tells the node that nobody waits for the rest.
pub(crate) struct Answers {
    stream: RecvStream,
    decoder: Decoder,
    chunk: Bytes,
}

// === impl Answers ===

impl Answers {
    fn new(stream: RecvStream) -> Self {
        Self { stream, decoder: Decoder::default(), chunk: Bytes::new() }
    }

    /// The next answer; `None` at the end of the stream. May be dropped and called again.
    pub(crate) async fn next(&mut self) -> Result<Option<Answer>, Setback> {
        loop {
            let mut rest: &[u8] = &self.chunk;
            let fed = self.decoder.feed(&mut rest);
            let n_taken = self.chunk.len() - rest.len();
            self.chunk.advance(n_taken);
            if let Some(frame) = fed? {
                return Ok(Some(Answer::decode(&frame)?));
            }
            match self.stream.read_chunk(CHUNK_BYTES, true).await? {
                Some(chunk) => self.chunk = chunk.bytes,
                None => return Ok(None),
            }
        }
    }
}
