//! Openraft's state machine over [`Disk`]: applies agreed entries, builds and installs snapshots.

use std::io::Cursor;

use openraft::storage::RaftStateMachine;
use openraft::{
    BasicNode, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError, StorageIOError,
    StoredMembership,
};

use super::types::{Answers, Entry, TypeConfig};
use crate::registry::disk::Disk;
use crate::registry::store::StoreError;

/// The state machine; a handle.
#[derive(Clone)]
pub(crate) struct Machine(pub(crate) Disk);

fn reading(error: StoreError) -> StorageError<u64> {
    StorageIOError::read_state_machine(openraft::AnyError::new(&error)).into()
}

fn writing(error: StoreError) -> StorageError<u64> {
    StorageIOError::write_state_machine(openraft::AnyError::new(&error)).into()
}

impl RaftSnapshotBuilder<TypeConfig> for Machine {
    /// Its bytes are spelled only when a node asks: openraft itself wants the description.
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError<u64>> {
        let built = self.0.with(|content| Ok(content.build())).await.map_err(reading)?;
        Ok(Snapshot { meta: built.meta.clone(), snapshot: Box::default() })
    }
}

impl RaftStateMachine<TypeConfig> for Machine {
    type SnapshotBuilder = Self;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, BasicNode>), StorageError<u64>> {
        let position = self.0.with(|content| Ok(content.position.clone())).await.map_err(reading)?;
        Ok((position.applied, position.membership))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answers>, StorageError<u64>>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        self.0.with(move |content| content.apply(entries)).await.map_err(writing)
    }

    async fn get_snapshot_builder(&mut self) -> Self {
        self.clone()
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, BasicNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError<u64>> {
        let (meta, bytes) = (meta.clone(), snapshot.into_inner());
        self.0.with(move |content| content.install(&meta, &bytes)).await.map_err(writing)
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<TypeConfig>>, StorageError<u64>> {
        let built = self.0.with(|content| Ok(content.built.clone())).await.map_err(reading)?;
        Ok(built.map(|built| Snapshot { meta: built.meta.clone(), snapshot: Box::new(Cursor::new(built.bytes())) }))
    }
}
