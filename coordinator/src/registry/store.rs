//! The registry on disk: one redb file with the log and the state it leads to.
//!
//! ```text
//! registry.lock    held while a process uses the directory
//! registry.redb    see [`tables`]   (mode 0600)
//! registry.redb.new, .old    only during erasure, see [`Store::scrub_if_due`]
//! ```
//!
//! redb copies on write: a deleted record, and with it a tenant's wrapped key, would linger in free pages.
//! So after a deletion, once the log is compacted beyond it, what is live is copied to a new file, which takes
//! the old one's place, and the old one is overwritten. A crash at any point is finished at the next start. (Copies below the file
//! system, such as snapshots and worn flash cells, are beyond its reach: the cluster key protects those.)
//!
//! Called by `disk` only; it blocks. It decides nothing about tenants.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use redb::Database;

use shared::hash::ContentHash;

use super::record::RecordError;

pub(super) mod tables;

/// The registry is read once at start; a small page cache is enough.
const CACHE_BYTES: usize = 16 << 20;
const DB_NAME: &str = "registry.redb";

/// Why the registry cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Two processes must not share a data directory.
    #[error("data directory {} is in use by another process; hint: stop it, or give this node another directory", dir.display())]
    InUse {
        /// Which directory.
        dir: PathBuf,
    },
    /// The cluster key is not the one the registry was written with.
    #[error("the cluster key is not the one that registry {} was written with; hint: restore cluster.key from your backup", path.display())]
    OtherClusterKey {
        /// Which file.
        path: PathBuf,
    },
    /// A record cannot be read.
    #[error("{what}: {source}")]
    Record {
        /// Which.
        what: String,
        /// Why.
        source: RecordError,
    },
    /// The database is damaged or the disk failed.
    #[error("registry database: {0}")]
    Database(Box<redb::Error>),
    /// A tenant's key does not open with this node's cluster key.
    #[error("a tenant's key does not open here: {0}; hint: all nodes of a cluster share one cluster.key")]
    ForeignKey(#[from] shared::seal::SealError),
    /// Another operation failed before, or the registry is stopping.
    #[error("the registry's file is closed")]
    Closed,
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

macro_rules! from_redb {
    ($($error:ty),*) => {$(
        impl From<$error> for StoreError {
            fn from(error: $error) -> Self {
                Self::Database(Box::new(error.into()))
            }
        }
    )*};
}

from_redb!(
    redb::DatabaseError,
    redb::TransactionError,
    redb::TableError,
    redb::StorageError,
    redb::CommitError,
    redb::SetDurabilityError
);

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}

/// The database and the directory it holds. Dropping it lets another process in.
#[derive(Debug)]
pub struct Store {
    /// Dropped before the lock. `None` only while [`Self::scrub_if_due`] replaces the file, and after it failed.
    db: Option<Database>,
    dir: PathBuf,
    /// Erased records may lie in free pages, and in the log up to this entry.
    scrub_due: Option<u64>,
    /// Something was written without a sync.
    unsynced: bool,
    /// `None` only for databases in memory, in tests.
    lock: Option<File>,
}

impl Store {
    /// Opens or creates the registry in `dir`. Blocks.
    ///
    /// # Errors
    /// When another process uses `dir`, the cluster key is another one, or the disk or its content is damaged.
    pub fn open(dir: &Path, fingerprint: &ContentHash) -> Result<Self, StoreError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("create", dir))?;
        let lock = take_lock(dir)?;
        finish_interrupted_scrub(dir)?;
        let db = open_database(&dir.join(DB_NAME))?;
        let mut store = Self::prepare(db, dir, Some(lock), fingerprint)?;
        store.scrub_if_due()?;
        Ok(store)
    }

    fn prepare(db: Database, dir: &Path, lock: Option<File>, fingerprint: &ContentHash) -> Result<Self, StoreError> {
        let prepared = tables::prepare(&db, fingerprint.0.as_slice())?;
        if prepared.other_key {
            return Err(StoreError::OtherClusterKey { path: dir.join(DB_NAME) });
        }
        Ok(Self { db: Some(db), dir: dir.to_owned(), scrub_due: prepared.scrub_due, unsynced: false, lock })
    }

    fn db(&self) -> &Database {
        self.db.as_ref().expect("a store whose file could not be replaced is dropped by its caller")
    }

    /// Up to which entry the log must be compacted before an erased key is gone; `None` when all are gone.
    pub fn scrub_due(&self) -> Option<u64> {
        self.scrub_due
    }

    /// Whether something was written that no sync has followed.
    pub fn is_unsynced(&self) -> bool {
        self.unsynced
    }

    /// Once the log is compacted far enough: replaces the file by one that holds only live records, and overwrites
    /// the old one. If there is no room for the copy, the store goes on as it is and it stays due.
    ///
    /// # Errors
    /// When the disk fails later; the registry must then be opened again, which finishes the job.
    pub fn scrub_if_due(&mut self) -> Result<(), StoreError> {
        let Some(due) = self.scrub_due else { return Ok(()) };
        if self.log_holds(due)? {
            return Ok(());
        }
        if self.lock.is_none() {
            self.scrub_due = None;
            return Ok(());
        }
        let live = self.dir.join(DB_NAME);
        let (new, old) = (self.dir.join("registry.redb.new"), self.dir.join("registry.redb.old"));
        if let Err(error) = copy_to(self.db(), &new) {
            tracing::error!(%error, "erased tenants' keys may linger in the registry file; tried again at the next change");
            return wipe(&new);
        }
        // redb still writes while it closes, so it closes before the file is overwritten.
        drop(self.db.take());
        fs::hard_link(&live, &old).map_err(io_error("link", &old))?;
        fs::rename(&new, &live).map_err(io_error("replace", &live))?;
        sync_dir(&self.dir)?;
        wipe(&old)?;
        self.db = Some(open_database(&live)?);
        (self.scrub_due, self.unsynced) = (None, false);
        Ok(())
    }

    /// A store over any redb backend, without directory and lock.
    #[cfg(test)]
    pub(super) fn over(backend: impl redb::StorageBackend, fingerprint: &ContentHash) -> Result<Self, StoreError> {
        let db = redb::Builder::new().create_with_backend(backend)?;
        Self::prepare(db, Path::new("memory"), None, fingerprint)
    }
}

fn copy_to(from: &Database, path: &Path) -> Result<(), StoreError> {
    wipe(path)?;
    tables::copy_live_records(from, &open_database(path)?)
}

fn take_lock(dir: &Path) -> Result<File, StoreError> {
    let path = dir.join("registry.lock");
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
    let file = file.map_err(io_error("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(StoreError::InUse { dir: dir.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(StoreError::Io { action: "lock", path, source }),
    }
}

fn open_database(path: &Path) -> Result<Database, StoreError> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    let file = file.map_err(io_error("open", path))?;
    // Also when the file was restored by someone with another umask.
    file.set_permissions(fs::Permissions::from_mode(0o600)).map_err(io_error("protect", path))?;
    let backend = redb::backends::FileBackend::new(file)?;
    Ok(redb::Builder::new().set_cache_size(CACHE_BYTES).create_with_backend(backend)?)
}

/// After a crash inside [`Store::scrub_if_due`]: the half-made copy and the replaced file are overwritten.
fn finish_interrupted_scrub(dir: &Path) -> Result<(), StoreError> {
    wipe(&dir.join("registry.redb.new"))?;
    let (live, old) = (dir.join(DB_NAME), dir.join("registry.redb.old"));
    let same_file = match (fs::metadata(&live), fs::metadata(&old)) {
        (Ok(live), Ok(old)) => (live.dev(), live.ino()) == (old.dev(), old.ino()),
        _ => false,
    };
    if same_file {
        // The crash came between link and rename: `old` is the live file's second name.
        fs::remove_file(&old).map_err(io_error("remove", &old))?;
        return sync_dir(dir);
    }
    wipe(&old)
}

/// Overwrites a file with zeros and removes it; nothing to do if there is none.
fn wipe(path: &Path) -> Result<(), StoreError> {
    let mut file = match OpenOptions::new().write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(io_error("open", path))?,
    };
    let mut left = file.metadata().map_err(io_error("read", path))?.len();
    let zeros = vec![0_u8; 1 << 20];
    while left > 0 {
        let n = left.min(zeros.len() as u64);
        file.write_all(&zeros[..usize::try_from(n).expect("at most 1 MiB")]).map_err(io_error("overwrite", path))?;
        left -= n;
    }
    file.sync_all().map_err(io_error("overwrite", path))?;
    fs::remove_file(path).map_err(io_error("remove", path))?;
    path.parent().map_or(Ok(()), sync_dir)
}

fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_error("sync", dir))
}

#[cfg(test)]
mod tests;
