//! The reference of the adapter delta.

use std::ops::Range;

use super::{Tile, Work};
use crate::matrix::PANEL;

/// Partial sums over steps; fixed, because it decides the order of summation.
pub(super) const CHAINS: usize = 4;

/// Adds the partial sums of one 16-lane vector: the chains as a tree, then the lanes of equal rank, halves first.
/// Shared by the backends; the first `width` values are the result.
pub(super) fn fold(chains: [[f32; PANEL]; CHAINS], width: usize) -> [f32; PANEL] {
    let mut sums: [f32; PANEL] = std::array::from_fn(|l| (chains[0][l] + chains[1][l]) + (chains[2][l] + chains[3][l]));
    let mut half = PANEL / 2;
    while half >= width {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
        half /= 2;
    }
    sums
}

/// # Safety
/// No other thread touches these panels of the tile's rows of `shrunk`.
pub(super) unsafe fn shrink(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    let (pair, width) = (tile.pair, tile.pair.width());
    let inputs = PANEL / width;
    for row in tile.rows.clone() {
        let x = work.x_row(row);
        for panel in panels.clone() {
            let mut chains = [[0.0f32; PANEL]; CHAINS];
            for step in 0..pair.steps() {
                for (lane, sum) in chains[step % CHAINS].iter_mut().enumerate() {
                    // Inputs beyond the end count as 0, as A's padding does.
                    let x = x.get(step * inputs + lane / width).copied().unwrap_or(0.0);
                    *sum = x.mul_add(pair.read(&pair.a, (panel * pair.steps() + step) * PANEL + lane), *sum);
                }
            }
            // SAFETY: the contract of this function.
            unsafe { work.shrunk.cols(row, panel * PANEL, PANEL) }.copy_from_slice(&fold(chains, width));
        }
    }
}

/// # Safety
/// No other thread touches these panels of the tile's rows of `y`; the rows of `shrunk` are complete.
pub(super) unsafe fn expand(work: &Work<'_>, tile: &Tile<'_>, panels: Range<usize>) {
    let pair = tile.pair;
    for row in tile.rows.clone() {
        // SAFETY: the contract of this function.
        let shrunk = unsafe { work.shrunk.cols_shared(row, 0, pair.rank()) };
        for panel in panels.clone() {
            let n_cols = (pair.n_out() - panel * PANEL).min(PANEL);
            // SAFETY: the contract of this function.
            let y = unsafe { work.y.cols(row, panel * PANEL, n_cols) };
            for (lane, y) in y.iter_mut().enumerate() {
                let delta = shrunk.iter().enumerate().fold(0.0, |acc: f32, (r, shrunk)| {
                    shrunk.mul_add(pair.read(&pair.b, (panel * pair.rank() + r) * PANEL + lane), acc)
                });
                *y = pair.scale.mul_add(delta, *y);
                if let Some(row_scale) = &pair.row_scale {
                    *y *= row_scale[panel * PANEL + lane];
                }
            }
        }
    }
}
