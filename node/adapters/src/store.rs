//! Adapter files on disk: sealed, content-addressed, written whole or not at all, verified on every read.
//!
//! ```text
//! <dir>/objects/ab/<adapter id>   sealed bundle
//! <dir>/tmp/                      being written; emptied at open
//! <dir>/quarantine/<adapter id>   damaged, kept for a human: the latest few
//! ```
//! The adapter id is a hash over (tenant, content hash): no path ever contains text that a tenant chose, and
//! two tenants that upload the same bytes hold two objects under two keys, so that erasing one leaves the
//! other. The sealed form tells damage (set the file aside) from a wrong key (leave it alone).
//!
//! With an object store behind it ([`crate::objects`]) the disk is a cache: a new object goes there before it gets its
//! name here, one that is not here is fetched and checked before it gets its name (`fetch`), and the longest unused
//! ones make room.
//!
//! New objects come through [`incoming`]. Files are read into memory, never mapped: a file cut short under a
//! mapping would kill the process. All calls block; the cache's loader and the upload path call them on blocking
//! threads. Which version a name points at is the registry's business.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::adapter::AdapterFiles;
use parking_lot::Mutex;
use shared::adapter::{AdapterId, AdapterRef};
use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::seal::object::{HEADER_BYTES, Opener, SEGMENT_BYTES, sealed_bytes};
use shared::seal::{SealError, TAG_BYTES, TenantKey};

use zeroize::Zeroizing;

use crate::bundle;
use crate::loader::HostFiles;
use crate::objects::{Objects, ObjectsError};

pub mod incoming;
mod fetch;
pub(crate) mod nofollow;
#[cfg(test)]
mod tests;

/// Damaged files kept: enough to study a failing disk, and a bound on what it can fill.
const QUARANTINE_FILES_MAX: usize = 16;

/// Why the store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not in the store under this tenant.
    #[error("adapter {} is not in the store", hash.short())]
    NotFound {
        /// Content asked for.
        hash: ContentHash,
    },
    /// The stored bytes changed; the file was moved to `quarantine/`: upload the adapter again.
    #[error("stored adapter {} is damaged ({what}) and was set aside; hint: upload this version again", hash.short())]
    Damaged {
        /// Content asked for.
        hash: ContentHash,
        /// Which check found it.
        what: &'static str,
    },
    /// Intact, but not readable with this key: the tenant was erased or the cluster key is another one.
    #[error("stored adapter does not open: {0}")]
    Seal(#[source] SealError),
    /// The budget or the disk is full: raise `adapters.disk_mib`, or delete versions.
    #[error(
        "the adapter store is full: {needed_bytes} bytes needed with {used_bytes} of {budget_bytes} in use; hint: delete old versions or raise adapters.disk_mib"
    )]
    Full {
        /// Bytes of the new object.
        needed_bytes: u64,
        /// Bytes of all objects.
        used_bytes: u64,
        /// The budget.
        budget_bytes: u64,
    },
    /// The object store failed: see adapters.objects, and whether it can be reached.
    #[error("adapter {}: {source}", hash.short())]
    Objects {
        /// Content asked for.
        hash: ContentHash,
        /// What it says.
        source: ObjectsError,
    },
    /// The operating system refused.
    #[error("adapter store: {action} {}: {source}", path.display())]
    Io {
        /// Present-tense verb.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

impl From<StoreError> for RequestError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound { .. } => {
                Self::new(ErrorKind::NotFound, "adapter_not_found", "the adapter is not in the store")
            }
            // Numbers of the whole node stay in the log.
            StoreError::Full { .. } => Self::new(
                ErrorKind::StorageFull,
                "storage_full",
                "the adapter store of this node is full; hint: delete versions that are no longer used",
            ),
            StoreError::Damaged { .. } => Self::new(ErrorKind::Unavailable, "adapter_unavailable", error.to_string()),
            // Its address stays in the log.
            StoreError::Objects { .. } => Self::new(
                ErrorKind::Unavailable,
                "adapter_unavailable",
                "the adapter's files are out of reach; hint: retry, the failure has been logged",
            ),
            StoreError::Seal(_) | StoreError::Io { .. } => Self::internal(),
        }
    }
}

/// A store of adapter files. Clones are the same store.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    budget_bytes: u64,
    used_bytes: AtomicU64,
    next_tmp: AtomicU64,
    /// What this store is a cache of.
    objects: Option<Objects>,
    /// Held while a name appears, changes or goes, so that the counts follow what is there.
    names: Mutex<()>,
}

// === impl Store ===

impl Store {
    /// A store of its own; see [`Self::open_before`].
    ///
    /// # Errors
    /// As there.
    pub fn open(dir: &Path, budget_bytes: u64) -> Result<Self, StoreError> {
        Self::open_before(dir, budget_bytes, None)
    }

    /// Opens or creates the store in `dir` (mode 0700), before an object store if there is one, removes what a crash
    /// left half-written, and counts what is there.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the directory cannot be made or listed.
    pub fn open_before(dir: &Path, budget_bytes: u64, objects: Option<Objects>) -> Result<Self, StoreError> {
        for part in ["objects", "tmp", "quarantine"] {
            let path = dir.join(part);
            create_private(&path)?;
        }
        let tmp = dir.join("tmp");
        for entry in fs::read_dir(&tmp).map_err(io_error("list", &tmp))? {
            let path = entry.map_err(io_error("list", &tmp))?.path();
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        let mut used_bytes = 0;
        for_each_object(&dir.join("objects"), |_, meta| {
            used_bytes += meta.len();
            Ok(())
        })?;
        Ok(Self(Arc::new(Inner {
            dir: dir.to_owned(),
            budget_bytes,
            used_bytes: AtomicU64::new(used_bytes),
            next_tmp: AtomicU64::new(0),
            objects,
            names: Mutex::new(()),
        })))
    }

    /// Removes every object of this disk that is not among `named`: what a crash left between storing and registering, or between
    /// taking a name back and deleting. Called before the node serves. How many there were.
    ///
    /// # Errors
    /// [`StoreError::Io`]; some may be gone already then.
    pub fn sweep(&self, named: &HashSet<AdapterId>) -> Result<usize, StoreError> {
        let named: HashSet<String> = named.iter().map(AdapterId::to_string).collect();
        let mut removed = 0;
        for_each_object(&self.0.dir.join("objects"), |path, meta| {
            if path.file_name().and_then(|name| name.to_str()).is_some_and(|name| named.contains(name)) {
                return Ok(());
            }
            fs::remove_file(path).map_err(io_error("remove", path))?;
            self.forget(meta.len());
            removed += 1;
            Ok(())
        })?;
        Ok(removed)
    }

    /// Reads and opens an adapter, from the object store if this disk does not hold it. Damaged files are moved to
    /// the quarantine.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`], [`StoreError::Seal`], [`StoreError::Objects`],
    /// [`StoreError::Full`], [`StoreError::Io`].
    pub fn read(&self, key: &TenantKey, adapter: &AdapterRef) -> Result<HostFiles, StoreError> {
        match (self.read_here(key, adapter), &self.0.objects) {
            (Err(StoreError::NotFound { .. } | StoreError::Damaged { .. }), Some(objects)) => {
                self.fetch(objects, key, adapter)
            }
            (read, _) => read,
        }
    }

    fn read_here(&self, key: &TenantKey, adapter: &AdapterRef) -> Result<HostFiles, StoreError> {
        let path = self.object_path(&adapter.id());
        let (mut file, n_bytes) = match nofollow::open_regular(&path) {
            Ok(opened) => opened,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound { hash: adapter.hash });
            }
            Err(source) => return Err(StoreError::Io { action: "open", path, source }),
        };
        let read = read_object(&mut file, n_bytes, key, adapter, &path);
        match &read {
            Ok(_) if self.0.objects.is_some() => fetch::mark_used(&file),
            Err(StoreError::Damaged { .. }) => self.quarantine(&adapter.id(), &file),
            _ => {}
        }
        read
    }

    /// Removes an adapter for good, also from the object store. Whether this disk held one.
    ///
    /// # Errors
    /// [`StoreError::Io`], [`StoreError::Objects`].
    pub fn delete(&self, adapter: &AdapterRef) -> Result<bool, StoreError> {
        let was_here = self.forget_copy(adapter)?;
        if let Some(objects) = &self.0.objects {
            objects.delete(&adapter.id()).map_err(|source| StoreError::Objects { hash: adapter.hash, source })?;
        }
        Ok(was_here)
    }

    /// Removes an adapter from this disk only. Whether there was one.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn forget_copy(&self, adapter: &AdapterRef) -> Result<bool, StoreError> {
        let path = self.object_path(&adapter.id());
        let _names = self.0.names.lock();
        let bytes = match fs::symlink_metadata(&path) {
            Ok(meta) => meta.len(),
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(source) => return Err(StoreError::Io { action: "inspect", path, source }),
        };
        fs::remove_file(&path).map_err(io_error("remove", &path))?;
        self.forget(bytes);
        sync_parent(&path)?;
        Ok(true)
    }

    /// Bytes of all objects.
    pub fn used_bytes(&self) -> u64 {
        self.0.used_bytes.load(Ordering::Relaxed)
    }

    /// Most bytes of all objects.
    pub fn budget_bytes(&self) -> u64 {
        self.0.budget_bytes
    }

    pub(crate) fn object_path(&self, id: &AdapterId) -> PathBuf {
        let id = id.to_string();
        self.0.dir.join("objects").join(&id[..2]).join(id)
    }

    fn reserve(&self, n_bytes: u64) -> Result<(), StoreError> {
        match self.try_reserve(n_bytes) {
            Err(StoreError::Full { .. }) if self.make_room(n_bytes)? => self.try_reserve(n_bytes),
            reserved => reserved,
        }
    }

    fn try_reserve(&self, n_bytes: u64) -> Result<(), StoreError> {
        let budget_bytes = self.0.budget_bytes;
        let taken = self.0.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(n_bytes).filter(|&total| total <= budget_bytes)
        });
        taken.map(drop).map_err(|used_bytes| StoreError::Full { needed_bytes: n_bytes, used_bytes, budget_bytes })
    }

    fn forget(&self, n_bytes: u64) {
        self.0.used_bytes.fetch_sub(n_bytes, Ordering::Relaxed);
    }

    /// A full disk is told like a full budget; both mean the same to the uploader.
    fn full_or(&self, error: StoreError, needed_bytes: u64) -> StoreError {
        match error {
            StoreError::Io { source, .. }
                if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) =>
            {
                StoreError::Full { needed_bytes, used_bytes: self.used_bytes(), budget_bytes: self.0.budget_bytes }
            }
            other => other,
        }
    }

    /// Moves a file out of the way, if it still is the one that was found damaged: a new upload may have
    /// replaced it meanwhile.
    fn quarantine(&self, id: &AdapterId, found: &fs::File) {
        let path = self.object_path(id);
        let _names = self.0.names.lock();
        let same = found.metadata().and_then(|found| {
            let there = fs::symlink_metadata(&path)?;
            Ok((found.dev(), found.ino()) == (there.dev(), there.ino()))
        });
        if !same.unwrap_or(false) {
            return;
        }
        let n_bytes = found.metadata().map_or(0, |meta| meta.len());
        match fs::rename(&path, self.0.dir.join("quarantine").join(id.to_string())) {
            Ok(()) => {
                self.forget(n_bytes);
                tracing::error!(object = %id, "stored adapter is damaged and was moved to quarantine");
                if let Err(error) = keep_latest(&self.0.dir.join("quarantine"), QUARANTINE_FILES_MAX) {
                    tracing::warn!(%error, "the quarantine could not be cleared of old files");
                }
            }
            // The error that the reader gets says the rest.
            Err(error) => tracing::warn!(object = %id, %error, "damaged adapter could not be moved to quarantine"),
        }
    }
}

/// Reads an object of `n_bytes` from the front of `file` and opens it in the buffer it was read into: no copy, and no
/// hash of the content, which the object's place tag vouches for.
fn read_object(
    file: &mut fs::File,
    n_bytes: u64,
    key: &TenantKey,
    adapter: &AdapterRef,
    path: &Path,
) -> Result<HostFiles, StoreError> {
    let damaged = |what| StoreError::Damaged { hash: adapter.hash, what };
    let sealed = |error| match error {
        SealError::NotSealed { .. } => damaged("no sealed object"),
        SealError::Damaged { what } => damaged(what),
        other => StoreError::Seal(other),
    };
    let mut header = [0_u8; HEADER_BYTES];
    if n_bytes < HEADER_BYTES as u64 {
        return Err(damaged("cut short"));
    }
    file.read_exact(&mut header).map_err(io_error("read", path))?;
    let mut opener = Opener::new(key, &adapter.tenant, &adapter.hash, &header).map_err(sealed)?;
    if sealed_bytes(opener.content_bytes()) != Some(n_bytes) {
        return Err(damaged("length"));
    }
    let content_bytes = usize::try_from(opener.content_bytes()).map_err(|_| damaged("length"))?;
    // Each tag lies where the next segment goes. Wiped on every way out.
    let mut content = Zeroizing::new(AdapterFiles::buffer(content_bytes + TAG_BYTES));
    for at in (0..content_bytes).step_by(SEGMENT_BYTES) {
        let end = (at + SEGMENT_BYTES).min(content_bytes) + TAG_BYTES;
        let segment = &mut content[at..end];
        file.read_exact(segment).map_err(io_error("read", path))?;
        opener.open_segment(segment).map_err(sealed)?;
    }
    content.truncate(content_bytes);
    bundle::split(std::mem::take(&mut *content)).map(HostFiles::new).map_err(|_| damaged("bundle"))
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

/// Calls `each` for every object; passes over anything that is not a plain file.
fn for_each_object(
    objects: &Path,
    mut each: impl FnMut(&Path, fs::Metadata) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    for shard in fs::read_dir(objects).map_err(io_error("list", objects))? {
        let shard = shard.map_err(io_error("list", objects))?;
        if !shard.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let shard = shard.path();
        for object in fs::read_dir(&shard).map_err(io_error("list", &shard))? {
            let object = object.map_err(io_error("list", &shard))?;
            // Not followed: this is the metadata of the entry itself.
            if let Ok(meta) = object.metadata()
                && meta.is_file()
            {
                each(&object.path(), meta)?;
            }
        }
    }
    Ok(())
}

/// Removes the files of a folder that were written longest ago, until `n_max` are left.
fn keep_latest(dir: &Path, n_max: usize) -> io::Result<()> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        files.push((entry.metadata()?.modified()?, entry.path()));
    }
    files.sort();
    let n_over = files.len().saturating_sub(n_max);
    files[..n_over].iter().try_for_each(|(_, path)| fs::remove_file(path))
}

pub(crate) fn create_private(dir: &Path) -> Result<(), StoreError> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("create", dir))
}

fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().expect("paths of the store have a parent");
    fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(io_error("sync", parent))
}
