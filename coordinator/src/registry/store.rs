//! The registry on disk: one redb file, every batch durable before it is acknowledged.
//!
//! ```text
//! registry.lock    held while a process uses the directory
//! registry.redb    tenants, tombstones, epoch, fingerprint of the cluster key   (mode 0600)
//! registry.redb.new, .old    only during erasure, see [`Store::scrub`]
//! ```
//!
//! redb copies on write: a deleted record, and with it a tenant's wrapped key, would linger in free pages.
//! So after a deletion the live records are copied to a new file, which takes the old one's place, and the
//! old one is overwritten. A crash at any point is finished at the next start. (Copies below the file
//! system, such as snapshots and worn flash cells, are beyond its reach: the cluster key protects those.)
//!
//! Called by the writer thread only; it blocks. It decides nothing about tenants.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};

use shared::hash::ContentHash;

use super::record::{self, RecordError, TenantRecord, Tombstone};
use super::state::{Change, RegistryState};

const TENANTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("tenants");
const TOMBSTONES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("tombstones");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const EPOCH: &str = "epoch";
const CLUSTER_KEY: &str = "cluster key fingerprint";
const SCRUB_PENDING: &str = "scrub pending";
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
    #[error("tenant {tenant}: {source}")]
    Record {
        /// Whose.
        tenant: String,
        /// Why.
        source: RecordError,
    },
    /// The database is damaged or the disk failed.
    #[error("registry database: {0}")]
    Database(Box<redb::Error>),
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

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        Self::Database(Box::new(error.into()))
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { action, path, source }
}

/// The database and the directory it holds. Dropping it lets another process in.
#[derive(Debug)]
pub struct Store {
    /// Dropped before the lock.
    db: Database,
    dir: PathBuf,
    scrub_pending: bool,
    /// `None` only for databases in memory, in tests.
    lock: Option<File>,
}

impl Store {
    /// Opens or creates the registry in `dir` and reads all of it. Blocks.
    ///
    /// # Errors
    /// When another process uses `dir`, the cluster key is another one, or the disk or its content is damaged.
    pub fn open(dir: &Path, fingerprint: &ContentHash) -> Result<(Self, RegistryState), StoreError> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(io_error("create", dir))?;
        let lock = take_lock(dir)?;
        finish_interrupted_scrub(dir)?;
        let db = open_database(&dir.join(DB_NAME))?;
        let (mut store, state) = Self::prepare(db, dir, Some(lock), fingerprint)?;
        if store.scrub_pending {
            store = store.scrub()?;
        }
        Ok((store, state))
    }

    fn prepare(
        db: Database,
        dir: &Path,
        lock: Option<File>,
        fingerprint: &ContentHash,
    ) -> Result<(Self, RegistryState), StoreError> {
        let mut store = Self { db, dir: dir.to_owned(), scrub_pending: false, lock };
        let txn = store.begin()?;
        {
            let mut meta = txn.open_table(META)?;
            let found = meta.get(CLUSTER_KEY)?.map(|value| value.value().to_vec());
            match found {
                Some(found) if found != fingerprint.0 => {
                    return Err(StoreError::OtherClusterKey { path: dir.join(DB_NAME) });
                }
                Some(_) => {}
                None => drop(meta.insert(CLUSTER_KEY, fingerprint.0.as_slice())?),
            }
            store.scrub_pending = meta.get(SCRUB_PENDING)?.is_some();
            txn.open_table(TENANTS)?;
            txn.open_table(TOMBSTONES)?;
        }
        txn.commit()?;
        let state = store.read()?;
        Ok((store, state))
    }

    fn begin(&self) -> Result<WriteTransaction, StoreError> {
        let mut txn = self.db.begin_write()?;
        txn.set_durability(Durability::Immediate)?;
        Ok(txn)
    }

    fn read(&self) -> Result<RegistryState, StoreError> {
        let txn = self.db.begin_read()?;
        let epoch = txn.open_table(META)?.get(EPOCH)?.map_or(0, |value| epoch_of(value.value()));
        let mut records: Vec<TenantRecord> = Vec::new();
        for entry in txn.open_table(TENANTS)?.iter()? {
            let (tenant, bytes) = entry?;
            records.push(decode(tenant.value(), bytes.value())?);
        }
        let mut tombstones: Vec<Tombstone> = Vec::new();
        for entry in txn.open_table(TOMBSTONES)?.iter()? {
            let (tenant, bytes) = entry?;
            tombstones.push(decode(tenant.value(), bytes.value())?);
        }
        Ok(RegistryState::restore(epoch, records, tombstones))
    }

    /// Makes some changes durable together, and the epoch they lead to. When it returns `Ok` they survive a
    /// power cut; when it returns `Err` they may or may not: reopen and read.
    ///
    /// # Errors
    /// When the disk fails or is full.
    pub fn write<'a>(&mut self, changes: impl IntoIterator<Item = &'a Change>, epoch: u64) -> Result<(), StoreError> {
        let txn = self.begin()?;
        let mut erases = false;
        {
            let mut tenants = txn.open_table(TENANTS)?;
            let mut tombstones = txn.open_table(TOMBSTONES)?;
            let mut meta = txn.open_table(META)?;
            for change in changes {
                let id = change.tenant().as_str();
                match change {
                    Change::Put(record) => drop(tenants.insert(id, record::encode(&**record).as_slice())?),
                    Change::Delete(tombstone) => {
                        erases = true;
                        tenants.remove(id)?;
                        tombstones.insert(id, record::encode(tombstone).as_slice())?;
                    }
                }
            }
            meta.insert(EPOCH, epoch.to_le_bytes().as_slice())?;
            if erases {
                meta.insert(SCRUB_PENDING, [1_u8].as_slice())?;
            }
        }
        txn.commit()?;
        self.scrub_pending |= erases;
        Ok(())
    }

    /// Whether erased records may still lie in the file's free pages.
    pub fn scrub_pending(&self) -> bool {
        self.scrub_pending
    }

    /// Replaces the file by one that holds only live records, and overwrites the old one. If there is no room
    /// for the copy, the store goes on as it is and stays [`Self::scrub_pending`].
    ///
    /// # Errors
    /// When the disk fails later; the registry must then be opened again, which finishes the job.
    pub fn scrub(mut self) -> Result<Self, StoreError> {
        if self.lock.is_none() {
            self.scrub_pending = false;
            return Ok(self);
        }
        let live = self.dir.join(DB_NAME);
        let (new, old) = (self.dir.join("registry.redb.new"), self.dir.join("registry.redb.old"));
        if let Err(error) = copy_live_records(&self.db, &new) {
            tracing::error!(%error, "erased tenants' keys may linger in the registry file; tried again at the next change");
            wipe(&new)?;
            return Ok(self);
        }
        let Self { db, dir, lock, .. } = self;
        // redb still writes while it closes, so it closes before the file is overwritten.
        drop(db);
        fs::hard_link(&live, &old).map_err(io_error("link", &old))?;
        fs::rename(&new, &live).map_err(io_error("replace", &live))?;
        sync_dir(&dir)?;
        wipe(&old)?;
        let db = open_database(&live)?;
        Ok(Self { db, dir, scrub_pending: false, lock })
    }

    /// A store over any redb backend, without directory and lock.
    #[cfg(test)]
    pub(super) fn over(
        backend: impl redb::StorageBackend,
        fingerprint: &ContentHash,
    ) -> Result<(Self, RegistryState), StoreError> {
        let db = redb::Builder::new().create_with_backend(backend)?;
        Self::prepare(db, Path::new("memory"), None, fingerprint)
    }
}

fn decode<T: serde::de::DeserializeOwned>(tenant: &str, bytes: &[u8]) -> Result<T, StoreError> {
    record::decode(bytes).map_err(|source| StoreError::Record { tenant: tenant.to_owned(), source })
}

fn epoch_of(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
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

fn copy_live_records(from: &Database, path: &Path) -> Result<(), StoreError> {
    wipe(path)?;
    let to = open_database(path)?;
    let (read, mut write) = (from.begin_read()?, to.begin_write()?);
    write.set_durability(Durability::Immediate)?;
    for table in [TENANTS, TOMBSTONES, META] {
        let (source, mut target) = (read.open_table(table)?, write.open_table(table)?);
        for entry in source.iter()? {
            let (key, value) = entry?;
            if key.value() != SCRUB_PENDING {
                target.insert(key.value(), value.value())?;
            }
        }
    }
    write.commit()?;
    Ok(())
}

/// After a crash inside [`Store::scrub`]: the half-made copy and the replaced file are overwritten.
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
