//! Certificates that come to their end while nodes run.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use peer::pki::{NODE_VALIDITY, NodeKey, node_name};
use peer::{Ca, Identity, PeerNet, Refusal};
use shared::clock::{Clock, SystemClock};
use tokio::time::timeout;
use wire::node::{Request, Response};

use crate::fixture::{Folder, authority, join, loopback, node, serving_at, until};

const SOON: Duration = Duration::from_secs(5);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The system's clock, some days later.
#[derive(Clone, Default)]
struct Later(Arc<AtomicU64>);

impl Later {
    fn advance(&self, by: Duration) {
        self.0.fetch_add(by.as_secs(), Ordering::SeqCst);
    }
}

impl Clock for Later {
    fn now(&self) -> Instant {
        SystemClock.now()
    }

    fn wall(&self) -> Duration {
        SystemClock.wall() + Duration::from_secs(self.0.load(Ordering::SeqCst))
    }
}

fn stored(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name).join("peer.pem")).expect("stored")
}

/// A certificate that will be due in about three seconds: it seems to be an hour old, as allowance for clocks.
fn soon_due(folder: &Path, name: &str) -> Identity {
    join(folder, name);
    let (ca, data) =
        (Ca::load_or_create(&folder.join("ca"), SystemClock.wall()).expect("an authority"), folder.join(name));
    let key = NodeKey::load_or_create(&data).expect("a key").public();
    let validity = Duration::from_secs(1805);
    let short = ca.certify(&node_name(&node(name)), &key, SystemClock.wall(), validity).expect("certified");
    Identity::store(&data, &short, ca.pem()).expect("stored");
    // The authority knows of no other that it could give out again.
    std::fs::remove_file(folder.join(format!("ca/nodes/{name}.pem"))).expect("removed");
    Identity::load(node(name), &data).expect("an identity")
}

async fn is_answered(net: &PeerNet, by: &str) {
    timeout(SOON, net.connected(&node(by))).await.expect("connected");
    let answer = net.call(&node(by), &Request::DrainNotice { epoch: 1 }, SOON).await.expect("answered");
    assert!(matches!(answer, Response::Done));
}

/// Node b has a certificate that is about to be due; a has the authority and one that is about to be, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_is_renewed_before_its_end_and_new_connections_show_it() {
    let folder = Folder::new();
    let (a, b) = (soon_due(&folder.0, "a"), soon_due(&folder.0, "b"));
    let (first_a, first_b) = (stored(&folder.0, "a"), stored(&folder.0, "b"));
    let parts = [loopback(), loopback()];
    let [at_a, at_b] = [0, 1].map(|n| parts[n].socket.local_addr().expect("bound"));
    let [parts_a, parts_b] = parts;
    let clock = Later::default();
    let ca = Some(authority(&folder.0));
    let at_c: SocketAddr = ([127, 0, 0, 1], 1).into();
    let (net_a, _) = serving_at(&a, &[("b", at_b), ("c", at_c)], parts_a, ca, Arc::new(clock.clone()));
    let (net_b, _) = serving_at(&b, &[("a", at_a), ("c", at_c)], parts_b, None, Arc::new(clock.clone()));
    is_answered(&net_b, "a").await;
    tokio::time::timeout(2 * SOON, async {
        while stored(&folder.0, "a") == first_a || stored(&folder.0, "b") == first_b {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await
    .expect("both are renewed");
    let issued = |name: &str| std::fs::read_to_string(folder.0.join(format!("ca/nodes/{name}.pem"))).expect("kept");
    assert_eq!(stored(&folder.0, "b"), issued("b"));
    is_answered(&net_b, "a").await;
    // An hour later the first certificates have ended. The connection that is open stays; a new one, to a node that
    // dials anew, shows the new certificate, without a restart of a or b.
    clock.advance(Duration::from_secs(3600));
    is_answered(&net_b, "a").await;
    let c = join(&folder.0, "c");
    let (net_c, _) = serving_at(&c, &[("a", at_a), ("b", at_b)], loopback(), None, Arc::new(clock.clone()));
    is_answered(&net_c, "a").await;
    is_answered(&net_c, "b").await;
    assert!(Refusal::ALL.into_iter().all(|reason| net_a.refusals().count(reason) == 0));
    drop(net_b);
    // A restart finds it, too.
    let again = Identity::load(node("b"), &folder.0.join("b")).expect("an identity");
    let (net_b, _) = serving_at(&again, &[("a", at_a)], loopback(), None, Arc::new(clock));
    is_answered(&net_b, "a").await;
}

/// What was good when the nodes began is refused at its end, by their own clocks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_ended_certificate_is_refused_and_joining_again_helps() {
    let folder = Folder::new();
    let (a, b) = (join(&folder.0, "a"), join(&folder.0, "b"));
    let parts = loopback();
    let at_a: SocketAddr = parts.socket.local_addr().expect("bound");
    let clock = Later::default();
    clock.advance(NODE_VALIDITY + DAY);
    // The authority renews its own node's certificate only while that is good: this one slept through it.
    let ca = authority(&folder.0);
    ca.admit_here(&node("a"), &folder.0.join("a"), clock.wall()).expect("let in again");
    drop(a);
    let a = Identity::load(node("a"), &folder.0.join("a")).expect("an identity");
    let nowhere: SocketAddr = ([127, 0, 0, 1], 1).into();
    let (net_a, _) = serving_at(&a, &[("b", nowhere)], parts, Some(ca), Arc::new(clock.clone()));
    let (net_b, _) = serving_at(&b, &[("a", at_a)], loopback(), None, Arc::new(clock.clone()));
    until("the ended one is refused", || net_a.refusals().count(Refusal::Expired) > 0).await;
    assert!(!net_b.is_connected(&node("a")));
    drop(net_b);
    let token = authority(&folder.0).invite(&node("b"), clock.wall(), Duration::from_secs(60)).expect("an invitation");
    let hosts = [(node("a"), at_a)];
    let data = folder.0.join("b");
    let by = peer::join(&node("b"), &token, &data, &hosts, clock.wall()).await.expect("let in again");
    assert_eq!(by, node("a"));
    let b = Identity::load(node("b"), &data).expect("an identity");
    let (net_b, _) = serving_at(&b, &[("a", at_a)], loopback(), None, Arc::new(clock));
    is_answered(&net_b, "a").await;
}
