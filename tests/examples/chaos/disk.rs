//! A full disk at one node, with the real model: a line per invariant.

use std::path::Path;

use model::adapter::AdapterFiles;
use tests::disk::{SmallDisk, again_with_mounts};
use tests::full_disk::{Load, fill_under_load};

use super::Bench;

/// Room for what a node needs, and some megabytes.
const DISK_BYTES: u64 = 32 << 20;
/// The node whose disk it is.
const FULL: usize = 1;

/// A small disk for node `b` below a cluster's folder. `None` where none can be had, and it is not worth starting
/// again.
pub(super) fn mount(folder: &Path) -> Option<SmallDisk> {
    SmallDisk::mount(&folder.join("data-b"), DISK_BYTES).ok()
}

pub(super) fn run(n_streams: usize, n_tokens: u64) -> bool {
    let folder = tests::process::scratch("chaos");
    let Some(disk) = mount(&folder) else {
        let words: Vec<String> = std::env::args().skip(1).collect();
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let Some(status) = again_with_mounts(&words) else {
            eprintln!("no small disk can be mounted here; hint: run as root, or allow user namespaces");
            return false;
        };
        return status.success();
    };
    let mut bench = Bench::start_in(&folder, n_streams, n_tokens, None);
    let read = |name: &str| std::fs::read(tests::data("adapters/brightcart").join(name)).expect("committed data");
    let adapter =
        AdapterFiles::Peft { config: read("adapter_config.json"), weights: read("adapter_model.safetensors") };
    let bodies = (0..n_streams).map(|n| bench.body(n)).collect();
    let (keys, expected) = (bench.keys.clone(), bench.expected.clone());
    let load = Load { keys: &keys, bodies, expected: &expected, adapter };
    let lines = fill_under_load(&mut bench.cluster, &disk, FULL, &load);
    lines.iter().for_each(|line| println!("{} {}", if line.holds { "held  " } else { "BROKEN" }, line.what));
    lines.iter().all(|line| line.holds)
}
