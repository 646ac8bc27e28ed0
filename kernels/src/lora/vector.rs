//! The adapter delta for every instruction set: up to 4 rows share each vector of A and B.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or panel in several arrays")]

use std::ops::Range;

use super::pair::{LoraDtype, LoraPair};
use super::scalar::{CHAINS, fold};
use super::{Tile, Work};
use crate::aligned::Aligned;
use crate::matrix::PANEL;
use crate::simd::{BF16, F16, F32, Kernel, LINE, Simd, lanes, prefetch};

/// Rows per inner tile: 4 rows by 4 chains are half of the registers.
const ROWS: usize = 4;

/// How far ahead of the reads memory is fetched, in bytes: a page, so that the fetch of the next one is under way when
/// the hardware stops at the end of this one.
const AHEAD: usize = 4 << 10;

/// A matrix that is read from front to back once, and the one that will be read after it.
struct Ahead {
    end: *const u8,
    next: *const u8,
}

// === impl Ahead ===

impl Ahead {
    fn new(of: &Aligned, next: Option<&Aligned>) -> Self {
        let this = of.view::<u8>();
        // Without a next one the last fetches fall on what was read already.
        Self { end: this.as_ptr_range().end, next: next.unwrap_or(of).view::<u8>().as_ptr() }
    }

    /// Fetches `lines` cache lines that lie [`AHEAD`] of the reads at `at`.
    #[inline(always)]
    fn fetch(&self, at: *const u8, lines: usize) {
        for line in 0..lines {
            let ahead = at.wrapping_add(AHEAD + line * LINE);
            let beyond = (ahead as usize).wrapping_sub(self.end as usize);
            prefetch(if ahead < self.end { ahead } else { self.next.wrapping_add(beyond) });
        }
    }
}

/// Bytes of an element of kind `K`.
const fn bytes<const K: u8>() -> usize {
    if K == F32 { 4 } else { 2 }
}

/// A x for some rank panels of a tile, with the contract of `scalar::shrink`.
pub(super) struct Shrink<'a>(pub(super) &'a Work<'a>, pub(super) &'a Tile<'a>, pub(super) Range<usize>);

impl Kernel for Shrink<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(work, tile, panels) = self;
        // SAFETY: the element kind is the pair's; the rest is the contract of this function.
        unsafe {
            match tile.pair.dtype {
                LoraDtype::F32 => shrink_rows::<S, F32>(work, tile, panels),
                LoraDtype::F16 => shrink_rows::<S, F16>(work, tile, panels),
                LoraDtype::BF16 => shrink_rows::<S, BF16>(work, tile, panels),
            }
        }
    }
}

/// # Safety
/// The CPU has the instructions of `S`; otherwise as `scalar::shrink`, with `K` the kind of the pair's elements.
#[inline(always)]
unsafe fn shrink_rows<S: Simd, const K: u8>(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    let ahead = Ahead::new(&tile.pair.a, Some(&tile.pair.b));
    for panel in panels {
        let mut row = tile.rows.start;
        while row < tile.rows.end {
            let ahead = (row == tile.rows.start).then_some(&ahead);
            // SAFETY: the rows lie inside the tile.
            row += unsafe {
                match tile.rows.end - row {
                    1 => shrink_tile::<S, K, 1>(work, tile.pair, panel, row, ahead),
                    2 => shrink_tile::<S, K, 2>(work, tile.pair, panel, row, ahead),
                    3 => shrink_tile::<S, K, 3>(work, tile.pair, panel, row, ahead),
                    _ => shrink_tile::<S, K, ROWS>(work, tile.pair, panel, row, ahead),
                }
            };
        }
    }
}

/// # Safety
/// As `shrink_rows`; rows `row..row + R` exist.
#[inline(always)]
unsafe fn shrink_tile<S: Simd, const K: u8, const R: usize>(
    work: &Work<'_>,
    pair: &LoraPair,
    panel: usize,
    row: usize,
    ahead: Option<&Ahead>,
) -> usize {
    let (width, steps) = (pair.width(), pair.steps());
    let a = pair.a.view::<u8>().as_ptr();
    let base = panel * steps * PANEL;
    let x: [_; R] = std::array::from_fn(|r| work.x_row(row + r).as_ptr());
    // SAFETY: every step is one of the pair, whose width the entry compared with that of `x`; loads of `x` end at its
    // last input.
    let acc = unsafe {
        let mut acc = [[S::splat(0.0); CHAINS]; R];
        if width == PANEL {
            for first in (0..steps - steps % CHAINS).step_by(CHAINS) {
                if let Some(ahead) = ahead {
                    let lines = CHAINS * PANEL * bytes::<K>() / LINE;
                    ahead.fetch(a.add((base + first * PANEL) * bytes::<K>()), lines);
                }
                for chain in 0..CHAINS {
                    let a = S::load::<K>(a, base + (first + chain) * PANEL);
                    for r in 0..R {
                        acc[r][chain] = S::mul_add(S::splat(*x[r].add(first + chain)), a, acc[r][chain]);
                    }
                }
            }
            for step in steps - steps % CHAINS..steps {
                let a = S::load::<K>(a, base + step * PANEL);
                for r in 0..R {
                    let chain = &mut acc[r][step % CHAINS];
                    *chain = S::mul_add(S::splat(*x[r].add(step)), a, *chain);
                }
            }
        } else {
            let inputs = PANEL / width;
            for first in (0..steps).step_by(CHAINS) {
                for chain in 0..CHAINS.min(steps - first) {
                    let at = (first + chain) * inputs;
                    let n = (pair.n_in() - at).min(inputs);
                    let a = S::load::<K>(a, base + (first + chain) * PANEL);
                    for r in 0..R {
                        let x = S::load_first::<F32>(x[r].cast(), at, n);
                        acc[r][chain] = S::mul_add(S::spread(x, width.trailing_zeros()), a, acc[r][chain]);
                    }
                }
            }
        }
        acc
    };
    for r in 0..R {
        let mut sums = [[0.0; PANEL]; CHAINS];
        for chain in 0..CHAINS {
            // SAFETY: the contract of this function.
            sums[chain] = unsafe { lanes::<S>(acc[r][chain]) };
        }
        // SAFETY: the contract of `scalar::shrink`.
        let to = unsafe { work.shrunk.cols(row + r, panel * PANEL, PANEL) };
        to.copy_from_slice(&fold(sums, width));
    }
    R
}

/// `y` for some output panels of a tile, with the contract of `scalar::expand`.
pub(super) struct Expand<'a>(pub(super) &'a Work<'a>, pub(super) &'a Tile<'a>, pub(super) Range<usize>);

impl Kernel for Expand<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(work, tile, panels) = self;
        // SAFETY: the element kind is the pair's; the rest is the contract of this function.
        unsafe {
            match tile.pair.dtype {
                LoraDtype::F32 => expand_panels::<S, F32>(work, tile, panels),
                LoraDtype::F16 => expand_panels::<S, F16>(work, tile, panels),
                LoraDtype::BF16 => expand_panels::<S, BF16>(work, tile, panels),
            }
        }
    }
}

/// # Safety
/// The CPU has the instructions of `S`; otherwise as `scalar::expand`, with `K` the kind of the pair's elements.
#[inline(always)]
unsafe fn expand_panels<S: Simd, const K: u8>(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    let ahead = Ahead::new(&tile.pair.b, tile.next.map(|next| &next.a));
    let mut panel = panels.start;
    while panel < panels.end {
        let pair = panels.end - panel >= 2;
        let mut row = tile.rows.start;
        while row < tile.rows.end {
            if row == tile.rows.start {
                let panel_bytes = tile.pair.rank() * PANEL * bytes::<K>();
                let at = tile.pair.b.view::<u8>().as_ptr().wrapping_add(panel * panel_bytes);
                ahead.fetch(at, (if pair { 2 } else { 1 } * panel_bytes).div_ceil(LINE));
            }
            // SAFETY: rows and panels lie inside the tile and the range.
            row += unsafe {
                match (tile.rows.end - row, pair) {
                    (1, true) => expand_tile::<S, K, 1, 2>(work, tile.pair, panel, row),
                    (2 | 3, true) => expand_tile::<S, K, 2, 2>(work, tile.pair, panel, row),
                    (_, true) => expand_tile::<S, K, ROWS, 2>(work, tile.pair, panel, row),
                    (1, false) => expand_tile::<S, K, 1, 1>(work, tile.pair, panel, row),
                    (2 | 3, false) => expand_tile::<S, K, 2, 1>(work, tile.pair, panel, row),
                    (_, false) => expand_tile::<S, K, ROWS, 1>(work, tile.pair, panel, row),
                }
            };
        }
        panel += if pair { 2 } else { 1 };
    }
}

/// # Safety
/// As `expand_panels`; rows `row..row + R` and panels `panel..panel + P` exist.
#[inline(always)]
unsafe fn expand_tile<S: Simd, const K: u8, const R: usize, const P: usize>(
    work: &Work<'_>,
    pair: &LoraPair,
    panel: usize,
    row: usize,
) -> usize {
    let rank = pair.rank();
    let b = pair.b.view::<u8>().as_ptr();
    // SAFETY: the shrink step of these rows is complete (contract of `scalar::expand`).
    let shrunk: [_; R] = std::array::from_fn(|r| unsafe { work.shrunk.cols_shared(row + r, 0, rank) }.as_ptr());
    // SAFETY: `j` is below the rank of `b` and of the shrunk rows; this thread owns the columns (contract of
    // `scalar::expand`), and loads and stores keep to them.
    unsafe {
        let mut acc = [[S::splat(0.0); P]; R];
        for j in 0..rank {
            let mut columns = [S::splat(0.0); P];
            for p in 0..P {
                columns[p] = S::load::<K>(b, ((panel + p) * rank + j) * PANEL);
            }
            for r in 0..R {
                let shrunk = S::splat(*shrunk[r].add(j));
                for p in 0..P {
                    acc[r][p] = S::mul_add(shrunk, columns[p], acc[r][p]);
                }
            }
        }
        let scale = S::splat(pair.scale);
        for r in 0..R {
            for p in 0..P {
                let column = (panel + p) * PANEL;
                let n_cols = (pair.n_out() - column).min(PANEL);
                let to = work.y.cols(row + r, column, n_cols).as_mut_ptr();
                let mut y = S::mul_add(scale, acc[r][p], S::load_first::<F32>(to.cast(), 0, n_cols));
                if let Some(row_scale) = &pair.row_scale {
                    y = S::mul(y, S::load_first::<F32>(row_scale.as_ptr().cast(), column, n_cols));
                }
                S::store_first(to, y, n_cols);
            }
        }
    }
    R
}
