//! Forward pass, source of work and reader for tests, and the single-request reference they are held against.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use adapters::lease::Lease;
use model::adapter::LoraAdapter;
use model::step::{Forward, Step};
use shared::clock::{Clock, ManualClock};
use shared::hash::ContentHash;
use shared::id::{RequestId, Route, TenantId};
use shared::request::{AdapterPin, Emitted, Envelope, Generation};
use shared::tenant::Tier;
use shared::token::{FinishReason, PositionLogprobs, TokenEvent};
use tokio::sync::mpsc;

use crate::engine::{Engine, EngineConfig};
use crate::grammar::CompiledGrammar;
use crate::plan::reserve::ClassReserve;
use crate::sampler::{Draw, History, Sampler};
use crate::source::{CancelFlag, Charge, Room, Work, WorkSource};
use crate::stop::StopMatcher;
use crate::vocab::Vocabulary;

pub(super) const VOCAB: usize = 64;
/// Ends answers: one in about 64 sampled tokens.
const EOS: u32 = 63;
/// What freed pages hold.
const POISON: u64 = 0xDEAD_DEAD_DEAD_DEAD;

/// 62 one-byte tokens from '@', a control token and the end token.
pub(super) fn vocabulary() -> Vocabulary {
    let text = (0..62_u8).map(|id| (vec![b'@' + id], false));
    let control = [(b"<control>".to_vec(), true), (b"<end>".to_vec(), true)];
    Vocabulary::new(text.chain(control), vec![EOS])
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) page_tokens: usize,
    pub(super) n_pages: usize,
    pub(super) rows_max: usize,
    pub(super) prefill_rows_max: usize,
    pub(super) context: usize,
    pub(super) prefix_cache: bool,
    pub(super) quota: u32,
    pub(super) floor: u32,
    pub(super) shares: [f32; 3],
    /// The source honours the room it is given.
    pub(super) honest: bool,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            page_tokens: 4,
            n_pages: 100,
            rows_max: 32,
            prefill_rows_max: 16,
            context: 200,
            prefix_cache: true,
            quota: 100,
            floor: 4,
            shares: [0.0; 3],
            honest: true,
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) tenant: usize,
    pub(super) adapter: Option<u8>,
    /// A lease that differs from the pin.
    pub(super) lease: Option<Option<u8>>,
    pub(super) generation: Generation,
    /// What another engine emitted.
    pub(super) emitted: Emitted,
    pub(super) grammar: Option<CompiledGrammar>,
    pub(super) capacity: usize,
    pub(super) deadline: Option<Duration>,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            tenant: 0,
            adapter: None,
            lease: None,
            generation: generation(&[1, 2, 3]),
            emitted: Emitted::default(),
            grammar: None,
            capacity: 4096,
            deadline: None,
        }
    }
}

/// Greedy, eight tokens, one choice, no end token.
pub(super) fn generation(prompt: &[u32]) -> Generation {
    Generation::greedy(prompt, 8)
}

// === the model ===

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// "Keys and values" of a token.
fn kv(token: u32, position: usize, adapter: Option<u8>) -> u64 {
    mix(u64::from(token) << 32 | (position as u64) << 16 | adapter.map_or(0, |byte| 1 + u64::from(byte)))
}

fn attend(state: u64, kv: u64) -> u64 {
    mix(state.rotate_left(17) ^ kv)
}

fn logits(state: u64) -> impl Iterator<Item = f32> {
    (0..VOCAB as u64).map(move |id| (mix(state ^ (id << 40)) >> 44) as f32 / 131_072.0)
}

fn lora(byte: u8) -> Arc<LoraAdapter> {
    Arc::new(LoraAdapter { hash: ContentHash([byte; 32]), layers: Vec::new(), rank_max: 0, bytes: 0 })
}

/// Reads everything through the pages, as attention does.
#[derive(Debug)]
pub(super) struct StubForward {
    shape: Shape,
    pages: Vec<u64>,
    logits: Vec<f32>,
    clock: ManualClock,
    panic_in: Arc<Mutex<Option<usize>>>,
}

impl Forward for StubForward {
    fn page_tokens(&self) -> usize {
        self.shape.page_tokens
    }

    fn n_pages(&self) -> usize {
        self.shape.n_pages
    }

    fn rows_max(&self) -> usize {
        self.shape.rows_max
    }

    fn vocab(&self) -> usize {
        VOCAB
    }

    fn forward(&mut self, step: &Step) -> &[f32] {
        assert!(step.n_rows() > 0 && step.n_rows() <= self.shape.rows_max);
        if let Some(left) = &mut *self.panic_in.lock().expect("not poisoned") {
            *left -= 1;
            if *left == 0 {
                std::panic::resume_unwind(Box::new("the stub was told to"));
            }
        }
        let slot = |run: &model::step::Run, position: usize| {
            run.pages[position / self.shape.page_tokens] as usize * self.shape.page_tokens
                + position % self.shape.page_tokens
        };
        for run in &step.runs {
            let adapter = run.adapter.as_ref().map(|adapter| adapter.hash.0[0]);
            for (position, &token) in (run.start..).zip(&run.tokens) {
                self.pages[slot(run, position)] = kv(token, position, adapter);
            }
        }
        self.logits.clear();
        for run in &step.runs {
            for &offset in &run.logits {
                let state =
                    (0..=run.start + offset).fold(0, |state, position| attend(state, self.pages[slot(run, position)]));
                self.logits.extend(logits(state));
            }
        }
        self.clock.advance(Duration::from_micros(200 + 50 * step.n_rows() as u64));
        &self.logits
    }

    fn page_freed(&mut self, page: u32) {
        let start = page as usize * self.shape.page_tokens;
        self.pages[start..start + self.shape.page_tokens].fill(POISON);
    }
}

// === the queue ===

#[derive(Debug, Default)]
pub(super) struct StubSource {
    pub(super) waiting: VecDeque<Work>,
    pub(super) charges: Vec<Charge>,
    pub(super) closed: bool,
    pub(super) panic_when_left: bool,
    pub(super) forgotten: Vec<TenantId>,
    honest: bool,
}

impl StubSource {
    /// (prompt, answer) tokens charged in all.
    pub(super) fn charged(&self) -> (u32, u32) {
        self.charges.iter().fold((0, 0), |(prefill, decode), charge| (prefill + charge.prefill, decode + charge.decode))
    }
}

#[derive(Debug, Clone)]
pub(super) struct SharedSource(Arc<Mutex<StubSource>>);

impl WorkSource for SharedSource {
    fn pull(&mut self, _: Instant, room: Room) -> Option<Work> {
        let mut source = self.0.lock().expect("not poisoned");
        let next = source.waiting.front()?;
        let generation = &next.envelope.generation;
        let n_tokens = generation.prompt.len() + next.emitted.n_tokens();
        let fits = generation.n <= room.sequences && n_tokens as u32 <= room.kv_tokens;
        if fits || !source.honest { source.waiting.pop_front() } else { None }
    }

    fn charge(&mut self, _: Tier, _: &Route, charge: Charge) {
        self.0.lock().expect("not poisoned").charges.push(charge);
    }

    fn forgotten(&mut self) -> Vec<TenantId> {
        std::mem::take(&mut self.0.lock().expect("not poisoned").forgotten)
    }

    fn park(&mut self, _: Duration) {}

    fn closed(&self) -> bool {
        self.0.lock().expect("not poisoned").closed
    }
}

/// Counts the requests that the engine or the source holds.
#[derive(Debug)]
struct StubPermit {
    _count: Arc<()>,
    source: Weak<Mutex<StubSource>>,
}

impl Drop for StubPermit {
    fn drop(&mut self) {
        let breaks = self.source.upgrade().is_some_and(|source| source.lock().expect("not poisoned").panic_when_left);
        if breaks && !std::thread::panicking() {
            std::panic::resume_unwind(Box::new("the source broke, too"));
        }
    }
}

// === the reader ===

#[derive(Debug)]
pub(super) struct Receiver {
    pub(super) cancel: CancelFlag,
    channel: mpsc::Receiver<TokenEvent>,
    pub(super) events: Vec<TokenEvent>,
    /// What it had before, by choice.
    before: Vec<(Vec<u32>, Option<FinishReason>)>,
}

impl Receiver {
    /// Reads what is there; returns everything read so far.
    pub(super) fn drain(&mut self) -> Vec<TokenEvent> {
        self.take(usize::MAX);
        self.events.clone()
    }

    pub(super) fn take(&mut self, n: usize) {
        for _ in 0..n {
            match self.channel.try_recv() {
                Ok(event) => self.events.push(event),
                Err(_) => break,
            }
        }
    }

    pub(super) fn failure(&self) -> Option<&shared::error::RequestError> {
        self.events.iter().find_map(|event| if let TokenEvent::Failed(error) = event { Some(error) } else { None })
    }

    /// Tokens and end per choice, after those it had before.
    ///
    /// # Panics
    /// When the events break what `shared::token` promises.
    pub(super) fn answers(&self) -> Vec<(Vec<u32>, Option<FinishReason>)> {
        let mut answers = self.before.clone();
        for (at, event) in self.events.iter().enumerate() {
            match event {
                TokenEvent::Started { .. } => assert_eq!(at, 0, "Started comes first, once"),
                TokenEvent::Prompt { .. } => assert_eq!(at, 1, "Prompt comes before the first token"),
                TokenEvent::Token { choice, seq, id, .. } => {
                    let (ids, reason) = &mut answers[*choice as usize];
                    assert!(at > 0 && reason.is_none() && *seq as usize == ids.len(), "event {at}: {event:?}");
                    ids.push(*id);
                }
                TokenEvent::Finished { choice, reason, .. } => {
                    let old = answers[*choice as usize].1.replace(reason.clone());
                    assert_eq!(old, None, "a choice ends once");
                }
                TokenEvent::Failed(_) => assert_eq!(at + 1, self.events.len(), "nothing follows a failure"),
            }
        }
        answers
    }
}

// === everything together ===

#[derive(Debug)]
pub(super) struct Bench {
    pub(super) engine: Engine<StubForward, SharedSource>,
    pub(super) source: Arc<Mutex<StubSource>>,
    pub(super) clock: ManualClock,
    pub(super) shape: Shape,
    panic_in: Arc<Mutex<Option<usize>>>,
    pub(super) permit: Arc<()>,
    n_jobs: u128,
}

impl Bench {
    pub(super) fn new(shape: Shape) -> Self {
        let clock = ManualClock::default();
        let panic_in = Arc::default();
        let forward = StubForward {
            shape,
            pages: vec![POISON; shape.n_pages * shape.page_tokens],
            logits: Vec::new(),
            clock: clock.clone(),
            panic_in: Arc::clone(&panic_in),
        };
        let source = Arc::new(Mutex::new(StubSource { honest: shape.honest, ..StubSource::default() }));
        let config = EngineConfig {
            sequences_max: shape.rows_max,
            prefill_rows_max: shape.prefill_rows_max,
            logits_rows_max: 5,
            reserve: ClassReserve { shares: shape.shares, delay_max: Duration::from_millis(1) },
            prefix_cache: shape.prefix_cache,
            cache_quota_pages: shape.quota,
            cache_floor_pages: shape.floor,
            ..EngineConfig::new(ContentHash([9; 32]), shape.context)
        };
        let engine = Engine::new(
            forward,
            SharedSource(Arc::clone(&source)),
            Arc::new(vocabulary()),
            Arc::new(clock.clone()),
            config,
        );
        Self { engine, source, clock, shape, panic_in, permit: Arc::new(()), n_jobs: 0 }
    }

    pub(super) fn source(&self) -> MutexGuard<'_, StubSource> {
        self.source.lock().expect("not poisoned")
    }

    pub(super) fn panic_at_step(&mut self, n: usize) {
        *self.panic_in.lock().expect("not poisoned") = Some(n);
    }

    pub(super) fn used_pages(&self) -> u32 {
        self.engine.batch.pool.usage().used
    }

    /// Requests that the engine or the source still holds.
    pub(super) fn permits(&self) -> usize {
        Arc::strong_count(&self.permit) - 1
    }

    pub(super) fn submit(&mut self, job: &Job) -> Receiver {
        self.n_jobs += 1;
        let (sink, channel) = mpsc::channel(job.capacity);
        let now = self.clock.now();
        let pin = |byte: u8| AdapterPin {
            name: "acme-task-base-v1.0.0".parse().expect("valid"),
            hash: ContentHash([byte; 32]),
        };
        let tier = Tier::ALL[job.tenant % 3];
        let envelope = Envelope {
            id: RequestId(self.n_jobs),
            route: Route { tenant: format!("tenant{}", job.tenant).parse().expect("valid"), task: None },
            tier,
            weight: 1,
            concurrency: 100,
            queue_depth: 100,
            base: "base".parse().expect("valid"),
            pin: Default::default(),
            adapter: job.adapter.map(pin),
            fell_back: false,
            cache_secret: [job.tenant as u8; 32],
            generation: Arc::new(job.generation.clone()),
            contract_epoch: 0,
            admitted_at: now,
            deadline: now + job.deadline.unwrap_or(Duration::from_secs(1000)),
        };
        let cancel = CancelFlag::default();
        let work = Work {
            envelope: Arc::new(envelope),
            emitted: job.emitted.clone(),
            lease: job.lease.unwrap_or(job.adapter).map(|byte| Lease::untracked(lora(byte))),
            adapter_hit: None,
            grammar: job.grammar.clone(),
            sink,
            cancel: cancel.clone(),
            permit: Box::new(StubPermit { _count: Arc::clone(&self.permit), source: Arc::downgrade(&self.source) }),
        };
        self.source().waiting.push_back(work);
        let end =
            |choice| job.emitted.is_finished(choice).then(|| reference(job, &self.shape)[choice as usize].1.clone());
        let before = (0..job.generation.n).map(|choice| (job.emitted.tokens(choice).to_vec(), end(choice).flatten()));
        Receiver { cancel, channel, events: Vec::new(), before: before.collect() }
    }

    /// One iteration; an idle one passes a millisecond.
    pub(super) fn step(&mut self) -> usize {
        let n_rows = self.engine.step();
        if n_rows == 0 {
            self.clock.advance(Duration::from_millis(1));
        }
        n_rows
    }

    /// # Panics
    /// When the engine hangs.
    pub(super) fn run_until_idle(&mut self) {
        for _ in 0..20_000 {
            self.step();
            if self.engine.is_idle() && self.source().waiting.is_empty() {
                return;
            }
        }
        panic!("the engine does not come to an end: {:?}", self.engine);
    }
}

// === the reference ===

fn state_after(job: &Job, tokens: &[u32]) -> u64 {
    tokens.iter().enumerate().fold(0, |state, (position, &token)| attend(state, kv(token, position, job.adapter)))
}

/// What each choice must say: one request alone, token by token, without pages.
pub(super) fn reference(job: &Job, shape: &Shape) -> Vec<(Vec<u32>, Option<FinishReason>)> {
    let generation = &job.generation;
    let tokens_max = shape.context.min(shape.n_pages * shape.page_tokens);
    let mut ends = generation.stop_token_ids.clone();
    if !generation.ignore_eos {
        ends.push(EOS);
    }
    let answer = |choice: u32| {
        let mut tokens = generation.prompt.to_vec();
        let mut stop = StopMatcher::new(&generation.stop, generation.min_tokens);
        for position in 0.. {
            let emitted = &tokens[generation.prompt.len()..];
            let history = History::new(&generation.sampling, &generation.prompt, emitted);
            let row: Vec<f32> = logits(state_after(job, &tokens)).collect();
            let unwanted: &[u32] = if position < generation.min_tokens { &ends } else { &[] };
            let draw = Draw {
                logits: &row,
                sampling: &generation.sampling,
                history: &history,
                mask: None,
                unwanted,
                choice,
                position,
            };
            let id = Sampler::default().sample(&draw).expect("finite");
            tokens.push(id);
            let stopped = stop.push(vocabulary().text(id));
            let reason = match stopped {
                _ if ends.contains(&id) => FinishReason::Stop,
                Some(found) => FinishReason::StopText { index: found.index },
                None if position + 1 == generation.max_tokens || tokens.len() == tokens_max => FinishReason::Length,
                None => continue,
            };
            return (tokens[generation.prompt.len()..].to_vec(), Some(reason));
        }
        unreachable!("max_tokens ends the loop")
    };
    (0..generation.n).map(answer).collect()
}

pub(super) fn prompt_logprobs(job: &Job, n_top: u32) -> Vec<PositionLogprobs> {
    let prompt = &job.generation.prompt;
    let at = |next: usize| {
        let row: Vec<f32> = logits(state_after(job, &prompt[..next])).collect();
        Sampler::default().logprobs(&row, prompt[next], n_top)
    };
    (1..prompt.len()).map(at).collect()
}
