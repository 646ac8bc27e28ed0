//! The clients' door of a simulated node: new requests and those that other nodes had, in the frames of the client
//! library, over turmoil's TCP. Finds records, has its own kept elsewhere, says what was delivered.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::rc::Rc;
use std::time::Duration;

use coordinator::actor::Coordinator;
use coordinator::forward::{Forwarder, Journey};
use coordinator::journal::idempotency::{RequestIds, same};
use coordinator::journal::records::{Found, Records};
use coordinator::journal::whom_to_ask;
use coordinator::registry::Registry;
use coordinator::route::Place;
use shared::cluster::NodePhase;
use shared::id::RequestId;
use shared::request::{Emitted, Envelope};
use shared::token::TokenEvent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::timeout;
use turmoil::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use turmoil::net::{TcpListener, TcpStream};
use wire::client::{Answer, Ask, Decoder, Have, Piece};
use wire::node::{JournalRecord, Request, Response};

use crate::engine::Planted;
use crate::network::{Streams, call, now};
use crate::oracle::Oracle;
use crate::plan::{Planned, base};

/// Port of the clients.
pub const CLIENTS: u16 = 7002;

/// The longest that usage waits for the disk, and always here.
const FLUSH_AFTER: Duration = Duration::from_millis(50);

/// How long other nodes may take to say whether they have a record.
const FIND_WITHIN: Duration = Duration::from_millis(300);

/// What a node's door needs of it.
pub struct Door {
    /// Its view.
    pub coordinator: Coordinator,
    /// Carries requests.
    pub forwarder: Rc<Forwarder<Streams>>,
    /// The records that it keeps for others.
    pub records: Rc<RefCell<Records>>,
    /// What it does.
    pub phase: Rc<Cell<NodePhase>>,
    /// What clients ask for, by idempotency key.
    pub plan: Rc<BTreeMap<u128, Planned>>,
    /// Gives ids.
    pub ids: RequestIds,
    /// Knows the tenants, where there is one.
    pub registry: Option<Registry>,
    /// Takes what was delivered.
    pub usage: mpsc::UnboundedSender<Usage>,
    /// A mistake built in.
    pub planted: Planted,
    /// Sees everything.
    pub oracle: Oracle,
}

/// What a node delivered of a request, with what the client had before: tokens of each choice.
#[derive(Debug)]
pub struct Usage {
    request: RequestId,
    delivered: Vec<u32>,
}

// === impl Usage ===

impl Usage {
    /// What a record holds was delivered.
    pub fn of(record: &JournalRecord) -> Self {
        let delivered = record.emitted.0.iter().map(|choice| choice.tokens.len() as u32).collect();
        Self { request: record.envelope.id, delivered }
    }
}

/// Writes usage to a disk, which outlives the node, for ever.
pub async fn write_usage(mut usage: mpsc::UnboundedReceiver<Usage>, planted: Planted, oracle: Oracle) {
    while let Some(first) = usage.recv().await {
        tokio::time::sleep(FLUSH_AFTER).await;
        let more = std::iter::from_fn(|| usage.try_recv().ok());
        for Usage { request, delivered } in std::iter::once(first).chain(more) {
            oracle.bill(request, &delivered, planted == Planted::BillsEveryVisit);
        }
    }
}

/// Says at the end of a visit, however it ends, what was delivered.
struct Tap(mpsc::UnboundedSender<Usage>, Usage);

impl Drop for Tap {
    fn drop(&mut self) {
        let Usage { request, delivered } = &mut self.1;
        let usage = Usage { request: *request, delivered: std::mem::take(delivered) };
        // A node that ends writes nothing more.
        let _ = self.0.send(usage);
    }
}

/// A request that goes on or begins, for one client connection.
struct Visit {
    journey: Journey,
    /// What the client has, by choice.
    have: Vec<Have>,
}

/// Serves clients, for ever.
pub async fn serve_clients(door: Rc<Door>) -> std::io::Result<()> {
    let listener = TcpListener::bind((IpAddr::from([0, 0, 0, 0]), CLIENTS)).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        let door = door.clone();
        tokio::task::spawn_local(async move { door.serve_one(stream).await });
    }
}

// === impl Door ===

impl Door {
    async fn serve_one(&self, stream: TcpStream) {
        let (mut read, mut write) = stream.into_split();
        let Some(ask) = next_ask(&mut read).await else { return };
        let gone = async {
            let mut rest = [0; 16];
            while matches!(read.read(&mut rest).await, Ok(n) if n > 0) {}
        };
        let work = async {
            match self.admit(ask).await {
                Ok(visit) => self.answer(visit, &mut write).await,
                Err((status, code)) => {
                    send(&mut write, &Answer::Failed { status, retry_after_ms: 0, json: code.into() }).await;
                }
            }
            let _ = write.shutdown().await;
        };
        tokio::select! {
            biased;
            () = gone => {}
            () = work => {}
        }
    }

    /// Status and code of a refusal.
    async fn admit(&self, ask: Ask) -> Result<Visit, (u16, &'static str)> {
        if self.phase.get() != NodePhase::Serving {
            return Err((503, "draining"));
        }
        match ask {
            Ask::New { idempotency_key, .. } => {
                let planned = self.plan.get(&idempotency_key).ok_or((400, "unknown"))?;
                let id = self.ids.of(&planned.tenant(), &idempotency_key.to_le_bytes());
                let snapshot = self.registry.as_ref().map(Registry::snapshot);
                if snapshot.as_ref().is_some_and(|snapshot| snapshot.tenant(&planned.tenant()).is_none()) {
                    return Err((401, "tenant_unknown"));
                }
                let contract_epoch = snapshot.map_or(1, |snapshot| snapshot.epoch());
                let envelope = Envelope { contract_epoch, ..planned.envelope(id, now()) };
                let have = vec![Have::default(); planned.n as usize];
                let place = Place::anywhere(base());
                let journey = match self.find(id).await.record {
                    Some(record) => {
                        same(&record.envelope, &envelope).map_err(|error| (422, error.code))?;
                        resumed(record)
                    }
                    None => Journey { envelope, place, emitted: Emitted::default(), attempt: 0 },
                };
                Ok(Visit { journey, have })
            }
            Ask::Resume { request, have, .. } => {
                let Found { record, is_one_silent } = self.find(RequestId(request)).await;
                let unknown = if is_one_silent { (503, "record_silent") } else { (404, "unknown") };
                Ok(Visit { journey: resumed(record.ok_or(unknown)?), have })
            }
        }
    }

    /// Takes a request's record from whoever has it.
    async fn find(&self, id: RequestId) -> Found {
        let nodes = whom_to_ask(&self.coordinator.tables().borrow(), id, None);
        let me = self.coordinator.tables().borrow().me().clone();
        let mut asked = tokio::task::JoinSet::new();
        let mut answers = vec![Ok(self.records.borrow_mut().take(now(), id))];
        for node in nodes.into_iter().filter(|node| *node != me) {
            asked.spawn(async move { timeout(FIND_WITHIN, call(&node, Request::JournalTake { id })).await });
        }
        while let Some(answer) = asked.join_next().await {
            answers.push(match answer {
                Ok(Ok(Ok(Response::Journal(record)))) => Ok(record.map(|record| *record)),
                _ => Err(()),
            });
        }
        answers.into_iter().collect()
    }

    async fn answer(&self, visit: Visit, write: &mut OwnedWriteHalf) {
        let Visit { journey, mut have } = visit;
        let id = journey.envelope.id;
        self.oracle.on_entry(id);
        let delivered = have.iter().map(|have| have.next).collect();
        let mut tap = Tap(self.usage.clone(), Usage { request: id, delivered });
        if self.planted == Planted::IgnoresHave {
            have = vec![Have::default(); have.len()];
        }
        if !send(write, &Answer::Accepted { request: id.0, token: Vec::new() }).await {
            return;
        }
        let replay = pieces(&journey.emitted);
        let whole = !journey.emitted.0.is_empty() && journey.emitted.0.iter().all(|choice| choice.finished);
        let (events, mut received) = mpsc::channel(4);
        if whole {
            drop(events);
        } else {
            let forwarder = self.forwarder.clone();
            tokio::task::spawn_local(async move { forwarder.forward_kept(journey, Vec::new(), events).await });
        }
        for event in replay {
            if !self.deliver(&event, &mut have, &mut tap, write).await {
                return;
            }
        }
        let leaving = async {
            while self.phase.get() != NodePhase::Leaving {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::pin!(leaving);
        loop {
            let event = tokio::select! {
                biased;
                event = received.recv() => event,
                () = &mut leaving => return,
            };
            match event {
                Some(TokenEvent::Failed(error)) => {
                    let status = if error.code == "queue_full" { 429 } else { 503 };
                    self.oracle.on_failed(error.code);
                    send(write, &Answer::Failed { status, retry_after_ms: 0, json: error.code.into() }).await;
                    return;
                }
                Some(event) => {
                    if !self.deliver(&event, &mut have, &mut tap, write).await {
                        return;
                    }
                }
                None => break,
            }
        }
        self.oracle.on_done(id);
        send(write, &Answer::Done).await;
    }

    /// Passes on what the client has not. False when it is gone.
    async fn deliver(&self, event: &TokenEvent, have: &mut [Have], tap: &mut Tap, write: &mut OwnedWriteHalf) -> bool {
        let (choice, first, ids, ends) = match event {
            TokenEvent::Token { choice, seq, id, .. } => (*choice, Some(*seq), id.to_le_bytes().to_vec(), false),
            TokenEvent::Finished { choice, .. } => (*choice, None, Vec::new(), true),
            _ => return true,
        };
        let Some(have) = have.get_mut(choice as usize) else { return true };
        let first = first.unwrap_or(have.next);
        if first < have.next || have.ended {
            return true;
        }
        let n_tokens = (ids.len() / 4) as u32;
        (have.next, have.ended) = (first + n_tokens, ends);
        let sent = send(write, &Answer::Piece(Piece { choice, first, n_tokens, opens: false, ends, json: ids })).await;
        if let Some(delivered) = tap.1.delivered.get_mut(choice as usize).filter(|_| sent) {
            *delivered = (*delivered).max(first + n_tokens);
        }
        sent
    }
}

fn resumed(record: JournalRecord) -> Journey {
    let JournalRecord { envelope, attempt, emitted, .. } = record;
    let place = Place::anywhere(envelope.base.clone());
    Journey { envelope, place, emitted, attempt }
}

/// The events that led to a record.
fn pieces(emitted: &Emitted) -> Vec<TokenEvent> {
    let of_choice = |(choice, emitted): (u32, &shared::request::EmittedChoice)| {
        let token = |(seq, id): (u32, &u32)| TokenEvent::Token { choice, seq, id: *id, logprobs: None };
        let mut events: Vec<TokenEvent> = (0..).zip(&emitted.tokens).map(token).collect();
        if emitted.finished {
            let reason = shared::token::FinishReason::Length;
            events.push(TokenEvent::Finished { choice, reason, compute: Duration::ZERO });
        }
        events
    };
    (0..).zip(&emitted.0).flat_map(of_choice).collect()
}

async fn send(write: &mut OwnedWriteHalf, answer: &Answer) -> bool {
    let mut bytes = Vec::new();
    answer.encode(&mut bytes);
    write.write_all(&bytes).await.is_ok()
}

async fn next_ask(read: &mut OwnedReadHalf) -> Option<Ask> {
    let (mut decoder, mut buffer) = (Decoder::default(), Vec::new());
    loop {
        let mut rest = buffer.as_slice();
        let frame = decoder.feed(&mut rest).ok()?;
        let taken = buffer.len() - rest.len();
        buffer.drain(..taken);
        if let Some(frame) = frame {
            return Ask::decode(&frame).ok();
        }
        if read.read_buf(&mut buffer).await.ok()? == 0 {
            return None;
        }
    }
}
