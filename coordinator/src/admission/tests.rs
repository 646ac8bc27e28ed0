//! Tests of contract-level admission: state, sizes, rates, refunds.

use proptest::prelude::*;

use super::*;
use crate::registry::command::Action;
use crate::registry::state::RegistryState;
use crate::testing::commands::SECRETS;
use crate::testing::{LIMITS, now, spec};

fn contract(tenant: &str) -> TenantContract {
    let mut state = RegistryState::default();
    let action: Action = SECRETS.create_tenant(spec(tenant), Vec::new(), 7);
    state.apply(&action.into()).expect("creates");
    TenantContract::clone(&state.tenants().values().next().expect("one").contract)
}

fn demand(tokens: u64) -> Demand {
    Demand { n_prompt_tokens: tokens, max_tokens: 0, n: 1 }
}

#[test]
fn a_suspended_tenant_is_refused_before_its_rates_are_touched() {
    let (mut admission, start) = (Admission::new(), now());
    let contract = TenantContract { state: TenantState::Suspended, ..contract("acme") };
    let refused = admission.admit(&contract, demand(1), start).expect_err("suspended");
    assert_eq!(
        (refused.error.kind, refused.error.code, refused.rate),
        (ErrorKind::Forbidden, "tenant_suspended", None)
    );
    assert!(admission.buckets.is_empty());
}

#[test]
fn the_burst_passes_and_then_retry_after_is_exact() {
    let (mut admission, start, contract) = (Admission::new(), now(), contract("acme"));
    for remaining in [1, 0] {
        let admitted = admission.admit(&contract, demand(10), start).expect("within the burst");
        assert_eq!(admitted.rate.remaining_requests, remaining);
    }
    let refused = admission.admit(&contract, demand(10), start).expect_err("over the burst");
    let wait = refused.error.retry_after.expect("says when");
    assert_eq!((refused.error.code, wait), ("rate_limit_exceeded", Duration::from_secs(1)));
    assert!(refused.error.message.contains("60 requests"), "{}", refused.error.message);
    assert_eq!(refused.error.param, None);
    assert!(admission.admit(&contract, demand(10), start + wait - Duration::from_nanos(1)).is_err());
    assert!(admission.admit(&contract, demand(10), start + wait).is_ok());
}

#[test]
fn tokens_are_reserved_for_the_worst_case_and_settled_by_use() {
    let (mut admission, start, contract) = (Admission::new(), now(), contract("acme"));
    let big = Demand { n_prompt_tokens: 1000, max_tokens: 2000, n: 2 };
    assert_eq!(big.tokens(), 5000);
    let admitted = admission.admit(&contract, big, start).expect("fits");
    assert_eq!(admitted.rate.remaining_tokens, 1000);
    let refused = admission.admit(&contract, big, start).expect_err("over the rate");
    assert_eq!(refused.error.retry_after, Some(Duration::from_secs(40)), "4000 tokens at 100 a second");
    assert!(refused.error.message.contains("6000 tokens"), "{}", refused.error.message);
    assert_eq!(refused.error.param.as_deref(), Some("tokens"), "which rate bound");
    admission.settle(admitted.reservation, 1100);
    assert_eq!(admission.status(&contract, start).remaining_tokens, 4900);
    let admitted = admission.admit(&contract, demand(100), start).expect("fits");
    admission.settle(admitted.reservation, 6000);
    assert_eq!(admission.status(&contract, start).remaining_tokens, 0, "use beyond the reservation counts");
}

#[test]
fn an_undone_admission_costs_nothing() {
    let (mut admission, start, contract) = (Admission::new(), now(), contract("acme"));
    let before = admission.status(&contract, start);
    let admitted = admission.admit(&contract, demand(500), start).expect("fits");
    admission.undo(admitted.reservation);
    assert_eq!(admission.status(&contract, start), before);
}

#[test]
fn requests_that_can_never_pass_are_refused_for_good() {
    let (mut admission, start, contract) = (Admission::new(), now(), contract("acme"));
    let cases = [
        (demand(6001), "tokens_per_minute_exceeded"),
        (Demand { n_prompt_tokens: 1, max_tokens: u64::MAX, n: 4 }, "tokens_per_minute_exceeded"),
        (Demand { n: 5, ..demand(1) }, "invalid_value"),
        (Demand { n: 0, ..demand(1) }, "invalid_value"),
    ];
    for (demand, code) in cases {
        let error = admission.admit(&contract, demand, start).expect_err("never").error;
        assert_eq!((error.kind, error.code, error.retry_after), (ErrorKind::Invalid, code, None));
    }
    assert!(admission.admit(&contract, demand(6000), start).is_ok());
}

#[test]
fn tenants_do_not_share_buckets() {
    let (mut admission, start) = (Admission::new(), now());
    let (acme, baker) = (contract("acme"), contract("baker"));
    let untouched = admission.status(&baker, start);
    while admission.admit(&acme, demand(100), start).is_ok() {}
    assert_eq!(admission.status(&baker, start), untouched);
    admission.forget(&acme.tenant);
    assert_eq!(admission.buckets.len(), 1);
}

proptest! {
    #[test]
    fn no_more_than_burst_and_rate_passes_in_any_window(gaps_ms in proptest::collection::vec(0_u64..3000, 1..200)) {
        let (mut admission, start, contract) = (Admission::new(), now(), contract("acme"));
        let (mut elapsed_ms, mut passed) = (0, Vec::new());
        for gap in gaps_ms {
            elapsed_ms += gap;
            if let Ok(admitted) = admission.admit(&contract, demand(1), start + Duration::from_millis(elapsed_ms)) {
                admission.settle(admitted.reservation, 1);
                passed.push(elapsed_ms);
            }
        }
        for (i, from) in passed.iter().enumerate() {
            for (j, to) in passed.iter().enumerate().skip(i) {
                let allowed = u64::from(LIMITS.burst_requests) + (to - from) / 1000;
                prop_assert!((j - i + 1) as u64 <= allowed, "{} requests in {} ms", j - i + 1, to - from);
            }
        }
    }
}
