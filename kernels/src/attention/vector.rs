//! Attention for every instruction set. Scoring: lanes are the 16 positions of a page, up to 8 queries by 4 pages a
//! tile. Mixing: lanes are dimensions, as many as fit beside the queries.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or panel in several arrays")]

use super::{Query, Unit};
use crate::kv::{HeadBlocks, KvDtype, PAGE_TOKENS};
use crate::ops::tree_sum;
use crate::ops::vector::exp;
use crate::simd::{F16, F32, Kernel, LINE, Simd, lanes, prefetch};

/// All queries of a unit that was checked by the entry; the probabilities have `stride` values per query.
pub(super) struct Attend<'a>(pub(super) &'a Unit<'a>, pub(super) &'a mut [f32]);

impl Kernel for Attend<'_> {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self(unit, probabilities) = self;
        assert!(probabilities.len() >= unit.n_queries() * unit.stride);
        // SAFETY: the element kind is the pool's; the rest is the contract of this function.
        unsafe {
            match unit.kv.layout().dtype {
                KvDtype::F32 => queries::<S, F32>(unit, probabilities),
                KvDtype::F16 => queries::<S, F16>(unit, probabilities),
            }
        }
    }
}

/// # Safety
/// The CPU has the instructions of `S`, and `K` is the kind of the pool's elements.
#[inline(always)]
unsafe fn queries<S: Simd, const K: u8>(unit: &Unit<'_>, probabilities: &mut [f32]) {
    let mut first = 0;
    while first < unit.n_queries() {
        let probabilities = &mut probabilities[first * unit.stride..];
        // SAFETY: the queries of each tile exist, and their probabilities follow.
        first += unsafe {
            match unit.n_queries() - first {
                1 => tile::<S, K, 1>(unit, first, probabilities),
                2 => tile::<S, K, 2>(unit, first, probabilities),
                3 => tile::<S, K, 3>(unit, first, probabilities),
                8.. if S::VECTORS > 16 => tile::<S, K, 8>(unit, first, probabilities),
                _ => tile::<S, K, 4>(unit, first, probabilities),
            }
        };
    }
}

/// Queries `first..first + T`; returns `T`.
///
/// # Safety
/// As `queries`; the queries exist and `probabilities` has `stride` values for each.
#[inline(always)]
unsafe fn tile<S: Simd, const K: u8, const T: usize>(
    unit: &Unit<'_>,
    first: usize,
    probabilities: &mut [f32],
) -> usize {
    let queries: [_; T] = std::array::from_fn(|t| unit.query(first + t));
    let q: [_; T] = std::array::from_fn(|t| unit.q_of(queries[t]).as_ptr());
    let n_pages = queries[T - 1].limit.div_ceil(PAGE_TOKENS);
    // As many accumulators as fit the registers beside the values they share; fewer would wait for each other.
    let wide = if S::VECTORS > 16 { 24 / T } else { 4 / T };
    // The first queries fetch values while they score, and the next unit's keys while they mix.
    let fetches = first == 0;
    let mut page = 0;
    while page < n_pages {
        // SAFETY: limits ascend, so `n_pages` pages cover all queries; they exist by the entry's check; `stride` is at
        // least `n_pages * 16`.
        page += unsafe {
            match n_pages - page {
                4.. if wide >= 4 => score::<S, K, T, 4>(unit, &q, page, fetches, probabilities),
                2.. if wide >= 2 => score::<S, K, T, 2>(unit, &q, page, fetches, probabilities),
                _ => score::<S, K, T, 1>(unit, &q, page, fetches, probabilities),
            }
        };
    }
    let mut inverse = [0.0f32; T];
    for t in 0..T {
        // SAFETY: the contract of this function.
        inverse[t] = unsafe { softmax::<S>(&mut probabilities[t * unit.stride..][..unit.stride], queries[t].limit) };
    }
    let limits: [usize; T] = std::array::from_fn(|t| queries[t].limit);
    let head_dim = unit.kv.layout().head_dim;
    let mut d = 0;
    while d < head_dim {
        let next = if fetches && d == 0 { unit.next } else { None };
        // SAFETY: dimensions from `d` on exist; each is written by this unit only.
        d += unsafe {
            match (head_dim - d).div_ceil(16) {
                4.. if wide >= 4 => mix::<S, K, T, 4>(unit, &queries, &limits, &inverse, probabilities, d, next),
                2.. if wide >= 2 => mix::<S, K, T, 2>(unit, &queries, &limits, &inverse, probabilities, d, next),
                _ => mix::<S, K, T, 1>(unit, &queries, &limits, &inverse, probabilities, d, next),
            }
        };
    }
    T
}

/// Scaled scores of `T` queries on `P` pages. Lanes past a query's limit get whatever their slots give; `softmax`
/// never looks at them. Returns `P`.
///
/// # Safety
/// Pages `page..page + P` of the unit exist; `probabilities` has `stride` values per query, at least 16 per page.
#[inline(always)]
unsafe fn score<S: Simd, const K: u8, const T: usize, const P: usize>(
    unit: &Unit<'_>,
    q: &[*const f32; T],
    page: usize,
    fetches: bool,
    probabilities: &mut [f32],
) -> usize {
    let keys: [_; P] = std::array::from_fn(|p| unit.blocks.keys(unit.pages[page + p]));
    // Dimensions of keys per cache line.
    let per_line = LINE / (PAGE_TOKENS * bytes::<K>());
    // SAFETY: dimension `d` of queries and keys exists; the slices stored to have 16 values.
    unsafe {
        let mut acc = [[S::splat(0.0); P]; T];
        for d in 0..unit.kv.layout().head_dim {
            if fetches && d.is_multiple_of(per_line) {
                for p in 0..P {
                    prefetch(keys[p].wrapping_add(unit.blocks.half_bytes + d / per_line * LINE));
                }
            }
            let mut k = [S::splat(0.0); P];
            for p in 0..P {
                k[p] = S::load::<K>(keys[p], d * PAGE_TOKENS);
            }
            for t in 0..T {
                let q = S::splat(*q[t].add(d));
                for p in 0..P {
                    acc[t][p] = S::mul_add(q, k[p], acc[t][p]);
                }
            }
        }
        let scale = S::splat(unit.scale);
        for t in 0..T {
            for p in 0..P {
                let to = &mut probabilities[t * unit.stride + (page + p) * PAGE_TOKENS..][..PAGE_TOKENS];
                S::store(to.as_mut_ptr(), S::mul(acc[t][p], scale));
            }
        }
    }
    P
}

/// Scores to exponentials relative to the largest; 1 / their sum. Only `0..limit` counts.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
unsafe fn softmax<S: Simd>(scores: &mut [f32], limit: usize) -> f32 {
    // SAFETY: loads and stores keep inside the parts.
    unsafe {
        let (whole, rest) = scores[..limit].as_chunks_mut::<PAGE_TOKENS>();
        let mut max = S::splat(f32::NEG_INFINITY);
        for part in &*whole {
            // NaN scores are passed over here, as in the reference.
            max = S::greater(S::load::<F32>(part.as_ptr().cast(), 0), max);
        }
        let n = rest.len();
        let last = S::load_first::<F32>(rest.as_ptr().cast(), 0, n);
        max = S::select_first(n, S::greater(last, max), max);
        let max = lanes::<S>(max).into_iter().fold(f32::NEG_INFINITY, |max, lane| if lane > max { lane } else { max });
        let less = S::splat(-max);
        let mut parts = S::splat(0.0);
        for part in whole {
            let probability = exp::<S>(S::add(S::load::<F32>(part.as_ptr().cast(), 0), less));
            parts = S::add(parts, probability);
            S::store(part.as_mut_ptr(), probability);
        }
        let probability = exp::<S>(S::add(last, less));
        parts = S::select_first(n, S::add(parts, probability), parts);
        S::store_first(rest.as_mut_ptr(), probability, n);
        1.0 / tree_sum(lanes::<S>(parts))
    }
}

/// Sums of probability times value over each query's positions, for `D` vectors of dimensions from `d` on, times
/// `inverse`, written out. Returns the dimensions done.
///
/// # Safety
/// The dimensions and the pages of the limits exist; `probabilities` has `stride` values per query.
#[inline(always)]
unsafe fn mix<S: Simd, const K: u8, const T: usize, const D: usize>(
    unit: &Unit<'_>,
    queries: &[Query; T],
    limits: &[usize; T],
    inverse: &[f32; T],
    probabilities: &[f32],
    d: usize,
    next: Option<(HeadBlocks, &[u32])>,
) -> usize {
    let head_dim = unit.kv.layout().head_dim;
    let stride = unit.stride;
    let n = (head_dim - d).min(D * 16);
    let last = n - (D - 1) * 16;
    // Positions of all queries together, then each query's own rest: a later position must not reach an earlier row.
    let common = limits[0];
    assert!(limits[T - 1] <= stride && probabilities.len() >= T * stride);
    let rows: [_; T] = std::array::from_fn(|t| probabilities[t * stride..].as_ptr());
    // SAFETY: slots and dimensions lie inside the value blocks, the last vector ends with them; positions are below
    // each query's limit, so inside its `stride` values; the unit owns the columns it writes.
    unsafe {
        let mut acc = [[S::splat(0.0); D]; T];
        for first in (0..common).step_by(PAGE_TOKENS) {
            let page = first / PAGE_TOKENS;
            if let Some((blocks, pages)) = next
                && page < pages.len()
            {
                for line in 0..blocks.half_bytes / LINE {
                    prefetch(blocks.keys(pages[page]).wrapping_add(line * LINE));
                }
            }
            let base = unit.blocks.values(unit.pages[page]);
            for slot in 0..(common - first).min(PAGE_TOKENS) {
                let v = row::<S, K, D>(base, slot * head_dim + d, last);
                for t in 0..T {
                    let probability = S::splat(*rows[t].add(first + slot));
                    for i in 0..D {
                        acc[t][i] = S::mul_add(probability, v[i], acc[t][i]);
                    }
                }
            }
        }
        for t in 0..T {
            for position in common..limits[t] {
                let base = unit.blocks.values(unit.pages[position / PAGE_TOKENS]);
                let v = row::<S, K, D>(base, position % PAGE_TOKENS * head_dim + d, last);
                let probability = S::splat(*rows[t].add(position));
                for i in 0..D {
                    acc[t][i] = S::mul_add(probability, v[i], acc[t][i]);
                }
            }
        }
        for t in 0..T {
            let out = unit.out.cols(queries[t].row, queries[t].column + d, n);
            for (i, out) in out.chunks_mut(16).enumerate() {
                S::store_first(out.as_mut_ptr(), S::mul(acc[t][i], S::splat(inverse[t])), out.len());
            }
        }
    }
    n
}

/// `D` vectors of dimensions from element `at` on, the last of `last`.
///
/// # Safety
/// The CPU has the instructions of `S`; the elements exist.
#[inline(always)]
unsafe fn row<S: Simd, const K: u8, const D: usize>(values: *const u8, at: usize, last: usize) -> [S::F; D] {
    // SAFETY: the contract of this function.
    unsafe {
        let mut v = [S::splat(0.0); D];
        for i in 0..D {
            let whole = i < D - 1 || last == 16;
            let at = at + i * 16;
            v[i] = if whole { S::load::<K>(values, at) } else { S::load_first::<K>(values, at, last) };
        }
        v
    }
}

/// Bytes of an element.
const fn bytes<const K: u8>() -> usize {
    if K == F32 { 4 } else { 2 }
}
