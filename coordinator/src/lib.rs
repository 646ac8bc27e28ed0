//! Who is served, under which contract: the control plane's facts and the pure decisions on them.
//!
//! | fact | owner | readers |
//! |---|---|---|
//! | tenant records, API-key hashes, adapter versions, task pointers | [`registry::Registry`]: a log that a majority agrees on, applied on every node | everyone, through [`registry::snapshot::Snapshot`] |
//! | who a key belongs to | [`auth`]: only a snapshot makes an [`auth::AuthedTenant`] | gateway |
//! | what a `model` field means | [`resolve`] (core) | gateway |
//! | what a tenant has used of its rates | [`admission`] (core), held by the gateway behind one short lock | gateway |
//! | who lives, and how much of the ring each node may have | [`membership`] (core), held by [`actor::Coordinator`] | the routes made from it |
//! | which two nodes a tenant belongs to, and which is asked first | [`ring`], [`route`] (cores) | everyone, through [`route::RoutingTable`] |
//! | what becomes of a request when its node dies, stalls or drains | [`failover`] (core), one per request | [`forward`], which carries it |
//! | what it needs to go on when its entry node dies | [`journal`] (cores) at another node, written by [`forward`] | the node its client comes back to |
//! | which adapters should be warm before somebody asks | [`prewarm`] (core) | each node's adapter cache |
//!
//! The registry is a pure state changed only by commands. A command carries everything that is random or
//! read from a clock, so that applying the same log of commands anywhere gives the same state.
//!
//! Not here: listeners, HTTP, adapter bytes, queues.

#![forbid(unsafe_code)]

pub mod registry;
pub mod auth;
pub mod resolve;
pub mod admission;
pub mod limits;
pub mod membership;
pub mod ring;
pub mod route;
pub mod failover;
pub mod journal;
pub mod prewarm;
pub mod tables;
pub mod actor;
pub mod forward;
#[cfg(test)]
mod testing;
