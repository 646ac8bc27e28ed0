//! What the node is doing right now, for operators and their scrapers.

use axum::body::Body;
use axum::extract::State;
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;
use queue::fair::{ClassStats, TenantStats};
use serde_json::{Value, json};

use super::{Shared, api};
use crate::gateway::backend::Backend;
use crate::gateway::reply;
use crate::metrics;

pub(super) async fn show(State(admin): Shared) -> Response<Body> {
    let app = &admin.app;
    let snapshot = app.registry().snapshot();
    let bases: Vec<Value> = app.rooms().values().map(|room| room_status(room, app.now())).collect();
    let body = json!({
        "node": app.node().name,
        "version": env!("CARGO_PKG_VERSION"),
        "draining": app.is_draining(),
        "registry": {"epoch": snapshot.epoch(), "tenants": snapshot.n_tenants()},
        "usage_backlog": app.journal().backlog(),
        "bases": bases,
    });
    reply::json(StatusCode::OK, &body)
}

fn room_status(room: &crate::base_room::BaseRoom, now: std::time::Instant) -> Value {
    let info = &room.model.info;
    let engine = room.engine_totals();
    let queue = room.queue.stats(now);
    let cache = room.cache.stats();
    json!({
        "name": room.name,
        "hash": info.hash.to_string(),
        "numerics": info.numerics_id(),
        "context": room.context(),
        "up": room.is_up(),
        "engine": {
            "sequences_running": engine.sequences_running,
            "sequences_preempted": engine.sequences_preempted,
            "kv_pages": engine.kv_pages,
            "kv_pages_used": engine.kv_pages_used,
            "kv_pages_cached": engine.kv_pages_cached,
            "steps": engine.steps,
            "forward_s": engine.forward_ns as f64 / 1e9,
            "tokens_prompt": engine.tokens_prompt,
            "tokens_emitted": engine.tokens_emitted,
            "preemptions": engine.preemptions,
            "requests_resumed": engine.requests_resumed,
            "prefix_queries": engine.prefix_queries,
            "prefix_hits": engine.prefix_hits,
        },
        "queue": {
            "waiting": room.queue.n_waiting(),
            "running": queue.running,
            "classes": queue.classes.iter().map(class_status).collect::<Vec<_>>(),
            "tenants": queue.tenants.iter().map(tenant_status).collect::<Vec<_>>(),
        },
        "adapters": {
            "resident": cache.resident,
            "leased": cache.leased,
            "engine_bytes": cache.engine_bytes,
            "host_bytes": cache.host_bytes,
            "hits": cache.hits,
            "misses": cache.misses,
            "loads": cache.loads,
            "failures": cache.failures,
            "evictions": cache.evictions,
        },
    })
}

fn class_status(class: &ClassStats) -> Value {
    json!({
        "tier": class.tier.as_str(),
        "waiting": class.waiting,
        "tenants_waiting": class.tenants_waiting,
        "sequences_running": class.running_sequences,
        "oldest_wait_s": class.oldest_wait.as_secs_f64(),
        "service_tokens": class.service_tokens,
    })
}

fn tenant_status(tenant: &TenantStats) -> Value {
    json!({
        "tenant": tenant.tenant,
        "tier": tenant.tier.as_str(),
        "waiting": tenant.waiting,
        "sequences_running": tenant.running_sequences,
        "service_tokens": tenant.service_tokens,
    })
}

pub(super) async fn metrics(State(admin): Shared) -> Response<Body> {
    let text = metrics::state::render(&admin.app, &admin.metrics);
    ([("content-type", "text/plain; version=0.0.4")], text).into_response()
}

pub(super) async fn ready(State(admin): Shared) -> Response<Body> {
    let checks = admin.app.checks();
    let ready = checks.iter().all(|check| check.ok);
    let listed: Vec<Value> =
        checks.iter().map(|check| json!({"name": check.name, "ok": check.ok, "detail": check.detail})).collect();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    reply::json(status, &json!({"status": if ready { "ready" } else { "not_ready" }, "checks": listed}))
}

pub(super) async fn openapi() -> Response<Body> {
    reply::json(StatusCode::OK, &api::document())
}
