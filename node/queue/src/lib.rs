//! Whose turn is it? Per-tenant queues with weighted token fairness, the only queue in front of the engine.
//!
//! Reading order: [`item`] is what waits and what the queue is told; [`virtual_time`] is how service is
//! compared; [`fair`] decides (pure: `now` comes in, choices go out); [`drain`] guesses when a refused client
//! may come back; [`handle`] puts the core behind one short lock that engine and gateway share; [`actor`]
//! owns the timer. What it counts lies in [`metrics`].
//!
//! **Invariant.** A request that was accepted leaves exactly once: picked, cancelled, expired or drained.
//! **Invariant.** A picked request counts against its tenant's concurrency until it is reported as left.
//! Not here: requests and tokens per minute (admission, at the entry node), which adapter is loaded (the
//! cache), what runs in a step (the scheduler).

#![forbid(unsafe_code)]

pub mod item;
pub mod virtual_time;
pub mod fair;
pub mod drain;
pub mod handle;
pub mod metrics;
pub mod actor;

pub use fair::FairQueue;
pub use handle::{Queue, Ticket};
pub use item::{AdapterView, FairConfig, Item, Picked, Room, SubmitError};
