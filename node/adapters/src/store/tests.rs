//! Behaviour of the store on a real directory, against damage, crashes and a full disk.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

use model::adapter::AdapterFiles;
use shared::id::TenantId;

use super::*;

/// Objects on the disk.
fn n_objects(dir: &Dir) -> usize {
    let mut n = 0;
    for_each_object(&dir.0.join("objects"), |_, _| {
        n += 1;
        Ok(())
    })
    .expect("listed");
    n
}

fn n_tmp(dir: &Dir) -> usize {
    fs::read_dir(dir.0.join("tmp")).expect("listed").count()
}

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

    fn put(&self, files: &AdapterFiles) -> AdapterRef {
        self.store.put(&self.key, &self.acme, files).expect("stored")
    }

    fn read(&self, adapter: &AdapterRef) -> Result<HostFiles, StoreError> {
        self.store.read(&self.key, adapter)
    }

    fn path(&self, adapter: &AdapterRef) -> PathBuf {
        self.store.object_path(&adapter.id())
    }
}

#[test]
fn what_was_stored_is_read_back_also_after_reopening() {
    let b = Bench::new("roundtrip");
    let (one, two) = (b.put(&peft(1)), b.put(&AdapterFiles::Gguf(b"GGUF...".to_vec())));
    assert_eq!(b.put(&peft(1)), one, "storing twice is harmless");
    assert_eq!(n_objects(&b.dir), 2);
    assert_eq!(b.read(&one).expect("there").files(), &peft(1));
    let again = Store::open(&b.dir.0, 1 << 20).expect("opens");
    assert_eq!((n_objects(&b.dir), again.used_bytes()), (2, b.store.used_bytes()));
    assert_eq!(again.read(&b.key, &two).expect("there").files(), &AdapterFiles::Gguf(b"GGUF...".to_vec()));
    assert!(b.store.delete(&one).expect("removed") && !b.store.delete(&one).expect("gone"));
    assert!(matches!(b.read(&one), Err(StoreError::NotFound { .. })));
    assert_eq!(n_objects(&b.dir), 1);
}

#[test]
fn names_and_bytes_on_disk_reveal_nothing_and_are_private() {
    let b = Bench::new("private");
    let hash = b.put(&peft(1));
    let path = b.path(&hash);
    assert!(!path.to_string_lossy().contains("acme") && !path.to_string_lossy().contains(&hash.hash.to_string()));
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
    let copy = AdapterRef { tenant: baker.clone(), hash: hash.hash };
    assert!(matches!(b.store.read(&baker_key, &copy), Err(StoreError::NotFound { .. })));
    assert_eq!(b.store.put(&baker_key, &baker, &peft(1)).expect("stored"), copy);
    b.store.delete(&hash).expect("removed");
    assert!(b.store.read(&baker_key, &copy).is_ok());
}

#[test]
fn a_wrong_key_is_told_from_damage_and_sets_nothing_aside() {
    let b = Bench::new("key");
    let hash = b.put(&peft(1));
    assert!(matches!(b.store.read(&TenantKey::random(), &hash), Err(StoreError::Seal(_))));
    assert!(b.read(&hash).is_ok(), "still there for the right key");
}

#[test]
fn only_the_latest_damaged_files_are_kept() {
    let b = Bench::new("quarantine");
    let damaged = |fill: u8| {
        let adapter = b.put(&peft(fill));
        fs::write(b.path(&adapter), b"nothing sealed").expect("written");
        assert!(matches!(b.read(&adapter), Err(StoreError::Damaged { .. })));
        b.dir.0.join("quarantine").join(adapter.id().to_string())
    };
    let files: Vec<PathBuf> = (0..QUARANTINE_FILES_MAX as u8 + 4).map(damaged).collect();
    let (old, kept) = files.split_at(4);
    assert!(old.iter().all(|path| !path.exists()) && kept.iter().all(|path| path.exists()));
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
    let again = Store::open(&b.dir.0, 1 << 20).expect("opens");
    assert_eq!((again.used_bytes(), n_objects(&b.dir)), (size, 1));
}

#[test]
fn what_a_crash_left_half_written_is_removed_at_open_and_never_visible() {
    let b = Bench::new("torn");
    // Forgotten as a dying process forgets them: at the start, in the middle, complete but not named.
    let mut adapter = None;
    for (n, step) in ["begun", "written", "finished"].into_iter().enumerate() {
        let mut incoming = b.store.receive(&b.key, &b.acme).expect("begins");
        if step != "begun" {
            incoming.write(&vec![7; 3 * SEGMENT_BYTES / 2]).expect("written");
        }
        if step == "finished" {
            let received = incoming.finish(&b.key, None).expect("finished");
            adapter = Some(received.adapter().clone());
            std::mem::forget(received);
        } else {
            std::mem::forget(incoming);
        }
        assert_eq!((n_tmp(&b.dir), n_objects(&b.dir)), (n + 1, 0), "{step}");
    }
    let again = Store::open(&b.dir.0, 1 << 20).expect("opens");
    assert_eq!((n_tmp(&b.dir), again.used_bytes()), (0, 0));
    assert!(matches!(again.read(&b.key, &adapter.expect("finished")), Err(StoreError::NotFound { .. })));
}

#[test]
fn an_upload_that_is_given_up_leaves_no_file_and_no_bytes_of_the_budget() {
    let b = Bench::new("given-up");
    let mut incoming = b.store.receive(&b.key, &b.acme).expect("begins");
    incoming.write(&vec![7; 2 * SEGMENT_BYTES]).expect("written");
    assert!(b.store.used_bytes() > 2 * SEGMENT_BYTES as u64 && n_tmp(&b.dir) == 1);
    drop(incoming);
    assert_eq!((b.store.used_bytes(), n_tmp(&b.dir)), (0, 0));
    let incoming = b.store.receive(&b.key, &b.acme).expect("begins");
    drop(incoming.finish(&b.key, Some(b"{}")).expect("finished"));
    assert_eq!((b.store.used_bytes(), n_tmp(&b.dir), n_objects(&b.dir)), (0, 0, 0));
}

#[test]
fn pieces_of_any_size_make_the_same_adapter_as_the_whole() {
    let b = Bench::new("pieces");
    let weights: Vec<u8> = (0..SEGMENT_BYTES + 1000).map(|at| at as u8).collect();
    for step in [1000, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, weights.len()] {
        let mut incoming = b.store.receive(&b.key, &b.acme).expect("begins");
        weights.chunks(step).for_each(|piece| incoming.write(piece).expect("written"));
        let mut received = incoming.finish(&b.key, Some(b"{}")).expect("finished");
        let files = AdapterFiles::Peft { config: b"{}".to_vec(), weights: weights.clone() };
        assert_eq!(received.adapter().hash, files.content_hash());
        assert_eq!(received.read(&b.key).expect("reads back").files(), &files);
        let adapter = received.adapter().clone();
        received.publish().expect("named");
        assert_eq!(b.read(&adapter).expect("there").files(), &files);
    }
    assert_eq!(n_objects(&b.dir), 1);
}

#[test]
fn files_that_no_name_points_at_are_swept_and_nothing_else() {
    let b = Bench::new("sweep");
    let (kept, orphan) = (b.put(&peft(1)), b.put(&peft(2)));
    let used = b.store.used_bytes();
    assert_eq!(b.store.sweep(&HashSet::from([kept.id(), orphan.id()])).expect("swept"), 0);
    assert_eq!(b.store.sweep(&HashSet::from([kept.id()])).expect("swept"), 1);
    assert!(b.read(&kept).is_ok() && matches!(b.read(&orphan), Err(StoreError::NotFound { .. })));
    assert_eq!(b.store.used_bytes(), used / 2);
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
    // What had already arrived of the refused file counted until then.
    assert!(
        matches!(refused, StoreError::Full { used_bytes, budget_bytes: 6000, .. } if used_bytes >= used),
        "{refused}"
    );
    let told = RequestError::from(refused);
    assert_eq!((told.kind, told.code), (ErrorKind::StorageFull, "storage_full"));
    assert_eq!((store.used_bytes(), n_objects(&dir)), (used, 1));
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
        assert!(!stored.is_empty() && n_objects(&dir) == stored.len());
        for hash in &stored {
            assert!(store.read(&key, hash).is_ok());
        }
        assert_eq!(fs::read_dir(dir.0.join("tmp")).expect("listed").count(), 0);
        store.delete(&stored[0]).expect("removed");
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
    let hashes: Vec<AdapterRef> = std::thread::scope(|scope| {
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
    assert_eq!(again.used_bytes(), b.store.used_bytes());
    assert_eq!(n_objects(&b.dir), 4);
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
    assert_eq!((n_objects(&dir), store.used_bytes()), (3_000, 3_000));
    assert!(took.as_millis() < 150 * 5, "100,000 within 5 s, five times that on a busy machine: {took:?}");
}
