//! Tests of the whole registry of one node: handle, actor, keeper, disk.

use ractor::{ActorProcessingErr, SupervisionEvent};

use super::command::{Action, Applied};
use super::*;
use crate::auth::{ApiKey, AuthError, KeyId, Scope};
use crate::testing::{TestDir, spec};
use shared::clock::{Clock, SystemClock};
use shared::id::TenantId;

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    runtime.expect("starts").block_on(test)
}

fn options(dir: &TestDir) -> RegistryOptions {
    RegistryOptions::load(&dir.0, &dir.0.join("cluster.key")).expect("loads")
}

async fn open(dir: &TestDir) -> Registry {
    Registry::open(options(dir)).await.expect("opens")
}

/// A created tenant and its key.
struct Created {
    applied: Applied,
    key: ApiKey,
    key_id: KeyId,
}

async fn create(registry: &Registry, tenant: &str, at_s: u64) -> Result<Created, RegistryError> {
    let (key, record) = registry.secrets().api_key([Scope::Infer].into(), at_s, None);
    let key_id = record.id;
    let command = registry.secrets().create_tenant(spec(tenant), vec![record], at_s);
    Ok(Created { applied: registry.apply(command).await?, key, key_id })
}

fn id(text: &str) -> TenantId {
    text.parse().expect("valid tenant")
}

#[test]
fn an_acknowledged_command_is_visible_at_once_and_after_a_restart() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let created = create(&registry, "acme", 100).await.expect("creates");
        let authed = registry.snapshot().authenticate(created.key.reveal(), 200).expect("valid at once");
        assert_eq!((authed.tenant().as_str(), authed.contract().epoch), ("acme", created.applied.epoch));
        registry.stop().await;
        assert_eq!(registry.apply(Action::SuspendTenant { tenant: id("acme") }).await, Err(RegistryError::Unavailable));
        let registry = open(&dir).await;
        let again = registry.snapshot().authenticate(created.key.reveal(), 200).expect("valid after a restart");
        assert_eq!((again.contract(), again.cache_secret()), (authed.contract(), authed.cache_secret()));
    });
}

#[test]
fn many_callers_at_once_each_get_their_own_answer() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let calls: Vec<_> = (0..200)
            .map(|i| {
                let registry = registry.clone();
                // Every name is asked for twice: exactly one of the two gets it.
                tokio::spawn(async move { create(&registry, &format!("t{}", i / 2), 100).await.map(drop) })
            })
            .collect();
        let (mut created, mut refused) = (0, 0);
        for call in calls {
            match call.await.expect("no panic") {
                Ok(()) => created += 1,
                Err(RegistryError::Exists { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!((created, refused), (100, 100));
        let snapshot = registry.snapshot();
        assert_eq!((snapshot.n_tenants(), snapshot.epoch()), (100, 100));
        let names: Vec<_> = snapshot.tenants().iter().map(|view| view.record().tenant().to_string()).collect();
        assert!(names.is_sorted());
    });
}

#[test]
fn subscribers_hear_of_a_revocation_before_the_caller_does() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let created = create(&registry, "acme", 100).await.expect("creates");
        let mut changes = registry.subscribe();
        changes.mark_unchanged();
        let revoke = Action::RevokeKey { tenant: id("acme"), key_id: created.key_id, at_s: 150 };
        registry.apply(revoke).await.expect("revokes");
        assert!(changes.has_changed().expect("open"));
        let snapshot = changes.borrow_and_update().clone();
        assert_eq!(snapshot.authenticate(created.key.reveal(), 200).err(), Some(AuthError::Revoked));
    });
}

#[test]
fn deleting_a_tenant_makes_what_it_sealed_unreadable_for_ever() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        create(&registry, "acme", 100).await.expect("creates");
        let content = b"adapter weights";
        let hash = shared::hash::ContentHash::of(content);
        let (sealed, wrapped) = {
            let snapshot = registry.snapshot();
            let view = snapshot.tenant(&id("acme")).expect("there");
            let wrapped: String = view.record().wrapped_key.clone().into();
            (shared::seal::seal(view.key(), &id("acme"), &hash, content), wrapped)
        };
        registry.apply(Action::DeleteTenant { tenant: id("acme"), at_s: 150 }).await.expect("deletes");
        let file = std::fs::read(dir.0.join("registry.redb")).expect("reads");
        assert!(!file.windows(wrapped.len()).any(|window| window == wrapped.as_bytes()), "wrapped key still on disk");
        create(&registry, "acme", 200).await.expect("creates anew");
        let snapshot = registry.snapshot();
        let view = snapshot.tenant(&id("acme")).expect("there");
        assert!(shared::seal::open(view.key(), &id("acme"), &hash, &sealed).is_err());
        registry.apply(Action::SuspendTenant { tenant: id("acme") }).await.expect("goes on after the erasure");
    });
}

#[test]
fn handles_survive_a_respawn_and_readers_never_stop() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let clone = registry.clone();
        create(&registry, "acme", 100).await.expect("creates");
        let first = registry.actor_id();
        registry.inner.actor.lock().expect("no panic").as_ref().expect("runs").kill();
        assert_eq!(clone.snapshot().n_tenants(), 1, "readers do not need the actor");
        registry.respawn(None).await.expect("respawns");
        assert_ne!(registry.actor_id(), first);
        clone.apply(Action::SuspendTenant { tenant: id("acme") }).await.expect("the old handle works");
    });
}

#[test]
fn an_actor_that_ended_long_ago_is_replaced() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        create(&registry, "acme", 100).await.expect("creates");
        let actor = registry.inner.actor.lock().expect("no panic").clone().expect("runs");
        actor.kill_and_wait(None).await.expect("dies");
        let back = tokio::time::timeout(Duration::from_secs(5), registry.respawn(None)).await;
        back.expect("within a moment").expect("respawns");
        registry.apply(Action::SuspendTenant { tenant: id("acme") }).await.expect("takes changes again");
    });
}

/// Takes the registry over and starts it again whenever it ends, as a node's supervisor does.
struct Supervisor;

impl Actor for Supervisor {
    type Msg = ();
    type State = Registry;
    type Arguments = Registry;

    async fn pre_start(&self, myself: ActorRef<()>, registry: Registry) -> Result<Registry, ActorProcessingErr> {
        registry.link(myself.get_cell()).ok_or("it has ended")?;
        Ok(registry)
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<()>,
        event: SupervisionEvent,
        registry: &mut Registry,
    ) -> Result<(), ActorProcessingErr> {
        let has_ended = matches!(event, SupervisionEvent::ActorTerminated(..) | SupervisionEvent::ActorFailed(..));
        // With it goes the state of the actor, which holds the way to the keeper.
        drop(event);
        if has_ended {
            registry.respawn(Some(myself.get_cell())).await?;
        }
        Ok(())
    }
}

#[test]
fn a_supervisor_takes_the_actor_over_and_replaces_it_as_it_ends() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        create(&registry, "acme", 100).await.expect("creates");
        let (supervisor, end) = Actor::spawn(None, Supervisor, registry.clone()).await.expect("starts");
        for round in 0..20 {
            let actor = registry.inner.actor.lock().expect("no panic").clone().expect("runs");
            actor.kill_and_wait(None).await.expect("dies");
            let is_back = async {
                while registry.actor_id().is_none_or(|id| id == actor.get_id()) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(5), is_back).await.unwrap_or_else(|_| panic!("round {round}"));
            registry.apply(Action::SuspendTenant { tenant: id("acme") }).await.expect("takes changes again");
        }
        supervisor.stop(None);
        end.await.expect("ends");
    });
}

#[test]
fn a_second_registry_on_the_directory_and_a_lost_cluster_key_are_refused_clearly() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let error = Registry::open(options(&dir)).await.expect_err("in use").to_string();
        assert!(error.contains("in use by another process"), "{error}");
        registry.stop().await;
        std::fs::remove_file(dir.0.join("cluster.key")).expect("removes");
        let error = RegistryOptions::load(&dir.0, &dir.0.join("cluster.key")).expect_err("no key").to_string();
        assert!(error.contains("cluster.key"), "{error}");
        assert!(!dir.0.join("cluster.key").exists(), "a fresh key beside an old registry would hide the loss");
    });
}

/// Before registries were replicated there was no log, and none of its marks.
#[test]
fn a_registry_of_the_first_version_is_taken_over() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let created = create(&registry, "acme", 100).await.expect("creates");
        let record = record::encode(&**registry.snapshot().tenant(&id("acme")).expect("there").record());
        let fingerprint = registry.secrets().fingerprint();
        registry.stop().await;
        std::fs::remove_file(dir.0.join("registry.redb")).expect("removes");
        let old = redb::Database::create(dir.0.join("registry.redb")).expect("creates");
        let txn = old.begin_write().expect("begins");
        {
            let table = redb::TableDefinition::<&str, &[u8]>::new;
            let mut tenants = txn.open_table(table("tenants")).expect("opens");
            tenants.insert("acme", record.as_slice()).expect("inserts");
            let mut meta = txn.open_table(table("meta")).expect("opens");
            meta.insert("epoch", 1_u64.to_le_bytes().as_slice()).expect("inserts");
            meta.insert("cluster key fingerprint", fingerprint.0.as_slice()).expect("inserts");
            meta.insert("scrub pending", [1_u8].as_slice()).expect("inserts");
        }
        txn.commit().expect("commits");
        drop(old);
        let registry = open(&dir).await;
        assert!(registry.snapshot().authenticate(created.key.reveal(), 200).is_ok());
        assert_eq!(create(&registry, "baker", 100).await.expect("goes on").applied.epoch, 2);
    });
}

#[test]
fn a_tenant_key_that_does_not_open_here_never_reaches_the_disk() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let foreign = Secrets::new(ClusterKey::random()).create_tenant(spec("acme"), Vec::new(), 7);
        assert!(
            matches!(registry.apply(foreign).await, Err(RegistryError::Invalid { field, .. }) if field == "wrapped_key")
        );
        registry.stop().await;
        assert_eq!(open(&dir).await.snapshot().n_tenants(), 0);
    });
}

#[test]
fn ten_thousand_tenants_open_quickly() {
    run(async {
        let dir = TestDir::new();
        let registry = open(&dir).await;
        let start = SystemClock.now();
        for batch in 0..20 {
            let calls: Vec<_> = (0..500)
                .map(|i| {
                    let registry = registry.clone();
                    let name = format!("tenant-{}", batch * 500 + i);
                    tokio::spawn(async move { create(&registry, &name, 100).await.map(drop) })
                })
                .collect();
            for call in calls {
                call.await.expect("no panic").expect("creates");
            }
        }
        let created_in = SystemClock.now() - start;
        let start = SystemClock.now();
        registry.apply(Action::SuspendTenant { tenant: id("tenant-1") }).await.expect("suspends");
        let changed_in = SystemClock.now() - start;
        let start = SystemClock.now();
        registry.apply(Action::DeleteTenant { tenant: id("tenant-2"), at_s: 9 }).await.expect("deletes");
        let deleted_in = SystemClock.now() - start;
        registry.stop().await;
        let bytes = std::fs::metadata(dir.0.join("registry.redb")).expect("exists").len();
        let start = SystemClock.now();
        let registry = open(&dir).await;
        let opened_in = SystemClock.now() - start;
        println!(
            "10,000 tenants: created in {created_in:?}, one change {changed_in:?}, one erasure {deleted_in:?}, opened in {opened_in:?}, {bytes} bytes on disk"
        );
        assert_eq!(registry.snapshot().n_tenants(), 9_999);
        assert!(opened_in < Duration::from_secs(10), "opening took {opened_in:?}");
    });
}
