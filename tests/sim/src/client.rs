//! A client on a host of its own: asks a node, checks every token, and goes on at another node when the first one
//! fails, with what it has. What the client library does over QUIC, in the same frames.

use std::time::Duration;

use shared::id::RequestId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};
use turmoil::net::TcpStream;
use wire::client::{Answer, Ask, Decoder, Endpoint, Have, Piece};

use crate::door::CLIENTS;
use crate::engine::token;
use crate::oracle::{Oracle, Outcome};
use crate::plan::{Planned, WARM_UP_MS, name};

/// A node that says nothing for so long is left: a connection over QUIC is lost by then.
const SILENCE: Duration = Duration::from_millis(1500);
/// A client comes back for so long.
const COMES_BACK_FOR: Duration = Duration::from_secs(25);

/// How a visit to one node ended.
enum Visit {
    /// The answer is whole.
    Done,
    /// The node is gone, silent, or sends the client on.
    Left,
    /// The node does not know the request.
    Unknown,
    /// The node says no.
    Refused(String),
}

/// One client and what it has.
pub struct Client {
    planned: Planned,
    n_nodes: usize,
    /// A node that was heard for so long after it accepted a request has the record kept elsewhere.
    kept_within: Duration,
    oracle: Oracle,
    have: Vec<Have>,
    accepted: Option<(RequestId, Instant)>,
    /// When a node last said something.
    heard_at: Instant,
    last_token: Option<Instant>,
}

// === impl Client ===

impl Client {
    /// A client with one request.
    pub fn new(planned: Planned, n_nodes: usize, kept_within: Duration, oracle: Oracle) -> Self {
        let have = vec![Have::default(); planned.n as usize];
        Self { planned, n_nodes, kept_within, oracle, have, accepted: None, heard_at: Instant::now(), last_token: None }
    }

    /// Waits for its time, asks, and tells the oracle how it went.
    pub async fn live(mut self) {
        tokio::time::sleep(Duration::from_millis(self.planned.at_ms.max(WARM_UP_MS))).await;
        let (key, begin) = (self.planned.key, Instant::now());
        for visit in 0.. {
            let node = (self.planned.entry + visit) % self.n_nodes;
            if visit > 0 {
                self.oracle.on_moved();
            }
            let outcome = match self.visit(node).await {
                Visit::Done => Some(Outcome::Complete { at: node }),
                Visit::Refused(code) => Some(Outcome::Refused(code)),
                Visit::Unknown => {
                    let heard_at = self.heard_at;
                    let lost = self.accepted.take().is_some_and(|(_, at)| heard_at > at + self.kept_within);
                    self.oracle.on_unknown(key, lost);
                    None
                }
                Visit::Left => None,
            };
            let gave_up = (begin.elapsed() > COMES_BACK_FOR).then(|| Outcome::Refused("gave_up".to_owned()));
            if let Some(outcome) = outcome.or(gave_up) {
                let received = self.have.iter().map(|have| u64::from(have.next)).sum();
                return self.oracle.on_outcome(key, outcome, received);
            }
            let rounds = u32::try_from((visit + 1) / self.n_nodes).unwrap_or(u32::MAX);
            tokio::time::sleep(Duration::from_millis(50) * rounds.min(20)).await;
        }
    }

    async fn visit(&mut self, node: usize) -> Visit {
        let address = turmoil::lookup(name(node).as_str());
        let Ok(Ok(mut stream)) = timeout(SILENCE, TcpStream::connect((address, CLIENTS))).await else {
            return Visit::Left;
        };
        let resumes = self.accepted.is_some();
        let mut bytes = Vec::new();
        self.ask().encode(&mut bytes);
        if stream.write_all(&bytes).await.is_err() {
            return Visit::Left;
        }
        let (mut decoder, mut buffer) = (Decoder::default(), Vec::new());
        let mut first = true;
        loop {
            let Ok(Some(answer)) = timeout(SILENCE, next_answer(&mut stream, &mut decoder, &mut buffer)).await else {
                return Visit::Left;
            };
            if !matches!(answer, Answer::Failed { .. }) {
                self.heard_at = Instant::now();
            }
            if let Some((_, at)) = &mut self.accepted
                && self.oracle.is_cut_off(&name(node))
            {
                // It can keep nothing elsewhere.
                *at = Instant::now();
            }
            match answer {
                Answer::Accepted { request, .. } => {
                    self.accepted.get_or_insert((RequestId(request), Instant::now()));
                    self.oracle.on_accepted(self.planned.key, RequestId(request));
                }
                Answer::Piece(piece) => {
                    self.on_piece(&piece, resumes, node, std::mem::take(&mut first));
                }
                Answer::Done => {
                    self.check_whole();
                    return Visit::Done;
                }
                Answer::Failed { status: 404, .. } => return Visit::Unknown,
                Answer::Failed { status: 503, .. } => return Visit::Left,
                Answer::Failed { json, .. } => return Visit::Refused(String::from_utf8_lossy(&json).into_owned()),
                Answer::Welcome { .. } | Answer::Extra { .. } => {}
            }
        }
    }

    fn ask(&self) -> Ask {
        match &self.accepted {
            None => {
                let (idempotency_key, endpoint) = (self.planned.key, Endpoint::Completions);
                Ask::New { idempotency_key, endpoint, body: Vec::new() }
            }
            Some((request, _)) => Ask::Resume { request: request.0, token: Vec::new(), have: self.have.clone() },
        }
    }

    fn on_piece(&mut self, piece: &Piece, resumes: bool, node: usize, first_here: bool) {
        let (key, choice) = (self.planned.key, piece.choice);
        let Some(have) = self.have.get_mut(choice as usize) else {
            return self.oracle.violation(format!("I2: {key} got choice {choice}"));
        };
        let (was, end) = (*have, piece.first + piece.n_tokens);
        // A node that was not told what is here begins anew.
        let repeats = end <= was.next && (piece.n_tokens > 0 || was.ended);
        if repeats && !resumes {
            return;
        }
        if piece.first != was.next || was.ended {
            self.oracle.violation(format!("I2: {key} got {} of choice {choice}, has {was:?}", piece.first));
            return;
        }
        (have.next, have.ended) = (end, piece.ends);
        let ids = piece.json.chunks_exact(4).map(|id| u32::from_le_bytes(id.try_into().expect("four bytes")));
        for (position, id) in (piece.first..).zip(ids) {
            if id != token(&self.planned.prompt, &self.planned.adapter().hash, choice, position) {
                self.oracle.violation(format!("I1: {key} got a wrong token at {position} of choice {choice}"));
            }
        }
        if piece.n_tokens > 0
            && let Some(last) = self.last_token.replace(Instant::now())
        {
            self.oracle.on_gap(&name(node), first_here, last.elapsed());
        }
    }

    fn check_whole(&self) {
        if self.have.iter().any(|have| !have.ended || have.next != self.planned.max_tokens) {
            let key = self.planned.key;
            self.oracle.violation(format!("I1: {key} ended with {:?} of {}", self.have, self.planned.max_tokens));
        }
    }
}

/// The next whole answer; `None` when the node said its last.
async fn next_answer(stream: &mut TcpStream, decoder: &mut Decoder, buffer: &mut Vec<u8>) -> Option<Answer> {
    loop {
        let mut rest = buffer.as_slice();
        let frame = decoder.feed(&mut rest).ok()?;
        let taken = buffer.len() - rest.len();
        buffer.drain(..taken);
        if let Some(frame) = frame {
            return Answer::decode(&frame).ok();
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
}

/// Runs all clients, for ever.
pub async fn clients(plan: Vec<Planned>, n_nodes: usize, kept_within: Duration, oracle: Oracle) -> turmoil::Result {
    for planned in plan {
        tokio::task::spawn_local(Client::new(planned, n_nodes, kept_within, oracle.clone()).live());
    }
    std::future::pending().await
}
