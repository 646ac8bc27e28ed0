//! A whole cluster in one thread, from a seed: the real membership, ring, routes, failover, journal and forwarding
//! shells and the real wire frames, on turmoil's clock and network, with an engine that computes tokens from a formula.
//!
//! | real | stands in |
//! |---|---|
//! | [`coordinator::actor`], [`coordinator::forward`] and every core below them | [`engine`]: token = f(prompt, adapter, choice, position) |
//! | [`coordinator::journal`]: records, ids of requests that are sent twice | [`door`]: what a gateway does with them; usage reaches a "disk" that outlives the node |
//! | [`coordinator::registry`], in one scenario | [`registry`]: its files lie in a temporary folder |
//! | [`wire::node`] and [`wire::client`] frames | [`network`]: streams over turmoil's TCP, heartbeats over its UDP, no TLS |
//!
//! [`plan`] draws requests, troubles and weather from the seed, [`client`]s come back to other nodes when theirs dies,
//! [`world`] runs it all, [`oracle`] checks the invariants at every step. A seed that fails is printed with the command
//! that replays it.
//!
//! What is left out: QUIC itself, which `peer` has simulations of (a lost packet of a stream is a link that stands still
//! until it would be sent again; a lost heartbeat is lost); links that fail in one direction only; the registry wherever
//! nodes are troubled at random (it has a simulation of its own in `coordinator`); admission and rates; adapters, pages
//! and their leases; disks that fail or lie; wall clocks that jump; nodes that are slower than others of their cluster;
//! a node's own pauses, which are links that stand still here.
//!
//! [`model`] is the other half: no protocol, but a thousand nodes.

#![forbid(unsafe_code)]

pub mod random;
pub mod plan;
pub mod engine;
pub mod network;
pub mod door;
pub mod registry;
pub mod node;
pub mod client;
pub mod oracle;
pub mod world;
pub mod model;
