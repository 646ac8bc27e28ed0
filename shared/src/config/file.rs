//! `cluster.toml`, key for key, with the defaults. Units stand in the key names; ranges in `config.rs`.
//!
//! The repository's `cluster.toml` shows every key with its default; a test compares the two.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::id::{BaseName, NodeId, PoolName, RegionName};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterFile {
    /// Allow plain HTTP beyond loopback; for set-ups where something in front encrypts.
    #[serde(default)]
    pub insecure: bool,
    /// The cluster as a whole.
    #[serde(default)]
    pub cluster: Cluster,
    /// Nodes.
    #[serde(default)]
    pub nodes: Vec<Node>,
    /// Base models.
    #[serde(default)]
    pub bases: Vec<Base>,
    /// Engine sizes.
    #[serde(default)]
    pub engine: Engine,
    /// What clients may cost before a request exists.
    #[serde(default)]
    pub clients: Clients,
    /// Adapter budgets.
    #[serde(default)]
    pub adapters: Adapters,
    /// Queue policy.
    #[serde(default)]
    pub queue: Queue,
    /// Service classes.
    #[serde(default)]
    pub tiers: Tiers,
    /// Certificates.
    pub tls: Option<Tls>,
}

/// `[cluster]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cluster {
    /// Shown in logs and metrics.
    pub name: String,
    /// Seconds that running requests get to finish after SIGTERM.
    pub drain_s: u32,
    /// Folder of the cluster's certificate authority; needed where nodes are invited, not where they run.
    pub ca: PathBuf,
    /// Milliseconds between two heartbeats of a node.
    pub heartbeat_ms: u32,
}

impl Default for Cluster {
    fn default() -> Self {
        Self { name: "tenantry".into(), drain_s: 30, ca: ".tenantry/ca".into(), heartbeat_ms: 100 }
    }
}

/// `[[nodes]]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Name, used with `--name`.
    pub name: NodeId,
    /// Client port: the OpenAI API.
    pub http: SocketAddr,
    /// Operator port: registry, metrics.
    pub admin: SocketAddr,
    /// Directory for everything the node keeps.
    pub data: PathBuf,
    /// UDP port for the other nodes.
    pub peer: Option<SocketAddr>,
    /// UDP port for clients over QUIC.
    pub clients_quic: Option<SocketAddr>,
    /// Share of the tenants, against the other nodes.
    #[serde(default = "one")]
    pub capacity: u32,
    /// Keeps the registry; left out, the first [`REGISTRY_NODES`] nodes do.
    pub registry: Option<bool>,
    /// Which group of tenants it serves.
    #[serde(default = "default_pool")]
    pub pool: PoolName,
    /// Where it stands.
    pub region: Option<RegionName>,
    /// Base models it loads; left out, all.
    pub bases: Option<Vec<BaseName>>,
}

/// Nodes that keep the registry when none says so: three outlive the loss of one.
pub const REGISTRY_NODES: usize = 3;

fn one() -> u32 {
    1
}

fn default_pool() -> PoolName {
    "default".parse().expect("the literal is a name")
}

/// `[[bases]]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// Short name.
    pub name: BaseName,
    /// GGUF file or Hugging Face directory.
    pub path: PathBuf,
    /// `fast` or `exact`.
    #[serde(default = "fast")]
    pub numerics: String,
    /// Folder for a packed copy of the weights, shared by the processes of a machine; empty for none.
    #[serde(default = "panels")]
    pub panels: PathBuf,
    /// Other names under which adapters may declare this base.
    #[serde(default)]
    pub aliases: Vec<String>,
}

fn fast() -> String {
    "fast".into()
}

fn panels() -> PathBuf {
    "~/.cache/tenantry/panels".into()
}

/// `[engine]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Engine {
    /// Compute threads; 0 takes every core.
    pub threads: usize,
    /// Rows in one step.
    pub rows_per_step: usize,
    /// Prompt rows in one step.
    pub prefill_chunk: usize,
    /// Times by which prompts may prolong a step that also decodes.
    pub prefill_stretch: f64,
    /// Sequences at once.
    pub sequences: usize,
    /// MiB of KV pages.
    pub kv_mib: usize,
    /// Share of the pages one tenant's prefix cache may keep.
    pub prefix_cache_share: f64,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            threads: 0,
            rows_per_step: 256,
            prefill_chunk: 256,
            prefill_stretch: 1.0,
            sequences: 64,
            kv_mib: 512,
            prefix_cache_share: 0.25,
        }
    }
}

/// `[clients]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Clients {
    /// Connections open at once on a port.
    pub connections: usize,
    /// Of these, from one address.
    pub connections_per_address: usize,
    /// MiB of request bodies being read at once.
    pub bodies_mib: usize,
}

impl Default for Clients {
    fn default() -> Self {
        Self { connections: 4096, connections_per_address: 1024, bodies_mib: 256 }
    }
}

/// `[adapters]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Adapters {
    /// Adapters in engine memory at once.
    pub slots: usize,
    /// MiB of engine memory for adapters.
    pub engine_mib: usize,
    /// MiB of checked adapter files kept in memory.
    pub host_mib: usize,
    /// MiB of adapter files on disk.
    pub disk_mib: usize,
    /// Where all nodes find adapter files: a folder, `file:///…`, `s3://bucket/prefix`, or empty.
    pub objects: String,
    /// Largest rank.
    pub rank_max: usize,
    /// Largest adapter file in MiB.
    pub file_mib_max: usize,
    /// Loads at once.
    pub loads_at_once: usize,
}

impl Default for Adapters {
    fn default() -> Self {
        Self {
            slots: 16,
            engine_mib: 1024,
            host_mib: 512,
            disk_mib: 10_240,
            objects: ".tenantry/objects".to_owned(),
            rank_max: 256,
            file_mib_max: 512,
            loads_at_once: 2,
        }
    }
}

/// `[queue]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Queue {
    /// Requests that may wait on a node, for each base.
    pub depth_total: usize,
    /// Of these, of one tenant.
    pub depth_tenant: u32,
    /// Virtual tokens per prompt token.
    pub prefill_weight: u32,
    /// Virtual tokens per answer token.
    pub decode_weight: u32,
    /// Virtual tokens that may pass a request waiting for a slot.
    pub pass_tokens_max: u64,
}

impl Default for Queue {
    fn default() -> Self {
        Self { depth_total: 10_000, depth_tenant: 1000, prefill_weight: 1, decode_weight: 2, pass_tokens_max: 4096 }
    }
}

/// `[tiers]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(from = "TiersPatch")]
pub struct Tiers {
    /// Fully shared.
    pub shared: TierTable,
    /// Shared with a reserve.
    pub premium: TierTable,
    /// Own class.
    pub isolated: TierTable,
}

/// `[tiers.shared]` and its siblings: weight and reserve of the class, and default limits of its tenants.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TierTable {
    /// Weight of the class against the others.
    pub weight: u32,
    /// Share of step time kept for the class while it has work.
    pub reserve: f64,
    /// Sequences a tenant may run at once.
    pub concurrency: u32,
    /// Requests that may wait per task.
    pub queue_depth: u32,
    /// Seconds from admission to the last token.
    pub deadline_s: u32,
    /// Requests per minute.
    pub requests_per_minute: u32,
    /// Prompt and reserved answer tokens per minute.
    pub tokens_per_minute: u32,
    /// Requests that may come at once.
    pub burst_requests: u32,
}

impl Default for Tiers {
    fn default() -> Self {
        let shared = TierTable {
            weight: 1,
            reserve: 0.0,
            concurrency: 8,
            queue_depth: 64,
            deadline_s: 120,
            requests_per_minute: 600,
            tokens_per_minute: 1_000_000,
            burst_requests: 64,
        };
        let premium = TierTable {
            weight: 4,
            reserve: 0.0,
            concurrency: 16,
            queue_depth: 128,
            requests_per_minute: 3000,
            tokens_per_minute: 5_000_000,
            burst_requests: 128,
            ..shared.clone()
        };
        let isolated = TierTable { weight: 4, ..premium.clone() };
        Self { shared, premium, isolated }
    }
}

/// `[tiers]` as written: what is left out keeps the default of its tier.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TiersPatch {
    shared: TierPatch,
    premium: TierPatch,
    isolated: TierPatch,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct TierPatch {
    weight: Option<u32>,
    reserve: Option<f64>,
    concurrency: Option<u32>,
    queue_depth: Option<u32>,
    deadline_s: Option<u32>,
    requests_per_minute: Option<u32>,
    tokens_per_minute: Option<u32>,
    burst_requests: Option<u32>,
}

impl TierPatch {
    fn over(self, default: TierTable) -> TierTable {
        TierTable {
            weight: self.weight.unwrap_or(default.weight),
            reserve: self.reserve.unwrap_or(default.reserve),
            concurrency: self.concurrency.unwrap_or(default.concurrency),
            queue_depth: self.queue_depth.unwrap_or(default.queue_depth),
            deadline_s: self.deadline_s.unwrap_or(default.deadline_s),
            requests_per_minute: self.requests_per_minute.unwrap_or(default.requests_per_minute),
            tokens_per_minute: self.tokens_per_minute.unwrap_or(default.tokens_per_minute),
            burst_requests: self.burst_requests.unwrap_or(default.burst_requests),
        }
    }
}

impl From<TiersPatch> for Tiers {
    fn from(patch: TiersPatch) -> Self {
        let default = Self::default();
        Self {
            shared: patch.shared.over(default.shared),
            premium: patch.premium.over(default.premium),
            isolated: patch.isolated.over(default.isolated),
        }
    }
}

/// `[tls]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// PEM certificate chain; re-read on SIGHUP and when the file changes.
    pub certificate: PathBuf,
    /// PEM private key.
    pub key: PathBuf,
}
