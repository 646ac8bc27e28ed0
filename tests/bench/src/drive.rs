//! The run: streams or arrivals against one server, bounded in requests, time and requests under way. Everything
//! happens on the caller's thread; what a request is and what its answer means is decided elsewhere.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use shared::clock::{Clock, SystemClock};
use tokio::sync::Barrier;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::timeout;

use crate::arrivals::{Arrivals, PoissonTimes};
use crate::client::{Answer, Client};
use crate::prompt;
use crate::random::Random;
use crate::report::{Ending, Record};
use crate::tenants::{Draw, Picker, Tenant};

/// Requests under way at once when arrivals do not wait: more than any server here serves, few enough for the
/// default limit of open files.
const UNDER_WAY_MAX: usize = 900;

/// One run.
#[derive(Debug, Clone)]
pub struct Load {
    /// `host:port` of the server.
    pub authority: String,
    /// Path of the completions call.
    pub path: String,
    /// Who asks; not empty.
    pub tenants: Vec<Tenant>,
    /// By which law.
    pub draw: Draw,
    /// When.
    pub arrivals: Arrivals,
    /// Most requests over all streams; warm-up not counted.
    pub n_requests: usize,
    /// No request is sent after this time.
    pub sending: Duration,
    /// How long answers may take after the last sending; what runs then is unfinished.
    pub draining: Duration,
    /// Requests of each stream before the measurement.
    pub n_warmup: usize,
    /// Prompt tokens unless the tenant says otherwise.
    pub prompt_tokens: usize,
    /// Output tokens unless the tenant says otherwise.
    pub output_tokens: usize,
    /// Seed of prompts, picks and arrival times.
    pub seed: u64,
}

/// What a run leaves.
#[derive(Debug)]
pub struct Outcome {
    /// Every request that was sent in the measurement.
    pub records: Vec<Record>,
    /// What each tenant should get in relation to the others.
    pub due: Vec<f64>,
    /// Arrivals that were dropped because too many requests were under way.
    pub n_dropped: usize,
}

struct Run {
    load: Load,
    picker: RefCell<Picker>,
    root: Random,
    records: RefCell<Vec<Record>>,
    /// Requests sent or being sent.
    n_sent: Cell<usize>,
    n_dropped: Cell<usize>,
    started: Cell<Instant>,
    warmed_up: Barrier,
}

/// Runs it; `on_start` is called when the warm-up is over.
pub async fn run(load: Load, on_start: impl FnOnce() + 'static) -> Outcome {
    let streams = streams(&load);
    let run = Rc::new(Run {
        picker: RefCell::new(Picker::new(load.draw, load.tenants.len())),
        root: Random::new(load.seed),
        records: RefCell::default(),
        n_sent: Cell::new(0),
        n_dropped: Cell::new(0),
        started: Cell::new(SystemClock.now()),
        warmed_up: Barrier::new(streams.len() + 1),
        load,
    });
    let shared = run.clone();
    LocalSet::new()
        .run_until(async move {
            let mut tasks = JoinSet::new();
            for (place, tenant) in streams.into_iter().enumerate() {
                tasks.spawn_local(stream(shared.clone(), place, tenant));
            }
            shared.warmed_up.wait().await;
            shared.started.set(SystemClock.now());
            on_start();
            if let Arrivals::Poisson { rate_per_s } = shared.load.arrivals {
                poisson(&shared, rate_per_s, &mut tasks).await;
            }
            while tasks.join_next().await.is_some() {}
        })
        .await;
    let records = run.records.take();
    Outcome { due: due(&run.load, &records), records, n_dropped: run.n_dropped.get() }
}

/// The tenant of each closed-loop stream; `None` draws one for every request.
fn streams(load: &Load) -> Vec<Option<usize>> {
    match (load.arrivals, load.draw) {
        (Arrivals::Poisson { .. }, _) => Vec::new(),
        (Arrivals::Closed { .. }, Draw::Pinned) => {
            let streams = load.tenants.iter().enumerate();
            streams.flat_map(|(place, tenant)| std::iter::repeat_n(Some(place), tenant.streams)).collect()
        }
        (Arrivals::Closed { n_streams }, _) => vec![None; n_streams],
    }
}

fn due(load: &Load, records: &[Record]) -> Vec<f64> {
    let mut due = vec![0.0; load.tenants.len()];
    if load.draw == Draw::Pinned && matches!(load.arrivals, Arrivals::Closed { .. }) {
        due.iter_mut().zip(&load.tenants).for_each(|(due, tenant)| *due = tenant.streams as f64);
    } else {
        records.iter().for_each(|record| due[record.tenant] += 1.0);
    }
    due
}

/// One closed-loop stream: warm-up, then requests until the run's bounds.
async fn stream(run: Rc<Run>, place: usize, tenant: Option<usize>) {
    let mut client = Client::new(&run.load.authority, &run.load.path);
    let mut random = run.root.part(place as u64);
    for _ in 0..run.load.n_warmup {
        ask(&run, &mut client, tenant, &mut random, false).await;
    }
    run.warmed_up.wait().await;
    // The measurement starts in the task that waited last; let it note the time.
    tokio::task::yield_now().await;
    while run.may_send() {
        ask(&run, &mut client, tenant, &mut random, true).await;
    }
}

/// Sends at the times of the process, whatever the server does.
async fn poisson(run: &Rc<Run>, rate_per_s: f64, tasks: &mut JoinSet<()>) {
    let idle: Rc<RefCell<Vec<Client>>> = Rc::default();
    for (place, at) in PoissonTimes::new(rate_per_s, run.root.part(u64::MAX)).enumerate() {
        tokio::time::sleep_until((run.started.get() + at).into()).await;
        if !run.may_send() {
            return;
        }
        while tasks.try_join_next().is_some() {}
        if tasks.len() >= UNDER_WAY_MAX {
            run.n_dropped.set(run.n_dropped.get() + 1);
            continue;
        }
        let (run, idle) = (run.clone(), idle.clone());
        tasks.spawn_local(async move {
            let client = idle.borrow_mut().pop();
            let mut client = client.unwrap_or_else(|| Client::new(&run.load.authority, &run.load.path));
            let mut random = run.root.part(place as u64);
            ask(&run, &mut client, None, &mut random, true).await;
            idle.borrow_mut().push(client);
        });
    }
}

/// Asks once and keeps the record if it is part of the measurement.
async fn ask(run: &Run, client: &mut Client, tenant: Option<usize>, random: &mut Random, measured: bool) {
    let place = tenant.unwrap_or_else(|| run.picker.borrow_mut().pick(random));
    let tenant = &run.load.tenants[place];
    let prompt = prompt::words(tenant.prompt_tokens.unwrap_or(run.load.prompt_tokens), random);
    let body = prompt::body(tenant, &prompt, tenant.output_tokens.unwrap_or(run.load.output_tokens));
    let body = Bytes::from(body.to_string());
    let sent = SystemClock.now();
    let mut answer = Answer::default();
    let patience = if measured { run.time_left(sent) } else { run.load.sending + run.load.draining };
    if timeout(patience, client.ask(&tenant.key, body, &mut answer)).await.is_err() {
        *client = Client::new(&run.load.authority, &run.load.path);
    }
    let now = SystemClock.now();
    if measured {
        run.records.borrow_mut().push(record(place, run.started.get(), sent, now, answer));
    }
    if !matches!(now.duration_since(sent).as_millis(), 10..) {
        // A server that refuses at once must not be hammered: the generator is bounded, also in its own CPU.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn record(tenant: usize, started: Instant, sent: Instant, ended: Instant, answer: Answer) -> Record {
    let ms = |from: Instant, to: Instant| to.duration_since(from).as_secs_f64() * 1e3;
    Record {
        tenant,
        sent_ms: ms(started, sent),
        first_ms: answer.texts_at.first().map(|&first| ms(sent, first)),
        gaps_ms: answer.texts_at.windows(2).map(|pair| ms(pair[0], pair[1]) as f32).collect(),
        total_ms: ms(sent, ended),
        prompt_tokens: answer.prompt_tokens,
        output_tokens: answer.output_tokens,
        ending: answer.ending.unwrap_or(Ending::Unfinished),
    }
}

// === impl Run ===

impl Run {
    /// Claims one request of the run's bound.
    fn may_send(&self) -> bool {
        let n_sent = self.n_sent.get();
        let may =
            n_sent < self.load.n_requests && SystemClock.now().duration_since(self.started.get()) < self.load.sending;
        self.n_sent.set(n_sent + usize::from(may));
        may
    }

    fn time_left(&self, now: Instant) -> Duration {
        (self.load.sending + self.load.draining).saturating_sub(now.duration_since(self.started.get()))
    }
}
