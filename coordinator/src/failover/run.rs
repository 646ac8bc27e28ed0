//! One node working on a request, as [`super`] remembers it.

use shared::id::NodeId;

use super::Attempt;
use crate::route::{Place, RoutingTable};

/// A run, numbered by its attempt.
#[derive(Debug, Clone)]
pub(super) struct Run {
    pub(super) attempt: Attempt,
    pub(super) node: NodeId,
    pub(super) incarnation: u64,
    pub(super) redirected: bool,
    /// Arithmetic of that node, if it has said so.
    pub(super) numerics: Option<String>,
    /// It entered the batch there.
    pub(super) started: bool,
    /// Tokens it brought, accepted ones.
    pub(super) n_tokens: usize,
}

/// A run that begins at a life of a node.
pub(super) fn run_of(table: &RoutingTable, place: &Place, node: NodeId, incarnation: u64) -> Run {
    let numerics = table.says(&node, &place.base).map(|said| said.numerics_id.clone());
    Run { attempt: 0, node, incarnation, redirected: false, numerics, started: false, n_tokens: 0 }
}
