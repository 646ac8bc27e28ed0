//! A step as the forward pass needs it: one list of tokens and positions, and the row ranges of runs, adapters
//! and wanted logits. The one place that checks a step's bounds; built once per step, in memory kept from the last.

use std::ops::Range;
use std::sync::Arc;

use kernels::attention::AttnRun;

use crate::adapter::LoraAdapter;
use crate::step::{Run, Step};

/// What a step must stay within.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) rows_max: usize,
    pub(crate) positions_max: usize,
    pub(crate) n_pages: usize,
    pub(crate) page_tokens: usize,
    pub(crate) vocab: usize,
    pub(crate) n_layers: usize,
}

/// A checked step. The default is an empty one, which lends its memory to the next.
#[derive(Debug, Default)]
pub(crate) struct Plan<'a> {
    /// Token of every row.
    pub(crate) tokens: Vec<u32>,
    /// Position of every row in its sequence.
    pub(crate) positions: Vec<u32>,
    /// Runs with their rows and pages.
    pub(crate) runs: Vec<AttnRun<'a>>,
    /// Longest stretches of rows with the same adapter; rows without one are in none.
    pub(crate) adapters: Vec<(Range<usize>, &'a Arc<LoraAdapter>)>,
    /// Rows whose logits are wanted, in the order they are returned.
    pub(crate) logits_rows: Vec<usize>,
}

// === impl Plan ===

impl<'a> Plan<'a> {
    /// Names the rows of `step`, in the memory of a plan that is done with.
    ///
    /// # Panics
    /// When the step breaks a bound: a scheduler bug that must not become wrong output.
    pub(crate) fn new(step: &'a Step, bounds: &Bounds, spare: Plan<'static>) -> Self {
        let n_rows = step.n_rows();
        assert!(n_rows <= bounds.rows_max, "step has {n_rows} rows, limit {}", bounds.rows_max);
        let mut plan: Self = spare;
        for run in &step.runs {
            check(run, bounds);
            plan.push(run);
        }
        plan
    }

    /// The memory, for the next step.
    pub(crate) fn into_spare(mut self) -> Plan<'static> {
        self.tokens.clear();
        self.positions.clear();
        self.logits_rows.clear();
        Plan {
            tokens: self.tokens,
            positions: self.positions,
            runs: emptied(self.runs),
            adapters: emptied(self.adapters),
            logits_rows: self.logits_rows,
        }
    }

    /// Rows in the step.
    pub(crate) fn n_rows(&self) -> usize {
        self.tokens.len()
    }

    fn push(&mut self, run: &'a Run) {
        let first = self.tokens.len();
        self.tokens.extend_from_slice(&run.tokens);
        self.positions.extend((run.start..run.start + run.tokens.len()).map(|position| position as u32));
        self.logits_rows.extend(run.logits.iter().map(|offset| first + offset));
        let rows = first..self.tokens.len();
        if let Some(adapter) = &run.adapter {
            self.push_adapter(rows.clone(), adapter);
        }
        self.runs.push(AttnRun { rows, start: run.start, pages: &run.pages });
    }

    /// Extends the last stretch if it has the same adapter and ends here. Sameness is identity of the object: two
    /// copies of equal weights make two stretches, which costs time and changes nothing.
    fn push_adapter(&mut self, rows: Range<usize>, adapter: &'a Arc<LoraAdapter>) {
        match self.adapters.last_mut() {
            Some((last, same)) if last.end == rows.start && Arc::ptr_eq(same, adapter) => {
                last.end = rows.end;
            }
            _ => self.adapters.push((rows, adapter)),
        }
    }
}

/// The memory of a vector for elements of another lifetime. A collect from a vector of the same layout works in place.
pub(crate) fn emptied<A, B>(mut from: Vec<A>) -> Vec<B> {
    from.clear();
    from.into_iter().map(|_| unreachable!("the vector is empty")).collect()
}

/// Panics with the numbers when a run breaks a bound.
fn check(run: &Run, bounds: &Bounds) {
    let end = run.start + run.tokens.len();
    assert!(!run.tokens.is_empty(), "a run has no tokens");
    assert!(end <= bounds.positions_max, "run ends at position {end}, limit {}", bounds.positions_max);
    let covered = run.pages.len() * bounds.page_tokens;
    assert!(end <= covered, "run ends at position {end}, its pages cover {covered}");
    let page_max = run.pages.iter().max().map_or(0, |&page| page as usize);
    assert!(page_max < bounds.n_pages, "page {page_max} of {}", bounds.n_pages);
    let token_max = run.tokens.iter().max().map_or(0, |&token| token as usize);
    assert!(token_max < bounds.vocab, "token {token_max} of {}", bounds.vocab);
    assert!(run.logits.is_sorted_by(|a, b| a < b), "offsets of wanted logits are not ascending");
    let wanted = run.logits.last().map_or(0, |last| last + 1);
    assert!(wanted <= run.tokens.len(), "logits of row {wanted} of {}", run.tokens.len());
    if let Some(adapter) = &run.adapter {
        assert!(adapter.layers.len() == bounds.n_layers, "adapter has {} layers", adapter.layers.len());
    }
}

#[cfg(test)]
mod tests {
    use shared::hash::ContentHash;

    use super::*;

    const BOUNDS: Bounds =
        Bounds { rows_max: 8, positions_max: 40, n_pages: 4, page_tokens: 16, vocab: 100, n_layers: 1 };

    fn run(tokens: &[u32], start: usize, pages: &[u32]) -> Run {
        Run { tokens: tokens.to_vec(), start, pages: pages.to_vec(), adapter: None, logits: vec![tokens.len() - 1] }
    }

    fn adapter() -> Arc<LoraAdapter> {
        let layers = vec![std::array::from_fn(|_| None)];
        Arc::new(LoraAdapter { hash: ContentHash([0; 32]), layers, rank_max: 0, bytes: 0 })
    }

    #[test]
    fn rows_are_numbered_over_all_runs() {
        let step = Step { runs: vec![run(&[5, 6, 7], 16, &[0, 3]), run(&[8], 0, &[1])] };
        let plan = Plan::new(&step, &BOUNDS, Plan::default());
        assert_eq!(plan.tokens, [5, 6, 7, 8]);
        assert_eq!(plan.positions, [16, 17, 18, 0]);
        assert_eq!(plan.logits_rows, [2, 3]);
        assert_eq!(plan.runs[1].rows, 3..4);
    }

    #[test]
    fn neighbouring_runs_of_one_adapter_share_a_segment() {
        let (a, b) = (adapter(), adapter());
        let with = |tokens: &[u32], adapter: Option<&Arc<LoraAdapter>>| Run {
            adapter: adapter.cloned(),
            ..run(tokens, 0, &[0])
        };
        let runs = vec![
            with(&[1], None),
            with(&[1, 2], Some(&a)),
            with(&[3], Some(&a)),
            with(&[4], Some(&b)),
            with(&[5], None),
            with(&[6], Some(&b)),
        ];
        let step = Step { runs };
        let ranges: Vec<_> =
            Plan::new(&step, &BOUNDS, Plan::default()).adapters.iter().map(|(rows, _)| rows.clone()).collect();
        assert_eq!(ranges, [1..4, 4..5, 6..7]);
    }

    #[test]
    fn steps_out_of_bounds_are_refused() {
        let cases = [
            ("rows", run(&[1; 9], 0, &[0])),
            ("position", run(&[1; 2], 39, &[0, 1, 2])),
            ("pages cover", run(&[1; 2], 15, &[0])),
            ("page", run(&[1], 0, &[4])),
            ("token", run(&[100], 0, &[0])),
            ("logits", Run { logits: vec![1], ..run(&[1], 0, &[0]) }),
            ("ascending", Run { logits: vec![1, 0], ..run(&[1, 2], 0, &[0]) }),
        ];
        for (what, run) in cases {
            let step = Step { runs: vec![run] };
            assert!(
                std::panic::catch_unwind(|| Plan::new(&step, &BOUNDS, Plan::default())).is_err(),
                "{what} was accepted"
            );
        }
    }
}
