//! Module patterns against a table that Python's `re` wrote: evaluated alike or refused, never differently.

use super::super::pattern::{Cover, Pattern};
use crate::info::Linear;

const TABLE: &str = include_str!("patterns.txt");

/// The names behind the digits of the table.
fn names() -> Vec<String> {
    let blocks =
        [0, 1, 10, 29].map(|layer| Linear::ALL.map(|linear| format!("model.layers.{layer}.{}", linear.hf_path())));
    let outside = ["lm_head", "model.embed_tokens"].map(str::to_owned);
    blocks.into_iter().flatten().chain(outside).collect()
}

#[test]
fn patterns_select_what_python_selects_or_are_refused() {
    let names = names();
    let mut n_evaluated = 0;
    for line in TABLE.lines().skip(2) {
        let columns: Vec<&str> = line.split('\t').collect();
        for (cover, wanted) in [(Cover::Whole, columns[1]), (Cover::Suffix, columns[2])] {
            let Ok(pattern) = Pattern::new("target_modules", columns[0], cover) else { continue };
            let found: String = names.iter().map(|name| if pattern.matches(name) { '1' } else { '0' }).collect();
            assert_eq!(found, wanted, "{cover:?} {:?}", columns[0]);
            n_evaluated += 1;
        }
    }
    assert!(n_evaluated > 250, "only {n_evaluated} patterns of the table are evaluated at all");
}
