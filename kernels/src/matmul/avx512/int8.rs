//! Rounded activations times codes with `vpdpbusd`: 16 output columns a vector, up to 4 rows by 2 panels a tile.
//! Every instruction of the reference's chain per output, in its order; only independent outputs are interleaved.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or panel in several arrays")]

use std::arch::x86_64::*;

use super::super::Int8Unit;
use super::super::quantise::{BLOCK, RowMut, block_scale};
use crate::matrix::{CodeForm, PANEL};

/// Rows per tile: 4 rows by 2 panels are 8 integer and 8 f32 accumulators, half of the registers.
const ROWS: usize = 4;

/// A code form known at compile time.
trait Form {
    const FOUR_BIT: bool;
    const GROUP: usize;
    const WIDE: bool;
    const HAS_MIN: bool;
}

macro_rules! forms {
    ($($name:ident: $four:literal, $group:literal, $wide:literal, $min:literal;)*) => {
        $(
            struct $name;
            impl Form for $name {
                const FOUR_BIT: bool = $four;
                const GROUP: usize = $group;
                const WIDE: bool = $wide;
                const HAS_MIN: bool = $min;
            }
        )*

        /// Multiplies the unit's panels with its rows.
        ///
        /// # Safety
        /// The CPU has AVX-512 F, BW, VL and VNNI; the unit's ranges lie inside its matrix, activations and output.
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
        pub(in super::super) unsafe fn run(unit: &Int8Unit<'_>) {
            let CodeForm { four_bit, group, wide, has_min, .. } = unit.coded.form;
            match (four_bit, group, wide, has_min) {
                // SAFETY: the contract of this function.
                $(($four, $group, $wide, $min) => unsafe { panels::<$name>(unit) },)*
                _ => unreachable!("no block type has this form"),
            }
        }
    };
}

forms! {
    FormQ40: true, 32, false, false;
    FormQ41: true, 32, false, true;
    FormQ4K: true, 32, true, true;
    FormQ80: false, 32, false, false;
    FormQ51: false, 32, false, true;
    FormQ5K: false, 32, true, true;
    FormQ2K: false, 16, true, true;
    FormQ6K: false, 16, true, false;
}

/// # Safety
/// As `run`, with `F` the unit's form.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn panels<F: Form>(unit: &Int8Unit<'_>) {
    let mut panel = unit.panels.start;
    while panel < unit.panels.end {
        // SAFETY: rows and panels stay inside the unit.
        unsafe {
            if unit.panels.end - panel >= 2 {
                rows::<F, 2>(unit, panel);
                panel += 2;
            } else {
                rows::<F, 1>(unit, panel);
                panel += 1;
            }
        }
    }
}

/// # Safety
/// As `panels`; `panel..panel + P` lie inside the unit.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
unsafe fn rows<F: Form, const P: usize>(unit: &Int8Unit<'_>, panel: usize) {
    let mut row = unit.rows.start;
    while row < unit.rows.end {
        // SAFETY: the rows of each tile lie inside the unit.
        unsafe {
            match unit.rows.end - row {
                1 => tile::<F, 1, P>(unit, panel, row),
                2 => tile::<F, 2, P>(unit, panel, row),
                3 => tile::<F, 3, P>(unit, panel, row),
                _ => tile::<F, ROWS, P>(unit, panel, row),
            }
        }
        row += ROWS;
    }
}

/// Sixteen scales or minima.
///
/// # Safety
/// `base` holds at least `at + 16` factors of the form's type.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn factors<F: Form>(base: *const u8, at: usize) -> __m512 {
    // SAFETY: the contract of this function.
    unsafe {
        if F::WIDE {
            _mm512_loadu_ps(base.cast::<f32>().add(at))
        } else {
            _mm512_cvtph_ps(_mm256_loadu_si256(base.cast::<u16>().add(at).cast()))
        }
    }
}

/// `R` rows by `P` panels.
///
/// # Safety
/// As `rows`; `row..row + R` lie inside the unit.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni")]
#[inline]
unsafe fn tile<F: Form, const R: usize, const P: usize>(unit: &Int8Unit<'_>, panel: usize, row: usize) {
    let n_in = unit.n_in;
    let n_groups = n_in / F::GROUP;
    let x: [_; R] = std::array::from_fn(|r| unit.activations.row(row + r, n_in));
    let codes = unit.coded.codes.view::<u8>().as_ptr();
    let scales = unit.coded.scales.view::<u8>().as_ptr();
    let mins = unit.coded.mins.view::<u8>().as_ptr();
    let shift = _mm_cvtsi32_si128(unit.coded.form.zero_shift as i32);
    let nibble = _mm512_set1_epi8(15);
    let mut acc = [[_mm512_setzero_ps(); P]; R];
    for group in 0..n_groups {
        let mut dot = [[_mm512_setzero_si512(); P]; R];
        // SAFETY: group, panel and row are in range, so codes, scales and sums of this group are inside their buffers,
        // whose sizes follow from the shapes checked when they were made.
        unsafe {
            if !F::HAS_MIN {
                for r in 0..R {
                    let neg = if F::GROUP == 16 { x[r].neg_sums16.as_ptr() } else { x[r].neg_sums32.as_ptr() };
                    dot[r] = [_mm512_sll_epi32(_mm512_set1_epi32(*neg.add(group)), shift); P];
                }
            }
            if F::FOUR_BIT {
                for quad in 0..4 {
                    let mut low = [_mm512_setzero_si512(); P];
                    let mut high = low;
                    for p in 0..P {
                        let at = ((panel + p) * n_in + group * 32) * (PANEL / 2) + quad * 64;
                        let line = _mm512_load_si512(codes.add(at).cast());
                        low[p] = _mm512_and_si512(line, nibble);
                        high[p] = _mm512_and_si512(_mm512_srli_epi16::<4>(line), nibble);
                    }
                    for r in 0..R {
                        let quads = x[r].codes.as_ptr().add(group * 32).cast::<i32>();
                        let first = _mm512_set1_epi32(quads.add(quad).read_unaligned());
                        let second = _mm512_set1_epi32(quads.add(quad + 4).read_unaligned());
                        for p in 0..P {
                            dot[r][p] = _mm512_dpbusd_epi32(dot[r][p], low[p], first);
                            dot[r][p] = _mm512_dpbusd_epi32(dot[r][p], high[p], second);
                        }
                    }
                }
            } else {
                for quad in 0..F::GROUP / 4 {
                    let mut line = [_mm512_setzero_si512(); P];
                    for p in 0..P {
                        let at = ((panel + p) * n_in + group * F::GROUP + quad * 4) * PANEL;
                        line[p] = _mm512_load_si512(codes.add(at).cast());
                    }
                    for r in 0..R {
                        let quads = x[r].codes.as_ptr().add(group * F::GROUP).cast::<i32>();
                        let quad = _mm512_set1_epi32(quads.add(quad).read_unaligned());
                        for p in 0..P {
                            dot[r][p] = _mm512_dpbusd_epi32(dot[r][p], line[p], quad);
                        }
                    }
                }
            }
            for p in 0..P {
                let at = ((panel + p) * n_groups + group) * PANEL;
                let scale = factors::<F>(scales, at);
                for r in 0..R {
                    let of_row = _mm512_set1_ps(*x[r].scales.as_ptr().add(group * F::GROUP / BLOCK));
                    let both = _mm512_mul_ps(scale, of_row);
                    acc[r][p] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot[r][p]), both, acc[r][p]);
                }
                if F::HAS_MIN {
                    let min = factors::<F>(mins, at);
                    for r in 0..R {
                        let sums = if F::GROUP == 16 { x[r].sums16.as_ptr() } else { x[r].sums32.as_ptr() };
                        acc[r][p] = _mm512_fmadd_ps(min, _mm512_set1_ps(*sums.add(group)), acc[r][p]);
                    }
                }
            }
        }
    }
    for r in 0..R {
        for p in 0..P {
            let column = (panel + p) * PANEL;
            let n_cols = (unit.out.n_cols() - column).min(PANEL);
            // SAFETY: the unit owns these columns of this row, and the mask keeps the store inside them.
            unsafe {
                let out = unit.out.cols(row + r, column, n_cols);
                _mm512_mask_storeu_ps(out.as_mut_ptr(), (0xffffu32 >> (PANEL - n_cols)) as __mmask16, acc[r][p]);
            }
        }
    }
}

/// Rounds one row; the reference is `scalar::quantise_row`.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL; the slices of `to` fit `x`, whose length is a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(in super::super) unsafe fn quantise_row(x: &[f32], to: RowMut<'_>) {
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    for block in 0..x.len() / BLOCK {
        // SAFETY: the block lies inside `x` and `codes`, its entries inside the sums.
        unsafe {
            let a = _mm512_loadu_ps(x.as_ptr().add(block * BLOCK));
            let b = _mm512_loadu_ps(x.as_ptr().add(block * BLOCK + 16));
            let bits_a = _mm512_and_si512(_mm512_castps_si512(a), magnitude);
            let bits_b = _mm512_and_si512(_mm512_castps_si512(b), magnitude);
            let max_bits = _mm512_reduce_max_epu32(_mm512_max_epu32(bits_a, bits_b));
            let (scale, inverse) = block_scale(max_bits);
            let keep = if scale.is_nan() { 0 } else { 0xffff };
            let inverse = _mm512_set1_ps(inverse);
            // Rounds to nearest, ties to even: the default mode, which nothing here changes.
            let a = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(a, inverse));
            let b = _mm512_maskz_cvtps_epi32(keep, _mm512_mul_ps(b, inverse));
            let codes = to.codes.as_mut_ptr().add(block * BLOCK);
            _mm_storeu_si128(codes.cast(), _mm512_cvtepi32_epi8(a));
            _mm_storeu_si128(codes.add(16).cast(), _mm512_cvtepi32_epi8(b));
            let sums = [_mm512_reduce_add_epi32(a), _mm512_reduce_add_epi32(b)];
            *to.scales.get_unchecked_mut(block) = scale;
            for (half, sum) in sums.into_iter().enumerate() {
                *to.neg_sums16.get_unchecked_mut(2 * block + half) = -sum;
                *to.sums16.get_unchecked_mut(2 * block + half) = scale * sum as f32;
            }
            *to.neg_sums32.get_unchecked_mut(block) = -(sums[0] + sums[1]);
            *to.sums32.get_unchecked_mut(block) = scale * (sums[0] + sums[1]) as f32;
        }
    }
}
