//! No tenant meets another: under an adapter storm every answer is the one its tenant gets alone, no name or
//! key opens a door that is not its own, and nothing secret is written down.
//!
//! Real processes. `TENANTRY_LONG=1` runs the storms ten times as long.

mod keys;
mod matrix;
mod doors;
mod storm;
mod versions;

/// `n`, or ten times as many where there is time.
fn scaled(n: usize) -> usize {
    if std::env::var_os("TENANTRY_LONG").is_some() { 10 * n } else { n }
}
