//! The cluster's configuration: one validated, immutable value that every node builds from the same file.
//!
//! [`mod@file`] mirrors `cluster.toml` key for key and holds the defaults; [`ClusterConfig::load`] checks every
//! value before a port opens and names file, line, key, value and what would be allowed. Tenants are not
//! configuration: they live in the registry.

pub mod file;
mod nodes;

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::id::{BaseName, NodeId};
use crate::tenant::{Limits, Tier};
use file::ClusterFile;

pub use nodes::NodeConfig;

/// One mistake in the configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file.
    pub path: PathBuf,
    /// 1-based line, when the key is in the file.
    pub line: Option<usize>,
    /// What is wrong, with the value found and the values allowed.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path.display())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        write!(f, ": {}\n  hint: {}", self.message, self.hint)
    }
}

impl std::error::Error for ConfigError {}

/// A base model that nodes load at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseConfig {
    /// Name that requests and adapter names use.
    pub name: BaseName,
    /// GGUF file or Hugging Face directory.
    pub path: PathBuf,
    /// True for f32 activations and KV, false for int8 and f16.
    pub exact: bool,
    /// Folder for a packed copy of the weights.
    pub panels: Option<PathBuf>,
    /// Other names under which adapters may declare this base.
    pub aliases: Vec<String>,
}

/// Sizes of the engine; one engine per base.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Compute threads, at least 1.
    pub threads: usize,
    /// Most rows (tokens) in one step.
    pub rows_per_step: usize,
    /// Most prompt rows in one step.
    pub prefill_chunk: usize,
    /// How much prompts may prolong a step that also decodes, in times of what it takes without them.
    pub prefill_stretch: f64,
    /// Most sequences running at once.
    pub sequences: usize,
    /// Bytes of KV pages.
    pub kv_bytes: usize,
    /// Share of the KV pages that one tenant's prefix cache may keep, 0 turns the cache off.
    pub prefix_cache_share: f64,
    /// Share of step time reserved for a class while it has work, in the order of [`Tier::ALL`].
    pub reserves: [f64; 3],
}

/// What clients may cost a port before a request exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClientsConfig {
    /// Connections open at once on a port.
    pub connections: usize,
    /// Of these, from one address.
    pub connections_per_address: usize,
    /// Bytes of request bodies being read at once.
    pub body_bytes: usize,
}

/// Where all nodes find adapter files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ObjectsAt {
    /// A folder that they share.
    Folder(PathBuf),
    /// A bucket: `s3://bucket/prefix`.
    S3(String),
}

/// Budgets of the adapter cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterConfig {
    /// Adapters resident in engine memory at once.
    pub slots: usize,
    /// Bytes of engine memory for them.
    pub engine_bytes: usize,
    /// Bytes of checked files kept in host memory.
    pub host_bytes: usize,
    /// Bytes of adapter files on this node's disk.
    pub disk_bytes: u64,
    /// What that disk is a cache of; `None` when it is all there is.
    pub objects: Option<ObjectsAt>,
    /// Largest rank accepted.
    pub rank_max: usize,
    /// Largest file accepted.
    pub file_bytes_max: usize,
    /// Loads that may run at once.
    pub loads_at_once: usize,
}

/// The fair queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueueConfig {
    /// Requests that may wait on this node in all.
    pub depth_total: usize,
    /// Requests of one tenant that may wait on this node, on all its tasks.
    pub depth_tenant: u32,
    /// Weight of a class, in the order of [`Tier::ALL`].
    pub class_weights: [u32; 3],
    /// Cost of a prompt token in virtual tokens.
    pub prefill_weight: u32,
    /// Cost of an answer token in virtual tokens.
    pub decode_weight: u32,
    /// Virtual tokens that requests with resident adapters may use while passing one that waits for a slot.
    pub pass_tokens_max: u64,
}

/// Transport security of the client and admin ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsConfig {
    /// PEM certificate chain.
    pub certificate: PathBuf,
    /// PEM private key.
    pub key: PathBuf,
}

/// A validated configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct ClusterConfig {
    /// Cluster name.
    pub name: String,
    /// Nodes, in file order.
    pub nodes: Vec<NodeConfig>,
    /// Base models, in file order; the first is the default.
    pub bases: Vec<BaseConfig>,
    /// Engine sizes.
    pub engine: EngineConfig,
    /// What clients may cost before a request exists.
    pub clients: ClientsConfig,
    /// Adapter budgets.
    pub adapters: AdapterConfig,
    /// Queue policy.
    pub queue: QueueConfig,
    /// Default limits of a new tenant by tier, in the order of [`Tier::ALL`].
    pub tier_limits: [Limits; 3],
    /// TLS; `None` serves plain HTTP.
    pub tls: Option<TlsConfig>,
    /// How long running requests may go on after SIGTERM.
    pub drain: Duration,
    /// Folder of the cluster's certificate authority.
    pub ca: PathBuf,
    /// Time between two heartbeats of a node.
    pub heartbeat: Duration,
}

impl ClusterConfig {
    /// Reads and validates `path`. Relative paths inside are relative to the file; `~/` is the home directory.
    ///
    /// # Errors
    /// The first mistake found, with its line.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            path: path.to_owned(),
            line: None,
            message: format!("cannot read the file: {error}"),
            hint: "name the cluster file with --config; a commented one is in the repository as cluster.toml".into(),
        })?;
        Self::parse(&text, path)
    }

    /// As [`Self::load`], from text; `path` serves messages and relative paths.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let file: ClusterFile = toml::from_str(text).map_err(|error| ConfigError {
            path: path.to_owned(),
            line: error.span().map(|span| line_at(text, span.start)),
            message: error.message().replace('\n', " "),
            hint: "every key is described in the repository's cluster.toml".into(),
        })?;
        Checker { text, path }.check(file)
    }

    /// The settings of one node.
    pub fn node(&self, name: &NodeId) -> Option<&NodeConfig> {
        self.nodes.iter().find(|node| node.name == *name)
    }

    /// Default limits of a tier.
    pub fn limits(&self, tier: Tier) -> Limits {
        self.tier_limits[tier as usize]
    }
}

fn line_at(text: &str, offset: usize) -> usize {
    1 + text.as_bytes().iter().take(offset).filter(|&&byte| byte == b'\n').count()
}

/// Turns the file's values into checked ones; knows the text only to name lines.
struct Checker<'a> {
    text: &'a str,
    path: &'a Path,
}

// === impl Checker ===

impl Checker<'_> {
    fn check(&self, file: ClusterFile) -> Result<ClusterConfig, ConfigError> {
        let ClusterFile { cluster, nodes, bases, engine, clients, adapters, queue, tiers, tls, insecure } = file;
        let tls = tls.map(|tls| TlsConfig { certificate: self.resolve(&tls.certificate), key: self.resolve(&tls.key) });
        let bases = self.bases(bases)?;
        let nodes = self.nodes(nodes, &bases, tls.is_some() || insecure)?;
        let n_nodes = nodes.len();
        let reserves = [tiers.shared.reserve, tiers.premium.reserve, tiers.isolated.reserve];
        for (tier, reserve) in Tier::ALL.into_iter().zip(reserves) {
            self.fraction(&["tiers", tier.as_str(), "reserve"], reserve, 0.95)?;
        }
        if reserves.iter().sum::<f64>() > 0.95 {
            return Err(self.wrong(
                &["tiers"],
                format!("the reserves of the tiers add up to {:.2}", reserves.iter().sum::<f64>()),
                "keep the sum at 0.95 or below, so that every tier makes progress",
            ));
        }
        let class_weights = [tiers.shared.weight, tiers.premium.weight, tiers.isolated.weight];
        for (tier, weight) in Tier::ALL.into_iter().zip(class_weights) {
            self.range(&["tiers", tier.as_str(), "weight"], weight as usize, 1, 1000)?;
        }
        let drain_s = self.range(&["cluster", "drain_s"], cluster.drain_s as usize, 0, 3600)?;
        // Below 20 ms a busy machine misses beats; above 10 s nobody would call it a failure detector.
        let heartbeat_ms = self.range(&["cluster", "heartbeat_ms"], cluster.heartbeat_ms as usize, 20, 10_000)?;
        Ok(ClusterConfig {
            name: cluster.name,
            nodes,
            bases,
            engine: self.engine(&engine, reserves)?,
            clients: self.clients(&clients)?,
            adapters: self.adapters(&adapters, n_nodes)?,
            queue: self.queue(&queue, class_weights)?,
            tier_limits: [
                self.limits(Tier::Shared, &tiers.shared)?,
                self.limits(Tier::Premium, &tiers.premium)?,
                self.limits(Tier::Isolated, &tiers.isolated)?,
            ],
            tls,
            drain: Duration::from_secs(drain_s as u64),
            ca: self.resolve(&cluster.ca),
            heartbeat: Duration::from_millis(heartbeat_ms as u64),
        })
    }

    fn bases(&self, bases: Vec<file::Base>) -> Result<Vec<BaseConfig>, ConfigError> {
        if bases.is_empty() {
            return Err(self.wrong(
                &["bases"],
                "no base model is listed".into(),
                "add a [[bases]] table with name and path",
            ));
        }
        let mut names = BTreeSet::new();
        let mut checked = Vec::new();
        for base in bases {
            if !names.insert(base.name.clone()) {
                return Err(self.wrong(
                    &["bases"],
                    format!("two bases are named {}", base.name),
                    "give every base its own name",
                ));
            }
            let exact = match base.numerics.as_str() {
                "exact" => true,
                "fast" => false,
                other => {
                    return Err(self.wrong(
                        &["bases"],
                        format!("numerics of base {} is {other:?}", base.name),
                        "use \"fast\" (int8 activations) or \"exact\" (f32)",
                    ));
                }
            };
            let panels = Some(&base.panels).filter(|folder| !folder.as_os_str().is_empty());
            checked.push(BaseConfig {
                name: base.name,
                path: self.resolve(&base.path),
                exact,
                panels: panels.map(|folder| self.resolve(folder)),
                aliases: base.aliases,
            });
        }
        Ok(checked)
    }

    fn engine(&self, engine: &file::Engine, reserves: [f64; 3]) -> Result<EngineConfig, ConfigError> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.range(&["engine", "threads"], engine.threads, 0, 256)?;
        let rows_per_step = self.range(&["engine", "rows_per_step"], engine.rows_per_step, 16, 8192)?;
        let prefill_chunk = self.range(&["engine", "prefill_chunk"], engine.prefill_chunk, 16, 8192)?;
        let sequences = self.range(&["engine", "sequences"], engine.sequences, 1, 4096)?;
        if sequences > rows_per_step {
            return Err(self.wrong(
                &["engine", "sequences"],
                format!("{sequences} sequences cannot each have a row in a step of {rows_per_step} rows"),
                "lower engine.sequences or raise engine.rows_per_step",
            ));
        }
        self.fraction(&["engine", "prefill_stretch"], engine.prefill_stretch, 100.0)?;
        self.fraction(&["engine", "prefix_cache_share"], engine.prefix_cache_share, 1.0)?;
        Ok(EngineConfig {
            threads: if threads == 0 { cores } else { threads },
            rows_per_step,
            prefill_chunk: prefill_chunk.min(rows_per_step),
            prefill_stretch: engine.prefill_stretch,
            sequences,
            kv_bytes: self.range(&["engine", "kv_mib"], engine.kv_mib, 8, 4 << 20)? << 20,
            prefix_cache_share: engine.prefix_cache_share,
            reserves,
        })
    }

    fn clients(&self, clients: &file::Clients) -> Result<ClientsConfig, ConfigError> {
        let connections = self.range(&["clients", "connections"], clients.connections, 1, 1_000_000)?;
        let key = ["clients", "connections_per_address"];
        let connections_per_address = self.range(&key, clients.connections_per_address, 1, connections)?;
        // One tenant may hold a quarter: the smallest budget lets it send one body of 1 MiB.
        let body_bytes = self.range(&["clients", "bodies_mib"], clients.bodies_mib, 4, 1 << 20)? << 20;
        Ok(ClientsConfig { connections, connections_per_address, body_bytes })
    }

    fn adapters(&self, adapters: &file::Adapters, n_nodes: usize) -> Result<AdapterConfig, ConfigError> {
        Ok(AdapterConfig {
            slots: self.range(&["adapters", "slots"], adapters.slots, 1, 65_536)?,
            engine_bytes: self.range(&["adapters", "engine_mib"], adapters.engine_mib, 1, 4 << 20)? << 20,
            host_bytes: self.range(&["adapters", "host_mib"], adapters.host_mib, 0, 4 << 20)? << 20,
            disk_bytes: (self.range(&["adapters", "disk_mib"], adapters.disk_mib, 1, 1 << 30)? as u64) << 20,
            objects: self.objects(&adapters.objects, n_nodes)?,
            rank_max: self.range(&["adapters", "rank_max"], adapters.rank_max, 1, 256)?,
            file_bytes_max: self.range(&["adapters", "file_mib_max"], adapters.file_mib_max, 1, 512)? << 20,
            loads_at_once: self.range(&["adapters", "loads_at_once"], adapters.loads_at_once, 1, 64)?,
        })
    }

    fn objects(&self, found: &str, n_nodes: usize) -> Result<Option<ObjectsAt>, ConfigError> {
        if found.is_empty() && n_nodes > 1 {
            return Err(self.wrong(
                &["adapters", "objects"],
                format!("adapters.objects is empty, and there are {n_nodes} nodes"),
                "name a folder that all nodes share or an s3://bucket/prefix: any node must find any adapter",
            ));
        }
        if found.is_empty() {
            return Ok(None);
        }
        let is_bucket = |rest: &str| rest.split('/').next().is_some_and(|bucket| !bucket.is_empty());
        match found.split_once("://") {
            None => Ok(Some(ObjectsAt::Folder(self.resolve(Path::new(found))))),
            Some(("file", folder)) if folder.starts_with('/') => Ok(Some(ObjectsAt::Folder(folder.into()))),
            Some(("s3", rest)) if is_bucket(rest) => Ok(Some(ObjectsAt::S3(found.to_owned()))),
            Some(_) => Err(self.wrong(
                &["adapters", "objects"],
                format!("adapters.objects is {found:?}"),
                "name a folder, file:///folder or s3://bucket/prefix",
            )),
        }
    }

    fn queue(&self, queue: &file::Queue, class_weights: [u32; 3]) -> Result<QueueConfig, ConfigError> {
        Ok(QueueConfig {
            depth_total: self.range(&["queue", "depth_total"], queue.depth_total, 1, 1_000_000)?,
            depth_tenant: self.range(&["queue", "depth_tenant"], queue.depth_tenant as usize, 1, 1_000_000)? as u32,
            class_weights,
            prefill_weight: self.range(&["queue", "prefill_weight"], queue.prefill_weight as usize, 1, 100)? as u32,
            decode_weight: self.range(&["queue", "decode_weight"], queue.decode_weight as usize, 1, 100)? as u32,
            pass_tokens_max: self.range(&["queue", "pass_tokens_max"], queue.pass_tokens_max as usize, 0, 10_000_000)?
                as u64,
        })
    }

    fn limits(&self, tier: Tier, found: &file::TierTable) -> Result<Limits, ConfigError> {
        let name = tier.as_str();
        // The registry's own bounds: a default beyond them would let no tenant of the class be created.
        let count = |key: &str, value: u32, min: usize, max: usize| {
            self.range(&["tiers", name, key], value as usize, min, max).map(|value| value as u32)
        };
        Ok(Limits {
            concurrency: count("concurrency", found.concurrency, 1, 4096)?,
            queue_depth: count("queue_depth", found.queue_depth, 0, 100_000)?,
            deadline_ms: u64::from(count("deadline_s", found.deadline_s, 1, 24 * 3600)?) * 1000,
            requests_per_minute: count("requests_per_minute", found.requests_per_minute, 1, 10_000_000)?,
            tokens_per_minute: count("tokens_per_minute", found.tokens_per_minute, 1, u32::MAX as usize)?,
            burst_requests: count("burst_requests", found.burst_requests, 1, 1_000_000)?,
        })
    }

    fn range(&self, key: &[&str], found: usize, min: usize, max: usize) -> Result<usize, ConfigError> {
        if (min..=max).contains(&found) {
            return Ok(found);
        }
        Err(self.wrong(key, format!("{} is {found}", key.join(".")), &format!("use a number from {min} to {max}")))
    }

    fn fraction(&self, key: &[&str], found: f64, max: f64) -> Result<(), ConfigError> {
        if (0.0..=max).contains(&found) {
            return Ok(());
        }
        Err(self.wrong(key, format!("{} is {found}", key.join(".")), &format!("use a number from 0 to {max}")))
    }

    fn wrong(&self, key: &[&str], message: String, hint: &str) -> ConfigError {
        ConfigError { path: self.path.to_owned(), line: self.line_of(key), message, hint: hint.to_owned() }
    }

    /// Line of the innermost part of `key` that stands in the file; a number picks one of an array of tables.
    fn line_of(&self, key: &[&str]) -> Option<usize> {
        use toml::de::DeValue;
        let document = toml::de::DeTable::parse(self.text).ok()?;
        let mut table = document.get_ref();
        let mut line = None;
        let mut parts = key.iter();
        while let Some(part) = parts.next() {
            let Some((name, value)) = table.iter().find(|(name, _)| name.get_ref() == part) else { break };
            line = Some(line_at(self.text, name.span().start));
            match value.get_ref() {
                DeValue::Table(inner) => table = inner,
                DeValue::Array(tables) => {
                    let element = parts.next().and_then(|number| tables.get(number.parse::<usize>().ok()?));
                    let Some(element) = element else { break };
                    line = Some(line_at(self.text, element.span().start));
                    let DeValue::Table(inner) = element.get_ref() else { break };
                    table = inner;
                }
                _ => break,
            }
        }
        line
    }

    fn resolve(&self, path: &Path) -> PathBuf {
        let home = std::env::var_os("HOME").map(PathBuf::from);
        if let (Ok(rest), Some(home)) = (path.strip_prefix("~"), home) {
            return home.join(rest);
        }
        self.path.parent().unwrap_or(Path::new(".")).join(path)
    }
}

#[cfg(test)]
mod tests;
