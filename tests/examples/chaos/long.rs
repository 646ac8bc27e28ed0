//! Troubles of every kind, one after the other, in an order that a seed decides, under clients that never stop asking.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::Value;
use shared::clock::{Clock, SystemClock};
use tests::cluster::{Cluster, Streamed, Streaming};
use tests::disk::SmallDisk;
use tests::network::Network;
use tests::process::{NodeProcess, scratch};

use super::{Bench, Dice, percentiles};

/// Clients of the library, and as many over HTTP.
const CLIENTS: usize = 6;
/// Before memory is read first: every client has asked.
const WARM_UP: Duration = Duration::from_secs(10);
/// A keeper bills what a dead node delivered so long after its last word, and a little.
const BILLED_AFTER: Duration = Duration::from_secs(75);
/// An HTTP client gives up after so long without progress.
const PATIENCE: Duration = Duration::from_secs(60);
/// What may be billed more or less than clients got: what was under way when a connection broke.
const BILLED_WITHIN: f64 = 0.01;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Kill,
    Freeze,
    Leave,
    Partition,
    Loss,
    Disk,
}

const TROUBLES: [Trouble; 6] =
    [Trouble::Kill, Trouble::Freeze, Trouble::Leave, Trouble::Partition, Trouble::Loss, Trouble::Disk];

/// What clients have seen.
#[derive(Default)]
struct Seen {
    n_answers: AtomicUsize,
    n_failed: AtomicUsize,
    n_other: AtomicUsize,
    n_anew: AtomicUsize,
    n_tokens: AtomicU64,
    pauses: Mutex<Vec<Duration>>,
}

/// A stream over HTTP whose client goes on elsewhere when it is cut.
struct Http<'a> {
    urls: &'a [String],
    key: &'a str,
    body: &'a Value,
}

pub(super) fn run(minutes: f64, seed: u64) -> bool {
    let folder = scratch("chaos-long");
    let disk = super::disk::mount(&folder);
    println!(
        "seed {seed}, {minutes} minutes, {}",
        if disk.is_some() { "a small disk at node b" } else { "no small disk" }
    );
    let Bench { mut cluster, network, keys, expected, n_tokens, prompt } =
        Bench::start_in(&folder, 2 * CLIENTS, 64, None);
    let bodies: Vec<Value> = (0..2 * CLIENTS).map(|n| super::body(n, n_tokens, prompt)).collect();
    let n_before: u64 = expected.iter().map(|ids| ids.len() as u64).sum();
    let urls: Vec<String> = cluster.nodes.iter().map(NodeProcess::url).collect();
    let (stop, seen) = (AtomicBool::new(false), Seen::default());
    let configs: Vec<_> = (0..CLIENTS).map(|n| cluster.library(n, &keys[n])).collect();
    let mut memory = Vec::new();
    let mut done = BTreeMap::<String, usize>::new();
    std::thread::scope(|scope| {
        for n in 0..2 * CLIENTS {
            let (stop, seen, key, body, expected) = (&stop, &seen, &keys[n], &bodies[n], &expected[n]);
            let (config, urls) = (configs.get(n), &urls);
            scope.spawn(move || {
                for turn in n.. {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let streamed = match config {
                        Some(config) => Streaming::by_library(config.clone(), body).join(),
                        None => Http { urls, key, body }.ask(turn, seen),
                    };
                    seen.take(n, &streamed, expected);
                }
            });
        }
        std::thread::sleep(WARM_UP);
        let started = SystemClock.now();
        let length = Duration::from_secs_f64(minutes * 60.0);
        memory.push(resident(&cluster.nodes));
        let mut dice = Dice(seed);
        while started.elapsed() < length {
            if memory.len() == 1 && started.elapsed() > length / 3 {
                memory.push(resident(&cluster.nodes));
            }
            let trouble = TROUBLES[dice.below(TROUBLES.len())];
            if trouble == Trouble::Disk && disk.is_none() {
                continue;
            }
            *done.entry(format!("{trouble:?}")).or_default() += 1;
            make(trouble, &mut dice, &mut cluster.nodes, &network, disk.as_ref());
            std::thread::sleep(Duration::from_millis(1000 + dice.below(2000) as u64));
        }
        memory.push(resident(&cluster.nodes));
        stop.store(true, Ordering::Relaxed);
    });
    println!("troubles: {done:?}");
    for (when, memory) in ["start", "a third", "end"].iter().zip(&memory) {
        println!("resident at {when}: {memory}");
    }
    let holds = seen.say() & is_billed(&cluster, n_before + seen.n_tokens.load(Ordering::Relaxed));
    let panics = cluster.logs().matches("panicked at").count();
    println!("panics in the nodes' logs: {panics}");
    if !holds || panics > 0 {
        println!("logs are in {}", folder.display());
    }
    holds && panics == 0
}

/// One trouble, from its beginning to its end: every node is well when this returns.
fn make(trouble: Trouble, dice: &mut Dice, nodes: &mut [NodeProcess], network: &Network, disk: Option<&SmallDisk>) {
    let victim = dice.below(nodes.len());
    let lasts = Duration::from_millis(1000 + dice.below(4000) as u64);
    match trouble {
        Trouble::Kill => {
            nodes[victim].kill();
            std::thread::sleep(lasts / 2);
            nodes[victim].restart();
        }
        Trouble::Freeze => {
            nodes[victim].signal("STOP");
            std::thread::sleep(lasts);
            nodes[victim].signal("CONT");
        }
        Trouble::Leave => {
            nodes[victim].signal("TERM");
            nodes[victim].wait();
            nodes[victim].restart();
        }
        Trouble::Partition => {
            let other = (victim + 1) % nodes.len();
            network.cut(victim, other, true);
            std::thread::sleep(lasts);
            network.cut(victim, other, false);
        }
        Trouble::Loss => {
            network.make_bad(0.05, Duration::from_millis(5));
            std::thread::sleep(lasts);
            network.make_bad(0.0, Duration::ZERO);
        }
        Trouble::Disk => {
            if let Some(disk) = disk {
                disk.fill();
                std::thread::sleep(lasts);
                disk.free();
            }
        }
    }
    nodes.iter_mut().for_each(NodeProcess::wait_ready);
}

// === impl Seen ===

impl Seen {
    fn take(&self, n: usize, streamed: &Streamed, expected: &[u32]) {
        self.n_answers.fetch_add(1, Ordering::Relaxed);
        self.n_tokens.fetch_add(streamed.ids.len() as u64, Ordering::Relaxed);
        if streamed.error.is_some() || streamed.finish.is_none() {
            self.n_failed.fetch_add(1, Ordering::Relaxed);
            println!("  client {n}: {:?} after {} tokens", streamed.error, streamed.ids.len());
        } else if streamed.ids != expected {
            self.n_other.fetch_add(1, Ordering::Relaxed);
            println!("  client {n}: {} tokens, not the expected {}", streamed.ids.len(), expected.len());
        }
        self.pauses.lock().expect("no client panics").extend(streamed.gaps.iter().max());
    }

    fn say(&self) -> bool {
        let count = |n: &AtomicUsize| n.load(Ordering::Relaxed);
        let (n, n_failed, n_other) = (count(&self.n_answers), count(&self.n_failed), count(&self.n_other));
        println!("failed: {n_failed} of {n} requests");
        println!("token ids not as undisturbed: {n_other} of {n}");
        println!("begun anew over HTTP, since nobody remembered them: {}", count(&self.n_anew));
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
    fn ask(&self, turn: usize, seen: &Seen) -> Streamed {
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
                seen.n_tokens.fetch_add(whole.ids.len() as u64, Ordering::Relaxed);
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

/// Resident memory of every process, in MiB; a young process has little.
fn resident(nodes: &[NodeProcess]) -> String {
    let of = |node: &NodeProcess| format!("{} {} MiB", node.name(), node.resident_bytes() >> 20);
    nodes.iter().map(of).collect::<Vec<_>>().join(", ")
}

/// What nodes delivered that died is billed by others, later.
fn is_billed(cluster: &Cluster, n_delivered: u64) -> bool {
    println!("waiting {} s for the bills of nodes that died", BILLED_AFTER.as_secs());
    std::thread::sleep(BILLED_AFTER);
    let billed = cluster.billed();
    let off = billed as f64 / n_delivered.max(1) as f64 - 1.0;
    println!("tokens billed: {billed} of {n_delivered} that clients got ({:+.3} %)", off * 100.0);
    off.abs() <= BILLED_WITHIN
}
