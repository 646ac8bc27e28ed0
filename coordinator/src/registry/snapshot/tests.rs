//! Tests of the read view: who a key belongs to, sharing between snapshots, cost at 10,000 tenants.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use shared::clock::{Clock, SystemClock};

use super::*;
use crate::auth::{ApiKey, Scope};
use crate::registry::command::{Action, Command};
use crate::testing::commands;
use crate::testing::spec;
use shared::seal::ClusterKey;

struct World {
    secrets: Arc<Secrets>,
    state: RegistryState,
    snapshot: Snapshot,
}

impl World {
    fn new() -> Self {
        let secrets = Arc::new(Secrets::new(ClusterKey::random()));
        let state = RegistryState::default();
        let snapshot = Snapshot::build(&state, secrets.clone()).expect("builds");
        Self { secrets, state, snapshot }
    }

    fn apply(&mut self, command: impl Into<Command>) {
        let decision = self.state.decide(&command.into()).expect("accepted");
        self.snapshot = self.snapshot.with(&decision.change, decision.applied.epoch).expect("unwraps");
        self.state.commit(decision);
    }

    fn create(&mut self, tenant: &str) -> ApiKey {
        let (key, record) = self.secrets.api_key([Scope::Infer].into(), 100, None);
        self.apply(self.secrets.create_tenant(spec(tenant), vec![record], 7));
        key
    }
}

fn id(text: &str) -> TenantId {
    text.parse().expect("valid tenant")
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start: Instant = SystemClock.now();
    let result = work();
    (result, SystemClock.now() - start)
}

#[test]
fn a_key_proves_its_own_tenant_and_no_other() {
    let mut world = World::new();
    let keys: Vec<_> = ["acme", "baker", "cedar"].map(|tenant| (tenant, world.create(tenant))).into();
    for (tenant, key) in &keys {
        let authed = world.snapshot.authenticate(key.reveal(), 200).expect("valid");
        assert_eq!(authed.tenant().as_str(), *tenant);
        assert!(authed.require(Scope::Infer).is_ok() && authed.require(Scope::Adapters).is_err());
    }
    // One tenant's key id with another's secret opens nothing.
    let mixed = format!("{}{}", &keys[0].1.reveal()[..21], &keys[1].1.reveal()[21..]);
    assert_eq!(world.snapshot.authenticate(&mixed, 200).err(), Some(AuthError::Invalid));
}

#[test]
fn a_revoked_key_fails_in_the_next_snapshot_and_another_key_goes_on() {
    let mut world = World::new();
    let old = world.create("acme");
    let (new, record) = world.secrets.api_key([Scope::Infer].into(), 100, None);
    world.apply(Action::AddKey { tenant: id("acme"), key: record });
    let old_id = world.snapshot.authenticate(old.reveal(), 200).expect("valid").key_id();
    world.apply(Action::RevokeKey { tenant: id("acme"), key_id: old_id, at_s: 150 });
    assert_eq!(world.snapshot.authenticate(old.reveal(), 200).err(), Some(AuthError::Revoked));
    assert!(world.snapshot.authenticate(new.reveal(), 200).is_ok());
}

#[test]
fn a_deleted_tenants_keys_are_unknown_and_its_successor_shares_no_secret() {
    let mut world = World::new();
    let old_key = world.create("acme");
    let old = world.snapshot.authenticate(old_key.reveal(), 200).expect("valid");
    world.apply(Action::DeleteTenant { tenant: id("acme"), at_s: 150 });
    assert_eq!(world.snapshot.authenticate(old_key.reveal(), 200).err(), Some(AuthError::Invalid));
    assert!(world.snapshot.contract(&old).is_none());
    let new_key = world.create("acme");
    assert_eq!(world.snapshot.authenticate(old_key.reveal(), 200).err(), Some(AuthError::Invalid));
    let new = world.snapshot.authenticate(new_key.reveal(), 200).expect("valid");
    assert_ne!(old.cache_secret(), new.cache_secret());
    let content = b"weights";
    let hash = shared::hash::ContentHash::of(content);
    let sealed = shared::seal::seal(old.tenant_key(), &id("acme"), &hash, content);
    assert!(shared::seal::open(new.tenant_key(), &id("acme"), &hash, &sealed).is_err());
}

#[test]
fn a_dead_key_that_made_room_for_a_new_one_is_forgotten() {
    let mut world = World::new();
    let first = world.create("acme");
    let first_id = world.snapshot.authenticate(first.reveal(), 200).expect("valid").key_id();
    let add = |world: &mut World| {
        let key = world.secrets.api_key([Scope::Infer].into(), 100, None).1;
        world.apply(Action::AddKey { tenant: id("acme"), key });
    };
    (1..crate::registry::bounds::KEYS_MAX).for_each(|_| add(&mut world));
    world.apply(Action::RevokeKey { tenant: id("acme"), key_id: first_id, at_s: 150 });
    add(&mut world);
    assert_eq!(world.snapshot.authenticate(first.reveal(), 200).err(), Some(AuthError::Invalid));
}

#[test]
fn unknown_ids_and_wrong_secrets_are_told_the_same() {
    let mut world = World::new();
    let key = world.create("acme");
    let wrong = format!("{}{}", &key.reveal()[..21], "A".repeat(43));
    let unknown = format!("tnt_{}_{}", "0".repeat(16), "A".repeat(43));
    let told = [&wrong, &unknown, "nonsense"].map(|text| {
        let error = world.snapshot.authenticate(text, 200).expect_err("invalid");
        shared::error::RequestError::from(error)
    });
    assert!(told[0] == told[1] && told[1] == told[2]);
    assert_eq!(told[0].code, "invalid_api_key");
}

#[test]
fn a_held_snapshot_does_not_change() {
    let mut world = World::new();
    let key = world.create("acme");
    let held = world.snapshot.clone();
    world.apply(Action::SuspendTenant { tenant: id("acme") });
    world.create("baker");
    let authed = held.authenticate(key.reveal(), 200).expect("valid");
    assert_eq!((held.n_tenants(), authed.contract().state), (1, shared::tenant::TenantState::Active));
    assert_eq!(world.snapshot.contract(&authed).expect("there").state, shared::tenant::TenantState::Suspended);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn snapshots_made_step_by_step_equal_one_made_at_once(commands in commands::sequence(60)) {
        let secrets = commands::SECRETS.clone();
        let mut state = RegistryState::default();
        let mut steps = Snapshot::build(&state, secrets.clone()).expect("builds");
        for command in &commands {
            let Ok(decision) = state.decide(command) else { continue };
            steps = steps.with(&decision.change, decision.applied.epoch).expect("unwraps");
            state.commit(decision);
        }
        let whole = Snapshot::build(&state, secrets).expect("builds");
        prop_assert_eq!((steps.epoch(), steps.n_tenants()), (whole.epoch(), whole.n_tenants()));
        let list = |snapshot: &Snapshot| {
            let tenants = snapshot.tenants();
            tenants.iter().map(|view| (view.record().clone(), *view.cache_secret())).collect::<Vec<_>>()
        };
        prop_assert_eq!(list(&steps), list(&whole));
        let mut keys: Vec<_> = steps.key_owners.values().map(|view| view.record().tenant().clone()).collect();
        let mut expected: Vec<_> = whole.key_owners.values().map(|view| view.record().tenant().clone()).collect();
        keys.sort();
        expected.sort();
        prop_assert_eq!(keys, expected);
    }
}

/// The bounds are ten times and more above what an idle machine shows, so that only a change of order fails.
#[test]
fn one_change_among_ten_thousand_tenants_is_cheap() {
    let mut world = World::new();
    for i in 0..10_000 {
        let (_, record) = world.secrets.api_key([Scope::Infer].into(), 100, None);
        let command = world.secrets.create_tenant(spec(&format!("tenant-{i}")), vec![record], 7).into();
        world.state.apply(&command).expect("creates");
    }
    let (snapshot, built_in) = timed(|| Snapshot::build(&world.state, world.secrets.clone()).expect("builds"));
    world.snapshot = snapshot;
    let key = world.create("acme");
    let ((), changed_in) = timed(|| {
        for i in 0..100 {
            let tenant = id(&format!("tenant-{i}"));
            world.apply(Action::SuspendTenant { tenant });
        }
    });
    let ((), authenticated_in) = timed(|| {
        for _ in 0..1000 {
            world.snapshot.authenticate(key.reveal(), 200).expect("valid");
        }
    });
    println!(
        "10,000 tenants: build {built_in:?}, change {:?}, authenticate {:?}",
        changed_in / 100,
        authenticated_in / 1000
    );
    assert!(built_in < Duration::from_secs(5), "build took {built_in:?}");
    assert!(changed_in / 100 < Duration::from_millis(2), "a change took {:?}", changed_in / 100);
    assert!(authenticated_in / 1000 < Duration::from_micros(500), "authentication took {:?}", authenticated_in / 1000);
}

#[test]
fn what_another_node_took_away_is_told_by_comparing() {
    let mut world = World::new();
    world.create("acme");
    world.create("baker");
    let add = |world: &mut World, name: &str, content: &str| {
        let adapter = crate::testing::adapter(name, content);
        world.apply(Action::AddAdapterVersion { tenant: id(name.split('-').next().expect("a name")), adapter });
    };
    add(&mut world, "acme-support-smollm2-v1.0.0", "one");
    add(&mut world, "acme-support-smollm2-v1.1.0", "two");
    add(&mut world, "acme-support-smollm2-v1.2.0", "one");
    add(&mut world, "baker-support-smollm2-v1.0.0", "one");
    let before = world.snapshot.clone();
    assert_eq!(world.snapshot.gone_since(&before), []);
    let name = |text: &str| text.parse().expect("valid version");
    for gone in ["acme-support-smollm2-v1.0.0", "acme-support-smollm2-v1.1.0"] {
        world.apply(Action::RemoveAdapterVersion { tenant: id("acme"), name: name(gone) });
    }
    // Gone and there again is gone: the new one shares nothing with it.
    world.apply(Action::DeleteTenant { tenant: id("baker"), at_s: 9 });
    world.create("baker");
    world.create("cedar");
    let (one, two) = (ContentHash::of(b"one"), ContentHash::of(b"two"));
    let removed = |text: &str, hash, still_used| Event::AdapterVersionRemoved { name: name(text), hash, still_used };
    let mut gone = world.snapshot.gone_since(&before);
    gone.sort_by_key(|event| format!("{event:?}"));
    assert_eq!(
        gone,
        [
            removed("acme-support-smollm2-v1.0.0", one, true),
            removed("acme-support-smollm2-v1.1.0", two, false),
            Event::TenantDeleted { tenant: id("baker"), adapters: vec![one] },
        ]
    );
    // A copy that arrived as a whole shares no shard, and says the same.
    let whole = before.replaced_by(&world.state).expect("unwraps");
    let mut at_once = whole.gone_since(&before);
    at_once.sort_by_key(|event| format!("{event:?}"));
    assert_eq!(at_once, gone);
    assert!(Arc::ptr_eq(
        whole.tenant(&id("acme")).expect("there").key(),
        before.tenant(&id("acme")).expect("there").key()
    ));
}
