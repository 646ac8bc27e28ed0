//! The conversation over the client library: whichever node answers, and another one when that dies.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use client::{Client, ClientConfig, Endpoint, Event, NodeAddress};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::Value;
use shared::config::{ClusterConfig, NodeConfig};
use tokio::runtime::Runtime;

/// A client of the cluster and what drives it.
pub(super) struct Quic {
    runtime: Runtime,
    client: Client,
}

// === impl Quic ===

impl Quic {
    /// A client of the nodes in the cluster file. `ca` is whom to believe; the cluster's own authority when left out.
    pub(super) fn new(config: &Path, ca: Option<&Path>, key: String) -> anyhow::Result<Self> {
        let config = ClusterConfig::load(config)?;
        let name = |node: &NodeConfig| match &config.tls {
            Some(_) => node.http.ip().to_string(),
            None => peer::pki::node_name(&node.name),
        };
        let nodes = config.nodes.iter();
        let nodes: Vec<_> =
            nodes.filter_map(|node| Some(NodeAddress { address: node.clients_quic?, name: name(node) })).collect();
        if nodes.is_empty() {
            bail!("find a node to ask over QUIC: none has clients_quic in the cluster file");
        }
        let places = std::iter::once(&config.ca).chain(config.nodes.iter().map(|node| &node.data));
        let known = || places.map(|folder| folder.join("ca.pem")).find(|path| path.exists());
        let ca: PathBuf = ca.map(Path::to_owned).or_else(known).context(
            "find whom to believe: no ca.pem is on this machine; hint: --ca with a copy of the cluster's ca.pem",
        )?;
        let root = CertificateDer::from_pem_file(&ca).with_context(|| format!("read {}", ca.display()))?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
        let entered = runtime.enter();
        let client = Client::new(ClientConfig { nodes, key, roots: vec![root] })?;
        drop(entered);
        Ok(Self { runtime, client })
    }

    /// Calls `show` with every piece of text of a chat answer and returns the whole.
    pub(super) fn each_delta(
        &self,
        body: &Value,
        mut show: impl FnMut(&str) -> std::io::Result<()>,
    ) -> anyhow::Result<String> {
        self.runtime.block_on(async {
            let mut stream = self.client.ask(Endpoint::Chat, body.to_string().into_bytes());
            let mut text = String::new();
            while let Some(event) = stream.next().await.context("finish the answer")? {
                let Event::Piece(piece) = event else { continue };
                let event: Value = serde_json::from_slice(&piece.json).context("understand the answer")?;
                if let Some(delta) = event["choices"][0]["delta"]["content"].as_str() {
                    show(delta).context("write to the terminal")?;
                    text.push_str(delta);
                }
            }
            Ok(text)
        })
    }
}
