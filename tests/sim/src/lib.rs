//! A whole cluster in one thread, from a seed: the real membership, ring, routes, failover and forwarding shells and
//! the real wire frames, on turmoil's clock and network, with an engine that computes tokens from a formula.
//!
//! | real | stands in |
//! |---|---|
//! | [`coordinator::actor`], [`coordinator::forward`] and every core below them | [`engine`]: token = f(prompt, choice, position) |
//! | [`wire::node`] frames | [`network`]: streams over turmoil's TCP, heartbeats over its UDP, no TLS |
//!
//! [`world`] builds the nodes, gives them requests and breaks them, all from the seed; [`oracle`] checks the invariants
//! while it runs. The seed is printed with the command that replays it. Not here: the death of a request's own entry
//! node (its client is gone with it), the registry, metering.

#![forbid(unsafe_code)]

pub mod random;
pub mod engine;
pub mod network;
pub mod oracle;
pub mod world;
pub mod model;
