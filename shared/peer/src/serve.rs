//! Being asked: who may come in, and which part of the node answers.
//!
//! Nothing of a connection is decoded before its certificate names a node of this cluster; who has none may only join
//! ([`mod@crate::join`]), where that is possible at all. Called by the node's shell once, with what answers
//! ([`PeerService`]).

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use quinn::{Connection, ConnectionError, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use shared::clock::Clock;
use shared::cluster::Heartbeat;
use shared::error::{ErrorKind, RequestError};
use shared::id::NodeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use wire::Version;
use wire::frame::FrameError;
use wire::node::{Answer, Hello, Message, Opening, Renewal, Request, Response, Start};

use crate::endpoint;
use crate::net::{Inner, PeerNet};
use crate::refusal::Refusal;
use crate::stream::{self, Frames, StreamError, code};

/// A peer says hello within this time, or its connection is held for nothing.
const HELLO_WAIT_MAX: Duration = Duration::from_secs(2);
/// A message has arrived in full within this time, or its stream is held for nothing.
const MESSAGE_WAIT_MAX: Duration = Duration::from_secs(10);

/// Handshakes at once, each for [`HELLO_WAIT_MAX`] twice at most: far above any cluster, far below harm.
const HANDSHAKES_MAX: usize = 256;
/// From this many open handshakes on, addresses are validated first: nobody is made to answer for somebody else.
const VALIDATE_FROM: usize = 64;

/// What answers the other nodes.
pub trait PeerService: Send + Sync + 'static {
    /// Answers a call. Dropped when the caller no longer waits.
    fn call(&self, from: NodeId, request: Request) -> impl Future<Output = Response> + Send;

    /// Does work and reports on it until it is done or [`EventSink::gone`].
    fn start(&self, from: NodeId, start: Start, events: EventSink) -> impl Future<Output = ()> + Send;

    /// Takes note of a heartbeat; must not block.
    fn heartbeat(&self, from: &NodeId, heartbeat: Heartbeat);

    /// A peer has connected; must not block.
    fn hello(&self, from: &NodeId, hello: &Hello);
}

/// Serves other nodes until the endpoint is closed.
pub async fn serve<S: PeerService>(net: PeerNet, service: Arc<S>) {
    let endpoint = net.0.endpoint.clone();
    // A weak hold: what serves must not keep the endpoint open that its owner has dropped.
    let net = {
        let weak = Arc::downgrade(&net.0);
        drop(net);
        weak
    };
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    while let Some(incoming) = endpoint.accept().await {
        let Some(inner) = net.upgrade() else { return };
        let n_open = HANDSHAKES_MAX - handshakes.available_permits();
        if n_open >= VALIDATE_FROM && !incoming.remote_address_validated() {
            let _ = incoming.retry();
            continue;
        }
        match handshakes.clone().try_acquire_owned() {
            Ok(permit) => drop(tokio::spawn(admit(PeerNet(inner), service.clone(), incoming, permit))),
            // No answer, so that a peer dials again: a refusal would look like one for good.
            Err(_) => incoming.ignore(),
        }
    }
}

/// From a first packet to a peer that may ask. `handshake` is held until it is known who it is.
async fn admit<S: PeerService>(net: PeerNet, service: Arc<S>, incoming: Incoming, handshake: OwnedSemaphorePermit) {
    let address = incoming.remote_address();
    let connecting = async { incoming.accept()?.await };
    let connection = match timeout(HELLO_WAIT_MAX, connecting).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            if let Some(reason) = refused_by_tls(&error) {
                net.0.refusals.note(reason, &address, &error);
            }
            return;
        }
        // Whoever it was did not go on.
        Err(_) => return,
    };
    let protocol = stream::protocol(&connection);
    let version = match (Version::of_alpn(&protocol), net.0.door.get()) {
        (Some(version), _) => version,
        (None, Some(door)) => return door.attend(&connection, &*net.0.clock, &net.0.refusals).await,
        // TLS agrees on nothing else.
        (None, None) => return,
    };
    let from = match identify(&net, &connection, version).await {
        Ok((from, hello)) => {
            service.hello(&from, &hello);
            from
        }
        Err((reason, detail)) => {
            net.0.refusals.note(reason, &address, &detail);
            connection.close(code::REFUSED, b"refused");
            return;
        }
    };
    drop(handshake);
    let clock = net.0.clock.clone();
    let peer = Peer { net: Arc::downgrade(&net.0), service, connection, from, version, address, clock };
    drop(net);
    Arc::new(peer).attend().await;
}

/// What TLS refused; `None` for a peer that just went away.
fn refused_by_tls(error: &ConnectionError) -> Option<Refusal> {
    if !matches!(error, ConnectionError::TransportError(_)) {
        return None;
    }
    Some(match stream::alert(error)? {
        45 => Refusal::Expired,
        48 => Refusal::WrongAuthority,
        116 => Refusal::NoCertificate,
        stream::NO_PROTOCOL => Refusal::Protocol,
        _ => Refusal::Handshake,
    })
}

/// The certificate that a peer has shown to TLS.
fn shown(connection: &Connection) -> Option<CertificateDer<'static>> {
    let shown = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    shown.into_iter().next()
}

/// Who this is: first by certificate, then by hello, which must agree.
async fn identify(
    net: &PeerNet,
    connection: &Connection,
    version: Version,
) -> Result<(NodeId, Hello), (Refusal, String)> {
    // Where nodes may join, TLS lets pass who shows none.
    let certificate = shown(connection).ok_or((Refusal::NoCertificate, "without one it may only join".to_owned()))?;
    let named = net.0.named_by(&certificate);
    let from = named.ok_or((Refusal::NotANode, "the certificate names no other node of this cluster".to_owned()))?;
    let greeting = async {
        let (send, receive) = connection.accept_bi().await?;
        let frame = Frames::new(version, receive, Hello::KINDS).only().await?;
        Ok::<_, StreamError>((send, Hello::decode(&frame, net.0.clock.now())?))
    };
    let greeting = timeout(HELLO_WAIT_MAX, greeting).await;
    let greeting = greeting.map_err(|_| (Refusal::Protocol, format!("node {from} said no hello")))?;
    let (mut send, hello) = greeting.map_err(|error| (Refusal::Protocol, format!("hello of {from}: {error}")))?;
    if hello.node != *from {
        return Err((Refusal::OtherNode, format!("node {from} claims to be {}", hello.node)));
    }
    if hello.cluster != net.0.hello.cluster {
        return Err((Refusal::OtherCluster, format!("node {from} of cluster {:?}", hello.cluster)));
    }
    endpoint::welcome(connection);
    let mut frame = Vec::new();
    let ours = net.0.hello().encode_for(version, net.0.clock.now(), &mut frame);
    ours.map_err(|error| (Refusal::Protocol, format!("our own hello: {error}")))?;
    // A peer that does not wait for our hello has gone; its connection says so next.
    let _ = send.write_all(&frame).await;
    let _ = send.finish();
    Ok((from.clone(), hello))
}

/// A peer that is in, on one connection.
struct Peer<S> {
    net: Weak<Inner>,
    service: Arc<S>,
    connection: Connection,
    from: NodeId,
    version: Version,
    address: SocketAddr,
    clock: Arc<dyn Clock>,
}

// === impl Peer ===

impl<S: PeerService> Peer<S> {
    /// Serves it until its connection ends.
    async fn attend(self: Arc<Self>) {
        loop {
            tokio::select! {
                stream = self.connection.accept_bi() => {
                    let Ok((send, receive)) = stream else { return };
                    let peer = self.clone();
                    tokio::spawn(async move {
                        if let Err(error @ StreamError::Frame(_)) = peer.answer(send, receive).await {
                            // Where one stream makes no sense, none is to be trusted.
                            peer.dismiss(&error, b"frames make no sense");
                        }
                    });
                }
                datagram = self.connection.read_datagram() => {
                    let Ok(bytes) = datagram else { return };
                    match wire::node::decode_datagram_of(self.version, &bytes, self.clock.now()) {
                        Ok(heartbeat) => self.service.heartbeat(&self.from, heartbeat),
                        Err(error) => return self.dismiss(&error.into(), b"datagrams make no sense"),
                    }
                }
            }
        }
    }

    fn dismiss(&self, error: &StreamError, why: &[u8]) {
        // Many streams may fail together; the first one says it.
        if self.connection.close_reason().is_none() {
            if let Some(inner) = self.net.upgrade() {
                inner.refusals.note(Refusal::Protocol, &self.address, error);
            }
            self.connection.close(code::PROTOCOL, why);
        }
    }

    /// One exchange.
    async fn answer(&self, send: SendStream, receive: RecvStream) -> Result<(), StreamError> {
        let (version, clock) = (self.version, self.clock.clone());
        let mut frames = Frames::new(version, receive, Opening::KINDS);
        let events = EventSink { send, version, clock, frame: Vec::new(), is_finished: false };
        let Ok(frame) = timeout(MESSAGE_WAIT_MAX, frames.only()).await else { return Ok(()) };
        match Opening::decode(&frame?, self.clock.now())? {
            Opening::Start(start) => self.service.start(self.from.clone(), *start, events).await,
            Opening::Request(request) => {
                let response = tokio::select! {
                    response = self.service.call(self.from.clone(), request) => response,
                    () = events.gone() => return Ok(()),
                };
                events.only(&response).await?;
            }
            Opening::Renew => events.only(&self.renew().await).await?,
        }
        Ok(())
    }

    /// A new certificate for the one it has shown, where the authority is.
    async fn renew(&self) -> Renewal {
        let refused = |what: String| Renewal::Refused(RequestError::new(ErrorKind::Unavailable, "unavailable", what));
        let net = self.net.upgrade();
        let Some((net, door)) = net.as_ref().and_then(|net| Some((net, net.door.get()?))) else {
            return refused("the authority is on another machine".to_owned());
        };
        let Some(shown) = shown(&self.connection) else { return refused("no certificate was shown".to_owned()) };
        match door.renew(self.from.clone(), shown, net.clock.wall()).await {
            Ok(certificate) => {
                tracing::info!(target: "audit", node = %self.from, from = %self.address, "renewed a certificate");
                Renewal::Certificate(certificate)
            }
            Err(error) => {
                tracing::error!(%error, node = %self.from, "cannot renew a certificate");
                refused("the authority could not; its log says why".to_owned())
            }
        }
    }
}

/// The receiver is gone or waits no longer: what is being done for it can stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody waits for the answer any more")]
pub struct Gone;

/// Where the answers to a [`Start`] go. Dropped before [`EventSink::finish`], it tells the receiver that the rest
/// will not come.
pub struct EventSink {
    send: SendStream,
    version: Version,
    clock: Arc<dyn Clock>,
    frame: Vec<u8>,
    is_finished: bool,
}

// === impl EventSink ===

impl EventSink {
    /// Sends answers in one go; waits while the receiver is behind.
    ///
    /// # Errors
    /// [`Gone`] when nobody waits any more, or an answer is larger than any may be.
    pub async fn send(&mut self, answers: &[Answer]) -> Result<(), Gone> {
        self.frame.clear();
        let now = self.clock.now();
        for answer in answers {
            answer.encode_for(self.version, now, &mut self.frame).map_err(|error| {
                tracing::error!(%error, "an answer is too large to send");
                Gone
            })?;
        }
        self.write().await
    }

    /// Sends the one answer to a call.
    async fn only(mut self, answer: &impl Message) -> Result<(), FrameError> {
        self.frame.clear();
        answer.encode_for(self.version, self.clock.now(), &mut self.frame)?;
        if self.write().await.is_ok() {
            self.finish();
        }
        Ok(())
    }

    async fn write(&mut self) -> Result<(), Gone> {
        self.send.write_all(&self.frame).await.map_err(|_| Gone)
    }

    /// Ends when nobody waits any more.
    pub fn gone(&self) -> impl Future<Output = ()> + Send + use<> {
        let stopped = self.send.stopped();
        async move {
            // Not stopped but received in full: then there is nothing left to cancel, and this never ends.
            if let Ok(None) = stopped.await {
                std::future::pending::<()>().await;
            }
        }
    }

    /// All is said.
    pub fn finish(mut self) {
        self.is_finished = true;
        let _ = self.send.finish();
    }
}

impl Drop for EventSink {
    fn drop(&mut self) {
        if !self.is_finished {
            let _ = self.send.reset(code::BROKEN_OFF);
        }
    }
}
