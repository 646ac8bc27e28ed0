//! The node's UDP endpoint and its bounds; every number that differs from quinn's default says why.
//!
//! The socket is handed in, so that a simulation can stand in for the network.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    AsyncUdpSocket, Connection, Endpoint, EndpointConfig, IdleTimeout, Runtime, ServerConfig, TransportConfig, VarInt,
};
use quinn_proto::HashedConnectionIdGenerator;
use ring::hmac;

use crate::pki::Identity;

/// A connection that nothing was heard on for this long is gone. `kill -9` is silent on UDP, and is noticed after
/// about 1.25 times this.
const IDLE: Duration = Duration::from_millis(1000);
/// Something is said at least this often: four chances within [`IDLE`].
const KEEP_ALIVE: Duration = Duration::from_millis(250);
/// Round trips are guessed to take this long at first. Nodes are near each other; with quinn's 333 ms a lost first
/// packet would be repeated only when the connection is given up already.
const INITIAL_RTT: Duration = Duration::from_millis(50);
/// Exchanges of one peer at once: requests that run on this node for it, and calls.
const STREAMS_MAX: u32 = 4096;
/// Bytes that one exchange may have under way: a start with a long prompt in two round trips.
const STREAM_WINDOW: u32 = 256 * 1024;
/// Bytes that one peer may have under way; quinn's default has no bound.
const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;
/// Bytes that somebody may have under way before it is known who it is: a hello. One stream takes that.
const STRANGER_WINDOW: u32 = 64 * 1024;
/// Bytes of heartbeats that may wait: a second's worth, many times over. The newest push out the oldest.
const DATAGRAM_BUFFER: usize = 64 * 1024;
/// Handshakes at once: far above any cluster, far below harm.
const INCOMING_MAX: usize = 256;

/// Where an endpoint gets its packets and its time.
pub struct EndpointParts {
    /// The bound socket.
    pub socket: Arc<dyn AsyncUdpSocket>,
    /// Timers and tasks.
    pub runtime: Arc<dyn Runtime>,
    /// Makes the endpoint's choices repeatable, for simulations.
    pub rng_seed: Option<[u8; 32]>,
}

// === impl EndpointParts ===

impl EndpointParts {
    /// A real socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub fn bind(address: SocketAddr) -> io::Result<Self> {
        let runtime: Arc<dyn Runtime> = Arc::new(quinn::TokioRuntime);
        let socket = runtime.wrap_udp_socket(std::net::UdpSocket::bind(address)?)?;
        Ok(Self { socket, runtime, rng_seed: None })
    }
}

fn transport(streams_max: u32, window: u32) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(IdleTimeout::try_from(IDLE).expect("one second is a valid time-out")))
        .keep_alive_interval(Some(KEEP_ALIVE))
        .initial_rtt(INITIAL_RTT)
        .max_concurrent_bidi_streams(VarInt::from_u32(streams_max))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(window))
        .send_window(u64::from(CONNECTION_WINDOW))
        .datagram_receive_buffer_size(Some(DATAGRAM_BUFFER))
        .datagram_send_buffer_size(DATAGRAM_BUFFER);
    transport
}

/// How this node dials: it asks on what it dials and serves on what it accepts, so peers open nothing there.
pub(crate) fn dialling() -> Arc<TransportConfig> {
    Arc::new(transport(0, CONNECTION_WINDOW))
}

/// Gives a peer that has proved who it is what peers may have; until then it has next to nothing.
pub(crate) fn welcome(connection: &Connection) {
    connection.set_receive_window(VarInt::from_u32(CONNECTION_WINDOW));
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS_MAX));
}

/// The endpoint. Reset key and connection ids come from the node's own secret: a restarted node can so tell its
/// peers at once that it has forgotten them, instead of leaving them to wait.
pub(crate) fn open(identity: &Identity, tls: QuicServerConfig, parts: EndpointParts) -> io::Result<Endpoint> {
    let reset_key = hmac::Key::new(hmac::HMAC_SHA256, &identity.secret("tenantry 2026 quic stateless reset"));
    let id_key = identity.secret("tenantry 2026 quic connection ids");
    let id_key = u64::from_le_bytes(*id_key.first_chunk().expect("32 bytes hold 8"));
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    config.cid_generator(move || Box::new(HashedConnectionIdGenerator::from_key(id_key)));
    config.rng_seed(parts.rng_seed);
    Endpoint::new_with_abstract_socket(config, Some(answering(tls)), parts.socket, parts.runtime)
}

/// How those who dial this node are met.
pub(crate) fn answering(tls: QuicServerConfig) -> ServerConfig {
    let mut server = ServerConfig::with_crypto(Arc::new(tls));
    server.transport_config(Arc::new(transport(1, STRANGER_WINDOW)));
    server.migration(false);
    server.max_incoming(INCOMING_MAX);
    server
}
