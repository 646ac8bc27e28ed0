//! A rolling upgrade, under load, from a program that speaks only the wire version before to this one, half of the way
//! back, and on. `TENANTRY_BIN` is the old program, `TENANTRY_NEW_BIN` the new one; `scripts/chaos/nodes` builds both.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tests::cluster::{Cluster, Streamed, Streaming};
use tests::process::{binary, scratch};

use super::clients::under_clients;
use super::{Bench, CLIENTS};

/// Long enough for every stream to end where it began: the old program repeats tokens to clients that come back elsewhere
/// with `Last-Event-ID`, whatever program is there.
const DRAIN_S: u32 = 60;
/// Clients ask so long before and after a node is replaced.
const AROUND: Duration = Duration::from_secs(2);
/// Streams through one node and the node that is killed under them.
const KILLS: [(usize, usize); 2] = [(0, 2), (2, 1)];

pub(super) fn run(n_streams: usize, n_tokens: u64) -> bool {
    let new = PathBuf::from(std::env::var_os("TENANTRY_NEW_BIN").expect("TENANTRY_NEW_BIN names the new program"));
    let old = binary();
    let mut bench = Bench::start_with(&scratch("chaos-upgrade"), DRAIN_S, n_streams.max(CLIENTS), n_tokens, None);
    let mut holds = true;
    for (node, program, what) in
        [(2, &new, "new"), (0, &new, "new"), (0, &old, "old again"), (0, &new, "new"), (1, &new, "new")]
    {
        println!("node {node} gets the program that is {what}, under {} clients", bench.keys.len());
        let seen = under_clients(&mut bench, 0, |cluster, _| {
            std::thread::sleep(AROUND);
            replace(cluster, node, program);
            std::thread::sleep(AROUND);
        });
        holds &= seen.say();
        for (door, victim) in KILLS {
            holds &= kill(&mut bench, door, victim);
        }
    }
    // The old program does not say which version it speaks; the new one ends its line of every connection with it.
    let logs = bench.cluster.logs();
    let said = |line: &&str| line.contains("connected to a peer") && line.contains("version");
    let n_lines = |version: char| logs.lines().filter(said).filter(|line| line.ends_with(version)).count();
    let (v1, v2) = (n_lines('1'), n_lines('2'));
    println!("connections of new programs: {v1} in wire version 1, {v2} in version 2");
    holds & bench.bills(0) & (v1 > 0 && v2 > 0)
}

/// SIGTERM, then the other program.
fn replace(cluster: &mut Cluster, node: usize, program: &Path) {
    let node = &mut cluster.nodes[node];
    node.signal("TERM");
    let status = node.wait();
    println!("node {} ended with {status}", node.name());
    node.run_next(program);
    node.restart();
    node.wait_ready();
}

/// kill -9 of a node in mid-stream.
fn kill(bench: &mut Bench, door: usize, victim: usize) -> bool {
    let streams = bench.streams(door);
    while streams.iter().map(Streaming::n_tokens).sum::<usize>() < streams.len() * bench.n_tokens as usize / 4 {
        std::thread::sleep(Duration::from_millis(1));
    }
    let n_there = bench.n_running(victim);
    bench.cluster.nodes[victim].kill();
    let streamed: Vec<Streamed> = streams.into_iter().map(Streaming::join).collect();
    bench.cluster.nodes[victim].restart();
    bench.cluster.nodes[victim].wait_ready();
    streamed.iter().enumerate().for_each(|(n, one)| bench.count(n, one.ids.len() as u64));
    let n_failed = streamed.iter().filter(|one| one.error.is_some() || one.finish.is_none()).count();
    let n_equal = streamed.iter().zip(&bench.expected).filter(|(one, expected)| one.ids == **expected).count();
    let n = streamed.len();
    println!(
        "kill -9 of node {victim}, where {n_there} of {n} streams through node {door} ran: failed {n_failed}, as undisturbed {n_equal}"
    );
    n_failed == 0 && n_equal == n
}
