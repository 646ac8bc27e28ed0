//! Tests of the envelope encryption: what opens, what must not, what is never shown.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

fn tenant(text: &str) -> TenantId {
    text.parse().expect("valid tenant id")
}

/// A directory that goes when the test ends.
struct TestDir(PathBuf);

impl TestDir {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tenantry-seal-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).expect("temporary directory");
        Self(dir)
    }
}

impl Drop for TestDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn sealed_content_opens_with_the_same_key_tenant_and_hash() {
    let (key, acme) = (TenantKey::random(), tenant("acme"));
    for content in [&b""[..], b"x", &vec![7_u8; object::SEGMENT_BYTES], &vec![7_u8; 2 * object::SEGMENT_BYTES + 1]] {
        let hash = ContentHash::of(content);
        let sealed = seal(&key, &acme, &hash, content);
        assert_eq!(Some(sealed.len() as u64), object::sealed_bytes(content.len() as u64));
        assert_eq!(open(&key, &acme, &hash, &sealed).expect("opens").as_slice(), content);
    }
}

#[test]
fn nothing_opens_in_another_place_or_with_another_key() {
    let (key, acme, content) = (TenantKey::random(), tenant("acme"), b"weights".as_slice());
    let hash = ContentHash::of(content);
    let sealed = seal(&key, &acme, &hash, content);
    assert!(open(&TenantKey::random(), &acme, &hash, &sealed).is_err(), "another key");
    assert!(open(&key, &tenant("baker"), &hash, &sealed).is_err(), "another tenant");
    assert!(open(&key, &acme, &ContentHash::of(b"other"), &sealed).is_err(), "another hash");
}

#[test]
fn every_changed_bit_and_every_cut_is_noticed() {
    let (key, acme, content) = (TenantKey::random(), tenant("acme"), b"weights".as_slice());
    let hash = ContentHash::of(content);
    let sealed = seal(&key, &acme, &hash, content);
    for bit in 0..sealed.len() * 8 {
        let mut changed = sealed.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        assert!(open(&key, &acme, &hash, &changed).is_err(), "bit {bit} was changed unnoticed");
    }
    for n_bytes in 0..sealed.len() {
        assert!(open(&key, &acme, &hash, &sealed[..n_bytes]).is_err(), "cut to {n_bytes} bytes unnoticed");
    }
}

#[test]
fn damage_is_told_from_a_key_of_somebody_else() {
    let (key, acme, content) = (TenantKey::random(), tenant("acme"), vec![1_u8; 1000]);
    let hash = ContentHash::of(&content);
    let sealed = seal(&key, &acme, &hash, &content);
    assert!(matches!(open(&TenantKey::random(), &acme, &hash, &sealed), Err(SealError::DoesNotOpen { .. })));
    for at in (4..sealed.len()).step_by(7) {
        let mut changed = sealed.clone();
        changed[at] ^= 1;
        assert!(matches!(open(&key, &acme, &hash, &changed), Err(SealError::Damaged { .. })), "byte {at}");
    }
}

#[test]
fn segments_cannot_be_swapped_between_places_or_objects() {
    let (key, acme) = (TenantKey::random(), tenant("acme"));
    let content: Vec<u8> = (0..2 * object::SEGMENT_BYTES).map(|at| (at / object::SEGMENT_BYTES) as u8).collect();
    let hash = ContentHash::of(&content);
    let (one, two) = (seal(&key, &acme, &hash, &content), seal(&key, &acme, &hash, &content));
    let middle = object::HEADER_BYTES + object::SEGMENT_BYTES + TAG_BYTES;
    let swapped = [&one[..object::HEADER_BYTES], &one[middle..], &one[object::HEADER_BYTES..middle]].concat();
    assert!(open(&key, &acme, &hash, &swapped).is_err(), "another order");
    let mixed = [&one[..middle], &two[middle..]].concat();
    assert!(open(&key, &acme, &hash, &mixed).is_err(), "another object's segment");
}

#[test]
fn the_same_content_sealed_twice_shares_no_bytes_beyond_the_magic() {
    let (key, acme, content) = (TenantKey::random(), tenant("acme"), vec![0_u8; 4096]);
    let hash = ContentHash::of(&content);
    let (one, two) = (seal(&key, &acme, &hash, &content), seal(&key, &acme, &hash, &content));
    // Magic and length are the same.
    let equal = one.iter().zip(&two).skip(4).filter(|(a, b)| a == b).count();
    assert!(equal < 64, "{equal} of {} bytes are equal, random bytes give about 16", one.len());
}

#[test]
fn a_wrapped_tenant_key_opens_only_for_its_tenant_and_cluster() {
    let (cluster, acme) = (ClusterKey::random(), tenant("acme"));
    let key = TenantKey::random();
    let wrapped = cluster.wrap(&acme, &key);
    let back = cluster.unwrap(&acme, &wrapped).expect("unwraps");
    assert_eq!(back.derive("test"), key.derive("test"));
    assert!(cluster.unwrap(&tenant("baker"), &wrapped).is_err());
    assert!(ClusterKey::random().unwrap(&acme, &wrapped).is_err());
}

#[test]
fn without_the_wrapped_key_the_cluster_key_opens_nothing() {
    let (cluster, acme, content) = (ClusterKey::random(), tenant("acme"), b"weights".as_slice());
    let hash = ContentHash::of(content);
    let sealed = {
        let key = TenantKey::random();
        seal(&key, &acme, &hash, content)
    };
    // The tenant is created anew: the cluster key is the same, the tenant key is not.
    let renewed = cluster.unwrap(&acme, &cluster.wrap(&acme, &TenantKey::random())).expect("unwraps");
    assert!(open(&renewed, &acme, &hash, &sealed).is_err());
}

#[test]
fn a_wrapped_key_round_trips_as_text_and_refuses_other_versions() {
    let (cluster, acme) = (ClusterKey::random(), tenant("acme"));
    let wrapped = cluster.wrap(&acme, &TenantKey::random());
    let text = serde_json::to_string(&wrapped).expect("serialises");
    let back: WrappedKey = serde_json::from_str(&text).expect("reads back");
    assert!(back == wrapped);
    let newer = text.replacen("\"01", "\"02", 1);
    let error = serde_json::from_str::<WrappedKey>(&newer).expect_err("newer version").to_string();
    assert!(error.contains("version 2"), "{error}");
    for broken in ["\"\"", "\"01\"", &text.to_uppercase(), &text.replacen('0', "é", 1)] {
        assert!(serde_json::from_str::<WrappedKey>(broken).is_err(), "{broken} was accepted");
    }
}

#[test]
fn debug_output_shows_no_key_bytes() {
    let (cluster, key) = (ClusterKey::random(), TenantKey::random());
    let wrapped = cluster.wrap(&tenant("acme"), &key);
    assert_eq!(format!("{cluster:?} {key:?} {wrapped:?}"), "ClusterKey(..) TenantKey(..) WrappedKey(..)");
}

#[test]
fn a_cluster_key_file_is_created_private_and_read_again() {
    let dir = TestDir::new();
    let path = dir.0.join("deep/cluster.key");
    let one = ClusterKey::load_or_create(&path).expect("creates");
    let two = ClusterKey::load_or_create(&path).expect("reads");
    assert_eq!(one.fingerprint(), two.fingerprint());
    assert_eq!(std::fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
    assert_eq!(
        std::fs::read_dir(path.parent().expect("parent")).expect("lists").count(),
        1,
        "temporary file left behind"
    );
}

#[test]
fn threads_that_create_a_key_file_at_once_agree_on_it() {
    let dir = TestDir::new();
    let path = dir.0.join("cluster.key");
    let prints: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| ClusterKey::load_or_create(&path).expect("creates or reads").fingerprint()))
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(prints.windows(2).all(|pair| pair[0] == pair[1]), "{prints:?}");
}

#[test]
fn open_malformed_and_missing_key_files_are_refused_with_a_reason() {
    let dir = TestDir::new();
    let path = dir.0.join("cluster.key");
    let missing = ClusterKey::load(&path).expect_err("missing").to_string();
    assert!(missing.contains("cannot read"), "{missing}");
    std::fs::write(&path, "00".repeat(32)).expect("writes");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("sets mode");
    let open = ClusterKey::load(&path).expect_err("too open").to_string();
    assert!(open.contains("644") && open.contains("chmod 600"), "{open}");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("sets mode");
    assert!(ClusterKey::load(&path).is_ok());
    for content in [b"short".to_vec(), vec![b'a'; 10_000], vec![0xff; 64], vec![b'g'; 64]] {
        std::fs::write(&path, content).expect("writes");
        let error = ClusterKey::load(&path).expect_err("malformed").to_string();
        assert!(error.contains("hint: restore"), "{error}");
    }
}
