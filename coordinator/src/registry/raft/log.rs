//! Openraft's log storage over [`Disk`].

use std::collections::Bound;
use std::fmt::Debug;
use std::ops::RangeBounds;

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{LogId, LogState, OptionalSend, RaftLogReader, StorageError, StorageIOError, Vote};

use super::types::{Entry, TypeConfig};
use crate::registry::disk::Disk;
use crate::registry::store::StoreError;

/// Bytes of entries sent in one message: well below what a message between nodes may hold.
const SENT_BYTES_MAX: usize = 1 << 20;

/// The log; a handle.
#[derive(Clone)]
pub(crate) struct Log(pub(crate) Disk);

fn reading(error: StoreError) -> StorageError<u64> {
    StorageIOError::read_logs(openraft::AnyError::new(&error)).into()
}

fn writing(error: StoreError) -> StorageError<u64> {
    StorageIOError::write_logs(openraft::AnyError::new(&error)).into()
}

impl RaftLogReader<TypeConfig> for Log {
    async fn try_get_log_entries<R: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: R,
    ) -> Result<Vec<Entry>, StorageError<u64>> {
        let start = match range.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before + 1,
            Bound::Unbounded => 0,
        };
        let end = match range.end_bound() {
            Bound::Included(&last) => last + 1,
            Bound::Excluded(&end) => end,
            Bound::Unbounded => u64::MAX,
        };
        self.0.with(move |content| content.store.entries(start..end, usize::MAX)).await.map_err(reading)
    }

    async fn limited_get_log_entries(&mut self, start: u64, end: u64) -> Result<Vec<Entry>, StorageError<u64>> {
        self.0.with(move |content| content.store.entries(start..end, SENT_BYTES_MAX)).await.map_err(reading)
    }
}

impl RaftLogStorage<TypeConfig> for Log {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<u64>> {
        let read = |content: &mut crate::registry::disk::Content| {
            let last_purged_log_id = content.store.purged()?;
            let last = content.store.last_entry()?.map(|entry| entry.log_id);
            Ok(LogState { last_purged_log_id, last_log_id: last.or(last_purged_log_id) })
        };
        self.0.with(read).await.map_err(reading)
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        let vote = *vote;
        let saved = self.0.with(move |content| content.store.save_vote(&vote)).await;
        saved.map_err(|error| StorageIOError::write_vote(openraft::AnyError::new(&error)).into())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        let read = self.0.with(|content| content.store.vote()).await;
        read.map_err(|error| StorageIOError::read_vote(openraft::AnyError::new(&error)).into())
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<TypeConfig>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<Entry> = entries.into_iter().collect();
        let appended = self.0.with(move |content| content.store.append(&entries)).await;
        callback.log_io_completed(match &appended {
            Ok(()) => Ok(()),
            Err(error) => Err(std::io::Error::other(error.to_string())),
        });
        appended.map_err(writing)
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.0.with(move |content| content.store.truncate(log_id.index)).await.map_err(writing)
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.0.with(move |content| content.purge(&log_id)).await.map_err(writing)
    }
}
