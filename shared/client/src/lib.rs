//! The client library for `tenantry/1` over QUIC: asks any node, goes on at another one when a node dies, and
//! neither loses nor repeats a token.

#![forbid(unsafe_code)]
