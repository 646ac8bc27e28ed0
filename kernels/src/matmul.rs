//! Activations times packed weights: `out = x · wᵀ`, the bulk of every step.
//!
//! Checks the shapes, rounds the activations when asked to, splits the work over panels of output columns and blocks
//! of rows, and hands units of it to a backend. Each output is one fixed chain of fused multiply-adds over the
//! inputs (F32) or over the groups (Int8), so its bits depend on its row and column alone: not on the other
//! rows, the split, the threads or the backend.

mod quantise;
mod prepare;
mod scalar;
mod vector;

use std::ops::Range;

pub use self::prepare::{add_and_norm, gate};

use self::quantise::Activations;
use crate::aligned::OutMat;
use crate::backend::{self, Backend};
use crate::matrix::{Matrix, Storage};
use crate::pool::Pool;

/// Rows per unit of work: with 1,536 inputs their int8 codes fill a tenth of an L2 cache, and the accumulators of
/// the f32 path fit the stack.
const ROW_BLOCK: usize = 64;
/// Panels per unit come in pairs, because tiles are two panels wide.
const PANEL_PAIR: usize = 2;
/// Units per thread: enough to even out a descheduled thread, few enough that taking one costs nothing.
const UNITS_PER_THREAD: usize = 4;
/// Most panels of a unit: 32 panels of 576 8-bit inputs are 288 KiB, which all of its rows find in L2.
const PANELS_PER_UNIT_MAX: usize = 32;
/// Most products in one group; a transformer block needs three.
pub const GROUP_MAX: usize = 8;

/// How activations are kept during a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Precision {
    /// As they are; weights are dequantised exactly. Equal to an f32 reference up to the order of summation.
    F32,
    /// Rounded to int8 with a scale per block of 32 inputs, where the weights are quantised: integer dot products
    /// per group, then f32. Dense weights (f32, f16, bf16) are multiplied as in `F32`: they have no integer form.
    Int8,
}

/// Buffers reused from call to call; grow to the largest call and stay.
#[derive(Debug, Default)]
pub struct Scratch {
    activations: Activations,
    /// Rows and inputs that [`add_and_norm`] or [`gate`] has rounded for the next product.
    prepared: Option<(usize, usize)>,
}

/// One product of a group.
#[derive(Debug)]
pub struct Product<'a> {
    /// Weights `[n_out, n_in]`.
    pub w: &'a Matrix,
    /// Result `[n_rows, n_out]`.
    pub out: &'a mut [f32],
}

/// `out = x · wᵀ` with `x` `[n_rows, n_in]` and `out` `[n_rows, n_out]`, row-major.
///
/// A block of activations that holds a NaN or an infinity makes its whole row NaN under [`Precision::Int8`].
///
/// # Panics
/// When a length does not fit.
pub fn matmul(
    pool: &Pool,
    precision: Precision,
    x: &[f32],
    n_rows: usize,
    w: &Matrix,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    matmul_group(pool, precision, x, n_rows, &mut [Product { w, out }], scratch);
}

/// Several products of the same activations (q, k and v; gate and up): rounds them once and forks once. The bits are
/// those of separate [`matmul`] calls.
///
/// # Panics
/// When a length does not fit, the matrices differ in `n_in`, or there are more than [`GROUP_MAX`] products.
pub fn matmul_group(
    pool: &Pool,
    precision: Precision,
    x: &[f32],
    n_rows: usize,
    products: &mut [Product<'_>],
    scratch: &mut Scratch,
) {
    multiply(pool, precision, x, n_rows, products, scratch, false);
}

/// As [`matmul_group`], for an `x` that [`add_and_norm`] or [`gate`] has just made: its rounded form lies in `scratch`.
///
/// # Panics
/// As [`matmul_group`], or when the last call with `scratch` made another `x`.
pub fn matmul_group_prepared(
    pool: &Pool,
    precision: Precision,
    x: &[f32],
    n_rows: usize,
    products: &mut [Product<'_>],
    scratch: &mut Scratch,
) {
    multiply(pool, precision, x, n_rows, products, scratch, true);
}

fn multiply(
    pool: &Pool,
    precision: Precision,
    x: &[f32],
    n_rows: usize,
    products: &mut [Product<'_>],
    scratch: &mut Scratch,
    is_prepared: bool,
) {
    let Some(first) = products.first() else { return };
    assert!(products.len() <= GROUP_MAX, "{} products in one group", products.len());
    let n_in = first.w.n_in();
    assert_eq!(x.len(), n_rows * n_in, "activations are not [{n_rows}, {n_in}]");
    let mut jobs = [None; GROUP_MAX];
    for (job, product) in jobs.iter_mut().zip(products) {
        assert_eq!(product.w.n_in(), n_in, "matrices of one group differ in their inputs");
        *job = Some(Job { w: product.w, out: OutMat::new(product.out, n_rows, product.w.n_out()) });
    }
    if n_rows == 0 {
        return;
    }
    let group = Group::new(&jobs, precision, n_rows, pool.threads());
    let backend = backend::active();
    if group.quantised {
        let prepared = scratch.prepared.take();
        if is_prepared {
            assert_eq!(prepared, Some((n_rows, n_in)), "rows and inputs that were prepared");
        } else {
            scratch.activations.fill(pool, backend, x, n_rows, n_in);
        }
    }
    let activations = &scratch.activations;
    pool.run_chunks(group.n_units(), 1, &|units| group.run_unit(units.start, backend, x, activations));
}

/// One product as the threads see it.
#[derive(Clone, Copy)]
struct Job<'a> {
    w: &'a Matrix,
    out: OutMat,
}

/// The products of one call and how they are cut into units. Units of the same rows stand together: a thread then makes
/// and reads about the same rows in every operation of a step, and rows seldom cross from one core's cache to another's,
/// which can cost more than reading weights once for each block of rows.
struct Group<'a> {
    jobs: &'a [Option<Job<'a>>; GROUP_MAX],
    precision: Precision,
    quantised: bool,
    n_rows: usize,
    panels_per_unit: usize,
    /// Units of each block of rows.
    n_chunks: usize,
}

// === impl Group ===

impl<'a> Group<'a> {
    fn new(jobs: &'a [Option<Job<'a>>; GROUP_MAX], precision: Precision, n_rows: usize, threads: usize) -> Self {
        let panels: usize = jobs.iter().flatten().map(|job| job.w.n_panels()).sum();
        let quantised = jobs.iter().flatten().any(|job| is_int8(precision, job.w));
        let panels_per_unit = panels
            .div_ceil(threads * UNITS_PER_THREAD)
            .next_multiple_of(PANEL_PAIR)
            .clamp(PANEL_PAIR, PANELS_PER_UNIT_MAX);
        let n_chunks = jobs.iter().flatten().map(|job| job.w.n_panels().div_ceil(panels_per_unit)).sum();
        Self { jobs, precision, quantised, n_rows, panels_per_unit, n_chunks }
    }

    fn n_units(&self) -> usize {
        self.n_chunks * self.n_rows.div_ceil(ROW_BLOCK)
    }

    fn run_unit(&self, unit: usize, backend: Backend, x: &[f32], activations: &Activations) {
        let (row, mut chunk) = (unit / self.n_chunks * ROW_BLOCK, unit % self.n_chunks);
        for job in self.jobs.iter().flatten() {
            let n_chunks = job.w.n_panels().div_ceil(self.panels_per_unit);
            if chunk >= n_chunks {
                chunk -= n_chunks;
                continue;
            }
            let panel = chunk * self.panels_per_unit;
            let panels = panel..(panel + self.panels_per_unit).min(job.w.n_panels());
            let rows = row..(row + ROW_BLOCK).min(self.n_rows);
            match &job.w.storage {
                Storage::Coded(coded) if self.precision == Precision::Int8 => {
                    let unit = Int8Unit { n_in: job.w.n_in(), coded, panels, rows, activations, out: job.out };
                    // SAFETY: the active backend is available; shapes were checked on entry, and units are disjoint.
                    unsafe { backend.run(&unit, scalar::int8) };
                }
                _ => {
                    let unit = F32Unit { w: job.w, panels, rows, x, out: job.out };
                    // SAFETY: as above.
                    unsafe { backend.run(&unit, scalar::dense) };
                }
            }
            return;
        }
    }
}

fn is_int8(precision: Precision, w: &Matrix) -> bool {
    precision == Precision::Int8 && matches!(w.storage, Storage::Coded(_))
}

/// Some panels times some rows of rounded activations. Nobody else writes these columns of these rows.
struct Int8Unit<'a> {
    n_in: usize,
    coded: &'a crate::matrix::Coded,
    panels: Range<usize>,
    rows: Range<usize>,
    activations: &'a Activations,
    out: OutMat,
}

/// Some panels times some rows of f32 activations. Nobody else writes these columns of these rows.
struct F32Unit<'a> {
    w: &'a Matrix,
    panels: Range<usize>,
    rows: Range<usize>,
    /// All rows, `[n_rows, n_in]`.
    x: &'a [f32],
    out: OutMat,
}

#[cfg(test)]
mod tests;
