//! What the engine gives to streams that always ask again, without queue, HTTP and load generator: the reference for
//! the same workload over HTTP (`scripts/bench`, W1 and W2).
//!
//! ```text
//! cargo run --release -p scheduler --example closed_loop -- MODEL [streams] [seconds] [threads] [prompt] [answer]
//! ```
//!
//! Prompts of random tokens, greedy answers, end of sequence ignored. Times between tokens and steps are as the engine
//! thread sees them; steps are told apart by whether they had prompt rows.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use model::base::BaseModel;
use model::forward::{Runtime, RuntimeOptions};
use model::info::Numerics;
use scheduler::engine::{Engine, EngineConfig};
use scheduler::source::{CancelFlag, Charge, Room, Work, WorkSource};
use scheduler::vocab::Vocabulary;
use shared::clock::{Clock, SystemClock};
use shared::id::{RequestId, Route};
use shared::request::{Emitted, Envelope, Generation};
use shared::tenant::Tier;
use shared::token::TokenEvent;
use tokio::sync::mpsc;

/// As a node's defaults have it.
const ROWS_PER_STEP: usize = 256;
const SEQUENCES: usize = 64;
const KV_BYTES: usize = 512 << 20;
/// Tokens far from the special ones of every vocabulary.
const FIRST_TOKEN: u32 = 1000;
const N_TOKENS: u32 = 20_000;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let path = words.first().expect("usage: closed_loop <model file> [streams] [seconds] [threads] [prompt] [answer]");
    let number = |at: usize, otherwise: usize| words.get(at).map_or(otherwise, |text| text.parse().expect("a number"));
    let (n_streams, seconds, threads) = (number(1, 16), number(2, 8), number(3, 2));
    let (n_prompt, n_answer) = (number(4, 96), number(5, 64));
    let base = Arc::new(BaseModel::load(Path::new(path), Numerics::Fast).expect("load the model"));
    let config = EngineConfig {
        prefill_rows_max: ROWS_PER_STEP,
        sequences_max: SEQUENCES,
        prefill_stretch: 1.0,
        ..EngineConfig::new(base.info.hash, base.info.context)
    };
    let vocabulary = Arc::new(Vocabulary::new((0..base.info.vocab).map(|_| (vec![b'x'], false)), vec![]));
    let options = RuntimeOptions {
        threads,
        rows_max: ROWS_PER_STEP,
        kv_bytes: KV_BYTES,
        n_logits_max: SEQUENCES,
        poison_freed_pages: true,
    };
    let runtime = Runtime::new(base, options).expect("make a runtime");
    let waiting = Arc::new(Mutex::new(VecDeque::new()));
    let clock = Arc::new(SystemClock);
    let mut engine = Engine::new(runtime, Source(Arc::clone(&waiting)), vocabulary, clock.clone(), config);
    let mut load = Load { clock, waiting, n_requests: 0, n_prompt, n_answer, times: Times::default() };
    let mut streams: Vec<Stream> = (0..n_streams).map(|_| load.ask()).collect();
    // One round of answers, so that the cost model has seen what comes.
    while load.n_requests < 2 * n_streams as u64 {
        load.step(&mut engine, &mut streams);
    }
    load.times = Times::default();
    let begun = load.clock.now();
    while load.clock.now() < begun + Duration::from_secs(seconds as u64) {
        load.step(&mut engine, &mut streams);
    }
    load.times.print(load.clock.now() - begun);
}

/// Hands out what waits.
struct Source(Arc<Mutex<VecDeque<Work>>>);

impl WorkSource for Source {
    fn pull(&mut self, _: Instant, room: Room) -> Option<Work> {
        (room.sequences > 0).then(|| self.0.lock().expect("one thread").pop_front()).flatten()
    }

    fn charge(&mut self, _: Tier, _: &Route, _: Charge) {}

    fn park(&mut self, _: Duration) {}

    fn closed(&self) -> bool {
        false
    }
}

/// A stream's request in flight.
struct Stream {
    events: mpsc::Receiver<TokenEvent>,
    last: Instant,
    n_tokens: usize,
}

struct Load {
    clock: Arc<SystemClock>,
    waiting: Arc<Mutex<VecDeque<Work>>>,
    n_requests: u64,
    n_prompt: usize,
    n_answer: usize,
    times: Times,
}

impl Load {
    fn ask(&mut self) -> Stream {
        self.n_requests += 1;
        let now = self.clock.now();
        let (sink, events) = mpsc::channel(256);
        let token = |at: usize| (self.n_requests as u32 * 7919 + at as u32 * 104_729) % N_TOKENS + FIRST_TOKEN;
        let prompt: Vec<u32> = (0..self.n_prompt).map(token).collect();
        let generation = Generation::greedy(prompt, self.n_answer as u32);
        let envelope = Envelope {
            id: RequestId(u128::from(self.n_requests)),
            route: Route { tenant: "plain".parse().expect("valid"), task: None },
            tier: Tier::Shared,
            weight: 1,
            concurrency: 1000,
            queue_depth: 1000,
            base: "base".parse().expect("valid"),
            pin: Default::default(),
            adapter: None,
            fell_back: false,
            cache_secret: [0; 32],
            generation: Arc::new(generation),
            contract_epoch: 0,
            admitted_at: now,
            deadline: now + Duration::from_secs(1000),
        };
        self.waiting.lock().expect("one thread").push_back(Work {
            envelope: Arc::new(envelope),
            emitted: Emitted::default(),
            lease: None,
            adapter_hit: None,
            grammar: None,
            sink,
            cancel: CancelFlag::default(),
            permit: Box::new(()),
        });
        Stream { events, last: now, n_tokens: 0 }
    }

    /// One step of the engine, then what it brought.
    fn step(&mut self, engine: &mut Engine<Runtime, Source>, streams: &mut [Stream]) {
        let stats = engine.stats();
        let (before, begun) = (stats.snapshot(), self.clock.now());
        engine.step();
        let (after, now) = (stats.snapshot(), self.clock.now());
        let kind =
            if after.rows_prefill > before.rows_prefill { &mut self.times.mixed } else { &mut self.times.decode };
        kind.push(now - begun);
        self.times.forward += Duration::from_nanos(after.forward_ns - before.forward_ns);
        for stream in streams {
            let mut over = false;
            while let Ok(event) = stream.events.try_recv() {
                over |= matches!(event, TokenEvent::Finished { .. });
                if matches!(event, TokenEvent::Token { .. }) {
                    let kind = if stream.n_tokens == 0 { &mut self.times.first } else { &mut self.times.gaps };
                    kind.push(now - stream.last);
                    (stream.last, stream.n_tokens) = (now, stream.n_tokens + 1);
                    self.times.n_tokens += 1;
                }
            }
            if over {
                *stream = self.ask();
            }
        }
    }
}

#[derive(Default)]
struct Times {
    n_tokens: usize,
    first: Vec<Duration>,
    gaps: Vec<Duration>,
    decode: Vec<Duration>,
    mixed: Vec<Duration>,
    forward: Duration,
}

impl Times {
    fn print(&mut self, took: Duration) {
        let secs = took.as_secs_f64();
        println!("{:.1} tok/s, {:.1} % of the time in the forward pass", self.n_tokens as f64 / secs, {
            100.0 * self.forward.as_secs_f64() / secs
        });
        for (name, times) in [
            ("first token", &mut self.first),
            ("between tokens", &mut self.gaps),
            ("decode step", &mut self.decode),
            ("step with prompts", &mut self.mixed),
        ] {
            if times.is_empty() {
                continue;
            }
            times.sort_unstable();
            let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e3;
            let mean = times.iter().sum::<Duration>().as_secs_f64() * 1e3 / times.len() as f64;
            println!(
                "{name:18} {:6} times: least {:.2} p50 {:.2} mean {mean:.2} p95 {:.2} ms",
                times.len(),
                at(0.0),
                at(0.5),
                at(0.95)
            );
        }
    }
}
