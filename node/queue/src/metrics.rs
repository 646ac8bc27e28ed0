//! Every metric of this crate and exactly when it moves. Labels: `tier`, `reason`; tenants are told apart in
//! [`crate::fair::QueueStats`], so that their number cannot blow up the exposition. How long
//! requests waited is observed by the gateway, which knows them all.

use metrics::{counter, describe_counter, describe_gauge, gauge};
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
    describe_counter!(SUBMITTED, "requests that were queued, by tier");
    describe_counter!(REFUSED, "requests refused at the queue's door, by reason");
    describe_counter!(CANCELLED, "requests whose client left while they waited");
    describe_counter!(EXPIRED, "requests whose deadline passed while they waited; they never reached the engine");
    describe_gauge!(WAITING, "requests that wait, by tier; sampled by the queue's timer");
    describe_gauge!(TENANTS, "tenants with a waiting request, by tier; sampled by the queue's timer");
    describe_gauge!(RUNNING, "sequences in the engine, by tier; sampled by the queue's timer");
    describe_gauge!(OLDEST, "how long the oldest request waits, by tier; sampled by the queue's timer");
}

pub(crate) fn submitted(tier: Tier) {
    counter!(SUBMITTED, "tier" => tier.as_str()).increment(1);
}

pub(crate) fn refused(error: &SubmitError) {
    let reason = match error {
        SubmitError::RouteFull { .. } => "route_full",
        SubmitError::TenantFull { .. } => "tenant_full",
        SubmitError::NodeFull { .. } => "node_full",
        SubmitError::DeadlinePassed => "deadline",
        SubmitError::Duplicate(_) => "duplicate",
        SubmitError::Closed => "closed",
    };
    counter!(REFUSED, "reason" => reason).increment(1);
}

pub(crate) fn cancelled() {
    counter!(CANCELLED).increment(1);
}

pub(crate) fn expired(n_requests: usize) {
    if n_requests > 0 {
        counter!(EXPIRED).increment(n_requests as u64);
    }
}

pub(crate) fn sample(stats: &QueueStats) {
    for class in &stats.classes {
        let tier = class.tier.as_str();
        gauge!(WAITING, "tier" => tier).set(class.waiting as f64);
        gauge!(TENANTS, "tier" => tier).set(class.tenants_waiting as f64);
        gauge!(RUNNING, "tier" => tier).set(f64::from(class.running_sequences));
        gauge!(OLDEST, "tier" => tier).set(class.oldest_wait.as_secs_f64());
    }
}
