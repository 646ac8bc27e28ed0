//! Carries one admitted request to the nodes that run it and its tokens back: the shell around [`crate::failover`].
//!
//! ```text
//! gateway ── Envelope ──► Forwarder::forward ── Start ──► Carrier (this node's engine, or a peer's stream)
//!         ◄─ TokenEvent ── accepted, in order, once ◄─ Answer ──┘
//! ```
//! At most two runs are open at a time. Nothing is buffered between them and the client's bounded channel: a slow
//! client stops the reading, and that stops the run. When the receiver of the channel is dropped every run is, which
//! cancels it. The record of delivered tokens is all that grows; [`Forwarder::forward_kept`] has a copy of it kept at
//! another node, from which the request can go on when this one dies.

use std::ops::ControlFlow;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shared::clock::Clock;
use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::NodeId;
use shared::request::{BasePin, Emitted, Envelope, Grammar};
use shared::token::TokenEvent;
use tokio::sync::mpsc;
use wire::node::{Answer, JournalRecord, Request, Response, Start};

use crate::failover::budget::RetryBudget;
use crate::failover::quarantine::{Quarantine, lives};
use crate::failover::{Around, Attempt, Command, End, Failover, Verdict};
use crate::journal::records::understood;
use crate::journal::trail::{Kept, Put, Trail};
use crate::route::{Place, SERVE_HERE, no_node};
use crate::tables::Tables;

/// How long after its deadline a request is ended by the entry node, should its owner not have said so.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// How long the end of a request may wait to be written into its record.
const LAST_WORD_WITHIN: Duration = Duration::from_secs(1);

/// A run or its node cannot be reached any more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the run is lost: {0}")]
pub struct Lost(pub String);

/// Where runs happen: the engine of this node and the peers' doors.
pub trait Carrier: Send + Sync + 'static {
    /// An open run; dropping it cancels the run.
    type Run: Run;

    /// Opens a run on a node, which may be this one.
    ///
    /// # Errors
    /// When the node cannot be reached.
    fn start(&self, node: &NodeId, start: Start) -> impl Future<Output = Result<Self::Run, Lost>> + Send;

    /// Sends a [`Request::JournalOpen`] or [`Request::JournalPut`] to another node and waits for its answer, for at
    /// most a second.
    ///
    /// # Errors
    /// When there is no answer.
    fn keep(&self, node: &NodeId, request: Request) -> impl Future<Output = Result<Response, Lost>> + Send {
        let _ = (node, request);
        async { Err(Lost("records are not kept".to_owned())) }
    }
}

/// What comes back from a run.
pub trait Run: Send + 'static {
    /// The next answer; `None` when nothing follows. Dropping the future loses nothing.
    ///
    /// # Errors
    /// When the run is lost.
    fn recv(&mut self) -> impl Future<Output = Result<Option<Answer>, Lost>> + Send;
}

/// A request that begins, or one whose client came back after its entry node died.
#[derive(Debug)]
pub struct Journey {
    /// What to do.
    pub envelope: Envelope,
    /// Where it may run.
    pub place: Place,
    /// What its client has.
    pub emitted: Emitted,
    /// Attempts that are over.
    pub attempt: Attempt,
}

/// Carries the requests of an entry node.
pub struct Forwarder<C> {
    carrier: Arc<C>,
    tables: Tables,
    budget: Mutex<RetryBudget>,
    quarantine: Mutex<Quarantine>,
    clock: Arc<dyn Clock>,
}

// === impl Forwarder ===

impl<C: Carrier> Forwarder<C> {
    /// A forwarder that routes by `tables`.
    pub fn new(carrier: Arc<C>, tables: Tables, clock: Arc<dyn Clock>) -> Self {
        let budget = Mutex::new(RetryBudget::new(clock.now()));
        Self { carrier, tables, budget, quarantine: Mutex::default(), clock }
    }

    /// Carries a request to its end. `events` gets what [`shared::token`] promises, whatever happens to nodes.
    pub async fn forward(&self, journey: Journey, events: mpsc::Sender<TokenEvent>) {
        self.carry(journey, None, events).await;
    }

    /// As [`Self::forward`], with a record at another node, from which the request can go on when this one dies.
    /// `answer` says how its client is answered, in the gateway's own words. None is kept where the journey's region has
    /// no other node that lives.
    pub async fn forward_kept(&self, journey: Journey, answer: Vec<u8>, events: mpsc::Sender<TokenEvent>) {
        let numerics = journey.envelope.pin.numerics.clone();
        let trail = Trail::new(journey.envelope.id, journey.place.region.clone());
        let journal = Journal { trail, answer, numerics, putting: None };
        self.carry(journey, Some(journal), events).await;
    }

    async fn carry(&self, journey: Journey, journal: Option<Journal>, events: mpsc::Sender<TokenEvent>) {
        let Journey { envelope, place, emitted, attempt } = journey;
        let mark = match self.mark(&envelope) {
            Ok(mark) => mark,
            Err(error) => return drop(events.send(TokenEvent::Failed(error)).await),
        };
        let tenant = envelope.route.tenant.clone();
        let failover = if attempt == 0 {
            lock(&self.budget).deposit();
            Failover::new(place, tenant, envelope.generation.n, mark)
        } else {
            Failover::resumed(place, tenant, emitted, attempt, envelope.fell_back, mark)
        };
        let failover = failover.pinned(envelope.pin.clone());
        let tables = self.tables.clone();
        let ride = Ride {
            forwarder: self,
            fell_back: envelope.fell_back,
            envelope,
            failover,
            tables,
            legs: [None, None],
            journal,
            attempt,
            events,
        };
        ride.run().await;
    }

    /// What the quarantine knows of a request; computes no fingerprint while it is empty.
    fn mark(&self, envelope: &Envelope) -> Result<crate::failover::quarantine::Mark, RequestError> {
        let mut quarantine = lock(&self.quarantine);
        if quarantine.is_empty() {
            return Ok(Default::default());
        }
        let table = self.tables.borrow();
        quarantine.admit(self.clock.now(), &fingerprint(envelope), |life| lives(&table, life))
    }
}

impl<C> std::fmt::Debug for Forwarder<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Forwarder").field("budget", &self.budget).finish_non_exhaustive()
    }
}

type Starting<R> = Pin<Box<dyn Future<Output = Result<R, Lost>> + Send>>;

/// A run, open or opening.
struct Leg<R> {
    attempt: Attempt,
    node: NodeId,
    starting: Option<Starting<R>>,
    run: Option<R>,
}

/// A record's message under way: whom it is for and what becomes of it.
type Putting = Pin<Box<dyn Future<Output = (NodeId, Kept)> + Send>>;

/// The copy of the record that another node keeps.
struct Journal {
    trail: Trail,
    answer: Vec<u8>,
    /// Whose arithmetic it is, as the record says.
    numerics: Option<String>,
    putting: Option<Putting>,
}

/// One request on its way.
struct Ride<'a, C: Carrier> {
    forwarder: &'a Forwarder<C>,
    /// As it was admitted.
    envelope: Envelope,
    /// The base stands in for its adapter, at whatever node.
    fell_back: bool,
    failover: Failover,
    tables: Tables,
    /// The current run and its challenger, in any order.
    legs: [Option<Leg<C::Run>>; 2],
    journal: Option<Journal>,
    /// The latest attempt that was started.
    attempt: Attempt,
    events: mpsc::Sender<TokenEvent>,
}

enum Happened {
    Answer(Attempt, NodeId, Result<Option<Answer>, Lost>),
    Table,
    Kept(NodeId, Kept),
    Tick,
    ClientGone,
}

// === impl Leg ===

impl<R: Run> Leg<R> {
    async fn recv(&mut self) -> Result<Option<Answer>, Lost> {
        if let Some(starting) = &mut self.starting {
            let started = starting.await;
            self.starting = None;
            self.run = Some(started?);
        }
        match &mut self.run {
            Some(run) => run.recv().await,
            None => Err(Lost("it could not be started".to_owned())),
        }
    }
}

async fn recv<R: Run>(leg: &mut Option<Leg<R>>) -> Happened {
    match leg {
        Some(leg) => {
            let answer = leg.recv().await;
            Happened::Answer(leg.attempt, leg.node.clone(), answer)
        }
        None => std::future::pending().await,
    }
}

async fn put(journal: &mut Option<Journal>) -> Happened {
    let Some(journal) = journal else { return std::future::pending().await };
    let Some(putting) = &mut journal.putting else { return std::future::pending().await };
    let (keeper, kept) = putting.await;
    journal.putting = None;
    Happened::Kept(keeper, kept)
}

// === impl Ride ===

impl<C: Carrier> Ride<'_, C> {
    async fn run(mut self) {
        let mut commands = self.decide(|failover, around| failover.begin(around));
        loop {
            if self.perform(std::mem::take(&mut commands)).await.is_break() || self.failover.is_over() {
                return self.finish().await;
            }
            self.write();
            commands = match self.next().await {
                Happened::Answer(attempt, node, answer) => match self.on_answer(attempt, &node, answer).await {
                    ControlFlow::Continue(commands) => commands,
                    ControlFlow::Break(()) => return,
                },
                Happened::Table => self.decide(|failover, around| failover.on_table(around)),
                Happened::Kept(keeper, kept) => {
                    self.on_kept(&keeper, kept);
                    Vec::new()
                }
                Happened::Tick if self.now() >= self.too_late() => {
                    let message = "the request's deadline passed before its answer was complete; hint: allow more time";
                    vec![Command::Fail(RequestError::new(ErrorKind::Deadline, "deadline_exceeded", message))]
                }
                Happened::Tick => self.decide(|failover, around| failover.on_tick(around)),
                Happened::ClientGone => return,
            };
        }
    }

    async fn next(&mut self) -> Happened {
        let write_at = self.journal.as_ref().and_then(|journal| journal.trail.wake_at());
        let wake_at = [self.failover.wake_at(), write_at].into_iter().flatten().fold(self.too_late(), Instant::min);
        let [one, other] = &mut self.legs;
        tokio::select! {
            biased;
            () = self.events.closed() => Happened::ClientGone,
            () = self.tables.changed() => Happened::Table,
            happened = recv(one) => happened,
            happened = recv(other) => happened,
            happened = put(&mut self.journal) => happened,
            () = tokio::time::sleep_until(wake_at.into()) => Happened::Tick,
        }
    }

    async fn on_answer(
        &mut self,
        attempt: Attempt,
        node: &NodeId,
        answer: Result<Option<Answer>, Lost>,
    ) -> ControlFlow<(), Vec<Command>> {
        let end = match answer {
            Ok(Some(Answer::Event { attempt: of, event })) if of == attempt => {
                let now = self.now();
                match self.failover.on_event(now, attempt, &event) {
                    Verdict::Deliver(loser) => {
                        loser.into_iter().for_each(|loser| self.cancel(loser));
                        self.journal.iter_mut().for_each(|journal| journal.trail.on_progress(now));
                        if let TokenEvent::Started { fell_back: true, .. } = event {
                            self.on_fallback().await;
                        }
                        self.deliver(event).await?;
                        return ControlFlow::Continue(Vec::new());
                    }
                    Verdict::Drop => return ControlFlow::Continue(Vec::new()),
                    Verdict::Ended => End::Failed(reason(event)),
                }
            }
            Ok(Some(Answer::Event { .. })) => return ControlFlow::Continue(Vec::new()),
            Ok(Some(Answer::Moved { to, .. })) => match to.into_iter().find(|to| to != node) {
                Some(to) => End::Moved(to),
                None => End::Refused(no_node()),
            },
            Ok(Some(Answer::Refused(error))) => End::Refused(error),
            Ok(None) | Err(Lost(_)) => End::Lost,
        };
        tracing::debug!(request_id = %self.envelope.id, %node, attempt, ?end, "run ended");
        self.cancel(attempt);
        ControlFlow::Continue(self.decide(|failover, around| failover.on_ended(around, attempt, end)))
    }

    /// The node that runs the request cannot load its adapter, and its contract lets the base answer: so it stays,
    /// even where the adapter can be loaded. The record says so before the client hears of it.
    async fn on_fallback(&mut self) {
        if !std::mem::replace(&mut self.fell_back, true) {
            self.journal.iter_mut().for_each(|journal| journal.trail.on_change());
            self.write_out().await;
        }
    }

    /// Breaks when the client is gone.
    async fn deliver(&mut self, event: TokenEvent) -> ControlFlow<()> {
        match self.events.try_send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(mpsc::error::TrySendError::Full(event)) => {
                let sent = self.events.send(event).await;
                self.failover.on_listening(self.now());
                if sent.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            }
            Err(mpsc::error::TrySendError::Closed(_)) => ControlFlow::Break(()),
        }
    }

    fn decide(&mut self, decide: impl FnOnce(&mut Failover, &mut Around<'_>) -> Vec<Command>) -> Vec<Command> {
        let now = self.now();
        let table = self.tables.borrow_and_update();
        let mut budget = lock(&self.forwarder.budget);
        decide(&mut self.failover, &mut Around { now, table: &table, budget: &mut budget })
    }

    /// Breaks when the request is over.
    async fn perform(&mut self, commands: Vec<Command>) -> ControlFlow<()> {
        for command in commands {
            match command {
                Command::Start { attempt, node, redirected } => self.start(attempt, node, redirected),
                Command::Cancel(attempt) => self.cancel(attempt),
                Command::Mark => {
                    let n_tokens = self.failover.emitted().n_tokens();
                    let fingerprint = fingerprint(&self.envelope);
                    if let Some(life) = self.failover.deaths().last() {
                        lock(&self.forwarder.quarantine).on_death(self.now(), fingerprint, n_tokens, life.clone());
                    }
                }
                Command::Quarantine => {
                    let deaths = self.failover.deaths();
                    lock(&self.forwarder.quarantine).on_poison(self.now(), fingerprint(&self.envelope), deaths);
                    let adapter = self.envelope.adapter.as_ref().map(|pin| pin.name.to_string());
                    let tenant = &self.envelope.route.tenant;
                    tracing::warn!(tenant_id = %tenant, request_id = %self.envelope.id, adapter, "request quarantined");
                }
                Command::Fail(error) => {
                    self.deliver(TokenEvent::Failed(error)).await?;
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    }

    fn start(&mut self, attempt: Attempt, node: NodeId, redirected: bool) {
        self.attempt = attempt;
        let epoch = if redirected { SERVE_HERE } else { self.tables.borrow().epoch() };
        let envelope = told(&self.envelope, self.fell_back, self.failover.numerics());
        let start = Start { envelope, attempt, epoch, emitted: self.failover.emitted().clone() };
        tracing::debug!(request_id = %self.envelope.id, %node, attempt, redirected, "run starts");
        let (carrier, to) = (self.forwarder.carrier.clone(), node.clone());
        let starting: Starting<C::Run> = Box::pin(async move { carrier.start(&to, start).await });
        let leg = Leg { attempt, node, starting: Some(starting), run: None };
        match self.legs.iter_mut().find(|leg| leg.is_none()) {
            Some(free) => *free = Some(leg),
            None => shared::critical!("a third run of request {} was started", self.envelope.id),
        }
    }

    fn cancel(&mut self, attempt: Attempt) {
        for leg in &mut self.legs {
            let _ = leg.take_if(|leg| leg.attempt == attempt);
        }
    }

    /// Sends what the record lacks, if it is time.
    fn write(&mut self) {
        let now = self.now();
        let Some(journal) = &mut self.journal else { return };
        let numerics = self.failover.numerics();
        if journal.numerics.as_deref() != numerics {
            journal.trail.on_change();
            journal.numerics = numerics.map(str::to_owned);
        }
        journal.trail.on_table(&self.tables.borrow());
        let emitted = self.failover.emitted();
        let Some((keeper, put)) = journal.trail.next(now, emitted, self.attempt) else { return };
        let request = match put {
            Put::Add(deltas) => Request::JournalPut(deltas),
            Put::Open => Request::JournalOpen(Box::new(JournalRecord {
                envelope: told(&self.envelope, self.fell_back, numerics),
                attempt: self.attempt,
                answer: journal.answer.clone(),
                emitted: emitted.clone(),
            })),
        };
        let carrier = self.forwarder.carrier.clone();
        journal.putting = Some(Box::pin(async move {
            let kept = match carrier.keep(&keeper, request).await {
                Ok(Response::Done) => Kept::Yes,
                Ok(Response::Refused(error)) => understood(&error),
                Ok(_) | Err(Lost(_)) => Kept::Unknown,
            };
            (keeper, kept)
        }));
    }

    fn on_kept(&mut self, keeper: &NodeId, kept: Kept) {
        let now = self.now();
        if let Some(journal) = &mut self.journal {
            journal.trail.on_kept(now, keeper, kept);
            if journal.trail.is_taken() {
                tracing::debug!(request_id = %self.envelope.id, %keeper, "the request goes on at another entry node");
            }
        }
    }

    /// A request that finished harms nobody, and its record says so.
    async fn finish(mut self) {
        let emitted = self.failover.emitted();
        if !emitted.0.iter().all(|choice| choice.finished) {
            return;
        }
        {
            let mut quarantine = lock(&self.forwarder.quarantine);
            if !quarantine.is_empty() {
                quarantine.on_done(&fingerprint(&self.envelope));
            }
        }
        if self.journal.is_some() {
            // The client has everything: it does not wait for this.
            (self.events, _) = mpsc::channel(1);
            let _ = tokio::time::timeout(LAST_WORD_WITHIN, self.write_out()).await;
        }
    }

    async fn write_out(&mut self) {
        loop {
            self.write();
            let Some(journal) = &self.journal else { return };
            if journal.putting.is_none() {
                return;
            }
            if let Happened::Kept(keeper, kept) = put(&mut self.journal).await {
                self.on_kept(&keeper, kept);
            }
        }
    }

    fn too_late(&self) -> Instant {
        self.envelope.deadline + DEADLINE_GRACE
    }

    fn now(&self) -> Instant {
        self.forwarder.clock.now()
    }
}

/// The request as other nodes are to know it.
fn told(envelope: &Envelope, fell_back: bool, numerics: Option<&str>) -> Envelope {
    let pin = BasePin { hash: envelope.pin.hash, numerics: numerics.map(str::to_owned) };
    let envelope = Envelope { pin, ..envelope.clone() };
    if fell_back { Envelope { adapter: None, fell_back: true, ..envelope } } else { envelope }
}

/// Why a run ended itself; anything but a failure broke the rules of the stream.
fn reason(event: TokenEvent) -> RequestError {
    match event {
        TokenEvent::Failed(error) => error,
        TokenEvent::Started { .. } => {
            let message = "the adapter cannot be loaded where this request went on; hint: retry";
            RequestError::new(ErrorKind::Unavailable, "adapter_unavailable", message)
        }
        _ => RequestError::internal(),
    }
}

/// What a request asks for, apart from its seed: the same prompt is the same poison.
fn fingerprint(envelope: &Envelope) -> ContentHash {
    let generation = &envelope.generation;
    let mut hasher = blake3::Hasher::new_derive_key("tenantry 2026 request fingerprint");
    hasher.update(envelope.route.tenant.as_str().as_bytes()).update(b":");
    hasher.update(envelope.base.as_str().as_bytes()).update(b":");
    if let Some(pin) = &envelope.adapter {
        hasher.update(&pin.hash.0);
    }
    hasher.update(&generation.n.to_le_bytes()).update(&generation.max_tokens.to_le_bytes());
    match &generation.grammar {
        Some(Grammar::JsonSchema(text) | Grammar::Lark(text)) => _ = hasher.update(text.as_bytes()),
        Some(Grammar::JsonObject) => _ = hasher.update(b"json"),
        None => {}
    }
    generation.prompt.iter().for_each(|token| _ = hasher.update(&token.to_le_bytes()));
    ContentHash(*hasher.finalize().as_bytes())
}

/// A panic while one of these short locks is held leaves nothing half-done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
