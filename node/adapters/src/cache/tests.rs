//! Behaviour of the cache core: single cases, then random operations against its invariants.

use model::adapter::AdapterFiles;
use shared::clock::{Clock, ManualClock};
use shared::hash::ContentHash;

use super::*;

mod random;

pub(super) fn adapter(n: usize) -> AdapterRef {
    AdapterRef { tenant: "acme".parse().expect("tenant"), hash: ContentHash::of(&n.to_le_bytes()) }
}

pub(super) fn id(n: usize) -> AdapterId {
    adapter(n).id()
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
    leases: Vec<(AdapterId, u32, u64)>,
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
        self.core.want(self.clock.now(), &adapter(n), until);
    }

    fn prefer(&mut self, order: &[usize], drain: bool) {
        let order: Vec<AdapterId> = order.iter().map(|&n| id(n)).collect();
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
        let packed = job.pack.then(|| packed(job.adapter.hash, BYTES));
        self.core.finished(self.clock.now(), job.number, Ok(Loaded { files: files(BYTES), packed }));
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
        let CoreLease::Leased(adapter, slot, generation) = self.core.lease(&id(n)) else { return false };
        assert_eq!(adapter.hash, self::adapter(n).hash);
        self.leases.push((id(n), slot, generation));
        true
    }

    fn release(&mut self, n: usize) {
        let place = self.leases.iter().position(|held| held.0 == id(n)).expect("leased");
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
        self.core.residency(&id(n)) == Residency::Ready
    }
}

#[test]
fn a_queued_want_is_loaded_once_and_leased() {
    let mut b = Bench::new(4);
    b.want(1);
    b.want(1);
    assert_eq!(b.core.residency(&id(1)), Residency::Loading);
    let jobs = b.jobs();
    assert_eq!(jobs.len(), 1, "single flight");
    b.want(1);
    assert_eq!(b.jobs().len(), 0);
    assert!(!b.lease(1));
    let epoch = b.core.epoch();
    b.finish(&jobs[0]);
    assert_eq!((b.core.residency(&id(1)), b.core.epoch()), (Residency::Ready, epoch + 1));
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
    assert_eq!(first.iter().map(|job| job.adapter.id()).collect::<Vec<_>>(), [id(0), id(1)]);
    b.finish(&first[0]);
    assert_eq!(b.jobs().iter().map(|job| job.adapter.id()).collect::<Vec<_>>(), [id(2)], "in order of asking");
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
    assert_eq!(b.core.residency(&id(2)), Residency::NoSlot);
    assert_eq!(b.jobs().len(), 0);
    b.release(0);
    assert_eq!(
        (b.core.residency(&id(2)), b.is_ready(0)),
        (Residency::Loading, false),
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
    assert_eq!(b.core.residency(&id(2)), Residency::Loading);
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
    assert_eq!((b.is_ready(0), b.core.residency(&id(1))), (false, Residency::Loading));
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
    assert_eq!(b.jobs()[0].adapter.id(), id(3));
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
        b.core.finished(b.clock.now(), job.number, Err(LoadError::Damaged));
        assert_eq!(b.core.residency(&id(1)), Residency::Failed, "attempt {attempt}");
        assert!(matches!(b.core.lease(&id(1)), CoreLease::Failed(LoadError::Damaged)));
        b.clock.advance(Duration::from_secs(wait_s) - Duration::from_millis(1));
        b.want(1);
        assert_eq!(b.jobs().len(), 0, "negative caching");
        b.clock.advance(Duration::from_millis(1));
    }
    b.want(1);
    b.settle();
    assert!(b.is_ready(1) && b.core.failure(&id(1)).is_none());
    assert_eq!(b.core.stats().failures, 8);
}

#[test]
fn an_adapter_larger_than_the_budget_is_refused_with_the_numbers() {
    let mut b = Bench::new(2);
    b.want(1);
    let job = b.jobs().pop().expect("tried");
    let loaded = Loaded { files: files(10), packed: Some(packed(job.adapter.hash, 1000)) };
    b.core.finished(b.clock.now(), job.number, Ok(loaded));
    assert_eq!(b.core.failure(&id(1)), Some(&LoadError::TooLarge { needed_bytes: 1000, budget_bytes: 200 }));
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
    b.core.finished(
        b.clock.now(),
        job.number,
        Ok(Loaded { files: files(10), packed: Some(packed(job.adapter.hash, 100)) }),
    );
    b.quiet();
    assert_eq!((b.core.residency(&id(2)), b.core.stats().engine_bytes), (Residency::NoSlot, 200));
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
    assert_eq!(b.core.residency(&id(1)), Residency::NoSlot);
    b.release(0);
    let job = b.jobs().pop().expect("packed");
    assert!(job.pack && job.host.is_some());
}

#[test]
fn a_deleted_adapter_serves_its_leases_out_and_nothing_more() {
    let mut b = Bench::new(2);
    b.visit(1);
    assert!(b.lease(1));
    b.core.forget(b.clock.now(), &id(1));
    assert!(!b.lease(1));
    assert_eq!(b.core.stats().engine_bytes, BYTES, "the running request still needs it");
    b.release(1);
    assert_eq!((b.core.stats().engine_bytes, b.core.stats().resident), (0, 0));
    // Deleted while it loads: what comes is thrown away.
    b.want(2);
    let job = b.jobs().pop().expect("loading");
    b.core.forget(b.clock.now(), &id(2));
    b.finish(&job);
    assert_eq!(b.core.failure(&id(2)), Some(&LoadError::NotStored));
    assert_eq!(b.core.stats().resident, 0);
}

#[test]
fn what_is_stored_again_is_no_longer_missing() {
    let mut b = Bench::new(2);
    b.visit(1);
    b.core.forget(b.clock.now(), &id(1));
    b.core.stored(b.clock.now(), &id(1));
    assert_eq!(b.core.failure(&id(1)), None);
    b.visit(1);
    // Stored while the load of what was deleted before is under way.
    b.want(2);
    let job = b.jobs().pop().expect("loading");
    b.core.forget(b.clock.now(), &id(2));
    b.core.stored(b.clock.now(), &id(2));
    b.core.finished(b.clock.now(), job.number, Err(LoadError::NotStored));
    assert_eq!(b.core.failure(&id(2)), None);
    b.settle();
    assert!(b.lease(2), "who waits gets it without asking again");
}

#[test]
fn equal_content_of_two_tenants_shares_neither_slot_nor_failure() {
    let mut b = Bench::new(4);
    let until = b.clock.now() + Duration::from_secs(60);
    let other = AdapterRef { tenant: "baker".parse().expect("tenant"), ..adapter(1) };
    b.want(1);
    b.core.want(b.clock.now(), &other, until);
    let jobs = b.jobs();
    assert_eq!(jobs.iter().map(|job| job.adapter.clone()).collect::<Vec<_>>(), [adapter(1), other.clone()]);
    b.core.finished(b.clock.now(), jobs[0].number, Err(LoadError::Damaged));
    b.finish(&jobs[1]);
    assert_eq!((b.core.residency(&id(1)), b.core.residency(&other.id())), (Residency::Failed, Residency::Ready));
    b.core.forget(b.clock.now(), &id(1));
    assert_eq!(b.core.residency(&other.id()), Residency::Ready, "what one deletes the other keeps");
}

#[test]
fn a_blocked_reader_is_given_up_and_others_go_on() {
    let mut b = Bench::new(2);
    for n in 0..4 {
        b.want(n);
    }
    let hung = b.jobs();
    assert_eq!(hung.len(), 2);
    b.clock.advance(READ_MAX - Duration::from_millis(1));
    b.core.expire(b.clock.now());
    assert_eq!(b.jobs().len(), 0, "they may still come");
    b.clock.advance(Duration::from_millis(1));
    b.core.expire(b.clock.now());
    assert!(matches!(b.core.lease(&id(0)), CoreLease::Failed(LoadError::TimedOut)));
    let stats = b.core.stats();
    assert_eq!((stats.stuck, stats.loading, stats.failures), (2, 2, 2));
    b.settle();
    assert!(b.lease(2) && b.lease(3), "their slots went to who waited");
    b.release(2);
    // Tried again after the back-off, and this time it works; what comes late is thrown away.
    b.clock.advance(RETRY_FIRST);
    b.want(0);
    b.quiet();
    b.settle();
    assert!(b.lease(0));
    b.finish(&hung[0]);
    assert_eq!((b.core.stats().stuck, b.core.stats().resident), (1, 2));
}

#[test]
fn packing_takes_as_long_as_it_takes() {
    let mut b = Bench::new(1);
    b.want(0);
    let job = b.jobs().pop().expect("loading");
    b.core.files_read(job.number);
    b.clock.advance(10 * READ_MAX);
    b.core.expire(b.clock.now());
    assert_eq!(b.core.stats().stuck, 0);
    b.finish(&job);
    assert!(b.is_ready(0));
}

#[test]
fn a_disk_that_hangs_costs_a_bounded_number_of_threads() {
    let mut b = Bench::new(4);
    let mut started = 0;
    for _ in 0..20 {
        for n in 0..30 {
            b.want(n);
        }
        // Nobody answers.
        for _ in 0..30 {
            started += b.jobs().len();
            b.clock.advance(READ_MAX);
            b.core.expire(b.clock.now());
        }
    }
    assert_eq!((started, b.core.stats().stuck), (STUCK_MAX, STUCK_MAX));
    assert!(matches!(b.core.lease(&id(29)), CoreLease::Failed(LoadError::TimedOut)), "told at once, not left waiting");
}

#[test]
fn wants_end_with_their_requests_deadline() {
    let mut b = Bench::new(1);
    b.want(0);
    b.settle();
    assert!(b.lease(0));
    b.want(1);
    assert_eq!(b.core.residency(&id(1)), Residency::NoSlot);
    b.clock.advance(Duration::from_secs(61));
    b.core.expire(b.clock.now());
    assert_eq!(b.core.residency(&id(1)), Residency::Absent);
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
