//! The same code on a simulated network: packets that are lost, late, doubled and out of order, and a peer that crashes
//! and comes back, from a seed.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use peer::{EndpointParts, Identity, PeerNet, serve};
use shared::clock::{Clock, SystemClock};
use shared::request::{Emitted, EmittedChoice};
use simnet::{SimSocket, Weather};

use crate::fixture::{Echo, Folder, config, join, node, start, token, token_of};

const PORT: u16 = 7080;
const N_STREAMS: usize = 8;
const N_TOKENS: u32 = 60;

/// Simulated time.
struct SimClock;

impl Clock for SimClock {
    fn now(&self) -> Instant {
        tokio::time::Instant::now().into_std()
    }

    fn wall(&self) -> Duration {
        SystemClock.wall()
    }
}

/// What happens during a run.
#[derive(Debug, Clone, Copy)]
struct Disturbance {
    seed: u64,
    /// Share of packets that are lost; as many arrive twice.
    loss: f64,
    /// Each packet takes from 1 to as many milliseconds, so they overtake each other.
    latency_ms_max: u64,
    /// The peer crashes after a second and a half and is back a second later.
    crash: bool,
}

/// What came of it.
#[derive(Debug, Default, Clone, Copy)]
struct Outcome {
    /// At all streams together.
    n_attempts: u32,
    /// How often a connected to b.
    n_connections: usize,
    took: Duration,
}

async fn parts(number: u8, disturbance: Disturbance) -> EndpointParts {
    let Disturbance { seed, loss, .. } = disturbance;
    let weather = Weather { loss, duplicates: loss, seed: seed << 8 | u64::from(number) };
    let socket = SimSocket::bind_in(PORT, weather).await.expect("the port is free");
    EndpointParts { socket, runtime: Arc::new(quinn::TokioRuntime), rng_seed: Some([number; 32]) }
}

fn net(identity: &Identity, other: &str, address: std::net::IpAddr, parts: EndpointParts) -> PeerNet {
    let config = config(identity.node.as_str(), &[(other, (address, PORT).into())], Arc::new(SimClock));
    PeerNet::new(identity, config, parts).expect("an endpoint")
}

/// One stream to its end, going on from what is there whenever the peer is lost. Returns how often it was taken on.
async fn stream(net: PeerNet) -> u32 {
    let (mut tokens, mut n_attempts) = (Vec::new(), 0);
    for attempt in 1.. {
        let emitted = Emitted(vec![EmittedChoice { tokens: tokens.clone(), finished: false }]);
        let asked = net.start(&node("b"), &start(&SimClock, N_TOKENS, attempt, emitted), Duration::from_secs(1)).await;
        let Ok(mut exchange) = asked else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        n_attempts += 1;
        // No progress for a second is a lost peer, too: this test has no failure detector.
        while let Ok(Ok(Some(answer))) = tokio::time::timeout(Duration::from_secs(1), exchange.recv()).await {
            match token_of(&answer, tokens.len() as u32) {
                Some(id) => tokens.push(id),
                None => {
                    assert!(tokens.iter().copied().eq((0..N_TOKENS).map(token)), "the tokens of an undisturbed run");
                    return n_attempts;
                }
            }
        }
    }
    unreachable!("it tries until it has all")
}

fn run(folder: &Folder, disturbance: Disturbance) -> Outcome {
    let (a, b) = (join(&folder.0, "a"), join(&folder.0, "b"));
    let mut sim = turmoil::Builder::new()
        .rng_seed(disturbance.seed)
        .simulation_duration(Duration::from_secs(90))
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(disturbance.latency_ms_max))
        // Links that break for a while.
        .fail_rate(if disturbance.crash { 0.01 } else { 0.0 })
        .repair_rate(0.5)
        .udp_capacity(100_000)
        .build();
    let b = Rc::new(b);
    let echo = Arc::new(Echo { pause: Some(Duration::from_millis(50)), ..Echo::default() });
    let served = echo.clone();
    sim.host("b", move || {
        let (identity, echo) = (b.clone(), served.clone());
        async move {
            let net = net(&identity, "a", turmoil::lookup("a"), parts(2, disturbance).await);
            serve(net.clone(), echo).await;
            Ok(())
        }
    });
    let outcome = Rc::new(RefCell::new(Outcome::default()));
    let result = outcome.clone();
    sim.client("a", async move {
        let net = net(&a, "b", turmoil::lookup("b"), parts(1, disturbance).await);
        let streams: Vec<_> = (0..N_STREAMS).map(|_| tokio::task::spawn_local(stream(net.clone()))).collect();
        for stream in streams {
            result.borrow_mut().n_attempts += stream.await.expect("no panic");
        }
        let mut outcome = result.borrow_mut();
        (outcome.took, outcome.n_connections) = (turmoil::elapsed(), echo.hellos.load(Ordering::SeqCst));
        Ok(())
    });
    let (mut crashed, mut bounced) = (!disturbance.crash, !disturbance.crash);
    while !sim.step().expect("no host fails") {
        if !crashed && sim.elapsed() > Duration::from_millis(1500) {
            crashed = true;
            sim.crash("b");
        }
        if !bounced && sim.elapsed() > Duration::from_millis(2500) {
            bounced = true;
            sim.bounce("b");
        }
    }
    assert!(crashed && bounced, "the run is longer than the disturbance");
    *outcome.borrow()
}

#[test]
fn streams_survive_loss_and_a_crash_of_the_peer() {
    let folder = Folder::new();
    for seed in 0..10 {
        let outcome = run(&folder, Disturbance { seed, loss: 0.01, latency_ms_max: 5, crash: true });
        let n_attempts = outcome.n_attempts;
        assert!(n_attempts >= 2 * N_STREAMS as u32, "seed {seed}: every stream met the crash, {n_attempts} attempts");
        assert!(outcome.took < Duration::from_secs(15), "seed {seed}: {outcome:?}");
    }
}

/// P3: what the network does to packets is no failure and, up to one in twenty lost, no loss of the peer.
#[test]
fn streams_survive_a_bad_network_without_losing_the_peer() {
    let folder = Folder::new();
    for (loss, latency_ms_max) in [(0.01, 20), (0.05, 20), (0.01, 200), (0.05, 200), (0.2, 20), (0.2, 200)] {
        let (mut n_attempts, mut n_connections, mut longest) = (0, 0, Duration::ZERO);
        let seeds = 0..5;
        for seed in seeds.clone() {
            let outcome = run(&folder, Disturbance { seed, loss, latency_ms_max, crash: false });
            n_attempts += outcome.n_attempts;
            n_connections += outcome.n_connections;
            longest = longest.max(outcome.took);
        }
        println!(
            "loss {:.0} %, 1-{latency_ms_max} ms: {} streams, {n_attempts} attempts, {n_connections} connections in {} \
             runs, longest {:.1} s",
            100.0 * loss,
            seeds.end as usize * N_STREAMS,
            seeds.end,
            longest.as_secs_f64()
        );
        if loss <= 0.05 {
            assert_eq!(n_connections, seeds.end as usize, "the peer was lost where it was only slow");
            assert_eq!(n_attempts as usize, seeds.end as usize * N_STREAMS, "a stream stood still for a second");
        }
        assert!(longest < Duration::from_secs(60), "{longest:?}");
    }
}
