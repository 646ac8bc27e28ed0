//! The disk as a cache of an object store: a shared folder, and a real S3 server where one is named.

use std::fs;
use std::path::{Path as FilePath, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use model::adapter::AdapterFiles;
use shared::adapter::AdapterRef;
use shared::config::ObjectsAt;
use shared::id::TenantId;
use shared::seal::TenantKey;
use tokio::runtime::Runtime;

use super::*;
use crate::store::{Store, StoreError};

/// Two nodes, each with a disk of its own, before one object store.
struct Bench {
    root: PathBuf,
    runtime: Runtime,
    objects: Objects,
    key: Arc<TenantKey>,
    acme: TenantId,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

impl Bench {
    fn at(address: Option<ObjectsAt>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tenantry-objects-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&root);
        let runtime = Runtime::new().expect("starts");
        let address = address.unwrap_or_else(|| ObjectsAt::Folder(root.join("objects")));
        let objects = {
            let _inside = runtime.enter();
            Objects::open(&address).expect("opens")
        };
        Self { root, runtime, objects, key: Arc::new(TenantKey::random()), acme: "acme".parse().expect("valid tenant") }
    }

    fn new() -> Self {
        Self::at(None)
    }

    fn store(&self, node: &str, budget_bytes: u64) -> Store {
        Store::open_before(&self.root.join(node), budget_bytes, Some(self.objects.clone())).expect("opens")
    }

    fn put(&self, store: &Store, files: &AdapterFiles) -> AdapterRef {
        store.put(&self.key, &self.acme, files).expect("stored")
    }

    /// Where the object lies in the shared folder.
    fn shared(&self, adapter: &AdapterRef) -> PathBuf {
        let id = adapter.id().to_string();
        self.root.join("objects").join(&id[..2]).join(id)
    }

    /// Files that a node shows as objects, and files it is still writing.
    fn files_of(&self, node: &str) -> (usize, usize) {
        (count(&self.root.join(node).join("objects")), count(&self.root.join(node).join("tmp")))
    }
}

fn count(dir: &FilePath) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| if entry.path().is_dir() { count(&entry.path()) } else { 1 }).sum()
}

fn gguf(fill: u8, bytes: usize) -> AdapterFiles {
    AdapterFiles::Gguf(vec![fill; bytes])
}

const ROOMY: u64 = 64 << 20;

/// A node serves what was uploaded through another one, and then needs the object store no more.
fn one_node_serves_what_another_stored(b: &Bench) {
    let (one, two) = (b.store("a", ROOMY), b.store("b", ROOMY));
    // Larger than two parts of an upload.
    let files = gguf(7, 20 << 20);
    let adapter = b.put(&one, &files);
    assert_eq!(b.files_of("b"), (0, 0));
    assert_eq!(two.read(&b.key, &adapter).expect("fetched").files(), &files);
    assert_eq!(b.files_of("b"), (1, 0));
    assert_eq!(two.used_bytes(), one.used_bytes());
    assert!(b.objects.delete(&adapter.id()).is_ok());
    assert_eq!(two.read(&b.key, &adapter).expect("on its disk").files(), &files);
    two.forget_copy(&adapter).expect("forgets");
    assert!(matches!(two.read(&b.key, &adapter), Err(StoreError::NotFound { .. })), "gone from everywhere but a");
    assert!(one.delete(&adapter).is_ok(), "deleting what the object store lost is no error");
}

#[test]
fn a_node_serves_an_adapter_uploaded_through_another_node() {
    one_node_serves_what_another_stored(&Bench::new());
}

/// Against a server of somebody else's: AWS_ENDPOINT, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ALLOW_HTTP and
/// TENANTRY_TEST_S3=s3://bucket/prefix name it. Without them it says that it was skipped.
#[cfg(feature = "s3")]
#[test]
fn a_node_serves_an_adapter_uploaded_through_another_node_over_s3() {
    let Ok(url) = std::env::var("TENANTRY_TEST_S3") else {
        return println!("skipped: TENANTRY_TEST_S3 names no bucket");
    };
    let b = Bench::at(Some(ObjectsAt::S3(url)));
    one_node_serves_what_another_stored(&b);
    assert!(matches!(b.objects.size(&shared::adapter::AdapterId([9; 32])), Err(ObjectsError::NotFound)));
}

#[test]
fn what_is_cut_short_changed_or_another_adapters_is_never_visible() {
    let b = Bench::new();
    let (one, two) = (b.store("a", ROOMY), b.store("b", ROOMY));
    let adapter = b.put(&one, &gguf(1, 300_000));
    let other = b.put(&one, &gguf(2, 300_000));
    let whole = fs::read(b.shared(&adapter)).expect("there");
    let mut changed = whole.clone();
    changed[150_000] ^= 1;
    let longer = [whole.as_slice(), b"more"].concat();
    let others = fs::read(b.shared(&other)).expect("there");
    for bytes in [&whole[..whole.len() - 1], &whole[..10], b"", &changed, &longer, &others] {
        fs::write(b.shared(&adapter), bytes).expect("writes");
        let refused = two.read(&b.key, &adapter);
        // Another adapter's object is intact, and sealed for another name.
        let is_refused = matches!(refused, Err(StoreError::Damaged { .. } | StoreError::Seal(_)));
        assert!(is_refused, "{:?}", refused.err());
        assert_eq!((b.files_of("b"), two.used_bytes()), ((0, 0), 0));
    }
    fs::write(b.shared(&adapter), &whole).expect("writes");
    assert!(matches!(two.read(&TenantKey::random(), &adapter), Err(StoreError::Seal(_))));
    assert_eq!(b.files_of("b"), (0, 0));
    assert!(two.read(&b.key, &adapter).is_ok());
}

#[test]
fn a_version_that_the_object_store_did_not_take_is_not_named() {
    let b = Bench::new();
    let store = b.store("a", ROOMY);
    fs::remove_dir_all(b.root.join("objects")).expect("removes");
    fs::write(b.root.join("objects"), b"no folder").expect("writes");
    let refused = store.put(&b.key, &b.acme, &gguf(1, 1000));
    assert!(matches!(refused, Err(StoreError::Objects { .. })), "{:?}", refused.err());
    assert_eq!((b.files_of("a"), store.used_bytes()), ((0, 0), 0));
}

#[test]
fn a_damaged_copy_is_set_aside_and_fetched_again() {
    let b = Bench::new();
    let store = b.store("a", ROOMY);
    let adapter = b.put(&store, &gguf(1, 300_000));
    let path = store.object_path(&adapter.id());
    let mut bytes = fs::read(&path).expect("there");
    bytes[200_000] ^= 1;
    fs::write(&path, bytes).expect("writes");
    assert_eq!(store.read(&b.key, &adapter).expect("fetched").files(), &gguf(1, 300_000));
    assert_eq!(count(&b.root.join("a").join("quarantine")), 1);
    assert_eq!(b.files_of("a"), (1, 0));
}

#[test]
fn the_longest_unused_make_room_and_come_back_when_asked_for() {
    let b = Bench::new();
    let store = b.store("a", 700_000);
    let all: Vec<_> = (0..2).map(|fill| b.put(&store, &gguf(fill, 300_000))).collect();
    // Used later than the second was written, whatever the file system's clock can tell apart.
    std::thread::sleep(std::time::Duration::from_millis(20));
    store.read(&b.key, &all[0]).expect("there");
    let third = b.put(&store, &gguf(2, 300_000));
    let here = |adapter: &AdapterRef| store.object_path(&adapter.id()).exists();
    assert_eq!((here(&all[0]), here(&all[1]), here(&third)), (true, false, true));
    assert_eq!(store.read(&b.key, &all[1]).expect("fetched").files(), &gguf(1, 300_000));
    assert!(store.used_bytes() <= 700_000);
    // What only this disk holds stays, whatever is asked for.
    b.objects.delete(&all[1].id()).expect("deletes");
    let too_large = store.put(&b.key, &b.acme, &gguf(3, 600_000));
    assert!(matches!(too_large, Err(StoreError::Full { .. })));
    assert!(here(&all[1]));
}

#[test]
fn what_was_stored_before_there_was_an_object_store_is_shared() {
    let b = Bench::new();
    let alone = Store::open(&b.root.join("a"), ROOMY).expect("opens");
    let adapter = b.put(&alone, &gguf(1, 1000));
    let two = b.store("b", ROOMY);
    assert!(matches!(two.read(&b.key, &adapter), Err(StoreError::NotFound { .. })));
    let one = b.store("a", ROOMY);
    assert_eq!((one.share().expect("shares"), one.share().expect("shares")), (1, 0));
    assert!(two.read(&b.key, &adapter).is_ok());
}

#[test]
fn objects_are_fetched_from_threads_of_a_running_node() {
    let b = Bench::new();
    let (one, two) = (b.store("a", ROOMY), b.store("b", ROOMY));
    let adapter = b.put(&one, &gguf(1, 1000));
    let key = b.key.clone();
    let read =
        b.runtime.block_on(async { tokio::task::spawn_blocking(move || two.read(&key, &adapter).is_ok()).await });
    assert!(read.expect("no panic"));
}
