//! Agreement between the nodes that hold the registry: openraft's traits over our disk and our transport.
//!
//! Reading order: [`types`] says what the log holds, [`log`] and [`machine`] put it on disk, [`network`] carries
//! it to other nodes, [`runtime`] gives the elections their randomness. Everything that names openraft's traits
//! is in this room, so that its next version changes no other. Called by [`super::replica`] only.

pub(super) mod types;
pub(super) mod log;
pub(super) mod machine;
pub(super) mod network;
pub(super) mod runtime;
#[cfg(test)]
mod suite;
