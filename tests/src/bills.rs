//! Whether what nodes bill is what clients got. Reads the nodes' usage journals as an accountant would; knows nothing
//! of a node's insides. Used by the end-to-end tests and by `scripts/chaos`.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde_json::Value;
use shared::clock::{Clock, SystemClock};

use crate::process::NodeProcess;

/// Nodes write what they bill within this time of a request's end.
const WRITTEN_WITHIN: Duration = Duration::from_secs(1);

/// Answer tokens by tenant.
pub type Tokens = BTreeMap<String, u64>;

/// What clients got, next to what is billed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bill {
    /// Tokens that clients got.
    pub got: u64,
    /// Of these, tokens that nobody bills.
    pub unbilled: u64,
    /// Tokens that are billed, and no client got them, or not twice.
    pub beyond: u64,
}

/// Tokens that these nodes together bill: of every choice of every request the union of the ranges that any node's
/// record tells. All of them begin at 0, so it is the furthest.
pub fn billed(nodes: &[NodeProcess]) -> Tokens {
    let mut choices = BTreeMap::<(String, String, usize), u64>::new();
    for record in nodes.iter().flat_map(NodeProcess::usage) {
        let word = |field: &str| record[field].as_str().unwrap_or_default().to_owned();
        for (choice, n) in record["delivered"].as_array().into_iter().flatten().filter_map(Value::as_u64).enumerate() {
            let furthest = choices.entry((word("tenant"), word("request"), choice)).or_default();
            *furthest = n.max(*furthest);
        }
    }
    let mut tokens = Tokens::new();
    choices.into_iter().for_each(|((tenant, ..), n)| *tokens.entry(tenant).or_default() += n);
    tokens
}

/// Compares what clients got with what is billed, tenant by tenant, once nothing is unbilled or `within` is over: what
/// a dead node delivered is billed by the keepers of its records, a minute after their last word.
pub fn settle(nodes: &[NodeProcess], got: &Tokens, within: Duration) -> Bill {
    let started = SystemClock.now();
    while Bill::of(got, &billed(nodes)).unbilled > 0 && started.elapsed() < within {
        std::thread::sleep(Duration::from_millis(50));
    }
    // What is billed too often may come later than what is billed at all.
    std::thread::sleep(WRITTEN_WITHIN);
    Bill::of(got, &billed(nodes))
}

// === impl Bill ===

impl Bill {
    /// One is what clients got, the other what is billed.
    pub fn of(got: &Tokens, billed: &Tokens) -> Self {
        let count = |tokens: &Tokens, tenant: &String| tokens.get(tenant).copied().unwrap_or(0);
        let over = |more: &Tokens, less: &Tokens| -> u64 {
            more.iter().map(|(tenant, n)| n.saturating_sub(count(less, tenant))).sum()
        };
        Self { got: got.values().sum(), unbilled: over(got, billed), beyond: over(billed, got) }
    }
}

impl fmt::Display for Bill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { got, unbilled, beyond } = self;
        write!(f, "of {got} tokens that clients got {unbilled} are unbilled, {beyond} more are billed than clients got")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_tenants_surplus_hides_nothing_that_another_is_not_billed() {
        let tokens = |a: u64, b: u64| Tokens::from([("a".to_owned(), a), ("b".to_owned(), b)]);
        assert_eq!(Bill::of(&tokens(10, 10), &tokens(10, 10)), Bill { got: 20, unbilled: 0, beyond: 0 });
        assert_eq!(Bill::of(&tokens(10, 10), &tokens(13, 7)), Bill { got: 20, unbilled: 3, beyond: 3 });
        assert_eq!(Bill::of(&tokens(10, 10), &Tokens::new()), Bill { got: 20, unbilled: 20, beyond: 0 });
        assert_eq!(Bill::of(&Tokens::new(), &tokens(1, 2)), Bill { got: 0, unbilled: 0, beyond: 3 });
    }
}
