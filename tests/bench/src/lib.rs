//! A bounded load generator for servers that speak the OpenAI completions API.
//!
//! Pure cores: who asks ([`tenants`]), when ([`arrivals`]), what ([`prompt`]), how an answer's bytes are counted
//! ([`events`]), what the times mean ([`stats`], [`report`]). Thin shells: [`client`] (one HTTP connection),
//! [`drive`] (the run), [`cpu`] (what it cost, from `/proc`). `scripts/bench` calls the program for every server
//! and workload; it knows no server's insides and decides nothing about good or bad.
//!
//! It shares the machine with the server it measures, so it is one thread that scans bytes instead of parsing
//! them, and reports its own CPU time beside the server's. It speaks plain HTTP/1.1 only.

#![forbid(unsafe_code)]

pub mod random;
pub mod tenants;
pub mod arrivals;
pub mod prompt;
pub mod events;
pub mod stats;
pub mod report;
pub mod cpu;
pub mod client;
pub mod drive;
