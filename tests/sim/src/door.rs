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
use coordinator::journal::ranges::Delivered;
use coordinator::journal::records::{Records, furthest};
use coordinator::journal::whom_to_ask;
use coordinator::registry::Registry;
use coordinator::route::Place;
use shared::cluster::NodePhase;
use shared::id::RequestId;
use shared::request::{Emitted, Envelope};
use shared::token::TokenEvent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
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

/// Usage that a crash may lose: what was delivered since the last time the disk was reached.
pub const USAGE_EVERY: Duration = Duration::from_millis(50);

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
    /// A mistake built in.
    pub planted: Planted,
    /// Sees everything.
    pub oracle: Oracle,
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
                let journey = match self.find(id).await {
                    Some(record) => {
                        same(&record.envelope, &envelope).map_err(|error| (422, error.code))?;
                        resumed(record)
                    }
                    None => Journey { envelope, place, emitted: Emitted::default(), attempt: 0 },
                };
                Ok(Visit { journey, have })
            }
            Ask::Resume { request, have, .. } => {
                let record = self.find(RequestId(request)).await.ok_or((404, "unknown"))?;
                Ok(Visit { journey: resumed(record), have })
            }
        }
    }

    /// Takes a request's record from whoever has it.
    async fn find(&self, id: RequestId) -> Option<JournalRecord> {
        let nodes = whom_to_ask(&self.coordinator.tables().borrow(), id);
        let me = self.coordinator.tables().borrow().me().clone();
        let mut asked = tokio::task::JoinSet::new();
        let mut found: Vec<JournalRecord> = self.records.borrow_mut().take(now(), id).into_iter().collect();
        for node in nodes.into_iter().filter(|node| *node != me) {
            asked.spawn(async move { timeout(FIND_WITHIN, call(&node, Request::JournalTake { id })).await });
        }
        while let Some(answer) = asked.join_next().await {
            if let Ok(Ok(Ok(Response::Journal(Some(record))))) = answer {
                found.push(*record);
            }
        }
        furthest(found)
    }

    async fn answer(&self, visit: Visit, write: &mut OwnedWriteHalf) {
        let Visit { journey, mut have } = visit;
        let id = journey.envelope.id;
        self.oracle.on_entry(id);
        let n = journey.envelope.generation.n;
        let counts: Vec<u32> = have.iter().map(|have| have.next).collect();
        let mut delivered = Delivered::new(id, n, &counts);
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
            if !self.deliver(&event, &mut have, &mut delivered, write).await {
                return;
            }
        }
        let mut said_at = Instant::now();
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
                () = &mut leaving => return self.say(&mut delivered),
                () = tokio::time::sleep_until(said_at + USAGE_EVERY) => {
                    (said_at, ()) = (Instant::now(), self.say(&mut delivered));
                    continue;
                }
            };
            match event {
                Some(TokenEvent::Failed(error)) => {
                    self.say(&mut delivered);
                    let status = if error.code == "queue_full" { 429 } else { 503 };
                    self.oracle.on_failed(error.code);
                    send(write, &Answer::Failed { status, retry_after_ms: 0, json: error.code.into() }).await;
                    return;
                }
                Some(event) => {
                    if !self.deliver(&event, &mut have, &mut delivered, write).await {
                        return self.say(&mut delivered);
                    }
                }
                None => break,
            }
        }
        self.say(&mut delivered);
        send(write, &Answer::Done).await;
    }

    /// Passes on what the client has not. False when it is gone.
    async fn deliver(
        &self,
        event: &TokenEvent,
        have: &mut [Have],
        delivered: &mut Delivered,
        write: &mut OwnedWriteHalf,
    ) -> bool {
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
        if sent {
            delivered.on_event(event);
        }
        sent
    }

    /// Writes usage where a crash does not reach it.
    fn say(&self, delivered: &mut Delivered) {
        for range in delivered.unsaid() {
            self.oracle.bill(range, self.planted == Planted::BillsEveryVisit);
        }
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
