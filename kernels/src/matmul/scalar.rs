//! The reference: what every backend of the product must compute, bit for bit, written for reading.

use super::quantise::{BLOCK, ROWS, Rounded, block_scale};
use super::{F32Unit, Int8Unit};
use crate::matrix::PANEL;

/// Rounds one row into place `row` of its eight; see `quantise` for the rule.
pub(super) fn quantise_row(x: &[f32], blocks: &mut [Rounded], row: usize) {
    for (x, block) in x.chunks_exact(BLOCK).zip(blocks) {
        let max_bits = x.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
        let (scale, inverse) = block_scale(max_bits);
        let codes = &mut block.codes[row];
        for (code, x) in codes.iter_mut().zip(x) {
            // A block without a finite maximum has code 0 and scale NaN.
            *code = if scale.is_nan() { 0 } else { (x * inverse).round_ties_even() as i8 };
        }
        let halves = [0, 1].map(|half| codes[half * 16..][..16].iter().map(|&code| i32::from(code)).sum::<i32>());
        block.put(row, scale, halves);
    }
}

/// Per group: an exact integer dot product with the zero point folded in, then one fused multiply-add with both scales
/// and one with the minimum.
pub(super) fn int8(unit: &Int8Unit<'_>) {
    let (coded, n_in) = (unit.coded, unit.n_in);
    let group_len = coded.form.group;
    for row in unit.rows.clone() {
        let (blocks, place) = (unit.activations.rows(row / ROWS * ROWS, n_in), row % ROWS);
        for panel in unit.panels.clone() {
            let n_cols = (unit.out.n_cols() - panel * PANEL).min(PANEL);
            // SAFETY: the unit owns these columns of this row.
            let out = unsafe { unit.out.cols(row, panel * PANEL, n_cols) };
            for (lane, out) in out.iter_mut().enumerate() {
                let mut acc = 0.0f32;
                for group in 0..n_in / group_len {
                    let first = group * group_len;
                    let block = &blocks[first / BLOCK];
                    let (neg_sum, sum) = match group_len {
                        BLOCK => (block.neg_sums[place], block.sums[place]),
                        _ => (block.half_neg_sums[group % 2][place], block.half_sums[group % 2][place]),
                    };
                    let mut dot = coded.zero() * neg_sum;
                    for k in first..first + group_len {
                        dot += i32::from(coded.code(panel, lane, k, n_in)) * i32::from(block.codes[place][k % BLOCK]);
                    }
                    let scale = coded.scale(panel, lane, group, n_in) * block.scales[place];
                    acc = (dot as f32).mul_add(scale, acc);
                    if coded.form.has_min {
                        acc = coded.min(panel, lane, group, n_in).mul_add(sum, acc);
                    }
                }
                *out = acc;
            }
        }
    }
}

/// One chain of fused multiply-adds over the inputs, from 0.
pub(super) fn dense(unit: &F32Unit<'_>) {
    let n_in = unit.w.n_in();
    for panel in unit.panels.clone() {
        let n_cols = (unit.out.n_cols() - panel * PANEL).min(PANEL);
        for row in unit.rows.clone() {
            let x = &unit.x[row * n_in..][..n_in];
            // SAFETY: the unit owns these columns of this row.
            let out = unsafe { unit.out.cols(row, panel * PANEL, n_cols) };
            for (lane, out) in out.iter_mut().enumerate() {
                *out = x.iter().enumerate().fold(0.0, |acc, (k, x)| x.mul_add(unit.w.value(panel, lane, k), acc));
            }
        }
    }
}
