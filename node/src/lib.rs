//! One node of a Tenantry cluster: the request's path from the socket to the engine and back.

#![forbid(unsafe_code)]

pub mod gateway;
