//! AVX-512 backend of attention. Scoring: lanes are the 16 positions of a page, up to 4 queries by 2 pages a tile.
//! Mixing: lanes are dimensions, up to 4 queries by 64 dimensions a tile.

#![expect(clippy::needless_range_loop, reason = "tiles: one index names the same row or panel in several arrays")]

use std::arch::x86_64::*;

use super::Unit;
use crate::kv::{KvDtype, PAGE_TOKENS};
use crate::ops::avx512::{exp, lanes};
use crate::ops::tree_sum;
use crate::simd::{F16, F32, first_lanes, load_first, load16};

/// Queries per tile.
const TILE: usize = 4;

/// Attends all queries of the unit.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL; the unit was checked by the entry, and `probabilities` has `stride` values per
/// query.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) unsafe fn run(unit: &Unit<'_>, probabilities: &mut [f32]) {
    assert!(probabilities.len() >= unit.n_queries() * unit.stride);
    // SAFETY: the element kind is the pool's; the rest is the contract of this function.
    unsafe {
        match unit.kv.layout().dtype {
            KvDtype::F32 => queries::<F32>(unit, probabilities),
            KvDtype::F16 => queries::<F16>(unit, probabilities),
        }
    }
}

/// # Safety
/// As `run`, with `K` the kind of the pool's elements.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn queries<const K: u8>(unit: &Unit<'_>, probabilities: &mut [f32]) {
    for first in (0..unit.n_queries()).step_by(TILE) {
        let probabilities = &mut probabilities[first * unit.stride..];
        // SAFETY: the queries of each tile exist, and their probabilities follow.
        unsafe {
            match unit.n_queries() - first {
                1 => tile::<K, 1>(unit, first, probabilities),
                2 => tile::<K, 2>(unit, first, probabilities),
                3 => tile::<K, 3>(unit, first, probabilities),
                _ => tile::<K, TILE>(unit, first, probabilities),
            }
        }
    }
}

/// Queries `first..first + T`.
///
/// # Safety
/// As `queries`; the queries exist and `probabilities` has `stride` values for each.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn tile<const K: u8, const T: usize>(unit: &Unit<'_>, first: usize, probabilities: &mut [f32]) {
    let queries: [_; T] = std::array::from_fn(|t| unit.query(first + t));
    let q: [_; T] = std::array::from_fn(|t| unit.q_of(queries[t]).as_ptr());
    let n_pages = queries[T - 1].limit.div_ceil(PAGE_TOKENS);
    // SAFETY: limits ascend, so `n_pages` pages cover all queries; they exist by the entry's check; `stride` is at
    // least `n_pages * 16`.
    unsafe {
        for page in (0..n_pages - n_pages % 2).step_by(2) {
            score::<K, T, 2>(unit, &q, page, probabilities);
        }
        if n_pages % 2 == 1 {
            score::<K, T, 1>(unit, &q, n_pages - 1, probabilities);
        }
    }
    let mut inverse = [0.0f32; T];
    for t in 0..T {
        inverse[t] = softmax(&mut probabilities[t * unit.stride..][..unit.stride], queries[t].limit);
    }
    let limits: [usize; T] = std::array::from_fn(|t| queries[t].limit);
    let head_dim = unit.kv.layout().head_dim;
    let mut d = 0;
    while d < head_dim {
        let n = (head_dim - d).min(64);
        // SAFETY: dimensions `d..d + n` exist; each is written by this unit only.
        unsafe {
            let mixed = match n.div_ceil(16) {
                1 => mix::<K, T, 1>(unit, &limits, probabilities, d, n),
                2 => mix::<K, T, 2>(unit, &limits, probabilities, d, n),
                3 => mix::<K, T, 3>(unit, &limits, probabilities, d, n),
                _ => mix::<K, T, 4>(unit, &limits, probabilities, d, n),
            };
            for t in 0..T {
                let out = unit.out.cols(queries[t].row, queries[t].column + d, n);
                for (part, out) in out.chunks_mut(16).enumerate() {
                    let value = _mm512_mul_ps(mixed[t][part], _mm512_set1_ps(inverse[t]));
                    _mm512_mask_storeu_ps(out.as_mut_ptr(), first_lanes(out.len()), value);
                }
            }
        }
        d += n;
    }
}

/// Scaled scores of `T` queries on `P` pages. Lanes past a query's limit get whatever their slots give; `softmax`
/// never looks at them.
///
/// # Safety
/// Pages `page..page + P` of the unit exist; `probabilities` has `stride` values per query, at least 16 per page.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn score<const K: u8, const T: usize, const P: usize>(
    unit: &Unit<'_>,
    q: &[*const f32; T],
    page: usize,
    probabilities: &mut [f32],
) {
    let keys: [_; P] = std::array::from_fn(|p| block::<K>(unit, unit.pages[page + p]));
    let mut acc = [[_mm512_setzero_ps(); P]; T];
    for d in 0..unit.kv.layout().head_dim {
        // SAFETY: dimension `d` of queries and keys exists.
        unsafe {
            let mut k = [_mm512_setzero_ps(); P];
            for p in 0..P {
                k[p] = load16::<K>(keys[p], d * PAGE_TOKENS);
            }
            for t in 0..T {
                let q = _mm512_set1_ps(*q[t].add(d));
                for p in 0..P {
                    acc[t][p] = _mm512_fmadd_ps(q, k[p], acc[t][p]);
                }
            }
        }
    }
    let scale = _mm512_set1_ps(unit.scale);
    for t in 0..T {
        for p in 0..P {
            let to = &mut probabilities[t * unit.stride + (page + p) * PAGE_TOKENS..][..PAGE_TOKENS];
            // SAFETY: the slice has 16 values.
            unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_mul_ps(acc[t][p], scale)) };
        }
    }
}

/// Scores to exponentials relative to the largest; 1 / their sum. Only `0..limit` is read.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn softmax(scores: &mut [f32], limit: usize) -> f32 {
    let mut max = _mm512_set1_ps(f32::NEG_INFINITY);
    for part in scores[..limit].chunks(PAGE_TOKENS) {
        let mask = first_lanes(part.len());
        // SAFETY: the mask keeps the load inside the slice.
        let score = unsafe { _mm512_maskz_loadu_ps(mask, part.as_ptr()) };
        // max returns its second operand when the first is NaN: NaN scores are passed over here, as in the reference.
        max = _mm512_mask_max_ps(max, mask, score, max);
    }
    let max = lanes(max).into_iter().fold(f32::NEG_INFINITY, |max, lane| if lane > max { lane } else { max });
    let max = _mm512_set1_ps(max);
    let mut parts = _mm512_setzero_ps();
    for part in scores[..limit].chunks_mut(PAGE_TOKENS) {
        let mask = first_lanes(part.len());
        // SAFETY: the mask keeps load and store inside the slice.
        unsafe {
            let score = _mm512_maskz_loadu_ps(mask, part.as_ptr());
            let probability = exp(_mm512_sub_ps(score, max));
            parts = _mm512_mask_add_ps(parts, mask, parts, probability);
            _mm512_mask_storeu_ps(part.as_mut_ptr(), mask, probability);
        }
    }
    1.0 / tree_sum(lanes(parts))
}

/// Sums of probability times value over each query's positions, for dimensions `d..d + n`, `n` in the last of `D`
/// vectors.
///
/// # Safety
/// The dimensions and the pages of the limits exist; `probabilities` has `stride` values per query.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
unsafe fn mix<const K: u8, const T: usize, const D: usize>(
    unit: &Unit<'_>,
    limits: &[usize; T],
    probabilities: &[f32],
    d: usize,
    n: usize,
) -> [[__m512; 4]; T] {
    let head_dim = unit.kv.layout().head_dim;
    let stride = unit.stride;
    let last = n - (D - 1) * 16;
    let mut acc = [[_mm512_setzero_ps(); D]; T];
    let row = |values: *const u8, slot: usize| {
        let mut v = [_mm512_setzero_ps(); D];
        // SAFETY: slot and dimensions lie inside the value block; the last vector is masked to what is left.
        unsafe {
            for i in 0..D - 1 {
                v[i] = load16::<K>(values, slot * head_dim + d + i * 16);
            }
            v[D - 1] = load_first::<K>(values, slot * head_dim + d + (D - 1) * 16, last);
        }
        v
    };
    let values = |position: usize| {
        let elements = head_dim * PAGE_TOKENS;
        block::<K>(unit, unit.pages[position / PAGE_TOKENS]).wrapping_add(elements * if K == F32 { 4 } else { 2 })
    };
    // Positions of all queries together, then each query's own rest: a later position must not reach an earlier row.
    let common = limits[0];
    assert!(limits[T - 1] <= stride && probabilities.len() >= T * stride);
    for first in (0..common).step_by(PAGE_TOKENS) {
        let base = values(first);
        for slot in 0..(common - first).min(PAGE_TOKENS) {
            let v = row(base, slot);
            for t in 0..T {
                // SAFETY: below the query's limit, so inside its `stride` values (asserted above).
                let probability = _mm512_set1_ps(unsafe { *probabilities.get_unchecked(t * stride + first + slot) });
                for i in 0..D {
                    acc[t][i] = _mm512_fmadd_ps(probability, v[i], acc[t][i]);
                }
            }
        }
    }
    for t in 0..T {
        for position in common..limits[t] {
            let v = row(values(position), position % PAGE_TOKENS);
            let probability = _mm512_set1_ps(probabilities[t * stride + position]);
            for i in 0..D {
                acc[t][i] = _mm512_fmadd_ps(probability, v[i], acc[t][i]);
            }
        }
    }
    let mut mixed = [[_mm512_setzero_ps(); 4]; T];
    for t in 0..T {
        mixed[t][..D].copy_from_slice(&acc[t]);
    }
    mixed
}

/// First byte of the unit's head in a page: keys, then values.
fn block<const K: u8>(unit: &Unit<'_>, page: u32) -> *const u8 {
    if K == F32 {
        unit.kv.head::<f32>(unit.layer, page, unit.kv_head).0.as_ptr().cast()
    } else {
        unit.kv.head::<u16>(unit.layer, page, unit.kv_head).0.as_ptr().cast()
    }
}
