//! An adapter folder or file as a multipart form, and small private files for keys.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, bail};

/// A form with the adapter's files as parts: `config` and `weights`, or `gguf`.
pub(super) struct Form {
    boundary: String,
    parts: Vec<(&'static str, Vec<u8>)>,
}

// === impl Form ===

impl Form {
    /// Reads a PEFT folder or a GGUF file.
    pub(super) fn from_path(path: &Path) -> anyhow::Result<Self> {
        let read = |path: &Path| fs::read(path).with_context(|| format!("read {}", path.display()));
        let parts = if path.is_dir() {
            let config = path.join("adapter_config.json");
            let weights = path.join("adapter_model.safetensors");
            if !weights.exists() && path.join("adapter_model.bin").exists() {
                bail!("upload {}: it holds a pickle file; hint: save it with safe_serialization=True", path.display());
            }
            vec![("config", read(&config)?), ("weights", read(&weights)?)]
        } else {
            vec![("gguf", read(path)?)]
        };
        Ok(Self { boundary: boundary_for(&parts), parts })
    }

    /// Value of the content-type header.
    pub(super) fn content_type(&self) -> String {
        format!("multipart/form-data; boundary={}", self.boundary)
    }

    /// The encoded form.
    pub(super) fn body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(self.parts.iter().map(|(_, bytes)| bytes.len() + 256).sum());
        for (name, bytes) in &self.parts {
            let head = format!(
                "--{}\r\ncontent-disposition: form-data; name=\"{name}\"; filename=\"{name}\"\r\ncontent-type: application/octet-stream\r\n\r\n",
                self.boundary
            );
            body.extend_from_slice(head.as_bytes());
            body.extend_from_slice(bytes);
            body.extend_from_slice(b"\r\n");
        }
        body.extend_from_slice(format!("--{}--\r\n", self.boundary).as_bytes());
        body
    }
}

/// A boundary that depends on the content, so that the content cannot contain it by accident or design.
fn boundary_for(parts: &[(&'static str, Vec<u8>)]) -> String {
    let mut hasher = blake3::Hasher::new();
    for (_, bytes) in parts {
        hasher.update(bytes);
    }
    format!("tenantry-{}", hasher.finalize().to_hex())
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
