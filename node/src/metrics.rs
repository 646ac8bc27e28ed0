//! Every metric of the crate, declared once, with when it moves. Served as Prometheus text on the admin port.
//!
//! Two families: the `vllm:` names with vLLM's buckets, so that existing dashboards and schedulers work, and
//! our own with `tenant`, `task`, `adapter` and `tier` labels (MON-01, MON-06…09, MON-12). A tenant label is
//! kept for the first [`TENANT_LABELS_MAX`] tenants seen; later ones share `_other`.

pub mod activity;

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::time::Duration;

use coordinator::membership::detector::Health;
use dashmap::DashMap;
use kernels::kv::PAGE_TOKENS;
use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;
use scheduler::engine::{EngineSnapshot, STEP_ROWS_BOUNDS};
use shared::id::{BaseName, TaskName, TenantId};
use shared::request::Envelope;
use shared::tenant::Tier;

use crate::app::App;
use crate::base_room::BaseRoom;
use crate::cluster::ClusterNode;
use crate::metering::{Outcome, UsageRecord};

/// Tenants that get a label value of their own: keeps the series count bounded, as llm-d's scheduler does.
pub const TENANT_LABELS_MAX: usize = 1000;

/// Label value of everyone past the cap.
const OTHER: &str = "_other";

/// vLLM's buckets for the time to the first token.
const TTFT_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// vLLM's buckets for the time between tokens.
const TOKEN_S: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// vLLM's buckets for whole requests and their phases.
const REQUEST_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// Buckets for token counts, up to the largest context served.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];
/// Buckets for adapter loads and other short work: 1 µs to 10 s.
const SHORT_S: &[f64] = &[1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0];

/// Installs the recorder of this process and describes the metrics; nodes of one process share it.
///
/// # Errors
/// When somebody else's recorder is already installed.
pub fn install() -> Result<PrometheusHandle, BuildError> {
    static INSTALLED: Mutex<Option<PrometheusHandle>> = Mutex::new(None);
    let mut installed = INSTALLED.lock();
    if let Some(handle) = &*installed {
        return Ok(handle.clone());
    }
    let mut builder = PrometheusBuilder::new();
    for (matcher, buckets) in [
        (Matcher::Suffix("time_to_first_token_seconds".into()), TTFT_S),
        (Matcher::Suffix("time_per_output_token_seconds".into()), TOKEN_S),
        (Matcher::Suffix("inter_token_seconds".into()), TOKEN_S),
        (Matcher::Prefix("vllm:e2e_request_latency".into()), REQUEST_S),
        (Matcher::Prefix("vllm:request_queue_time".into()), REQUEST_S),
        (Matcher::Prefix("vllm:request_inference_time".into()), REQUEST_S),
        (Matcher::Prefix("vllm:request_prefill_time".into()), REQUEST_S),
        (Matcher::Prefix("vllm:request_decode_time".into()), REQUEST_S),
        (Matcher::Suffix("request_seconds".into()), REQUEST_S),
        (Matcher::Suffix("queue_wait_seconds".into()), TTFT_S),
        (Matcher::Prefix("vllm:request_prompt_tokens".into()), TOKENS),
        (Matcher::Prefix("vllm:request_generation_tokens".into()), TOKENS),
        (Matcher::Suffix("load_seconds".into()), SHORT_S),
        (Matcher::Suffix("step_seconds".into()), SHORT_S),
    ] {
        builder = builder.set_buckets_for_metric(matcher, buckets)?;
    }
    let handle = builder.install_recorder()?;
    describe();
    *installed = Some(handle.clone());
    Ok(handle)
}

fn describe() {
    describe_counter!(
        "tenantry_requests_total",
        "Requests that left the node after admission, by tenant, task, adapter, tier and outcome."
    );
    describe_counter!(
        "tenantry_rejections_total",
        "Requests refused, by tenant, tier and error code; tenant is _none before authentication."
    );
    describe_counter!(
        "tenantry_tokens_total",
        "Tokens by tenant, tier and kind: prompt (billed once), cached (of these, from the prefix cache), answer (delivered)."
    );
    describe_counter!(
        "tenantry_fallbacks_total",
        "Requests that the base answered in place of a missing adapter, by tenant and task."
    );
    describe_counter!(
        "tenantry_compute_microseconds_total",
        "Engine time attributed to a tenant's rows, by tenant and tier."
    );
    describe_counter!(
        "tenantry_prewarms_total",
        "Adapters fetched before they were asked for, by reason: plan (of this node) or hint (of another)."
    );
    describe_gauge!("tenantry_ring_epoch", "Epoch of this node's routing table; rises when tenants may move.");
    describe_gauge!("tenantry_cluster_nodes", "Nodes of the cluster file, by what this node thinks of them.");
    describe_gauge!("tenantry_registry_leader_known", "1 while this node knows who takes changes of the registry.");
    describe_gauge!("tenantry_records_kept", "Requests of other nodes whose records are kept here.");
    describe_counter!("tenantry_peers_refused_total", "Connections to the peer port that were turned away, by reason.");
    describe_counter!(
        "tenantry_requests_resumed_total",
        "Requests that go on here after their entry node or connection was lost, by tenant."
    );
    describe_histogram!(
        "tenantry_time_to_first_token_seconds",
        "Admission to first delivered token, by tenant, adapter and tier."
    );
    describe_histogram!(
        "tenantry_inter_token_seconds",
        "Between two delivered tokens of a request's first choice, by tenant and tier."
    );
    describe_histogram!("tenantry_queue_wait_seconds", "Admission to entering the batch, by tenant and tier.");
    describe_histogram!("tenantry_request_seconds", "Admission to end, by tenant, adapter and tier.");
    describe_counter!(
        "tenantry_impersonations_total",
        "Requests that named another tenant than their key's, by tenant of the key."
    );
    describe_counter!("tenantry_connections_refused_total", "Connections closed at once because too many were open.");
    describe_counter!("tenantry_streams_cut_total", "Streams ended by the node, by reason.");
    describe_counter!(
        "tenantry_adapter_requests_total",
        "Requests for an adapter, by tenant, tier and whether it was in engine memory when they arrived (cache: hit or miss)."
    );
    describe_gauge!("tenantry_usage_backlog", "Usage records not yet on disk.");
    describe_gauge!("tenantry_registry_epoch", "Epoch of the registry this node serves from.");
    describe_gauge!("tenantry_engine_up", "1 while the base's engine thread runs.");
    describe_counter!("tenantry_engine_restarts_total", "Times the base's engine was started again after a failure.");
    describe_vllm();
}

/// The families that vLLM has too.
fn describe_vllm() {
    describe_counter!("vllm:request_success_total", "Finished choices, by finished_reason.");
    describe_histogram!("vllm:time_to_first_token_seconds", "As tenantry_time_to_first_token_seconds, by base.");
    describe_histogram!("vllm:time_per_output_token_seconds", "As tenantry_inter_token_seconds, by base.");
    describe_histogram!("vllm:e2e_request_latency_seconds", "As tenantry_request_seconds, by base.");
    describe_histogram!("vllm:request_queue_time_seconds", "As tenantry_queue_wait_seconds, by base.");
    describe_histogram!("vllm:request_inference_time_seconds", "Entering the batch to end, by base.");
    describe_histogram!(
        "vllm:request_prefill_time_seconds",
        "Entering the batch to the first delivered token, by base."
    );
    describe_histogram!("vllm:request_decode_time_seconds", "First delivered token to end, by base.");
    describe_histogram!("vllm:request_prompt_tokens", "Prompt tokens per request.");
    describe_histogram!("vllm:request_generation_tokens", "Delivered tokens per request.");
    describe_counter!("vllm:prompt_tokens_total", "Prompt tokens of requests that ended.");
    describe_counter!("vllm:generation_tokens_total", "Delivered tokens of requests that ended.");
    describe_gauge!(
        "vllm:cache_config_info",
        "Always 1; the labels are the size of a KV page in tokens (block_size), their number (num_gpu_blocks, in host memory here) and whether prefixes are cached."
    );
    describe_gauge!("vllm:num_requests_running", "Sequences in the batch.");
    describe_gauge!("vllm:num_requests_waiting", "Requests in the fair queue and preempted sequences.");
    describe_gauge!("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.");
    describe_counter!("vllm:num_preemptions_total", "Sequences that gave their pages up and were computed again.");
    describe_counter!("vllm:prefix_cache_queries_total", "Prompt tokens looked up in prefix caches.");
    describe_counter!("vllm:prefix_cache_hits_total", "Prompt tokens found in prefix caches.");
}

/// The label value of a tenant: its id, or `_other` past the cap.
pub fn tenant_label(tenant: &TenantId) -> String {
    static SEEN: OnceLock<DashMap<TenantId, ()>> = OnceLock::new();
    let seen = SEEN.get_or_init(DashMap::new);
    if seen.contains_key(tenant) {
        return tenant.to_string();
    }
    if seen.len() >= TENANT_LABELS_MAX {
        return OTHER.to_owned();
    }
    seen.insert(tenant.clone(), ());
    tenant.to_string()
}

fn task_label(task: Option<&TaskName>) -> String {
    task.map_or_else(|| "_base".to_owned(), ToString::to_string)
}

/// A choice finished.
pub fn request_finished(envelope: &Envelope, finished_reason: &'static str) {
    counter!("vllm:request_success_total", "model_name" => envelope.base.to_string(), "engine" => "0", "finished_reason" => finished_reason).increment(1);
}

/// A token followed another of the same choice after `gap`.
pub fn token_gap(envelope: &Envelope, gap: Duration) {
    let tenant = tenant_label(&envelope.route.tenant);
    histogram!("tenantry_inter_token_seconds", "tenant" => tenant, "tier" => envelope.tier.as_str()).record(gap);
    histogram!("vllm:time_per_output_token_seconds", "model_name" => envelope.base.to_string(), "engine" => "0")
        .record(gap);
}

/// A request left the node; the record says how.
pub fn request_ended(record: &UsageRecord) {
    let tenant = tenant_label(&record.tenant);
    // An adapter's and a task's name count towards their tenant's place among the labels.
    let of_tenant = |name: String| if tenant == OTHER { OTHER.to_owned() } else { name };
    let adapter = of_tenant(record.adapter.as_ref().map_or_else(|| "_base".to_owned(), ToString::to_string));
    let task = of_tenant(task_label(record.task.as_ref()));
    let tier = record.tier.as_str();
    let base = record.base.to_string();
    let outcome = match record.outcome {
        Outcome::Finished => "finished",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed => "failed",
    };
    let delivered: u64 = record.delivered.iter().map(|&count| u64::from(count)).sum();
    counter!("tenantry_requests_total", "tenant" => tenant.clone(), "task" => task.clone(), "adapter" => adapter.clone(), "tier" => tier, "outcome" => outcome).increment(1);
    if record.fell_back {
        counter!("tenantry_fallbacks_total", "tenant" => tenant.clone(), "task" => task.clone()).increment(1);
    }
    for (kind, tokens) in [
        ("prompt", u64::from(record.prompt_tokens)),
        ("cached", u64::from(record.cached_tokens)),
        ("answer", delivered),
    ] {
        counter!("tenantry_tokens_total", "tenant" => tenant.clone(), "tier" => tier, "kind" => kind).increment(tokens);
    }
    counter!("tenantry_compute_microseconds_total", "tenant" => tenant.clone(), "tier" => tier)
        .increment((record.compute_ms * 1e3) as u64);
    histogram!("tenantry_queue_wait_seconds", "tenant" => tenant.clone(), "tier" => tier)
        .record(record.queue_wait_ms / 1e3);
    histogram!("tenantry_request_seconds", "tenant" => tenant.clone(), "adapter" => adapter.clone(), "tier" => tier)
        .record(record.total_ms / 1e3);
    histogram!("vllm:request_queue_time_seconds", "model_name" => base.clone(), "engine" => "0")
        .record(record.queue_wait_ms / 1e3);
    histogram!("vllm:e2e_request_latency_seconds", "model_name" => base.clone(), "engine" => "0")
        .record(record.total_ms / 1e3);
    histogram!("vllm:request_inference_time_seconds", "model_name" => base.clone(), "engine" => "0")
        .record((record.total_ms - record.queue_wait_ms) / 1e3);
    histogram!("vllm:request_prompt_tokens", "model_name" => base.clone(), "engine" => "0")
        .record(record.prompt_tokens);
    histogram!("vllm:request_generation_tokens", "model_name" => base.clone(), "engine" => "0")
        .record(delivered as f64);
    if let Some(hit) = record.adapter_hit {
        let outcome = if hit { "hit" } else { "miss" };
        counter!("tenantry_adapter_requests_total", "tenant" => tenant.clone(), "tier" => tier, "cache" => outcome)
            .increment(1);
    }
    counter!("vllm:prompt_tokens_total", "model_name" => base.clone(), "engine" => "0")
        .increment(u64::from(record.prompt_tokens));
    counter!("vllm:generation_tokens_total", "model_name" => base.clone(), "engine" => "0").increment(delivered);
    if let Some(first_token_ms) = record.first_token_ms {
        first_token(record, tenant, adapter, first_token_ms);
    }
}

/// Times of a request that got at least one token.
fn first_token(record: &UsageRecord, tenant: String, adapter: String, first_token_ms: f64) {
    let (base, tier) = (record.base.to_string(), record.tier.as_str());
    histogram!("tenantry_time_to_first_token_seconds", "tenant" => tenant, "adapter" => adapter, "tier" => tier)
        .record(first_token_ms / 1e3);
    for (name, ms) in [
        ("vllm:time_to_first_token_seconds", first_token_ms),
        ("vllm:request_prefill_time_seconds", first_token_ms - record.queue_wait_ms),
        ("vllm:request_decode_time_seconds", record.total_ms - first_token_ms),
    ] {
        histogram!(name, "model_name" => base.clone(), "engine" => "0").record(ms / 1e3);
    }
}

/// A request was refused with `code`.
pub fn rejected(tenant: Option<(&TenantId, Tier)>, code: &'static str) {
    let (tenant, tier) =
        tenant.map_or_else(|| ("_none".to_owned(), "_none"), |(tenant, tier)| (tenant_label(tenant), tier.as_str()));
    counter!("tenantry_rejections_total", "tenant" => tenant, "tier" => tier, "code" => code).increment(1);
}

/// A caller named another tenant than its key's.
pub fn impersonation(tenant: &TenantId) {
    counter!("tenantry_impersonations_total", "tenant" => tenant_label(tenant)).increment(1);
}

/// State of the node as a whole, set about once a second.
pub fn node_state(usage_backlog: usize, registry_epoch: u64) {
    gauge!("tenantry_usage_backlog").set(usage_backlog as f64);
    gauge!("tenantry_registry_epoch").set(registry_epoch as f64);
}

/// An engine was started again after a panic.
pub fn engine_restarted(base: &BaseName) {
    counter!("tenantry_engine_restarts_total", "base" => base.to_string()).increment(1);
}

/// State of one base, set when the metrics are read.
pub fn base_state(room: &BaseRoom) {
    let base = room.name.to_string();
    let engine = room.engine_totals();
    let share = engine.kv_pages_used as f64 / (engine.kv_pages.max(1)) as f64;
    let waiting = room.queue.n_waiting() as f64 + engine.sequences_preempted as f64;
    for (name, value) in [
        ("vllm:num_requests_running", engine.sequences_running as f64),
        ("vllm:num_requests_waiting", waiting),
        ("vllm:kv_cache_usage_perc", share),
        ("tenantry_engine_up", f64::from(u8::from(room.is_up()))),
    ] {
        gauge!(name, "model_name" => base.clone(), "engine" => "0").set(value);
    }
    for (name, value) in [
        ("vllm:num_preemptions_total", engine.preemptions),
        ("vllm:prefix_cache_queries_total", engine.prefix_queries),
        ("vllm:prefix_cache_hits_total", engine.prefix_hits),
        ("tenantry_engine_steps_total", engine.steps),
        ("tenantry_engine_requests_resumed_total", engine.requests_resumed),
    ] {
        counter!(name, "model_name" => base.clone(), "engine" => "0").absolute(value);
    }
    let prefix_cache = if room.engine.scheduling.prefix_cache { "True" } else { "False" };
    gauge!("vllm:cache_config_info", "model_name" => base.clone(), "engine" => "0", "block_size" => PAGE_TOKENS.to_string(), "num_gpu_blocks" => engine.kv_pages.to_string(), "enable_prefix_caching" => prefix_cache).set(1.0);
    gauge!("tenantry_engine_forward_seconds_total", "model_name" => base).set(engine.forward_ns as f64 / 1e9);
}

/// Appends the two families that the recorder cannot hold: a histogram that engines count themselves, and an
/// info metric whose labels change with every request.
pub fn render_engines(text: &mut String, app: &App) {
    let rooms = || app.rooms().values();
    text.push_str("# HELP vllm:iteration_tokens_total Rows (tokens) per engine step.\n");
    text.push_str("# TYPE vllm:iteration_tokens_total histogram\n");
    rooms().for_each(|room| steps(text, &room.name, &room.engine_totals()));
    text.push_str("# HELP vllm:lora_requests_info Adapters of running and waiting requests; the value is the time.\n");
    text.push_str("# TYPE vllm:lora_requests_info gauge\n");
    for room in rooms() {
        let (running, waiting) = activity::adapters_in_use(&room.name);
        let (base, slots, now_s) = (&room.name, app.config().adapters.slots, app.wall_s());
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "vllm:lora_requests_info{{model_name=\"{base}\",engine=\"0\",max_lora=\"{slots}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} {now_s}"
        );
    }
}

fn steps(text: &mut String, base: &BaseName, engine: &EngineSnapshot) {
    let bounds = STEP_ROWS_BOUNDS.iter().map(ToString::to_string).chain(["+Inf".to_owned()]);
    let mut total = 0;
    for (bound, count) in bounds.zip(engine.steps_by_rows) {
        total += count;
        let _ = writeln!(
            text,
            "vllm:iteration_tokens_total_bucket{{model_name=\"{base}\",engine=\"0\",le=\"{bound}\"}} {total}"
        );
    }
    let rows = engine.rows_prefill + engine.rows_decode;
    for (part, value) in [("sum", rows), ("count", total)] {
        let _ = writeln!(text, "vllm:iteration_tokens_total_{part}{{model_name=\"{base}\",engine=\"0\"}} {value}");
    }
}

/// A connection was closed because too many were open.
pub fn connection_refused() {
    counter!("tenantry_connections_refused_total").increment(1);
}

/// The node ended a stream.
pub fn stream_cut(reason: &'static str) {
    counter!("tenantry_streams_cut_total", "reason" => reason).increment(1);
}

/// The cluster as this node sees it; read when somebody asks.
pub fn cluster_state(cluster: &ClusterNode, has_leader: bool) {
    let table = cluster.coordinator().tables().borrow().clone();
    gauge!("tenantry_ring_epoch").set(table.epoch() as f64);
    for (health, label) in HEALTHS {
        let n = table.members().values().filter(|member| member.health == health).count();
        gauge!("tenantry_cluster_nodes", "health" => label).set(n as f64);
    }
    gauge!("tenantry_registry_leader_known").set(f64::from(u8::from(has_leader)));
    gauge!("tenantry_records_kept").set(cluster.n_records() as f64);
    for refusal in peer::Refusal::ALL {
        let n = cluster.net().refusals().count(refusal);
        counter!("tenantry_peers_refused_total", "reason" => refusal.as_str()).absolute(n);
    }
}

/// What a node may think of another, and its label.
const HEALTHS: [(Health, &str); 5] = [
    (Health::Alive, "alive"),
    (Health::Suspect, "suspect"),
    (Health::Returning, "returning"),
    (Health::Dead, "dead"),
    (Health::Absent, "absent"),
];

/// A request goes on here.
pub fn resumed(tenant: &TenantId) {
    counter!("tenantry_requests_resumed_total", "tenant" => tenant_label(tenant)).increment(1);
}

/// An adapter is fetched before somebody asks for it.
pub fn prewarmed(reason: &'static str) {
    counter!("tenantry_prewarms_total", "reason" => reason).increment(1);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_thousand_and_first_tenant_shares_a_label() {
        let tenant = |index: usize| -> TenantId { format!("t{index}").parse().expect("an id") };
        let labels: BTreeSet<String> = (0..2 * TENANT_LABELS_MAX).map(|index| tenant_label(&tenant(index))).collect();
        assert!(labels.len() <= TENANT_LABELS_MAX + 1, "{} labels", labels.len());
        assert_eq!(tenant_label(&tenant(0)), "t0", "who had a label keeps it");
        assert_eq!(tenant_label(&tenant(5000)), "_other");
    }
}
