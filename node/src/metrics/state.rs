//! What is read when somebody asks for the metrics: the state of the node, its bases, its tenants and its cluster.
//!
//! [`render`] is called by the admin port. Most of it goes through the recorder; families whose labels come and go are
//! written behind it, because the recorder never forgets a series.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use coordinator::membership::detector::Health;
use kernels::kv::PAGE_TOKENS;
use metrics::{counter, gauge};
use metrics_exporter_prometheus::PrometheusHandle;
use queue::fair::QueueStats;
use scheduler::engine::{EngineSnapshot, STEP_ROWS_BOUNDS};
use shared::id::BaseName;

use super::{activity, tenant_label};
use crate::app::App;
use crate::base_room::BaseRoom;
use crate::cluster::ClusterNode;

/// All metrics as Prometheus text.
pub fn render(app: &App, recorder: &PrometheusHandle) -> String {
    node(app);
    if let Some(network) = app.cluster() {
        let bases = app.config().bases.iter().map(|base| &base.name);
        cluster(network, bases, app.registry().status().borrow().leader.is_some());
    }
    let now = app.now();
    let bases: Vec<(&BaseRoom, QueueStats)> =
        app.rooms().values().map(|room| (room.as_ref(), room.queue.stats(now))).collect();
    for (room, queued) in &bases {
        base(room);
        queue::metrics::sample(&room.name, queued);
        adapters::metrics::sample(&room.name, &room.cache.stats());
    }
    let mut text = recorder.render();
    steps(&mut text, &bases);
    tenants(&mut text, &bases);
    adapters_in_use(&mut text, &bases, app);
    text
}

fn node(app: &App) {
    gauge!("tenantry_usage_backlog").set(app.journal().backlog() as f64);
    gauge!("tenantry_registry_epoch").set(app.registry().snapshot().epoch() as f64);
    counter!("tenantry_invariant_violations_total").absolute(shared::error::violations());
    adapters::metrics::sample_disk(app.store().used_bytes());
    if let Some(bytes) = resident_bytes() {
        gauge!("process_resident_memory_bytes").set(bytes as f64);
    }
}

/// Memory of this process that is in RAM, where the system tells.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    kib.checked_mul(1024)
}

fn base(room: &BaseRoom) {
    let base = room.name.to_string();
    let engine = room.engine_totals();
    let share = engine.kv_pages_used as f64 / (engine.kv_pages.max(1)) as f64;
    let waiting = room.queue.n_waiting() as f64 + engine.sequences_preempted as f64;
    for (name, value) in [
        ("vllm:num_requests_running", engine.sequences_running as f64),
        ("vllm:num_requests_waiting", waiting),
        ("vllm:kv_cache_usage_perc", share),
    ] {
        gauge!(name, "model_name" => base.clone(), "engine" => "0").set(value);
    }
    for (name, value) in [
        ("vllm:num_preemptions_total", engine.preemptions),
        ("vllm:prefix_cache_queries_total", engine.prefix_queries),
        ("vllm:prefix_cache_hits_total", engine.prefix_hits),
    ] {
        counter!(name, "model_name" => base.clone(), "engine" => "0").absolute(value);
    }
    let prefix_cache = if room.engine.scheduling.prefix_cache { "True" } else { "False" };
    gauge!("vllm:cache_config_info", "model_name" => base.clone(), "engine" => "0", "block_size" => PAGE_TOKENS.to_string(), "num_gpu_blocks" => engine.kv_pages.to_string(), "enable_prefix_caching" => prefix_cache).set(1.0);
    let page_bytes = model::forward::kv_layout(&room.model.info).bytes_per_page();
    for (name, value) in [
        ("tenantry_engine_up", f64::from(u8::from(room.is_up()))),
        ("tenantry_base_bytes", room.model.weights.bytes() as f64),
        ("tenantry_kv_bytes", engine.kv_pages as f64 * page_bytes as f64),
    ] {
        gauge!(name, "model_name" => base.clone()).set(value);
    }
    for (name, value) in [
        ("tenantry_engine_steps_total", engine.steps),
        ("tenantry_engine_requests_resumed_total", engine.requests_resumed),
        ("tenantry_engine_forward_microseconds_total", engine.forward_ns / 1000),
    ] {
        counter!(name, "model_name" => base.clone()).absolute(value);
    }
}

/// Announces a family that is written here and not by the recorder.
fn announce(text: &mut String, name: &str, kind: &str, meaning: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "# HELP {name} {meaning}\n# TYPE {name} {kind}");
}

/// A histogram that engines count themselves.
fn steps(text: &mut String, bases: &[(&BaseRoom, QueueStats)]) {
    announce(text, "vllm:iteration_tokens_total", "histogram", "Rows (tokens) per engine step.");
    for (room, _) in bases {
        steps_of(text, &room.name, &room.engine_totals());
    }
}

fn steps_of(text: &mut String, base: &BaseName, engine: &EngineSnapshot) {
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

/// What each tenant has in the queue and in the batch: it may be known to the queue now and forgotten later.
fn tenants(text: &mut String, bases: &[(&BaseRoom, QueueStats)]) {
    let mut held = BTreeMap::<(&BaseName, String, &str), (u64, u64)>::new();
    for (room, queued) in bases {
        for tenant in &queued.tenants {
            // Tenants past the cap share a label and are added up.
            let key = (&room.name, tenant_label(&tenant.tenant), tenant.tier.as_str());
            let (waiting, running) = held.entry(key).or_default();
            *waiting += u64::from(tenant.waiting);
            *running += u64::from(tenant.running_sequences);
        }
    }
    let mut family = |name: &str, meaning: &str, of: fn(&(u64, u64)) -> u64| {
        announce(text, name, "gauge", meaning);
        for ((base, tenant, tier), held) in &held {
            let value = of(held);
            let _ = writeln!(text, "{name}{{model_name=\"{base}\",tenant=\"{tenant}\",tier=\"{tier}\"}} {value}");
        }
    };
    family("tenantry_tenant_waiting_requests", "Requests that wait here, by base, tenant and tier.", |held| held.0);
    family("tenantry_tenant_running_sequences", "Sequences in the engine, by base, tenant and tier.", |held| held.1);
}

/// An info metric whose labels change with every request.
fn adapters_in_use(text: &mut String, bases: &[(&BaseRoom, QueueStats)], app: &App) {
    let meaning = "Adapters of running and waiting requests; the value is the time.";
    announce(text, "vllm:lora_requests_info", "gauge", meaning);
    for (room, _) in bases {
        let (running, waiting) = activity::adapters_in_use(&room.name);
        let (base, slots, now_s) = (&room.name, app.config().adapters.slots, app.wall_s());
        let _ = writeln!(
            text,
            "vllm:lora_requests_info{{model_name=\"{base}\",engine=\"0\",max_lora=\"{slots}\",running_lora_adapters=\"{running}\",waiting_lora_adapters=\"{waiting}\"}} {now_s}"
        );
    }
}

/// The cluster as this node sees it.
fn cluster<'a>(cluster: &ClusterNode, bases: impl Iterator<Item = &'a BaseName>, has_leader: bool) {
    let table = cluster.coordinator().tables().borrow().clone();
    gauge!("tenantry_ring_epoch").set(table.epoch() as f64);
    for (health, label) in HEALTHS {
        let n = table.members().values().filter(|member| member.health == health).count();
        gauge!("tenantry_cluster_nodes", "health" => label).set(n as f64);
    }
    let unlike = table.unlike();
    for base in bases {
        let agreed = table.agreed(base).map(|agreed| agreed.hash);
        let n = unlike.iter().filter(|(_, said)| said.name == *base && Some(said.hash) != agreed).count();
        gauge!("tenantry_base_nodes_left_out", "model_name" => base.to_string()).set(n as f64);
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
