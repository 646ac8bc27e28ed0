//! Every metric of this crate and exactly when it moves. Labels: `model_name` (the base whose queue it is), `tier`,
//! `reason`; tenants are told apart in [`crate::fair::QueueStats`], which the node exports under a bounded number of
//! labels. How long requests waited is observed by the gateway, which knows them all.

use metrics::{counter, describe_counter, describe_gauge, gauge};
use shared::id::BaseName;
use shared::tenant::Tier;

use crate::fair::QueueStats;
use crate::item::SubmitError;

const SUBMITTED: &str = "tenantry_queue_requests_submitted_total";
const REFUSED: &str = "tenantry_queue_requests_refused_total";
const CANCELLED: &str = "tenantry_queue_requests_cancelled_total";
const EXPIRED: &str = "tenantry_queue_requests_expired_total";
const WAITING: &str = "tenantry_queue_waiting_requests";
const TENANTS: &str = "tenantry_queue_waiting_tenants";
const RUNNING: &str = "tenantry_queue_running_sequences";
const OLDEST: &str = "tenantry_queue_oldest_wait_seconds";

/// Tells the recorder what the metrics mean; called once at start.
pub fn describe() {
    describe_counter!(SUBMITTED, "Requests that were queued, by base and tier.");
    describe_counter!(REFUSED, "Requests refused at the queue's door, by base and reason.");
    describe_counter!(CANCELLED, "Requests whose client left while they waited, by base.");
    describe_counter!(
        EXPIRED,
        "Requests whose deadline passed while they waited, by base; they never reached the engine."
    );
    describe_gauge!(WAITING, "Requests that wait, by base and tier.");
    describe_gauge!(TENANTS, "Tenants with a waiting request, by base and tier.");
    describe_gauge!(RUNNING, "Sequences in the engine, by base and tier.");
    describe_gauge!(OLDEST, "How long the oldest request waits, by base and tier.");
}

pub(crate) fn submitted(base: &BaseName, tier: Tier) {
    counter!(SUBMITTED, "model_name" => base.to_string(), "tier" => tier.as_str()).increment(1);
}

pub(crate) fn refused(base: &BaseName, error: &SubmitError) {
    let reason = match error {
        SubmitError::RouteFull { .. } => "route_full",
        SubmitError::TenantFull { .. } => "tenant_full",
        SubmitError::NodeFull { .. } => "node_full",
        SubmitError::DeadlinePassed => "deadline",
        SubmitError::Duplicate(_) => "duplicate",
        SubmitError::Closed => "closed",
    };
    counter!(REFUSED, "model_name" => base.to_string(), "reason" => reason).increment(1);
}

pub(crate) fn cancelled(base: &BaseName) {
    counter!(CANCELLED, "model_name" => base.to_string()).increment(1);
}

pub(crate) fn expired(base: &BaseName, n_requests: usize) {
    if n_requests > 0 {
        counter!(EXPIRED, "model_name" => base.to_string()).increment(n_requests as u64);
    }
}

/// State of a base's queue, set when the metrics are read.
pub fn sample(base: &BaseName, stats: &QueueStats) {
    for class in &stats.classes {
        for (name, value) in [
            (WAITING, class.waiting as f64),
            (TENANTS, class.tenants_waiting as f64),
            (RUNNING, f64::from(class.running_sequences)),
            (OLDEST, class.oldest_wait.as_secs_f64()),
        ] {
            gauge!(name, "model_name" => base.to_string(), "tier" => class.tier.as_str()).set(value);
        }
    }
}
