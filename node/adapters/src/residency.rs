//! "Is it warm?" without waiting: an index that the cache keeps and anyone may read.
//!
//! Written only while the cache's lock is held, so that it never shows an older state after a newer one.
//! A reader may be a moment behind; who needs certainty takes a lease.

use dashmap::DashMap;
use shared::hash::ContentHash;

/// Where an adapter is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Warmth {
    /// In the engine; a lease will be given.
    Ready,
    /// A slot is assigned and its load is queued or running.
    Loading,
    /// Asked for, but every slot is leased or promised to someone ahead.
    NoSlot,
    /// Nobody asks for it.
    Absent,
    /// It could not be loaded lately; asked again after a back-off.
    Failed,
}

/// The index. Adapters that are [`Warmth::Absent`] take no place in it.
#[derive(Debug, Default)]
pub struct ResidencyIndex(DashMap<ContentHash, Warmth>);

impl ResidencyIndex {
    /// Where `hash` is.
    pub fn warmth(&self, hash: &ContentHash) -> Warmth {
        self.0.get(hash).map_or(Warmth::Absent, |entry| *entry)
    }

    pub(crate) fn set(&self, hash: ContentHash, warmth: Warmth) {
        if warmth == Warmth::Absent {
            self.0.remove(&hash);
        } else {
            self.0.insert(hash, warmth);
        }
    }
}
