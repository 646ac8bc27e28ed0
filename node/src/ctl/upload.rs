//! An adapter folder or file as a multipart form, and small private files for keys.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};
use model::adapter::AdapterFiles;
use serde_json::Value;
use shared::id::AdapterName;

use crate::client::Client;

/// A multipart form with an adapter's files as parts: `config` and `weights`, or `gguf`. Files of hundreds of MiB are
/// held once.
pub(super) struct Form {
    boundary: String,
    body: Vec<u8>,
}

// === impl Form ===

impl Form {
    /// Reads a PEFT folder or a GGUF file.
    pub(super) fn from_path(path: &Path) -> anyhow::Result<Self> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        if !path.is_dir() {
            return Self::new(AdapterFiles::Gguf(read(path)?));
        }
        let (config, weights) = (path.join("adapter_config.json"), path.join("adapter_model.safetensors"));
        if !weights.exists() && path.join("adapter_model.bin").exists() {
            bail!("upload {}: it holds a pickle file; hint: save it with safe_serialization=True", path.display());
        }
        Self::new(AdapterFiles::Peft { config: read(&config)?, weights: read(&weights)? })
    }

    /// A form of these files.
    pub(super) fn new(files: AdapterFiles) -> anyhow::Result<Self> {
        // Chosen after the content: none can contain it, by accident or design.
        let mut random = [0_u8; 16];
        getrandom::fill(&mut random).map_err(|error| anyhow::anyhow!("{error}")).context("draw random bytes")?;
        let mut form = Self { boundary: format!("tenantry-{:032x}", u128::from_le_bytes(random)), body: Vec::new() };
        match files {
            AdapterFiles::Gguf(bytes) => form.push("gguf", bytes),
            AdapterFiles::Peft { config, weights } => {
                form.push("weights", weights);
                form.push("config", config);
            }
        }
        let end = format!("--{}--\r\n", form.boundary);
        form.body.extend_from_slice(end.as_bytes());
        Ok(form)
    }

    /// The first and largest part is taken as the body's own bytes.
    fn push(&mut self, name: &str, mut bytes: Vec<u8>) {
        let head = format!(
            "--{}\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"{name}\"\r\ncontent-type: application/octet-stream\r\n\r\n",
            self.boundary
        );
        if self.body.is_empty() {
            bytes.splice(..0, head.into_bytes());
            self.body = bytes;
        } else {
            self.body.extend_from_slice(head.as_bytes());
            self.body.extend_from_slice(&bytes);
        }
        self.body.extend_from_slice(b"\r\n");
    }

    /// Uploads the form as version `name`; what the node answers.
    pub(super) fn send(&self, client: &Client, name: &AdapterName) -> anyhow::Result<Value> {
        let target = format!("/admin/v1/tenants/{}/adapters/{name}", name.client);
        client.send_bytes("PUT", &target, &format!("multipart/form-data; boundary={}", self.boundary), &self.body)
    }
}

/// A new, empty file that only its owner can read.
pub(super) fn create_private(path: &Path) -> anyhow::Result<fs::File> {
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("create the key file {}", path.display()))
}

/// Writes one line.
pub(super) fn write_line(mut file: fs::File, text: &str) -> anyhow::Result<()> {
    writeln!(file, "{text}").context("write the key file")
}
