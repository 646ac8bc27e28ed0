//! The right weights in memory: content-addressed store, tiered cache, leases.
//!
//! Reading order: [`lease`] is what the batch holds; [`cache`] decides what stays and what goes (pure);
//! [`residency`] answers "is it warm?" without a lock; [`store`] keeps adapter files encrypted on disk (as a [`bundle`], each
//! tenant's copy apart), in front of [`objects`] that all nodes share, [`import`] takes them from a plain directory; [`loader`] turns a stored
//! object into packed matrices; [`handle`] is what queue and engine talk to; [`actor`] loads off the hot path.
//!
//! **Invariant.** While a lease lives, its slot keeps its adapter and its generation.
//! **Invariant.** At most one load per adapter is under way, and no tier exceeds its byte budget.
//! **Invariant.** Bytes whose hash is not the one asked for never become an adapter.
//! Not here: who may use an adapter (registry), whose turn it is (queue), what the matrices mean (model).

#![forbid(unsafe_code)]

pub mod lease;
pub mod cache;
pub mod residency;
pub mod bundle;
pub mod objects;
pub mod store;
pub mod import;
pub mod loader;
pub mod handle;
pub mod metrics;
pub mod actor;

pub use cache::{CacheConfig, CacheStats};
pub use handle::{AdapterCache, LeaseDecision};
pub use lease::Lease;
pub use loader::{DiskLoader, KeySource, LoadError, Loader};
pub use objects::{Objects, ObjectsError};
pub use store::incoming::{Incoming, Received};
pub use store::{Store, StoreError};
