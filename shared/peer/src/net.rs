//! Asking other nodes: one dialled connection per peer, kept up as long as this lives; calls, work, heartbeats.
//!
//! Held by the node and its coordinator. Nothing is queued for a peer that is away: a call fails at once, and the
//! caller decides what to do instead.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream};
use shared::clock::Clock;
use shared::cluster::Heartbeat;
use shared::id::NodeId;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use wire::frame::FrameError;
use wire::node::{Answer, Hello, Message, Request, Response, Start};
use wire::{Spoken, Version};

use crate::badge::Badge;
use crate::endpoint::{self, EndpointParts};
use crate::join::Door;
use crate::pki::{Authority, Identity, certificate, node_name};
use crate::refusal::Refusals;
use crate::renew::Renewer;
use crate::stream::{Frames, NO_PROTOCOL, StreamError, alert, code, protocol, why};
use crate::tls;

/// A dial that takes longer has met nobody; connections idle out after a second anyway.
const DIAL_WAIT_MAX: Duration = Duration::from_secs(2);
/// First pause after a failed dial: a restarting node is back within a few of these.
const BACK_OFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause: how late a node that was away for long may be noticed.
const BACK_OFF_MAX: Duration = Duration::from_millis(1000);
/// Calls go out before bulk that waits for the same connection: elections must not wait behind prompts.
const CALL_PRIORITY: i32 = 1;
/// Prompts go out at quinn's own default.
const WORK_PRIORITY: i32 = 0;

/// Why a peer did not do what it was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerError {
    /// No such node in the cluster's file.
    #[error("there is no node {node}")]
    Unknown {
        /// The name asked for.
        node: NodeId,
    },
    /// No connection, so it was not asked.
    #[error("node {node} is not connected: {why}")]
    NotConnected {
        /// Which node.
        node: NodeId,
        /// What the last attempt met.
        why: Arc<str>,
    },
    /// No answer in time. It may still do what it was asked.
    #[error("node {node} did not answer within {} ms", within.as_millis())]
    Late {
        /// Which node.
        node: NodeId,
        /// How long it was waited for.
        within: Duration,
    },
    /// The connection ended, or the peer broke off. It may still do what it was asked.
    #[error("lost node {node}: {why}")]
    Lost {
        /// Which node.
        node: NodeId,
        /// What happened.
        why: String,
    },
    /// Frames that make no sense, or a message too large to send.
    #[error("node {node}: {error}")]
    Frame {
        /// Which node.
        node: NodeId,
        /// What is wrong with them.
        error: FrameError,
    },
}

/// What a node must know to talk to the others.
pub struct PeerNetConfig {
    /// What it says of itself.
    pub hello: Hello,
    /// The other nodes.
    pub peers: BTreeMap<NodeId, SocketAddr>,
    /// Its time, for deadlines that travel.
    pub clock: Arc<dyn Clock>,
    /// The cluster's authority if it is on this machine ([`Authority::open`]): then nodes with an invitation may join
    /// at this one's port.
    pub authority: Option<Authority>,
}

/// No endpoint could be had.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The certificates do not work.
    #[error(transparent)]
    Tls(#[from] tls::TlsError),
    /// The socket does not work.
    #[error("cannot use the peer port: {0}")]
    Socket(#[from] io::Error),
}

/// The connection to a peer.
#[derive(Clone)]
enum Link {
    Down { why: Arc<str> },
    Up { connection: Connection, version: Version, hello: Arc<Hello> },
}

struct Peer {
    link: watch::Receiver<Link>,
    dialler: JoinHandle<()>,
}

pub(crate) struct Inner {
    pub(crate) hello: Arc<Hello>,
    pub(crate) endpoint: Endpoint,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) refusals: Refusals,
    /// Where nodes join, once they do here.
    pub(crate) door: OnceLock<Door>,
    /// What this node shows.
    pub(crate) badge: Arc<Badge>,
    /// For the door of clients.
    pub(crate) client_secret: [u8; 32],
    peers: BTreeMap<NodeId, Peer>,
    renewer: OnceLock<JoinHandle<()>>,
}

/// The other nodes of the cluster. Cheap to clone; when the last clone is gone, so are the connections.
#[derive(Clone)]
pub struct PeerNet(pub(crate) Arc<Inner>);

// === impl PeerNet ===

impl PeerNet {
    /// Opens the endpoint and begins to dial. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// When certificates or socket cannot be used. Peers that are away are no error.
    pub fn new(identity: &Identity, config: PeerNetConfig, parts: EndpointParts) -> Result<Self, OpenError> {
        let (badge, may_join) = (Arc::new(Badge::new(identity)?), config.authority.is_some());
        let server = tls::server(identity, badge.clone(), config.clock.clone(), may_join)?;
        let endpoint = endpoint::open(identity, server, parts)?;
        let mut client = ClientConfig::new(Arc::new(tls::client(identity, badge.clone(), config.clock.clone())?));
        client.transport_config(endpoint::dialling());
        let hello = Arc::new(config.hello);
        let peers = config.peers.into_iter().filter(|(node, _)| *node != identity.node).map(|(node, address)| {
            let (publish, link) = watch::channel(Link::Down { why: "not dialled yet".into() });
            let dialler = Dialler {
                endpoint: endpoint.clone(),
                client: client.clone(),
                hello: hello.clone(),
                clock: config.clock.clone(),
                node: node.clone(),
                address,
                publish,
            };
            (node, Peer { link, dialler: tokio::spawn(dialler.run()) })
        });
        let peers = peers.collect();
        let (ca, data) = (identity.ca.clone(), identity.data.clone());
        let inner = Arc::new(Inner {
            badge: badge.clone(),
            client_secret: identity.secret("tenantry 2026 client door"),
            renewer: OnceLock::new(),
            peers,
            hello,
            endpoint,
            refusals: Refusals::new(config.clock.clone()),
            clock: config.clock,
            door: config.authority.map_or_else(OnceLock::new, |authority| Door::new(authority).into()),
        });
        // Started when there is what it holds weakly: it would take an end for granted otherwise.
        let renewer = Renewer { net: Arc::downgrade(&inner), badge, ca, data };
        let _ = inner.renewer.set(tokio::spawn(renewer.run()));
        Ok(Self(inner))
    }

    /// Whether nodes join here.
    pub fn lets_join(&self) -> bool {
        self.0.door.get().is_some()
    }

    /// From now on nodes with an invitation may join at this one's port: the authority came to this machine while
    /// the node was running. `identity` is the node's own.
    ///
    /// # Errors
    /// When the authority is not the one that let this node in.
    pub fn let_join(&self, identity: &Identity, authority: Authority) -> Result<(), tls::TlsError> {
        if authority.fingerprint() != certificate::fingerprint(&identity.ca) {
            return Err(tls::TlsError::new("the authority on this machine is not the one that let this node in"));
        }
        let tls = tls::server(identity, self.0.badge.clone(), self.0.clock.clone(), true)?;
        if self.0.door.set(Door::new(authority)).is_ok() {
            self.0.endpoint.set_server_config(Some(endpoint::answering(tls)));
        }
        Ok(())
    }

    /// Whether a peer can be asked right now.
    pub fn is_connected(&self, to: &NodeId) -> bool {
        self.connection(to).is_ok()
    }

    /// Ends when a peer can be asked, or never.
    pub async fn connected(&self, to: &NodeId) {
        let Some(peer) = self.0.peers.get(to) else { return std::future::pending().await };
        let mut link = peer.link.clone();
        if link.wait_for(|link| matches!(link, Link::Up { .. })).await.is_err() {
            std::future::pending().await
        }
    }

    /// Ends when a connection to a peer that is up, or will be, is lost, or never.
    pub async fn lost(&self, to: &NodeId) {
        let Some(peer) = self.0.peers.get(to) else { return std::future::pending().await };
        let mut link = peer.link.clone();
        for is_up in [true, false] {
            if link.wait_for(|link| matches!(link, Link::Up { .. }) == is_up).await.is_err() {
                std::future::pending().await
            }
        }
    }

    /// What a connected peer said of itself.
    pub fn hello_of(&self, node: &NodeId) -> Option<Arc<Hello>> {
        match &*self.0.peers.get(node)?.link.borrow() {
            Link::Up { hello, .. } => Some(hello.clone()),
            Link::Down { .. } => None,
        }
    }

    /// Who was turned away.
    pub fn refusals(&self) -> &Refusals {
        &self.0.refusals
    }

    /// The UDP address of the endpoint.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        self.0.endpoint.local_addr()
    }

    /// Says good-bye to every peer, so that none waits for a silent one. To be called last.
    pub async fn close(&self) {
        self.0.stop_dialling();
        self.0.endpoint.close(code::BYE, b"leaving");
        self.0.endpoint.wait_idle().await;
    }

    fn connection(&self, to: &NodeId) -> Result<(Connection, Version), PeerError> {
        let peer = self.0.peers.get(to).ok_or_else(|| PeerError::Unknown { node: to.clone() })?;
        match &*peer.link.borrow() {
            Link::Up { connection, version, .. } => Ok((connection.clone(), *version)),
            Link::Down { why } => Err(PeerError::NotConnected { node: to.clone(), why: why.clone() }),
        }
    }

    /// One question, one answer.
    ///
    /// # Errors
    /// See [`PeerError`]; [`PeerError::Unknown`] and [`PeerError::NotConnected`] mean that it was not asked.
    pub async fn call(&self, to: &NodeId, request: &Request, within: Duration) -> Result<Response, PeerError> {
        self.ask(to, request, within).await
    }

    /// As [`Self::call`], for any message.
    pub(crate) async fn ask<A: Message>(
        &self,
        to: &NodeId,
        question: &impl Message,
        within: Duration,
    ) -> Result<A, PeerError> {
        let (connection, version) = self.connection(to)?;
        let frame = self.frame(to, version, question)?;
        let answer = async {
            let receive = open_with(&connection, &frame, CALL_PRIORITY).await?;
            let frame = Frames::new(version, receive, A::KINDS).only().await?;
            Ok(A::decode(&frame, self.0.clock.now())?)
        };
        in_time(to, within, answer).await
    }

    /// Hands work to a peer. Dropping the exchange cancels it there.
    ///
    /// # Errors
    /// See [`PeerError`]; `within` is for handing over, not for the work.
    pub async fn start(&self, to: &NodeId, start: &Start, within: Duration) -> Result<Exchange, PeerError> {
        let (connection, version) = self.connection(to)?;
        let frame = self.frame(to, version, start)?;
        let open = async {
            let receive = open_with(&connection, &frame, WORK_PRIORITY).await?;
            Ok(Frames::new(version, receive, Answer::KINDS))
        };
        let frames = in_time(to, within, open).await?;
        Ok(Exchange { frames, node: to.clone(), clock: self.0.clock.clone(), is_over: false })
    }

    /// Sends a heartbeat; lost ones are not repeated. False when it could not even be sent.
    pub fn datagram(&self, to: &NodeId, heartbeat: &Heartbeat) -> bool {
        let Ok((connection, version)) = self.connection(to) else { return false };
        let bytes = wire::node::encode_datagram_for(version, heartbeat, self.0.clock.now());
        connection.send_datagram(Bytes::from(bytes)).is_ok()
    }

    /// The wire version agreed on with a connected peer.
    pub fn version_of(&self, node: &NodeId) -> Option<Version> {
        self.connection(node).ok().map(|(_, version)| version)
    }

    fn frame(&self, to: &NodeId, version: Version, message: &impl Message) -> Result<Vec<u8>, PeerError> {
        let mut frame = Vec::new();
        let encoded = message.encode_for(version, self.0.clock.now(), &mut frame);
        encoded.map_err(|error| PeerError::Frame { node: to.clone(), error })?;
        Ok(frame)
    }
}

/// Opens a stream with one whole message; the side on which answers come.
async fn open_with(connection: &Connection, frame: &[u8], priority: i32) -> Result<RecvStream, StreamError> {
    /// Given up half-way, a message must not look complete: quinn finishes what is merely dropped.
    struct Whole(SendStream, bool);
    impl Drop for Whole {
        fn drop(&mut self) {
            let _ = if self.1 { self.0.finish() } else { self.0.reset(code::CANCELLED) };
        }
    }
    let (send, receive) = connection.open_bi().await?;
    let mut whole = Whole(send, false);
    let _ = whole.0.set_priority(priority);
    whole.0.write_all(frame).await?;
    whole.1 = true;
    Ok(receive)
}

fn peer_error(node: &NodeId, error: StreamError) -> PeerError {
    match error {
        StreamError::Frame(error) => PeerError::Frame { node: node.clone(), error },
        other => PeerError::Lost { node: node.clone(), why: other.to_string() },
    }
}

async fn in_time<T>(
    node: &NodeId,
    within: Duration,
    work: impl Future<Output = Result<T, StreamError>>,
) -> Result<T, PeerError> {
    match timeout(within, work).await {
        Ok(done) => done.map_err(|error| peer_error(node, error)),
        Err(_) => Err(PeerError::Late { node: node.clone(), within }),
    }
}

// === impl Inner ===

impl Inner {
    /// The node of the cluster's file that a certificate names.
    pub(crate) fn named_by(&self, certificate: &rustls::pki_types::CertificateDer<'_>) -> Option<&NodeId> {
        self.peers.keys().find(|node| tls::names(certificate, node))
    }

    /// What this node says of itself.
    pub(crate) fn hello(&self) -> Hello {
        Hello { has_authority: self.door.get().is_some(), ..Hello::clone(&self.hello) }
    }

    /// The names of the others.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &NodeId> {
        self.peers.keys()
    }

    fn stop_dialling(&self) {
        self.renewer.get().inspect(|renewer| renewer.abort());
        for peer in self.peers.values() {
            peer.dialler.abort();
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop_dialling();
        self.endpoint.close(code::BYE, b"leaving");
    }
}

/// Work that runs at a peer. Dropping it cancels the work.
pub struct Exchange {
    frames: Frames,
    node: NodeId,
    clock: Arc<dyn Clock>,
    is_over: bool,
}

// === impl Exchange ===

impl Exchange {
    /// The next answer; `None` when the peer has said all. May be dropped and called again.
    ///
    /// # Errors
    /// When the connection is lost, the peer broke off, or its frames make no sense; then nothing follows.
    pub async fn recv(&mut self) -> Result<Option<Answer>, PeerError> {
        let next = match self.frames.next().await {
            Ok(Some(frame)) => Answer::decode(&frame, self.clock.now()).map(Some).map_err(StreamError::from),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        self.is_over |= !matches!(next, Ok(Some(_)));
        next.map_err(|error| peer_error(&self.node, error))
    }

    /// Who does the work.
    pub fn node(&self) -> &NodeId {
        &self.node
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if !self.is_over {
            self.frames.stop();
        }
    }
}

/// Keeps one peer dialled.
struct Dialler {
    endpoint: Endpoint,
    client: ClientConfig,
    hello: Arc<Hello>,
    clock: Arc<dyn Clock>,
    node: NodeId,
    address: SocketAddr,
    publish: watch::Sender<Link>,
}

// === impl Dialler ===

impl Dialler {
    async fn run(self) {
        let mut n_failures = 0_u32;
        loop {
            match timeout(DIAL_WAIT_MAX, self.dial()).await.unwrap_or_else(|_| Err("no answer in time".into())) {
                Ok((connection, version, hello)) => {
                    tracing::info!(peer = %self.node, address = %self.address, %version, "connected to a peer");
                    n_failures = 0;
                    self.publish.send_replace(Link::Up { connection: connection.clone(), version, hello });
                    let reason = connection.closed().await;
                    tracing::warn!(peer = %self.node, %reason, "lost a peer");
                    self.publish.send_replace(Link::Down { why: reason.to_string().into() });
                }
                Err(why) => {
                    if n_failures == 0 {
                        tracing::info!(peer = %self.node, address = %self.address, why, "cannot reach a peer yet");
                    }
                    n_failures = n_failures.saturating_add(1);
                    self.publish.send_replace(Link::Down { why: why.into() });
                }
            }
            sleep(back_off(&self.hello.node, &self.node, n_failures)).await;
        }
    }

    async fn dial(&self) -> Result<(Connection, Version, Arc<Hello>), String> {
        let connecting = self
            .endpoint
            .connect_with(self.client.clone(), self.address, &node_name(&self.node))
            .map_err(|error| error.to_string())?;
        let connection = connecting.await.map_err(|error| match alert(&error) {
            Some(NO_PROTOCOL) => {
                format!("it speaks none of wire versions {}; hint: upgrade by one release at a time", Spoken::OURS)
            }
            _ => error.to_string(),
        })?;
        let version = Version::of_alpn(&protocol(&connection)).ok_or("TLS agreed on no protocol of ours")?;
        let hello = self.greet(&connection, version).await.map_err(|error| match error {
            // The reason why a connection was closed says more than that its stream ended.
            StreamError::Connection(_) => why(&connection),
            other => other.to_string(),
        });
        let expected = |hello: &Hello| hello.node == self.node && hello.cluster == self.hello.cluster;
        match hello {
            Ok(hello) if expected(&hello) => Ok((connection, version, Arc::new(hello))),
            Ok(hello) => {
                connection.close(code::REFUSED, b"another node or cluster");
                Err(format!("it says that it is node {} of cluster {:?}", hello.node, hello.cluster))
            }
            Err(why) => {
                connection.close(code::PROTOCOL, b"no hello");
                Err(why)
            }
        }
    }

    async fn greet(&self, connection: &Connection, version: Version) -> Result<Hello, StreamError> {
        let mut frame = Vec::new();
        self.hello.encode_for(version, self.clock.now(), &mut frame)?;
        let receive = open_with(connection, &frame, CALL_PRIORITY).await?;
        let frame = Frames::new(version, receive, Hello::KINDS).only().await?;
        Ok(Hello::decode(&frame, self.clock.now())?)
    }
}

/// The pause before the next dial, after `n_failures` in a row: doubling, and between half and all of it, so that
/// nodes that lost a peer together do not all come back at once. A function of its arguments, for simulations.
fn back_off(from: &NodeId, to: &NodeId, n_failures: u32) -> Duration {
    let whole = BACK_OFF_MIN.saturating_mul(1 << n_failures.min(10)).min(BACK_OFF_MAX);
    let text = format!("{from} {to} {n_failures}");
    let dice = u32::from(blake3::hash(text.as_bytes()).as_bytes()[0]);
    whole / 2 + whole / 2 * dice / 256
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_between_dials_grow_to_a_second_and_differ() {
        let node = |name: &str| name.parse::<NodeId>().expect("a name");
        let pauses: Vec<Duration> = (0..20).map(|n| back_off(&node("a"), &node("b"), n)).collect();
        assert!(pauses[0] >= BACK_OFF_MIN / 2 && pauses[0] <= BACK_OFF_MIN);
        assert!(pauses.iter().all(|pause| *pause <= BACK_OFF_MAX));
        assert!(pauses[6..].iter().all(|pause| *pause >= BACK_OFF_MAX / 2));
        assert_ne!(back_off(&node("a"), &node("b"), 9), back_off(&node("c"), &node("b"), 9));
    }
}
