//! The disk as a cache of the object store: fetch what is missing, make room for it.
//!
//! A fetched file is sealed bytes from somewhere else: it is opened with the tenant's key, and its content hashed,
//! before it gets its name. What is cut short, changed or another adapter's is never visible. Several loads may fetch
//! the same object at once; the last one's name stays, and all are the same.

use std::fs::{self, File, FileTimes};
use std::io::{Seek as _, SeekFrom};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use shared::adapter::AdapterRef;
use shared::clock::{Clock as _, SystemClock};
use shared::seal::TenantKey;

use super::incoming::Tmp;
use super::{Store, StoreError, for_each_object, io_error, read_object};
use crate::loader::HostFiles;
use crate::objects::{Objects, ObjectsError};

/// Bytes of a sealed adapter: the largest file that the configuration can allow, and its seal.
const SEALED_BYTES_MAX: u64 = (512 << 20) + (16 << 20);

impl Store {
    /// Fetches an adapter and keeps it.
    pub(super) fn fetch(
        &self,
        objects: &Objects,
        key: &TenantKey,
        adapter: &AdapterRef,
    ) -> Result<HostFiles, StoreError> {
        let hash = adapter.hash;
        let failed = |source| match source {
            ObjectsError::NotFound => StoreError::NotFound { hash },
            source => StoreError::Objects { hash, source },
        };
        let id = adapter.id();
        let expected = objects.size(&id).map_err(failed)?.min(SEALED_BYTES_MAX);
        let (mut tmp, mut file) = Tmp::create(self)?;
        self.reserve(expected)?;
        tmp.reserved_bytes = expected;
        let n_bytes = objects.get(&id, expected, &mut file).map_err(failed)?;
        file.sync_all().map_err(io_error("sync", &tmp.path)).map_err(|error| self.full_or(error, expected))?;
        file.seek(SeekFrom::Start(0)).map_err(io_error("rewind", &tmp.path))?;
        let files = read_object(&mut file, n_bytes, key, adapter, &tmp.path)?;
        if n_bytes != expected || files.files().content_hash() != hash {
            return Err(StoreError::Damaged { hash, what: "content hash" });
        }
        tmp.publish(adapter)?;
        tracing::info!(tenant_id = %adapter.tenant, hash = %hash.short(), n_bytes, "adapter fetched from the object store");
        Ok(files)
    }

    /// Lets go of the longest unused objects until `n_bytes` more fit. Whether they may fit now. Nothing goes that
    /// the object store does not hold.
    pub(super) fn make_room(&self, n_bytes: u64) -> Result<bool, StoreError> {
        let Some(objects) = &self.0.objects else { return Ok(false) };
        let mut found: Vec<(SystemTime, PathBuf, u64)> = Vec::new();
        for_each_object(&self.0.dir.join("objects"), |path, meta| {
            found.push((meta.modified().unwrap_or(UNIX_EPOCH), path.to_owned(), meta.len()));
            Ok(())
        })?;
        found.sort_unstable();
        for (_, path, bytes) in found {
            if self.used_bytes().saturating_add(n_bytes) <= self.budget_bytes() {
                break;
            }
            let name = path.file_name().and_then(|name| name.to_str());
            let is_kept = name.is_some_and(|name| objects.size_of(name).is_ok_and(|kept| kept == bytes));
            if !is_kept {
                continue;
            }
            let _names = self.0.names.lock();
            // Gone already: somebody deleted it, and counted it.
            if fs::remove_file(&path).is_ok() {
                self.forget(bytes);
            }
        }
        Ok(self.used_bytes().saturating_add(n_bytes) <= self.budget_bytes())
    }

    /// Puts objects of this disk that the object store lacks into it: those that were uploaded before there was one.
    /// How many.
    ///
    /// # Errors
    /// [`StoreError::Io`], and what the object store says as text in the log.
    pub fn share(&self) -> Result<usize, StoreError> {
        let Some(objects) = &self.0.objects else { return Ok(0) };
        let mut shared = 0;
        for_each_object(&self.0.dir.join("objects"), |path, _| {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return Ok(()) };
            if !matches!(objects.size_of(name), Err(ObjectsError::NotFound)) {
                return Ok(());
            }
            let mut file = File::open(path).map_err(io_error("open", path))?;
            match objects.put_as(name, &mut file) {
                Ok(()) => shared += 1,
                Err(error) => tracing::error!(object = name, %error, "adapter could not be put into the object store"),
            }
            Ok(())
        })?;
        Ok(shared)
    }
}

/// Notes the use, for [`Store::make_room`]. Best effort: a wrong order only costs a fetch.
pub(super) fn mark_used(file: &File) {
    let now = UNIX_EPOCH + SystemClock.wall();
    let _ = file.set_times(FileTimes::new().set_modified(now));
}
