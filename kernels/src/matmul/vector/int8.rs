//! Rounded activations times codes: sixteen output columns a vector, one panel and up to eight rows a tile, so that the
//! codes of a panel are one stream from memory and are taken apart once for all rows of the tile. There is a tile for
//! every number of rows up to eight: rows left over cost a pass over the codes each time they are split.
//!
//! Every instruction of the reference's chain per output, in its order; only independent outputs and the terms of
//! integer sums, which are exact, are interleaved.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or quad in several arrays")]

use std::ops::Range;

use super::super::Int8Unit;
use super::super::quantise::{BLOCK, ROWS, Rounded, block_scale};
use crate::matrix::{CodeForm, NEST, PANEL};
use crate::simd::{F16, F32, Kernel, LINE, Simd, prefetch};

/// Codes of panels that go through all rows of a unit together: half of an L1 cache.
const L1_BYTES: usize = 24 << 10;

/// A code form known at compile time.
trait Form {
    const BITS: u32;
    const GROUP: usize;
    const NESTED: bool;
    const HAS_MIN: bool;
    const ZERO_SHIFT: u32;
}

macro_rules! forms {
    ($($name:ident: $bits:literal, $group:literal, $nested:literal, $min:literal, $shift:literal;)*) => {
        $(
            struct $name;
            impl Form for $name {
                const BITS: u32 = $bits;
                const GROUP: usize = $group;
                const NESTED: bool = $nested;
                const HAS_MIN: bool = $min;
                const ZERO_SHIFT: u32 = $shift;
            }
        )*

        impl Kernel for &Int8Unit<'_> {
            type Output = ();

            #[inline(always)]
            unsafe fn run<S: Simd>(self) {
                let CodeForm { bits, group, nested, has_min, zero_shift } = self.coded.form;
                match (bits, group, nested, has_min, zero_shift) {
                    // SAFETY: the contract of this function; a function per form keeps each of them small.
                    $(($bits, $group, $nested, $min, $shift) => unsafe {
                        S::call(Panels::<$name> { unit: self, form: std::marker::PhantomData });
                    },)*
                    _ => unreachable!("no block type has this form"),
                }
            }
        }
    };
}

forms! {
    FormQ40: 4, 32, false, false, 3;
    FormQ41: 4, 32, false, true, 0;
    FormQ50: 5, 32, false, false, 4;
    FormQ51: 5, 32, false, true, 0;
    FormQ80: 8, 32, false, false, 7;
    FormQ2K: 4, 16, true, true, 0;
    FormQ3K: 4, 16, true, false, 2;
    FormQ4K: 4, 32, true, true, 0;
    FormQ5K: 5, 32, true, true, 0;
    FormQ6K: 6, 16, true, false, 5;
}

/// All panels and rows of a unit whose form is `F`.
struct Panels<'a, 'b, F> {
    unit: &'a Int8Unit<'b>,
    form: std::marker::PhantomData<F>,
}

impl<F: Form> Kernel for Panels<'_, '_, F> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let unit = self.unit;
        let weights = Weights::of(unit);
        let panel_bytes = unit.n_in * PANEL * F::BITS as usize / 8;
        let panels_at_once = (L1_BYTES / panel_bytes).max(1);
        for first in unit.panels.clone().step_by(panels_at_once) {
            let panels = first..(first + panels_at_once).min(unit.panels.end);
            let mut row = unit.rows.start;
            while row < unit.rows.end {
                // The first rows fetch the panels that come after these; the hardware would stop at every page.
                let ahead = if row == unit.rows.start { panels_at_once } else { 0 };
                // SAFETY: the rows of each tile lie inside the unit, and a tile's rows in one group of eight, because
                // units begin at such a group; the rest is the contract of this function.
                row += unsafe {
                    match unit.rows.end - row {
                        1 => tiles::<S, F, 1>(unit, &weights, panels.clone(), row, ahead),
                        2 => tiles::<S, F, 2>(unit, &weights, panels.clone(), row, ahead),
                        3 => tiles::<S, F, 3>(unit, &weights, panels.clone(), row, ahead),
                        5 if S::VECTORS > 16 => tiles::<S, F, 5>(unit, &weights, panels.clone(), row, ahead),
                        6 if S::VECTORS > 16 => tiles::<S, F, 6>(unit, &weights, panels.clone(), row, ahead),
                        7 if S::VECTORS > 16 => tiles::<S, F, 7>(unit, &weights, panels.clone(), row, ahead),
                        8.. if S::VECTORS > 16 => tiles::<S, F, 8>(unit, &weights, panels.clone(), row, ahead),
                        _ => tiles::<S, F, 4>(unit, &weights, panels.clone(), row, ahead),
                    }
                };
            }
        }
    }
}

/// `R` rows by some panels, fetching those `ahead` panels later; returns `R`.
///
/// # Safety
/// As `tile`, for all of the panels.
#[inline(always)]
unsafe fn tiles<S: Simd, F: Form, const R: usize>(
    unit: &Int8Unit<'_>,
    weights: &Weights,
    panels: Range<usize>,
    row: usize,
    ahead: usize,
) -> usize {
    for panel in panels {
        // SAFETY: the contract of this function.
        unsafe { tile::<S, F, R>(unit, weights, panel, row, ahead) };
    }
    R
}

/// Where the buffers of a matrix begin.
struct Weights {
    codes: *const u8,
    high: *const u8,
    scales: *const u8,
    mins: *const u8,
    sub_scales: *const u8,
    sub_mins: *const u8,
}

// === impl Weights ===

impl Weights {
    fn of(unit: &Int8Unit<'_>) -> Self {
        let [codes, high, scales, mins, sub_scales, sub_mins] =
            unit.coded.buffers().map(|buffer| buffer.view::<u8>().as_ptr());
        Self { codes, high, scales, mins, sub_scales, sub_mins }
    }

    /// Brings what belongs to block `block` nearer. It need not exist.
    #[inline(always)]
    fn fetch<F: Form>(&self, block: usize) {
        let code_lines = if F::BITS == 8 { 8 } else { 4 };
        for line in 0..code_lines {
            prefetch(self.codes.wrapping_add((block * code_lines + line) * LINE));
        }
        let high_lines = if F::BITS == 8 { 0 } else { F::BITS as usize - 4 };
        for line in 0..high_lines {
            prefetch(self.high.wrapping_add((block * high_lines + line) * LINE));
        }
        // f16 or i8 for each column of a group; scales of nested forms are few and stay.
        let group = block * BLOCK / F::GROUP * PANEL;
        if F::NESTED {
            prefetch(self.sub_scales.wrapping_add(group));
        } else {
            prefetch(self.scales.wrapping_add(2 * group));
        }
        if F::HAS_MIN {
            prefetch(if F::NESTED { self.sub_mins.wrapping_add(group) } else { self.mins.wrapping_add(2 * group) });
        }
    }
}

/// Codes of 32 inputs by 16 columns, a byte each: the quads of inputs in order, in two halves.
///
/// # Safety
/// The CPU has the instructions of `S`; block `block` of 32 inputs by a panel exists.
#[inline(always)]
unsafe fn codes<S: Simd, F: Form>(weights: &Weights, block: usize) -> [[S::I; 4]; 2] {
    // SAFETY: the contract of this function.
    let none = unsafe { S::isplat(0) };
    let mut out = [[none; 4]; 2];
    // SAFETY: the contract of this function: all lines of the block are inside their buffers.
    unsafe {
        let (low, high) = (weights.codes, weights.high);
        if F::BITS == 8 {
            for quad in 0..8 {
                out[quad / 4][quad % 4] = S::iload(low.add((block * 8 + quad) * 64));
            }
            return out;
        }
        let nibble = S::isplat(0x0f0f_0f0f);
        for quad in 0..4 {
            let line = S::iload(low.add((block * 4 + quad) * 64));
            out[0][quad] = S::and(line, nibble);
            out[1][quad] = S::and(S::shift_right(line, 4), nibble);
        }
        if F::BITS == 5 {
            let (fifth, one) = (S::iload(high.add(block * 64)), S::isplat(0x1010_1010));
            for quad in 0..8 {
                let bit = if quad <= 4 { S::shift_left(fifth, 4 - quad) } else { S::shift_right(fifth, quad - 4) };
                out[quad / 4][quad % 4] = S::or(out[quad / 4][quad % 4], S::and(bit, one));
            }
        }
        if F::BITS == 6 {
            let three = S::isplat(0x3030_3030);
            for half in 0..2 {
                let both = S::iload(high.add((block * 2 + half) * 64));
                for quad in 0..4 {
                    let bits = if quad <= 2 { S::shift_left(both, 4 - 2 * quad) } else { S::shift_right(both, 2) };
                    out[half][quad] = S::or(out[half][quad], S::and(bits, three));
                }
            }
        }
    }
    out
}

/// Four quads of a row's codes, each in all lanes.
///
/// # Safety
/// The CPU has the instructions of `S`; 16 codes follow.
#[inline(always)]
unsafe fn quads<S: Simd>(codes: *const i8) -> [S::I; 4] {
    // SAFETY: the contract of this function.
    unsafe {
        let mut out = [S::isplat(0); 4];
        for quad in 0..4 {
            out[quad] = S::isplat(codes.cast::<i32>().add(quad).read_unaligned());
        }
        out
    }
}

/// What the integer sum of a symmetric form starts from: minus zero point times sum of codes.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn zero<S: Simd, F: Form>(neg_sum: i32) -> S::I {
    let folded = F::HAS_MIN || (F::BITS == 8 && S::CENTRES_8_BIT);
    // SAFETY: the contract of this function.
    unsafe { if folded { S::isplat(0) } else { S::shift_left(S::isplat(neg_sum), F::ZERO_SHIFT as usize) } }
}

/// Sixteen scales, or minima, of a group.
///
/// # Safety
/// The CPU has the instructions of `S`; the group of the panel exists.
#[inline(always)]
unsafe fn factors<S: Simd, F: Form>(of: *const u8, subs: *const u8, n_in: usize, panel: usize, group: usize) -> S::F {
    // SAFETY: the contract of this function: sixteen factors of a group are inside their buffers.
    unsafe {
        let at = panel * (n_in / F::GROUP) + group;
        if !F::NESTED {
            return S::load::<F16>(of, at * PANEL);
        }
        let nest = panel * (n_in / NEST) + group * F::GROUP / NEST;
        let sub = S::float(S::widen_i8(subs.add(at * PANEL)));
        S::mul(S::load::<F16>(of, nest * PANEL), sub)
    }
}

/// `R` rows by a panel.
///
/// # Safety
/// The CPU has the instructions of `S`; `panel` and `row..row + R` lie inside the unit, the rows in one group of eight.
#[inline(always)]
unsafe fn tile<S: Simd, F: Form, const R: usize>(
    unit: &Int8Unit<'_>,
    weights: &Weights,
    panel: usize,
    row: usize,
    ahead: usize,
) {
    let n_in = unit.n_in;
    let place = row % ROWS;
    let x = unit.activations.rows(row - place, n_in);
    // SAFETY: block, group, panel and rows are in range, so what belongs to them is inside its buffer, whose size
    // follows from the shapes checked when it was made; the unit owns the columns it writes.
    unsafe {
        let mut acc = [S::splat(0.0); R];
        for (block, x) in x.iter().enumerate() {
            if ahead > 0 {
                weights.fetch::<F>((panel + ahead) * (n_in / BLOCK) + block);
            }
            let [first, second] = codes::<S, F>(weights, panel * (n_in / BLOCK) + block);
            // The rows of the tile begin at their first place in the eight.
            let row_codes = x.codes.as_ptr().add(place).cast::<i8>();
            let row_scales = x.scales.as_ptr().add(place);
            if F::GROUP == 32 {
                let mut dots = [S::isplat(0); R];
                for r in 0..R {
                    // Two sums of four quads, so that neither is a long chain.
                    let start = S::dot(
                        F::BITS,
                        zero::<S, F>(*x.neg_sums.as_ptr().add(place + r)),
                        first,
                        quads::<S>(row_codes.add(r * BLOCK)),
                    );
                    dots[r] = S::iadd(
                        start,
                        S::dot(F::BITS, S::isplat(0), second, quads::<S>(row_codes.add(r * BLOCK + 16))),
                    );
                }
                let sums = x.sums.as_ptr().add(place);
                add_group::<S, F, R>(unit.n_in, weights, panel, block, row_scales, sums, &dots, &mut acc);
            } else {
                for half in 0..2 {
                    let codes = if half == 0 { first } else { second };
                    let group = 2 * block + half;
                    let mut dots = [S::isplat(0); R];
                    for r in 0..R {
                        let start = zero::<S, F>(*x.half_neg_sums[half].as_ptr().add(place + r));
                        dots[r] = S::dot(F::BITS, start, codes, quads::<S>(row_codes.add(r * BLOCK + half * 16)));
                    }
                    let sums = x.half_sums[half].as_ptr().add(place);
                    add_group::<S, F, R>(unit.n_in, weights, panel, group, row_scales, sums, &dots, &mut acc);
                }
            }
        }
        let n_cols = (unit.out.n_cols() - panel * PANEL).min(PANEL);
        for r in 0..R {
            let out = unit.out.cols(row + r, panel * PANEL, n_cols);
            S::store_first(out.as_mut_ptr(), acc[r], n_cols);
        }
    }
}

/// The f32 part of the chain: one group's dot products with both scales, then its minimum.
///
/// # Safety
/// As `tile`; the group exists; `scales` and `sums` hold a value per row.
#[inline(always)]
unsafe fn add_group<S: Simd, F: Form, const R: usize>(
    n_in: usize,
    weights: &Weights,
    panel: usize,
    group: usize,
    scales: *const f32,
    sums: *const f32,
    dots: &[S::I; R],
    acc: &mut [S::F; R],
) {
    // SAFETY: the contract of this function.
    unsafe {
        let scale = factors::<S, F>(weights.scales, weights.sub_scales, n_in, panel, group);
        for r in 0..R {
            let of_row = S::splat(*scales.add(r));
            acc[r] = S::mul_add(S::float(dots[r]), S::mul(scale, of_row), acc[r]);
        }
        if F::HAS_MIN {
            let min = factors::<S, F>(weights.mins, weights.sub_mins, n_in, panel, group);
            for r in 0..R {
                acc[r] = S::mul_add(min, S::splat(*sums.add(r)), acc[r]);
            }
        }
    }
}

/// Rounds one row into place `row` of its eight; the reference is `scalar::quantise_row`. `x` has 32 inputs per block.
pub(in super::super) struct QuantiseRow<'a> {
    pub(in super::super) x: &'a [f32],
    pub(in super::super) blocks: &'a mut [Rounded],
    pub(in super::super) row: usize,
}

impl Kernel for QuantiseRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, blocks, row } = self;
        for (x, block) in x.chunks_exact(BLOCK).zip(blocks) {
            // SAFETY: loads and stores have 16 of the 32 inputs each.
            unsafe {
                let magnitude = S::isplat(i32::MAX);
                let (a, b) = (S::load::<F32>(x.as_ptr().cast(), 0), S::load::<F32>(x.as_ptr().cast(), 16));
                let largest = S::umax(S::and(S::bits(a), magnitude), S::and(S::bits(b), magnitude));
                let max_bits = S::largest(largest);
                let (scale, inverse) = block_scale(max_bits);
                // A block without a finite maximum has code 0 and scale NaN.
                let keep = S::isplat(if scale.is_nan() { 0 } else { -1 });
                let inverse = S::splat(inverse);
                let a = S::and(S::round(S::mul(a, inverse)), keep);
                let b = S::and(S::round(S::mul(b, inverse)), keep);
                let codes = block.codes[row].as_mut_ptr();
                S::narrow_i8(codes, a);
                S::narrow_i8(codes.add(16), b);
                block.put(row, scale, [S::total(a), S::total(b)]);
            }
        }
    }
}
