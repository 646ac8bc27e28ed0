//! The way into the store: an adapter is sealed while it arrives, read back for its check, and named last.
//!
//! ```text
//! Incoming ── finish: fsync ──► Received ── publish: object store, rename, fsync of the folder ──► object
//! ```
//! Memory: one segment, whatever the size of the file. Nothing is visible before [`Received::publish`]; whoever drops
//! one earlier, or dies, leaves at most a file in `tmp/`, which is never read and goes at the next open. Whether the
//! bytes are an adapter is for the caller to check between the two steps.

use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use model::adapter::{AdapterFiles, ContentHasher};
use shared::adapter::AdapterRef;
use shared::id::TenantId;
use shared::seal::TenantKey;
use shared::seal::object::{HEADER_BYTES, SEGMENT_BYTES, Sealer};
use zeroize::Zeroizing;

use super::{Store, StoreError, io_error, read_object, sync_parent};
use crate::bundle;
use crate::loader::HostFiles;

/// A file in `tmp/` and its part of the budget; both go when it is dropped.
pub(super) struct Tmp {
    pub(super) store: Store,
    pub(super) path: PathBuf,
    pub(super) reserved_bytes: u64,
    published: bool,
}

impl Tmp {
    /// An empty one and its file.
    pub(super) fn create(store: &Store) -> Result<(Self, fs::File), StoreError> {
        let number = store.0.next_tmp.fetch_add(1, Ordering::Relaxed);
        let path = store.0.dir.join("tmp").join(number.to_string());
        let mut options = fs::OpenOptions::new();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options.open(&path).map_err(io_error("create", &path)).map_err(|error| store.full_or(error, 0))?;
        Ok((Self { store: store.clone(), path, reserved_bytes: 0, published: false }, file))
    }

    /// Gives it its name; durable when this returns.
    pub(super) fn publish(mut self, adapter: &AdapterRef) -> Result<(), StoreError> {
        let path = self.store.object_path(&adapter.id());
        self.store.rename(&self.path, &path)?;
        self.published = true;
        sync_parent(&path)
    }
}

impl Drop for Tmp {
    fn drop(&mut self) {
        if !self.published {
            self.store.forget(self.reserved_bytes);
            // Best effort: what stays is removed at the next open.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// An adapter on its way in: the weights, or the GGUF file, come first, piece by piece.
pub struct Incoming {
    tmp: Tmp,
    file: fs::File,
    tenant: TenantId,
    sealer: Sealer,
    hasher: ContentHasher,
    /// Plaintext that does not fill a segment yet.
    segment: Zeroizing<Vec<u8>>,
}

impl Store {
    /// Begins an object of `tenant`.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Full`].
    pub fn receive(&self, key: &TenantKey, tenant: &TenantId) -> Result<Incoming, StoreError> {
        let (tmp, file) = Tmp::create(self)?;
        let mut incoming = Incoming {
            tmp,
            file,
            tenant: tenant.clone(),
            sealer: Sealer::new(key, tenant),
            hasher: ContentHasher::default(),
            segment: Zeroizing::new(Vec::with_capacity(SEGMENT_BYTES + shared::seal::TAG_BYTES)),
        };
        // The header's place; what it says is known at the end.
        incoming.append(&[0; HEADER_BYTES])?;
        Ok(incoming)
    }

    /// Seals and stores an adapter that is in memory; durable when this returns.
    ///
    /// # Errors
    /// As [`Store::receive`].
    pub fn put(&self, key: &TenantKey, tenant: &TenantId, files: &AdapterFiles) -> Result<AdapterRef, StoreError> {
        let mut incoming = self.receive(key, tenant)?;
        let (large, config) = match files {
            AdapterFiles::Peft { config, weights } => (weights, Some(config.as_slice())),
            AdapterFiles::Gguf(bytes) => (bytes, None),
        };
        incoming.write(large)?;
        let received = incoming.finish(key, config)?;
        let adapter = received.adapter().clone();
        received.publish()?;
        Ok(adapter)
    }
}

// === impl Incoming ===

impl Incoming {
    /// Takes the next bytes of the weights or of the GGUF file.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.hasher.update(bytes);
        self.fill(bytes)
    }

    /// Ends the adapter: a PEFT adapter with its configuration, a GGUF file without one. On the disk when this
    /// returns, but not visible.
    ///
    /// # Errors
    /// [`StoreError::Full`], [`StoreError::Io`].
    pub fn finish(mut self, key: &TenantKey, config: Option<&[u8]>) -> Result<Received, StoreError> {
        let hash = std::mem::take(&mut self.hasher).finish(config);
        self.fill(config.unwrap_or_default())?;
        self.fill(&bundle::tail(config))?;
        self.flush()?;
        let Self { tmp, mut file, tenant, sealer, .. } = self;
        let header = sealer.header(key, &tenant, &hash);
        file.seek(SeekFrom::Start(0)).map_err(io_error("rewind", &tmp.path))?;
        file.write_all(&header).map_err(io_error("write", &tmp.path))?;
        let synced = file.sync_all().map_err(io_error("sync", &tmp.path));
        synced.map_err(|error| tmp.store.full_or(error, tmp.reserved_bytes))?;
        Ok(Received { tmp, file, adapter: AdapterRef { tenant, hash } })
    }

    fn fill(&mut self, mut bytes: &[u8]) -> Result<(), StoreError> {
        while !bytes.is_empty() {
            let (now, later) = bytes.split_at(bytes.len().min(SEGMENT_BYTES - self.segment.len()));
            self.segment.extend_from_slice(now);
            bytes = later;
            if self.segment.len() == SEGMENT_BYTES {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Seals and writes what has gathered.
    fn flush(&mut self) -> Result<(), StoreError> {
        if self.segment.is_empty() {
            return Ok(());
        }
        let mut segment = std::mem::take(&mut *self.segment);
        self.sealer.seal_segment(&mut segment);
        let written = self.append(&segment);
        segment.clear();
        *self.segment = segment;
        written
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.tmp.store.reserve(bytes.len() as u64)?;
        self.tmp.reserved_bytes += bytes.len() as u64;
        let written = self.file.write_all(bytes).map_err(io_error("write", &self.tmp.path));
        written.map_err(|error| self.tmp.store.full_or(error, bytes.len() as u64))
    }
}

/// A complete adapter that nobody sees yet.
pub struct Received {
    tmp: Tmp,
    file: fs::File,
    adapter: AdapterRef,
}

// === impl Received ===

impl Received {
    /// What it is.
    pub fn adapter(&self) -> &AdapterRef {
        &self.adapter
    }

    /// Reads it back, as a load will.
    ///
    /// # Errors
    /// As [`Store::read`].
    pub fn read(&mut self, key: &TenantKey) -> Result<HostFiles, StoreError> {
        self.file.seek(SeekFrom::Start(0)).map_err(io_error("rewind", &self.tmp.path))?;
        read_object(&mut self.file, self.tmp.reserved_bytes, key, &self.adapter, &self.tmp.path)
    }

    /// Makes it the tenant's copy of this content, in place of one that may be there: in the object store first, so
    /// that every node can fetch what the registry is about to name. Durable when this returns.
    ///
    /// # Errors
    /// [`StoreError::Objects`], [`StoreError::Io`], [`StoreError::Full`]. It may be visible even so; the caller takes
    /// it back or registers it.
    pub fn publish(mut self) -> Result<(), StoreError> {
        if let Some(objects) = &self.tmp.store.0.objects {
            self.file.seek(SeekFrom::Start(0)).map_err(io_error("rewind", &self.tmp.path))?;
            let put = objects.put(&self.adapter.id(), &mut self.file);
            put.map_err(|source| StoreError::Objects { hash: self.adapter.hash, source })?;
        }
        self.tmp.publish(&self.adapter)
    }
}

impl Store {
    /// Gives a finished file its name; it replaces one that may be there.
    fn rename(&self, tmp: &Path, path: &Path) -> Result<(), StoreError> {
        let shard = path.parent().expect("objects lie in a shard folder");
        let _names = self.0.names.lock();
        if !shard.is_dir() {
            super::create_private(shard)?;
            sync_parent(shard)?;
        }
        let replaced_bytes = fs::symlink_metadata(path).map(|meta| meta.len()).ok();
        fs::rename(tmp, path).map_err(io_error("rename", tmp)).map_err(|error| self.full_or(error, 0))?;
        self.forget(replaced_bytes.unwrap_or(0));
        Ok(())
    }
}
