//! The client library for `tenantry/1` over QUIC: asks any node, goes on at another one when a node dies, and
//! neither loses nor repeats a token.
//!
//! [`Client`] holds one connection to one node of those it was given; [`Client::ask`] gives a [`Stream`] of the
//! events that the HTTP API would stream. [`have`] decides what is new (pure); [`connection`] and [`stream`] are the
//! shells around it. Knows nothing of models, tenants or the cluster's inside.

#![forbid(unsafe_code)]

pub mod have;
pub mod connection;
pub mod stream;

pub use connection::{Client, ClientConfig, ClientError, NodeAddress};
pub use stream::{Event, Stream};
pub use wire::client::Endpoint;
