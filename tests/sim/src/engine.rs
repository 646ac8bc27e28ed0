//! An engine without a model: a bounded batch with a queue, a step time, and tokens that are a function of prompt,
//! adapter, choice and position, as the real engine's are a function of the envelope and the tokens before.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use shared::cluster::NodeLoad;
use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::request::{Emitted, Envelope};
use shared::token::{FinishReason, TokenEvent};
use tokio::sync::{Semaphore, mpsc};

use crate::random::mix;

/// Sequences at once on a node.
pub const PLACES: u32 = 8;

/// Requests that may wait on a node (I10).
pub const QUEUE_MAX: u32 = 64;

/// A mistake built in on purpose, to see that it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    /// None.
    Nothing,
    /// A resumed request begins its text anew, under the numbers that are due.
    ForgetsEmitted,
    /// A resumed request says its last token again.
    RepeatsLast,
    /// A cancelled request goes on.
    IgnoresCancel,
    /// What a run left behind counts as of its successor.
    AcceptsOldAttempts,
    /// Keepers say that they have what they do not keep.
    KeepsNothing,
    /// A client that comes back gets its answer from the beginning.
    IgnoresHave,
    /// What a node delivered of a request is billed apart from what another did.
    BillsEveryVisit,
    /// A request runs on another tenant's adapter where its tenant is not at home.
    MixesAdapters,
}

/// The token at a position of a choice.
pub fn token(prompt: &[u32], adapter: &ContentHash, choice: u32, position: u32) -> u32 {
    let first = u64::from_le_bytes(*adapter.0.first_chunk().expect("a hash has 32 bytes"));
    let begin = mix(first) ^ (u64::from(choice) << 32 | u64::from(position));
    let seed = prompt.iter().fold(begin, |seed, token| mix(seed ^ u64::from(*token)));
    u32::try_from(seed % 49_152).unwrap_or(0)
}

/// One node's engine.
#[derive(Debug, Clone)]
pub struct Engine {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    places: Arc<Semaphore>,
    running: Cell<u32>,
    waiting: Cell<u32>,
    step: Duration,
    planted: Planted,
    broken: RefCell<Vec<String>>,
}

// === impl Engine ===

impl Engine {
    /// An idle engine with a time per token.
    pub fn new(step: Duration, planted: Planted) -> Self {
        let places = Arc::new(Semaphore::new(PLACES as usize));
        let inner =
            Inner { places, running: Cell::new(0), waiting: Cell::new(0), step, planted, broken: RefCell::default() };
        Self { inner: Rc::new(inner) }
    }

    /// What it says of itself.
    pub fn load(&self) -> NodeLoad {
        NodeLoad { running: self.inner.running.get(), places: PLACES, waiting: self.inner.waiting.get() }
    }

    /// Broken promises of this engine, for the oracle.
    pub fn violations(&self) -> Vec<String> {
        let free = u32::try_from(self.inner.places.available_permits()).unwrap_or(u32::MAX);
        let running = self.inner.running.get();
        let mut broken = std::mem::take(&mut *self.inner.broken.borrow_mut());
        if running + free != PLACES {
            broken.push(format!("I5: {running} places are taken and {free} free of {PLACES}"));
        }
        broken
    }

    /// Runs a request from what its client has; cancelled by dropping the receiver.
    ///
    /// # Errors
    /// `queue_full`.
    pub fn run(&self, envelope: Envelope, emitted: Emitted) -> Result<mpsc::Receiver<TokenEvent>, RequestError> {
        if self.inner.waiting.get() >= QUEUE_MAX {
            return Err(RequestError::new(ErrorKind::Throttled, "queue_full", "the queue is full"));
        }
        let (events, receiver) = mpsc::channel(8);
        let engine = self.clone();
        tokio::task::spawn_local(async move {
            let stops = events.clone();
            let work = engine.work(envelope, emitted, events);
            if engine.inner.planted == Planted::IgnoresCancel {
                return work.await;
            }
            tokio::select! {
                biased;
                () = stops.closed() => {}
                () = work => {}
            }
        });
        Ok(receiver)
    }

    async fn work(&self, envelope: Envelope, emitted: Emitted, events: mpsc::Sender<TokenEvent>) {
        let inner = &self.inner;
        let waiting = Counted::new(inner, |inner| &inner.waiting);
        let Ok(_place) = inner.places.clone().acquire_owned().await else { return };
        drop(waiting);
        let _running = Counted::new(inner, |inner| &inner.running);
        let _ = events
            .send(TokenEvent::Started {
                queue_wait: Duration::ZERO,
                cached_tokens: 0,
                fell_back: false,
                adapter_hit: None,
            })
            .await;
        let generation = &envelope.generation;
        // What a slot holds is what the request was admitted with.
        let mut adapter = envelope.adapter.as_ref().map_or(ContentHash([0; 32]), |pin| pin.hash);
        if inner.planted == Planted::MixesAdapters && !emitted.is_empty() {
            adapter = ContentHash::of(b"another");
        }
        let mut unheard = 0;
        for choice in 0..generation.n {
            if emitted.is_finished(choice) {
                continue;
            }
            let done = u32::try_from(emitted.tokens(choice).len()).unwrap_or(u32::MAX);
            for seq in done..generation.max_tokens {
                tokio::time::sleep(inner.step).await;
                let late = tokio::time::Instant::now().into_std().saturating_duration_since(envelope.deadline);
                if late > inner.step * 2 {
                    inner.broken.borrow_mut().push(format!("I8: {} runs {late:?} after its deadline", envelope.id));
                    return;
                }
                unheard += u32::from(events.is_closed());
                if unheard == 2 {
                    inner.broken.borrow_mut().push(format!("{} runs on after it was cancelled", envelope.id));
                }
                let position = match inner.planted {
                    Planted::ForgetsEmitted => seq - done,
                    Planted::RepeatsLast if done > 0 && seq == done => seq - 1,
                    _ => seq,
                };
                let id = token(&generation.prompt, &adapter, choice, position);
                let _ = events.send(TokenEvent::Token { choice, seq, id, logprobs: None }).await;
            }
            let finished = TokenEvent::Finished { choice, reason: FinishReason::Length, compute: Duration::ZERO };
            let _ = events.send(finished).await;
        }
    }
}

/// Counts while it lives.
struct Counted<'a>(&'a Cell<u32>);

impl<'a> Counted<'a> {
    fn new(inner: &'a Inner, of: impl Fn(&Inner) -> &Cell<u32>) -> Self {
        let cell = of(inner);
        cell.set(cell.get() + 1);
        Self(cell)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
