//! Being asked: who may come in, and which part of the node answers.
//!
//! Nothing of a connection is decoded before its certificate names a node of this cluster; who has none may only join
//! ([`crate::join`]), where that is possible at all. Called by the node's shell once, with what answers
//! ([`PeerService`]).

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError, Incoming, RecvStream, SendStream};
use rustls::pki_types::CertificateDer;
use shared::clock::Clock;
use shared::cluster::Heartbeat;
use shared::id::NodeId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use wire::node::{Answer, Hello, Message, Opening, Request, Response, Start};

use crate::endpoint;
use crate::net::PeerNet;
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
    if let (Some(door), true) = (&net.0.door, stream::protocol(&connection) == wire::JOIN_ALPN) {
        return door.attend(&connection, &*net.0.clock, &net.0.refusals).await;
    }
    let from = match identify(&net, &connection).await {
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
    let protocol_error = {
        let weak = Arc::downgrade(&net.0);
        move |error: &StreamError| {
            if let Some(inner) = weak.upgrade() {
                inner.refusals.note(Refusal::Protocol, &address, error);
            }
        }
    };
    drop(net);
    attend(service, connection, from, clock, protocol_error).await;
}

/// What TLS refused; `None` for a peer that just went away.
fn refused_by_tls(error: &ConnectionError) -> Option<Refusal> {
    /// TLS alerts as QUIC reports them (RFC 9001, section 4.8).
    const ALERT: u64 = 0x100;
    let ConnectionError::TransportError(error) = error else { return None };
    match u64::from(error.code).checked_sub(ALERT)? {
        45 => Some(Refusal::Expired),
        48 => Some(Refusal::WrongAuthority),
        116 => Some(Refusal::NoCertificate),
        120 => Some(Refusal::Protocol),
        0..256 => Some(Refusal::Handshake),
        _ => None,
    }
}

/// Who this is: first by certificate, then by hello, which must agree.
async fn identify(net: &PeerNet, connection: &Connection) -> Result<(NodeId, Hello), (Refusal, String)> {
    let shown = connection.peer_identity().and_then(|shown| shown.downcast::<Vec<CertificateDer<'static>>>().ok());
    let certificate = shown.as_ref().and_then(|chain| chain.first());
    // Where nodes may join, TLS lets pass who shows none.
    let certificate = certificate.ok_or((Refusal::NoCertificate, "without one it may only join".to_owned()))?;
    let named = net.0.named_by(certificate);
    let from = named.ok_or((Refusal::NotANode, "the certificate names no other node of this cluster".to_owned()))?;
    let greeting = async {
        let (send, receive) = connection.accept_bi().await?;
        let frame = Frames::new(receive, Hello::KINDS).only().await?;
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
    let ours = net.0.hello.encode(net.0.clock.now(), &mut frame);
    ours.map_err(|error| (Refusal::Protocol, format!("our own hello: {error}")))?;
    // A peer that does not wait for our hello has gone; its connection says so next.
    let _ = send.write_all(&frame).await;
    let _ = send.finish();
    Ok((from.clone(), hello))
}

/// Serves one peer until its connection ends.
async fn attend<S: PeerService>(
    service: Arc<S>,
    connection: Connection,
    from: NodeId,
    clock: Arc<dyn Clock>,
    protocol_error: impl Fn(&StreamError) + Clone + Send + 'static,
) {
    loop {
        tokio::select! {
            stream = connection.accept_bi() => {
                let Ok((send, receive)) = stream else { return };
                let (service, connection) = (service.clone(), connection.clone());
                let (from, clock, protocol_error) = (from.clone(), clock.clone(), protocol_error.clone());
                tokio::spawn(async move {
                    let answered = answer(service, from, clock, send, receive).await;
                    if let Err(error @ StreamError::Frame(_)) = answered {
                        // Where one stream makes no sense, none is to be trusted.
                        protocol_error(&error);
                        connection.close(code::PROTOCOL, b"frames make no sense");
                    }
                });
            }
            datagram = connection.read_datagram() => {
                let Ok(bytes) = datagram else { return };
                match wire::node::decode_datagram(&bytes, clock.now()) {
                    Ok(heartbeat) => service.heartbeat(&from, heartbeat),
                    Err(error) => {
                        protocol_error(&error.into());
                        connection.close(code::PROTOCOL, b"datagrams make no sense");
                        return;
                    }
                }
            }
        }
    }
}

/// One exchange.
async fn answer<S: PeerService>(
    service: Arc<S>,
    from: NodeId,
    clock: Arc<dyn Clock>,
    send: SendStream,
    receive: RecvStream,
) -> Result<(), StreamError> {
    let mut frames = Frames::new(receive, Opening::KINDS);
    let mut events = EventSink { send, clock: clock.clone(), frame: Vec::new(), is_finished: false };
    let Ok(frame) = timeout(MESSAGE_WAIT_MAX, frames.only()).await else { return Ok(()) };
    match Opening::decode(&frame?, clock.now())? {
        Opening::Start(start) => service.start(from, *start, events).await,
        Opening::Request(request) => {
            let response = tokio::select! {
                response = service.call(from, request) => response,
                () = events.gone() => return Ok(()),
            };
            events.frame.clear();
            response.encode(clock.now(), &mut events.frame)?;
            if events.write().await.is_ok() {
                events.finish();
            }
        }
    }
    Ok(())
}

/// The receiver is gone or waits no longer: what is being done for it can stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("nobody waits for the answer any more")]
pub struct Gone;

/// Where the answers to a [`Start`] go. Dropped before [`EventSink::finish`], it tells the receiver that the rest
/// will not come.
pub struct EventSink {
    send: SendStream,
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
            answer.encode(now, &mut self.frame).map_err(|error| {
                tracing::error!(%error, "an answer is too large to send");
                Gone
            })?;
        }
        self.write().await
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
