//! Row-wise operations between the products: RMS norm, rotary embedding, SwiGLU, additions, exponential, maximum.
//!
//! The safe entries check lengths, split large work over rows and call a backend. Every value depends on its own row;
//! the one reduction (the sum of squares) has 16 partial sums by column modulo 16 and one fixed tree.

mod scalar;
pub(crate) mod vector;

use crate::aligned::OutMat;
use crate::backend::{self, Backend};
use crate::pool::Pool;

/// Values per task of the cheap operations: some µs, above the price of a fork.
const VALUES_PER_TASK: usize = 16 * 1024;
/// Values per task of [`swiglu`], which costs several times as much a value.
const GATES_PER_TASK: usize = 4 * 1024;

/// Cosines and sines of the rotary embedding for every position, computed in f64 and rounded once.
#[derive(Debug)]
pub struct RopeTable {
    head_dim: usize,
    max_positions: usize,
    /// `[max_positions, head_dim / 2]`.
    cos: Vec<f32>,
    sin: Vec<f32>,
}

// === impl RopeTable ===

impl RopeTable {
    /// Angles `position * inv_freq[i]` for `max_positions` positions; `inv_freq` `[head_dim / 2]`. Takes
    /// `max_positions * head_dim * 4` bytes.
    ///
    /// # Panics
    /// When `head_dim` is odd or `inv_freq` has another length.
    pub fn new(head_dim: usize, max_positions: usize, inv_freq: &[f64]) -> Self {
        assert!(head_dim.is_multiple_of(2), "head_dim {head_dim} is odd");
        assert_eq!(inv_freq.len(), head_dim / 2, "one frequency per pair");
        let angles = || (0..max_positions).flat_map(|position| inv_freq.iter().map(move |freq| position as f64 * freq));
        let cos = angles().map(|angle| angle.cos() as f32).collect();
        let sin = angles().map(|angle| angle.sin() as f32).collect();
        Self { head_dim, max_positions, cos, sin }
    }

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Positions held: `0..max_positions`.
    pub fn max_positions(&self) -> usize {
        self.max_positions
    }

    /// Cosines and sines of one position, `[head_dim / 2]` each.
    fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let half = self.head_dim / 2;
        let at = position as usize * half;
        (&self.cos[at..at + half], &self.sin[at..at + half])
    }
}

/// `out = x / sqrt(mean(x²) + eps) * w` for each of `n_rows` rows; `x`, `out` `[n_rows, n]`, `w` `[n]`.
///
/// # Panics
/// When a length does not fit.
pub fn rms_norm(pool: &Pool, x: &[f32], n_rows: usize, w: &[f32], eps: f32, out: &mut [f32]) {
    let n = w.len();
    assert_eq!(x.len(), n_rows * n, "x is not [{n_rows}, {n}]");
    let target = OutMat::new(out, n_rows, n);
    let backend = backend::active();
    pool.run_chunks(n_rows, rows_per_task(n), &|rows| {
        for row in rows {
            // SAFETY: each row is handed out once.
            let out = unsafe { target.cols(row, 0, n) };
            norm_row(backend, &x[row * n..][..n], w, eps, out);
        }
    });
}

/// [`rms_norm`] of one row with the active backend; the three have one length.
pub(crate) fn norm_row(backend: Backend, x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    // SAFETY: the active backend is available.
    unsafe { backend.run(vector::RmsNorm { x, w, eps, out }, |k| scalar::rms_norm(k.x, k.w, k.eps, k.out)) };
}

/// Rotates the pairs (`i`, `i + head_dim / 2`) of every head by the angle of the row's position, in place;
/// `x` `[n_rows, n_heads * head_dim]`, `positions` `[n_rows]`.
///
/// # Panics
/// When a length does not fit or a position is outside of the table.
pub fn rope(
    pool: &Pool,
    x: &mut [f32],
    n_rows: usize,
    n_heads: usize,
    head_dim: usize,
    positions: &[u32],
    table: &RopeTable,
) {
    let n = n_heads * head_dim;
    assert_eq!(head_dim, table.head_dim, "the table is for heads of {}", table.head_dim);
    assert_eq!(positions.len(), n_rows, "one position per row");
    let max = table.max_positions;
    assert!(positions.iter().all(|&position| (position as usize) < max), "a position beyond the table's {max}");
    let target = OutMat::new(x, n_rows, n);
    let backend = backend::active();
    pool.run_chunks(n_rows, rows_per_task(n), &|rows| {
        for row in rows {
            let (cos, sin) = table.at(positions[row]);
            // SAFETY: each row is handed out once.
            let row = unsafe { target.cols(row, 0, n) };
            // SAFETY: the active backend is available.
            unsafe { backend.run(vector::Rope { row, cos, sin }, |k| scalar::rope(k.row, k.cos, k.sin)) };
        }
    });
}

/// `out = gate / (1 + exp(-gate)) * up`, value by value.
///
/// # Panics
/// When the lengths differ.
pub fn swiglu(pool: &Pool, gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && up.len() == out.len(), "gate, up and out differ in length");
    let n = out.len();
    let target = OutMat::new(out, 1, n);
    let backend = backend::active();
    pool.run_chunks(n, GATES_PER_TASK, &|part| {
        // SAFETY: each stretch is handed out once.
        let out = unsafe { target.cols(0, part.start, part.len()) };
        gate_values(backend, &gate[part.clone()], &up[part], out);
    });
}

/// [`swiglu`] of some values with the active backend; the three have one length.
pub(crate) fn gate_values(backend: Backend, gate: &[f32], up: &[f32], out: &mut [f32]) {
    // SAFETY: the active backend is available.
    unsafe { backend.run(vector::SwiGlu { gate, up, out }, |k| scalar::swiglu(k.gate, k.up, k.out)) };
}

/// `y += x`, value by value. One rounding each, so there is nothing for a backend to decide.
///
/// # Panics
/// When the lengths differ.
pub fn add_in_place(pool: &Pool, y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "y and x differ in length");
    let n = y.len();
    let target = OutMat::new(y, 1, n);
    pool.run_chunks(n, VALUES_PER_TASK, &|part| {
        // SAFETY: each stretch is handed out once.
        let y = unsafe { target.cols(0, part.start, part.len()) };
        y.iter_mut().zip(&x[part]).for_each(|(y, x)| *y += x);
    });
}

/// `y[row] += bias` for each of `n_rows` rows.
///
/// # Panics
/// When `y` is not `[n_rows, bias.len()]`.
pub fn add_bias_rows(y: &mut [f32], n_rows: usize, bias: &[f32]) {
    assert_eq!(y.len(), n_rows * bias.len(), "y is not [{n_rows}, {}]", bias.len());
    if !bias.is_empty() {
        y.chunks_exact_mut(bias.len()).for_each(|row| row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias));
    }
}

/// `e^x` by range reduction to ±ln(2)/2 and a polynomial of degree 6 (the coefficients of Cephes `expf`): at most 2 ulp
/// off over the whole range, subnormal results included; overflows to infinity, NaN stays NaN. The same bits in every
/// backend; [`swiglu`] and attention use it.
pub fn exp(x: f32) -> f32 {
    scalar::exp(x)
}

/// Largest value and the index where it first stands. NaN is passed over; without any number above negative infinity
/// the answer is (negative infinity, 0).
pub fn max_and_argmax(x: &[f32]) -> (f32, usize) {
    // SAFETY: the active backend is available.
    unsafe { backend::active().run(vector::MaxAndArgmax(x), |k| scalar::max_and_argmax(k.0)) }
}

fn rows_per_task(n: usize) -> usize {
    (VALUES_PER_TASK / n.max(1)).max(1)
}

/// Constants of [`exp`], shared by the backends.
pub(crate) mod exp_constants {
    /// Results below are 0 and above infinity already at these arguments.
    pub(crate) const LOW: f32 = -110.0;
    pub(crate) const HIGH: f32 = 100.0;
    /// ln 2 in two parts: nine bits, so that a multiple is exact, and the rest.
    pub(crate) const LN2_HIGH: f32 = 355.0 / 512.0;
    pub(crate) const LN2_LOW: f32 = -2.121_944_4e-4;
    /// Of r^2 upwards, highest first.
    pub(crate) const POLYNOMIAL: [f32; 6] =
        [1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5];
}

/// Sums 16 partial sums as a balanced tree; the one order all backends use.
pub(crate) fn tree_sum(mut parts: [f32; 16]) -> f32 {
    let mut width = 8;
    while width > 0 {
        for i in 0..width {
            parts[i] += parts[i + width];
        }
        width /= 2;
    }
    parts[0]
}

#[cfg(test)]
mod tests;
