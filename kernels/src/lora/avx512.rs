//! AVX-512 backend of the adapter delta: up to 4 rows share each vector of A and B.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or panel in several arrays")]

use std::arch::x86_64::*;
use std::ops::Range;

use super::pair::{LoraDtype, LoraPair};
use super::scalar::{CHAINS, fold};
use super::{Tile, Work};
use crate::matrix::PANEL;
use crate::ops::avx512::lanes;
use crate::simd::{BF16, F16, F32, first_lanes, load16};

/// Rows per inner tile: 4 rows by 4 chains are half of the registers.
const ROWS: usize = 4;

/// # Safety
/// The CPU has AVX-512 F, BW and VL; otherwise as `scalar::shrink`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn shrink(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    // SAFETY: the element kind is the pair's; the rest is the contract of this function.
    unsafe {
        match tile.pair.dtype {
            LoraDtype::F32 => shrink_rows::<F32>(work, tile, panels),
            LoraDtype::F16 => shrink_rows::<F16>(work, tile, panels),
            LoraDtype::BF16 => shrink_rows::<BF16>(work, tile, panels),
        }
    }
}

/// # Safety
/// As `shrink`, with `K` the kind of the pair's elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn shrink_rows<const K: u8>(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    for panel in panels {
        let mut row = tile.rows.start;
        while row < tile.rows.end {
            // SAFETY: the rows lie inside the tile.
            row += unsafe {
                match tile.rows.end - row {
                    1 => shrink_tile::<K, 1>(work, tile.pair, panel, row),
                    2 => shrink_tile::<K, 2>(work, tile.pair, panel, row),
                    3 => shrink_tile::<K, 3>(work, tile.pair, panel, row),
                    _ => shrink_tile::<K, ROWS>(work, tile.pair, panel, row),
                }
            };
        }
    }
}

/// # Safety
/// As `shrink_rows`; rows `row..row + R` exist.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn shrink_tile<const K: u8, const R: usize>(
    work: &Work<'_>,
    pair: &LoraPair,
    panel: usize,
    row: usize,
) -> usize {
    let (width, steps) = (pair.width(), pair.steps());
    let a = pair.a.view::<u8>().as_ptr();
    let base = panel * steps * PANEL;
    let mut acc = [[_mm512_setzero_ps(); CHAINS]; R];
    if width == PANEL {
        let x: [_; R] = std::array::from_fn(|r| work.x_row(row + r).as_ptr());
        for first in (0..steps - steps % CHAINS).step_by(CHAINS) {
            for chain in 0..CHAINS {
                let step = first + chain;
                // SAFETY: `step` is an input of the pair, whose width the entry compared with that of `x`.
                unsafe {
                    let a = load16::<K>(a, base + step * PANEL);
                    for r in 0..R {
                        acc[r][chain] = _mm512_fmadd_ps(_mm512_set1_ps(*x[r].add(step)), a, acc[r][chain]);
                    }
                }
            }
        }
        for step in steps - steps % CHAINS..steps {
            // SAFETY: as above.
            unsafe {
                let a = load16::<K>(a, base + step * PANEL);
                for r in 0..R {
                    let chain = &mut acc[r][step % CHAINS];
                    *chain = _mm512_fmadd_ps(_mm512_set1_ps(*x[r].add(step)), a, *chain);
                }
            }
        }
    } else {
        let inputs = PANEL / width;
        let spread = _mm512_srlv_epi32(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            _mm512_set1_epi32(width.trailing_zeros() as i32),
        );
        let x: [_; R] = std::array::from_fn(|r| work.x_row(row + r));
        let mut step = 0;
        while step < steps {
            for chain in 0..CHAINS.min(steps - step) {
                let at = (step + chain) * inputs;
                let mask = first_lanes((pair.n_in() - at).min(inputs));
                // SAFETY: the mask ends at the last input; the step exists.
                unsafe {
                    let a = load16::<K>(a, base + (step + chain) * PANEL);
                    for r in 0..R {
                        let x = _mm512_maskz_loadu_ps(mask, x[r].as_ptr().add(at));
                        acc[r][chain] = _mm512_fmadd_ps(_mm512_permutexvar_ps(spread, x), a, acc[r][chain]);
                    }
                }
            }
            step += CHAINS;
        }
    }
    for r in 0..R {
        // SAFETY: the contract of `scalar::shrink`.
        let to = unsafe { work.shrunk.cols(row + r, panel * PANEL, PANEL) };
        to.copy_from_slice(&fold(acc[r].map(|chain| lanes(chain)), width));
    }
    R
}

/// # Safety
/// The CPU has AVX-512 F, BW and VL; otherwise as `scalar::expand`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn expand(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    // SAFETY: the element kind is the pair's; the rest is the contract of this function.
    unsafe {
        match tile.pair.dtype {
            LoraDtype::F32 => expand_panels::<F32>(work, tile, panels),
            LoraDtype::F16 => expand_panels::<F16>(work, tile, panels),
            LoraDtype::BF16 => expand_panels::<BF16>(work, tile, panels),
        }
    }
}

/// # Safety
/// As `expand`, with `K` the kind of the pair's elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn expand_panels<const K: u8>(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    let mut panel = panels.start;
    while panel < panels.end {
        let pair = panels.end - panel >= 2;
        let mut row = tile.rows.start;
        while row < tile.rows.end {
            // SAFETY: rows and panels lie inside the tile and the range.
            row += unsafe {
                match (tile.rows.end - row, pair) {
                    (1, true) => expand_tile::<K, 1, 2>(work, tile.pair, panel, row),
                    (2 | 3, true) => expand_tile::<K, 2, 2>(work, tile.pair, panel, row),
                    (_, true) => expand_tile::<K, ROWS, 2>(work, tile.pair, panel, row),
                    (1, false) => expand_tile::<K, 1, 1>(work, tile.pair, panel, row),
                    (2 | 3, false) => expand_tile::<K, 2, 1>(work, tile.pair, panel, row),
                    (_, false) => expand_tile::<K, ROWS, 1>(work, tile.pair, panel, row),
                }
            };
        }
        panel += if pair { 2 } else { 1 };
    }
}

/// # Safety
/// As `expand_panels`; rows `row..row + R` and panels `panel..panel + P` exist.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn expand_tile<const K: u8, const R: usize, const P: usize>(
    work: &Work<'_>,
    pair: &LoraPair,
    panel: usize,
    row: usize,
) -> usize {
    let rank = pair.rank();
    let b = pair.b.view::<u8>().as_ptr();
    // SAFETY: the shrink step of these rows is complete (contract of `scalar::expand`).
    let shrunk: [_; R] = std::array::from_fn(|r| unsafe { work.shrunk.cols_shared(row + r, 0, rank) }.as_ptr());
    let mut acc = [[_mm512_setzero_ps(); P]; R];
    for j in 0..rank {
        // SAFETY: `j` is below the rank of `b` and of the shrunk rows.
        unsafe {
            let mut columns = [_mm512_setzero_ps(); P];
            for p in 0..P {
                columns[p] = load16::<K>(b, ((panel + p) * rank + j) * PANEL);
            }
            for r in 0..R {
                let shrunk = _mm512_set1_ps(*shrunk[r].add(j));
                for p in 0..P {
                    acc[r][p] = _mm512_fmadd_ps(shrunk, columns[p], acc[r][p]);
                }
            }
        }
    }
    let scale = _mm512_set1_ps(pair.scale);
    for r in 0..R {
        for p in 0..P {
            let column = (panel + p) * PANEL;
            let n_cols = (pair.n_out() - column).min(PANEL);
            let mask = first_lanes(n_cols);
            // SAFETY: this thread owns the columns (contract of `scalar::expand`); the mask keeps to them.
            unsafe {
                let to = work.y.cols(row + r, column, n_cols).as_mut_ptr();
                let mut y = _mm512_fmadd_ps(scale, acc[r][p], _mm512_maskz_loadu_ps(mask, to));
                if let Some(row_scale) = &pair.row_scale {
                    y = _mm512_mul_ps(y, _mm512_maskz_loadu_ps(mask, row_scale.as_ptr().add(column)));
                }
                _mm512_mask_storeu_ps(to, mask, y);
            }
        }
    }
    R
}
