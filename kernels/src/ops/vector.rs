//! The row-wise operations for every instruction set: 16 columns a vector, the last one partly used.

use super::exp_constants::{HIGH, LN2_HIGH, LN2_LOW, LOW, POLYNOMIAL};
use super::{scalar, tree_sum};
use crate::simd::{F32, Kernel, Simd, int_lanes, lanes};

/// `scalar::exp`, lane by lane.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: the contract of this function.
    unsafe {
        // Comparisons that let NaN through.
        let x = S::smaller(S::splat(HIGH), S::greater(S::splat(LOW), x));
        let whole = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        let n = S::float(whole);
        let r = S::mul_add(n, S::splat(-LN2_HIGH), x);
        let r = S::mul_add(n, S::splat(-LN2_LOW), r);
        let mut p = S::splat(POLYNOMIAL[0]);
        for c in &POLYNOMIAL[1..] {
            p = S::mul_add(p, r, S::splat(*c));
        }
        let p = S::add(S::mul_add(p, S::mul(r, r), r), S::splat(1.0));
        let n1 = S::half(whole);
        let n2 = S::isub(whole, n1);
        S::mul(S::mul(p, S::power_of_two(n1)), S::power_of_two(n2))
    }
}

/// Sixteen values from `at` on, zeros beyond the end.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn load<S: Simd>(x: &[f32], at: usize) -> S::F {
    let n = (x.len() - at).min(16);
    // SAFETY: the load keeps inside the slice; the rest is the contract of this function.
    unsafe {
        if n == 16 { S::load::<F32>(x.as_ptr().cast(), at) } else { S::load_first::<F32>(x.as_ptr().cast(), at, n) }
    }
}

/// Sixteen values to `at`, fewer at the end.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn store<S: Simd>(x: &mut [f32], at: usize, v: S::F) {
    let to = &mut x[at..];
    // SAFETY: the store keeps inside the slice; the rest is the contract of this function.
    unsafe { if to.len() >= 16 { S::store(to.as_mut_ptr(), v) } else { S::store_first(to.as_mut_ptr(), v, to.len()) } }
}

/// One row; `x`, `w` and `out` have one length.
pub(super) struct RmsNorm<'a> {
    pub(super) x: &'a [f32],
    pub(super) w: &'a [f32],
    pub(super) eps: f32,
    pub(super) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, w, eps, out } = self;
        let n = x.len();
        // SAFETY: the contract of this function.
        unsafe {
            let mut parts = S::splat(0.0);
            for at in (0..n).step_by(16) {
                let x = load::<S>(x, at);
                // Lanes beyond the end add 0 to a sum that is never -0.
                parts = S::mul_add(x, x, parts);
            }
            let inverse = S::splat(scalar::inverse_rms(tree_sum(lanes::<S>(parts)), n, eps));
            for at in (0..n).step_by(16) {
                store::<S>(out, at, S::mul(S::mul(load::<S>(x, at), inverse), load::<S>(w, at)));
            }
        }
    }
}

/// All heads of one row; `cos` and `sin` are half as long as a head.
pub(super) struct Rope<'a> {
    pub(super) row: &'a mut [f32],
    pub(super) cos: &'a [f32],
    pub(super) sin: &'a [f32],
}

impl Kernel for Rope<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let half = self.cos.len();
        for head in self.row.chunks_exact_mut(2 * half) {
            let (first, second) = head.split_at_mut(half);
            for at in (0..half).step_by(16) {
                // SAFETY: the contract of this function.
                unsafe {
                    let (a, b) = (load::<S>(first, at), load::<S>(second, at));
                    let (cos, sin) = (load::<S>(self.cos, at), load::<S>(self.sin, at));
                    // A fused subtraction rounds once, as adding the negated product does.
                    store::<S>(first, at, S::mul_sub(a, cos, S::mul(b, sin)));
                    store::<S>(second, at, S::mul_add(b, cos, S::mul(a, sin)));
                }
            }
        }
    }
}

/// Any stretch; the three have one length.
pub(super) struct SwiGlu<'a> {
    pub(super) gate: &'a [f32],
    pub(super) up: &'a [f32],
    pub(super) out: &'a mut [f32],
}

impl Kernel for SwiGlu<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        for at in (0..self.out.len()).step_by(16) {
            // SAFETY: the contract of this function.
            unsafe {
                let (gate, up) = (load::<S>(self.gate, at), load::<S>(self.up, at));
                let denominator = S::add(S::splat(1.0), exp::<S>(S::neg(gate)));
                store::<S>(self.out, at, S::mul(S::div(gate, denominator), up));
            }
        }
    }
}

/// The largest value and where it first stands.
pub(super) struct MaxAndArgmax<'a>(pub(super) &'a [f32]);

impl Kernel for MaxAndArgmax<'_> {
    type Output = (f32, usize);

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> (f32, usize) {
        let x = self.0;
        // SAFETY: the contract of this function; the array has 16 values.
        let (best, at) = unsafe {
            let lowest = S::splat(f32::NEG_INFINITY);
            let mut best = (lowest, S::isplat(0));
            let mut index = S::iload([0i32, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15].as_ptr().cast());
            for at in (0..x.len()).step_by(16) {
                let v = S::select_first((x.len() - at).min(16), load::<S>(x, at), lowest);
                best = S::select_greater(v, best.0, (v, index), best);
                index = S::iadd(index, S::isplat(16));
            }
            (lanes::<S>(best.0), int_lanes::<S>(best.1))
        };
        let mut found = (f32::NEG_INFINITY, 0);
        for (value, at) in best.into_iter().zip(at) {
            let at = at as usize;
            if value > found.0 || (value == found.0 && value > f32::NEG_INFINITY && at < found.1) {
                found = (value, at);
            }
        }
        found
    }
}
