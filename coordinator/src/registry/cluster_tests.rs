//! Several nodes in one process, under a paused clock and from a seed: kills, partitions, growth, erasure.
//!
//! Time passes only while every task waits, and the disk works inside the caller, so that a run depends on its seed
//! alone. A killed node keeps what its file held at that moment, as after `kill -9`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use futures_util::future::BoxFuture;

use super::cluster::{Answer, Member, Transport, TransportError};
use super::command::{Action, Applied};
use super::raft::runtime;
use super::record::TenantRecord;
use super::status::Role;
use super::*;
use crate::testing::{TestDir, spec};
use shared::id::{NodeId, TenantId};

/// Time of a message in one direction.
const LATENCY: Duration = Duration::from_millis(1);

fn run<T>(seed: u64, test: impl Future<Output = T>) -> T {
    runtime::seed(seed);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build();
    runtime.expect("starts").block_on(test)
}

fn node(name: &str) -> NodeId {
    name.parse().expect("valid node name")
}

fn tenant(name: &str) -> TenantId {
    name.parse().expect("valid tenant")
}

/// Who runs, and which ways are cut.
#[derive(Default)]
struct NetState {
    running: BTreeMap<NodeId, Registry>,
    cut: BTreeSet<(NodeId, NodeId)>,
    /// Answers to forwarded commands that are lost from now on.
    answers_lost: u32,
}

#[derive(Clone, Default)]
struct Net(Arc<Mutex<NetState>>);

/// One node's end of the network.
struct Line {
    net: Net,
    me: NodeId,
}

impl Line {
    fn call(&self, to: &NodeId, message: Vec<u8>, within: Duration, is_raft: bool) -> BoxFuture<'static, Answer> {
        let (net, me, to) = (self.net.clone(), self.me.clone(), to.clone());
        Box::pin(async move {
            let (target, lost) = {
                let mut state = lock(&net.0);
                let is_alive = state.running.contains_key(&me) && !state.cut.contains(&(me.clone(), to.clone()));
                let lost = !is_raft && state.answers_lost > 0;
                state.answers_lost -= u32::from(lost);
                (state.running.get(&to).filter(|_| is_alive).cloned(), lost)
            };
            let nobody = TransportError::NoAnswer("lost on the way".to_owned());
            let answered = async {
                tokio::time::sleep(LATENCY).await;
                let answer = match target {
                    None => return std::future::pending().await,
                    Some(target) if is_raft => target.on_raft(&me, &message).await,
                    Some(target) => target.on_forwarded(&message).await,
                };
                tokio::time::sleep(LATENCY).await;
                let is_cut = {
                    let state = lock(&net.0);
                    !state.running.contains_key(&to) || state.cut.contains(&(to.clone(), me.clone()))
                };
                if lost || is_cut {
                    return std::future::pending().await;
                }
                answer
            };
            tokio::time::timeout(within, answered).await.map_err(|_| nobody)
        })
    }
}

impl Transport for Line {
    fn raft(&self, to: &NodeId, message: Vec<u8>, within: Duration) -> BoxFuture<'static, Answer> {
        self.call(to, message, within, true)
    }

    fn forward(&self, to: &NodeId, command: Vec<u8>, within: Duration) -> BoxFuture<'static, Answer> {
        self.call(to, command, within, false)
    }
}

/// Nodes with a folder each.
struct Nodes {
    net: Net,
    root: TestDir,
    members: Vec<Member>,
}

impl Nodes {
    /// `a+ b-`: a votes, b follows. All share the cluster key; none is started.
    fn new(text: &str) -> Self {
        let mut nodes = Self { net: Net::default(), root: TestDir::new(), members: Vec::new() };
        fs::create_dir_all(&nodes.root.0).expect("creates");
        nodes.configure(text);
        nodes
    }

    /// Another cluster file, read by nodes that start from now on.
    fn configure(&mut self, text: &str) {
        let parse = |word: &str| Member { node: node(&word[..word.len() - 1]), votes: word.ends_with('+') };
        self.members = text.split_whitespace().map(parse).collect();
    }

    async fn started(text: &str) -> Self {
        let nodes = Self::new(text);
        for name in nodes.names() {
            nodes.start(&name).await;
        }
        nodes
    }

    fn names(&self) -> Vec<NodeId> {
        self.members.iter().map(|member| member.node.clone()).collect()
    }

    fn dir(&self, name: &NodeId) -> PathBuf {
        self.root.0.join(name.as_str())
    }

    async fn start(&self, name: &NodeId) -> Registry {
        let transport = Arc::new(Line { net: self.net.clone(), me: name.clone() });
        let cluster =
            Cluster { me: name.clone(), members: self.members.clone(), transport, timing: cluster::Timing::default() };
        let key = self.root.0.join("cluster.key");
        shared::seal::ClusterKey::load_or_create(&key).expect("keeps a key");
        let options = RegistryOptions::load(&self.dir(name), &key).expect("loads").in_cluster(cluster);
        let registry = Registry::open_on(options, |content| Ok(Disk::inline(content))).await.expect("opens");
        lock(&self.net.0).running.insert(name.clone(), registry.clone());
        registry
    }

    fn get(&self, name: &NodeId) -> Registry {
        lock(&self.net.0).running.get(name).expect("runs").clone()
    }

    fn all(&self) -> Vec<Registry> {
        lock(&self.net.0).running.values().cloned().collect()
    }

    async fn stop(&self, name: &NodeId) {
        let registry = lock(&self.net.0).running.remove(name).expect("runs");
        registry.stop().await;
    }

    /// What the file holds now is all that stays.
    async fn kill(&self, name: &NodeId) {
        let registry = lock(&self.net.0).running.remove(name).expect("runs");
        let (file, image) = (self.dir(name).join("registry.redb"), self.root.0.join(format!("{name}.image")));
        let replica = registry.inner.ground.replica.borrow().clone().expect("runs");
        let copied = (file.clone(), image.clone());
        replica.disk.with(move |_| Ok(fs::copy(copied.0, copied.1).expect("copies"))).await.expect("open");
        replica.disk.close().await;
        registry.stop().await;
        drop((replica, registry));
        fs::rename(&image, &file).expect("replaces");
    }

    /// Both ways between a node and all others.
    fn isolate(&self, name: &NodeId) {
        let mut state = lock(&self.net.0);
        for other in self.names().into_iter().filter(|other| other != name) {
            state.cut.insert((name.clone(), other.clone()));
            state.cut.insert((other, name.clone()));
        }
    }

    fn heal(&self) {
        lock(&self.net.0).cut.clear();
    }

    /// Who leads, once somebody does and everybody who runs and is configured takes part.
    async fn leader(&self) -> NodeId {
        let found = async {
            loop {
                let leading = self.all().into_iter().find(|one| {
                    let status = one.status().borrow().clone();
                    status.role == Role::Leader && status.leader.is_some() && status.members.len() == self.members.len()
                });
                if let Some(registry) = leading {
                    let voters = registry.status().borrow().members.iter().filter(|member| member.votes).count();
                    if voters == self.members.iter().filter(|member| member.votes).count() {
                        return registry.inner.ground.cluster.me.clone();
                    }
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), found).await.expect("somebody leads within a minute")
    }

    /// Waits until every running node has the same tenants, and returns their names.
    async fn agreed(&self) -> BTreeSet<String> {
        let facts = |registry: &Registry| -> (u64, Vec<TenantRecord>) {
            let snapshot = registry.snapshot();
            let records = snapshot.tenants().iter().map(|view| TenantRecord::clone(view.record())).collect();
            (snapshot.epoch(), records)
        };
        let same = async {
            loop {
                let all: Vec<_> = self.all().iter().map(facts).collect();
                let is_settled = self.all().iter().all(|registry| {
                    let status = registry.status().borrow().clone();
                    status.applied == status.last && status.leader.is_some()
                });
                if is_settled && all.windows(2).all(|pair| pair[0] == pair[1]) {
                    return all.into_iter().next().expect("somebody runs").1;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let records = tokio::time::timeout(Duration::from_secs(60), same).await.expect("all agree within a minute");
        records.iter().map(|record| record.tenant().to_string()).collect()
    }

    /// Whether any file of the node holds these bytes.
    fn holds(&self, name: &NodeId, bytes: &str) -> bool {
        let files = fs::read_dir(self.dir(name)).expect("lists");
        files.flatten().any(|file| {
            let content = fs::read(file.path()).expect("reads");
            content.windows(bytes.len()).any(|window| window == bytes.as_bytes())
        })
    }
}

async fn create(registry: &Registry, name: &str) -> Result<Applied, RegistryError> {
    registry.apply(registry.secrets().create_tenant(spec(name), Vec::new(), 7)).await
}

#[test]
fn a_change_asked_of_any_node_is_seen_there_at_once_and_everywhere_soon() {
    run(1, async {
        let nodes = Nodes::started("a+ b+ c+ d-").await;
        nodes.leader().await;
        for name in nodes.names() {
            let registry = nodes.get(&name);
            create(&registry, &format!("of-{name}")).await.expect("creates");
            assert!(registry.snapshot().tenant(&tenant(&format!("of-{name}"))).is_some(), "asked of {name}");
        }
        assert_eq!(nodes.agreed().await.len(), 4);
        let fences: BTreeSet<_> = nodes.all().iter().map(|registry| registry.snapshot().fence()).collect();
        assert_eq!(fences.len(), 1);
    });
}

/// Issue 4: no write lost over 20 leader kills.
#[test]
fn twenty_leader_kills_lose_no_acknowledged_change_and_apply_none_twice() {
    run(2, async {
        let nodes = Nodes::started("a+ b+ c+ d-").await;
        let mut acknowledged = BTreeSet::new();
        let mut unclear = BTreeSet::new();
        let mut gaps = Vec::new();
        let mut n_asked = 0;
        for _ in 0..20 {
            let leader = nodes.leader().await;
            for _ in 0..5 {
                n_asked += 1;
                create(&nodes.get(&node("d")), &format!("t{n_asked}")).await.expect("somebody leads");
                acknowledged.insert(format!("t{n_asked}"));
            }
            // The kill hits a change that is under way.
            n_asked += 1;
            let (asked, name) = (nodes.get(&node("d")), format!("t{n_asked}"));
            let under_way = tokio::spawn(async move { create(&asked, &name).await });
            tokio::time::sleep(LATENCY + LATENCY / 2).await;
            let killed_at = tokio::time::Instant::now();
            nodes.kill(&leader).await;
            match under_way.await.expect("no panic") {
                Ok(_) => acknowledged.insert(format!("t{n_asked}")),
                Err(RegistryError::NoLeader { .. }) => false,
                Err(RegistryError::OutcomeUnknown { .. }) => unclear.insert(format!("t{n_asked}")),
                Err(error) => panic!("{error}"),
            };
            n_asked += 1;
            create(&nodes.get(&node("d")), &format!("t{n_asked}")).await.expect("another one leads");
            acknowledged.insert(format!("t{n_asked}"));
            gaps.push(killed_at.elapsed());
            nodes.start(&leader).await;
        }
        nodes.leader().await;
        let found = nodes.agreed().await;
        let lost: Vec<_> = acknowledged.difference(&found).collect();
        assert!(lost.is_empty(), "lost {lost:?}");
        assert!(found.iter().all(|name| acknowledged.contains(name) || unclear.contains(name)));
        assert_eq!(nodes.get(&node("d")).snapshot().epoch(), found.len() as u64, "one epoch per tenant");
        gaps.sort();
        println!(
            "20 leader kills: {} acknowledged, {} unclear, 0 lost; answer after {:?} median, {:?} at most",
            acknowledged.len(),
            unclear.len(),
            gaps[10],
            gaps[19]
        );
        assert!(acknowledged.len() >= 100 && gaps[10] < Duration::from_millis(1200), "{gaps:?}");
        assert!(gaps[19] < Duration::from_secs(4), "{gaps:?}");
    });
}

#[test]
fn all_nodes_killed_at_once_come_back_with_every_acknowledged_change() {
    run(3, async {
        let nodes = Nodes::started("a+ b+ c+").await;
        nodes.leader().await;
        for i in 0..10 {
            create(&nodes.get(&node("a")), &format!("t{i}")).await.expect("creates");
        }
        for name in nodes.names() {
            nodes.kill(&name).await;
        }
        for name in nodes.names() {
            nodes.start(&name).await;
        }
        nodes.leader().await;
        assert_eq!(nodes.agreed().await.len(), 10);
    });
}

#[test]
fn a_minority_takes_no_change_reads_on_and_gives_way_when_it_is_back() {
    run(4, async {
        let nodes = Nodes::started("a+ b+ c+").await;
        let old = nodes.leader().await;
        create(&nodes.get(&old), "before").await.expect("creates");
        nodes.agreed().await;
        let old_fence = nodes.get(&old).snapshot().fence();
        nodes.isolate(&old);
        // Both believe they lead for a while: the old one's changes reach nobody.
        let (cut_off, majority) =
            (nodes.get(&old), nodes.names().into_iter().find(|name| *name != old).expect("three"));
        let refused = tokio::spawn(async move { create(&cut_off, "minority").await });
        create(&nodes.get(&majority), "majority").await.expect("two of three go on");
        let refused = refused.await.expect("no panic").expect_err("one of three does not");
        assert!(matches!(refused, RegistryError::OutcomeUnknown { .. } | RegistryError::NoLeader { .. }), "{refused}");
        // By now it knows that nobody answers: nothing is tried, and that is what is told.
        let refused = create(&nodes.get(&old), "later").await.expect_err("no majority");
        assert!(matches!(refused, RegistryError::NoLeader { waited_ms: 10_000 }), "{refused}");
        let snapshot = nodes.get(&old).snapshot();
        assert!(snapshot.tenant(&tenant("before")).is_some() && snapshot.tenant(&tenant("majority")).is_none());
        assert!(nodes.get(&majority).snapshot().fence() > old_fence, "acts of the old leader can be told and refused");
        nodes.heal();
        nodes.leader().await;
        let found = nodes.agreed().await;
        assert_eq!(found, ["before", "majority"].map(str::to_owned).into());
        assert!(nodes.get(&old).snapshot().fence() > old_fence);
    });
}

#[test]
fn a_lost_answer_is_asked_for_again_and_the_change_applied_once() {
    run(5, async {
        let nodes = Nodes::started("a+ b+ c+").await;
        let leader = nodes.leader().await;
        let other = nodes.names().into_iter().find(|name| *name != leader).expect("three");
        lock(&nodes.net.0).answers_lost = 1;
        let applied = create(&nodes.get(&other), "acme").await.expect("the second attempt is answered as the first");
        assert_eq!(applied.epoch, 1);
        assert_eq!(nodes.get(&leader).snapshot().epoch(), 1);
        let again = create(&nodes.get(&other), "acme").await;
        assert!(matches!(again, Err(RegistryError::Exists { .. })), "another call is another command");
    });
}

#[test]
fn an_erased_tenants_key_leaves_every_nodes_log_and_file_also_of_one_that_was_away() {
    run(6, async {
        let nodes = Nodes::started("a+ b+ c+ d-").await;
        nodes.leader().await;
        let asked = nodes.get(&node("a"));
        create(&asked, "acme").await.expect("creates");
        create(&asked, "baker").await.expect("creates");
        nodes.agreed().await;
        let key_of = |name: &str| -> String {
            asked.snapshot().tenant(&tenant(name)).expect("there").record().wrapped_key.clone().into()
        };
        let (erased, kept) = (key_of("acme"), key_of("baker"));
        assert!(nodes.names().iter().all(|name| nodes.holds(name, &erased)), "the scan finds what is there");
        let leader = nodes.leader().await;
        let away = nodes.names().into_iter().find(|name| *name != leader && name.as_str() != "a").expect("four");
        nodes.kill(&away).await;
        asked.apply(Action::DeleteTenant { tenant: tenant("acme"), at_s: 9 }).await.expect("deletes");
        let leader = nodes.leader().await;
        assert!(!nodes.holds(&leader, &erased), "gone on the leader when the caller hears of it");
        create(&asked, "after").await.expect("goes on");
        assert!(nodes.holds(&away, &erased), "the node that is away still has it");
        nodes.start(&away).await;
        nodes.agreed().await;
        let gone = async {
            while nodes.names().iter().any(|name| nodes.holds(name, &erased)) {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), gone).await.expect("gone everywhere");
        assert!(nodes.names().iter().all(|name| nodes.holds(name, &kept)));
        assert_eq!(nodes.agreed().await, ["after", "baker"].map(str::to_owned).into());
    });
}

#[test]
fn a_node_that_served_alone_grows_into_a_cluster_and_shrinks_again() {
    run(7, async {
        let mut nodes = Nodes::started("a+").await;
        create(&nodes.get(&node("a")), "first").await.expect("creates");
        nodes.stop(&node("a")).await;
        nodes.configure("a+ b+ c+ d-");
        for name in nodes.names() {
            nodes.start(&name).await;
        }
        nodes.leader().await;
        create(&nodes.get(&node("d")), "second").await.expect("creates");
        assert_eq!(nodes.agreed().await.len(), 2);
        // The file loses two nodes: everybody reads it anew, one after another.
        nodes.configure("a+ b-");
        for name in ["c", "d"] {
            nodes.stop(&node(name)).await;
        }
        // Two voters of three still agree to go on without the third.
        for name in nodes.names() {
            nodes.stop(&name).await;
            nodes.start(&name).await;
        }
        nodes.leader().await;
        create(&nodes.get(&node("b")), "third").await.expect("creates");
        assert_eq!(nodes.agreed().await.len(), 3);
        assert!(nodes.get(&node("a")).status().borrow().members.iter().all(|member| member.node.as_str() != "c"));
    });
}

#[test]
fn registries_that_grew_up_alone_are_never_mixed() {
    run(8, async {
        let mut nodes = Nodes::new("b+");
        let b = nodes.start(&node("b")).await;
        create(&b, "of-b").await.expect("creates");
        nodes.stop(&node("b")).await;
        nodes.configure("a+");
        let a = nodes.start(&node("a")).await;
        create(&a, "of-a").await.expect("creates");
        nodes.stop(&node("a")).await;
        nodes.configure("a+ b-");
        let (a, b) = (nodes.start(&node("a")).await, nodes.start(&node("b")).await);
        tokio::time::sleep(Duration::from_secs(20)).await;
        create(&a, "more").await.expect("a goes on by itself");
        let names = |registry: &Registry| {
            let snapshot = registry.snapshot();
            snapshot.tenants().iter().map(|view| view.record().tenant().to_string()).collect::<Vec<_>>()
        };
        assert_eq!(names(&a), ["more", "of-a"]);
        assert_eq!(names(&b), ["of-b"]);
    });
}

#[test]
fn a_founder_that_lost_its_disk_joins_what_the_others_kept() {
    run(9, async {
        let nodes = Nodes::started("a+ b+ c+").await;
        nodes.leader().await;
        create(&nodes.get(&node("b")), "acme").await.expect("creates");
        nodes.agreed().await;
        for name in nodes.names() {
            nodes.stop(&name).await;
        }
        fs::remove_dir_all(nodes.dir(&node("a"))).expect("removes");
        // Alone it must not found a second registry, whoever else is out of reach.
        let a = nodes.start(&node("a")).await;
        tokio::time::sleep(Duration::from_secs(20)).await;
        assert!(matches!(create(&a, "second").await, Err(RegistryError::NoLeader { .. })));
        nodes.start(&node("b")).await;
        nodes.start(&node("c")).await;
        nodes.leader().await;
        assert_eq!(nodes.agreed().await, ["acme".to_owned()].into());
    });
}

#[test]
fn a_run_depends_on_its_seed_alone() {
    let trace = |seed| {
        run(seed, async {
            let nodes = Nodes::started("a+ b+ c+ d-").await;
            let start = tokio::time::Instant::now();
            let mut trace = Vec::new();
            for i in 0..3 {
                let leader = nodes.leader().await;
                nodes.kill(&leader).await;
                create(&nodes.get(&node("d")), &format!("t{i}")).await.expect("creates");
                nodes.start(&leader).await;
                trace.push((leader, start.elapsed()));
            }
            trace
        })
    };
    assert_eq!(trace(11), trace(11));
}
