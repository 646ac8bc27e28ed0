//! Per-row adapter deltas, `y += scale · B(A x)`, for a batch in which every stretch of rows may have an adapter of its
//! own, of any rank. Rows without an adapter are in no segment and cost nothing.
//!
//! Checks the segments, then works in two steps, both split so that a result depends on its row and adapter alone:
//! shrink (A x, lanes are ranks) and expand (lanes are output columns). Arithmetic is f32; a pair is kept in the dtype
//! its file had.

mod pair;
mod scalar;
mod vector;

use std::ops::Range;

pub use self::pair::{LoraDtype, LoraError, LoraPair, RANK_MAX};

use crate::aligned::{Aligned, OutMat};
use crate::backend::{self, Backend};
use crate::matrix::PANEL;
use crate::pool::Pool;

/// Rows of a segment handled together: they share each read of A and B.
const ROW_TILE: usize = 16;
/// Output panels per unit when one segment is split over threads.
const PANELS_PER_UNIT: usize = 8;

/// Rows that share an adapter.
#[derive(Debug, Clone)]
pub struct Segment<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Their pair for this linear layer.
    pub pair: &'a LoraPair,
}

/// Buffers reused from call to call; grow to the largest step and stay.
#[derive(Debug, Default)]
pub struct Scratch {
    /// `[n_rows, largest padded rank]`: A x.
    shrunk: Aligned,
}

/// `y[row] += scale · B(A x[row])` for the rows of each segment; with a row scale (DoRA)
/// `y[row] = row_scale * (y[row] + scale · B(A x[row]))`. `x` `[n_rows, n_in]`, `y` `[n_rows, n_out]`. Segments are in
/// ascending row order and do not overlap.
///
/// # Panics
/// When a length does not fit, segments overlap, or a pair has another shape.
pub fn lora_delta(
    pool: &Pool,
    segments: &[Segment<'_>],
    x: &[f32],
    n_in: usize,
    y: &mut [f32],
    n_out: usize,
    scratch: &mut Scratch,
) {
    if segments.is_empty() {
        return;
    }
    assert!(n_in > 0 && x.len().is_multiple_of(n_in), "x is not [n_rows, {n_in}]");
    let n_rows = x.len() / n_in;
    let stride = check_segments(segments, n_rows, n_in, n_out);
    scratch.shrunk.grow::<f32>(n_rows * stride);
    let shrunk = OutMat::new(&mut scratch.shrunk.view_mut::<f32>()[..n_rows * stride], n_rows, stride);
    let y = OutMat::new(y, n_rows, n_out);
    let work = Work { backend: backend::active(), x, n_in, shrunk, y };
    let tiles = |segment: &Segment<'_>| segment.rows.len().div_ceil(ROW_TILE);
    let n_tiles: usize = segments.iter().map(tiles).sum();
    // Enough tiles for all threads: each does both steps for its rows, one fork for all.
    if n_tiles >= pool.threads() {
        pool.run_chunks(n_tiles, 1, &|unit| {
            let (unit, _) = find(segments, unit.start, |segment| (tiles(segment), 1));
            // SAFETY: tiles are disjoint rows, each handed out once.
            unsafe {
                work.shrink(&unit, 0..unit.pair.rank_panels());
                work.expand(&unit, 0..n_out.div_ceil(PANEL));
            }
        });
        return;
    }
    let shrinks = |segment: &Segment<'_>| (tiles(segment), segment.pair.rank_panels());
    pool.run_chunks(segments.iter().map(|s| shrinks(s).0 * shrinks(s).1).sum(), 1, &|unit| {
        let (unit, panel) = find(segments, unit.start, shrinks);
        // SAFETY: (tile, rank panel) pairs are disjoint parts of `shrunk`, each handed out once.
        unsafe { work.shrink(&unit, panel..panel + 1) };
    });
    let expands = |segment: &Segment<'_>| (tiles(segment), n_out.div_ceil(PANEL * PANELS_PER_UNIT));
    pool.run_chunks(segments.iter().map(|s| expands(s).0 * expands(s).1).sum(), 1, &|unit| {
        let (unit, chunk) = find(segments, unit.start, expands);
        let first = chunk * PANELS_PER_UNIT;
        // SAFETY: (tile, panel chunk) pairs are disjoint parts of `y`, each handed out once; the shrink step has ended.
        unsafe { work.expand(&unit, first..(first + PANELS_PER_UNIT).min(n_out.div_ceil(PANEL))) };
    });
}

/// What all units of a call share.
struct Work<'a> {
    backend: Backend,
    x: &'a [f32],
    n_in: usize,
    shrunk: OutMat,
    y: OutMat,
}

/// Some rows of a segment.
struct Tile<'a> {
    rows: Range<usize>,
    pair: &'a LoraPair,
}

// === impl Work ===

impl Work<'_> {
    /// A x for 16-rank panels of a tile.
    ///
    /// # Safety
    /// No other thread touches these panels of these rows of `shrunk`.
    unsafe fn shrink(&self, tile: &Tile<'_>, panels: Range<usize>) {
        let kernel = vector::Shrink(self, tile, panels);
        // SAFETY: the active backend is available; the rest is the contract of this function.
        unsafe { self.backend.run(kernel, |k| scalar::shrink(k.0, k.1, k.2)) };
    }

    /// `y` for 16-column panels of a tile.
    ///
    /// # Safety
    /// No other thread touches these panels of these rows of `y`, and the tile's rows of `shrunk` are complete.
    unsafe fn expand(&self, tile: &Tile<'_>, panels: Range<usize>) {
        let kernel = vector::Expand(self, tile, panels);
        // SAFETY: the active backend is available; the rest is the contract of this function.
        unsafe { self.backend.run(kernel, |k| scalar::expand(k.0, k.1, k.2)) };
    }

    fn x_row(&self, row: usize) -> &[f32] {
        &self.x[row * self.n_in..][..self.n_in]
    }
}

/// The tile of unit `index`, where each segment has (tiles × parts) units, and the part.
fn find<'a>(
    segments: &[Segment<'a>],
    mut index: usize,
    counts: impl Fn(&Segment<'a>) -> (usize, usize),
) -> (Tile<'a>, usize) {
    for segment in segments {
        let (tiles, parts) = counts(segment);
        if index < tiles * parts {
            let first = segment.rows.start + index / parts * ROW_TILE;
            let rows = first..(first + ROW_TILE).min(segment.rows.end);
            return (Tile { rows, pair: segment.pair }, index % parts);
        }
        index -= tiles * parts;
    }
    unreachable!("units are counted from the same segments")
}

/// Checks all segments; the largest padded rank.
fn check_segments(segments: &[Segment<'_>], n_rows: usize, n_in: usize, n_out: usize) -> usize {
    let (mut end, mut stride) = (0, 0);
    for Segment { rows, pair } in segments {
        assert!(rows.start >= end && rows.end >= rows.start, "segments overlap or are out of order");
        assert!(pair.n_in() == n_in && pair.n_out() == n_out, "a pair for [{}, {}]", pair.n_out(), pair.n_in());
        end = rows.end;
        stride = stride.max(pair.rank_panels() * PANEL);
    }
    assert!(end <= n_rows, "segments reach row {end} of {n_rows}");
    stride
}

#[cfg(test)]
mod tests;
