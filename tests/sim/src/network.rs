//! How simulated nodes reach each other: one TCP stream per run that carries the real frames, heartbeats as datagrams
//! that carry the real frame, too. What peers do over QUIC, without TLS and retransmission.

use std::net::IpAddr;
use std::rc::Rc;
use std::sync::Arc;

use coordinator::actor::{Coordinator, Heart};
use coordinator::forward::{Carrier, Lost, Run};
use coordinator::route::{Arrival, Place};
use shared::cluster::Heartbeat;
use shared::error::{ErrorKind, RequestError};
use shared::id::NodeId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use turmoil::net::{TcpListener, TcpStream, UdpSocket};
use wire::node::{Answer, Message, Start, decode_datagram, encode_datagram};
use wire::{Decoder, Frame};

use crate::engine::Engine;
use crate::oracle::Oracle;

/// Port of the streams.
const WORK: u16 = 7000;
/// Port of the heartbeats.
const BEATS: u16 = 7001;

/// Heartbeats on their way out; a node has few peers.
const BEATS_WAITING_MAX: usize = 64;

fn now() -> std::time::Instant {
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

/// Tells the coordinator what is heard, for ever.
pub async fn receive_beats(socket: Arc<UdpSocket>, coordinator: Coordinator) {
    let mut buffer = [0; 1500];
    while let Ok((n, from)) = socket.recv_from(&mut buffer).await {
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
}

impl Carrier for Streams {
    type Run = Received;

    async fn start(&self, node: &NodeId, start: Start) -> Result<Received, Lost> {
        self.oracle.on_start(start.envelope.id, start.attempt, node);
        if *node == self.me {
            let (answers, received) = mpsc::channel(8);
            self.local.send((start, answers)).await.map_err(|_| Lost("the engine is gone".into()))?;
            return Ok(Received::Local(received));
        }
        let lost = |error: std::io::Error| Lost(error.to_string());
        let mut tcp = TcpStream::connect((node.as_str(), WORK)).await.map_err(lost)?;
        let mut bytes = Vec::new();
        start.encode(now(), &mut bytes).map_err(|error| Lost(error.to_string()))?;
        tcp.write_all(&bytes).await.map_err(lost)?;
        let decoder = Decoder::new(Answer::KINDS);
        Ok(Received::Remote(Box::new(Stream { tcp, decoder, buffer: Vec::new() })))
    }
}

/// Answers of one run.
pub enum Received {
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
        match self {
            Self::Local(answers) => Ok(answers.recv().await),
            Self::Remote(stream) => {
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

/// Serves the streams of other nodes, for ever.
pub async fn serve(coordinator: Coordinator, engine: Engine) -> std::io::Result<()> {
    let listener = TcpListener::bind((IpAddr::from([0, 0, 0, 0]), WORK)).await?;
    let door = Rc::new((coordinator, engine));
    loop {
        let (stream, _) = listener.accept().await?;
        let door = door.clone();
        tokio::task::spawn_local(async move { serve_one(stream, &door.0, &door.1).await });
    }
}

async fn serve_one(mut stream: TcpStream, coordinator: &Coordinator, engine: &Engine) {
    let (mut decoder, mut buffer) = (Decoder::new(Start::KINDS), Vec::new());
    let Ok(Some(frame)) = next_frame(&mut stream, &mut decoder, &mut buffer).await else { return };
    let Ok(start) = Start::decode(&frame, now()) else { return };
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
    let work = answer(start, coordinator, engine, answers);
    tokio::select! {
        () = cancelled => {}
        ((), ()) = async { tokio::join!(work, send) } => {}
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
                while let Some(event) = tokio::select! { event = events.recv() => event, () = answers.closed() => None }
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
