//! f32 activations times any weights: a few panels are dequantised for a stretch of inputs into a buffer that fits L1,
//! then multiplied with all rows of the unit. Between stretches the accumulators rest in memory, so each output
//! stays one chain over the inputs.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or panel in several arrays")]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;

use super::super::{F32Unit, ROW_BLOCK};
use crate::matrix::{Coded, PANEL, Storage};

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

/// Multiplies the unit's panels with its rows.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL; the unit's ranges lie inside its matrix, activations and output.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(in super::super) unsafe fn run(unit: &F32Unit<'_>) {
    let mut work = Work { weights: [MaybeUninit::uninit(); BUFFER], acc: [MaybeUninit::uninit(); ACCUMULATORS] };
    let mut panel = unit.panels.start;
    while panel < unit.panels.end {
        let left = unit.panels.end - panel;
        // Few rows take many panels at once: eight chains hide the latency of the multiply-add.
        // SAFETY: the panels lie inside the unit.
        panel += unsafe {
            match unit.rows.len() {
                1 if left >= 8 => panels::<8>(unit, panel, &mut work),
                1..=3 if left >= 4 => panels::<4>(unit, panel, &mut work),
                _ if left >= 2 => panels::<2>(unit, panel, &mut work),
                _ => panels::<1>(unit, panel, &mut work),
            }
        };
    }
}

/// `P` panels times all rows of the unit; returns `P`.
///
/// # Safety
/// As `run`; `panel..panel + P` lie inside the unit, and rows times `P` fit the accumulators.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn panels<const P: usize>(unit: &F32Unit<'_>, panel: usize, work: &mut Work) -> usize {
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
            unsafe { dequantise(unit, panel + p, first, n, weights.add(p * stretch * PANEL)) };
        }
        let mut r = 0;
        while r < n_rows {
            // SAFETY: the rows of each tile lie inside the unit, and the accumulators hold all of them.
            unsafe {
                let x = unit.x.as_ptr().add((unit.rows.start + r) * n_in + first);
                let tile_acc = acc.add(r * P * PANEL);
                let shape = Shape { n, row_stride: n_in, panel_stride: stretch * PANEL, fresh: first == 0 };
                r += match n_rows - r {
                    1 => tile::<1, P>(x, weights, tile_acc, shape),
                    2 => tile::<2, P>(x, weights, tile_acc, shape),
                    3 => tile::<3, P>(x, weights, tile_acc, shape),
                    4 | 5 => tile::<4, P>(x, weights, tile_acc, shape),
                    _ => tile::<6, P>(x, weights, tile_acc, shape),
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
/// The pointers reach as far as the shape says.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn tile<const R: usize, const P: usize>(
    x: *const f32,
    weights: *const f32,
    acc: *mut f32,
    shape: Shape,
) -> usize {
    let mut sums = [[_mm512_setzero_ps(); P]; R];
    // SAFETY: `acc` holds `R * P` vectors; `x` `R` rows of at least `n` values; `weights` `P` panels of `n` vectors.
    unsafe {
        if !shape.fresh {
            for r in 0..R {
                for p in 0..P {
                    sums[r][p] = _mm512_load_ps(acc.add((r * P + p) * PANEL));
                }
            }
        }
        for k in 0..shape.n {
            let mut w = [_mm512_setzero_ps(); P];
            for p in 0..P {
                w[p] = _mm512_load_ps(weights.add(p * shape.panel_stride + k * PANEL));
            }
            for r in 0..R {
                let x = _mm512_set1_ps(*x.add(r * shape.row_stride + k));
                for p in 0..P {
                    sums[r][p] = _mm512_fmadd_ps(x, w[p], sums[r][p]);
                }
            }
        }
        for r in 0..R {
            for p in 0..P {
                _mm512_store_ps(acc.add((r * P + p) * PANEL), sums[r][p]);
            }
        }
    }
    R
}

/// Inputs `first..first + n` of a panel as f32 `[n][16]`. For codes, `first` and `n` are multiples of the group.
///
/// # Safety
/// The inputs exist, and `to` takes `n * 16` values and is aligned to 64 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn dequantise(unit: &F32Unit<'_>, panel: usize, first: usize, n: usize, to: *mut f32) {
    let at = (panel * unit.w.n_in() + first) * PANEL;
    // SAFETY: the contract of this function; panels are padded to 16 columns.
    unsafe {
        match &unit.w.storage {
            Storage::F32(panels) => {
                std::ptr::copy_nonoverlapping(panels.view::<f32>().as_ptr().add(at), to, n * PANEL);
            }
            Storage::F16(panels) => {
                let from = panels.view::<u16>().as_ptr().add(at);
                for k in 0..n {
                    let bits = _mm256_load_si256(from.add(k * PANEL).cast());
                    _mm512_store_ps(to.add(k * PANEL), _mm512_cvtph_ps(bits));
                }
            }
            Storage::BF16(panels) => {
                let from = panels.view::<u16>().as_ptr().add(at);
                for k in 0..n {
                    let bits = _mm512_cvtepu16_epi32(_mm256_load_si256(from.add(k * PANEL).cast()));
                    let value = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
                    _mm512_store_ps(to.add(k * PANEL), value);
                }
            }
            Storage::Coded(coded) => {
                let n_in = unit.w.n_in();
                for group in 0..n / coded.form.group {
                    let start = first + group * coded.form.group;
                    dequantise_group(coded, panel, start, n_in, to.add(group * coded.form.group * PANEL));
                }
            }
        }
    }
}

/// One group of a panel; `start` is its first input.
///
/// # Safety
/// As `dequantise`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn dequantise_group(coded: &Coded, panel: usize, start: usize, n_in: usize, to: *mut f32) {
    let form = coded.form;
    let factor_at = (panel * (n_in / form.group) + start / form.group) * PANEL;
    let zero = _mm512_set1_epi32(coded.zero());
    let mask = _mm512_set1_epi32(if form.four_bit { 15 } else { 255 });
    // SAFETY: the contract of this function: the group's codes and factors are inside their buffers.
    unsafe {
        let factors = |of: &crate::aligned::Aligned| {
            if form.wide {
                _mm512_load_ps(of.view::<f32>().as_ptr().add(factor_at))
            } else {
                _mm512_cvtph_ps(_mm256_load_si256(of.view::<u16>().as_ptr().add(factor_at).cast()))
            }
        };
        let scale = factors(&coded.scales);
        let min = if form.has_min { factors(&coded.mins) } else { _mm512_setzero_ps() };
        let codes = coded.codes.view::<u8>().as_ptr();
        // The product is exact, so fused and separate additions agree; without a minimum nothing is added, which
        // keeps the sign of zeros.
        let put = |line: __m512i, shift: i32, k: usize| {
            let code = _mm512_and_si512(_mm512_srl_epi32(line, _mm_cvtsi32_si128(shift)), mask);
            let code = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, zero));
            let value = if form.has_min { _mm512_fmadd_ps(scale, code, min) } else { _mm512_mul_ps(scale, code) };
            _mm512_store_ps(to.add(k * PANEL), value);
        };
        if form.four_bit {
            for quad in 0..4 {
                let line = _mm512_load_si512(codes.add((panel * n_in + start) * PANEL / 2 + quad * 64).cast());
                for j in 0..4 {
                    put(line, 8 * j, quad * 4 + j as usize);
                    put(line, 8 * j + 4, 16 + quad * 4 + j as usize);
                }
            }
        } else {
            for quad in 0..form.group / 4 {
                let line = _mm512_load_si512(codes.add((panel * n_in + start + quad * 4) * PANEL).cast());
                for j in 0..4 {
                    put(line, 8 * j, quad * 4 + j as usize);
                }
            }
        }
    }
}
