//! f32 activations times any weights: a few panels are dequantised for a stretch of inputs into a buffer that fits L1,
//! then multiplied with all rows of the unit. Between stretches the accumulators rest in memory, so each output
//! stays one chain over the inputs.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or panel in several arrays")]

use std::mem::MaybeUninit;

use super::super::{F32Unit, ROW_BLOCK};
use crate::aligned::Aligned;
use crate::matrix::{Coded, NEST, PANEL, Storage};
use crate::simd::{BF16, F16, F32, Kernel, Simd};

/// Values in the dequantised buffer: 32 KiB, two thirds of an L1 cache.
const BUFFER: usize = 8192;
/// Accumulators: a whole row block by two panels; fewer rows take more panels.
const ACCUMULATORS: usize = ROW_BLOCK * 2 * PANEL;

/// Memory for one unit, on the stack.
#[repr(C, align(64))]
struct Work {
    weights: [MaybeUninit<f32>; BUFFER],
    acc: [MaybeUninit<f32>; ACCUMULATORS],
}

impl Kernel for &F32Unit<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let mut work = Work { weights: [MaybeUninit::uninit(); BUFFER], acc: [MaybeUninit::uninit(); ACCUMULATORS] };
        let mut panel = self.panels.start;
        while panel < self.panels.end {
            let left = self.panels.end - panel;
            // Few rows take many panels at once: eight chains hide the latency of the multiply-add.
            // SAFETY: the panels lie inside the unit; the rest is the contract of this function.
            panel += unsafe {
                match self.rows.len() {
                    1 if left >= 8 && S::VECTORS > 16 => panels::<S, 8>(self, panel, &mut work),
                    1..=3 if left >= 4 => panels::<S, 4>(self, panel, &mut work),
                    _ if left >= 2 => panels::<S, 2>(self, panel, &mut work),
                    _ => panels::<S, 1>(self, panel, &mut work),
                }
            };
        }
    }
}

/// `P` panels times all rows of the unit; returns `P`.
///
/// # Safety
/// The CPU has the instructions of `S`; `panel..panel + P` lie inside the unit, and rows times `P` fit the accumulators.
#[inline(always)]
unsafe fn panels<S: Simd, const P: usize>(unit: &F32Unit<'_>, panel: usize, work: &mut Work) -> usize {
    let n_in = unit.w.n_in();
    let n_rows = unit.rows.len();
    assert!(n_rows * P * PANEL <= ACCUMULATORS);
    let stretch = BUFFER / PANEL / P;
    let weights = work.weights.as_mut_ptr().cast::<f32>();
    let acc = work.acc.as_mut_ptr().cast::<f32>();
    for first in (0..n_in).step_by(stretch) {
        let n = stretch.min(n_in - first);
        for p in 0..P {
            // SAFETY: `P * stretch * PANEL` values fit the buffer; `first..first + n` are inputs of the matrix.
            unsafe { dequantise::<S>(unit, panel + p, first, n, weights.add(p * stretch * PANEL)) };
        }
        let mut r = 0;
        while r < n_rows {
            // SAFETY: the rows of each tile lie inside the unit, and the accumulators hold all of them.
            unsafe {
                let x = unit.x.as_ptr().add((unit.rows.start + r) * n_in + first);
                let tile_acc = acc.add(r * P * PANEL);
                let shape = Shape { n, row_stride: n_in, panel_stride: stretch * PANEL, fresh: first == 0 };
                r += match n_rows - r {
                    1 => tile::<S, 1, P>(x, weights, tile_acc, shape),
                    2 | 3 => tile::<S, 2, P>(x, weights, tile_acc, shape),
                    6.. if S::VECTORS > 16 => tile::<S, 6, P>(x, weights, tile_acc, shape),
                    4.. if S::VECTORS > 16 => tile::<S, 4, P>(x, weights, tile_acc, shape),
                    _ => tile::<S, 3, P>(x, weights, tile_acc, shape),
                };
            }
        }
    }
    for r in 0..n_rows {
        for p in 0..P {
            let column = (panel + p) * PANEL;
            let n_cols = (unit.out.n_cols() - column).min(PANEL);
            // SAFETY: the unit owns these columns of this row; the tiles above wrote these accumulators.
            unsafe {
                let out = unit.out.cols(unit.rows.start + r, column, n_cols);
                std::ptr::copy_nonoverlapping(acc.add((r * P + p) * PANEL), out.as_mut_ptr(), n_cols);
            }
        }
    }
    P
}

/// Strides of a tile.
#[derive(Clone, Copy)]
struct Shape {
    /// Inputs.
    n: usize,
    /// Values from one row of activations to the next.
    row_stride: usize,
    /// Values from one panel of the buffer to the next.
    panel_stride: usize,
    /// The accumulators start at 0.
    fresh: bool,
}

/// `R` rows by `P` panels over a stretch of inputs; returns `R`.
///
/// # Safety
/// The CPU has the instructions of `S`; the pointers reach as far as the shape says.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const P: usize>(
    x: *const f32,
    weights: *const f32,
    acc: *mut f32,
    shape: Shape,
) -> usize {
    // SAFETY: `acc` holds `R * P` vectors; `x` `R` rows of at least `n` values; `weights` `P` panels of `n` vectors.
    unsafe {
        let mut sums = [[S::splat(0.0); P]; R];
        if !shape.fresh {
            for r in 0..R {
                for p in 0..P {
                    sums[r][p] = S::load::<F32>(acc.cast(), (r * P + p) * PANEL);
                }
            }
        }
        for k in 0..shape.n {
            let mut w = [S::splat(0.0); P];
            for p in 0..P {
                w[p] = S::load::<F32>(weights.cast(), p * shape.panel_stride + k * PANEL);
            }
            for r in 0..R {
                let x = S::splat(*x.add(r * shape.row_stride + k));
                for p in 0..P {
                    sums[r][p] = S::mul_add(x, w[p], sums[r][p]);
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                S::store(acc.add((r * P + p) * PANEL), sums[r][p]);
            }
        }
    }
    R
}

/// Inputs `first..first + n` of a panel as f32 `[n][16]`. For codes, `first` and `n` are multiples of 32.
///
/// # Safety
/// The CPU has the instructions of `S`; the inputs exist, and `to` takes `n * 16` values.
#[inline(always)]
unsafe fn dequantise<S: Simd>(unit: &F32Unit<'_>, panel: usize, first: usize, n: usize, to: *mut f32) {
    let at = (panel * unit.w.n_in() + first) * PANEL;
    // SAFETY: the contract of this function; panels are padded to 16 columns.
    unsafe {
        match &unit.w.storage {
            Storage::F32(panels) => {
                std::ptr::copy_nonoverlapping(panels.view::<f32>().as_ptr().add(at), to, n * PANEL);
            }
            Storage::F16(panels) => widen::<S, F16>(panels.view::<u8>().as_ptr(), at, n, to),
            Storage::BF16(panels) => widen::<S, BF16>(panels.view::<u8>().as_ptr(), at, n, to),
            Storage::Coded(coded) => {
                let n_in = unit.w.n_in();
                for start in (0..n).step_by(coded.form.group) {
                    dequantise_group::<S>(coded, panel, first + start, n_in, to.add(start * PANEL));
                }
            }
        }
    }
}

/// `n` inputs from element `at` on.
///
/// # Safety
/// As `dequantise`.
#[inline(always)]
unsafe fn widen<S: Simd, const K: u8>(from: *const u8, at: usize, n: usize, to: *mut f32) {
    for k in 0..n {
        // SAFETY: the contract of this function.
        unsafe { S::store(to.add(k * PANEL), S::load::<K>(from, at + k * PANEL)) };
    }
}

/// Sixteen scales, or minima, of a group.
///
/// # Safety
/// As `dequantise`; the indices are those of the panel's group and of its f16 factors where they are nested.
#[inline(always)]
unsafe fn factors<S: Simd>(nested: bool, of: &Aligned, subs: &Aligned, group_at: usize, nest_at: usize) -> S::F {
    let of = of.view::<u8>().as_ptr();
    // SAFETY: the contract of this function.
    unsafe {
        if !nested {
            return S::load::<F16>(of, group_at * PANEL);
        }
        let sub = S::float(S::widen_i8(subs.view::<u8>().as_ptr().add(group_at * PANEL)));
        S::mul(S::load::<F16>(of, nest_at * PANEL), sub)
    }
}

/// One group of a panel; `start` is its first input.
///
/// # Safety
/// As `dequantise`.
#[inline(always)]
unsafe fn dequantise_group<S: Simd>(coded: &Coded, panel: usize, start: usize, n_in: usize, to: *mut f32) {
    let form = coded.form;
    let group_at = panel * (n_in / form.group) + start / form.group;
    // SAFETY: the contract of this function: the group's codes and factors are inside their buffers.
    unsafe {
        let nest_at = panel * (n_in / NEST) + start / NEST;
        let scale = factors::<S>(form.nested, &coded.scales, &coded.sub_scales, group_at, nest_at);
        let min = if form.has_min {
            factors::<S>(form.nested, &coded.mins, &coded.sub_mins, group_at, nest_at)
        } else {
            S::splat(0.0)
        };
        let zero = S::isplat(coded.zero());
        let (low_mask, high_mask) =
            (S::isplat(if form.bits == 8 { 255 } else { 15 }), S::isplat((1 << (form.bits.clamp(4, 6) - 4)) - 1));
        let (codes, high_codes) = (coded.codes.view::<u8>().as_ptr(), coded.high.view::<u8>().as_ptr());
        let block = (panel * n_in + start) / 32;
        for quad in start % 32 / 4..start % 32 / 4 + form.group / 4 {
            let (low, low_shift, high, high_shift) = match form.bits {
                8 => (S::iload(codes.add((block * 8 + quad) * 64)), 0, zero, 0),
                bits => {
                    let (high, high_shift) = match bits {
                        5 => (S::iload(high_codes.add(block * 64)), quad),
                        6 => (S::iload(high_codes.add((block * 2 + quad / 4) * 64)), quad % 4 * 2),
                        _ => (zero, 0),
                    };
                    (S::iload(codes.add((block * 4 + quad % 4) * 64)), quad / 4 * 4, high, high_shift)
                }
            };
            for j in 0..4 {
                let mut code = S::and(S::shift_right(low, 8 * j + low_shift), low_mask);
                if form.bits == 5 || form.bits == 6 {
                    let above = S::and(S::shift_right(high, 8 * j + high_shift), high_mask);
                    code = S::or(code, S::shift_left(above, 4));
                }
                let code = S::float(S::isub(code, zero));
                // The product is exact, so fused and separate additions agree; without a minimum nothing is added,
                // which keeps the sign of zeros.
                let value = if form.has_min { S::mul_add(scale, code, min) } else { S::mul(scale, code) };
                S::store(to.add(((quad * 4 + j) - start % 32) * PANEL), value);
            }
        }
    }
}
