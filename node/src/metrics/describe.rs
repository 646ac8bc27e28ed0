//! What every metric means, in the words that Prometheus shows. Called once, when the recorder is installed.
//!
//! A test of the house rules checks that no metric is missing here or in its own crate.

use metrics::{describe_counter, describe_gauge, describe_histogram};

/// Describes the metrics of this crate and of those below.
pub(super) fn all() {
    queue::metrics::describe();
    adapters::metrics::describe();
    requests();
    node();
    cluster();
    vllm();
}

/// What moves with requests.
fn requests() {
    describe_counter!(
        "tenantry_requests_total",
        "Requests that left the node after admission, by base, tenant, task, adapter, tier and outcome."
    );
    describe_counter!(
        "tenantry_rejections_total",
        "Requests refused, by tenant, tier and error code; tenant is _none before authentication."
    );
    describe_counter!(
        "tenantry_failures_total",
        "Requests that failed after admission, by tenant, tier and error code; queue_timeout and deadline_exceeded are missed deadlines."
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
        "tenantry_requests_resumed_total",
        "Requests that go on here after their entry node or connection was lost, by tenant."
    );
    describe_histogram!(
        "tenantry_time_to_first_token_seconds",
        "Admission to first delivered token, by base, tenant, adapter and tier."
    );
    describe_histogram!(
        "tenantry_inter_token_seconds",
        "Between two delivered tokens of a request's first choice, by tenant and tier."
    );
    describe_histogram!("tenantry_queue_wait_seconds", "Admission to entering the batch, by tenant and tier.");
    describe_histogram!("tenantry_request_seconds", "Admission to end, by base, tenant, adapter and tier.");
    describe_counter!(
        "tenantry_impersonations_total",
        "Requests that named another tenant than their key's, by tenant of the key."
    );
    describe_counter!("tenantry_streams_cut_total", "Streams ended by the node, by reason.");
    describe_counter!(
        "tenantry_adapter_requests_total",
        "Requests for an adapter, by tenant, tier and whether it was in engine memory when they arrived (cache: hit or miss)."
    );
}

/// The node and its bases.
fn node() {
    describe_counter!("tenantry_connections_refused_total", "Connections closed at once because too many were open.");
    describe_gauge!("tenantry_usage_backlog", "Usage records not yet on disk.");
    describe_gauge!("tenantry_engine_up", "1 while the base's engine thread runs.");
    describe_counter!("tenantry_engine_restarts_total", "Times the base's engine was started again after a failure.");
    describe_counter!(
        "tenantry_prewarms_total",
        "Adapters fetched before they were asked for, by reason: plan (of this node) or hint (of another)."
    );
    describe_counter!("tenantry_engine_steps_total", "Steps that the base's engine computed.");
    describe_counter!(
        "tenantry_engine_requests_resumed_total",
        "Requests that the base's engine went on with from tokens that another engine had emitted."
    );
    describe_counter!(
        "tenantry_engine_forward_microseconds_total",
        "Time that the base's engine spent inside the forward pass."
    );
    describe_gauge!("tenantry_base_bytes", "Bytes of the base's weights.");
    describe_gauge!(
        "tenantry_kv_bytes",
        "Bytes of the base's KV pages, used or not; vllm:kv_cache_usage_perc is the share in use."
    );
    describe_gauge!("process_resident_memory_bytes", "Memory of the process that is in RAM.");
    describe_counter!(
        "tenantry_invariant_violations_total",
        "Broken invariants: each is a bug, or somebody at work, and is in the log under the target invariant."
    );
}

/// What the node thinks of its cluster.
fn cluster() {
    describe_gauge!("tenantry_ring_epoch", "Epoch of this node's routing table; rises when tenants may move.");
    describe_gauge!("tenantry_cluster_nodes", "Nodes of the cluster file, by what this node thinks of them.");
    describe_gauge!("tenantry_registry_leader_known", "1 while this node knows who takes changes of the registry.");
    describe_gauge!(
        "tenantry_base_nodes_left_out",
        "Nodes that get nothing of this base, because they serve another content under its name."
    );
    describe_gauge!("tenantry_records_kept", "Requests of other nodes whose records are kept here.");
    describe_counter!("tenantry_peers_refused_total", "Connections to the peer port that were turned away, by reason.");
    describe_gauge!("tenantry_registry_epoch", "Epoch of the registry this node serves from.");
}

/// The families that vLLM has too.
fn vllm() {
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
    describe_histogram!("vllm:request_params_n", "Choices asked for per request.");
    describe_histogram!("vllm:request_params_max_tokens", "Longest answer allowed per request, in tokens.");
    describe_counter!("vllm:prompt_tokens_total", "Prompt tokens of requests that ended.");
    describe_counter!("vllm:generation_tokens_total", "Delivered tokens of requests that ended.");
    describe_gauge!(
        "vllm:cache_config_info",
        "Always 1; the labels are the size of a KV page in tokens (block_size), their number (num_gpu_blocks, in host memory here) and whether prefixes are cached."
    );
    describe_gauge!("vllm:num_requests_running", "Sequences in the batch, by base.");
    describe_gauge!("vllm:num_requests_waiting", "Requests in the fair queue and preempted sequences.");
    describe_gauge!("vllm:kv_cache_usage_perc", "Share of KV pages in use, 0 to 1.");
    describe_counter!("vllm:num_preemptions_total", "Sequences that gave their pages up and were computed again.");
    describe_counter!("vllm:prefix_cache_queries_total", "Prompt tokens looked up in prefix caches.");
    describe_counter!("vllm:prefix_cache_hits_total", "Prompt tokens found in prefix caches.");
}
