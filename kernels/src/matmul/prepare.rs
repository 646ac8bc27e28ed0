//! What stands between the products of a block, row by row, together with the rounding that the next product wants: one
//! fork where each step by itself would be one, and rows that are still in the nearest cache. The forward pass calls
//! these; every value is the one that the separate operations of `ops` give.

use super::quantise::{BLOCK, ROWS, Rounded, round, rows_of};
use super::{Precision, Scratch};
use crate::aligned::OutMat;
use crate::backend;
use crate::ops;
use crate::pool::Pool;

/// Inputs per task of [`gate`]: eight rows of them take some µs.
const GATE_INPUTS: usize = 8 * BLOCK;

/// `residual += added`, then `normed = rms_norm(residual) * w`, and `normed` prepared for the next product; all
/// `[n_rows, w.len()]`.
///
/// # Panics
/// When a length does not fit.
pub fn add_and_norm(
    pool: &Pool,
    precision: Precision,
    residual: &mut [f32],
    added: Option<&[f32]>,
    w: &[f32],
    eps: f32,
    normed: &mut [f32],
    scratch: &mut Scratch,
) {
    let n = w.len();
    assert!(n > 0 && residual.len().is_multiple_of(n), "the residual is not [n_rows, {n}]");
    assert!(added.is_none_or(|added| added.len() == residual.len()), "residual and added differ in length");
    let n_rows = residual.len() / n;
    let (residual, normed) = (OutMat::new(residual, n_rows, n), OutMat::new(normed, n_rows, n));
    let backend = backend::active();
    let rounded = scratch.prepare(precision, n_rows, n);
    pool.run_chunks(n_rows.div_ceil(ROWS), 1, &|groups| {
        for row in rows_of(groups.start, n_rows) {
            // SAFETY: each group of rows is handed out once.
            let (residual, normed) = unsafe { (residual.cols(row, 0, n), normed.cols(row, 0, n)) };
            if let Some(added) = added {
                residual.iter_mut().zip(&added[row * n..][..n]).for_each(|(y, x)| *y += x);
            }
            ops::norm_row(backend, residual, w, eps, normed);
            if let Some(rounded) = &rounded {
                // SAFETY: the active backend is available; as above.
                unsafe { round(backend, rounded, row, 0, normed) };
            }
        }
    });
}

/// `out = gate / (1 + exp(-gate)) * up` as [`ops::swiglu`], prepared for the next product; all `[n_rows, n]`.
///
/// # Panics
/// When a length does not fit.
pub fn gate(
    pool: &Pool,
    precision: Precision,
    n_rows: usize,
    gate: &[f32],
    up: &[f32],
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    assert!(gate.len() == up.len() && up.len() == out.len(), "gate, up and out differ in length");
    let n = out.len() / n_rows.max(1);
    assert_eq!(out.len(), n_rows * n, "out is not [{n_rows}, n]");
    let out = OutMat::new(out, n_rows, n);
    let backend = backend::active();
    let rounded = scratch.prepare(precision, n_rows, n);
    let parts = n.div_ceil(GATE_INPUTS);
    pool.run_chunks(n_rows.div_ceil(ROWS) * parts, 1, &|units| {
        let (group, first) = (units.start / parts, units.start % parts * GATE_INPUTS);
        let len = (n - first).min(GATE_INPUTS);
        for row in rows_of(group, n_rows) {
            let at = row * n + first;
            // SAFETY: each part of a group of rows is handed out once.
            let out = unsafe { out.cols(row, first, len) };
            ops::gate_values(backend, &gate[at..][..len], &up[at..][..len], out);
            if let Some(rounded) = &rounded {
                // SAFETY: the active backend is available; as above.
                unsafe { round(backend, rounded, row, first, out) };
            }
        }
    });
}

// === impl Scratch ===

impl Scratch {
    /// Where rounded rows go, when products with this precision may want them: quantised weights have whole blocks.
    fn prepare(&mut self, precision: Precision, n_rows: usize, n_in: usize) -> Option<OutMat<Rounded>> {
        let wanted = precision == Precision::Int8 && n_in.is_multiple_of(BLOCK);
        self.prepared = wanted.then_some((n_rows, n_in));
        wanted.then(|| self.activations.target(n_rows, n_in))
    }
}
