//! Cache, actor and store together, with a loader that packs nothing real.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use model::adapter::{AdapterFiles, LoraAdapter};
use shared::adapter::Residency;
use shared::clock::SystemClock;
use shared::hash::ContentHash;
use shared::seal::TenantKey;

use super::*;
use crate::cache::CacheConfig;
use crate::handle::LeaseDecision;
use crate::lease::Lease;
use crate::loader::HostFiles;
use crate::store::Store;

/// Reads from a real store; counts, and panics on demand.
struct StoreLoader {
    store: Store,
    key: TenantKey,
    fetches: AtomicU32,
    panics: AtomicBool,
    /// The next fetch hangs until the other end of the channel goes.
    hangs: AtomicBool,
    released: parking_lot::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl Loader for StoreLoader {
    fn fetch(&self, adapter: &AdapterRef) -> Result<HostFiles, LoadError> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        assert!(!self.panics.load(Ordering::SeqCst), "asked to panic");
        if self.hangs.swap(false, Ordering::SeqCst) {
            let _ = self.released.lock().recv();
        }
        Ok(self.store.read(&self.key, adapter)?)
    }

    fn pack(&self, hash: &ContentHash, files: &HostFiles) -> Result<LoraAdapter, LoadError> {
        Ok(LoraAdapter { hash: *hash, layers: Vec::new(), rank_max: 8, bytes: files.bytes() })
    }
}

/// The system's time and then some.
#[derive(Default)]
struct Late(parking_lot::Mutex<Duration>);

impl Late {
    fn pass(&self, time: Duration) {
        *self.0.lock() += time;
    }
}

impl Clock for Late {
    fn now(&self) -> std::time::Instant {
        SystemClock.now() + *self.0.lock()
    }

    fn wall(&self) -> Duration {
        SystemClock.wall()
    }
}

struct Bench {
    dir: std::path::PathBuf,
    cache: AdapterCache,
    loader: Arc<StoreLoader>,
    actor: ActorRef<AdapterCacheMsg>,
    woken: Arc<tokio::sync::Notify>,
    acme: TenantId,
    time: Arc<Late>,
    hung: std::sync::mpsc::Sender<()>,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.actor.stop(None);
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Bench {
    async fn new(name: &str, slots: usize) -> Self {
        let dir = std::env::temp_dir().join(format!("tenantry-cache-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        let time = Arc::new(Late::default());
        let store = Store::open(&dir, 1 << 24).expect("opens");
        let (hung, released) = std::sync::mpsc::channel();
        let loader = Arc::new(StoreLoader {
            store,
            key: TenantKey::random(),
            fetches: AtomicU32::new(0),
            panics: AtomicBool::new(false),
            hangs: AtomicBool::new(false),
            released: parking_lot::Mutex::new(released),
        });
        let clock: Arc<dyn Clock> = Arc::clone(&time) as _;
        let config = CacheConfig { slots, engine_bytes: 1 << 24, host_bytes: 0, loads_at_once: 2 };
        let (cache, commands) = AdapterCache::new(config, Arc::clone(&clock));
        let woken = Arc::new(tokio::sync::Notify::new());
        cache.set_waker(Arc::new({
            let woken = Arc::clone(&woken);
            move || woken.notify_one()
        }));
        let args = AdapterCacheArgs {
            cache: cache.clone(),
            commands,
            loader: Arc::<StoreLoader>::clone(&loader),
            clock,
            base: "tiny".parse().expect("a name"),
            tenant_label: ToString::to_string,
        };
        let (actor, _) = Actor::spawn(None, AdapterCacheActor, args).await.expect("starts");
        Self { dir, cache, loader, actor, woken, acme: "acme".parse().expect("tenant"), time, hung }
    }

    fn put(&self, n: u32, bytes: usize) -> AdapterRef {
        let files = AdapterFiles::Gguf(n.to_le_bytes().repeat(bytes / 4));
        self.loader.store.put(&self.loader.key, &self.acme, &files).expect("stored")
    }

    fn want(&self, adapter: &AdapterRef) {
        self.cache.want(adapter, self.time.now() + Duration::from_secs(60));
    }

    /// Leases an adapter, sleeping until something settles in between, as the engine does.
    async fn lease(&self, adapter: &AdapterRef) -> Result<Lease, LoadError> {
        loop {
            self.cache.prefer(&[adapter.id()], true);
            match self.cache.lease(&adapter.id()) {
                LeaseDecision::Leased(lease) => return Ok(lease),
                LeaseDecision::Failed(error) => return Err(error),
                LeaseDecision::Absent => self.want(adapter),
                LeaseDecision::Loading | LeaseDecision::NoSlot => self.woken.notified().await,
            }
        }
    }
}

#[tokio::test]
async fn a_stored_adapter_is_loaded_when_asked_for_and_leased_from_then_on() {
    let b = Bench::new("lease", 2).await;
    let adapter = b.put(1, 1000);
    assert_eq!(b.cache.residency(&adapter.id()), Residency::Absent);
    let lease = b.lease(&adapter).await.expect("loads");
    assert_eq!((lease.hash(), b.cache.residency(&adapter.id())), (adapter.hash, Residency::Ready));
    let (other, third) = (b.put(2, 1000), b.put(3, 1000));
    drop(b.lease(&other).await.expect("loads"));
    drop(b.lease(&third).await.expect("the unleased one goes"));
    assert_eq!(b.cache.residency(&adapter.id()), Residency::Ready);
    assert_eq!(b.cache.residency(&other.id()), Residency::NoSlot, "its request's deadline has not passed");
    assert_eq!(b.loader.fetches.load(Ordering::SeqCst), 3);
    drop(lease);
    let stats = b.cache.stats();
    assert_eq!((stats.leased, stats.resident, stats.evictions), (0, 2, 1));
}

#[tokio::test]
async fn missing_damaged_and_panicking_loads_are_told_and_the_cache_goes_on() {
    let b = Bench::new("failures", 2).await;
    let missing = AdapterRef { tenant: b.acme.clone(), hash: ContentHash::of(b"never stored") };
    assert_eq!(b.lease(&missing).await.expect_err("not there"), LoadError::NotStored);
    let cursed = b.put(1, 100);
    b.loader.panics.store(true, Ordering::SeqCst);
    assert_eq!(b.lease(&cursed).await.expect_err("panics"), LoadError::Panicked);
    b.loader.panics.store(false, Ordering::SeqCst);
    assert_eq!(b.cache.residency(&cursed.id()), Residency::Failed);
    let good = b.put(2, 100);
    assert!(b.lease(&good).await.is_ok());
}

#[tokio::test]
async fn a_reader_that_hangs_is_given_up_and_the_next_try_works() {
    let b = Bench::new("hangs", 1).await;
    let (hung, other) = (b.put(1, 100), b.put(2, 100));
    b.loader.hangs.store(true, Ordering::SeqCst);
    b.want(&hung);
    while b.loader.fetches.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    b.time.pass(crate::cache::READ_MAX);
    b.cache.expire();
    assert_eq!(b.lease(&hung).await.expect_err("given up"), LoadError::TimedOut);
    assert!(b.lease(&other).await.is_ok(), "the only slot is free for others");
    b.time.pass(crate::cache::RETRY_FIRST);
    b.want(&hung);
    assert!(b.lease(&hung).await.is_ok(), "tried again on another thread");
    assert_eq!(b.cache.stats().stuck, 1);
    b.hung.send(()).expect("still blocked");
    while b.cache.stats().stuck > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(b.lease(&hung).await.is_ok(), "what came late did no harm");
}

#[tokio::test]
async fn a_miss_from_disk_is_fast_and_a_hit_takes_no_time() {
    let b = Bench::new("speed", 2).await;
    let (adapter, size) = (b.put(1, 2 << 20), 2 << 20);
    let id = adapter.id();
    let started = SystemClock.now();
    drop(b.lease(&adapter).await.expect("loads"));
    let miss = started.elapsed();
    let started = SystemClock.now();
    for _ in 0..10_000 {
        let LeaseDecision::Leased(lease) = b.cache.lease(&id) else { panic!("resident") };
        drop(lease);
    }
    let hit = started.elapsed() / 10_000;
    println!("miss of {size} bytes {miss:?}, lease and release {hit:?}");
    assert!(miss < Duration::from_secs(2) && hit < Duration::from_micros(100), "{miss:?} {hit:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_dropped_on_many_threads_leave_none_behind() {
    let b = Bench::new("threads", 3).await;
    let adapters: Vec<AdapterRef> = (0..6).map(|n| b.put(n, 400)).collect();
    let droppers: Vec<_> = (0..3)
        .map(|_| {
            let (sender, receiver) = std::sync::mpsc::sync_channel::<Lease>(4);
            (
                sender,
                thread::spawn(move || {
                    receiver.into_iter().filter(|lease| lease.adapter().hash == lease.hash()).count()
                }),
            )
        })
        .collect();
    for round in 0..3_000_usize {
        // Two of three turns go to the same two adapters.
        let adapter = &adapters[if round % 3 < 2 { round % 3 } else { round / 3 % 6 }];
        b.want(adapter);
        let lease = b.lease(adapter).await.expect("loads");
        assert_eq!(lease.hash(), adapter.hash);
        for (sender, _) in &droppers {
            sender.send(lease.clone()).expect("listening");
        }
    }
    for (sender, dropper) in droppers {
        drop(sender);
        assert_eq!(dropper.join().expect("ended"), 3_000);
    }
    let stats = b.cache.stats();
    println!("3,000 leases dropped on four threads: {stats:?}");
    assert_eq!(stats.leased, 0);
    assert!(stats.evictions > 10 && stats.hits > 1_000);
}
