//! How simulated nodes reach each other: one TCP stream per run or call that carries the real frames, heartbeats as
//! datagrams that carry the real frame, too. What peers do over QUIC, without TLS and retransmission.
//!
//! Every run but a request's first begins with a frame that its predecessor left behind, with a wrong token in it: it
//! must be dropped by its attempt.

use std::cell::RefCell;
use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use coordinator::actor::{Coordinator, Heart};
use coordinator::forward::{Carrier, Lost, Run};
use coordinator::journal::records::Records;
use coordinator::registry::Registry;
use coordinator::route::{Arrival, Place};
use shared::cluster::Heartbeat;
use shared::error::{ErrorKind, RequestError};
use shared::id::NodeId;
use shared::token::TokenEvent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use turmoil::net::{TcpListener, TcpStream, UdpSocket};
use wire::node::{Answer, Message, Opening, Request, Response, Start, decode_datagram, encode_datagram};
use wire::{Decoder, Frame};

use crate::engine::{Engine, Planted};
use crate::oracle::Oracle;
use crate::random::Random;

/// Port of the streams.
const WORK: u16 = 7000;
/// Port of the heartbeats.
const BEATS: u16 = 7001;

/// Heartbeats on their way out; a node has few peers.
const BEATS_WAITING_MAX: usize = 64;

/// A call is answered within this or not at all.
const CALL_WITHIN: Duration = Duration::from_secs(1);

/// The present of the host this is called on.
pub fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

/// Sends heartbeats through a task, since a heart never waits.
#[derive(Debug)]
pub struct Datagrams(mpsc::Sender<(NodeId, Heartbeat)>);

impl Heart for Datagrams {
    fn beat(&self, to: &NodeId, beat: Heartbeat) {
        let _ = self.0.try_send((to.clone(), beat));
    }
}

/// Heartbeats out; [`receive_beats`] takes them in on the same socket.
pub async fn datagrams() -> std::io::Result<(Datagrams, Arc<UdpSocket>)> {
    let socket = Arc::new(UdpSocket::bind((IpAddr::from([0, 0, 0, 0]), BEATS)).await?);
    let (sender, mut waiting) = mpsc::channel::<(NodeId, Heartbeat)>(BEATS_WAITING_MAX);
    let out = socket.clone();
    tokio::task::spawn_local(async move {
        while let Some((to, beat)) = waiting.recv().await {
            let _ = out.send_to(&encode_datagram(&beat, now()), (to.as_str(), BEATS)).await;
        }
    });
    Ok((Datagrams(sender), socket))
}

/// Tells the coordinator what is heard, for ever; of a thousand datagrams so many are lost.
pub async fn receive_beats(socket: Arc<UdpSocket>, coordinator: Coordinator, lost_of_1000: u64, mut random: Random) {
    let mut buffer = [0; 1500];
    while let Ok((n, from)) = socket.recv_from(&mut buffer).await {
        if random.within(0, 1000) < lost_of_1000 {
            continue;
        }
        let name = turmoil::reverse_lookup(from.ip()).and_then(|name| name.parse().ok());
        if let (Some(from), Ok(beat)) = (name, decode_datagram(&buffer[..n], now())) {
            coordinator.heard(&from, beat);
        }
    }
}

/// Runs on any node: here in the engine, elsewhere over a stream.
pub struct Streams {
    /// This node.
    pub me: NodeId,
    /// Sends what is for this node's own engine to the task that holds it.
    pub local: mpsc::Sender<(Start, mpsc::Sender<Answer>)>,
    /// Hears of every start.
    pub oracle: Oracle,
    /// A mistake built in.
    pub planted: Planted,
}

impl Carrier for Streams {
    type Run = Received;

    async fn start(&self, node: &NodeId, start: Start) -> Result<Received, Lost> {
        self.oracle.on_start(start.envelope.id, start.attempt, &self.me, node);
        let stale = stale(&start, self.planted);
        if *node == self.me {
            let (answers, received) = mpsc::channel(8);
            self.local.send((start, answers)).await.map_err(|_| Lost("the engine is gone".into()))?;
            return Ok(Received { stale, source: Source::Local(received) });
        }
        let tcp = open(node, &start).await?;
        let decoder = Decoder::new(Answer::KINDS);
        let stream = Stream { tcp, decoder, buffer: Vec::new() };
        Ok(Received { stale, source: Source::Remote(Box::new(stream)) })
    }

    async fn keep(&self, node: &NodeId, request: Request) -> Result<Response, Lost> {
        let answer = tokio::time::timeout(CALL_WITHIN, call(node, request)).await;
        answer.unwrap_or_else(|_| Err(Lost("no answer".to_owned())))
    }
}

/// What a run that is over left behind: the next token, wrong. With the planted mistake it claims to be of this run.
fn stale(start: &Start, planted: Planted) -> Option<Answer> {
    let attempt = match planted {
        Planted::AcceptsOldAttempts => start.attempt,
        _ => start.attempt - 1,
    };
    let seq = u32::try_from(start.emitted.tokens(0).len()).unwrap_or(u32::MAX);
    let event = TokenEvent::Token { choice: 0, seq, id: u32::MAX, logprobs: None };
    (start.attempt > 1 && !start.emitted.is_finished(0)).then_some(Answer::Event { attempt, event })
}

async fn open(node: &NodeId, first: &impl Message) -> Result<TcpStream, Lost> {
    let lost = |error: std::io::Error| Lost(error.to_string());
    let mut tcp = TcpStream::connect((node.as_str(), WORK)).await.map_err(lost)?;
    let mut bytes = Vec::new();
    first.encode(now(), &mut bytes).map_err(|error| Lost(error.to_string()))?;
    tcp.write_all(&bytes).await.map_err(lost)?;
    Ok(tcp)
}

/// Asks another node and waits for its answer.
///
/// # Errors
/// When the node is not there or says nothing that makes sense.
pub async fn call(node: &NodeId, request: Request) -> Result<Response, Lost> {
    let mut tcp = open(node, &request).await?;
    let frame = next_frame(&mut tcp, &mut Decoder::new(Response::KINDS), &mut Vec::new()).await?;
    let frame = frame.ok_or_else(|| Lost("no answer".to_owned()))?;
    Response::decode(&frame, now()).map_err(|error| Lost(error.to_string()))
}

/// Answers of one run.
pub struct Received {
    stale: Option<Answer>,
    source: Source,
}

enum Source {
    /// From the own engine.
    Local(mpsc::Receiver<Answer>),
    /// From a peer.
    Remote(Box<Stream>),
}

/// A stream of frames from a peer; closed by dropping.
pub struct Stream {
    tcp: TcpStream,
    decoder: Decoder,
    /// Bytes read and not yet cut.
    buffer: Vec<u8>,
}

impl Run for Received {
    async fn recv(&mut self) -> Result<Option<Answer>, Lost> {
        if let Some(stale) = self.stale.take() {
            return Ok(Some(stale));
        }
        match &mut self.source {
            Source::Local(answers) => Ok(answers.recv().await),
            Source::Remote(stream) => {
                let Stream { tcp, decoder, buffer } = &mut **stream;
                let frame = next_frame(tcp, decoder, buffer).await?;
                let answer = frame.map(|frame| Answer::decode(&frame, now())).transpose();
                answer.map_err(|error| Lost(error.to_string()))
            }
        }
    }
}

/// The next whole frame; what was read stays in `buffer` when the future is dropped.
async fn next_frame(
    stream: &mut TcpStream,
    decoder: &mut Decoder,
    buffer: &mut Vec<u8>,
) -> Result<Option<Frame>, Lost> {
    loop {
        let mut rest = buffer.as_slice();
        let frame = decoder.feed(&mut rest).map_err(|error| Lost(error.to_string()))?;
        let taken = buffer.len() - rest.len();
        buffer.drain(..taken);
        if frame.is_some() {
            return Ok(frame);
        }
        match stream.read_buf(buffer).await {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) => return Err(Lost(error.to_string())),
        }
    }
}

/// A node's side of what others ask of it.
pub struct Peers {
    /// Its view.
    pub coordinator: Coordinator,
    /// Its engine.
    pub engine: Engine,
    /// The records that it keeps for others.
    pub records: Rc<RefCell<Records>>,
    /// Its copy of the registry, where there is one.
    pub registry: Option<Registry>,
    /// A mistake built in.
    pub planted: Planted,
}

/// Serves the streams of other nodes, for ever.
pub async fn serve(peers: Peers) -> std::io::Result<()> {
    let listener = TcpListener::bind((IpAddr::from([0, 0, 0, 0]), WORK)).await?;
    let peers = Rc::new(peers);
    loop {
        let (stream, from) = listener.accept().await?;
        let peers = peers.clone();
        let from = turmoil::reverse_lookup(from.ip()).and_then(|name| name.parse().ok());
        if let Some(from) = from {
            tokio::task::spawn_local(async move { peers.serve_one(stream, from).await });
        }
    }
}

impl Peers {
    async fn serve_one(&self, mut stream: TcpStream, from: NodeId) {
        let (mut decoder, mut buffer) = (Decoder::new(Opening::KINDS), Vec::new());
        let Ok(Some(frame)) = next_frame(&mut stream, &mut decoder, &mut buffer).await else { return };
        match Opening::decode(&frame, now()) {
            Ok(Opening::Start(start)) => self.run(stream, *start).await,
            Ok(Opening::Request(request)) => {
                let mut bytes = Vec::new();
                if self.on_request(&from, request).await.encode(now(), &mut bytes).is_ok() {
                    let _ = stream.write_all(&bytes).await;
                    let _ = stream.shutdown().await;
                }
            }
            // Certificates are none here.
            Ok(Opening::Renew) | Err(_) => {}
        }
    }

    async fn on_request(&self, from: &NodeId, request: Request) -> Response {
        match (request, &self.registry) {
            (Request::Raft { bytes, .. }, Some(registry)) => {
                Response::Raft { bytes: registry.on_raft(from, &bytes).await }
            }
            (Request::Admin { bytes }, Some(registry)) => {
                Response::Admin { bytes: registry.on_forwarded(&bytes).await }
            }
            (request, _) => self.on_record(from, request),
        }
    }

    fn on_record(&self, from: &NodeId, request: Request) -> Response {
        let mut records = self.records.borrow_mut();
        let done = |outcome: Result<(), RequestError>| match outcome {
            Ok(()) => Response::Done,
            Err(error) => Response::Refused(error),
        };
        match request {
            Request::JournalOpen(_) | Request::JournalPut(_) if self.planted == Planted::KeepsNothing => Response::Done,
            Request::JournalOpen(record) => done(records.open(now(), from, *record)),
            Request::JournalPut(deltas) => done(deltas.iter().try_for_each(|delta| records.put(now(), from, delta))),
            Request::JournalTake { id } => Response::Journal(records.take(now(), id).map(Box::new)),
            _ => Response::Refused(RequestError::new(ErrorKind::Invalid, "not_simulated", "not simulated")),
        }
    }

    async fn run(&self, stream: TcpStream, start: Start) {
        let (answers, mut received) = mpsc::channel::<Answer>(8);
        let (mut read, mut write) = stream.into_split();
        let send = async {
            while let Some(answer) = received.recv().await {
                let mut bytes = Vec::new();
                if answer.encode(now(), &mut bytes).is_err() || write.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            let _ = write.shutdown().await;
        };
        // Nothing more is said by the entry node: an end of its stream is a cancellation.
        let cancelled = async {
            let mut rest = [0; 16];
            while matches!(read.read(&mut rest).await, Ok(n) if n > 0) {}
        };
        let work = answer(start, &self.coordinator, &self.engine, answers);
        tokio::select! {
            biased;
            () = cancelled => {}
            ((), ()) = async { tokio::join!(work, send) } => {}
        }
    }
}

/// Answers a start by the table and the engine of this node.
pub async fn answer(start: Start, coordinator: &Coordinator, engine: &Engine, answers: mpsc::Sender<Answer>) {
    let Start { envelope, attempt, epoch, emitted } = start;
    let place = Place::anywhere(envelope.base.clone());
    let arrival = coordinator.tables().borrow().on_arrival(&place, &envelope.route.tenant, epoch);
    let refusal = match arrival {
        Arrival::Serve => match engine.run(envelope, emitted) {
            Ok(mut events) => {
                // Told at once when the other side goes, so that the engine hears of it.
                while let Some(event) =
                    tokio::select! { biased; event = events.recv() => event, () = answers.closed() => None }
                {
                    if answers.send(Answer::Event { attempt, event }).await.is_err() {
                        return;
                    }
                }
                return;
            }
            Err(error) => Answer::Refused(error),
        },
        Arrival::Moved { epoch, to } => Answer::Moved { epoch, to: vec![to] },
        Arrival::Refuse => Answer::Refused(RequestError::new(ErrorKind::Unavailable, "draining", "the node drains")),
    };
    let _ = answers.send(refusal).await;
}
