//! Random operations against what must always hold, whatever the cache decides.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        ((self.0 >> 16) % n as u64) as usize
    }
}

/// What the outside knows without trusting the cache.
#[derive(Default)]
struct Model {
    /// Loads under way.
    flying: BTreeMap<u64, LoadJob>,
    /// Leases: slot, generation, adapter.
    leases: Vec<(u32, u64, Arc<LoraAdapter>)>,
    /// Which adapter a (slot, generation) was first leased with.
    places: BTreeMap<(u32, u64), AdapterId>,
    loads: u64,
    evictions: u64,
    failures: u64,
    /// What the index would show.
    shown: BTreeMap<AdapterId, Residency>,
}

fn packed_bytes(n: usize) -> usize {
    20 + n * 13 % 90
}

fn number_of(wanted: &AdapterId) -> usize {
    (0..40).find(|&n| id(n) == *wanted).expect("known")
}

impl Model {
    fn take_commands(&mut self, core: &mut CacheCore) {
        for command in core.take_commands() {
            match command {
                Command::Load(job) => {
                    assert!(self.flying.insert(job.number, job).is_none(), "two loads of one number");
                }
                Command::Retire(Retired::Packed(adapter)) => {
                    assert!(
                        self.leases.iter().all(|(_, _, held)| !Arc::ptr_eq(held, &adapter)),
                        "evicted under a lease"
                    );
                }
                Command::Retire(Retired::Files(_)) => {}
            }
        }
        for (id, residency) in core.drain_changes() {
            self.shown.insert(id, residency);
        }
    }

    fn check(&self, core: &CacheCore) {
        let stats = core.stats();
        let config = &core.config;
        assert!(stats.engine_bytes <= config.engine_bytes && stats.host_bytes <= config.host_bytes, "{stats:?}");
        assert!(stats.resident <= config.slots && stats.loading <= config.loads_at_once);
        assert_eq!(stats.loading + stats.stuck, self.flying.len());
        assert!(stats.stuck <= STUCK_MAX);
        let loading: BTreeSet<AdapterId> = core.jobs.values().map(|job| job.id).collect();
        assert_eq!(loading.len(), core.jobs.len(), "two loads of one adapter");
        let leased: BTreeSet<u32> = self.leases.iter().map(|&(slot, _, _)| slot).collect();
        assert_eq!(stats.leased, leased.len());
        let bytes: usize = core.slots.iter().filter_map(|slot| slot.occupant.as_ref()).map(|held| held.bytes).sum();
        assert_eq!(bytes, stats.engine_bytes);
        let hosted: usize =
            core.entries.values().filter_map(|entry| entry.host.as_ref()).map(|host| host.files.bytes()).sum();
        assert_eq!((hosted, core.host_order.len()), (stats.host_bytes, stats.hosted));
        for (slot, generation, adapter) in &self.leases {
            let place = &core.slots[*slot as usize];
            assert_eq!(place.generation, *generation, "a slot changed hands under a lease");
            let occupant = place.occupant.as_ref().expect("leased slots are held");
            assert!(occupant.adapter.as_ref().is_some_and(|held| Arc::ptr_eq(held, adapter)));
        }
        for n in 0..40 {
            let shown = self.shown.get(&id(n)).copied().unwrap_or(Residency::Absent);
            assert_eq!(core.residency(&id(n)), shown, "adapter {n}");
        }
        for (idx, slot) in core.slots.iter().enumerate() {
            if let Some(occupant) = &slot.occupant {
                assert_eq!(core.entries[&occupant.id].slot, Some(idx as u32));
            }
        }
    }
}

fn finish_one(core: &mut CacheCore, model: &mut Model, rng: &mut Rng, now: Instant) {
    if model.flying.is_empty() {
        return;
    }
    let number = *model.flying.keys().nth(rng.below(model.flying.len())).expect("in range");
    let job = model.flying.remove(&number).expect("flying");
    let id = job.adapter.id();
    if rng.below(8) == 0 {
        model.failures += 1;
        core.finished(now, number, Err(LoadError::Damaged));
    } else {
        let n = number_of(&id);
        let packed = job.pack.then(|| packed(job.adapter.hash, packed_bytes(n)));
        model.loads += u64::from(job.pack);
        core.finished(now, number, Ok(Loaded { files: files(10 + n % 7 * 10), packed }));
    }
}

fn run(seed: u64) {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let clock = ManualClock::default();
    let config = CacheConfig {
        slots: 1 + rng.below(6),
        engine_bytes: 120 + rng.below(300),
        host_bytes: rng.below(3) * 100,
        loads_at_once: 1 + rng.below(3),
    };
    let mut core = CacheCore::new(config);
    let mut model = Model::default();
    for _ in 0..500 {
        let (now, n) = (clock.now(), rng.below(40));
        match rng.below(16) {
            0..=3 => {
                let until = now + Duration::from_millis(rng.below(3000) as u64);
                core.want(now, &adapter(n), until);
            }
            4 => {
                if let Some(number) = model.flying.keys().next() {
                    core.files_read(*number);
                }
            }
            5..=7 => finish_one(&mut core, &mut model, &mut rng, now),
            8..=10 => {
                if let CoreLease::Leased(adapter, slot, generation) = core.lease(&id(n)) {
                    assert_eq!(adapter.hash, self::adapter(n).hash, "the wrong adapter");
                    let place = model.places.entry((slot, generation)).or_insert(id(n));
                    assert_eq!(*place, id(n), "one generation, two adapters");
                    model.leases.push((slot, generation, adapter));
                }
            }
            11..=12 => {
                if !model.leases.is_empty() {
                    let (slot, generation, _) = model.leases.swap_remove(rng.below(model.leases.len()));
                    core.release(now, slot, generation);
                }
            }
            13 => {
                let order: Vec<AdapterId> = (0..rng.below(6)).map(|_| id(rng.below(40))).collect();
                core.prefer(now, &order, rng.below(2) == 0);
            }
            14 => {
                clock.advance(Duration::from_millis(rng.below(3000) as u64));
                core.expire(clock.now());
            }
            _ => {
                if rng.below(4) == 0 {
                    core.forget(now, &id(n));
                }
            }
        }
        model.take_commands(&mut core);
        model.check(&core);
    }
    // When everything has ended, nothing is left but what the budgets allow to stay.
    for (slot, generation, _) in std::mem::take(&mut model.leases) {
        core.release(clock.now(), slot, generation);
    }
    model.take_commands(&mut core);
    while !model.flying.is_empty() {
        finish_one(&mut core, &mut model, &mut rng, clock.now());
        model.take_commands(&mut core);
        model.check(&core);
    }
    clock.advance(Duration::from_secs(10));
    core.expire(clock.now());
    model.evictions = core.stats().evictions;
    assert!(core.stats().loads <= model.loads && core.stats().failures >= model.failures);
    assert_eq!(
        core.stats().loads - model.evictions,
        core.stats().resident as u64,
        "every load is resident or was evicted"
    );
    assert!(core.wants.is_empty() && core.want_ends.is_empty() && core.to_load.is_empty());
}

#[test]
fn budgets_leases_and_single_flight_hold_under_random_operations() {
    for seed in 0..150 {
        if let Err(cause) = std::panic::catch_unwind(|| run(seed)) {
            eprintln!("seed {seed}");
            std::panic::resume_unwind(cause);
        }
    }
}
