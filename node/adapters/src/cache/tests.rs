//! Behaviour of the cache core.
