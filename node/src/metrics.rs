//! Every metric of the crate and when it moves. Served as Prometheus text on the admin port.
//!
//! Two families: the `vllm:` names with vLLM's buckets, so that existing dashboards and schedulers work, and our own
//! (MON-01, MON-06…09, MON-12). The same thing has the same label everywhere: `model_name` is the base (beside
//! `engine`, always 0, where vLLM has it), then `tenant`, `task`, `adapter`, `tier`. Here is what moves with requests;
//! `state` is what is read when somebody asks, `describe` says what each metric means, and `labels` bounds the
//! number of series.

pub mod labels;
mod describe;
pub mod activity;
pub mod state;

use std::time::Duration;

use metrics::{counter, histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;
use shared::id::{BaseName, TenantId};
use shared::request::Envelope;
use shared::tenant::Tier;

use self::labels::Labels;
use crate::metering::{Outcome, UsageRecord};

/// vLLM's buckets for the time to the first token.
const TTFT_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// vLLM's buckets for the time between tokens.
const TOKEN_S: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// vLLM's buckets for whole requests and their phases.
const VLLM_REQUEST_S: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// Our buckets for whole requests: short ones are told apart, and the usual promises (0.2, 0.5, 2 and 10 s) are bounds.
const REQUEST_S: &[f64] = &[
    0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 60.0,
    120.0, 600.0,
];
/// Buckets for token counts, up to the largest context served.
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];
/// vLLM's buckets for the choices asked for.
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// Buckets for adapter loads and other short work: 1 µs to 10 s.
const SHORT_S: &[f64] = &[1e-6, 1e-5, 1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0];

static LABELS: Labels = Labels::new();

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
        (Matcher::Prefix("vllm:e2e_request_latency".into()), VLLM_REQUEST_S),
        (Matcher::Prefix("vllm:request_queue_time".into()), VLLM_REQUEST_S),
        (Matcher::Prefix("vllm:request_inference_time".into()), VLLM_REQUEST_S),
        (Matcher::Prefix("vllm:request_prefill_time".into()), VLLM_REQUEST_S),
        (Matcher::Prefix("vllm:request_decode_time".into()), VLLM_REQUEST_S),
        (Matcher::Suffix("request_seconds".into()), REQUEST_S),
        (Matcher::Suffix("queue_wait_seconds".into()), TTFT_S),
        (Matcher::Prefix("vllm:request_prompt_tokens".into()), TOKENS),
        (Matcher::Prefix("vllm:request_generation_tokens".into()), TOKENS),
        (Matcher::Prefix("vllm:request_params_max_tokens".into()), TOKENS),
        (Matcher::Prefix("vllm:request_params_n".into()), CHOICES),
        (Matcher::Suffix("load_seconds".into()), SHORT_S),
    ] {
        builder = builder.set_buckets_for_metric(matcher, buckets)?;
    }
    let handle = builder.install_recorder()?;
    describe::all();
    *installed = Some(handle.clone());
    Ok(handle)
}

/// The label value of a tenant: its id, or `_other` past the cap.
pub fn tenant_label(tenant: &TenantId) -> String {
    LABELS.tenant(tenant)
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

/// A request left the node: the record says how, and `failure` is the code of its error.
pub fn request_ended(envelope: &Envelope, record: &UsageRecord, failure: Option<&'static str>) {
    let (tenant, tier) = (tenant_label(&record.tenant), record.tier.as_str());
    let delivered: u64 = record.delivered.iter().map(|&count| u64::from(count)).sum();
    if let Some(code) = failure {
        counter!("tenantry_failures_total", "tenant" => tenant.clone(), "tier" => tier, "code" => code).increment(1);
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
    if let Some(hit) = record.adapter_hit {
        let outcome = if hit { "hit" } else { "miss" };
        counter!("tenantry_adapter_requests_total", "tenant" => tenant, "tier" => tier, "cache" => outcome)
            .increment(1);
    }
    ended_by_adapter(record);
    ended_for_vllm(envelope, record, delivered);
}

/// The metrics that tell a tenant's adapters and tasks apart.
fn ended_by_adapter(record: &UsageRecord) {
    let (tenant, tier, base) = (tenant_label(&record.tenant), record.tier.as_str(), record.base.to_string());
    let adapter = LABELS.adapter(&record.tenant, record.adapter.as_ref());
    let task = LABELS.task(&record.tenant, record.task.as_ref());
    let outcome = match record.outcome {
        Outcome::Finished => "finished",
        Outcome::Cancelled => "cancelled",
        Outcome::Failed => "failed",
    };
    counter!("tenantry_requests_total", "model_name" => base.clone(), "tenant" => tenant.clone(), "task" => task.clone(), "adapter" => adapter.clone(), "tier" => tier, "outcome" => outcome).increment(1);
    if record.fell_back {
        counter!("tenantry_fallbacks_total", "tenant" => tenant.clone(), "task" => task).increment(1);
    }
    for (name, ms) in [
        ("tenantry_request_seconds", Some(record.total_ms)),
        ("tenantry_time_to_first_token_seconds", record.first_token_ms),
    ] {
        if let Some(ms) = ms {
            histogram!(name, "model_name" => base.clone(), "tenant" => tenant.clone(), "adapter" => adapter.clone(), "tier" => tier).record(ms / 1e3);
        }
    }
}

fn ended_for_vllm(envelope: &Envelope, record: &UsageRecord, delivered: u64) {
    let base = record.base.to_string();
    for (name, ms) in [
        ("vllm:request_queue_time_seconds", Some(record.queue_wait_ms)),
        ("vllm:e2e_request_latency_seconds", Some(record.total_ms)),
        ("vllm:request_inference_time_seconds", Some(record.total_ms - record.queue_wait_ms)),
        ("vllm:time_to_first_token_seconds", record.first_token_ms),
        ("vllm:request_prefill_time_seconds", record.first_token_ms.map(|first_ms| first_ms - record.queue_wait_ms)),
        ("vllm:request_decode_time_seconds", record.first_token_ms.map(|first_ms| record.total_ms - first_ms)),
    ] {
        if let Some(ms) = ms {
            histogram!(name, "model_name" => base.clone(), "engine" => "0").record(ms / 1e3);
        }
    }
    for (name, count) in [
        ("vllm:request_prompt_tokens", f64::from(record.prompt_tokens)),
        ("vllm:request_generation_tokens", delivered as f64),
        ("vllm:request_params_n", f64::from(envelope.generation.n)),
        ("vllm:request_params_max_tokens", f64::from(envelope.generation.max_tokens)),
    ] {
        histogram!(name, "model_name" => base.clone(), "engine" => "0").record(count);
    }
    for (name, tokens) in
        [("vllm:prompt_tokens_total", u64::from(record.prompt_tokens)), ("vllm:generation_tokens_total", delivered)]
    {
        counter!(name, "model_name" => base.clone(), "engine" => "0").increment(tokens);
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

/// An engine was started again after a panic.
pub fn engine_restarted(base: &BaseName) {
    counter!("tenantry_engine_restarts_total", "model_name" => base.to_string()).increment(1);
}

/// A connection was closed because too many were open.
pub fn connection_refused() {
    counter!("tenantry_connections_refused_total").increment(1);
}

/// The node ended a stream.
pub fn stream_cut(reason: &'static str) {
    counter!("tenantry_streams_cut_total", "reason" => reason).increment(1);
}

/// A request goes on here.
pub fn resumed(tenant: &TenantId) {
    counter!("tenantry_requests_resumed_total", "tenant" => tenant_label(tenant)).increment(1);
}

/// An adapter is fetched before somebody asks for it.
pub fn prewarmed(reason: &'static str) {
    counter!("tenantry_prewarms_total", "reason" => reason).increment(1);
}
