//! Joining over the network: with an invitation and the addresses of the cluster's file, and nothing else.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use peer::pki::Token;
use peer::pki::authority::Applicant;
use peer::{Authority, Identity, JoinError, PeerNet, Refusal};
use shared::clock::{Clock, SystemClock};
use shared::id::NodeId;
use shared::seal::ClusterKey;
use tokio::time::timeout;
use wire::join::Reason;
use wire::node::{Request, Response};

use crate::fixture::{Folder, authority, join, loopback, node, serving, serving_with, until};

const SOON: Duration = Duration::from_secs(5);
const MINUTE: Duration = Duration::from_secs(60);

/// Nodes a and c are up; a has the authority. Nodes b and d are in the cluster's file.
struct Scene {
    folder: Folder,
    a: PeerNet,
    c: PeerNet,
    hosts: Vec<(NodeId, SocketAddr)>,
}

fn scene() -> Scene {
    let folder = Folder::new();
    let nowhere: SocketAddr = ([127, 0, 0, 1], 1).into();
    let (first, third) = (join(&folder.0, "a"), join(&folder.0, "c"));
    let parts = [loopback(), loopback()];
    let [a, c] = [0, 1].map(|at| parts[at].socket.local_addr().expect("bound"));
    let [a_parts, c_parts] = parts;
    let (a_net, _) =
        serving_with(&first, &[("b", nowhere), ("c", c), ("d", nowhere)], a_parts, Some(authority(&folder.0)));
    let (c_net, _) = serving(&third, &[("a", a), ("b", nowhere), ("d", nowhere)], c_parts);
    let hosts = [("b", nowhere), ("c", c), ("a", a)].map(|(name, address)| (node(name), address));
    Scene { folder, a: a_net, c: c_net, hosts: hosts.into() }
}

impl Scene {
    fn data(&self, name: &str) -> PathBuf {
        self.folder.0.join(name)
    }

    fn authority(&self) -> Authority {
        authority(&self.folder.0)
    }

    fn invite(&self, name: &str) -> Token {
        self.authority().invite(&node(name), SystemClock.wall(), MINUTE).expect("an invitation")
    }

    async fn join(&self, name: &str, token: &Token) -> Result<NodeId, JoinError> {
        self.join_from(name, token, name).await
    }

    async fn join_from(&self, name: &str, token: &Token, data: &str) -> Result<NodeId, JoinError> {
        let (node, data) = (node(name), self.data(data));
        let joining = peer::join(&node, token, &data, &self.hosts, SystemClock.wall());
        timeout(2 * SOON, joining).await.expect("in time")
    }

    fn count(&self, reason: Refusal) -> u64 {
        self.a.refusals().count(reason)
    }
}

fn reason(joined: Result<NodeId, JoinError>) -> Reason {
    match joined {
        Err(JoinError::Refused { by, reason, .. }) if by == node("a") => reason,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_nothing_but_an_invitation_comes_in() {
    let scene = scene();
    let token: Token = scene.invite("b").to_string().parse().expect("it survives copying");
    assert_eq!(scene.join("b", &token).await.expect("let in"), node("a"));
    let data = scene.data("b");
    for name in ["peer.key", "peer.pem", "ca.pem", "cluster.key"] {
        let mode = std::fs::metadata(data.join(name)).expect("stored").permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let key = |data: PathBuf| ClusterKey::load(&data.join("cluster.key")).expect("a key").fingerprint();
    assert_eq!(key(data.clone()), key(scene.data("a")));
    // Its certificate is good on both sides.
    let identity = Identity::load(node("b"), &data).expect("an identity");
    let (b, _) = serving(&identity, &[("a", scene.hosts[2].1), ("c", scene.hosts[1].1)], loopback());
    for peer in ["a", "c"] {
        timeout(SOON, b.connected(&node(peer))).await.expect("let in");
        let answer = b.call(&node(peer), &Request::DrainNotice { epoch: 1 }, SOON).await.expect("answered");
        assert!(matches!(answer, Response::Done));
    }
    // It may come back: same key, same cluster, a new invitation.
    scene.join("b", &scene.invite("b")).await.expect("let in again");
    Identity::load(node("b"), &data).expect("an identity");
    assert!(Refusal::ALL.into_iter().all(|reason| scene.count(reason) == 0));
    assert_eq!(scene.c.refusals().count(Refusal::Protocol), 2, "c has no such door");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_used_a_late_and_a_forged_invitation_are_refused() {
    let scene = scene();
    let token = scene.invite("b");
    scene.join("b", &token).await.expect("let in");
    assert_eq!(reason(scene.join("b", &token).await), Reason::Unknown);
    assert_eq!(scene.count(Refusal::TokenUnknown), 1);
    let token = scene.authority().invite(&node("b"), SystemClock.wall(), Duration::ZERO).expect("an invitation");
    assert_eq!(reason(scene.join("b", &token).await), Reason::Expired);
    assert_eq!(scene.count(Refusal::TokenExpired), 1);
    let authority = scene.invite("b").to_string().split('_').nth(2).expect("its authority").to_owned();
    let forged: Token = format!("tj1_{}_{authority}", "0".repeat(64)).parse().expect("an invitation");
    assert_eq!(reason(scene.join("b", &forged).await), Reason::Unknown);
    assert_eq!(scene.count(Refusal::TokenUnknown), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invitation_for_another_node_or_cluster_is_refused_and_stays_good() {
    let scene = scene();
    let token = scene.invite("b");
    assert_eq!(reason(scene.join("d", &token).await), Reason::OtherNode);
    let alone = ClusterKey::load_or_create(&scene.data("alone/cluster.key")).expect("a key").fingerprint();
    assert_eq!(reason(scene.join_from("b", &token, "alone").await), Reason::OtherCluster);
    let kept = ClusterKey::load(&scene.data("alone/cluster.key")).expect("a key").fingerprint();
    assert_eq!(kept, alone);
    assert!(!Identity::is_stored(&scene.data("alone")));
    assert_eq!((scene.count(Refusal::OtherNode), scene.count(Refusal::OtherCluster)), (1, 1));
    scene.join("b", &token).await.expect("let in");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_authority_that_the_invitation_names_is_believed() {
    let scene = scene();
    let other = Authority::found(&scene.data("other"), &[], SystemClock.wall()).expect("another authority");
    let token = other.invite(&node("b"), SystemClock.wall(), MINUTE).expect("an invitation");
    let error = scene.join("b", &token).await.expect_err("another authority").to_string();
    assert!(error.contains("a (") && error.contains("another authority than the invitation"), "{error}");
    assert!(!scene.data("b/cluster.key").exists() && !Identity::is_stored(&scene.data("b")));
    // The invitation was shown to nobody: at its own authority it is still good.
    let applicant = Applicant { node: &node("b"), key: &[1; 32], holds: None };
    other.redeem(&token, applicant, SystemClock.wall()).expect("good");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_node_that_has_the_authority_it_says_what_each_one_said() {
    let mut scene = scene();
    let token = scene.invite("b");
    scene.hosts.retain(|(name, _)| *name != node("a"));
    scene.hosts.push((node("d"), ([127, 0, 0, 1], 1).into()));
    let error = scene.join("b", &token).await.expect_err("nobody").to_string();
    assert!(error.contains("c (") && error.contains("does not have the authority; d ("), "{error}");
    assert!(error.contains("d (127.0.0.1:1) does not answer; hint: start the node"), "{error}");
    scene.hosts.clear();
    let error = scene.join("b", &token).await.expect_err("nobody").to_string();
    assert!(error.contains("names no other node"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_with_too_many_bad_invitations_waits_and_a_node_that_is_in_does_not() {
    let mut scene = scene();
    scene.hosts.retain(|(name, _)| *name == node("a"));
    let good = scene.invite("b");
    let authority = good.to_string().split('_').nth(2).expect("its authority").to_owned();
    let (mut n_refused, mut n_waiting) = (0, 0);
    for n in 0..20 {
        let forged: Token = format!("tj1_{n:064x}_{authority}").parse().expect("an invitation");
        match scene.join("b", &forged).await {
            Err(JoinError::Refused { reason: Reason::Unknown, .. }) => n_refused += 1,
            Err(JoinError::Lost { why, .. }) if why.contains("too many") => n_waiting += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((n_refused, n_waiting), (10, 10));
    assert_eq!((scene.count(Refusal::TokenUnknown), scene.count(Refusal::TooMany)), (10, 10));
    let error = scene.join("b", &good).await.expect_err("not now").to_string();
    assert!(error.contains("wait a minute"), "{error}");
    let answer = scene.c.call(&node("a"), &Request::DrainNotice { epoch: 1 }, SOON).await;
    assert!(matches!(answer, Ok(Response::Done)), "nodes from that address are served: {answer:?}");
    until("the last one is counted", || scene.count(Refusal::TooMany) == 11).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_join_where_the_authority_came_while_the_node_was_running() {
    let mut scene = scene();
    scene.hosts.retain(|(name, _)| *name == node("c"));
    let token = scene.invite("b");
    let error = scene.join("b", &token).await.expect_err("not yet").to_string();
    assert!(error.contains("does not have the authority"), "{error}");
    let other = Authority::found(&scene.data("other"), &[], SystemClock.wall()).expect("another authority");
    let identity = Identity::load(node("c"), &scene.data("c")).expect("an identity");
    let error = scene.c.let_join(&identity, other).expect_err("another authority").to_string();
    assert!(error.contains("not the one that let this node in"), "{error}");
    assert!(scene.join("b", &token).await.is_err() && !scene.c.lets_join());
    scene.c.let_join(&identity, scene.authority()).expect("the door opens");
    assert_eq!(scene.join("b", &token).await.expect("let in"), node("c"));
    // Those who are in are met as before.
    let answer = scene.a.call(&node("c"), &Request::DrainNotice { epoch: 1 }, SOON).await;
    assert!(matches!(answer, Ok(Response::Done)), "{answer:?}");
}
