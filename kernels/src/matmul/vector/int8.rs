//! Rounded activations times codes: sixteen output columns a vector, one panel and up to eight rows a tile, so that the
//! codes of a panel are one stream from memory and are taken apart once for all rows of the tile.
//!
//! Every instruction of the reference's chain per output, in its order; only independent outputs and the terms of
//! integer sums, which are exact, are interleaved.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or quad in several arrays")]

use super::super::Int8Unit;
use super::super::quantise::{BLOCK, Row, RowMut, block_scale};
use crate::matrix::{CodeForm, NEST, PANEL};
use crate::simd::{F16, F32, Kernel, Simd, int_lanes};

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
        for panel in unit.panels.clone() {
            let mut row = unit.rows.start;
            while row < unit.rows.end {
                // SAFETY: the rows of each tile lie inside the unit; the rest is the contract of this function.
                row += unsafe {
                    match unit.rows.end - row {
                        1 => tile::<S, F, 1>(unit, panel, row),
                        2 | 3 => tile::<S, F, 2>(unit, panel, row),
                        8.. if S::VECTORS > 16 => tile::<S, F, 8>(unit, panel, row),
                        _ => tile::<S, F, 4>(unit, panel, row),
                    }
                };
            }
        }
    }
}

/// Codes of 32 inputs by 16 columns, a byte each: the quads of inputs in order, in two halves.
///
/// # Safety
/// The CPU has the instructions of `S`; block `block` of 32 inputs by a panel exists.
#[inline(always)]
unsafe fn codes<S: Simd, F: Form>(unit: &Int8Unit<'_>, block: usize) -> [[S::I; 4]; 2] {
    // SAFETY: the contract of this function: all lines of the block are inside their buffers.
    unsafe {
        let line = |of: &crate::aligned::Aligned, at: usize| S::iload(of.view::<u8>().as_ptr().add(at * 64));
        let of = &unit.coded.codes;
        if F::BITS == 8 {
            return [0, 4].map(|half| [0, 1, 2, 3].map(|quad| line(of, block * 8 + half + quad)));
        }
        let nibble = S::isplat(0x0f0f_0f0f);
        let lines = [0, 1, 2, 3].map(|quad| line(of, block * 4 + quad));
        let low = lines.map(|line| S::and(line, nibble));
        let high = lines.map(|line| S::and(S::shift_right(line, 4), nibble));
        let mut out = [low, high];
        if F::BITS == 5 {
            let (fifth, one) = (line(&unit.coded.high, block), S::isplat(0x1010_1010));
            for quad in 0..8 {
                let bit = if quad <= 4 { S::shift_left(fifth, 4 - quad) } else { S::shift_right(fifth, quad - 4) };
                out[quad / 4][quad % 4] = S::or(out[quad / 4][quad % 4], S::and(bit, one));
            }
        }
        if F::BITS == 6 {
            let three = S::isplat(0x3030_3030);
            for half in 0..2 {
                let both = line(&unit.coded.high, block * 2 + half);
                for quad in 0..4 {
                    let bits = if quad <= 2 { S::shift_left(both, 4 - 2 * quad) } else { S::shift_right(both, 2) };
                    out[half][quad] = S::or(out[half][quad], S::and(bits, three));
                }
            }
        }
        out
    }
}

/// Sixteen scales, or minima, of a group.
///
/// # Safety
/// The CPU has the instructions of `S`; the group of the panel exists.
#[inline(always)]
unsafe fn factors<S: Simd, F: Form>(
    of: &crate::aligned::Aligned,
    subs: &crate::aligned::Aligned,
    n_in: usize,
    panel: usize,
    group: usize,
) -> S::F {
    // SAFETY: the contract of this function: sixteen factors of a group are inside their buffers.
    unsafe {
        let at = panel * (n_in / F::GROUP) + group;
        if !F::NESTED {
            return S::load::<F16>(of.view::<u8>().as_ptr(), at * PANEL);
        }
        let nest = panel * (n_in / NEST) + group * F::GROUP / NEST;
        let sub = S::float(S::widen_i8(subs.view::<u8>().as_ptr().add(at * PANEL)));
        S::mul(S::load::<F16>(of.view::<u8>().as_ptr(), nest * PANEL), sub)
    }
}

/// `R` rows by a panel; returns `R`.
///
/// # Safety
/// The CPU has the instructions of `S`; `panel` and `row..row + R` lie inside the unit.
#[inline(always)]
unsafe fn tile<S: Simd, F: Form, const R: usize>(unit: &Int8Unit<'_>, panel: usize, row: usize) -> usize {
    let n_in = unit.n_in;
    let x: [_; R] = std::array::from_fn(|r| unit.activations.row(row + r, n_in));
    // SAFETY: block, group, panel and rows are in range, so what belongs to them is inside its buffer, whose size
    // follows from the shapes checked when it was made; the unit owns the columns it writes.
    unsafe {
        let mut acc = [S::splat(0.0); R];
        for block in 0..n_in / BLOCK {
            let [first, second] = codes::<S, F>(unit, panel * (n_in / BLOCK) + block);
            let quads = |r: usize, half: usize| {
                let from = x[r].codes.as_ptr().add(block * BLOCK + half * 16).cast::<i32>();
                [0, 1, 2, 3].map(|quad| S::isplat(from.add(quad).read_unaligned()))
            };
            // What a symmetric form starts from: minus zero point times sum of codes.
            let zero = |neg_sum: i32| {
                let folded = F::HAS_MIN || (F::BITS == 8 && S::CENTRES_8_BIT);
                S::isplat(if folded { 0 } else { neg_sum << F::ZERO_SHIFT })
            };
            if F::GROUP == 32 {
                let mut dots = [S::isplat(0); R];
                for r in 0..R {
                    // Two sums of four quads, so that neither is a long chain.
                    let start = S::dot(F::BITS, zero(*x[r].neg_sums32.as_ptr().add(block)), first, quads(r, 0));
                    dots[r] = S::iadd(start, S::dot(F::BITS, S::isplat(0), second, quads(r, 1)));
                }
                let sums: [_; R] = std::array::from_fn(|r| x[r].sums32.as_ptr());
                add_group::<S, F, R>(unit, panel, block, &x, &sums, &dots, &mut acc);
            } else {
                for (half, codes) in [first, second].into_iter().enumerate() {
                    let group = 2 * block + half;
                    let mut dots = [S::isplat(0); R];
                    for r in 0..R {
                        let start = zero(*x[r].neg_sums16.as_ptr().add(group));
                        dots[r] = S::dot(F::BITS, start, codes, quads(r, half));
                    }
                    let sums: [_; R] = std::array::from_fn(|r| x[r].sums16.as_ptr());
                    add_group::<S, F, R>(unit, panel, group, &x, &sums, &dots, &mut acc);
                }
            }
        }
        let n_cols = (unit.out.n_cols() - panel * PANEL).min(PANEL);
        for r in 0..R {
            let out = unit.out.cols(row + r, panel * PANEL, n_cols);
            S::store_first(out.as_mut_ptr(), acc[r], n_cols);
        }
    }
    R
}

/// The f32 part of the chain: one group's dot products with both scales, then its minimum.
///
/// # Safety
/// As `tile`; the group exists, also in `sums`.
#[inline(always)]
unsafe fn add_group<S: Simd, F: Form, const R: usize>(
    unit: &Int8Unit<'_>,
    panel: usize,
    group: usize,
    x: &[Row<'_>; R],
    sums: &[*const f32; R],
    dots: &[S::I; R],
    acc: &mut [S::F; R],
) {
    let coded = unit.coded;
    // SAFETY: the contract of this function.
    unsafe {
        let scale = factors::<S, F>(&coded.scales, &coded.sub_scales, unit.n_in, panel, group);
        for r in 0..R {
            let of_row = S::splat(*x[r].scales.as_ptr().add(group * F::GROUP / BLOCK));
            acc[r] = S::mul_add(S::float(dots[r]), S::mul(scale, of_row), acc[r]);
        }
        if F::HAS_MIN {
            let min = factors::<S, F>(&coded.mins, &coded.sub_mins, unit.n_in, panel, group);
            for r in 0..R {
                acc[r] = S::mul_add(min, S::splat(*sums[r].add(group)), acc[r]);
            }
        }
    }
}

/// Rounds one row; the reference is `scalar::quantise_row`. The slices of `to` fit `x`, whose length is a multiple of 32.
pub(in super::super) struct QuantiseRow<'a> {
    pub(in super::super) x: &'a [f32],
    pub(in super::super) to: RowMut<'a>,
}

impl Kernel for QuantiseRow<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, to } = self;
        for block in 0..x.len() / BLOCK {
            // SAFETY: the block lies inside `x` and `codes`, its entries inside the sums.
            unsafe {
                let magnitude = S::isplat(i32::MAX);
                let [a, b] = [0, 16].map(|at| S::load::<F32>(x.as_ptr().cast(), block * BLOCK + at));
                let largest = S::umax(S::and(S::bits(a), magnitude), S::and(S::bits(b), magnitude));
                let max_bits = int_lanes::<S>(largest).into_iter().fold(0, |max, bits| max.max(bits as u32));
                let (scale, inverse) = block_scale(max_bits);
                // A block without a finite maximum has code 0 and scale NaN.
                let keep = S::isplat(if scale.is_nan() { 0 } else { -1 });
                let inverse = S::splat(inverse);
                let [a, b] = [a, b].map(|x| S::and(S::round(S::mul(x, inverse)), keep));
                let codes = to.codes.as_mut_ptr().add(block * BLOCK);
                S::narrow_i8(codes, a);
                S::narrow_i8(codes.add(16), b);
                let sums = [a, b].map(|codes| int_lanes::<S>(codes).into_iter().sum::<i32>());
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
}
