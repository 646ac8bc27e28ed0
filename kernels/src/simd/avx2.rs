//! AVX2, FMA and F16C, with or without AVX-VNNI: two registers per sixteen lanes.
//!
//! Without VNNI the integer product is `vpmaddubsw`, which adds two products in 16 bits and saturates. It cannot here:
//! codes of 4, 5 and 6 bits reach 15, 31 and 63, activations ±127, so 8, 8 and 4 products stay below 2^15. 8-bit codes
//! are centred first and enter as magnitudes, their signs moved to the activations: 2 · 128 · 127 is below 2^15 too.

use std::arch::x86_64::*;

use super::{F16, F32, Kernel, Simd, instructions};

/// The instruction set; `VNNI` says that `vpdpbusd` exists in its VEX form.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>;

/// # Safety
/// The CPU has the instructions.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline(never)]
unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the contract of this function.
    unsafe { kernel.run::<Avx2<false>>() }
}

/// # Safety
/// The CPU has the instructions.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
#[inline(never)]
unsafe fn enter_vnni<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the contract of this function.
    unsafe { kernel.run::<Avx2<true>>() }
}

/// All ones in the first `n` of sixteen lanes: a window of this table.
static FIRST: [i32; 32] = {
    let mut table = [0; 32];
    let mut lane = 0;
    while lane < 16 {
        table[lane] = -1;
        lane += 1;
    }
    table
};

type Pair = [__m256; 2];
type IntPair = [__m256i; 2];

/// Lanes `0..n` all ones.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn first(n: usize) -> IntPair {
    let from = FIRST[16 - n..].as_ptr();
    // SAFETY: the table holds 16 values from `16 - n` on.
    unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())] }
}

/// Sixteen 16-bit floats as f32.
///
/// # Safety
/// The CPU has AVX2 and F16C; the elements exist.
#[inline(always)]
unsafe fn widen<const K: u8>(from: *const u16) -> Pair {
    // SAFETY: the contract of this function.
    unsafe {
        let (low, high) = (_mm_loadu_si128(from.cast()), _mm_loadu_si128(from.add(8).cast()));
        if K == F16 {
            [_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)]
        } else {
            let (low, high) = (_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high))]
        }
    }
}

/// `acc` plus the sums of pairs of 16-bit numbers.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn add_pairs(acc: __m256i, products: __m256i) -> __m256i {
    // SAFETY: the contract of this function.
    unsafe { _mm256_add_epi32(acc, _mm256_madd_epi16(products, _mm256_set1_epi16(1))) }
}

/// `Simd::dot` of eight lanes without VNNI; the file comment says why nothing saturates.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn dot_widened(bits: u32, acc: __m256i, codes: [__m256i; 4], x: [__m256i; 4]) -> __m256i {
    // SAFETY: the contract of this function.
    unsafe {
        let mut p = codes;
        for quad in 0..4 {
            p[quad] = if bits == 8 {
                let centred = _mm256_xor_si256(codes[quad], _mm256_set1_epi8(i8::MIN));
                _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8(x[quad], centred))
            } else {
                _mm256_maddubs_epi16(codes[quad], x[quad])
            };
        }
        if bits == 8 {
            return add_pairs(add_pairs(add_pairs(add_pairs(acc, p[0]), p[1]), p[2]), p[3]);
        }
        let (first, second) = (_mm256_add_epi16(p[0], p[1]), _mm256_add_epi16(p[2], p[3]));
        if bits == 6 {
            add_pairs(add_pairs(acc, first), second)
        } else {
            add_pairs(acc, _mm256_add_epi16(first, second))
        }
    }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = Pair;
    type I = IntPair;
    const VECTORS: usize = 8;
    const CENTRES_8_BIT: bool = !VNNI;

    instructions! {
        fn splat(x: f32) -> Pair { [_mm256_set1_ps(x); 2] }
        fn load<const K: u8>(base: *const u8, at: usize) -> Pair {
            match K {
                F32 => {
                    let from = base.cast::<f32>().add(at);
                    [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))]
                }
                _ => widen::<K>(base.cast::<u16>().add(at)),
            }
        }
        fn load_first<const K: u8>(base: *const u8, at: usize, n: usize) -> Pair {
            if n == 16 {
                Self::load::<K>(base, at)
            } else if K == F32 {
                let (mask, from) = (first(n), base.cast::<f32>().add(at));
                [_mm256_maskload_ps(from, mask[0]), _mm256_maskload_ps(from.wrapping_add(8), mask[1])]
            } else {
                let mut bits = [0u16; 16];
                std::ptr::copy_nonoverlapping(base.cast::<u16>().add(at), bits.as_mut_ptr(), n);
                widen::<K>(bits.as_ptr())
            }
        }
        fn store(to: *mut f32, v: Pair) {
            _mm256_storeu_ps(to, v[0]);
            _mm256_storeu_ps(to.add(8), v[1]);
        }
        fn store_first(to: *mut f32, v: Pair, n: usize) {
            let mask = first(n);
            _mm256_maskstore_ps(to, mask[0], v[0]);
            _mm256_maskstore_ps(to.wrapping_add(8), mask[1], v[1]);
        }
        fn add(a: Pair, b: Pair) -> Pair { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
        fn mul(a: Pair, b: Pair) -> Pair { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
        fn div(a: Pair, b: Pair) -> Pair { [_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])] }
        fn mul_add(a: Pair, b: Pair, c: Pair) -> Pair {
            [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])]
        }
        fn mul_sub(a: Pair, b: Pair, c: Pair) -> Pair {
            [_mm256_fmsub_ps(a[0], b[0], c[0]), _mm256_fmsub_ps(a[1], b[1], c[1])]
        }
        fn greater(a: Pair, b: Pair) -> Pair { [_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])] }
        fn smaller(a: Pair, b: Pair) -> Pair { [_mm256_min_ps(a[0], b[0]), _mm256_min_ps(a[1], b[1])] }
        fn neg(a: Pair) -> Pair {
            let sign = _mm256_set1_ps(-0.0);
            [_mm256_xor_ps(a[0], sign), _mm256_xor_ps(a[1], sign)]
        }
        fn select_first(n: usize, a: Pair, b: Pair) -> Pair {
            let mask = first(n);
            [
                _mm256_blendv_ps(b[0], a[0], _mm256_castsi256_ps(mask[0])),
                _mm256_blendv_ps(b[1], a[1], _mm256_castsi256_ps(mask[1])),
            ]
        }
        fn select_greater(a: Pair, b: Pair, yes: (Pair, IntPair), no: (Pair, IntPair)) -> (Pair, IntPair) {
            let mut out = no;
            for i in 0..2 {
                let above = _mm256_cmp_ps::<_CMP_GT_OQ>(a[i], b[i]);
                out.0[i] = _mm256_blendv_ps(no.0[i], yes.0[i], above);
                out.1[i] = _mm256_blendv_epi8(no.1[i], yes.1[i], _mm256_castps_si256(above));
            }
            out
        }
        fn round(a: Pair) -> IntPair { [_mm256_cvtps_epi32(a[0]), _mm256_cvtps_epi32(a[1])] }
        fn float(a: IntPair) -> Pair { [_mm256_cvtepi32_ps(a[0]), _mm256_cvtepi32_ps(a[1])] }
        fn power_of_two(n: IntPair) -> Pair {
            let bias = _mm256_set1_epi32(127);
            let (low, high) = (_mm256_add_epi32(n[0], bias), _mm256_add_epi32(n[1], bias));
            [_mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)), _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high))]
        }
        fn bits(a: Pair) -> IntPair { [_mm256_castps_si256(a[0]), _mm256_castps_si256(a[1])] }
        fn isplat(x: i32) -> IntPair { [_mm256_set1_epi32(x); 2] }
        fn iload(from: *const u8) -> IntPair {
            [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())]
        }
        fn istore(to: *mut i32, v: IntPair) {
            _mm256_storeu_si256(to.cast(), v[0]);
            _mm256_storeu_si256(to.add(8).cast(), v[1]);
        }
        fn widen_i8(from: *const u8) -> IntPair {
            let bytes = _mm_loadu_si128(from.cast());
            [_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))]
        }
        fn narrow_i8(to: *mut i8, v: IntPair) {
            // Within 128-bit halves the packs interleave; the permutation puts them back in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(v[0], v[1]));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
        }
        fn iadd(a: IntPair, b: IntPair) -> IntPair { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
        fn isub(a: IntPair, b: IntPair) -> IntPair { [_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])] }
        fn umax(a: IntPair, b: IntPair) -> IntPair { [_mm256_max_epu32(a[0], b[0]), _mm256_max_epu32(a[1], b[1])] }
        fn largest(a: IntPair) -> u32 {
            let a = _mm256_max_epu32(a[0], a[1]);
            let a = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_max_epu32(a, _mm_shuffle_epi32::<0b01_00_11_10>(a));
            let a = _mm_max_epu32(a, _mm_shuffle_epi32::<0b10_11_00_01>(a));
            _mm_cvtsi128_si32(a) as u32
        }
        fn total(a: IntPair) -> i32 {
            let a = _mm256_add_epi32(a[0], a[1]);
            let a = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256::<1>(a));
            let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b01_00_11_10>(a));
            let a = _mm_add_epi32(a, _mm_shuffle_epi32::<0b10_11_00_01>(a));
            _mm_cvtsi128_si32(a)
        }
        fn half(a: IntPair) -> IntPair { [_mm256_srai_epi32::<1>(a[0]), _mm256_srai_epi32::<1>(a[1])] }
        fn and(a: IntPair, b: IntPair) -> IntPair { [_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])] }
        fn or(a: IntPair, b: IntPair) -> IntPair { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
        fn shift_right(a: IntPair, n: usize) -> IntPair {
            let n = _mm_cvtsi32_si128(n as i32);
            [_mm256_srl_epi32(a[0], n), _mm256_srl_epi32(a[1], n)]
        }
        fn shift_left(a: IntPair, n: usize) -> IntPair {
            let n = _mm_cvtsi32_si128(n as i32);
            [_mm256_sll_epi32(a[0], n), _mm256_sll_epi32(a[1], n)]
        }
        fn dot(bits: u32, acc: IntPair, codes: [IntPair; 4], x: [IntPair; 4]) -> IntPair {
            let mut out = acc;
            for half in 0..2 {
                let c = [codes[0][half], codes[1][half], codes[2][half], codes[3][half]];
                let x = [x[0][half], x[1][half], x[2][half], x[3][half]];
                if VNNI {
                    for quad in 0..4 {
                        out[half] = _mm256_dpbusd_avx_epi32(out[half], c[quad], x[quad]);
                    }
                } else {
                    out[half] = dot_widened(bits, out[half], c, x);
                }
            }
            out
        }
        fn spread(a: Pair, shift: u32) -> Pair {
            if shift == 0 {
                return a;
            }
            let n = _mm_cvtsi32_si128(shift as i32);
            // At least two lanes share a value, so all of them come from the first eight.
            let low = _mm256_srl_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), n);
            let high = _mm256_srl_epi32(_mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15), n);
            [_mm256_permutevar8x32_ps(a[0], low), _mm256_permutevar8x32_ps(a[0], high)]
        }
    }

    unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the contract of the trait.
        unsafe { if VNNI { enter_vnni(kernel) } else { enter(kernel) } }
    }
}
