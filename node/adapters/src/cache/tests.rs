//! Behaviour of the cache core: single cases, then random operations against its invariants.

use model::adapter::AdapterFiles;
use shared::clock::{Clock, ManualClock};

use super::*;

mod random;

pub(super) fn hash(n: usize) -> ContentHash {
    ContentHash::of(&n.to_le_bytes())
}

pub(super) fn owner() -> Owner {
    Owner { tenant: "acme".parse().expect("tenant") }
}

pub(super) fn packed(hash: ContentHash, bytes: usize) -> Arc<LoraAdapter> {
    Arc::new(LoraAdapter { hash, layers: Vec::new(), rank_max: 8, bytes })
}

pub(super) fn files(bytes: usize) -> Arc<HostFiles> {
    Arc::new(HostFiles::new(AdapterFiles::Gguf(vec![1; bytes])))
}

struct Bench {
    clock: ManualClock,
    core: CacheCore,
    leases: Vec<(ContentHash, u32, u64)>,
}

/// Size of the adapters here, packed and as files.
const BYTES: usize = 100;

impl Bench {
    fn new(slots: usize) -> Self {
        let config = CacheConfig { slots, engine_bytes: slots * BYTES, host_bytes: 0, loads_at_once: 2 };
        Self::with(config)
    }

    fn with(config: CacheConfig) -> Self {
        Self { clock: ManualClock::default(), core: CacheCore::new(config), leases: Vec::new() }
    }

    fn want(&mut self, n: usize) {
        let until = self.clock.now() + Duration::from_secs(60);
        self.core.want(self.clock.now(), hash(n), owner(), Urgency::Queued { until });
    }

    fn prewarm(&mut self, n: usize) {
        self.core.want(self.clock.now(), hash(n), owner(), Urgency::Prewarm);
    }

    fn prefer(&mut self, order: &[usize], drain: bool) {
        let order: Vec<ContentHash> = order.iter().map(|&n| hash(n)).collect();
        self.core.prefer(self.clock.now(), &order, drain);
    }

    /// The loads asked for since the last call.
    fn jobs(&mut self) -> Vec<LoadJob> {
        let commands = self.core.take_commands();
        commands
            .into_iter()
            .filter_map(|command| if let Command::Load(job) = command { Some(job) } else { None })
            .collect()
    }

    fn finish(&mut self, job: &LoadJob) {
        let packed = job.pack.then(|| packed(job.hash, BYTES));
        self.core.finished(self.clock.now(), job.hash, Ok(Loaded { files: files(BYTES), packed }));
    }

    /// Performs loads until none is asked for.
    fn settle(&mut self) {
        loop {
            let jobs = self.jobs();
            if jobs.is_empty() {
                return;
            }
            for job in &jobs {
                self.finish(job);
            }
        }
    }

    /// The queue's next pull finds nobody waiting.
    fn quiet(&mut self) {
        self.prefer(&[], false);
    }

    fn lease(&mut self, n: usize) -> bool {
        let CoreLease::Leased(adapter, slot, generation) = self.core.lease(&hash(n)) else { return false };
        assert_eq!(adapter.hash, hash(n));
        self.leases.push((hash(n), slot, generation));
        true
    }

    fn release(&mut self, n: usize) {
        let place = self.leases.iter().position(|held| held.0 == hash(n)).expect("leased");
        let (_, slot, generation) = self.leases.swap_remove(place);
        self.core.release(self.clock.now(), slot, generation);
    }

    /// Queues, loads, uses and leaves.
    fn visit(&mut self, n: usize) {
        self.want(n);
        self.quiet();
        self.settle();
        assert!(self.lease(n), "{n} is ready");
        self.release(n);
    }

    fn is_ready(&self, n: usize) -> bool {
        self.core.warmth(&hash(n)) == Warmth::Ready
    }
}

#[test]
fn a_queued_want_is_loaded_once_and_leased() {
    let mut b = Bench::new(4);
    b.want(1);
    b.want(1);
    assert_eq!(b.core.warmth(&hash(1)), Warmth::Loading);
    let jobs = b.jobs();
    assert_eq!(jobs.len(), 1, "single flight");
    b.want(1);
    assert_eq!(b.jobs().len(), 0);
    assert!(!b.lease(1));
    let epoch = b.core.epoch();
    b.finish(&jobs[0]);
    assert_eq!((b.core.warmth(&hash(1)), b.core.epoch()), (Warmth::Ready, epoch + 1));
    assert!(b.lease(1));
    b.want(1);
    let stats = b.core.stats();
    assert_eq!((stats.hits, stats.misses, stats.loads, stats.resident, stats.leased), (1, 3, 1, 1, 1));
}

#[test]
fn no_more_loads_run_at_once_than_allowed() {
    let mut b = Bench::new(8);
    for n in 0..6 {
        b.want(n);
    }
    let first = b.jobs();
    assert_eq!(first.iter().map(|job| job.hash).collect::<Vec<_>>(), [hash(0), hash(1)]);
    b.finish(&first[0]);
    assert_eq!(b.jobs().iter().map(|job| job.hash).collect::<Vec<_>>(), [hash(2)], "in order of asking");
}

#[test]
fn a_leased_adapter_stays_whatever_others_want() {
    let mut b = Bench::new(2);
    for n in 0..2 {
        b.want(n);
    }
    b.settle();
    assert!(b.lease(0) && b.lease(1));
    b.want(2);
    b.prefer(&[2, 0, 1], true);
    assert_eq!(b.core.warmth(&hash(2)), Warmth::NoSlot);
    assert_eq!(b.jobs().len(), 0);
    b.release(0);
    assert_eq!(
        (b.core.warmth(&hash(2)), b.is_ready(0)),
        (Warmth::Loading, false),
        "the drained slot goes to who waits"
    );
    b.settle();
    assert!(b.lease(2) && b.is_ready(1));
}

#[test]
fn who_waits_keeps_a_slot_until_the_queue_drains() {
    let mut b = Bench::new(2);
    for n in 0..2 {
        b.want(n);
    }
    b.settle();
    b.want(2);
    b.prefer(&[2, 0, 1], false);
    assert!(b.is_ready(0) && b.is_ready(1), "both are about to be used");
    b.prefer(&[2, 0, 1], true);
    assert!(b.is_ready(0) && !b.is_ready(1), "furthest back goes first");
    assert_eq!(b.core.warmth(&hash(2)), Warmth::Loading);
}

#[test]
fn what_was_just_asked_for_is_kept_until_the_queue_has_spoken() {
    let mut b = Bench::new(1);
    b.want(0);
    b.settle();
    b.want(1);
    assert!(b.is_ready(0), "its request has not been seen by the engine yet");
    // The queue does not know of a request for it any more: it was cancelled.
    b.prefer(&[1], false);
    assert_eq!((b.is_ready(0), b.core.warmth(&hash(1))), (false, Warmth::Loading));
}

#[test]
fn slots_are_given_in_the_queues_order_not_in_order_of_asking() {
    let mut b = Bench::new(1);
    b.want(0);
    b.settle();
    assert!(b.lease(0));
    for n in 1..5 {
        b.want(n);
    }
    b.prefer(&[3, 1, 2, 4], false);
    b.release(0);
    assert_eq!(b.jobs()[0].hash, hash(3));
}

#[test]
fn a_slots_generation_changes_with_its_adapter() {
    let mut b = Bench::new(1);
    b.visit(0);
    assert!(b.lease(0));
    let (_, slot, generation) = b.leases[0];
    b.release(0);
    b.visit(1);
    assert!(b.lease(1));
    assert_eq!(b.leases[0].1, slot);
    assert!(b.leases[0].2 > generation);
}

#[test]
fn one_off_visitors_do_not_push_out_adapters_in_daily_use() {
    let mut b = Bench::new(8);
    for n in 0..6 {
        b.visit(n);
        b.visit(n);
    }
    for visitor in 100..200 {
        b.visit(visitor);
    }
    assert_eq!((0..6).filter(|&n| b.is_ready(n)).count(), 6);
}

#[test]
fn yesterdays_favourites_make_way_for_todays() {
    let mut b = Bench::new(8);
    for n in 0..8 {
        b.visit(n);
        b.visit(n);
    }
    for _ in 0..4 {
        for n in 100..106 {
            b.visit(n);
            b.visit(n);
        }
    }
    assert_eq!((100..106).filter(|&n| b.is_ready(n)).count(), 6);
}

#[test]
fn prewarming_takes_free_slots_and_at_most_a_quarter() {
    let mut b = Bench::new(8);
    for n in 0..6 {
        b.visit(n);
        b.visit(n);
    }
    for n in 100..110 {
        b.prewarm(n);
    }
    b.settle();
    assert_eq!((100..110).filter(|&n| b.is_ready(n)).count(), 2);
    assert_eq!((0..6).filter(|&n| b.is_ready(n)).count(), 6);
    let stats = b.core.stats();
    assert_eq!((stats.hits, stats.misses), (6, 6), "pre-warming is not traffic");
}

#[test]
fn eighty_percent_of_traffic_on_a_fifth_of_the_tenants_hits_the_cache() {
    let mut b = Bench::new(15);
    let mut state = 1_u64;
    let mut below = |n: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % n
    };
    for _ in 0..20_000 {
        let n = if below(5) < 4 { below(20) } else { 20 + below(80) };
        b.visit(n as usize);
    }
    let stats = b.core.stats();
    let rate = stats.hits as f64 / (stats.hits + stats.misses) as f64;
    println!("100 tenants, 15 slots, 80/20 traffic: hit rate {rate:.3}");
    // 15 slots for 20 equally hot tenants: at best 0.8 × 15 / 20 = 0.60; plain LRU gets about 0.5.
    assert!(rate > 0.5, "{rate}");
}

#[test]
fn a_failed_load_is_told_at_once_and_tried_again_after_a_growing_wait() {
    let mut b = Bench::new(2);
    for (attempt, wait_s) in [1, 2, 4, 8, 16, 32, 60, 60].into_iter().enumerate() {
        b.want(1);
        let job = b.jobs().pop().expect("tried");
        b.core.finished(b.clock.now(), job.hash, Err(LoadError::Damaged));
        assert_eq!(b.core.warmth(&hash(1)), Warmth::Failed, "attempt {attempt}");
        assert!(matches!(b.core.lease(&hash(1)), CoreLease::Failed(LoadError::Damaged)));
        b.clock.advance(Duration::from_secs(wait_s) - Duration::from_millis(1));
        b.want(1);
        assert_eq!(b.jobs().len(), 0, "negative caching");
        b.clock.advance(Duration::from_millis(1));
    }
    b.want(1);
    b.settle();
    assert!(b.is_ready(1) && b.core.failure(&hash(1)).is_none());
    assert_eq!(b.core.stats().failures, 8);
}

#[test]
fn an_adapter_larger_than_the_budget_is_refused_with_the_numbers() {
    let mut b = Bench::new(2);
    b.want(1);
    let job = b.jobs().pop().expect("tried");
    let loaded = Loaded { files: files(10), packed: Some(packed(job.hash, 1000)) };
    b.core.finished(b.clock.now(), job.hash, Ok(loaded));
    assert_eq!(b.core.failure(&hash(1)), Some(&LoadError::TooLarge { needed_bytes: 1000, budget_bytes: 200 }));
    assert_eq!(b.core.stats().engine_bytes, 0);
}

#[test]
fn an_adapter_that_turns_out_larger_waits_for_enough_bytes() {
    let mut b = Bench::with(CacheConfig { slots: 4, engine_bytes: 250, host_bytes: 1000, loads_at_once: 2 });
    b.want(0);
    b.want(1);
    b.settle();
    assert!(b.lease(0) && b.lease(1));
    b.want(2);
    let job = b.jobs().pop().expect("a slot is free");
    b.core.finished(b.clock.now(), job.hash, Ok(Loaded { files: files(10), packed: Some(packed(job.hash, 100)) }));
    b.quiet();
    assert_eq!((b.core.warmth(&hash(2)), b.core.stats().engine_bytes), (Warmth::NoSlot, 200));
    assert_eq!(b.jobs().len(), 0, "its size is known now; nothing is tried in vain");
    b.release(0);
    let again = b.jobs();
    assert!(again.len() == 1 && again[0].host.is_some(), "and its files are still in host memory");
    b.finish(&again[0]);
    assert!(b.is_ready(2) && b.is_ready(1) && !b.is_ready(0));
}

#[test]
fn coming_back_from_the_host_tier_needs_no_disk() {
    let mut b = Bench::with(CacheConfig { slots: 1, engine_bytes: BYTES, host_bytes: 3 * BYTES, loads_at_once: 1 });
    for n in 0..3 {
        b.visit(n);
    }
    b.want(0);
    let job = b.jobs().pop().expect("reloaded");
    b.quiet();
    assert!(job.host.is_some());
    b.finish(&job);
    assert!(b.lease(0));
    b.release(0);
    b.visit(3);
    assert_eq!((b.core.stats().hosted, b.core.stats().host_bytes), (3, 3 * BYTES));
    b.want(1);
    assert!(b.jobs().pop().expect("reloaded").host.is_none(), "the least recently used files went");
}

#[test]
fn files_of_waiting_adapters_are_fetched_ahead_of_a_slot() {
    let mut b = Bench::with(CacheConfig { slots: 1, engine_bytes: BYTES, host_bytes: 10 * BYTES, loads_at_once: 2 });
    b.want(0);
    b.settle();
    assert!(b.lease(0));
    b.want(1);
    let job = b.jobs().pop().expect("fetched");
    assert!(!job.pack);
    b.finish(&job);
    assert_eq!(b.core.warmth(&hash(1)), Warmth::NoSlot);
    b.release(0);
    let job = b.jobs().pop().expect("packed");
    assert!(job.pack && job.host.is_some());
}

#[test]
fn a_deleted_adapter_serves_its_leases_out_and_nothing_more() {
    let mut b = Bench::new(2);
    b.visit(1);
    assert!(b.lease(1));
    b.core.forget(b.clock.now(), &hash(1));
    assert!(!b.lease(1));
    assert_eq!(b.core.stats().engine_bytes, BYTES, "the running request still needs it");
    b.release(1);
    assert_eq!((b.core.stats().engine_bytes, b.core.stats().resident), (0, 0));
    // Deleted while it loads: what comes is thrown away.
    b.want(2);
    let job = b.jobs().pop().expect("loading");
    b.core.forget(b.clock.now(), &hash(2));
    b.finish(&job);
    assert_eq!(b.core.failure(&hash(2)), Some(&LoadError::NotStored));
    assert_eq!(b.core.stats().resident, 0);
}

#[test]
fn what_is_stored_again_is_no_longer_missing() {
    let mut b = Bench::new(2);
    b.visit(1);
    b.core.forget(b.clock.now(), &hash(1));
    b.core.stored(b.clock.now(), &hash(1), owner());
    assert_eq!(b.core.failure(&hash(1)), None);
    b.visit(1);
    // Stored while the load of what was deleted before is under way.
    b.want(2);
    let job = b.jobs().pop().expect("loading");
    b.core.forget(b.clock.now(), &hash(2));
    b.core.stored(b.clock.now(), &hash(2), owner());
    b.core.finished(b.clock.now(), job.hash, Err(LoadError::NotStored));
    assert_eq!(b.core.failure(&hash(2)), None);
    b.settle();
    assert!(b.lease(2), "who waits gets it without asking again");
}

#[test]
fn a_load_for_a_deleted_owner_is_repeated_for_the_next() {
    let mut b = Bench::new(1);
    b.want(1);
    let job = b.jobs().pop().expect("loading");
    let heir = Owner { tenant: "heir".parse().expect("tenant") };
    b.core.stored(b.clock.now(), &hash(1), heir.clone());
    b.core.finished(b.clock.now(), job.hash, Err(LoadError::Sealed));
    let job = b.jobs().pop().expect("repeated");
    assert_eq!(job.owner, heir);
    b.finish(&job);
    assert!(b.lease(1));
    assert_eq!(b.core.stats().failures, 0);
}

#[test]
fn wants_end_with_their_requests_deadline() {
    let mut b = Bench::new(1);
    b.want(0);
    b.settle();
    assert!(b.lease(0));
    b.want(1);
    assert_eq!(b.core.warmth(&hash(1)), Warmth::NoSlot);
    b.clock.advance(Duration::from_secs(61));
    b.core.expire_wants(b.clock.now());
    assert_eq!(b.core.warmth(&hash(1)), Warmth::Absent);
    b.release(0);
    assert_eq!(b.jobs().len(), 0);
    assert!(b.is_ready(0));
}

#[test]
fn an_evicted_adapter_comes_back_while_more_requests_wait_for_it() {
    let mut b = Bench::new(1);
    b.visit(0);
    b.visit(1);
    // Its first request is done; the queue says another waits.
    b.prefer(&[0], false);
    b.settle();
    assert!(b.is_ready(0));
}
