//! What nodes and clients say to each other, byte for byte: frame header, message types, conversions.
//!
//! The only crate that derives `rkyv`. No sockets, no clock: bytes in, vocabulary out, and the other way round.
//! Reading order: [`frame`] (the header every frame starts with), [`node`] (what nodes say, as vocabulary),
//! `message` and `convert` (the same as bytes), [`client`] and [`join`] (what clients, and nodes that are not in yet,
//! say and are told: fixed layouts, no `rkyv`).
//!
//! # Versions
//!
//! Two ends agree on a [`Version`] before a byte of ours is sent. Within a version every message type has one layout
//! for ever; the header carries a hash of it, and what does not match exactly is refused. A program reads and writes
//! the version before its own, too, so that a cluster is upgraded node by node: `message` keeps the older layouts,
//! `convert` fills in what they lack, and a message that the older version does not know is not sent.
//! The bytes of every version stay in `testdata/`.

#![forbid(unsafe_code)]

mod schema;
mod version;
pub mod frame;
pub mod node;
mod message;
mod convert;
pub mod client;
pub mod join;

pub use frame::{Decoder, Frame, FrameError};
pub use version::{Spoken, Version};

/// Protocol of a node that has no certificate yet and brings an invitation.
pub const JOIN_ALPN: &[u8] = b"tenantry-join/1";

/// Protocol between clients and nodes.
pub const CLIENT_ALPN: &[u8] = b"tenantry/1";
