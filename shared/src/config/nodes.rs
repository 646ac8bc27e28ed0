//! The `[[nodes]]` tables: addresses that do not clash, and what makes several nodes a cluster.
//!
//! Called by the checker in `config.rs`. It decides no placement: pools, regions and capacities are only read here.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;

use crate::config::{BaseConfig, Checker, ConfigError, file};
use crate::id::{BaseName, NodeId, PoolName, RegionName};

/// How one node listens, where it keeps its data, and what it takes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// Name.
    pub name: NodeId,
    /// Client port.
    pub http: SocketAddr,
    /// Operator port.
    pub admin: SocketAddr,
    /// Directory for registry, keys, adapters and journals.
    pub data: PathBuf,
    /// UDP port for the other nodes; `None` only for a node alone.
    pub peer: Option<SocketAddr>,
    /// UDP port for clients over QUIC; `None` for none.
    pub clients_quic: Option<SocketAddr>,
    /// Share of the tenants against the other nodes, at least 1.
    pub capacity: u32,
    /// Keeps a copy of the registry that counts for agreement.
    pub registry: bool,
    /// Which group of tenants it serves.
    pub pool: PoolName,
    /// Where it stands.
    pub region: Option<RegionName>,
    /// Base models it loads and computes, in file order, at least one. It takes requests for all of the cluster.
    pub bases: Vec<BaseName>,
}

/// Most nodes whose agreement a registry change waits for: five outlive the loss of two, more only slow it down.
const REGISTRY_NODES_MAX: usize = 5;

// === impl Checker ===

impl Checker<'_> {
    pub(super) fn nodes(
        &self,
        nodes: Vec<file::Node>,
        bases: &[BaseConfig],
        may_leave_loopback: bool,
    ) -> Result<Vec<NodeConfig>, ConfigError> {
        if nodes.is_empty() {
            let hint = "add a [[nodes]] table with name, http, admin and data";
            return Err(self.wrong(&["nodes"], "no node is listed".into(), hint));
        }
        self.names_and_addresses(&nodes, may_leave_loopback)?;
        let n_nodes = nodes.len();
        let mut checked = Vec::new();
        for (index, node) in nodes.into_iter().enumerate() {
            let number = index.to_string();
            if n_nodes > 1 && node.peer.is_none() {
                return Err(self.wrong(
                    &["nodes", &number, "peer"],
                    format!("node {} has no peer address, and there are {n_nodes} nodes", node.name),
                    "give every node peer = \"address:port\"; nodes talk to each other over that UDP port",
                ));
            }
            let capacity = self.range(&["nodes", &number, "capacity"], node.capacity as usize, 1, 100)?;
            checked.push(NodeConfig {
                bases: self.hosted(&node, &number, bases)?,
                name: node.name,
                http: node.http,
                admin: node.admin,
                data: self.resolve(&node.data),
                peer: node.peer,
                clients_quic: node.clients_quic,
                capacity: capacity as u32,
                // Of two neither could change anything without the other: one is enough.
                registry: node
                    .registry
                    .unwrap_or(index < if n_nodes < file::REGISTRY_NODES { 1 } else { file::REGISTRY_NODES }),
                pool: node.pool,
                region: node.region,
            });
        }
        self.registry_nodes(&checked)?;
        Ok(checked)
    }

    /// Names are unique; so is every address among those of its kind (TCP, UDP); plain HTTP stays on loopback.
    fn names_and_addresses(&self, nodes: &[file::Node], may_leave_loopback: bool) -> Result<(), ConfigError> {
        let mut names = BTreeSet::new();
        let mut taken = BTreeSet::new();
        for (index, node) in nodes.iter().enumerate() {
            let name = &node.name;
            let number = index.to_string();
            if !names.insert(name) {
                return Err(self.wrong(
                    &["nodes", &number, "name"],
                    format!("two nodes are named {name}"),
                    "give every node its own name",
                ));
            }
            let listeners = [
                ("tcp", "http", Some(node.http)),
                ("tcp", "admin", Some(node.admin)),
                ("udp", "peer", node.peer),
                ("udp", "clients_quic", node.clients_quic),
            ];
            for (transport, key, address) in listeners {
                let Some(address) = address else { continue };
                if address.port() != 0 && !taken.insert((transport, address)) {
                    return Err(self.wrong(
                        &["nodes", &number, key],
                        format!("address {address} of node {name} is used twice"),
                        "give every listener its own port",
                    ));
                }
                if transport == "tcp" && !address.ip().is_loopback() && !may_leave_loopback {
                    return Err(self.wrong(
                        &["nodes", &number, key],
                        format!("node {name} would listen on {address} without TLS"),
                        "add a [tls] table, listen on 127.0.0.1, or set insecure = true if something in front encrypts",
                    ));
                }
            }
        }
        Ok(())
    }

    /// The bases a node loads: those it lists, all if it lists none.
    fn hosted(&self, node: &file::Node, number: &str, bases: &[BaseConfig]) -> Result<Vec<BaseName>, ConfigError> {
        let known = || bases.iter().map(|base| &base.name);
        let Some(listed) = &node.bases else { return Ok(known().cloned().collect()) };
        let key = ["nodes", number, "bases"];
        if let Some(unknown) = listed.iter().find(|name| !known().any(|base| base == *name)) {
            let message = format!("node {} lists base {unknown}, which has no [[bases]] table", node.name);
            return Err(self.wrong(&key, message, "name bases of this file"));
        }
        let hosted: Vec<BaseName> = known().filter(|name| listed.contains(name)).cloned().collect();
        if hosted.is_empty() {
            let message = format!("node {} lists no base", node.name);
            return Err(self.wrong(&key, message, "name at least one base, or leave the key out to load all"));
        }
        Ok(hosted)
    }

    fn registry_nodes(&self, nodes: &[NodeConfig]) -> Result<(), ConfigError> {
        let n_registry = nodes.iter().filter(|node| node.registry).count();
        if (1..=REGISTRY_NODES_MAX).contains(&n_registry) && n_registry % 2 == 1 {
            return Ok(());
        }
        Err(self.wrong(
            &["nodes"],
            format!("{n_registry} nodes keep the registry"),
            "set registry = true on 1, 3 or 5 nodes; or leave the key out and the first three do",
        ))
    }
}
