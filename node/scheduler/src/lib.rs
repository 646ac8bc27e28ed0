//! What runs in the next step: continuous batching over paged KV, as pure cores and one engine thread.
//!
//! Reading order: [`source`] is where work comes from; [`blocks`] owns KV pages and the tenants' prefix caches;
//! [`sequence`] is one running choice; [`plan`] picks the rows of the next step; [`sampler`], [`stop`] and
//! [`grammar`] choose tokens and ends; [`engine`] is the loop that ties them together on its own thread.

#![forbid(unsafe_code)]

pub mod source;
pub mod blocks;
pub mod sequence;
pub mod plan;
pub mod sampler;
pub mod stop;
pub mod grammar;
pub mod vocab;
pub mod engine;
