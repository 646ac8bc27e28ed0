//! Invitations and the files they leave behind.

use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use peer::pki::{NodeKey, PkiError, Token};
use peer::{Ca, Identity, Refusal};
use shared::clock::{Clock, SystemClock};

use crate::fixture::{Folder, join, node};

#[test]
fn an_invitation_works_once_and_in_time() {
    let folder = Folder::new();
    let now = SystemClock.wall();
    let ca = Ca::load_or_create(&folder.0.join("ca"), now).expect("an authority");
    let key = NodeKey::load_or_create(&folder.0.join("b")).expect("a key").public();
    let token = ca.invite(&node("b"), now, Duration::from_secs(600)).expect("an invitation");
    let copied: Token = token.to_string().parse().expect("it survives copying");
    assert_eq!(ca.redeem(&copied, &key, now).expect("let in").node, node("b"));
    let again = ca.redeem(&token, &key, now).expect_err("used");
    assert!(matches!(again, PkiError::Refused(Refusal::TokenUnknown)), "{again}");
    let token = ca.invite(&node("b"), now, Duration::from_secs(600)).expect("an invitation");
    let late = ca.redeem(&token, &key, now + Duration::from_secs(600)).expect_err("too late");
    assert!(matches!(late, PkiError::Refused(Refusal::TokenExpired)), "{late}");
    let other = Ca::load_or_create(&folder.0.join("other"), now).expect("another authority");
    let token = other.invite(&node("b"), now, Duration::from_secs(600)).expect("an invitation");
    let foreign = ca.redeem(&token, &key, now).expect_err("not ours");
    assert!(matches!(foreign, PkiError::Refused(Refusal::TokenUnknown)), "{foreign}");
    for text in ["", "tj1", "tj1_00_00", &format!("{copied}_"), &copied.to_string()[1..]] {
        assert!(text.parse::<Token>().is_err(), "{text:?}");
    }
}

#[test]
fn of_two_who_use_an_invitation_at_once_one_gets_in() {
    let folder = Folder::new();
    let now = SystemClock.wall();
    let ca = Ca::load_or_create(&folder.0.join("ca"), now).expect("an authority");
    let key = NodeKey::load_or_create(&folder.0.join("b")).expect("a key").public();
    for _ in 0..20 {
        let token = ca.invite(&node("b"), now, Duration::from_secs(600)).expect("an invitation");
        let n_let_in: usize = std::thread::scope(|scope| {
            let both: Vec<_> =
                (0..2).map(|_| scope.spawn(|| usize::from(ca.redeem(&token, &key, now).is_ok()))).collect();
            both.into_iter().map(|one| one.join().expect("no panic")).sum()
        });
        assert_eq!(n_let_in, 1);
    }
}

#[test]
fn keys_are_private_kept_and_never_stored_with_an_invitation() {
    let folder = Folder::new();
    let first = join(&folder.0, "b");
    let stored = |name: &str| std::fs::read_to_string(folder.0.join(name)).expect("stored");
    let (authority, key) = (stored("ca/ca.pem"), stored("b/peer.key"));
    drop(first);
    Identity::load(node("b"), &folder.0.join("b")).expect("still there");
    join(&folder.0, "b");
    assert_eq!(stored("ca/ca.pem"), authority, "the authority stays");
    assert_eq!(stored("b/peer.key"), key, "a second invitation certifies the same key");
    for name in ["ca/ca.key", "b/peer.key", "b/peer.pem", "b/ca.pem"] {
        let mode = std::fs::metadata(folder.0.join(name)).expect("stored").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let now = SystemClock.wall();
    let ca = Ca::load_or_create(&folder.0.join("ca"), now).expect("an authority");
    let token = ca.invite(&node("c"), now, Duration::from_secs(60)).expect("an invitation").to_string();
    let secret = token.split('_').nth(1).expect("a secret").to_owned();
    let mut n_files = 0;
    for entry in std::fs::read_dir(folder.0.join("ca/invitations")).expect("a folder") {
        let path = entry.expect("an entry").path();
        n_files += 1;
        assert!(!path.to_string_lossy().contains(&secret));
        assert!(!std::fs::read_to_string(path).expect("text").contains(&secret));
    }
    assert_eq!(n_files, 1);
    std::fs::set_permissions(folder.0.join("b/peer.key"), std::fs::Permissions::from_mode(0o644)).expect("changed");
    assert!(Identity::load(node("b"), &folder.0.join("b")).is_err(), "others may read the key");
}
