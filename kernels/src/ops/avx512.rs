//! AVX-512 backend of the row-wise operations: 16 columns a vector, masked tails.

use std::arch::x86_64::*;

use super::exp_constants::{HIGH, LN2_HIGH, LN2_LOW, LOW, POLYNOMIAL};
use super::{scalar, tree_sum};

/// Lanes of what is left of `n` values from `at` on.
fn tail(n: usize, at: usize) -> __mmask16 {
    if n - at >= 16 { 0xffff } else { (1 << (n - at)) - 1 }
}

/// The 16 lanes of a vector.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn lanes(v: __m512) -> [f32; 16] {
    let mut out = [0.0; 16];
    // SAFETY: the array takes 16 values.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), v) };
    out
}

/// `scalar::exp`, lane by lane.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn exp(x: __m512) -> __m512 {
    // max and min return their second operand when either is NaN, so NaN goes through.
    let x = _mm512_max_ps(_mm512_set1_ps(LOW), x);
    let x = _mm512_min_ps(_mm512_set1_ps(HIGH), x);
    let whole = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E)));
    let n = _mm512_cvtepi32_ps(whole);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_HIGH), x);
    let r = _mm512_fmadd_ps(n, _mm512_set1_ps(-LN2_LOW), r);
    let mut p = _mm512_set1_ps(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
    }
    let p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0));
    let n1 = _mm512_srai_epi32::<1>(whole);
    let n2 = _mm512_sub_epi32(whole, n1);
    let bias = _mm512_set1_epi32(127);
    let power = |n| _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(n, bias)));
    _mm512_mul_ps(_mm512_mul_ps(p, power(n1)), power(n2))
}

/// # Safety
/// The CPU has AVX-512 F; the three slices have one length.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn rms_norm(x: &[f32], w: &[f32], eps: f32, out: &mut [f32]) {
    let n = x.len();
    let mut parts = _mm512_setzero_ps();
    for at in (0..n).step_by(16) {
        // SAFETY: the mask keeps the load inside the slice.
        let x = unsafe { _mm512_maskz_loadu_ps(tail(n, at), x.as_ptr().add(at)) };
        // Lanes beyond the end add 0 to a sum that is never -0.
        parts = _mm512_fmadd_ps(x, x, parts);
    }
    let inverse = _mm512_set1_ps(scalar::inverse_rms(tree_sum(lanes(parts)), n, eps));
    for at in (0..n).step_by(16) {
        let mask = tail(n, at);
        // SAFETY: the mask keeps loads and the store inside the slices.
        unsafe {
            let x = _mm512_maskz_loadu_ps(mask, x.as_ptr().add(at));
            let w = _mm512_maskz_loadu_ps(mask, w.as_ptr().add(at));
            _mm512_mask_storeu_ps(out.as_mut_ptr().add(at), mask, _mm512_mul_ps(_mm512_mul_ps(x, inverse), w));
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F; `head` is twice as long as `cos` and `sin`.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn rope(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    for at in (0..half).step_by(16) {
        let mask = tail(half, at);
        // SAFETY: the mask keeps loads and stores inside each half.
        unsafe {
            let first = head.as_mut_ptr().add(at);
            let second = head.as_mut_ptr().add(half + at);
            let a = _mm512_maskz_loadu_ps(mask, first);
            let b = _mm512_maskz_loadu_ps(mask, second);
            let cos = _mm512_maskz_loadu_ps(mask, cos.as_ptr().add(at));
            let sin = _mm512_maskz_loadu_ps(mask, sin.as_ptr().add(at));
            // fmsub rounds once, as adding the negated product does.
            _mm512_mask_storeu_ps(first, mask, _mm512_fmsub_ps(a, cos, _mm512_mul_ps(b, sin)));
            _mm512_mask_storeu_ps(second, mask, _mm512_fmadd_ps(b, cos, _mm512_mul_ps(a, sin)));
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F; the three slices have one length.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let n = out.len();
    let sign = _mm512_set1_epi32(i32::MIN);
    for at in (0..n).step_by(16) {
        let mask = tail(n, at);
        // SAFETY: the mask keeps loads and the store inside the slices.
        unsafe {
            let gate = _mm512_maskz_loadu_ps(mask, gate.as_ptr().add(at));
            let up = _mm512_maskz_loadu_ps(mask, up.as_ptr().add(at));
            let negated = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(gate), sign));
            let denominator = _mm512_add_ps(_mm512_set1_ps(1.0), exp(negated));
            let value = _mm512_mul_ps(_mm512_div_ps(gate, denominator), up);
            _mm512_mask_storeu_ps(out.as_mut_ptr().add(at), mask, value);
        }
    }
}

/// # Safety
/// The CPU has AVX-512 F.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn max_and_argmax(x: &[f32]) -> (f32, usize) {
    let mut best = _mm512_set1_ps(f32::NEG_INFINITY);
    let mut best_at = _mm512_set1_epi32(0);
    let mut index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for at in (0..x.len()).step_by(16) {
        // SAFETY: the mask keeps the load inside the slice.
        let v = unsafe { _mm512_mask_loadu_ps(best, tail(x.len(), at), x.as_ptr().add(at)) };
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, best);
        best = _mm512_mask_mov_ps(best, above, v);
        best_at = _mm512_mask_mov_epi32(best_at, above, index);
        index = _mm512_add_epi32(index, _mm512_set1_epi32(16));
    }
    let mut at = [0i32; 16];
    // SAFETY: the array takes 16 values.
    unsafe { _mm512_storeu_si512(at.as_mut_ptr().cast(), best_at) };
    let mut found = (f32::NEG_INFINITY, 0);
    for (value, at) in lanes(best).into_iter().zip(at) {
        let at = at as usize;
        if value > found.0 || (value == found.0 && value > f32::NEG_INFINITY && at < found.1) {
            found = (value, at);
        }
    }
    found
}
