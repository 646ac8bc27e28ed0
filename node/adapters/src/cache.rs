//! What is resident, what is loaded next and what makes room: the cache's decisions, pure.
//!
//! An adapter here is one tenant's copy ([`AdapterId`]): equal content of two tenants shares nothing. Two tiers
//! live here. **Engine**: packed adapters in numbered slots; a slot's generation changes whenever
//! its adapter does. **Host**: verified file bytes, so that coming back costs no disk and no decryption. The
//! third tier, disk, is [`crate::store`].
//!
//! Callers ask ([`CacheCore::want`], [`CacheCore::prefer`], [`CacheCore::lease`]) and report
//! ([`CacheCore::release`], [`CacheCore::finished`]); what must be done comes out of
//! [`CacheCore::take_commands`]. Called under the handle's lock; no clock, no I/O, no adapter is freed here
//! (they leave in [`Command::Retire`], since wiping megabytes takes milliseconds).
//!
//! Who goes: only slots without a lease, and among them first those nobody waits for, in two segments. A
//! newcomer is on *probation* until its second lease; one-off visitors push out each other, not the adapters in
//! daily use. The protected segment is at most three quarters of the slots, so
//! that yesterday's favourites step back down when today's arrive.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use model::adapter::LoraAdapter;
use shared::adapter::{AdapterId, AdapterRef, Residency};

use crate::loader::{HostFiles, LoadError};

pub mod ahead;
mod plan;
mod host;
mod read;
#[cfg(test)]
mod tests;

/// First wait after a failed load; doubles with every further failure.
pub const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait after failed loads: a repaired store is noticed within this time.
pub const RETRY_MAX: Duration = Duration::from_secs(60);
/// Failed adapters remembered; beyond it the longest known is forgotten and simply tried again.
pub const FAILURES_MAX: usize = 4096;
/// Longest that reading an adapter's files may take: half a gigabyte from a slow disk. A reader that is blocked for
/// longer is given up; its thread cannot be ended, so it is counted until it comes back.
pub const READ_MAX: Duration = Duration::from_secs(10);
/// Readers given up and not back, of all adapters: a disk that hangs costs this many threads and no more.
pub const STUCK_MAX: usize = 16;
/// The same of one adapter, so that a single bad file does not use up the places of all.
pub const STUCK_PER_ADAPTER_MAX: usize = 2;

/// Budgets of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// Adapters in engine memory at once, at least 1.
    pub slots: usize,
    /// Bytes of packed adapters.
    pub engine_bytes: usize,
    /// Bytes of file contents; 0 turns the host tier off.
    pub host_bytes: usize,
    /// Loads under way at once, at least 1: more would only share the same disk and cores.
    pub loads_at_once: usize,
}

/// Work for the shell.
#[derive(Debug)]
pub enum Command {
    /// Bring this adapter into its slot; answer with [`CacheCore::finished`].
    Load(LoadJob),
    /// Free this, off the hot path.
    Retire(Retired),
}

/// One load. At most one per adapter is under way.
#[derive(Debug, Clone)]
pub struct LoadJob {
    /// Number of the load; no other load has it.
    pub number: u64,
    /// What to load.
    pub adapter: AdapterRef,
    /// Its files if they are in host memory already.
    pub host: Option<Arc<HostFiles>>,
    /// False: only the host tier is filled, ahead of a slot.
    pub pack: bool,
}

/// Memory on its way out.
#[derive(Debug)]
pub enum Retired {
    /// From an engine slot.
    Packed(Arc<LoraAdapter>),
    /// From the host tier.
    Files(Arc<HostFiles>),
}

/// What a load brought.
#[derive(Debug)]
pub struct Loaded {
    /// The verified files.
    pub files: Arc<HostFiles>,
    /// The packed adapter, if packing was asked for.
    pub packed: Option<Arc<LoraAdapter>>,
}

/// Counts since start and sizes now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Queued wants that found their adapter in the engine.
    pub hits: u64,
    /// Queued wants that did not.
    pub misses: u64,
    /// Loads that put an adapter into a slot.
    pub loads: u64,
    /// Loads that failed.
    pub failures: u64,
    /// Adapters that left the engine tier.
    pub evictions: u64,
    /// Adapters in the engine tier.
    pub resident: usize,
    /// Of these, with a lease.
    pub leased: usize,
    /// Loads under way.
    pub loading: usize,
    /// Loads given up whose reader is still blocked.
    pub stuck: usize,
    /// Bytes in the engine tier.
    pub engine_bytes: usize,
    /// Adapters in the host tier.
    pub hosted: usize,
    /// Bytes in the host tier.
    pub host_bytes: usize,
}

/// A slot of the engine tier.
#[derive(Debug, Default)]
struct Slot {
    /// Counts up with every change of adapter.
    generation: u64,
    occupant: Option<Occupant>,
}

#[derive(Debug)]
struct Occupant {
    id: AdapterId,
    /// `None` while it loads.
    adapter: Option<Arc<LoraAdapter>>,
    leases: u32,
    /// Leases ever given here; two make it protected.
    uses: u32,
    protected: bool,
    /// Never leased again; goes with its last lease.
    doomed: bool,
    /// Bytes of the budget it takes: its size, or while it loads what is reserved for it.
    bytes: usize,
    used_at: u64,
}

/// What is known of one adapter.
#[derive(Debug)]
struct Entry {
    adapter: AdapterRef,
    slot: Option<u32>,
    /// Number of the load under way.
    job: Option<u64>,
    host: Option<HostPlace>,
    failure: Option<Failure>,
    /// Until when requests for it may wait.
    wanted_until: Option<Instant>,
    /// Place among those that asked and had no lease since.
    want_seq: Option<u64>,
    /// When it was asked for last.
    asked_at: u64,
    /// Packed size, once known.
    packed_bytes: Option<usize>,
    /// What the index was told last.
    shown: Residency,
}

/// A load under way.
#[derive(Debug, Clone, Copy)]
struct Job {
    id: AdapterId,
    /// When it is given up; `None` once its files are read: packing takes as long as it takes.
    read_until: Option<Instant>,
    /// The adapter was deleted meanwhile: what the job brings is thrown away.
    doomed: bool,
    /// Its files were stored again meanwhile: a failure says nothing about those.
    renewed: bool,
}

#[derive(Debug)]
struct HostPlace {
    files: Arc<HostFiles>,
    used_at: u64,
}

#[derive(Debug, Clone)]
struct Failure {
    error: LoadError,
    attempts: u32,
    retry_at: Instant,
    /// Someone asked after the back-off: it counts as wanted again, not as failed.
    retrying: bool,
    at: u64,
}

impl Entry {
    fn new(adapter: AdapterRef) -> Self {
        Self {
            adapter,
            slot: None,
            job: None,
            host: None,
            failure: None,
            wanted_until: None,
            want_seq: None,
            asked_at: 0,
            packed_bytes: None,
            shown: Residency::Absent,
        }
    }
}

/// The core of the adapter cache.
#[derive(Debug)]
pub struct CacheCore {
    config: CacheConfig,
    slots: Vec<Slot>,
    entries: HashMap<AdapterId, Entry>,
    /// Adapters that were asked for and had no lease since, in order of asking.
    wants: BTreeMap<u64, AdapterId>,
    /// When wants end.
    want_ends: BTreeSet<(Instant, AdapterId)>,
    /// Adapters with a slot whose load has not started, in order of assignment.
    to_load: BTreeMap<u64, AdapterId>,
    /// Waiting adapters whose files are not in host memory, in order of asking.
    to_fetch: BTreeMap<u64, AdapterId>,
    /// Host tier, least recently used first.
    host_order: BTreeMap<u64, AdapterId>,
    failures: BTreeMap<u64, AdapterId>,
    /// The queue's fair order and each adapter's place in it.
    order: Vec<AdapterId>,
    places: HashMap<AdapterId, usize>,
    /// The queue holds back who is resident: their slots may go to who is ahead.
    drain: bool,
    /// When the order was told last, and when anything was asked for last.
    preferred_at: u64,
    asked_at: u64,
    engine_bytes: usize,
    host_bytes: usize,
    /// Loads under way, by number.
    jobs: BTreeMap<u64, Job>,
    /// Loads given up whose threads are still blocked, by number.
    stuck: BTreeMap<u64, AdapterId>,
    tick: u64,
    epoch: u64,
    commands: Vec<Command>,
    changes: Vec<(AdapterId, Residency)>,
    stats: CacheStats,
}

/// What [`CacheCore::lease`] answers.
#[derive(Debug)]
pub enum CoreLease {
    /// Leased: adapter, slot, generation.
    Leased(Arc<LoraAdapter>, u32, u64),
    /// Not now.
    Missing(Residency),
    /// Not before the back-off has passed.
    Failed(LoadError),
}

// === impl CacheCore ===

impl CacheCore {
    /// An empty cache.
    pub fn new(config: CacheConfig) -> Self {
        let config = CacheConfig { slots: config.slots.max(1), loads_at_once: config.loads_at_once.max(1), ..config };
        Self {
            slots: (0..config.slots).map(|_| Slot::default()).collect(),
            config,
            entries: HashMap::new(),
            wants: BTreeMap::new(),
            want_ends: BTreeSet::new(),
            to_load: BTreeMap::new(),
            to_fetch: BTreeMap::new(),
            host_order: BTreeMap::new(),
            failures: BTreeMap::new(),
            order: Vec::new(),
            places: HashMap::new(),
            drain: false,
            preferred_at: 0,
            asked_at: 0,
            engine_bytes: 0,
            host_bytes: 0,
            jobs: BTreeMap::new(),
            stuck: BTreeMap::new(),
            tick: 0,
            epoch: 0,
            commands: Vec::new(),
            changes: Vec::new(),
            stats: CacheStats::default(),
        }
    }

    fn next_tick(&mut self) -> u64 {
        self.tick += 1;
        self.tick
    }

    /// Asks for an adapter: called when a request for it is queued, which waits until `until` at most.
    pub fn want(&mut self, now: Instant, adapter: &AdapterRef, until: Instant) {
        let (id, tick) = (adapter.id(), self.next_tick());
        let resident = self.resident(&id).is_some();
        let entry = self.entries.entry(id).or_insert_with(|| Entry::new(adapter.clone()));
        if resident {
            self.stats.hits += 1
        } else {
            self.stats.misses += 1
        }
        // Remembered even for a resident adapter: it may be evicted while the request waits.
        let until = entry.wanted_until.map_or(until, |earlier| earlier.max(until));
        if let Some(earlier) = entry.wanted_until.replace(until) {
            self.want_ends.remove(&(earlier, id));
        }
        self.want_ends.insert((until, id));
        entry.asked_at = tick;
        self.asked_at = tick;
        match &mut entry.failure {
            Some(failure) if now < failure.retry_at => return,
            // Tried again, but the failure is forgotten only when a load succeeds.
            Some(failure) => failure.retrying = true,
            None => {}
        }
        if resident {
            return;
        }
        let seq = *entry.want_seq.get_or_insert(tick);
        self.wants.insert(seq, id);
        if entry.host.is_none() && entry.slot.is_none() {
            self.to_fetch.insert(seq, id);
        }
        self.show(id);
        self.plan(now);
    }

    /// The occupant that would be leased for `id`.
    fn resident(&self, id: &AdapterId) -> Option<&Occupant> {
        let slot = self.entries.get(id)?.slot?;
        self.slots[slot as usize].occupant.as_ref().filter(|occupant| occupant.adapter.is_some() && !occupant.doomed)
    }

    /// Takes over the queue's fair order of waiting adapters. With `drain`, slots of adapters that wait further
    /// back may be given to those ahead as soon as no lease holds them.
    pub fn prefer(&mut self, now: Instant, order: &[AdapterId], drain: bool) {
        let asked_since = self.asked_at > self.preferred_at;
        self.preferred_at = self.next_tick();
        if self.order == order && self.drain == drain {
            // What was asked for before is now protected by its place in the order, or not at all.
            if asked_since {
                self.plan(now);
            }
            return;
        }
        self.order.clear();
        self.order.extend_from_slice(order);
        self.places = order.iter().enumerate().map(|(place, &id)| (id, place)).collect();
        self.drain = drain;
        self.plan(now);
    }

    /// Holds a resident adapter.
    pub fn lease(&mut self, id: &AdapterId) -> CoreLease {
        let Some(entry) = self.entries.get_mut(id) else { return CoreLease::Missing(Residency::Absent) };
        let occupant = entry.slot.and_then(|slot| self.slots[slot as usize].occupant.as_mut().map(|held| (slot, held)));
        let Some((slot, occupant)) = occupant else {
            return match &entry.failure {
                Some(failure) if !failure.retrying => CoreLease::Failed(failure.error.clone()),
                _ => CoreLease::Missing(entry.shown),
            };
        };
        let adapter = match &occupant.adapter {
            Some(adapter) if !occupant.doomed => Arc::clone(adapter),
            _ => return CoreLease::Missing(entry.shown),
        };
        self.tick += 1;
        occupant.used_at = self.tick;
        occupant.leases += 1;
        occupant.uses = occupant.uses.saturating_add(1);
        entry.asked_at = 0;
        let promote = occupant.uses >= 2 && !occupant.protected;
        if let Some(seq) = entry.want_seq.take() {
            self.wants.remove(&seq);
            self.to_fetch.remove(&seq);
        }
        if promote {
            self.protect(slot);
        }
        CoreLease::Leased(adapter, slot, self.slots[slot as usize].generation)
    }

    /// A lease on (`slot`, `generation`) ended.
    pub fn release(&mut self, now: Instant, slot: u32, generation: u64) {
        let tick = self.next_tick();
        let Some(place) = self.slots.get_mut(slot as usize).filter(|place| place.generation == generation) else {
            shared::critical!("a lease on slot {slot} generation {generation} ended twice or was never given");
            return;
        };
        let Some(occupant) = place.occupant.as_mut().filter(|occupant| occupant.leases > 0) else {
            shared::critical!("a lease on slot {slot} ended that nobody held");
            return;
        };
        occupant.leases -= 1;
        occupant.used_at = tick;
        if occupant.leases == 0 {
            if occupant.doomed {
                self.evict(slot);
            }
            self.plan(now);
        }
    }

    /// The files of a load are in memory.
    pub fn files_read(&mut self, number: u64) {
        if let Some(job) = self.jobs.get_mut(&number) {
            job.read_until = None;
        }
    }

    /// A load ended.
    pub fn finished(&mut self, now: Instant, number: u64, result: Result<Loaded, LoadError>) {
        if self.stuck.remove(&number).is_some() {
            // Given up long ago; whoever waited was told.
            if let Ok(loaded) = result {
                self.retire_loaded(loaded);
            }
            return;
        }
        let Some(job) = self.end_job(number) else {
            shared::critical!("load {number} ended that was never started");
            return;
        };
        let id = job.id;
        match result {
            Ok(loaded) if job.doomed => {
                self.retire_loaded(loaded);
                self.note_failure(now, id, LoadError::NotStored);
            }
            Ok(loaded) => self.place_loaded(now, id, loaded),
            Err(_) if job.renewed => {
                self.vacate(id);
                self.want_again(id);
            }
            Err(error) => self.note_failure(now, id, error),
        }
        self.show(id);
        self.drop_unused(id);
        self.plan(now);
    }

    fn end_job(&mut self, number: u64) -> Option<Job> {
        let job = self.jobs.remove(&number)?;
        if let Some(entry) = self.entries.get_mut(&job.id) {
            entry.job = None;
        }
        Some(job)
    }

    /// Gives up loads whose reader is blocked: their slots go to others, who asked for them is told.
    fn expire_reads(&mut self, now: Instant) {
        let late = |job: &Job| job.read_until.is_some_and(|until| until <= now);
        let late: Vec<u64> = self.jobs.iter().filter(|(_, job)| late(job)).map(|(&number, _)| number).collect();
        for number in late {
            let Some(job) = self.end_job(number) else { continue };
            self.stuck.insert(number, job.id);
            self.note_failure(now, job.id, LoadError::TimedOut);
            self.show(job.id);
            self.drop_unused(job.id);
            self.plan(now);
        }
    }

    fn retire_loaded(&mut self, loaded: Loaded) {
        self.commands.push(Command::Retire(Retired::Files(loaded.files)));
        self.commands.extend(loaded.packed.map(|packed| Command::Retire(Retired::Packed(packed))));
    }

    fn note_failure(&mut self, now: Instant, id: AdapterId, error: LoadError) {
        self.stats.failures += 1;
        self.refuse(now, id, error);
    }

    /// Requests for `id` meet `error` until it is time to try again.
    fn refuse(&mut self, now: Instant, id: AdapterId, error: LoadError) {
        self.vacate(id);
        let at = self.next_tick();
        self.unwant(&id);
        let Some(entry) = self.entries.get_mut(&id) else { return };
        let attempts = entry.failure.as_ref().map_or(0, |failure| failure.attempts) + 1;
        if let Some(failure) = &entry.failure {
            self.failures.remove(&failure.at);
        }
        let wait = RETRY_FIRST.saturating_mul(1 << (attempts - 1).min(10)).min(RETRY_MAX);
        entry.failure = Some(Failure { error, attempts, retry_at: now + wait, retrying: false, at });
        self.failures.insert(at, id);
        if self.failures.len() > FAILURES_MAX
            && let Some((_, oldest)) = self.failures.pop_first()
        {
            if let Some(entry) = self.entries.get_mut(&oldest) {
                entry.failure = None;
            }
            self.show(oldest);
            self.drop_unused(oldest);
        }
    }

    /// Ends every claim of `id` to a slot or a fetch.
    fn unwant(&mut self, id: &AdapterId) {
        if let Some(seq) = self.entries.get_mut(id).and_then(|entry| entry.want_seq.take()) {
            self.wants.remove(&seq);
            self.to_fetch.remove(&seq);
        }
    }

    /// The adapter was deleted: no new lease, no load; its memory goes with its last lease. Requests that
    /// wait for it meet [`LoadError::NotStored`].
    pub fn forget(&mut self, now: Instant, id: &AdapterId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if let Some(job) = entry.job.and_then(|number| self.jobs.get_mut(&number)) {
            job.doomed = true;
        }
        let (slot, has_job, wanted) = (entry.slot, entry.job.is_some(), entry.wanted_until.is_some());
        self.unwant(id);
        self.drop_host(id);
        if let Some(slot) = slot
            && let Some(occupant) = self.slots[slot as usize].occupant.as_mut()
        {
            occupant.doomed = true;
            match (occupant.adapter.is_some(), occupant.leases) {
                (true, 0) => self.evict(slot),
                (false, _) if !has_job => self.vacate(*id),
                _ => {}
            }
        }
        if wanted && !has_job && self.entries.get(id).is_some_and(|entry| entry.slot.is_none()) {
            // Deleting is no failed load.
            self.refuse(now, *id, LoadError::NotStored);
        }
        self.show(*id);
        self.drop_unused(*id);
        self.plan(now);
    }

    /// The adapter's files were stored again: what was deleted or failed before no longer counts.
    pub fn stored(&mut self, now: Instant, id: &AdapterId) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        if let Some(job) = entry.job.and_then(|number| self.jobs.get_mut(&number)) {
            (job.doomed, job.renewed) = (false, true);
        }
        if let Some(failure) = entry.failure.take() {
            self.failures.remove(&failure.at);
        }
        let occupant = entry.slot.and_then(|slot| self.slots[slot as usize].occupant.as_mut());
        if let Some(occupant) = occupant {
            occupant.doomed = false;
        }
        self.show(*id);
        self.drop_unused(*id);
        self.plan(now);
    }

    /// Puts an adapter that requests may still wait for back among those that need a slot.
    fn want_again(&mut self, id: AdapterId) {
        let tick = self.next_tick();
        if let Some(entry) = self.entries.get_mut(&id)
            && entry.wanted_until.is_some()
        {
            let seq = *entry.want_seq.get_or_insert(tick);
            self.wants.insert(seq, id);
        }
    }

    /// Gives up reads that take too long and drops wants whose requests are past their deadline. Called now and
    /// then.
    pub fn expire(&mut self, now: Instant) {
        self.expire_reads(now);
        while let Some(&(until, id)) = self.want_ends.first() {
            if until > now {
                return;
            }
            self.want_ends.pop_first();
            self.unwant(&id);
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.wanted_until = None;
            }
            self.show(id);
            self.drop_unused(id);
        }
    }
}
