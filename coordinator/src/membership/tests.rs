//! Several memberships that hear one another, in a world without a network.

use proptest::prelude::*;

use super::*;
use crate::testing::{now, spec_of_node};

const INTERVAL: Duration = Duration::from_millis(100);

/// Nodes n0, n1, … that all hear one another unless told otherwise.
struct World {
    now: Instant,
    nodes: BTreeMap<NodeId, Membership>,
    silent: Vec<NodeId>,
    lives: u64,
    n: usize,
}

fn id(i: usize) -> NodeId {
    format!("n{i}").parse().expect("valid name")
}

impl World {
    fn new(n: usize) -> Self {
        let mut world = Self { now: now(), nodes: BTreeMap::new(), silent: Vec::new(), lives: 0, n };
        (0..n).for_each(|i| world.start(i));
        world
    }

    fn start(&mut self, i: usize) {
        self.lives += 1;
        let own = Own { incarnation: self.lives, phase: NodePhase::Serving, load: NodeLoad::default() };
        let specs = (0..self.n).map(|i| spec_of_node(&id(i), 1)).collect();
        let membership = Membership::new(self.now, &id(i), own, specs, DetectorRules::with_interval(INTERVAL));
        self.nodes.insert(id(i), membership);
    }

    fn run(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now += INTERVAL;
            let beats: Vec<(NodeId, Heartbeat)> =
                self.nodes.iter_mut().map(|(id, node)| (id.clone(), node.heartbeat(self.now))).collect();
            for (from, beat) in beats.iter().filter(|(from, _)| !self.silent.contains(from)) {
                for (_, node) in self.nodes.iter_mut().filter(|(to, _)| *to != from && !self.silent.contains(to)) {
                    node.on_heartbeat(self.now, from, *beat);
                }
            }
            self.nodes.values_mut().for_each(|node| _ = node.on_tick(self.now));
        }
    }

    fn seen(&self, by: usize, of: usize) -> Member {
        self.nodes[&id(by)].view().members[&id(of)].clone()
    }

    fn epoch(&self, by: usize) -> u64 {
        self.nodes[&id(by)].view().epoch
    }
}

#[test]
fn nodes_that_start_together_share_alike_at_once() {
    let mut world = World::new(3);
    world.run(1000);
    for (by, of) in [(0, 1), (1, 2), (2, 0), (0, 0)] {
        assert!(world.seen(by, of).takes_requests());
        assert_eq!(world.seen(by, of).share, SHARE_PARTS);
    }
    let epochs: Vec<u64> = (0..3).map(|by| world.epoch(by)).collect();
    world.run(60_000);
    assert_eq!(epochs, (0..3).map(|by| world.epoch(by)).collect::<Vec<_>>(), "a quiet cluster has no news");
}

#[test]
fn a_restart_keeps_the_place_in_the_ring_and_returns_in_quarters() {
    let mut world = World::new(3);
    world.run(60_000);
    world.nodes.remove(&id(2));
    world.run(700);
    assert_eq!(world.seen(0, 2).health, Health::Dead);
    assert_eq!(world.seen(0, 2).share, SHARE_PARTS, "its tenants go to their successors, the ring stays");
    world.run(1000);
    world.start(2);
    world.run(1000);
    assert!(world.seen(0, 2).takes_requests());
    let shares: Vec<u32> = (0..4)
        .map(|_| {
            let share = world.seen(0, 2).share;
            world.run(10_000);
            share
        })
        .collect();
    assert_eq!(shares, [1, 2, 3, 4]);
    assert_eq!(world.seen(2, 2).share, SHARE_PARTS, "the newcomer sees it as the others do");
}

#[test]
fn a_node_dead_for_long_leaves_the_ring() {
    let mut world = World::new(3);
    world.run(2000);
    world.nodes.remove(&id(2));
    world.run(12_000);
    assert_eq!(world.seen(0, 2).share, 0);
}

#[test]
fn a_node_that_never_came_has_no_place() {
    let mut world = World::new(3);
    world.nodes.remove(&id(1));
    world.run(5000);
    assert_eq!((world.seen(0, 1).health, world.seen(0, 1).share), (Health::Absent, 0));
}

#[test]
fn draining_is_seen_within_one_heartbeat_and_raises_the_epoch() {
    let mut world = World::new(2);
    world.run(2000);
    let epoch = world.epoch(0);
    let node = world.nodes.get_mut(&id(1)).expect("runs");
    assert!(node.say(NodePhase::Draining, NodeLoad::default()));
    world.run(100);
    assert!(!world.seen(0, 1).takes_requests());
    assert!(world.epoch(0) > epoch);
}

#[test]
fn suspicion_and_load_are_seen_without_a_new_epoch() {
    let mut world = World::new(2);
    world.run(2000);
    let epoch = world.epoch(0);
    let load = NodeLoad { running: 3, places: 8, waiting: 1 };
    world.nodes.get_mut(&id(1)).expect("runs").say(NodePhase::Serving, load);
    world.run(100);
    assert_eq!(world.seen(0, 1).load, load);
    world.silent.push(id(1));
    world.run(400);
    assert_eq!(world.seen(0, 1).health, Health::Suspect);
    assert_eq!(world.epoch(0), epoch);
}

#[test]
fn a_node_that_was_stopped_for_seconds_blames_nobody() {
    let mut world = World::new(3);
    world.run(2000);
    let mut stopped = world.nodes.remove(&id(0)).expect("runs");
    world.run(5000);
    stopped.on_tick(world.now);
    assert!(stopped.view().members[&id(1)].takes_requests());
    assert_eq!(world.seen(1, 0).health, Health::Dead, "but it was dead for the others");
}

#[test]
fn a_node_flapping_for_a_minute_causes_at_most_six_epochs() {
    let mut world = World::new(3);
    world.run(60_000);
    let epoch = world.epoch(0);
    for _ in 0..30 {
        world.silent.push(id(2));
        world.run(1000);
        world.silent.clear();
        world.run(1000);
    }
    assert!(world.epoch(0) - epoch <= 6, "{} epochs", world.epoch(0) - epoch);
}

#[test]
fn heartbeats_of_strangers_change_nothing() {
    let mut world = World::new(2);
    world.run(1000);
    let before = world.nodes[&id(0)].view();
    let stranger = Heartbeat { epoch: u64::MAX - 1, ..crate::testing::beat(7) };
    world.nodes.get_mut(&id(0)).expect("runs").on_heartbeat(world.now, &id(9), stranger);
    world.run(100);
    assert_eq!(world.nodes[&id(0)].view(), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// I7, and after quiet time everyone alive is seen by everyone alive.
    #[test]
    fn epochs_never_fall_and_views_agree_in_the_end(steps in proptest::collection::vec((0_usize..4, 0_u8..4, 1_u64..20), 1..30)) {
        let mut world = World::new(4);
        let mut epochs = BTreeMap::<(usize, u64), u64>::new();
        for (node, act, time) in steps {
            match act {
                0 => { world.nodes.remove(&id(node)); }
                1 if !world.nodes.contains_key(&id(node)) => world.start(node),
                2 => world.silent.push(id(node)),
                _ => world.silent.clear(),
            }
            world.run(time * 100);
            for by in (0..4).filter(|by| world.nodes.contains_key(&id(*by))) {
                let life = world.nodes[&id(by)].own.incarnation;
                let last = epochs.insert((by, life), world.epoch(by)).unwrap_or_default();
                prop_assert!(world.epoch(by) >= last);
            }
        }
        world.silent.clear();
        world.run(100_000);
        let living: Vec<usize> = (0..4).filter(|i| world.nodes.contains_key(&id(*i))).collect();
        for by in &living {
            for of in 0..4 {
                let seen = world.seen(*by, of);
                prop_assert_eq!(seen.takes_requests(), living.contains(&of));
                prop_assert_eq!(seen.share, if living.contains(&of) { SHARE_PARTS } else { 0 });
            }
        }
    }
}
