//! What a heartbeat costs on the network: one node and many others in this process, each telling the one and told by it
//! ten times a second, over the nodes' own QUIC on loopback. Prints the CPU time of one heartbeat, sent and heard.
//!
//! `cargo run --release --package peer --example heartbeats -- [OTHERS] [SECONDS]`

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use peer::net::PeerNetConfig;
use peer::{Authority, EndpointParts, EventSink, Identity, PeerNet, PeerService};
use shared::clock::{Clock, SystemClock};
use shared::cluster::{Heartbeat, NodeLoad, NodePhase};
use shared::error::RequestError;
use shared::id::NodeId;
use wire::node::{Hello, Request, Response, Start};

/// Counts heartbeats.
#[derive(Default)]
struct Ear(AtomicU64);

impl PeerService for Ear {
    async fn call(&self, _: NodeId, _: Request) -> Response {
        Response::Refused(RequestError::internal())
    }

    async fn start(&self, _: NodeId, _: Start, _: EventSink) {}

    fn heartbeat(&self, _: &NodeId, _: Heartbeat) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn hello(&self, _: &NodeId, _: &Hello) {}
}

fn name(i: usize) -> NodeId {
    format!("n{i}").parse().expect("a valid name")
}

/// User and system time of this process, in seconds.
fn cpu_s() -> f64 {
    let text = std::fs::read_to_string("/proc/self/stat").expect("linux");
    let (_, fields) = text.rsplit_once(')').expect("the name stands in brackets");
    let ticks = |i: usize| fields.split_whitespace().nth(i).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    // A tick is a hundredth of a second on every Linux.
    (ticks(11) + ticks(12)) / 100.0
}

fn opened(folder: &Path, i: usize, at: &[(NodeId, SocketAddr)], parts: EndpointParts, ear: &Arc<Ear>) -> PeerNet {
    let data = folder.join(format!("n{i}"));
    let authority = Authority::found(&folder.join("ca"), &[], SystemClock.wall()).expect("an authority");
    authority.admit_here(&name(i), &data, SystemClock.wall()).expect("let in");
    let identity = Identity::load(name(i), &data).expect("an identity");
    let peers = at.iter().filter(|(other, _)| *other != name(i)).cloned().collect();
    let hello = Hello::new("model".into(), name(i), 1, Vec::new());
    let config = PeerNetConfig { hello, peers, clock: Arc::new(SystemClock), authority: None };
    let net = PeerNet::new(&identity, config, parts).expect("an endpoint");
    tokio::spawn(peer::serve(net.clone(), ear.clone()));
    net
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut words = std::env::args().skip(1).filter_map(|word| word.parse::<usize>().ok());
    let (others, seconds) = (words.next().unwrap_or(60), words.next().unwrap_or(10));
    let folder = std::env::temp_dir().join(format!("tenantry-heartbeats-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let parts: Vec<EndpointParts> =
        (0..=others).map(|_| EndpointParts::bind(([127, 0, 0, 1], 0).into()).expect("a free port")).collect();
    let at: Vec<(NodeId, SocketAddr)> =
        parts.iter().enumerate().map(|(i, parts)| (name(i), parts.socket.local_addr().expect("bound"))).collect();
    let ear = Arc::new(Ear::default());
    let nets: Vec<PeerNet> = parts
        .into_iter()
        .enumerate()
        .map(|(i, parts)| {
            // The others know only the one.
            let known = if i == 0 { &at[..] } else { &at[..1] };
            opened(&folder, i, known, parts, &ear)
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let load = NodeLoad { running: 3, places: 8, waiting: 0 };
    let idle_from = cpu_s();
    tokio::time::sleep(Duration::from_secs(5)).await;
    let idle_share = (cpu_s() - idle_from) / 5.0;
    let (begin, heard_before) = (cpu_s(), ear.0.load(Ordering::Relaxed));
    let mut tick = tokio::time::interval(Duration::from_millis(100));
    for seq in 1..=10 * seconds as u64 {
        tick.tick().await;
        let beat = Heartbeat { incarnation: 1, seq, uptime_ms: seq, epoch: 1, phase: NodePhase::Serving, load };
        for i in 1..=others {
            nets[0].datagram(&name(i), &beat);
            nets[i].datagram(&name(0), &beat);
        }
    }
    let heard = ear.0.load(Ordering::Relaxed) - heard_before;
    let spent_s = cpu_s() - begin;
    let one_us = spent_s * 1e6 / heard.max(1) as f64;
    let all = 2 * 10 * seconds as u64 * others as u64;
    println!(
        "{others} others, {seconds} s: {heard} of {all} heard, {one_us:.1} us of CPU for one, sent and heard; without \
         heartbeats {:.2} % of a core; a node of 1,000 would spend {:.0} % of a core",
        100.0 * idle_share,
        one_us * 9990.0 / 1e4
    );
    std::fs::remove_dir_all(&folder).expect("its own folder");
}
