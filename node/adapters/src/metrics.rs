//! Every metric of this crate and exactly when it moves. Labels: `model_name` (the base whose cache it is), `tier`, and
//! for load times the `tenant` as whoever starts the actor calls it, since the number of tenants is not bounded here.
//! Single adapters are asked for through the handle.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use shared::id::BaseName;

use crate::cache::CacheStats;

const HITS: &str = "tenantry_adapter_hits_total";
const MISSES: &str = "tenantry_adapter_misses_total";
const FAILURES: &str = "tenantry_adapter_load_failures_total";
const EVICTIONS: &str = "tenantry_adapter_evictions_total";
const LOAD: &str = "tenantry_adapter_load_seconds";
const BYTES: &str = "tenantry_adapter_bytes";
const DISK_BYTES: &str = "tenantry_adapter_disk_bytes";
const RESIDENT: &str = "tenantry_adapter_resident";
const LEASED: &str = "tenantry_adapter_leased";
const LOADING: &str = "tenantry_adapter_loading";
const STUCK: &str = "tenantry_adapter_reads_stuck";

/// Tells the recorder what the metrics mean; called once at start.
pub fn describe() {
    describe_counter!(HITS, "Queued requests whose adapter was in the engine when they were queued, by base.");
    describe_counter!(MISSES, "Queued requests whose adapter was not in the engine when they were queued, by base.");
    describe_counter!(FAILURES, "Loads that failed, by base.");
    describe_counter!(EVICTIONS, "Adapters that left engine memory, by base.");
    describe_histogram!(
        LOAD,
        "Time of one load on its thread, by base, tenant and the tier it came from: disk, host (memory), prefetch (disk to host)."
    );
    describe_gauge!(BYTES, "Bytes of adapters held in memory, by base and tier: engine, host.");
    describe_gauge!(DISK_BYTES, "Bytes of adapters on this node's disk, of all bases.");
    describe_gauge!(RESIDENT, "Adapters in engine memory, by base.");
    describe_gauge!(LEASED, "Adapters in engine memory that running requests hold, by base.");
    describe_gauge!(LOADING, "Loads under way, by base.");
    describe_gauge!(STUCK, "Loads given up whose reader is still blocked, by base: the disk hangs.");
}

/// An adapter of `tenant` was loaded from `tier`.
pub(crate) fn loaded(base: &BaseName, tenant: String, tier: &'static str, took: Duration) {
    histogram!(LOAD, "model_name" => base.to_string(), "tenant" => tenant, "tier" => tier).record(took.as_secs_f64());
}

/// State of a base's cache, set when the metrics are read.
pub fn sample(base: &BaseName, stats: &CacheStats) {
    let base = base.to_string();
    for (name, value) in
        [(HITS, stats.hits), (MISSES, stats.misses), (FAILURES, stats.failures), (EVICTIONS, stats.evictions)]
    {
        counter!(name, "model_name" => base.clone()).absolute(value);
    }
    for (tier, bytes) in [("engine", stats.engine_bytes), ("host", stats.host_bytes)] {
        gauge!(BYTES, "model_name" => base.clone(), "tier" => tier).set(bytes as f64);
    }
    for (name, value) in
        [(RESIDENT, stats.resident), (LEASED, stats.leased), (LOADING, stats.loading), (STUCK, stats.stuck)]
    {
        gauge!(name, "model_name" => base.clone()).set(value as f64);
    }
}

/// Size of the store that all bases share, set when the metrics are read.
pub fn sample_disk(bytes: u64) {
    gauge!(DISK_BYTES).set(bytes as f64);
}
