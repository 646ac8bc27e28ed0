//! The seam between scheduler and model: one step as rows, grouped into runs.
//!
//! A step is a list of rows `[n_rows]`, one token each. A *run* is a stretch of consecutive rows of one
//! sequence at consecutive positions: one row when decoding, a chunk when prefilling. Runs of the same
//! adapter stand together so that LoRA segments are contiguous. The bits of a row depend on its own tokens,
//! KV and adapter only, never on the other rows (batch invariance).

use std::sync::Arc;

use crate::adapter::LoraAdapter;

/// Consecutive rows of one sequence.
#[derive(Debug, Clone)]
pub struct Run {
    /// The tokens of the rows.
    pub tokens: Vec<u32>,
    /// Position of the first token in its sequence.
    pub start: usize,
    /// KV pages of the sequence, by position; must cover `start + tokens.len()` positions.
    pub pages: Vec<u32>,
    /// Weights added for these rows.
    pub adapter: Option<Arc<LoraAdapter>>,
    /// Rows of this run whose logits are wanted, as offsets into `tokens`, ascending.
    pub logits: Vec<usize>,
}

/// One forward pass.
#[derive(Debug, Clone, Default)]
pub struct Step {
    /// Runs in row order.
    pub runs: Vec<Run>,
}

impl Step {
    /// Rows in the step.
    pub fn n_rows(&self) -> usize {
        self.runs.iter().map(|run| run.tokens.len()).sum()
    }

    /// Rows whose logits are wanted.
    pub fn n_logits(&self) -> usize {
        self.runs.iter().map(|run| run.logits.len()).sum()
    }
}

/// What computes a step. The real ones are [`crate::forward::Runtime`] and [`crate::gpu::GpuRuntime`]; simulations use a
/// stub.
pub trait Forward: Send {
    /// Token positions per KV page.
    fn page_tokens(&self) -> usize;

    /// KV pages in the pool; page ids are `0..n_pages`.
    fn n_pages(&self) -> usize;

    /// Most rows one step may have.
    fn rows_max(&self) -> usize;

    /// Size of the vocabulary: the width of a logits row.
    fn vocab(&self) -> usize;

    /// Computes the step: writes keys and values of every row into the pages and returns the logits
    /// `[n_logits, vocab]`, row-major, in the order of runs and of `Run::logits`. The slice is valid until the next call.
    ///
    /// # Panics
    /// When the step breaks a stated bound (rows, pages, positions): a scheduler bug.
    fn forward(&mut self, step: &Step) -> &[f32];

    /// Called when a page is freed or handed to another owner; debug builds fill it with NaN.
    fn page_freed(&mut self, page: u32);
}

impl<F: Forward + ?Sized> Forward for Box<F> {
    fn page_tokens(&self) -> usize {
        (**self).page_tokens()
    }

    fn n_pages(&self) -> usize {
        (**self).n_pages()
    }

    fn rows_max(&self) -> usize {
        (**self).rows_max()
    }

    fn vocab(&self) -> usize {
        (**self).vocab()
    }

    fn forward(&mut self, step: &Step) -> &[f32] {
        (**self).forward(step)
    }

    fn page_freed(&mut self, page: u32) {
        (**self).page_freed(page);
    }
}
