//! A disk that is full.

use model::info::Linear;
use tests::cluster::Cluster;
use tests::disk::{SmallDisk, again_with_mounts};
use tests::full_disk::{Load, fill_under_load};
use tests::operator::GENEROUS;
use tests::process::{NodeSpec, scratch};
use tests::tiny;

use crate::fleet::Fleet;

/// Room for what a node needs to start, and some megabytes.
const DISK_BYTES: u64 = 16 << 20;

#[test]
fn a_full_disk_costs_refusals_and_nothing_that_was_acknowledged() {
    let folder = scratch("full-disk");
    let Ok(disk) = SmallDisk::mount(&folder.join("data-b"), DISK_BYTES) else {
        let own = "disk::a_full_disk_costs_refusals_and_nothing_that_was_acknowledged";
        match again_with_mounts(&[own, "--exact", "--nocapture"]) {
            Some(status) => assert!(status.success(), "see above"),
            None => eprintln!("SKIPPED: a small disk cannot be mounted here"),
        }
        return;
    };
    let spec = NodeSpec::tiny(&folder).with(GENEROUS).with("[cluster]\ndrain_s = 0");
    let mut fleet = Fleet::of(Cluster::start(&folder, &spec, 3));
    let (keys, expected) = (fleet.keys.clone(), fleet.expected.clone());
    let bodies = (0..keys.len()).map(Fleet::body).collect();
    let load = Load { keys: &keys, bodies, expected: &expected, adapter: tiny::adapter(7, 4, &Linear::ALL) };
    let lines = fill_under_load(&mut fleet.cluster, &disk, 1, &load);
    let broken: Vec<_> = lines.iter().filter(|line| !line.holds).collect();
    assert!(broken.is_empty(), "{broken:#?}\nof {lines:#?}\n{}", fleet.cluster.logs());
}
