//! The reference: what every backend of the product must compute, bit for bit, written for reading.

use super::quantise::{BLOCK, RowMut, block_scale};
use super::{F32Unit, Int8Unit};
use crate::matrix::PANEL;

/// Rounds one row; see `quantise` for the rule.
pub(super) fn quantise_row(x: &[f32], to: RowMut<'_>) {
    for (block, x) in x.chunks_exact(BLOCK).enumerate() {
        let max_bits = x.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
        let (scale, inverse) = block_scale(max_bits);
        let codes = &mut to.codes[block * BLOCK..][..BLOCK];
        for (code, x) in codes.iter_mut().zip(x) {
            // A block without a finite maximum has code 0 and scale NaN.
            *code = if scale.is_nan() { 0 } else { (x * inverse).round_ties_even() as i8 };
        }
        to.scales[block] = scale;
        let halves = [0, 1].map(|half| codes[half * 16..][..16].iter().map(|&code| i32::from(code)).sum::<i32>());
        for (half, sum) in halves.into_iter().enumerate() {
            to.neg_sums16[2 * block + half] = -sum;
            to.sums16[2 * block + half] = scale * sum as f32;
        }
        to.neg_sums32[block] = -(halves[0] + halves[1]);
        to.sums32[block] = scale * (halves[0] + halves[1]) as f32;
    }
}

/// Per group: an exact integer dot product with the zero point folded in, then one fused multiply-add with both scales
/// and one with the minimum.
pub(super) fn int8(unit: &Int8Unit<'_>) {
    let (coded, n_in) = (unit.coded, unit.n_in);
    let group_len = coded.form.group;
    for row in unit.rows.clone() {
        let x = unit.activations.row(row, n_in);
        let (neg_sums, sums) = if group_len == 16 { (x.neg_sums16, x.sums16) } else { (x.neg_sums32, x.sums32) };
        for panel in unit.panels.clone() {
            let n_cols = (unit.out.n_cols() - panel * PANEL).min(PANEL);
            // SAFETY: the unit owns these columns of this row.
            let out = unsafe { unit.out.cols(row, panel * PANEL, n_cols) };
            for (lane, out) in out.iter_mut().enumerate() {
                let mut acc = 0.0f32;
                for group in 0..n_in / group_len {
                    let mut dot = coded.zero() * neg_sums[group];
                    for k in group * group_len..(group + 1) * group_len {
                        dot += i32::from(coded.code(panel, lane, k, n_in)) * i32::from(x.codes[k]);
                    }
                    let scale = coded.scale(panel, lane, group, n_in) * x.scales[group * group_len / BLOCK];
                    acc = (dot as f32).mul_add(scale, acc);
                    if coded.form.has_min {
                        acc = coded.min(panel, lane, group, n_in).mul_add(sums[group], acc);
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
