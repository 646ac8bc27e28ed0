//! A whole cluster in one thread, from a seed: the real membership, ring, routes, failover, journal and forwarding
//! shells and the real wire frames, on turmoil's clock and network, with an engine that computes tokens from a formula.
//!
//! | real | stands in |
//! |---|---|
//! | [`coordinator::actor`], [`coordinator::forward`] and every core below them | [`engine`]: token = f(prompt, adapter, choice, position) |
//! | [`coordinator::journal`]: records, ids of requests that are sent twice, billed ranges | [`door`]: what a gateway does with them; usage reaches a "disk" that outlives the node |
//! | [`coordinator::registry`], in one scenario | [`registry`]: its files lie in a temporary folder |
//! | [`wire::node`] and [`wire::client`] frames | [`network`]: streams over turmoil's TCP, heartbeats over its UDP, no TLS |
//!
//! [`plan`] draws requests and troubles from the seed, [`client`]s come back to other nodes when theirs dies, [`world`]
//! runs it all, [`oracle`] checks the invariants at every step. A seed that fails is printed with the command that
//! replays it. Not here: the registry while nodes are troubled at random, which has a simulation of its own in
//! `coordinator`; adapters and pages.
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
