//! One node of a Tenantry cluster: the request's path from the socket to the engine and back, and the binary
//! `tenantry`.
//!
//! Reading order: [`serve`] starts a node; [`app`] composes the request path; [`gateway`] is the door for
//! clients, [`admin`] the one for operators; [`cluster`] is the way to the other nodes, [`prewarm`] fetches adapters ahead; [`base_room`] is one base model with everything around it;
//! [`engine_source`] glues queue and adapter cache to the engine; [`base_model`] and [`supervisor`] are the
//! actors; [`metering`] counts, [`metrics`] shows; [`ctl`] and [`chat`] are the commands beside `node`.

#![forbid(unsafe_code)]

pub mod serve;
pub mod app;
pub mod cluster;
pub mod prewarm;
pub mod gateway;
pub mod admin;
pub mod base_text;
pub mod base_texts;
pub mod base_room;
pub mod engine_source;
pub mod base_model;
pub mod supervisor;
pub mod restart;
pub mod metering;
pub mod metrics;
pub mod client;
pub mod ctl;
pub mod chat;
