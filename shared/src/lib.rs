//! The vocabulary of a Tenantry cluster: what every other crate means by *tenant*, *adapter*,
//! *request* and *token*.
//!
//! A type lives here only if at least two crates import it. There is no policy here, no actor, no
//! tensor and no I/O except reading the configuration file and the small key files.
//!
//! Glossary
//!
//! | word | meaning |
//! |---|---|
//! | tenant | one customer of the SaaS; its identity comes from an API key, never from a body |
//! | contract | what the registry promises and forbids a tenant ([`tenant::TenantContract`]) |
//! | tier | the service class a tenant is queued in: shared, premium, isolated |
//! | base | the frozen language model that all tenants of a node share |
//! | adapter | one tenant's LoRA weights; identified by the tenant and the hash of the content |
//! | residency | where an adapter is on a node: in the engine, on its way, or not ([`adapter::Residency`]) |
//! | task | a tenant's own short name (`support`) that points at an adapter version |
//! | route | (tenant, task): what is queued, limited and metered as one line |
//! | pin | the adapter content a request was admitted with and finishes on |
//! | lease | permission to use a resident adapter; while it lives nothing is evicted |
//! | envelope | an admitted request: who, what, with which contract epoch and adapter pin |
//! | sequence | one running choice of a request inside the batch |
//! | page | a fixed number of token positions of KV memory |
//! | step | one forward pass over the rows that the scheduler planned |

#![forbid(unsafe_code)]

pub mod id;
pub mod hash;
pub mod adapter;
pub mod seal;
pub mod tenant;
pub mod request;
pub mod token;
pub mod cluster;
pub mod error;
pub mod clock;
pub mod config;
