//! Node to node over QUIC: who a peer is (certificates of the cluster's own CA), connections, exchanges.
//!
//! Knows messages ([`wire`]) but no policy: whom to call, what to retry and who owns a tenant is decided by the
//! coordinator and the node.

#![forbid(unsafe_code)]
