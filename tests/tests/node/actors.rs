//! Each supervised actor ended from outside while the node serves (RELIABILITY F10): those that may come back do
//! so within a moment and no request fails; the others end the node with a reason.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use adapters::actor::AdapterCacheMsg;
use node::base_model::BaseModelMsg;
use node::serve;
use queue::actor::FairQueueMsg;
use ractor::{ActorCell, ActorId};
use serde_json::{Value, json};
use shared::clock::{Clock, SystemClock};
use shared::config::ClusterConfig;
use tests::process::{Answer, read, scratch};
use tests::{operator, tiny};

/// A kind of child of the node's supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Child {
    Registry,
    FairQueue,
    AdapterCache,
    BaseModel,
}

fn kind(actor: &ActorCell) -> Child {
    if actor.is_message_type_of::<FairQueueMsg>() == Some(true) {
        Child::FairQueue
    } else if actor.is_message_type_of::<AdapterCacheMsg>() == Some(true) {
        Child::AdapterCache
    } else if actor.is_message_type_of::<BaseModelMsg>() == Some(true) {
        Child::BaseModel
    } else {
        Child::Registry
    }
}

fn child(supervisor: &ActorCell, wanted: Child, but: Option<ActorId>) -> Option<ActorCell> {
    supervisor.get_children().into_iter().find(|actor| kind(actor) == wanted && Some(actor.get_id()) != but)
}

fn config(folder: &Path) -> ClusterConfig {
    let model = tiny::model(&folder.join("model"));
    let text = format!(
        "{}\n[[nodes]]\nname = \"a\"\nhttp = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\ndata = \"data\"\n[[bases]]\nname = \"tiny\"\npath = \"{}\"\nnumerics = \"exact\"\n",
        operator::GENEROUS,
        model.display()
    );
    ClusterConfig::parse(&text, &folder.join("cluster.toml")).expect("valid")
}

/// The two ports of a node in this process.
struct Doors {
    clients: String,
    admins: String,
    admin_key: String,
    agent: ureq::Agent,
}

impl Doors {
    /// `None` when the port is closed.
    fn post(&self, url: &str, key: &str, body: &Value) -> Option<Answer> {
        let request = self.agent.post(url).header("authorization", format!("Bearer {key}"));
        let request = request.header("content-type", "application/json");
        request.send(body.to_string()).ok().map(read)
    }

    fn tenant(&self, id: &str) -> Option<Answer> {
        self.post(&format!("{}/admin/v1/tenants", self.admins), &self.admin_key, &json!({"id": id}))
    }

    fn complete(&self, key: &str) -> Option<Answer> {
        let body = json!({"model": "tiny", "prompt": "x", "max_tokens": 8, "ignore_eos": true});
        self.post(&format!("{}/v1/completions", self.clients), key, &body)
    }
}

/// Starts a node in this process, kills `victim` while four clients send requests, and hands over to `then` with
/// the doors and the time from the kill until the child was there again. Returns how the node ended.
fn kill_under_load(victim: Child, then: impl FnOnce(&Doors, Option<Duration>)) -> anyhow::Result<()> {
    let folder = scratch(&format!("actor-{victim:?}"));
    let config = config(&folder);
    let node = config.nodes[0].clone();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let running = runtime.block_on(serve::start(config, node)).expect("the node starts");
    let supervisor = running.supervisor();
    let admin_key = std::fs::read_to_string(folder.join("data/admin.key")).expect("an admin key").trim().to_owned();
    let (clients, admins) = (format!("http://{}", running.http()), format!("http://{}", running.admin()));
    let doors = Doors { clients, admins, admin_key, agent: operator::agent() };
    let end = runtime.spawn(running.run());
    let created = doors.tenant("acme").expect("the node answers");
    let key = created.body["key"]["key"].as_str().unwrap_or_else(|| panic!("{}", created.text));

    let (over, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    let is_final = matches!(victim, Child::AdapterCache | Child::BaseModel);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    match doors.complete(key) {
                        Some(answer) if answer.status == 200 => {
                            served.fetch_add(1, Ordering::Relaxed);
                        }
                        Some(answer) if is_final => assert_eq!(answer.code(), "node_stopping", "{}", answer.text),
                        None if is_final => return,
                        failed => panic!("{failed:?}"),
                    }
                }
            });
        }
        let reach = |n: usize| {
            (0..2000).any(|_| {
                std::thread::sleep(Duration::from_millis(5));
                served.load(Ordering::Relaxed) >= n
            })
        };
        assert!(reach(20), "requests are served before");
        let before = child(&supervisor, victim, None).expect("it runs");
        let killed_at = SystemClock.now();
        before.kill();
        let back = (0..2000).find_map(|_| {
            std::thread::sleep(Duration::from_millis(1));
            child(&supervisor, victim, Some(before.get_id())).map(|_| killed_at.elapsed())
        });
        if !is_final {
            let n = served.load(Ordering::Relaxed);
            assert!(reach(n + 20), "requests are served afterwards");
        }
        over.store(true, Ordering::Relaxed);
        then(&doors, back);
    });
    supervisor.stop(None);
    runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(20), end).await })
        .expect("ends")
        .expect("no panic")
}

#[test]
fn a_registry_that_dies_comes_back_and_takes_changes_again() {
    let _ = kill_under_load(Child::Registry, |doors, back| {
        println!("registry back after {back:?}");
        assert!(back.is_some_and(|back| back < Duration::from_secs(1)), "{back:?}");
        let changed = (0..50).any(|round| {
            std::thread::sleep(Duration::from_millis(20));
            doors.tenant(&format!("late-{round}")).is_some_and(|answer| answer.status == 201)
        });
        assert!(changed, "tenants can be created again");
    });
}

#[test]
fn a_fair_queue_actor_that_dies_comes_back_and_the_waiting_requests_stay() {
    let _ = kill_under_load(Child::FairQueue, |_, back| {
        println!("fair queue back after {back:?}");
        assert!(back.is_some_and(|back| back < Duration::from_secs(1)), "{back:?}");
    });
}

#[test]
fn the_end_of_the_adapter_caches_actor_ends_the_node_with_a_reason() {
    let end = kill_under_load(Child::AdapterCache, |_, back| assert_eq!(back, None));
    let error = end.expect_err("the node ends").to_string();
    assert!(error.contains("actors gave up"), "{error}");
}

#[test]
fn the_end_of_a_base_models_actor_ends_the_node_with_a_reason() {
    let end = kill_under_load(Child::BaseModel, |_, back| assert_eq!(back, None));
    let error = end.expect_err("the node ends").to_string();
    assert!(error.contains("actors gave up"), "{error}");
}
