//! A whole node as its users see it: a real process, its real ports, kill -9.

mod actors;
mod cache;
mod fallback;
mod http2;
mod life;
mod limits;
mod metrics;
mod operators;
mod tls;
