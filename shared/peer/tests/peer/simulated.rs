//! The same code on a simulated network: lost packets, and a peer that crashes and comes back, from a seed.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use peer::{EndpointParts, Identity, PeerNet, serve};
use shared::clock::{Clock, SystemClock};
use shared::request::{Emitted, EmittedChoice};
use simnet::SimSocket;

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

async fn parts(seed: u8) -> EndpointParts {
    let socket = SimSocket::bind(PORT).await.expect("the port is free");
    EndpointParts { socket, runtime: Arc::new(quinn::TokioRuntime), rng_seed: Some([seed; 32]) }
}

fn net(identity: &Identity, other: &str, address: std::net::IpAddr, parts: EndpointParts) -> PeerNet {
    let config = config(identity.node.as_str(), &[(other, (address, PORT).into())], Arc::new(SimClock));
    PeerNet::new(identity, config, parts).expect("an endpoint")
}

/// One stream to its end, going on from what is there whenever the peer is lost. Returns the number of attempts.
async fn stream(net: PeerNet) -> u32 {
    let mut tokens = Vec::new();
    for attempt in 1.. {
        let emitted = Emitted(vec![EmittedChoice { tokens: tokens.clone(), finished: false }]);
        let asked = net.start(&node("b"), &start(&SimClock, N_TOKENS, attempt, emitted), Duration::from_secs(1)).await;
        let Ok(mut exchange) = asked else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // No progress for a second is a lost peer, too: this test has no failure detector.
        while let Ok(Ok(Some(answer))) = tokio::time::timeout(Duration::from_secs(1), exchange.recv()).await {
            match token_of(&answer, tokens.len() as u32) {
                Some(id) => tokens.push(id),
                None => {
                    assert!(tokens.iter().copied().eq((0..N_TOKENS).map(token)), "the tokens of an undisturbed run");
                    return attempt;
                }
            }
        }
    }
    unreachable!("it tries until it has all")
}

/// Attempts in all, and simulated time taken.
fn run(folder: &Folder, seed: u64) -> (u32, Duration) {
    let (a, b) = (join(&folder.0, "a"), join(&folder.0, "b"));
    let mut sim = turmoil::Builder::new()
        .rng_seed(seed)
        .simulation_duration(Duration::from_secs(60))
        .tick_duration(Duration::from_millis(1))
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(5))
        .fail_rate(0.01)
        .repair_rate(0.5)
        .udp_capacity(100_000)
        .build();
    let b = Rc::new(b);
    sim.host("b", move || {
        let identity = b.clone();
        async move {
            let net = net(&identity, "a", turmoil::lookup("a"), parts(2).await);
            let echo = Echo { pause: Some(Duration::from_millis(50)), ..Echo::default() };
            serve(net.clone(), Arc::new(echo)).await;
            Ok(())
        }
    });
    let attempts = Rc::new(RefCell::new((0, Duration::ZERO)));
    let result = attempts.clone();
    sim.client("a", async move {
        let net = net(&a, "b", turmoil::lookup("b"), parts(1).await);
        let streams: Vec<_> = (0..N_STREAMS).map(|_| tokio::task::spawn_local(stream(net.clone()))).collect();
        for stream in streams {
            result.borrow_mut().0 += stream.await.expect("no panic");
        }
        result.borrow_mut().1 = turmoil::elapsed();
        Ok(())
    });
    let mut crashed = false;
    let mut bounced = false;
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
    *attempts.borrow()
}

#[test]
fn streams_survive_loss_and_a_crash_of_the_peer() {
    let folder = Folder::new();
    for seed in 0..10 {
        let (attempts, took) = run(&folder, seed);
        assert!(attempts >= 2 * N_STREAMS as u32, "seed {seed}: every stream met the crash, {attempts} attempts");
        assert!(took < Duration::from_secs(15), "seed {seed}: {took:?}");
    }
}
