//! What nodes and clients say to each other, byte for byte: frame header, message types, conversions.
//!
//! The only crate that derives `rkyv`. No sockets, no clock: bytes in, vocabulary out, and the other way round.

#![forbid(unsafe_code)]
