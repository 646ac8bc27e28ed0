//! Every metric of this crate and exactly when it moves. No tenant or adapter labels: their number is not
//! bounded; single adapters are asked for through the handle.

use std::time::Duration;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};

use crate::cache::CacheStats;

const HITS: &str = "tenantry_adapter_hits_total";
const MISSES: &str = "tenantry_adapter_misses_total";
const FAILURES: &str = "tenantry_adapter_load_failures_total";
const EVICTIONS: &str = "tenantry_adapter_evictions_total";
const LOAD: &str = "tenantry_adapter_load_seconds";
const BYTES: &str = "tenantry_adapter_bytes";
const RESIDENT: &str = "tenantry_adapter_resident";
const LEASED: &str = "tenantry_adapter_leased";
const LOADING: &str = "tenantry_adapter_loading";
const STUCK: &str = "tenantry_adapter_reads_stuck";

/// Tells the recorder what the metrics mean; called once at start.
pub fn describe() {
    describe_counter!(HITS, "queued requests whose adapter was in the engine when they were queued");
    describe_counter!(MISSES, "queued requests whose adapter was not in the engine when they were queued");
    describe_counter!(FAILURES, "loads that failed");
    describe_counter!(EVICTIONS, "adapters that left engine memory");
    describe_histogram!(
        LOAD,
        "time of one load on its thread, by tier it came from: disk, host (memory), prefetch (disk to host)"
    );
    describe_gauge!(BYTES, "bytes held, by tier: engine, host, disk; sampled by the cache's timer");
    describe_gauge!(RESIDENT, "adapters in engine memory; sampled by the cache's timer");
    describe_gauge!(LEASED, "adapters in engine memory that running requests hold; sampled by the cache's timer");
    describe_gauge!(LOADING, "loads under way; sampled by the cache's timer");
    describe_gauge!(
        STUCK,
        "loads given up whose reader is still blocked: the disk hangs; sampled by the cache's timer"
    );
}

/// Where a load came from and went to.
pub(crate) fn loaded(tier: &'static str, took: Duration) {
    histogram!(LOAD, "tier" => tier).record(took.as_secs_f64());
}

pub(crate) fn sample(stats: &CacheStats, disk_bytes: Option<u64>) {
    counter!(HITS).absolute(stats.hits);
    counter!(MISSES).absolute(stats.misses);
    counter!(FAILURES).absolute(stats.failures);
    counter!(EVICTIONS).absolute(stats.evictions);
    gauge!(BYTES, "tier" => "engine").set(stats.engine_bytes as f64);
    gauge!(BYTES, "tier" => "host").set(stats.host_bytes as f64);
    if let Some(bytes) = disk_bytes {
        gauge!(BYTES, "tier" => "disk").set(bytes as f64);
    }
    gauge!(RESIDENT).set(stats.resident as f64);
    gauge!(LEASED).set(stats.leased as f64);
    gauge!(LOADING).set(stats.loading as f64);
    gauge!(STUCK).set(stats.stuck as f64);
}
