//! The path of a request through fair queue and engine in virtual time: the real queue, the real scheduler, clients that
//! ask again as soon as they are answered, and a forward pass that takes the time its rows would take. Nothing depends on
//! this machine's speed, so what neighbours notice of one another can be asserted instead of timed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::step::{Forward, Step};
use queue::{AdapterView, FairConfig, Item, Queue};
use scheduler::engine::{Engine, EngineConfig};
use scheduler::source::{CancelFlag, Charge, Room, Work, WorkSource};
use scheduler::vocab::Vocabulary;
use shared::adapter::{AdapterId, Residency};
use shared::clock::{Clock, ManualClock};
use shared::hash::ContentHash;
use shared::id::{RequestId, Route, TenantId};
use shared::request::{Emitted, Envelope, Generation};
use shared::tenant::Tier;
use shared::token::TokenEvent;
use tests::tiny::Random;
use tokio::sync::mpsc;

/// Places in the batch.
const SEQUENCES: usize = 16;
const PAGE_TOKENS: usize = 16;
const N_PAGES: usize = 4096;
const VOCAB: usize = 4;
/// Longest that a client takes between the end of an answer and its next request.
const THINK_MAX: Duration = Duration::from_millis(2);

/// Tenants of one kind and how they ask.
#[derive(Debug, Clone)]
pub(crate) struct Clients {
    /// Each has so many clients that ask one request at a time.
    pub(crate) tenant: TenantId,
    pub(crate) tier: Tier,
    pub(crate) n_clients: usize,
    /// Sequences it may have in the engine.
    pub(crate) concurrency: u32,
    pub(crate) n_prompt: usize,
    /// Answers have so many tokens and up to as many more. Were they all equal, the streams of a class would fall into
    /// step, ask again at the same moment and wait for one another, more often the busier the node is.
    pub(crate) n_answer_min: u32,
}

/// What a tenant's clients saw.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    pub(crate) first_token_ms: Vec<f64>,
    pub(crate) gap_ms: Vec<f64>,
    pub(crate) n_requests: usize,
}

impl Seen {
    pub(crate) fn add(&mut self, other: &Self) {
        self.first_token_ms.extend(&other.first_token_ms);
        self.gap_ms.extend(&other.gap_ms);
        self.n_requests += other.n_requests;
    }
}

/// The value below which a share `p` of the values lies.
pub(crate) fn percentile(values: &[f64], p: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[((sorted.len() - 1) as f64 * p).round() as usize]
}

/// Milliseconds of a step with 1, 2, 3 … decoding rows: one core of an AVX-512 machine, 135 million parameters. No line
/// goes through them: rows are computed eight at a time.
const DECODE_MS: [f64; 16] = [2.9, 3.0, 3.05, 3.2, 3.5, 3.9, 4.3, 4.7, 5.5, 5.9, 6.3, 6.8, 7.3, 7.8, 8.3, 8.8];
/// The same for more rows, and what of it the output head takes, per row.
const ROW_MS: f64 = 0.5;
const LOGITS_MS: f64 = 0.1;

#[derive(Debug)]
struct TimedForward {
    clock: ManualClock,
    logits: Vec<f32>,
}

impl TimedForward {
    fn took(step: &Step) -> Duration {
        let n_rows = step.n_rows();
        let table = DECODE_MS[n_rows.min(DECODE_MS.len()) - 1] + ROW_MS * n_rows.saturating_sub(DECODE_MS.len()) as f64;
        Duration::from_secs_f64((table - LOGITS_MS * (n_rows - step.n_logits()) as f64) / 1e3)
    }
}

impl Forward for TimedForward {
    fn page_tokens(&self) -> usize {
        PAGE_TOKENS
    }

    fn n_pages(&self) -> usize {
        N_PAGES
    }

    fn rows_max(&self) -> usize {
        256
    }

    fn vocab(&self) -> usize {
        VOCAB
    }

    fn forward(&mut self, step: &Step) -> &[f32] {
        self.clock.advance(Self::took(step));
        self.logits.clear();
        self.logits.resize(VOCAB * step.n_logits(), 0.0);
        &self.logits
    }

    fn page_freed(&mut self, _: u32) {}
}

type Payload = (Arc<Envelope>, mpsc::Sender<TokenEvent>);

/// The queue, seen from the engine, as `node::engine_source` has it, without adapters.
struct Source(Queue<Payload>);

struct NoAdapters;

impl AdapterView for NoAdapters {
    fn epoch(&self) -> u64 {
        0
    }

    fn residency(&mut self, _: &AdapterId) -> Residency {
        Residency::Ready
    }

    fn settled(&mut self, _: &mut Vec<AdapterId>) {}
}

impl WorkSource for Source {
    fn pull(&mut self, now: Instant, room: Room) -> Option<Work> {
        let room = queue::Room { sequences: room.sequences, kv_tokens: room.kv_tokens };
        let picked = self.0.next(now, room, &mut NoAdapters)?;
        let (envelope, sink) = picked.payload;
        Some(Work {
            envelope,
            emitted: Emitted::default(),
            lease: None,
            adapter_hit: None,
            grammar: None,
            sink,
            cancel: CancelFlag::default(),
            permit: Box::new(self.0.permit(picked.item.id)),
        })
    }

    fn charge(&mut self, tier: Tier, route: &Route, charge: Charge) {
        self.0.charge(tier, route, charge.prefill, charge.decode);
    }

    fn park(&mut self, _: Duration) {}

    fn closed(&self) -> bool {
        false
    }
}

/// One client: between requests, or in the middle of an answer.
struct Client {
    of: usize,
    /// When it asks next.
    due: Instant,
    answer: Option<Answer>,
}

struct Answer {
    events: mpsc::Receiver<TokenEvent>,
    _ticket: queue::Ticket<Payload>,
    asked: Instant,
    last: Option<Instant>,
}

/// A node in virtual time.
pub(crate) struct VirtualNode {
    engine: Engine<TimedForward, Source>,
    queue: Queue<Payload>,
    clock: ManualClock,
    n_requests: u128,
    random: Random,
}

impl VirtualNode {
    /// A node whose classes have these shares of step time reserved, as `node::base_room` sets it up. The seed decides
    /// when clients ask.
    pub(crate) fn new(reserves: [f64; 3], seed: u64) -> Self {
        let clock = ManualClock::default();
        let fair = FairConfig {
            class_sequences_reserved: node::base_room::places(reserves, SEQUENCES),
            ..FairConfig::default()
        };
        let queue = Queue::new("base".parse().expect("valid"), fair);
        let config = EngineConfig {
            sequences_max: SEQUENCES,
            prefill_rows_max: 256,
            prefill_stretch: 1.0,
            reserve: node::base_room::reserve(reserves),
            prefix_cache: false,
            ..EngineConfig::new(ContentHash([1; 32]), 1024)
        };
        let vocabulary = Vocabulary::new((0..VOCAB).map(|_| (vec![b'x'], false)), vec![]);
        let forward = TimedForward { clock: clock.clone(), logits: Vec::new() };
        let source = Source(queue.clone());
        let engine = Engine::new(forward, source, Arc::new(vocabulary), Arc::new(clock.clone()), config);
        Self { engine, queue, clock, n_requests: 0, random: Random::new(seed) }
    }

    /// Lets these clients ask for so long; the first second does not count. One [`Seen`] per entry.
    pub(crate) fn drive(&mut self, clients: &[Clients], seconds: u64) -> Vec<Seen> {
        let begun = self.clock.now();
        let (counted_from, end) = (begun + Duration::from_secs(1), begun + Duration::from_secs(1 + seconds));
        let mut seen = vec![Seen::default(); clients.len()];
        let each = clients.iter().enumerate().flat_map(|(of, kind)| std::iter::repeat_n(of, kind.n_clients));
        let mut open: Vec<Client> = each.map(|of| Client { of, due: begun, answer: None }).collect();
        while self.clock.now() < end {
            let now = self.clock.now();
            for client in &mut open {
                if client.answer.is_none() && client.due <= now {
                    client.answer = Some(self.ask(&clients[client.of], client.due));
                }
            }
            if self.engine.step() == 0 {
                self.clock.advance(Duration::from_micros(100));
            }
            let now = self.clock.now();
            for client in &mut open {
                let Some(answer) = &mut client.answer else { continue };
                let seen = &mut seen[client.of];
                let counts = answer.asked >= counted_from;
                let mut is_over = false;
                while let Ok(event) = answer.events.try_recv() {
                    match event {
                        TokenEvent::Token { .. } => {
                            let before = answer.last.replace(now);
                            let ms = now.duration_since(before.unwrap_or(answer.asked)).as_secs_f64() * 1e3;
                            let times = if before.is_none() { &mut seen.first_token_ms } else { &mut seen.gap_ms };
                            times.extend(counts.then_some(ms));
                        }
                        TokenEvent::Finished { .. } => is_over = true,
                        TokenEvent::Failed(error) => panic!("a request failed: {error:?}"),
                        TokenEvent::Started { .. } | TokenEvent::Prompt { .. } => {}
                    }
                }
                if is_over {
                    seen.n_requests += usize::from(counts);
                    client.answer = None;
                    client.due = now + THINK_MAX.mul_f32(self.random.unit());
                }
            }
        }
        // What still runs ends before the next set of clients comes.
        drop(open);
        while !self.engine.is_idle() {
            self.engine.step();
        }
        seen
    }

    fn ask(&mut self, of: &Clients, at: Instant) -> Answer {
        self.n_requests += 1;
        let n_answer = of.n_answer_min + self.random.below(of.n_answer_min as usize + 1) as u32;
        let (sink, events) = mpsc::channel(n_answer as usize + 4);
        let generation = Generation::greedy(vec![1; of.n_prompt], n_answer);
        let envelope = Arc::new(Envelope {
            id: RequestId(self.n_requests),
            route: Route { tenant: of.tenant.clone(), task: None },
            tier: of.tier,
            weight: 1,
            concurrency: of.concurrency,
            queue_depth: 1000,
            base: "base".parse().expect("valid"),
            pin: Default::default(),
            adapter: None,
            fell_back: false,
            cache_secret: [1; 32],
            generation: Arc::new(generation),
            contract_epoch: 0,
            admitted_at: at,
            deadline: at + Duration::from_secs(3600),
        });
        let item = Item::of(&envelope, &Emitted::default());
        let ticket = self.queue.submit(at, item, (envelope, sink)).expect("there is room in the queue");
        Answer { events, _ticket: ticket, asked: at, last: None }
    }
}
