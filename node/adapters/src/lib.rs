//! The right weights in memory: content-addressed store, tiered cache, leases.
//!
//! Reading order: [`lease`] is what the batch holds; [`cache`] decides what stays and what goes (pure);
//! [`store`] keeps adapter files encrypted on disk under their content hash; [`actor`] loads them off the
//! hot path.

#![forbid(unsafe_code)]

pub mod lease;
