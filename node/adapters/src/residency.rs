//! "Is it warm?" without waiting: an index that the cache keeps and anyone may read.
//!
//! Written only while the cache's lock is held, so that it never shows an older state after a newer one.
//! A reader may be a moment behind; who needs certainty takes a lease.

use dashmap::DashMap;
use shared::adapter::{AdapterId, Residency};

/// The index. Adapters that are [`Residency::Absent`] take no place in it.
#[derive(Debug, Default)]
pub struct ResidencyIndex(DashMap<AdapterId, Residency>);

impl ResidencyIndex {
    /// Where `id` is.
    pub fn residency(&self, id: &AdapterId) -> Residency {
        self.0.get(id).map_or(Residency::Absent, |entry| *entry)
    }

    pub(crate) fn set(&self, id: AdapterId, residency: Residency) {
        if residency == Residency::Absent {
            self.0.remove(&id);
        } else {
            self.0.insert(id, residency);
        }
    }
}
