//! Tests of the pure state: invariants after any commands, and each rule by example.

use proptest::prelude::*;

use super::*;
use crate::registry::command::Command;
use crate::testing::commands::{self, SECRETS};
use crate::testing::{adapter, spec};

fn id(text: &str) -> TenantId {
    text.parse().expect("valid tenant")
}

/// What must hold whatever happened.
fn check(state: &RegistryState) {
    let mut n_keys = 0;
    for (tenant, record) in state.tenants() {
        let contract = &record.contract;
        assert_eq!(tenant, record.tenant());
        assert!(contract.epoch <= state.epoch() && record.created_epoch <= contract.epoch);
        assert!(!contract.bases.is_empty() && (1..=bounds::WEIGHT_MAX).contains(&contract.weight));
        let hashes = record.adapters.iter().map(|(name, adapter)| (name.clone(), adapter.hash));
        assert_eq!(contract.versions, hashes.collect(), "contract and records list the same versions");
        for (name, adapter) in &record.adapters {
            assert_eq!((name, &name.client), (&adapter.name, tenant));
            assert!(contract.bases.contains(&name.base) && !record.retired.contains_key(name));
        }
        for (task, to) in &contract.tasks {
            assert!(!contract.bases.iter().any(|base| base.as_str() == task.as_str()));
            if let Some(to) = to {
                assert_eq!(
                    contract.versions.get(&to.adapter),
                    Some(&to.hash),
                    "task {task} points at a version that is there"
                );
            }
        }
        assert!(record.keys.len() <= bounds::KEYS_MAX);
        for key_id in record.keys.keys() {
            assert_eq!(state.key_owners.get(key_id), Some(tenant));
        }
        n_keys += record.keys.len();
        if let Some(tombstone) = state.tombstones().get(tenant) {
            assert!(tombstone.deleted_epoch < record.created_epoch, "an erased tenant came back");
        }
    }
    assert_eq!(n_keys, state.key_owners.len(), "a key belongs to exactly one tenant");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn any_commands_keep_the_invariants_and_replay_to_the_same_state(commands in commands::sequence(80)) {
        let (mut state, mut replica) = (RegistryState::default(), RegistryState::default());
        for command in &commands {
            let before = state.clone();
            match state.apply(command) {
                Err(_) => prop_assert_eq!(&state, &before, "a refused command changes nothing"),
                Ok(events) if events.is_empty() => prop_assert_eq!(&state, &before),
                Ok(_) => {
                    prop_assert_eq!(state.epoch(), before.epoch() + 1);
                    let others = |state: &RegistryState| {
                        let mut tenants = state.tenants().clone();
                        tenants.remove(command.action.tenant());
                        tenants
                    };
                    prop_assert_eq!(others(&state), others(&before), "a command touches one tenant");
                }
            }
            check(&state);
            let _ = replica.apply(command);
        }
        prop_assert_eq!(&state, &replica);
        let records = state.tenants().values().map(|record| TenantRecord::clone(record));
        let restored = RegistryState::restore(state.epoch(), records, state.tombstones().values().cloned());
        prop_assert_eq!(&state, &restored);
    }

    #[test]
    fn commands_survive_being_written_to_a_log(commands in commands::sequence(20)) {
        for command in commands {
            let text = serde_json::to_string(&command).expect("serialises");
            prop_assert_eq!(serde_json::from_str::<Command>(&text).expect("reads back"), command);
        }
    }
}

fn create(tenant: &str) -> Command {
    SECRETS.create_tenant(spec(tenant), Vec::new(), 7).into()
}

fn state_with(tenants: &[&str]) -> RegistryState {
    let mut state = RegistryState::default();
    for tenant in tenants {
        state.apply(&create(tenant)).expect("creates");
    }
    state
}

fn add(tenant: &str, name: &str, content: &str) -> Command {
    Action::AddAdapterVersion { tenant: id(tenant), adapter: adapter(name, content) }.into()
}

fn point(version: Option<&str>) -> Command {
    let version = version.map(|name| name.parse().expect("valid version"));
    Action::PointTask { tenant: id("acme"), task: "support".parse().expect("valid task"), version }.into()
}

#[test]
fn a_version_never_changes_its_content_not_even_after_removal() {
    let mut state = state_with(&["acme"]);
    let name = "acme-support-smollm2-v1.0.0";
    state.apply(&add("acme", name, "one")).expect("adds");
    assert!(matches!(state.apply(&add("acme", name, "two")), Err(RegistryError::Conflict(_))));
    assert_eq!(state.apply(&add("acme", name, "one")), Ok(Vec::new()), "the same content again is no change");
    let remove = Action::RemoveAdapterVersion { tenant: id("acme"), name: name.parse().expect("valid") };
    state.apply(&remove.into()).expect("removes");
    assert!(matches!(state.apply(&add("acme", name, "two")), Err(RegistryError::Conflict(_))));
    state.apply(&add("acme", name, "one")).expect("the same content may come back");
}

#[test]
fn a_version_in_use_stays_until_its_task_points_elsewhere() {
    let mut state = state_with(&["acme"]);
    let name = "acme-support-smollm2-v1.0.0";
    state.apply(&add("acme", name, "one")).expect("adds");
    state.apply(&point(Some(name))).expect("points");
    let remove = || Action::RemoveAdapterVersion { tenant: id("acme"), name: name.parse().expect("valid") };
    let error = state.apply(&remove().into()).expect_err("in use").to_string();
    assert!(error.contains("task support points at"), "{error}");
    state.apply(&point(None)).expect("points nowhere");
    state.apply(&remove().into()).expect("removes");
}

#[test]
fn a_tenant_cannot_register_or_point_at_anothers_version() {
    let mut state = state_with(&["acme", "baker"]);
    assert!(matches!(
        state.apply(&add("acme", "baker-support-smollm2-v1.0.0", "one")),
        Err(RegistryError::Invalid { field, .. }) if field == "version name"
    ));
    state.apply(&add("baker", "baker-support-smollm2-v1.0.0", "one")).expect("adds its own");
    let foreign = state.apply(&point(Some("baker-support-smollm2-v1.0.0"))).expect_err("foreign").to_string();
    let unknown = state.apply(&point(Some("baker-support-smollm2-v9.0.0"))).expect_err("unknown").to_string();
    assert_eq!(foreign.replace("v1", "v9"), unknown);
}

#[test]
fn versions_on_bases_outside_the_contract_are_refused() {
    let mut state = state_with(&["acme"]);
    let error = state.apply(&add("acme", "acme-support-llama3-v1.0.0", "one")).expect_err("base not allowed");
    assert!(matches!(error, RegistryError::Invalid { ref field, .. } if field == "version base"), "{error}");
}

#[test]
fn compare_and_set_lets_one_of_two_writers_win() {
    let mut state = state_with(&["acme"]);
    let epoch = state.tenants()[&id("acme")].contract.epoch;
    let suspend = Command::from(Action::SuspendTenant { tenant: id("acme") }).if_epoch(epoch);
    let delete = Command::from(Action::DeleteTenant { tenant: id("acme"), at_s: 1 }).if_epoch(epoch);
    state.apply(&suspend).expect("the first wins");
    assert_eq!(state.apply(&delete), Err(RegistryError::EpochMismatch { expected: epoch, found: epoch + 1 }));
    assert!(matches!(state.apply(&create("baker").if_epoch(3)), Err(RegistryError::EpochMismatch { found: 0, .. })));
    state.apply(&create("baker").if_epoch(0)).expect("0 means that there is none");
}

#[test]
fn an_erased_tenant_does_not_come_back_from_an_old_copy() {
    let mut state = state_with(&["acme"]);
    let old = TenantRecord::clone(&state.tenants()[&id("acme")]);
    state.apply(&Action::DeleteTenant { tenant: id("acme"), at_s: 1 }.into()).expect("deletes");
    let restored = RegistryState::restore(state.epoch(), [old.clone()], state.tombstones().values().cloned());
    assert!(restored.tenants().is_empty());
    state.apply(&create("acme")).expect("creates anew");
    let new = &state.tenants()[&id("acme")];
    assert!(new.wrapped_key != old.wrapped_key && new.keys.is_empty() && new.adapters.is_empty());
}

#[test]
fn the_seventeenth_key_replaces_a_dead_one_or_is_refused() {
    let mut state = state_with(&["acme"]);
    let key = || SECRETS.api_key([crate::auth::Scope::Infer].into(), 100, None).1;
    let add = |key| Command::from(Action::AddKey { tenant: id("acme"), key });
    let first = key();
    state.apply(&add(first.clone())).expect("adds");
    for _ in 1..bounds::KEYS_MAX {
        state.apply(&add(key())).expect("adds");
    }
    assert!(matches!(state.apply(&add(key())), Err(RegistryError::LimitReached { max: 16, .. })));
    state.apply(&Action::RevokeKey { tenant: id("acme"), key_id: first.id, at_s: 101 }.into()).expect("revokes");
    state.apply(&add(key())).expect("replaces the revoked one");
    assert!(!state.tenants()[&id("acme")].keys.contains_key(&first.id));
}

#[test]
fn texts_and_numbers_beyond_their_bounds_are_refused_by_name() {
    let mut state = RegistryState::default();
    let mut refused = |change: &dyn Fn(&mut TenantSpec)| {
        let mut spec = spec("acme");
        change(&mut spec);
        let error = state.apply(&SECRETS.create_tenant(spec, Vec::new(), 7).into()).expect_err("out of bounds");
        error.to_string()
    };
    let cases = [
        (refused(&|spec| spec.display_name = "x".repeat(201)), "display_name"),
        (refused(&|spec| spec.display_name = String::new()), "display_name"),
        (refused(&|spec| spec.contact = Some("a\nb".to_owned())), "contact"),
        (refused(&|spec| spec.weight = 0), "weight"),
        (refused(&|spec| spec.bases.clear()), "bases"),
        (refused(&|spec| spec.bases.push(spec.bases[0].clone())), "bases"),
        (refused(&|spec| spec.limits.concurrency = 0), "limits.concurrency"),
        (refused(&|spec| spec.limits.deadline_ms = u64::MAX), "limits.deadline_ms"),
        (refused(&|spec| spec.region = Some("r".repeat(64))), "region"),
        (refused(&|spec| spec.tasks = ["smollm2".parse().expect("valid task")].into()), "base model"),
    ];
    for (message, named) in cases {
        assert!(message.contains(named), "{message} does not name {named}");
    }
}

#[test]
fn a_command_sent_again_is_applied_once_and_gets_its_first_answer() {
    let mut state = RegistryState::default();
    let mut changes = Changes::default();
    let proposal = Proposal { id: CommandId::random(), command: create("acme") };
    let first = state.apply_once(&proposal, &mut changes).expect("creates");
    let suspend = Proposal { id: CommandId::random(), command: Action::SuspendTenant { tenant: id("acme") }.into() };
    let suspended = state.apply_once(&suspend, &mut changes).expect("suspends");
    let resume = Proposal { id: CommandId::random(), command: Action::ResumeTenant { tenant: id("acme") }.into() };
    state.apply_once(&resume, &mut changes).expect("resumes");
    let copy = RegistryState::from_image(state.image());
    for mut state in [state, copy] {
        let before = state.clone();
        assert_eq!(state.apply_once(&proposal, &mut changes).as_ref(), Ok(&first));
        assert_eq!(state.apply_once(&suspend, &mut changes).as_ref(), Ok(&suspended), "it stays resumed");
        assert_eq!(state, before);
    }
    assert_eq!(changes.changes.len(), 3);
}

#[test]
fn only_the_latest_answers_are_kept() {
    let mut state = RegistryState::default();
    let answer = |epoch| Remembered { id: CommandId::random(), applied: Applied { epoch, events: Vec::new() } };
    (1..=REMEMBERED_MAX + 5).for_each(|epoch| state.remember(answer(epoch)));
    let image = state.image();
    assert_eq!(image.remembered.len() as u64, REMEMBERED_MAX);
    assert_eq!(image.remembered[0].applied.epoch, 6);
    assert_eq!(state.remembered_ids.len() as u64, REMEMBERED_MAX);
}
