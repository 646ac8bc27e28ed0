//! Three real nodes of one cluster: any of them takes any request, and losing one loses nothing.
//!
//! Every test compares whole streams, token by token, with what the same requests got undisturbed. The long forms
//! with their figures are in `scripts/chaos`.

mod fleet;
mod kill;
mod entry;
mod network;
mod registry;
mod fallback;
mod operators;
mod disk;
mod doors;
mod places;
mod bases;
mod warm;
mod objects;
