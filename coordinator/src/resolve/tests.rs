//! Tests of model names: own, foreign, unknown, missing.

use proptest::prelude::*;

use super::*;
use crate::registry::command::{Action, TenantPatch};
use crate::registry::state::RegistryState;
use crate::testing::commands::SECRETS;
use crate::testing::{adapter, spec};

const VERSION: &str = "acme-support-smollm2-v1.0.0";

/// acme: tasks support (→ v1.0.0) and billing (nothing yet); baker: the same under its own name.
fn state() -> RegistryState {
    let mut state = RegistryState::default();
    for tenant in ["acme", "baker"] {
        let id: shared::id::TenantId = tenant.parse().expect("valid");
        let name = VERSION.replace("acme", tenant);
        let mut apply = |action: Action| state.apply(&action.into()).expect("applies");
        apply(SECRETS.create_tenant(spec(tenant), Vec::new(), 7));
        apply(Action::AddAdapterVersion { tenant: id.clone(), adapter: adapter(&name, tenant) });
        let version = Some(name.parse().expect("valid"));
        apply(Action::PointTask { tenant: id.clone(), task: "support".parse().expect("valid"), version });
        apply(Action::PointTask { tenant: id, task: "billing".parse().expect("valid"), version: None });
    }
    state
}

fn contract(tenant: &str, patch: TenantPatch) -> TenantContract {
    let mut state = state();
    let id: shared::id::TenantId = tenant.parse().expect("valid");
    state.apply(&Action::UpdateTenant { tenant: id.clone(), patch: patch.into() }.into()).expect("updates");
    TenantContract::clone(&state.tenants()[&id].contract)
}

fn acme() -> TenantContract {
    contract("acme", TenantPatch::default())
}

#[test]
fn a_task_and_its_version_resolve_to_the_same_pin() {
    let contract = acme();
    let by_task = resolve(&contract, "support").expect("resolves");
    assert_eq!(by_task, resolve(&contract, VERSION).expect("resolves"));
    let pin = by_task.adapter.expect("has an adapter");
    assert_eq!((pin.name.to_string().as_str(), pin.hash), (VERSION, ContentHash::of(b"acme")));
    assert_eq!((by_task.base.as_str(), by_task.fell_back), ("smollm2", false));
}

#[test]
fn the_base_answers_only_if_the_contract_lets_it_be_named() {
    let target = resolve(&acme(), "smollm2").expect("resolves");
    assert_eq!((target.adapter, target.task, target.fell_back), (None, None, false));
    let closed = contract("acme", TenantPatch { allow_base: Some(false), ..TenantPatch::default() });
    let error = resolve(&closed, "smollm2").expect_err("not allowed");
    assert_eq!((error.kind, error.code), (ErrorKind::Forbidden, "model_not_allowed"));
}

#[test]
fn a_task_without_adapter_falls_back_only_by_contract_and_says_so() {
    let error = resolve(&acme(), "billing").expect_err("refuses");
    assert_eq!((error.kind, error.code), (ErrorKind::Conflict, "adapter_not_ready"));
    let lenient = contract("acme", TenantPatch { fallback: Some(Fallback::Base), ..TenantPatch::default() });
    let target = resolve(&lenient, "billing").expect("falls back");
    assert_eq!(
        (target.adapter, target.task.expect("keeps its task").as_str(), target.fell_back),
        (None, "billing", true)
    );
    assert!(!resolve(&lenient, "support").expect("resolves").fell_back);
}

#[test]
fn foreign_and_unknown_names_give_the_same_bytes_with_or_without_the_owner() {
    let contract = acme();
    let bytes = |name: &str| format!("{:?}", resolve(&contract, name).expect_err("not found"));
    let reference = bytes("nothing-like-it");
    let foreign = ["baker-support-smollm2-v1.0.0", "baker", "baker-support"];
    let unknown = [
        "zulu-support-smollm2-v1.0.0",
        "acme-support-smollm2-v9.0.0",
        "llama3",
        "../support",
        "SUPPORT",
        " support",
        "💥",
    ];
    for name in foreign.into_iter().chain(unknown) {
        assert_eq!(bytes(name), reference, "{name}");
    }
    assert!(!reference.contains("baker") && !reference.contains("nothing-like-it"));
}

#[test]
fn a_missing_model_is_refused_without_naming_any() {
    for name in ["", "  "] {
        let error = resolve(&acme(), name).expect_err("missing");
        assert_eq!((error.code, error.param.as_deref()), ("model_required", Some("model")));
        assert!(!error.message.contains("support") && !error.message.contains("smollm2"));
    }
}

#[test]
fn every_visible_model_resolves_and_nothing_foreign_is_visible() {
    for patch in [
        TenantPatch::default(),
        TenantPatch { allow_base: Some(false), fallback: Some(Fallback::Base), ..TenantPatch::default() },
    ] {
        let contract = contract("acme", patch);
        let visible = visible_models(&contract);
        assert!(visible.iter().all(|model| resolve(&contract, &model.id).is_ok() && !model.id.contains("baker")));
        let ids: Vec<_> = visible.iter().map(|model| model.id.as_str()).collect();
        let expected =
            if contract.allow_base { vec!["support", VERSION, "smollm2"] } else { vec!["billing", "support", VERSION] };
        assert_eq!(ids, expected);
    }
}

proptest! {
    #[test]
    fn no_text_panics_or_reaches_a_model_that_is_not_visible(name in ".{0,100}") {
        let contract = acme();
        let is_visible = visible_models(&contract).iter().any(|model| model.id == name);
        prop_assert_eq!(resolve(&contract, &name).is_ok(), is_visible);
    }
}
