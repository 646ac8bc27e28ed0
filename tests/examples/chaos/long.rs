//! Troubles of every kind, one after the other, in an order that a seed decides, under clients that never stop asking.

use std::collections::BTreeMap;
use std::time::Duration;

use shared::clock::{Clock, SystemClock};
use tests::disk::SmallDisk;
use tests::process::{NodeProcess, scratch};

use super::clients::under_clients;
use super::{Bench, Dice, Wires};

/// Clients of the library, and as many over HTTP.
const CLIENTS: usize = 6;
/// Before memory is read first: every client has asked.
const WARM_UP: Duration = Duration::from_secs(10);
/// Part of what clients got that may be billed beyond it or not at all: what was under way when a connection broke.
const BILLED_WITHIN: f64 = 0.01;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Kill,
    Freeze,
    Leave,
    Partition,
    OneWay,
    Loss,
    Disk,
}

const TROUBLES: [Trouble; 7] =
    [Trouble::Kill, Trouble::Freeze, Trouble::Leave, Trouble::Partition, Trouble::OneWay, Trouble::Loss, Trouble::Disk];

pub(super) fn run(minutes: f64, seed: u64) -> bool {
    let folder = scratch("chaos-long");
    let disk = super::disk::mount(&folder);
    println!(
        "seed {seed}, {minutes} minutes, {}",
        if disk.is_some() { "a small disk at node b" } else { "no small disk" }
    );
    let mut bench = Bench::start_in(&folder, 2 * CLIENTS, 64, None);
    let mut memory = Vec::new();
    let mut done = BTreeMap::<String, usize>::new();
    let seen = under_clients(&mut bench, CLIENTS, |cluster, wires| {
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
            make(trouble, &mut dice, &mut cluster.nodes, wires, disk.as_ref());
            std::thread::sleep(Duration::from_millis(1000 + dice.below(2000) as u64));
        }
        memory.push(resident(&cluster.nodes));
    });
    println!("troubles: {done:?}");
    for (when, memory) in ["start", "a third", "end"].iter().zip(&memory) {
        println!("resident at {when}: {memory}");
    }
    let n_got: u64 = bench.got.values().sum();
    let holds = seen.say() & bench.bills((n_got as f64 * BILLED_WITHIN) as u64);
    let panics = bench.cluster.logs().matches("panicked at").count();
    println!("panics in the nodes' logs: {panics}");
    if !holds || panics > 0 {
        println!("logs are in {}", folder.display());
    }
    holds && panics == 0
}

/// One trouble, from its beginning to its end: every node is well when this returns.
fn make(trouble: Trouble, dice: &mut Dice, nodes: &mut [NodeProcess], wires: &Wires, disk: Option<&SmallDisk>) {
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
            wires.cut(victim, other, true);
            std::thread::sleep(lasts);
            wires.cut(victim, other, false);
        }
        Trouble::OneWay => {
            let other = (victim + 1) % nodes.len();
            wires.cut_one_way(victim, other, true);
            std::thread::sleep(lasts);
            wires.cut_one_way(victim, other, false);
        }
        Trouble::Loss => {
            wires.make_bad(0.05, Duration::from_millis(5));
            std::thread::sleep(lasts);
            wires.make_bad(0.0, Duration::ZERO);
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

/// Resident memory of every process, in MiB; a young process has little.
fn resident(nodes: &[NodeProcess]) -> String {
    let of = |node: &NodeProcess| format!("{} {} MiB", node.name(), node.resident_bytes() >> 20);
    nodes.iter().map(of).collect::<Vec<_>>().join(", ")
}
