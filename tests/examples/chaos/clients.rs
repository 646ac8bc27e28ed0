//! Clients that ask without a pause while nodes come and go, and what they saw.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use shared::clock::{Clock, SystemClock};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::process::NodeProcess;

use super::{Bench, Wires, percentiles};

/// An HTTP client gives up after so long without progress.
const PATIENCE: Duration = Duration::from_secs(60);

/// What clients have seen.
#[derive(Default)]
pub(super) struct Seen {
    n_answers: AtomicUsize,
    n_failed: AtomicUsize,
    n_other: AtomicUsize,
    n_anew: AtomicUsize,
    /// By client.
    n_tokens: Vec<AtomicU64>,
    pauses: Mutex<Vec<Duration>>,
}

/// A stream over HTTP whose client goes on elsewhere when it is cut.
struct Http<'a> {
    urls: &'a [String],
    key: &'a str,
    body: &'a Value,
}

/// Ends the clients, whatever becomes of what is done meanwhile.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Does something under one client per tenant, of which the first `n_library` use the client library, the others HTTP.
/// What they got is added to the bench's account.
pub(super) fn under_clients(bench: &mut Bench, n_library: usize, act: impl FnOnce(&mut Cluster, &Wires)) -> Seen {
    let bodies: Vec<Value> = (0..bench.keys.len()).map(|n| bench.body(n)).collect();
    let Bench { cluster, wires, keys, expected, .. } = &mut *bench;
    let urls: Vec<String> = cluster.nodes.iter().map(NodeProcess::url).collect();
    let configs: Vec<_> = (0..n_library).map(|n| cluster.library(n, &keys[n])).collect();
    let (stop, seen) = (AtomicBool::new(false), Seen::of(keys.len()));
    std::thread::scope(|scope| {
        for (n, key) in keys.iter().enumerate() {
            let (stop, seen, body, expected) = (&stop, &seen, &bodies[n], &expected[n]);
            let (config, urls) = (configs.get(n), &urls);
            scope.spawn(move || {
                for turn in n.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let streamed = match config {
                        Some(config) => Streaming::by_library(config.clone(), body).join(),
                        None => Http { urls, key, body }.ask(n, turn, seen),
                    };
                    seen.take(n, &streamed, expected);
                }
            });
        }
        let _stop = Stop(&stop);
        act(cluster, wires);
    });
    for (n, tokens) in seen.n_tokens.iter().enumerate() {
        bench.count(n, tokens.load(Ordering::Relaxed));
    }
    seen
}

// === impl Seen ===

impl Seen {
    fn of(n_clients: usize) -> Self {
        Self { n_tokens: (0..n_clients).map(|_| AtomicU64::new(0)).collect(), ..Self::default() }
    }

    fn take(&self, n: usize, streamed: &Streamed, expected: &[u32]) {
        self.n_answers.fetch_add(1, Ordering::Relaxed);
        self.got(n, streamed);
        if streamed.error.is_some() || streamed.finish.is_none() {
            self.n_failed.fetch_add(1, Ordering::Relaxed);
            println!("  client {n}: {:?} after {} tokens", streamed.error, streamed.ids.len());
        } else if streamed.ids != expected {
            self.n_other.fetch_add(1, Ordering::Relaxed);
            println!("  client {n}: {} tokens, not the expected {}", streamed.ids.len(), expected.len());
        }
        self.pauses.lock().expect("no client panics").extend(streamed.gaps.iter().max());
    }

    fn got(&self, n: usize, streamed: &Streamed) {
        self.n_tokens[n].fetch_add(streamed.ids.len() as u64, Ordering::Relaxed);
    }

    /// Requests that an HTTP client began anew, since nobody remembered them.
    pub(super) fn n_anew(&self) -> usize {
        self.n_anew.load(Ordering::Relaxed)
    }

    /// Prints what they saw; true when every answer was right.
    pub(super) fn say(&self) -> bool {
        let count = |n: &AtomicUsize| n.load(Ordering::Relaxed);
        let (n, n_failed, n_other) = (count(&self.n_answers), count(&self.n_failed), count(&self.n_other));
        println!("failed: {n_failed} of {n} requests");
        println!("token ids not as undisturbed: {n_other} of {n}");
        println!("begun anew over HTTP, since nobody remembered them: {}", self.n_anew());
        let mut pauses = self.pauses.lock().expect("no client panics");
        let (p50, p99) = percentiles(&mut pauses);
        let longest = pauses.last().copied().unwrap_or_default().as_millis();
        println!("longest pause of an answer: p50 {p50} ms, p99 {p99} ms, longest {longest} ms");
        n_failed == 0 && n_other == 0
    }
}

// === impl Http ===

impl Http<'_> {
    /// Asks one node; when it refuses or the stream is cut, another one for the rest.
    fn ask(&self, client: usize, turn: usize, seen: &Seen) -> Streamed {
        let mut whole = Streamed::default();
        let mut progress = SystemClock.now();
        for attempt in turn.. {
            let asked = SystemClock.now();
            let url = &self.urls[attempt % self.urls.len()];
            let part = Streaming::at(url, self.key, self.body, whole.last_event.clone()).join();
            if !part.ids.is_empty() {
                if !whole.ids.is_empty() {
                    whole.gaps.push(asked - progress + part.first);
                }
                progress = SystemClock.now();
            }
            whole.ids.extend(part.ids);
            whole.gaps.extend(part.gaps);
            (whole.finish, whole.error) = (part.finish, part.error);
            whole.last_event = part.last_event.or(whole.last_event);
            if whole.finish.is_some() {
                return Streamed { error: None, ..whole };
            }
            let is_gone = whole.error.as_ref().is_some_and(|error| error.contains("stream_gone"));
            if is_gone && attempt - turn >= self.urls.len() {
                // Nobody remembers it: what came of it is thrown away.
                seen.n_anew.fetch_add(1, Ordering::Relaxed);
                seen.got(client, &whole);
                whole = Streamed::default();
            }
            if progress.elapsed() > PATIENCE {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        whole
    }
}
