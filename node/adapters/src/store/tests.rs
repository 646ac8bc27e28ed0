//! Behaviour of the store on a real directory, against damage, crashes and a full disk.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use super::*;

/// A directory of this test alone, removed at its end.
struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("tenantry-store-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("the temporary directory is writable");
        Self(path)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tenant(name: &str) -> TenantId {
    name.parse().expect("tenant")
}

fn peft(fill: u8) -> AdapterFiles {
    let weights = (0..5000_u32).map(|i| fill.wrapping_add(i.wrapping_mul(2_654_435_761).to_le_bytes()[3])).collect();
    AdapterFiles::Peft { config: br#"{"r": 8}"#.to_vec(), weights }
}

struct Bench {
    dir: Dir,
    store: Store,
    key: TenantKey,
    acme: TenantId,
}

impl Bench {
    fn new(name: &str) -> Self {
        let dir = Dir::new(name);
        let store = Store::open(&dir.0, 1 << 20).expect("opens");
        Self { dir, store, key: TenantKey::random(), acme: tenant("acme") }
    }

    fn put(&self, files: &AdapterFiles) -> ContentHash {
        self.store.put(&self.key, &self.acme, files).expect("stored")
    }

    fn read(&self, hash: &ContentHash) -> Result<HostFiles, StoreError> {
        self.store.read(&self.key, &self.acme, hash)
    }

    fn path(&self, hash: &ContentHash) -> PathBuf {
        self.store.object_path(&object_id(&self.acme, hash))
    }
}

#[test]
fn what_was_stored_is_read_back_also_after_reopening() {
    let b = Bench::new("roundtrip");
    let (one, two) = (b.put(&peft(1)), b.put(&AdapterFiles::Gguf(b"GGUF...".to_vec())));
    assert_eq!(b.put(&peft(1)), one, "storing twice is harmless");
    assert_eq!(b.store.n_objects(), 2);
    assert_eq!(b.read(&one).expect("there").files(), &peft(1));
    let again = Store::open(&b.dir.0, 1 << 20).expect("opens");
    assert_eq!((again.n_objects(), again.used_bytes()), (2, b.store.used_bytes()));
    assert_eq!(again.read(&b.key, &b.acme, &two).expect("there").files(), &AdapterFiles::Gguf(b"GGUF...".to_vec()));
    assert!(b.store.delete(&b.acme, &one).expect("removed") && !b.store.delete(&b.acme, &one).expect("gone"));
    assert!(matches!(b.read(&one), Err(StoreError::NotFound { .. })) && !b.store.contains(&b.acme, &one));
    assert_eq!(b.store.n_objects(), 1);
}

#[test]
fn names_and_bytes_on_disk_reveal_nothing_and_are_private() {
    let b = Bench::new("private");
    let hash = b.put(&peft(1));
    let path = b.path(&hash);
    assert!(!path.to_string_lossy().contains("acme") && !path.to_string_lossy().contains(&hash.to_string()));
    let bytes = fs::read(&path).expect("there");
    assert!(!bytes.windows(8).any(|window| window == br#"{"r": 8}"#));
    let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(path.parent().expect("shard")), 0o700);
    assert_eq!(mode(&b.dir.0.join("objects")), 0o700);
}

#[test]
fn the_same_bytes_of_two_tenants_are_two_objects_under_two_keys() {
    let b = Bench::new("tenants");
    let (baker, baker_key) = (tenant("baker"), TenantKey::random());
    let hash = b.put(&peft(1));
    assert!(matches!(b.store.read(&baker_key, &baker, &hash), Err(StoreError::NotFound { .. })));
    assert_eq!(b.store.put(&baker_key, &baker, &peft(1)).expect("stored"), hash);
    b.store.delete(&b.acme, &hash).expect("removed");
    assert!(b.store.read(&baker_key, &baker, &hash).is_ok());
}

#[test]
fn a_wrong_key_is_told_from_damage_and_sets_nothing_aside() {
    let b = Bench::new("key");
    let hash = b.put(&peft(1));
    assert!(matches!(b.store.read(&TenantKey::random(), &b.acme, &hash), Err(StoreError::Seal(_))));
    assert!(b.read(&hash).is_ok(), "still there for the right key");
}

#[test]
fn one_bit_flipped_at_a_thousand_places_is_found_a_thousand_times() {
    let b = Bench::new("bitflip");
    let hash = b.put(&peft(1));
    let path = b.path(&hash);
    let good = fs::read(&path).expect("there");
    let mut state = 1_u64;
    let mut found = 0;
    for _ in 0..1000 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let bit = (state >> 20) as usize % (good.len() * 8);
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        fs::write(&path, &bad).expect("written");
        b.store.0.used_bytes.store(good.len() as u64, Ordering::Relaxed);
        b.store.0.n_objects.store(1, Ordering::Relaxed);
        assert!(matches!(b.read(&hash), Err(StoreError::Damaged { .. })), "bit {bit}");
        assert!(!path.exists() && b.store.used_bytes() == 0, "set aside and no longer counted");
        found += 1;
    }
    assert_eq!(found, 1000);
    assert!(matches!(b.read(&hash), Err(StoreError::NotFound { .. })));
    assert_eq!(b.put(&peft(1)), hash);
    assert!(b.read(&hash).is_ok(), "uploading again repairs it");
}

#[test]
fn a_file_cut_short_anywhere_is_refused() {
    let b = Bench::new("truncate");
    let hash = b.put(&peft(1));
    let path = b.path(&hash);
    let good = fs::read(&path).expect("there");
    let lengths = (0..60).chain((60..good.len()).step_by(97)).chain([good.len() - 1]);
    for length in lengths {
        fs::write(&path, &good[..length]).expect("written");
        b.store.0.used_bytes.store(good.len() as u64, Ordering::Relaxed);
        b.store.0.n_objects.store(1, Ordering::Relaxed);
        assert!(matches!(b.read(&hash), Err(StoreError::Damaged { .. })), "{length} of {} bytes", good.len());
    }
}

#[test]
fn a_damaged_file_is_repaired_by_uploading_over_it() {
    let b = Bench::new("repair");
    let hash = b.put(&peft(1));
    let size = b.store.used_bytes();
    fs::write(b.path(&hash), b"garbage").expect("written");
    assert_eq!(b.put(&peft(1)), hash);
    assert!(b.read(&hash).is_ok());
    assert_eq!(fs::read_dir(b.dir.0.join("quarantine")).expect("listed").count(), 1);
    let again = Store::open(&b.dir.0, 1 << 20).expect("opens");
    assert_eq!((again.used_bytes(), again.n_objects()), (size, 1));
}

#[test]
fn what_a_crash_left_half_written_is_removed_at_open_and_never_visible() {
    let b = Bench::new("torn");
    let hash = ContentHash::of(b"never finished");
    let sealed = seal::seal(&b.key, &b.acme, &hash, b"half");
    for (n, length) in [0, 1, sealed.len() / 2, sealed.len()].into_iter().enumerate() {
        fs::write(b.dir.0.join("tmp").join(format!("{}.{n}", object_id(&b.acme, &hash))), &sealed[..length])
            .expect("written");
    }
    let again = Store::open(&b.dir.0, 1 << 20).expect("opens");
    assert_eq!(fs::read_dir(b.dir.0.join("tmp")).expect("listed").count(), 0);
    assert!(matches!(again.read(&b.key, &b.acme, &hash), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_link_or_a_pipe_in_place_of_an_object_is_not_followed() {
    let b = Bench::new("links");
    let hash = b.put(&peft(1));
    let path = b.path(&hash);
    let aside = b.dir.0.join("elsewhere");
    fs::rename(&path, &aside).expect("moved");
    symlink(&aside, &path).expect("linked");
    assert!(matches!(b.read(&hash), Err(StoreError::Io { .. })));
    assert!(!b.store.contains(&b.acme, &hash));
    fs::remove_file(&path).expect("removed");
    assert!(Command::new("mkfifo").arg(&path).status().expect("mkfifo runs").success());
    assert!(matches!(b.read(&hash), Err(StoreError::Io { .. })), "and reading does not hang");
}

#[test]
fn a_full_budget_is_refused_and_leaves_nothing_behind() {
    let dir = Dir::new("budget");
    let store = Store::open(&dir.0, 6000).expect("opens");
    let (key, acme) = (TenantKey::random(), tenant("acme"));
    store.put(&key, &acme, &peft(1)).expect("fits");
    let used = store.used_bytes();
    let refused = store.put(&key, &acme, &peft(2)).expect_err("full");
    assert!(
        matches!(refused, StoreError::Full { used_bytes, budget_bytes: 6000, .. } if used_bytes == used),
        "{refused}"
    );
    let told = RequestError::from(refused);
    assert_eq!((told.kind, told.code), (ErrorKind::StorageFull, "storage_full"));
    assert_eq!((store.used_bytes(), store.n_objects()), (used, 1));
    assert_eq!(fs::read_dir(dir.0.join("tmp")).expect("listed").count(), 0);
}

#[test]
fn a_full_disk_is_refused_and_what_is_stored_stays_readable() {
    let dir = Dir::new("enospc");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"]).arg(&dir.0).output();
    if !mounted.as_ref().is_ok_and(|output| output.status.success()) {
        eprintln!("SKIPPED: a full disk needs a 64 KiB tmpfs, and mounting one is not allowed here: {mounted:?}");
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        let store = Store::open(&dir.0, 1 << 30).expect("opens");
        let (key, acme) = (TenantKey::random(), tenant("acme"));
        let mut stored = Vec::new();
        let full = (0..100).find_map(|n| match store.put(&key, &acme, &peft(n)) {
            Ok(hash) => {
                stored.push(hash);
                None
            }
            Err(error) => Some(error),
        });
        assert!(matches!(full, Some(StoreError::Full { .. })), "{full:?}");
        assert!(!stored.is_empty() && store.n_objects() == stored.len() as u64);
        for hash in &stored {
            assert!(store.read(&key, &acme, hash).is_ok());
        }
        assert_eq!(fs::read_dir(dir.0.join("tmp")).expect("listed").count(), 0);
        store.delete(&acme, &stored[0]).expect("removed");
        assert!(store.put(&key, &acme, &peft(200)).is_ok(), "room again after a deletion");
        println!("{} objects fit on 64 KiB", stored.len());
    });
    let unmounted = Command::new("umount").arg(&dir.0).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    outcome.expect("see above");
}

#[test]
fn uploads_from_several_threads_end_with_one_object_each() {
    let b = Bench::new("threads");
    let hashes: Vec<ContentHash> = std::thread::scope(|scope| {
        let uploads: Vec<_> = (0..8_u8)
            .map(|n| {
                scope.spawn({
                    let b = &b;
                    move || b.put(&peft(n / 2))
                })
            })
            .collect();
        uploads.into_iter().map(|upload| upload.join().expect("stored")).collect()
    });
    for hash in &hashes {
        assert!(b.read(hash).is_ok());
    }
    let again = Store::open(&b.dir.0, 1 << 20).expect("opens");
    assert_eq!((again.n_objects(), again.used_bytes()), (b.store.n_objects(), b.store.used_bytes()));
    assert_eq!(again.n_objects(), 4);
}

#[test]
fn three_thousand_objects_are_counted_quickly_at_open() {
    use shared::clock::{Clock, SystemClock};
    let dir = Dir::new("many");
    drop(Store::open(&dir.0, 1 << 30).expect("opens"));
    for n in 0..3_000_u32 {
        let id = blake3::hash(&n.to_le_bytes()).to_hex();
        let shard = dir.0.join("objects").join(&id[..2]);
        fs::create_dir_all(&shard).expect("made");
        fs::write(shard.join(id.as_str()), b"x").expect("written");
    }
    let started = SystemClock.now();
    let store = Store::open(&dir.0, 1 << 30).expect("opens");
    let took = started.elapsed();
    println!("3,000 objects counted in {took:?}");
    assert_eq!((store.n_objects(), store.used_bytes()), (3_000, 3_000));
    assert!(took.as_millis() < 150 * 5, "100,000 within 5 s, five times that on a busy machine: {took:?}");
}
