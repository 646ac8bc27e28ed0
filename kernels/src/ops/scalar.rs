//! The reference of the row-wise operations.

use super::exp_constants::{HIGH, LN2_HIGH, LN2_LOW, LOW, POLYNOMIAL};
use super::tree_sum;

pub(super) fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let inverse = inverse_rms(sum_of_squares(x), x.len(), eps);
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = x * inverse * w;
    }
}

fn sum_of_squares(x: &[f32]) -> f32 {
    let mut parts = [0.0f32; 16];
    for (i, x) in x.iter().enumerate() {
        parts[i % 16] = x.mul_add(*x, parts[i % 16]);
    }
    tree_sum(parts)
}

/// Shared by the backends.
pub(super) fn inverse_rms(sum: f32, n: usize, eps: f32) -> f32 {
    1.0 / (sum / n as f32 + eps).sqrt()
}

pub(super) fn rope(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in row.chunks_exact_mut(2 * cos.len()) {
        let (first, second) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (a.mul_add(*cos, -(*b * sin)), b.mul_add(*cos, *a * sin));
        }
    }
}

pub(super) fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = gate / (1.0 + exp(-gate)) * up;
    }
}

pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons that let NaN through.
    let x = if x < LOW { LOW } else { x };
    let x = if x > HIGH { HIGH } else { x };
    let n = (x * std::f32::consts::LOG2_E).round_ties_even();
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, x));
    let p = POLYNOMIAL[1..].iter().fold(POLYNOMIAL[0], |p, c| p.mul_add(r, *c));
    let p = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors: one alone would overflow or round twice at the ends of the range.
    let n = n as i32;
    let (n1, n2) = (n >> 1, n - (n >> 1));
    p * power_of_two(n1) * power_of_two(n2)
}

fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

pub(super) fn max_and_argmax(x: &[f32]) -> (f32, usize) {
    let mut best = (f32::NEG_INFINITY, 0);
    for (i, &x) in x.iter().enumerate() {
        if x > best.0 {
            best = (x, i);
        }
    }
    best
}
