//! The tenant contract: the one record that gateway, queue, cache and billing read (REG-15).
//!
//! The registry in `coordinator` owns and changes contracts; everyone else holds an immutable
//! `Arc<TenantContract>` stamped with the epoch it was published in.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::hash::ContentHash;
use crate::id::{AdapterName, BaseName, TaskName, TenantId};

/// Service class: which queue a tenant's requests wait in (TIER-01…04, FQ-05).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tier {
    /// Shared pool, bounded concurrency, standard weight.
    Shared,
    /// Shared pool with a reserved share of step time and a larger weight.
    Premium,
    /// Own queue class with its own reserve; the tier for tenants with isolation duties.
    Isolated,
}

impl Tier {
    /// All tiers, in queue-class order.
    pub const ALL: [Self; 3] = [Self::Shared, Self::Premium, Self::Isolated];

    /// The name used in configuration, metrics and records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Premium => "premium",
            Self::Isolated => "isolated",
        }
    }
}

/// Whether a tenant is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TenantState {
    /// Requests are served.
    Active,
    /// Every request is refused with 403 `tenant_suspended`; nothing is deleted.
    Suspended,
}

/// What happens when a task's adapter is missing or broken (AD-26, LIFE-13).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fallback {
    /// Refuse with an error that says so.
    Refuse,
    /// Answer with the base model and say so in body, header, metrics and usage record.
    Base,
}

/// Limits on one tenant. All are enforced at admission, before anything is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Sequences that may run at once (TIER-19).
    pub concurrency: u32,
    /// Requests that may wait per route (TIER-20).
    pub queue_depth: u32,
    /// Longest a request may take from admission to its last token, in ms (TIER-21).
    pub deadline_ms: u64,
    /// Requests per minute.
    pub requests_per_minute: u32,
    /// Prompt plus reserved answer tokens per minute.
    pub tokens_per_minute: u32,
    /// How many requests may come at once before the per-minute rate binds.
    pub burst_requests: u32,
}

/// Where a task points.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskPointer {
    /// Full version name.
    pub adapter: AdapterName,
    /// Content that version holds.
    pub hash: ContentHash,
}

/// Everything the serving path may know about a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantContract {
    /// Who (REG-02).
    pub tenant: TenantId,
    /// Served or suspended.
    pub state: TenantState,
    /// Service class (REG-03, REG-06).
    pub tier: Tier,
    /// Share among the tenants of the same tier; 1 is the default.
    pub weight: u32,
    /// Base models this tenant may use (REG-04); the first is the default.
    pub bases: Vec<BaseName>,
    /// Whether the tenant may name the base model itself in a request.
    pub allow_base: bool,
    /// Task → adapter version (REG-05). A task whose adapter is not there yet maps to `None` (LIFE-13).
    pub tasks: BTreeMap<TaskName, Option<TaskPointer>>,
    /// Every uploaded version, current or not.
    pub versions: BTreeMap<AdapterName, ContentHash>,
    /// What happens without the adapter.
    pub fallback: Fallback,
    /// Numeric limits (REG-07, GW-12).
    pub limits: Limits,
    /// Region or data boundary (REG-08).
    pub region: Option<String>,
    /// Nodes of one kind that serve this tenant and no others do; `None` is the pool `default`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Where usage rolls up (REG-09).
    pub cost_center: Option<String>,
    /// Registry epoch in which this contract was last changed.
    pub epoch: u64,
}
