//! Tests of credentials: form, hashing, comparison, what is shown. Who a key belongs to: `registry/snapshot/tests.rs`.

use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::testing::TestDir;

fn key() -> (Pepper, ApiKey, KeyRecord) {
    let pepper = Pepper::of(&ClusterKey::random());
    let (key, record) = ApiKey::generate(&pepper, [Scope::Infer].into(), 100, Some(200));
    (pepper, key, record)
}

fn check(pepper: &Pepper, record: &KeyRecord, presented: &str, now_s: u64) -> Result<(), AuthError> {
    let find = |id| (id == record.id).then_some((record, ()));
    verify(pepper, &pepper.decoy(), presented, now_s, find).map(drop)
}

#[test]
fn a_key_has_its_documented_form_and_opens() {
    let (pepper, key, record) = key();
    let text = key.reveal();
    assert_eq!(text.len(), API_KEY_CHARS);
    assert!(text.starts_with(&format!("tnt_{}_", record.id)));
    assert_eq!(check(&pepper, &record, text, 150), Ok(()));
}

#[test]
fn every_changed_character_makes_a_key_invalid() {
    let (pepper, key, record) = key();
    for i in 0..key.reveal().len() {
        let mut bytes = key.reveal().as_bytes().to_vec();
        bytes[i] = if bytes[i] == b'a' { b'b' } else { b'a' };
        let text = String::from_utf8(bytes).expect("ASCII");
        assert_eq!(check(&pepper, &record, &text, 150), Err(AuthError::Invalid), "character {i}");
    }
}

#[test]
fn hostile_key_texts_are_invalid_and_do_not_panic() {
    let (pepper, key, record) = key();
    let multibyte = format!("tnt_{}é{}", record.id, "a".repeat(42));
    let split_inside = format!("tnt_{}", "é".repeat(30));
    let long = key.reveal().repeat(10_000);
    for text in ["", "tnt_", " ", "Bearer x", &multibyte, &split_inside, &long, &format!(" {}", key.reveal())] {
        assert_eq!(check(&pepper, &record, text, 150), Err(AuthError::Invalid));
    }
}

#[test]
fn only_the_holder_of_the_secret_learns_that_a_key_is_revoked_or_expired() {
    let (pepper, key, mut record) = key();
    assert_eq!(check(&pepper, &record, key.reveal(), 200), Err(AuthError::Expired));
    record.revoked_at_s = Some(120);
    assert_eq!(check(&pepper, &record, key.reveal(), 150), Err(AuthError::Revoked));
    let wrong = format!("{}A", &key.reveal()[..API_KEY_CHARS - 1]);
    if wrong != key.reveal() {
        assert_eq!(check(&pepper, &record, &wrong, 150), Err(AuthError::Invalid));
    }
}

#[test]
fn a_hash_is_worthless_under_another_pepper() {
    let (_, key, record) = key();
    let other = Pepper::of(&ClusterKey::random());
    assert_eq!(check(&other, &record, key.reveal(), 150), Err(AuthError::Invalid));
}

#[test]
fn debug_output_shows_no_secret() {
    let (pepper, key, record) = key();
    let shown = format!("{pepper:?} {key:?} {record:?}");
    assert!(!shown.contains(&key.reveal()[API_KEY_CHARS - SECRET_CHARS..]), "{shown}");
}

#[test]
fn the_admin_key_is_created_private_and_only_its_exact_text_opens() {
    let dir = TestDir::new();
    let (path, cluster) = (dir.0.join("admin.key"), ClusterKey::random());
    let admin = AdminKey::load_or_create(&path, &cluster).expect("creates");
    assert_eq!(std::fs::metadata(&path).expect("exists").permissions().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&path).expect("readable");
    let text = text.trim();
    assert!(admin.verify(text).is_ok());
    let again = AdminKey::load_or_create(&path, &cluster).expect("reads");
    assert!(again.verify(text).is_ok());
    let (_, tenant_key, _) = key();
    for wrong in
        ["", "tnt_admin_", &text[..text.len() - 1], &format!("{text} "), tenant_key.reveal(), &"a".repeat(1 << 20)]
    {
        assert!(admin.verify(wrong).is_err());
    }
    std::fs::write(&path, "hunter2").expect("writes");
    let error = AdminKey::load_or_create(&path, &cluster).expect_err("not a key").to_string();
    assert!(error.contains("admin.key") && !error.contains("hunter2"), "{error}");
}
