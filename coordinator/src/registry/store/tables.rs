//! What the registry's file holds, and the transactions on it.
//!
//! | table | key → value |
//! |---|---|
//! | `log` | index → entry: what was agreed on and is not yet compacted |
//! | `tenants`, `tombstones` | id → record: the state after the entry that `position` names |
//! | `remembered` | registry epoch → answer of a recent command |
//! | `meta` | epoch, position, vote, purged, registry id, fingerprint of the cluster key, scrub pending |
//!
//! The log is synced before anything counts as agreed. The state is written without a sync of its own: it rides
//! on the next one, and after a crash the log brings it up to date again. Both are in one file, so that one
//! transaction keeps `position` and the records it speaks of together.

use std::ops::Range;

use openraft::{LogId, Vote};
use redb::{Database, Durability, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use serde::{Serialize, de::DeserializeOwned};

use super::{Store, StoreError};
use crate::registry::raft::types::{Entry, Position};
use crate::registry::record::{self, TenantRecord, Tombstone};
use crate::registry::state::{Change, Changes, REMEMBERED_MAX, RegistryState};

const TENANTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("tenants");
const TOMBSTONES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("tombstones");
const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
const REMEMBERED: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("remembered");

const EPOCH: &str = "epoch";
const CLUSTER_KEY: &str = "cluster key fingerprint";
const SCRUB_PENDING: &str = "scrub pending";
const POSITION: &str = "position";
const VOTE: &str = "vote";
const PURGED: &str = "purged";
const REGISTRY_ID: &str = "registry id";

/// Tells registries apart, so that two that grew up alone are never mixed.
pub(crate) type RegistryId = [u64; 2];

/// What lies in the file when it is opened.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The fingerprint of another cluster key is stored.
    pub(super) other_key: bool,
    pub(super) scrub_due: Option<u64>,
}

/// Creates what is missing.
pub(super) fn prepare(db: &Database, fingerprint: &[u8]) -> Result<Prepared, StoreError> {
    let txn = begin(db, Durability::Immediate)?;
    let prepared = {
        let mut meta = txn.open_table(META)?;
        let found = meta.get(CLUSTER_KEY)?.map(|value| value.value().to_vec());
        let other_key = found.as_ref().is_some_and(|found| found != fingerprint);
        if found.is_none() {
            meta.insert(CLUSTER_KEY, fingerprint)?;
        }
        let scrub_due = meta.get(SCRUB_PENDING)?.map(|value| number(value.value()));
        txn.open_table(TENANTS)?;
        txn.open_table(TOMBSTONES)?;
        txn.open_table(LOG)?;
        txn.open_table(REMEMBERED)?;
        Prepared { other_key, scrub_due }
    };
    if !prepared.other_key {
        txn.commit()?;
    }
    Ok(prepared)
}

fn begin(db: &Database, durability: Durability) -> Result<WriteTransaction, StoreError> {
    let mut txn = db.begin_write()?;
    txn.set_durability(durability)?;
    Ok(txn)
}

/// Numbers are little-endian; the first version wrote one byte for "scrub pending".
fn number(bytes: &[u8]) -> u64 {
    bytes.try_into().map_or(0, u64::from_le_bytes)
}

fn tenant_of<T: DeserializeOwned>(tenant: &str, bytes: &[u8]) -> Result<T, StoreError> {
    record::decode(bytes).map_err(|source| StoreError::Record { what: format!("tenant {tenant}"), source })
}

fn part_of<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> Result<T, StoreError> {
    record::decode(bytes).map_err(|source| StoreError::Record { what: what.to_owned(), source })
}

/// Everything but what is marked as erased, into another file.
pub(super) fn copy_live_records(from: &Database, to: &Database) -> Result<(), StoreError> {
    let (read, write) = (from.begin_read()?, begin(to, Durability::Immediate)?);
    for table in [TENANTS, TOMBSTONES, META] {
        let (source, mut target) = (read.open_table(table)?, write.open_table(table)?);
        for entry in source.iter()? {
            let (key, value) = entry?;
            if key.value() != SCRUB_PENDING {
                target.insert(key.value(), value.value())?;
            }
        }
    }
    for table in [LOG, REMEMBERED] {
        let (source, mut target) = (read.open_table(table)?, write.open_table(table)?);
        for entry in source.iter()? {
            let (key, value) = entry?;
            target.insert(key.value(), value.value())?;
        }
    }
    write.commit()?;
    Ok(())
}

impl Store {
    /// The state and how far it is.
    pub(crate) fn read(&self) -> Result<(RegistryState, Position), StoreError> {
        let txn = self.db().begin_read()?;
        let meta = txn.open_table(META)?;
        let epoch = meta.get(EPOCH)?.map_or(0, |value| number(value.value()));
        let position = meta.get(POSITION)?.map_or(Ok(Position::default()), |value| part_of(POSITION, value.value()))?;
        let mut records: Vec<TenantRecord> = Vec::new();
        for entry in txn.open_table(TENANTS)?.iter()? {
            let (tenant, bytes) = entry?;
            records.push(tenant_of(tenant.value(), bytes.value())?);
        }
        let mut tombstones: Vec<Tombstone> = Vec::new();
        for entry in txn.open_table(TOMBSTONES)?.iter()? {
            let (tenant, bytes) = entry?;
            tombstones.push(tenant_of(tenant.value(), bytes.value())?);
        }
        let mut state = RegistryState::restore(epoch, records, tombstones);
        for entry in txn.open_table(REMEMBERED)?.iter()? {
            state.remember(part_of("remembered answer", entry?.1.value())?);
        }
        Ok((state, position))
    }

    fn meta<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        let txn = self.db().begin_read()?;
        let found = txn.open_table(META)?.get(key)?;
        found.map(|value| part_of(key, value.value())).transpose()
    }

    fn set_meta<T: Serialize>(&mut self, key: &str, value: &T) -> Result<(), StoreError> {
        let txn = begin(self.db(), Durability::Immediate)?;
        txn.open_table(META)?.insert(key, record::encode(value).as_slice())?;
        txn.commit()?;
        Ok(())
    }

    /// Which registry this is a copy of; `None` before it was founded or joined.
    pub(crate) fn registry_id(&self) -> Result<Option<RegistryId>, StoreError> {
        self.meta(REGISTRY_ID)
    }

    /// Joins the registry `id`.
    pub(crate) fn join(&mut self, id: RegistryId) -> Result<(), StoreError> {
        self.set_meta(REGISTRY_ID, &id)
    }

    /// Founds a registry: from now on what is stored is its state at `position`, before which there is no log.
    pub(crate) fn found(&mut self, id: RegistryId, position: &Position) -> Result<(), StoreError> {
        let txn = begin(self.db(), Durability::Immediate)?;
        {
            let mut meta = txn.open_table(META)?;
            meta.insert(REGISTRY_ID, record::encode(&id).as_slice())?;
            meta.insert(POSITION, record::encode(position).as_slice())?;
            meta.insert(PURGED, record::encode(&position.applied).as_slice())?;
        }
        txn.commit()?;
        Ok(())
    }

    /// Whom this node voted for last.
    pub(crate) fn vote(&self) -> Result<Option<Vote<u64>>, StoreError> {
        self.meta(VOTE)
    }

    /// Keeps a vote, durably.
    pub(crate) fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StoreError> {
        self.set_meta(VOTE, vote)
    }

    /// The last entry that was compacted away.
    pub(crate) fn purged(&self) -> Result<Option<LogId<u64>>, StoreError> {
        Ok(self.meta::<Option<LogId<u64>>>(PURGED)?.flatten())
    }

    /// The last entry of the log.
    pub(crate) fn last_entry(&self) -> Result<Option<Entry>, StoreError> {
        let txn = self.db().begin_read()?;
        let log = txn.open_table(LOG)?;
        log.last()?.map(|(_, value)| part_of("log", value.value())).transpose()
    }

    /// Entries of a range, as many as fit into `bytes_max` but at least one.
    pub(crate) fn entries(&self, range: Range<u64>, bytes_max: usize) -> Result<Vec<Entry>, StoreError> {
        let txn = self.db().begin_read()?;
        let (mut entries, mut bytes) = (Vec::new(), 0);
        for entry in txn.open_table(LOG)?.range(range)? {
            let (_, value) = entry?;
            bytes += value.value().len();
            if bytes > bytes_max && !entries.is_empty() {
                break;
            }
            entries.push(part_of("log", value.value())?);
        }
        Ok(entries)
    }

    /// Appends entries, durably. With them goes to disk whatever was written before without a sync.
    pub(crate) fn append(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        let txn = begin(self.db(), Durability::Immediate)?;
        {
            let mut log = txn.open_table(LOG)?;
            for entry in entries {
                log.insert(entry.log_id.index, record::encode(entry).as_slice())?;
            }
        }
        txn.commit()?;
        self.unsynced = false;
        Ok(())
    }

    /// Removes the entries from `since` on: another leader decided otherwise.
    pub(crate) fn truncate(&mut self, since: u64) -> Result<(), StoreError> {
        let txn = begin(self.db(), Durability::Immediate)?;
        txn.open_table(LOG)?.retain_in(since.., |_, _| false)?;
        txn.commit()?;
        Ok(())
    }

    /// Removes the entries up to `upto`. If the state is not there yet, since a snapshot is being installed, nothing
    /// is synced: a crash before the snapshot is in must find the old log.
    pub(crate) fn purge(&mut self, upto: &LogId<u64>, applied: Option<&LogId<u64>>) -> Result<(), StoreError> {
        let durability = if Some(upto) <= applied { Durability::Immediate } else { Durability::None };
        let txn = begin(self.db(), durability)?;
        txn.open_table(LOG)?.retain_in(..=upto.index, |_, _| false)?;
        txn.open_table(META)?.insert(PURGED, record::encode(&Some(*upto)).as_slice())?;
        txn.commit()?;
        Ok(())
    }

    /// Writes what agreed commands changed; durable with the next sync, and until then in the log.
    pub(crate) fn write(&mut self, changes: &Changes, epoch: u64, position: &Position) -> Result<(), StoreError> {
        let txn = begin(self.db(), Durability::None)?;
        let mut erases = None;
        {
            let mut tenants = txn.open_table(TENANTS)?;
            let mut tombstones = txn.open_table(TOMBSTONES)?;
            let mut remembered = txn.open_table(REMEMBERED)?;
            let mut meta = txn.open_table(META)?;
            for change in &changes.changes {
                let id = change.tenant().as_str();
                match change {
                    Change::Put(record) => drop(tenants.insert(id, record::encode(&**record).as_slice())?),
                    Change::Delete(tombstone) => {
                        erases = Some(position.applied.map_or(0, |applied| applied.index));
                        tenants.remove(id)?;
                        tombstones.insert(id, record::encode(tombstone).as_slice())?;
                    }
                }
            }
            for answer in &changes.remembered {
                let epoch = answer.applied.epoch;
                remembered.insert(epoch, record::encode(answer).as_slice())?;
                remembered.remove(epoch.saturating_sub(REMEMBERED_MAX))?;
            }
            meta.insert(EPOCH, epoch.to_le_bytes().as_slice())?;
            meta.insert(POSITION, record::encode(position).as_slice())?;
            if let Some(due) = erases {
                meta.insert(SCRUB_PENDING, due.to_le_bytes().as_slice())?;
            }
        }
        txn.commit()?;
        self.unsynced = true;
        self.scrub_due = erases.or(self.scrub_due);
        Ok(())
    }

    /// Replaces the whole state, durably. What it replaced is scrubbed like something erased.
    pub(crate) fn replace(&mut self, state: &RegistryState, position: &Position) -> Result<(), StoreError> {
        let txn = begin(self.db(), Durability::Immediate)?;
        let due = position.applied.map_or(0, |applied| applied.index);
        {
            let mut tenants = txn.open_table(TENANTS)?;
            let mut tombstones = txn.open_table(TOMBSTONES)?;
            let mut remembered = txn.open_table(REMEMBERED)?;
            let mut meta = txn.open_table(META)?;
            tenants.retain(|_, _| false)?;
            tombstones.retain(|_, _| false)?;
            remembered.retain(|_, _| false)?;
            let image = state.image();
            for record in &image.tenants {
                tenants.insert(record.tenant().as_str(), record::encode(&**record).as_slice())?;
            }
            for tombstone in &image.tombstones {
                tombstones.insert(tombstone.tenant.as_str(), record::encode(tombstone).as_slice())?;
            }
            for answer in &image.remembered {
                remembered.insert(answer.applied.epoch, record::encode(answer).as_slice())?;
            }
            meta.insert(EPOCH, image.epoch.to_le_bytes().as_slice())?;
            meta.insert(POSITION, record::encode(position).as_slice())?;
            meta.insert(SCRUB_PENDING, due.to_le_bytes().as_slice())?;
        }
        txn.commit()?;
        self.unsynced = false;
        self.scrub_due = Some(due);
        Ok(())
    }

    /// Syncs what was written without one.
    pub(crate) fn sync(&mut self) -> Result<(), StoreError> {
        begin(self.db(), Durability::Immediate)?.commit()?;
        self.unsynced = false;
        Ok(())
    }

    /// Whether the log still holds the entry from which on an erased key may be in it.
    pub(super) fn log_holds(&self, index: u64) -> Result<bool, StoreError> {
        let txn = self.db().begin_read()?;
        let log = txn.open_table(LOG)?;
        Ok(log.first()?.is_some_and(|(first, _)| first.value() <= index))
    }
}
