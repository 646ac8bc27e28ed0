//! Adapter files on disk: sealed, content-addressed, written whole or not at all, verified on every read.
//!
//! ```text
//! <dir>/objects/ab/<object id>   sealed bundle · BLAKE3 of the sealed bytes (32 bytes)
//! <dir>/tmp/                     being written; emptied at open
//! <dir>/quarantine/<object id>   damaged, kept for a human
//! ```
//! The object id is a hash over (tenant, content hash): no path ever contains text that a tenant chose, and
//! two tenants that upload the same bytes hold two objects under two keys, so that erasing one leaves the
//! other. The outer checksum tells damage (set the file aside) from a wrong key (leave it alone).
//!
//! Files are read into memory, never mapped: a file cut short under a mapping would kill the process. All
//! calls block; the cache's loader and the upload path call them on blocking threads. Which version a name
//! points at is the registry's business.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use model::adapter::AdapterFiles;
use parking_lot::Mutex;
use shared::error::{ErrorKind, RequestError};
use shared::hash::ContentHash;
use shared::id::TenantId;
use shared::seal::{self, SEAL_OVERHEAD_BYTES, SealError, TenantKey};

use crate::bundle;
use crate::loader::HostFiles;

pub(crate) mod nofollow;
#[cfg(test)]
mod tests;

const CHECKSUM_BYTES: usize = 32;

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
    n_objects: AtomicU64,
    next_tmp: AtomicU64,
    /// Held while a name appears, changes or goes, so that the counts follow what is there.
    names: Mutex<()>,
}

// === impl Store ===

impl Store {
    /// Opens or creates the store in `dir` (mode 0700), removes what a crash left half-written, and counts
    /// what is there.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the directory cannot be made or listed.
    pub fn open(dir: &Path, budget_bytes: u64) -> Result<Self, StoreError> {
        for part in ["objects", "tmp", "quarantine"] {
            let path = dir.join(part);
            let mut builder = fs::DirBuilder::new();
            builder.recursive(true).mode(0o700).create(&path).map_err(io_error("create", &path))?;
        }
        let tmp = dir.join("tmp");
        for entry in fs::read_dir(&tmp).map_err(io_error("list", &tmp))? {
            let path = entry.map_err(io_error("list", &tmp))?.path();
            fs::remove_file(&path).map_err(io_error("remove", &path))?;
        }
        let (used_bytes, n_objects) = count_objects(&dir.join("objects"))?;
        Ok(Self(Arc::new(Inner {
            dir: dir.to_owned(),
            budget_bytes,
            used_bytes: AtomicU64::new(used_bytes),
            n_objects: AtomicU64::new(n_objects),
            next_tmp: AtomicU64::new(0),
            names: Mutex::new(()),
        })))
    }

    /// Seals and stores an adapter; durable when this returns. Storing what is there already is cheap and
    /// harmless, and repairs it if it was damaged.
    ///
    /// # Errors
    /// [`StoreError::Full`] when budget or disk are full; nothing of the object stays then.
    pub fn put(&self, key: &TenantKey, tenant: &TenantId, files: &AdapterFiles) -> Result<ContentHash, StoreError> {
        let hash = files.content_hash();
        match self.read(key, tenant, &hash) {
            Ok(_) => return Ok(hash),
            // A file under an old key of the same tenant is of no use: it is replaced.
            Err(StoreError::NotFound { .. } | StoreError::Damaged { .. } | StoreError::Seal(_)) => {}
            Err(error) => return Err(error),
        }
        let mut sealed = seal::seal(key, tenant, &hash, &bundle::encode(files));
        let checksum = *blake3::hash(&sealed).as_bytes();
        sealed.extend_from_slice(&checksum);
        self.write(&object_id(tenant, &hash), &sealed)?;
        Ok(hash)
    }

    /// Reads, verifies and opens an adapter. Damaged files are moved to the quarantine.
    ///
    /// # Errors
    /// [`StoreError::NotFound`], [`StoreError::Damaged`], [`StoreError::Seal`], [`StoreError::Io`].
    pub fn read(&self, key: &TenantKey, tenant: &TenantId, hash: &ContentHash) -> Result<HostFiles, StoreError> {
        let id = object_id(tenant, hash);
        let path = self.object_path(&id);
        let stored = match nofollow::open_regular(&path) {
            Ok((file, bytes)) => read_exactly(file, bytes).map_err(io_error("read", &path))?,
            Err(source) if source.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound { hash: *hash });
            }
            Err(source) => return Err(StoreError::Io { action: "open", path, source }),
        };
        let damaged = |what| {
            self.quarantine(&id, &stored);
            StoreError::Damaged { hash: *hash, what }
        };
        if stored.len() < SEAL_OVERHEAD_BYTES + CHECKSUM_BYTES {
            return Err(damaged("cut short"));
        }
        let (sealed, checksum) = stored.split_at(stored.len() - CHECKSUM_BYTES);
        if blake3::hash(sealed).as_bytes() != checksum {
            return Err(damaged("checksum"));
        }
        let plain = seal::open(key, tenant, hash, sealed).map_err(StoreError::Seal)?;
        let files = HostFiles::new(bundle::decode(&plain).map_err(|_| damaged("bundle"))?);
        if files.files().content_hash() != *hash {
            return Err(damaged("content hash"));
        }
        Ok(files)
    }

    /// Whether the store holds a file for this adapter; says nothing of its health.
    pub fn contains(&self, tenant: &TenantId, hash: &ContentHash) -> bool {
        fs::symlink_metadata(self.object_path(&object_id(tenant, hash))).is_ok_and(|meta| meta.is_file())
    }

    /// Removes an adapter for good. Whether there was one.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn delete(&self, tenant: &TenantId, hash: &ContentHash) -> Result<bool, StoreError> {
        let path = self.object_path(&object_id(tenant, hash));
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

    /// Number of objects.
    pub fn n_objects(&self) -> u64 {
        self.0.n_objects.load(Ordering::Relaxed)
    }

    /// Most bytes of all objects.
    pub fn budget_bytes(&self) -> u64 {
        self.0.budget_bytes
    }

    fn object_path(&self, id: &str) -> PathBuf {
        self.0.dir.join("objects").join(&id[..2]).join(id)
    }

    /// tmp → fsync → rename → fsync of the directory: after a crash at any point the object is there in full
    /// or not at all.
    fn write(&self, id: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let n_bytes = bytes.len() as u64;
        self.reserve(n_bytes)?;
        let tmp = self.0.dir.join("tmp").join(format!("{id}.{}", self.0.next_tmp.fetch_add(1, Ordering::Relaxed)));
        let written = write_tmp(&tmp, bytes).and_then(|()| self.publish(&tmp, &self.object_path(id)));
        written.map_err(|error| {
            self.forget(n_bytes);
            // Best effort: what stays is removed at the next open.
            let _ = fs::remove_file(&tmp);
            self.full_or(error, n_bytes)
        })
    }

    /// Gives a finished file its name; it replaces one that may be there.
    fn publish(&self, tmp: &Path, path: &Path) -> Result<(), StoreError> {
        let shard = path.parent().expect("objects lie in a shard directory");
        let _names = self.0.names.lock();
        if !shard.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(shard).map_err(io_error("create", shard))?;
            sync_parent(shard)?;
        }
        let replaced_bytes = fs::symlink_metadata(path).map(|meta| meta.len()).ok();
        fs::rename(tmp, path).map_err(io_error("rename", tmp))?;
        if let Some(bytes) = replaced_bytes {
            self.forget(bytes);
        }
        sync_parent(path)
    }

    fn reserve(&self, n_bytes: u64) -> Result<(), StoreError> {
        let budget_bytes = self.0.budget_bytes;
        let taken = self.0.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(n_bytes).filter(|&total| total <= budget_bytes)
        });
        match taken {
            Ok(_) => {
                self.0.n_objects.fetch_add(1, Ordering::Relaxed);
                Ok(())
            }
            Err(used_bytes) => Err(StoreError::Full { needed_bytes: n_bytes, used_bytes, budget_bytes }),
        }
    }

    fn forget(&self, n_bytes: u64) {
        self.0.used_bytes.fetch_sub(n_bytes, Ordering::Relaxed);
        self.0.n_objects.fetch_sub(1, Ordering::Relaxed);
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
    fn quarantine(&self, id: &str, found: &[u8]) {
        let path = self.object_path(id);
        let _names = self.0.names.lock();
        let same = nofollow::open_regular(&path).and_then(|(file, bytes)| read_exactly(file, bytes));
        if !same.is_ok_and(|bytes| bytes == found) {
            return;
        }
        match fs::rename(&path, self.0.dir.join("quarantine").join(id)) {
            Ok(()) => {
                self.forget(found.len() as u64);
                tracing::error!(object = id, "stored adapter is damaged and was moved to quarantine");
            }
            // The error that the reader gets says the rest.
            Err(error) => tracing::warn!(object = id, %error, "damaged adapter could not be moved to quarantine"),
        }
    }
}

/// Name of an object: a function of tenant and content that reveals neither.
fn object_id(tenant: &TenantId, hash: &ContentHash) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("tenantry adapter store object v1");
    hasher.update(&(tenant.as_str().len() as u64).to_le_bytes());
    hasher.update(tenant.as_str().as_bytes());
    hasher.update(&hash.0);
    hasher.finalize().to_hex().to_string()
}

fn io_error<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { action, path: path.to_owned(), source }
}

/// Total size and number of the objects; ignores anything that is not a plain file.
fn count_objects(objects: &Path) -> Result<(u64, u64), StoreError> {
    let (mut bytes, mut n_objects) = (0, 0);
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
                bytes += meta.len();
                n_objects += 1;
            }
        }
    }
    Ok((bytes, n_objects))
}

/// Reads a file whose size was looked up after opening; one that shrinks or grows meanwhile is an error.
fn read_exactly(file: fs::File, n_bytes: u64) -> io::Result<Vec<u8>> {
    let wanted = usize::try_from(n_bytes).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
    let mut bytes = Vec::with_capacity(wanted);
    file.take(n_bytes).read_to_end(&mut bytes)?;
    if bytes.len() == wanted { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

fn write_tmp(tmp: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let mut options = fs::OpenOptions::new();
    let mut file = options.write(true).create_new(true).mode(0o600).open(tmp).map_err(io_error("create", tmp))?;
    file.write_all(bytes).map_err(io_error("write", tmp))?;
    file.sync_all().map_err(io_error("sync", tmp))
}

fn sync_parent(path: &Path) -> Result<(), StoreError> {
    let parent = path.parent().expect("paths of the store have a parent");
    fs::File::open(parent).and_then(|dir| dir.sync_all()).map_err(io_error("sync", parent))
}
