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

/// Deltas of one linear layer.
#[derive(Debug)]
pub struct Delta<'a> {
    /// In ascending row order, without overlap.
    pub segments: &'a [Segment<'a>],
    /// What they are added to, `[n_rows, n_out]`.
    pub y: &'a mut [f32],
    /// Width of the layer's output.
    pub n_out: usize,
}

/// Most layers in one group; a transformer block needs three.
pub const GROUP_MAX: usize = 4;

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
    lora_delta_group(pool, x, n_in, &mut [Delta { segments, y, n_out }], scratch);
}

/// The deltas of several layers of the same input `x` (q, k and v; gate and up): forks once for all. The bits are those
/// of separate [`lora_delta`] calls.
///
/// # Panics
/// As [`lora_delta`], or when there are more than [`GROUP_MAX`] layers.
pub fn lora_delta_group(pool: &Pool, x: &[f32], n_in: usize, deltas: &mut [Delta<'_>], scratch: &mut Scratch) {
    assert!(deltas.len() <= GROUP_MAX, "{} layers in one group", deltas.len());
    assert!(n_in > 0 && x.len().is_multiple_of(n_in), "x is not [n_rows, {n_in}]");
    let n_rows = x.len() / n_in;
    let strides = deltas.iter().map(|delta| check_segments(delta.segments, n_rows, n_in, delta.n_out));
    let stride = strides.max().unwrap_or(0);
    let n_shrunk = n_rows * stride;
    scratch.shrunk.grow::<f32>(deltas.len() * n_shrunk);
    let mut shrunk = &mut scratch.shrunk.view_mut::<f32>()[..deltas.len() * n_shrunk];
    let mut works = [const { None }; GROUP_MAX];
    for (work, delta) in works.iter_mut().zip(deltas) {
        let own;
        (own, shrunk) = std::mem::take(&mut shrunk).split_at_mut(n_shrunk);
        let (shrunk, y) = (OutMat::new(own, n_rows, stride), OutMat::new(delta.y, n_rows, delta.n_out));
        *work = Some((Work { backend: backend::active(), x, n_in, shrunk, y }, delta.segments));
    }
    let n_tiles: usize = works.iter().flatten().flat_map(|(_, segments)| *segments).map(tiles).sum();
    // Enough tiles for all threads: each does both steps for its rows, one fork for all.
    if n_tiles >= pool.threads() {
        let whole = |segment: &Segment<'_>| (tiles(segment), 1);
        pool.run_chunks(n_tiles, 1, &|unit| {
            let (work, mut tile, _) = find(&works, unit.start, whole);
            tile.next = (unit.end < n_tiles).then(|| find(&works, unit.end, whole).1.pair);
            // SAFETY: tiles are disjoint rows of their layers, each handed out once.
            unsafe {
                work.shrink(&tile, 0..tile.pair.rank_panels());
                work.expand(&tile, 0..work.y.n_cols().div_ceil(PANEL));
            }
        });
        return;
    }
    let shrinks = |segment: &Segment<'_>| (tiles(segment), segment.pair.rank_panels());
    pool.run_chunks(count(&works, shrinks), 1, &|unit| {
        let (work, tile, panel) = find(&works, unit.start, shrinks);
        // SAFETY: (tile, rank panel) pairs are disjoint parts of `shrunk`, each handed out once.
        unsafe { work.shrink(&tile, panel..panel + 1) };
    });
    let expands = |segment: &Segment<'_>| (tiles(segment), segment.pair.n_out().div_ceil(PANEL * PANELS_PER_UNIT));
    pool.run_chunks(count(&works, expands), 1, &|unit| {
        let (work, tile, chunk) = find(&works, unit.start, expands);
        let first = chunk * PANELS_PER_UNIT;
        let end = (first + PANELS_PER_UNIT).min(work.y.n_cols().div_ceil(PANEL));
        // SAFETY: (tile, panel chunk) pairs are disjoint parts of `y`, each handed out once; the shrink step has ended.
        unsafe { work.expand(&tile, first..end) };
    });
}

/// The layers of a call with their segments.
type Works<'a> = [Option<(Work<'a>, &'a [Segment<'a>])>; GROUP_MAX];

fn tiles(segment: &Segment<'_>) -> usize {
    segment.rows.len().div_ceil(ROW_TILE)
}

/// Units in all, where each segment has (tiles × parts) of them.
fn count(works: &Works<'_>, counts: impl Fn(&Segment<'_>) -> (usize, usize)) -> usize {
    let segments = works.iter().flatten().flat_map(|(_, segments)| *segments);
    segments.map(|segment| counts(segment).0 * counts(segment).1).sum()
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
    /// The pair that most likely comes next on this thread; only ever fetched.
    next: Option<&'a LoraPair>,
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

/// Layer and tile of unit `index`, where each segment has (tiles × parts) units, and the part.
fn find<'a, 'b>(
    works: &'b Works<'a>,
    mut index: usize,
    counts: impl Fn(&Segment<'_>) -> (usize, usize),
) -> (&'b Work<'a>, Tile<'a>, usize) {
    for (work, segments) in works.iter().flatten() {
        for segment in *segments {
            let (tiles, parts) = counts(segment);
            if index < tiles * parts {
                let first = segment.rows.start + index / parts * ROW_TILE;
                let rows = first..(first + ROW_TILE).min(segment.rows.end);
                return (work, Tile { rows, pair: segment.pair, next: None }, index % parts);
            }
            index -= tiles * parts;
        }
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
