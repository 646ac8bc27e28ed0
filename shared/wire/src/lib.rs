//! What nodes and clients say to each other, byte for byte: frame header, message types, conversions.
//!
//! The only crate that derives `rkyv`. No sockets, no clock: bytes in, vocabulary out, and the other way round.
//! Reading order: [`frame`] (the header every frame starts with), [`node`] (what nodes say, as vocabulary),
//! `message` and `convert` (the same as bytes), [`client`] and [`join`] (what clients, and nodes that are not in yet,
//! say and are told: fixed layouts, no `rkyv`).
//!
//! # Versions
//!
//! Two ends that speak the same [`NODE_ALPN`] speak the same wire version: TLS agrees on it before a byte of ours
//! is sent. Within a version every message type has one layout for ever; the header carries a hash of it, and what
//! does not match exactly is refused. A new message type may join a version (older ends refuse it, and it alone); a
//! changed one needs a new version, which a program offers beside the last one for the time of an upgrade.
//! The bytes of every version stay in `testdata/`.

#![forbid(unsafe_code)]

mod schema;
pub mod frame;
pub mod node;
mod message;
mod convert;
pub mod client;
pub mod join;

pub use frame::{Decoder, Frame, FrameError};

/// Version of everything between nodes.
pub const WIRE_VERSION: u16 = 1;

/// Protocol between nodes, agreed on by TLS; its number is [`WIRE_VERSION`].
pub const NODE_ALPN: &[u8] = b"tenantry-node/1";

/// Protocol of a node that has no certificate yet and brings an invitation.
pub const JOIN_ALPN: &[u8] = b"tenantry-join/1";

/// Protocol between clients and nodes.
pub const CLIENT_ALPN: &[u8] = b"tenantry/1";
