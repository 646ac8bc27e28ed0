//! Which adapters should be warm where before somebody asks (core).
//!
//! A node sees the requests it serves. [`activity`] turns them into a probability that a route is asked for soon, and
//! [`plan`] turns probabilities into a short list of loads under a budget: only where an idle place is free, or held
//! by an adapter that is much less likely to be asked for; places in use are not looked at. When the ring changes,
//! [`moved`] says which routes a node is about to get or lose. Hints carry the epoch of the table they were planned
//! with; a node that knows better takes none for tenants that it does not serve. Nothing here loads anything.

use shared::id::{NodeId, Route};

use crate::route::{Place, RoutingTable};

pub mod activity;
pub mod plan;

/// Routes whose home differs between two tables: `(route, new home)`. Warmed there, by falling activity, before and
/// while the new home gets their requests.
pub fn moved<'a>(
    before: &RoutingTable,
    after: &RoutingTable,
    routes: impl IntoIterator<Item = (&'a Route, &'a Place)>,
) -> Vec<(Route, NodeId)> {
    let home = |table: &RoutingTable, route: &Route, place: &Place| {
        table.owners(place, &route.tenant).map(|owners| owners.home.clone())
    };
    let routes = routes.into_iter();
    routes
        .filter_map(|(route, place)| {
            let new = home(after, route, place)?;
            (home(before, route, place).as_ref() != Some(&new)).then(|| (route.clone(), new))
        })
        .collect()
}

#[cfg(test)]
mod tests;
