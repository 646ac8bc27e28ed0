//! A cluster's authority in a temporary folder, nodes that it certified, and a service whose answers are known.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use peer::net::PeerNetConfig;
use peer::{Authority, EndpointParts, EventSink, Identity, PeerNet, PeerService};
use shared::clock::{Clock, SystemClock};
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::error::RequestError;
use shared::id::{NodeId, RequestId, Route};
use shared::request::{Emitted, Envelope, Generation};
use shared::tenant::Tier;
use shared::token::{FinishReason, TokenEvent};
use wire::node::{Answer, Hello, Request, Response, Start};

/// A folder that goes away with the test.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("tenantry-peer-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("temporary directory");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn node(name: &str) -> NodeId {
    name.parse().expect("a name")
}

/// The authority in `folder/ca`.
pub(crate) fn authority(folder: &Path) -> Authority {
    Authority::found(&folder.join("ca"), &[], SystemClock.wall()).expect("an authority")
}

/// Lets a node in; its data lies in `folder/NAME` afterwards.
pub(crate) fn join(folder: &Path, name: &str) -> Identity {
    let data = folder.join(name);
    authority(folder).admit_here(&node(name), &data, SystemClock.wall()).expect("let in");
    Identity::load(node(name), &data).expect("an identity")
}

pub(crate) fn hello(name: &str) -> Hello {
    Hello::new("test".into(), node(name), 1, Vec::new())
}

pub(crate) fn config(name: &str, peers: &[(&str, SocketAddr)], clock: Arc<dyn Clock>) -> PeerNetConfig {
    let peers: BTreeMap<NodeId, SocketAddr> = peers.iter().map(|(name, address)| (node(name), *address)).collect();
    PeerNetConfig { hello: hello(name), peers, clock, authority: None }
}

pub(crate) fn loopback() -> EndpointParts {
    EndpointParts::bind(([127, 0, 0, 1], 0).into()).expect("a free port")
}

/// A node on loopback that serves; it knows `peers`.
pub(crate) fn serving(identity: &Identity, peers: &[(&str, SocketAddr)], parts: EndpointParts) -> (PeerNet, Arc<Echo>) {
    serving_with(identity, peers, parts, None)
}

/// As [`serving`], where nodes may join if there is an authority.
pub(crate) fn serving_with(
    identity: &Identity,
    peers: &[(&str, SocketAddr)],
    parts: EndpointParts,
    authority: Option<Authority>,
) -> (PeerNet, Arc<Echo>) {
    serving_at(identity, peers, parts, authority, Arc::new(SystemClock))
}

/// As [`serving_with`], by another clock.
pub(crate) fn serving_at(
    identity: &Identity,
    peers: &[(&str, SocketAddr)],
    parts: EndpointParts,
    authority: Option<Authority>,
    clock: Arc<dyn Clock>,
) -> (PeerNet, Arc<Echo>) {
    let config = PeerNetConfig { authority, ..config(identity.node.as_str(), peers, clock) };
    let net = PeerNet::new(identity, config, parts).expect("an endpoint");
    let echo = Arc::new(Echo::default());
    tokio::spawn(peer::serve(net.clone(), echo.clone()));
    (net, echo)
}

/// Answers with what it was asked, and counts.
#[derive(Default)]
pub(crate) struct Echo {
    pub(crate) started: AtomicUsize,
    pub(crate) cancelled: AtomicUsize,
    /// Tokens handed to the network.
    pub(crate) sent: AtomicU64,
    pub(crate) beats: AtomicU64,
    pub(crate) hellos: AtomicUsize,
    /// Pause before each token.
    pub(crate) pause: Option<Duration>,
}

/// Token `seq` of every answer.
pub(crate) fn token(seq: u32) -> u32 {
    seq.wrapping_mul(2_654_435_761) >> 8
}

impl PeerService for Echo {
    async fn call(&self, _: NodeId, request: Request) -> Response {
        match request {
            Request::Raft { bytes, .. } => Response::Raft { bytes: bytes.into_iter().rev().collect() },
            Request::Admin { .. } => std::future::pending().await,
            Request::DrainNotice { .. } => Response::Done,
            _ => Response::Refused(RequestError::internal()),
        }
    }

    async fn start(&self, _: NodeId, start: Start, mut events: EventSink) {
        self.started.fetch_add(1, Ordering::SeqCst);
        let attempt = start.attempt;
        let n_tokens = start.envelope.generation.max_tokens;
        for seq in start.emitted.tokens(0).len() as u32..n_tokens {
            if let Some(pause) = self.pause {
                tokio::time::sleep(pause).await;
            }
            let event = TokenEvent::Token { choice: 0, seq, id: token(seq), logprobs: None };
            if events.send(&[Answer::Event { attempt, event }]).await.is_err() {
                self.cancelled.fetch_add(1, Ordering::SeqCst);
                return;
            }
            self.sent.fetch_add(1, Ordering::SeqCst);
        }
        let event = TokenEvent::Finished { choice: 0, reason: FinishReason::Length, compute: Duration::ZERO };
        if events.send(&[Answer::Event { attempt, event }]).await.is_ok() {
            events.finish();
        }
    }

    fn heartbeat(&self, _: &NodeId, heartbeat: Heartbeat) {
        self.beats.fetch_max(heartbeat.seq, Ordering::SeqCst);
    }

    fn hello(&self, _: &NodeId, _: &Hello) {
        self.hellos.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) fn heartbeat(seq: u64) -> Heartbeat {
    let load = NodeLoad::default();
    Heartbeat { incarnation: 1, seq, uptime_ms: 0, epoch: 1, phase: NodePhase::Serving, load }
}

/// Asks for `max_tokens` tokens, of which `emitted` are there already.
pub(crate) fn start(clock: &dyn Clock, max_tokens: u32, attempt: u32, emitted: Emitted) -> Start {
    let now = clock.now();
    let generation = Generation::new([1, 2, 3], max_tokens);
    let envelope = Envelope {
        id: RequestId(7),
        route: Route { tenant: "acme".parse().expect("a name"), task: None },
        tier: Tier::Shared,
        weight: 1,
        concurrency: 8,
        queue_depth: 8,
        base: "base".parse().expect("a name"),
        pin: Default::default(),
        adapter: None,
        fell_back: false,
        cache_secret: [7; 32],
        generation: Arc::new(generation),
        contract_epoch: 1,
        admitted_at: now,
        deadline: now + Duration::from_secs(60),
    };
    Start { envelope, attempt, epoch: 1, emitted }
}

/// The token of an answer, `None` for the end.
pub(crate) fn token_of(answer: &Answer, seq: u32) -> Option<u32> {
    match answer {
        Answer::Event { event: TokenEvent::Token { seq: found, id, .. }, .. } => {
            assert_eq!(*found, seq, "in order, without gaps");
            Some(*id)
        }
        Answer::Event { event: TokenEvent::Finished { .. }, .. } => None,
        other => panic!("{other:?}"),
    }
}

/// Waits until `holds`, at most five seconds.
pub(crate) async fn until(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("{what} did not come true within 5 s");
}
