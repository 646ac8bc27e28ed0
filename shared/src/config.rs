//! The cluster configuration.
