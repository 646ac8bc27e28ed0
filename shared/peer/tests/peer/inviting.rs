//! The authority's folder: founding, letting nodes in on the same machine, invitations, and the files they leave.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use peer::pki::authority::Applicant;
use peer::pki::{NodeKey, PkiError, Token};
use peer::{Authority, Identity, Refusal};
use shared::clock::{Clock, SystemClock};
use shared::seal::{ClusterKey, SealError};

use crate::fixture::{Folder, authority, join, node};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Redeems for a key of its own, as a node without a cluster key.
fn redeem(authority: &Authority, token: &Token, name: &str, now: Duration) -> Result<(), PkiError> {
    let applicant = Applicant { node: &node(name), key: &[7; 32], holds: None };
    let admission = authority.redeem(token, applicant, now)?;
    assert_eq!(admission.node, node(name));
    Ok(())
}

#[test]
fn an_invitation_works_once_in_time_and_for_its_node() {
    let folder = Folder::new();
    let now = SystemClock.wall();
    let ca = authority(&folder.0);
    let invite = |ca: &Authority| ca.invite(&node("b"), now, Duration::from_secs(600)).expect("an invitation");
    let token = invite(&ca);
    let copied: Token = token.to_string().parse().expect("it survives copying");
    let other = redeem(&ca, &token, "c", now).expect_err("for b");
    assert!(matches!(other, PkiError::Refused(Refusal::OtherNode)), "{other}");
    let held = Some(ClusterKey::random().fingerprint());
    let foreign = ca.redeem(&token, Applicant { node: &node("b"), key: &[7; 32], holds: held }, now);
    assert!(matches!(foreign, Err(PkiError::Refused(Refusal::OtherCluster))));
    redeem(&ca, &copied, "b", now).expect("neither has used it up");
    let again = redeem(&ca, &token, "b", now).expect_err("used");
    assert!(matches!(again, PkiError::Refused(Refusal::TokenUnknown)), "{again}");
    let token = invite(&ca);
    let late = redeem(&ca, &token, "b", now + Duration::from_secs(600)).expect_err("too late");
    assert!(matches!(late, PkiError::Refused(Refusal::TokenExpired)), "{late}");
    let other = Authority::found(&folder.0.join("other"), &[], now).expect("another authority");
    let foreign = redeem(&ca, &invite(&other), "b", now).expect_err("not ours");
    assert!(matches!(foreign, PkiError::Refused(Refusal::TokenUnknown)), "{foreign}");
    for text in ["", "tj1", "tj1_00_00", &format!("{copied}_"), &copied.to_string()[1..]] {
        assert!(text.parse::<Token>().is_err(), "{text:?}");
    }
}

#[test]
fn of_two_who_use_an_invitation_at_once_one_gets_in() {
    let folder = Folder::new();
    let now = SystemClock.wall();
    let ca = authority(&folder.0);
    for _ in 0..20 {
        let token = ca.invite(&node("b"), now, Duration::from_secs(600)).expect("an invitation");
        let n_let_in: usize = std::thread::scope(|scope| {
            let both: Vec<_> =
                (0..2).map(|_| scope.spawn(|| usize::from(redeem(&ca, &token, "b", now).is_ok()))).collect();
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
    let (ca_pem, key) = (stored("ca/ca.pem"), stored("b/peer.key"));
    drop(first);
    std::fs::remove_file(folder.0.join("b/peer.pem")).expect("removed");
    join(&folder.0, "b");
    assert_eq!(stored("ca/ca.pem"), ca_pem, "the authority stays");
    assert_eq!(stored("b/peer.key"), key, "a second certificate is for the same key");
    let names = ["ca/ca.key", "ca/cluster.key", "b/peer.key", "b/peer.pem", "b/ca.pem", "b/cluster.key"];
    for name in names {
        let mode = std::fs::metadata(folder.0.join(name)).expect("stored").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let now = SystemClock.wall();
    let ca = authority(&folder.0);
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

#[test]
fn the_node_that_served_alone_gives_the_cluster_its_key() {
    let folder = Folder::new();
    let now = SystemClock.wall();
    let (a, b, c) = (folder.0.join("a"), folder.0.join("b"), folder.0.join("c"));
    let key = |data: &Path| ClusterKey::load(&data.join("cluster.key")).expect("a key").fingerprint();
    let alone = ClusterKey::load_or_create(&a.join("cluster.key")).expect("a key").fingerprint();
    let ca = Authority::found(&folder.0.join("ca"), &[&a, &b], now).expect("founded");
    for data in [&a, &b] {
        assert!(ca.admit_here(&node("a"), data, now).expect("let in"));
        assert_eq!(key(data), alone);
    }
    let again = Authority::found(&folder.0.join("ca"), &[&a, &b], now).expect("founded");
    assert_eq!(again.fingerprint(), ca.fingerprint(), "founding twice changes nothing");
    let opened = Authority::open(&folder.0.join("ca"), now).expect("readable").expect("there is one");
    assert_eq!(opened.fingerprint(), ca.fingerprint());
    assert!(Authority::open(&folder.0.join("b"), now).expect("readable").is_none());
    // A second node that served alone cannot come in with its tenants, and keeps its key.
    let other = ClusterKey::load_or_create(&c.join("cluster.key")).expect("a key").fingerprint();
    let refused = ca.admit_here(&node("c"), &c, now).expect_err("another key");
    assert!(matches!(refused, PkiError::ClusterKey(SealError::OtherKey { .. })), "{refused}");
    assert_eq!(key(&c), other);
    let two = Authority::found(&folder.0.join("new"), &[&a, &c], now).err().expect("two keys");
    assert!(matches!(two, PkiError::TwoClusters { .. }), "{two}");
    assert!(!folder.0.join("new").exists(), "nothing is half founded");
}

#[test]
fn a_node_that_is_in_is_left_alone_until_its_certificate_is_due() {
    let folder = Folder::new();
    let now = SystemClock.wall();
    let (ca, data) = (authority(&folder.0), folder.0.join("a"));
    let stored = || std::fs::read_to_string(data.join("peer.pem")).expect("stored");
    assert!(ca.admit_here(&node("a"), &data, now).expect("let in"));
    let first = stored();
    assert!(!ca.admit_here(&node("a"), &data, now + DAY).expect("it is in"));
    assert_eq!(stored(), first);
    assert!(ca.admit_here(&node("a"), &data, now + peer::pki::NODE_VALIDITY).expect("let in again"));
    let second = stored();
    assert_ne!(second, first);
    assert!(ca.admit_here(&node("z"), &data, now).expect("let in under another name"));
    assert_ne!(stored(), second);
    let other = Authority::found(&folder.0.join("other"), &[&data], now).expect("another authority, same key");
    assert!(other.admit_here(&node("z"), &data, now).expect("let in by another authority"));
    NodeKey::load_or_create(&data).expect("the key stays");
    Identity::load(node("z"), &data).expect("it fits");
}

#[test]
fn the_roll_names_who_is_in_and_who_is_invited() {
    let folder = Folder::new();
    let now = Duration::from_secs(SystemClock.wall().as_secs());
    let ca = authority(&folder.0);
    assert_eq!(ca.roll().expect("readable"), peer::pki::authority::Roll::default());
    for name in ["b", "a"] {
        ca.admit_here(&node(name), &folder.0.join(name), now).expect("let in");
    }
    let token = ca.invite(&node("c"), now, Duration::from_secs(60)).expect("an invitation");
    ca.invite(&node("d"), now, Duration::from_secs(600)).expect("an invitation");
    let roll = ca.roll().expect("readable");
    let shown = |entries: &[peer::pki::authority::Entry]| -> Vec<(String, Duration)> {
        entries.iter().map(|entry| (entry.node.to_string(), entry.until - now)).collect()
    };
    assert_eq!(shown(&roll.nodes), ["a", "b"].map(|name| (name.to_owned(), peer::pki::NODE_VALIDITY)));
    assert_eq!(
        shown(&roll.invitations),
        [("c".into(), Duration::from_secs(60)), ("d".into(), Duration::from_secs(600))]
    );
    redeem(&ca, &token, "c", now).expect("let in");
    ca.invite(&node("e"), now + Duration::from_secs(600), DAY).expect("an invitation");
    let roll = ca.roll().expect("readable");
    assert_eq!((roll.nodes.len(), roll.invitations.len()), (3, 1), "what is used or too old is gone");
}
