//! The admin API's bodies: what operators send and see. Used by the server, by `tenantry ctl` and by the
//! OpenAPI document. Field meanings are those of `shared::tenant`.

use coordinator::registry::record::{AdapterKind, AdapterRecord, TenantRecord};
use serde::{Deserialize, Serialize};
use shared::id::{AdapterName, BaseName, NodeId, TaskName, TenantId};
use shared::tenant::{Fallback, Limits, TaskPointer, TenantState, Tier};
use utoipa::ToSchema;

/// Creates a tenant with everything it needs in one call (LIFE-10). Only `id` is required.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateTenant {
    /// `a-z0-9-`, at most 63 characters.
    #[schema(value_type = String, example = "acme")]
    pub id: TenantId,
    /// Name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Who to write to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contact: Option<String>,
    /// Tasks that exist before their adapters do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    pub tasks: Vec<TaskName>,
    /// The rest of the contract; what is left out comes from the tier.
    #[serde(default)]
    pub contract: ContractPatch,
}

/// Parts of a contract to set; what is left out stays as it is.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ContractPatch {
    /// Service class: `shared`, `premium` or `isolated`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub tier: Option<Tier>,
    /// Share among the tenants of the tier, 1 to 1000.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight: Option<u32>,
    /// Base models; the first is the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<String>>)]
    pub bases: Option<Vec<BaseName>>,
    /// Whether requests may name the base itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allow_base: Option<bool>,
    /// `refuse` or `base`: what a task without adapter does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub fallback: Option<Fallback>,
    /// Region or data boundary; an empty string removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// Nodes of one pool; an empty string means the pool `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Where usage rolls up; an empty string removes it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cost_center: Option<String>,
    /// Sequences at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<u32>,
    /// Waiting requests per task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_depth: Option<u32>,
    /// Milliseconds from admission to the last token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Requests per minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub requests_per_minute: Option<u32>,
    /// Tokens per minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_minute: Option<u32>,
    /// Requests at once before the rate binds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub burst_requests: Option<u32>,
}

impl ContractPatch {
    /// The limits this patch makes of `limits`.
    pub fn limits_over(&self, limits: Limits) -> Limits {
        Limits {
            concurrency: self.concurrency.unwrap_or(limits.concurrency),
            queue_depth: self.queue_depth.unwrap_or(limits.queue_depth),
            deadline_ms: self.deadline_ms.unwrap_or(limits.deadline_ms),
            requests_per_minute: self.requests_per_minute.unwrap_or(limits.requests_per_minute),
            tokens_per_minute: self.tokens_per_minute.unwrap_or(limits.tokens_per_minute),
            burst_requests: self.burst_requests.unwrap_or(limits.burst_requests),
        }
    }
}

/// Changes a tenant. `expected_epoch` refuses the change with 409 if the tenant changed meanwhile.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpdateTenant {
    /// Name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Who to write to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contact: Option<String>,
    /// Epoch the caller last saw.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_epoch: Option<u64>,
    /// What to change in the contract.
    #[serde(default)]
    pub contract: ContractPatch,
}

/// A new API key; the secret is shown this once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NewKey {
    /// Public part, used to revoke.
    pub id: String,
    /// What clients send as bearer token.
    pub key: String,
}

/// Answer to [`CreateTenant`].
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantCreated {
    /// The tenant as stored.
    pub tenant: TenantView,
    /// Its first key.
    pub key: NewKey,
}

/// Asks for another key.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateKey {
    /// Seconds until it stops working; never when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_s: Option<u64>,
}

/// A key without its secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct KeyView {
    /// Public part.
    pub id: String,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// Seconds since the Unix epoch; `null` never expires.
    pub expires_at: Option<u64>,
    /// No longer accepted.
    pub revoked: bool,
}

/// One stored adapter version.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct AdapterView {
    /// Full version name.
    #[schema(value_type = String, example = "acme-support-smollm2-v1.0.0")]
    pub name: AdapterName,
    /// Content hash, 64 hex digits.
    pub hash: String,
    /// Size of the uploaded files.
    pub bytes: u64,
    /// Largest rank in it.
    pub rank: u32,
    /// `peft` or `gguf`.
    pub kind: String,
    /// Seconds since the Unix epoch.
    pub uploaded_at: u64,
}

/// A task and the version it points at.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TaskView {
    /// Task.
    #[schema(value_type = String, example = "support")]
    pub task: TaskName,
    /// Version; `null` while there is none.
    #[schema(value_type = Option<String>)]
    pub version: Option<AdapterName>,
}

/// Points a task at a version; `null` leaves the task without adapter.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PointTask {
    /// Full version name of the same tenant.
    #[schema(value_type = Option<String>)]
    pub version: Option<AdapterName>,
}

/// A tenant as operators see it; holds no secret.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantView {
    /// Tenant.
    #[schema(value_type = String)]
    pub id: TenantId,
    /// Name for people.
    pub display_name: String,
    /// Who to write to.
    pub contact: Option<String>,
    /// `active` or `suspended`.
    #[schema(value_type = String)]
    pub state: TenantState,
    /// Service class.
    #[schema(value_type = String)]
    pub tier: Tier,
    /// Share among the tenants of the tier.
    pub weight: u32,
    /// Base models.
    #[schema(value_type = Vec<String>)]
    pub bases: Vec<BaseName>,
    /// Whether requests may name the base itself.
    pub allow_base: bool,
    /// What a task without adapter does.
    #[schema(value_type = String)]
    pub fallback: Fallback,
    /// Limits.
    #[schema(value_type = Object)]
    pub limits: Limits,
    /// Region or data boundary.
    pub region: Option<String>,
    /// Pool of nodes; `null` is the pool `default`.
    pub pool: Option<String>,
    /// Where usage rolls up.
    pub cost_center: Option<String>,
    /// Tasks.
    pub tasks: Vec<TaskView>,
    /// Stored versions.
    pub adapters: Vec<AdapterView>,
    /// Keys.
    pub keys: Vec<KeyView>,
    /// Seconds since the Unix epoch.
    pub created_at: u64,
    /// Registry epoch of the last change.
    pub epoch: u64,
}

impl AdapterView {
    /// The operator's view of a stored version.
    pub fn of(record: &AdapterRecord) -> Self {
        let kind = match record.kind {
            AdapterKind::Peft => "peft",
            AdapterKind::Gguf => "gguf",
        };
        Self {
            name: record.name.clone(),
            hash: record.hash.to_string(),
            bytes: record.bytes,
            rank: record.rank,
            kind: kind.to_owned(),
            uploaded_at: record.uploaded_at_s,
        }
    }
}

impl TenantView {
    /// The operator's view of a stored record.
    pub fn of(record: &TenantRecord) -> Self {
        let contract = &record.contract;
        let version = |pointer: &Option<TaskPointer>| pointer.as_ref().map(|pointer| pointer.adapter.clone());
        let keys = record.keys.values().map(|key| KeyView {
            id: key.id.to_string(),
            created_at: key.created_at_s,
            expires_at: key.expires_at_s,
            revoked: key.revoked_at_s.is_some(),
        });
        Self {
            id: contract.tenant.clone(),
            display_name: record.display_name.clone(),
            contact: record.contact.clone(),
            state: contract.state,
            tier: contract.tier,
            weight: contract.weight,
            bases: contract.bases.clone(),
            allow_base: contract.allow_base,
            fallback: contract.fallback,
            limits: contract.limits,
            region: contract.region.clone(),
            pool: contract.pool.clone(),
            cost_center: contract.cost_center.clone(),
            tasks: contract
                .tasks
                .iter()
                .map(|(task, to)| TaskView { task: task.clone(), version: version(to) })
                .collect(),
            adapters: record.adapters.values().map(AdapterView::of).collect(),
            keys: keys.collect(),
            created_at: record.created_at_s,
            epoch: contract.epoch,
        }
    }
}

/// All tenants, by id.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TenantList {
    /// Registry epoch of the list.
    pub epoch: u64,
    /// Tenants in order of id.
    pub tenants: Vec<TenantView>,
}

/// Nothing but success.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Done {
    /// What was done.
    pub done: String,
    /// Registry epoch afterwards.
    pub epoch: u64,
}

/// Ends a node. It names the node, so that none ends by a slip.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainNode {
    /// The node that is asked.
    #[schema(value_type = String)]
    pub node: NodeId,
}

/// The admin API's OpenAPI document.
pub fn document() -> utoipa::openapi::OpenApi {
    use utoipa::OpenApi;
    Document::openapi()
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(title = "Tenantry admin API", description = "Tenants, keys, adapter versions and tasks; for operators."),
    paths(
        paths::status,
        paths::metrics,
        paths::cluster,
        paths::cluster_tenants,
        paths::drain,
        paths::list_tenants,
        paths::create_tenant,
        paths::show_tenant,
        paths::update_tenant,
        paths::delete_tenant,
        paths::suspend_tenant,
        paths::resume_tenant,
        paths::add_key,
        paths::revoke_key,
        paths::upload_adapter,
        paths::remove_adapter,
        paths::point_task,
        paths::remove_task,
        paths::healthz,
        paths::readyz,
        paths::openapi
    )
)]
struct Document;

/// The routes of [`super::router`] as utoipa wants to see them.
#[expect(dead_code, reason = "utoipa reads the attributes; nothing calls the functions")]
mod paths {
    use super::*;

    #[utoipa::path(get, path = "/admin/v1/status", responses((status = 200, description = "What the node is doing.")))]
    fn status() {}
    #[utoipa::path(get, path = "/admin/v1/cluster", responses((status = 200, description = "Nodes, ring and registry as this node sees them."), (status = 404, description = "The node is alone.")))]
    fn cluster() {}
    #[utoipa::path(get, path = "/admin/v1/cluster/tenants", responses((status = 200, description = "Who serves which tenant, and what of it is in the memory of each node that lives; \"unknown\" where one does not say."), (status = 404, description = "The node is alone.")))]
    fn cluster_tenants() {}
    #[utoipa::path(post, path = "/admin/v1/drain", request_body = DrainNode, responses((status = 202, description = "The node hands over what it has and ends.")))]
    fn drain() {}
    #[utoipa::path(get, path = "/metrics", responses((status = 200, description = "Prometheus text.")))]
    fn metrics() {}
    #[utoipa::path(get, path = "/admin/v1/tenants", responses((status = 200, body = TenantList)))]
    fn list_tenants() {}
    #[utoipa::path(post, path = "/admin/v1/tenants", request_body = CreateTenant, responses((status = 201, body = TenantCreated)))]
    fn create_tenant() {}
    #[utoipa::path(get, path = "/admin/v1/tenants/{tenant}", params(("tenant" = String, Path)), responses((status = 200, body = TenantView)))]
    fn show_tenant() {}
    #[utoipa::path(patch, path = "/admin/v1/tenants/{tenant}", params(("tenant" = String, Path)), request_body = UpdateTenant, responses((status = 200, body = TenantView)))]
    fn update_tenant() {}
    #[utoipa::path(delete, path = "/admin/v1/tenants/{tenant}", params(("tenant" = String, Path)), responses((status = 200, body = Done)))]
    fn delete_tenant() {}
    #[utoipa::path(post, path = "/admin/v1/tenants/{tenant}/suspend", params(("tenant" = String, Path)), responses((status = 200, body = Done)))]
    fn suspend_tenant() {}
    #[utoipa::path(post, path = "/admin/v1/tenants/{tenant}/resume", params(("tenant" = String, Path)), responses((status = 200, body = Done)))]
    fn resume_tenant() {}
    #[utoipa::path(post, path = "/admin/v1/tenants/{tenant}/keys", params(("tenant" = String, Path)), request_body = CreateKey, responses((status = 201, body = NewKey)))]
    fn add_key() {}
    #[utoipa::path(delete, path = "/admin/v1/tenants/{tenant}/keys/{key}", params(("tenant" = String, Path), ("key" = String, Path)), responses((status = 200, body = Done)))]
    fn revoke_key() {}
    #[utoipa::path(put, path = "/admin/v1/tenants/{tenant}/adapters/{name}", params(("tenant" = String, Path), ("name" = String, Path)), responses((status = 201, body = AdapterView, description = "multipart/form-data with config and weights, or gguf")))]
    fn upload_adapter() {}
    #[utoipa::path(delete, path = "/admin/v1/tenants/{tenant}/adapters/{name}", params(("tenant" = String, Path), ("name" = String, Path)), responses((status = 200, body = Done)))]
    fn remove_adapter() {}
    #[utoipa::path(put, path = "/admin/v1/tenants/{tenant}/tasks/{task}", params(("tenant" = String, Path), ("task" = String, Path)), request_body = PointTask, responses((status = 200, body = Done)))]
    fn point_task() {}
    #[utoipa::path(delete, path = "/admin/v1/tenants/{tenant}/tasks/{task}", params(("tenant" = String, Path), ("task" = String, Path)), responses((status = 200, body = Done)))]
    fn remove_task() {}
    #[utoipa::path(get, path = "/healthz", responses((status = 200, description = "The process answers; needs no key.")))]
    fn healthz() {}
    #[utoipa::path(get, path = "/readyz", responses((status = 200, description = "This node can serve; needs no key."), (status = 503, description = "Some check fails.")))]
    fn readyz() {}
    #[utoipa::path(get, path = "/openapi.json", responses((status = 200, description = "This document; needs no key.")))]
    fn openapi() {}
}
