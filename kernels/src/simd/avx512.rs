//! AVX-512 F, BW, VL and VNNI: one register per sixteen lanes.

use std::arch::x86_64::*;

use super::{F16, F32, Kernel, Simd, instructions};

/// The instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// # Safety
/// The CPU has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,fma,f16c")]
#[inline(never)]
unsafe fn enter<K: Kernel>(kernel: K) -> K::Output {
    // SAFETY: the contract of this function.
    unsafe { kernel.run::<Avx512>() }
}

/// Lanes `0..n` set.
#[inline(always)]
fn first(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

impl Simd for Avx512 {
    type F = __m512;
    type I = __m512i;
    const VECTORS: usize = 32;
    const CENTRES_8_BIT: bool = false;

    instructions! {
        fn splat(x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn load<const K: u8>(base: *const u8, at: usize) -> __m512 {
            match K {
                F32 => _mm512_loadu_ps(base.cast::<f32>().add(at)),
                F16 => _mm512_cvtph_ps(_mm256_loadu_si256(base.cast::<u16>().add(at).cast())),
                _ => {
                    let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(base.cast::<u16>().add(at).cast()));
                    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
                }
            }
        }
        fn load_first<const K: u8>(base: *const u8, at: usize, n: usize) -> __m512 {
            match K {
                F32 => _mm512_maskz_loadu_ps(first(n), base.cast::<f32>().add(at)),
                _ => {
                    let bits = _mm256_maskz_loadu_epi16(first(n), base.cast::<u16>().add(at).cast());
                    if K == F16 {
                        _mm512_cvtph_ps(bits)
                    } else {
                        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
                    }
                }
            }
        }
        fn store(to: *mut f32, v: __m512) { _mm512_storeu_ps(to, v) }
        fn store_first(to: *mut f32, v: __m512, n: usize) { _mm512_mask_storeu_ps(to, first(n), v) }
        fn add(a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn mul(a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn div(a: __m512, b: __m512) -> __m512 { _mm512_div_ps(a, b) }
        fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn mul_sub(a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmsub_ps(a, b, c) }
        fn greater(a: __m512, b: __m512) -> __m512 { _mm512_max_ps(a, b) }
        fn smaller(a: __m512, b: __m512) -> __m512 { _mm512_min_ps(a, b) }
        fn neg(a: __m512) -> __m512 {
            _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a), _mm512_set1_epi32(i32::MIN)))
        }
        fn select_first(n: usize, a: __m512, b: __m512) -> __m512 { _mm512_mask_mov_ps(b, first(n), a) }
        fn select_greater(
            a: __m512,
            b: __m512,
            yes: (__m512, __m512i),
            no: (__m512, __m512i),
        ) -> (__m512, __m512i) {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b);
            (_mm512_mask_mov_ps(no.0, above, yes.0), _mm512_mask_mov_epi32(no.1, above, yes.1))
        }
        fn round(a: __m512) -> __m512i { _mm512_cvtps_epi32(a) }
        fn float(a: __m512i) -> __m512 { _mm512_cvtepi32_ps(a) }
        fn power_of_two(n: __m512i) -> __m512 {
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(n, _mm512_set1_epi32(127))))
        }
        fn bits(a: __m512) -> __m512i { _mm512_castps_si512(a) }
        fn isplat(x: i32) -> __m512i { _mm512_set1_epi32(x) }
        fn iload(from: *const u8) -> __m512i { _mm512_loadu_si512(from.cast()) }
        fn istore(to: *mut i32, v: __m512i) { _mm512_storeu_si512(to.cast(), v) }
        fn widen_i8(from: *const u8) -> __m512i { _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())) }
        fn narrow_i8(to: *mut i8, v: __m512i) { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(v)) }
        fn iadd(a: __m512i, b: __m512i) -> __m512i { _mm512_add_epi32(a, b) }
        fn isub(a: __m512i, b: __m512i) -> __m512i { _mm512_sub_epi32(a, b) }
        fn umax(a: __m512i, b: __m512i) -> __m512i { _mm512_max_epu32(a, b) }
        fn largest(a: __m512i) -> u32 { _mm512_reduce_max_epu32(a) }
        fn total(a: __m512i) -> i32 { _mm512_reduce_add_epi32(a) }
        fn half(a: __m512i) -> __m512i { _mm512_srai_epi32::<1>(a) }
        fn and(a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn or(a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn shift_right(a: __m512i, n: usize) -> __m512i { _mm512_srl_epi32(a, _mm_cvtsi32_si128(n as i32)) }
        fn shift_left(a: __m512i, n: usize) -> __m512i { _mm512_sll_epi32(a, _mm_cvtsi32_si128(n as i32)) }
        fn dot(_bits: u32, acc: __m512i, codes: [__m512i; 4], x: [__m512i; 4]) -> __m512i {
            let mut acc = acc;
            for quad in 0..4 {
                acc = _mm512_dpbusd_epi32(acc, codes[quad], x[quad]);
            }
            acc
        }
        fn spread(a: __m512, shift: u32) -> __m512 {
            let lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
            _mm512_permutexvar_ps(_mm512_srl_epi32(lane, _mm_cvtsi32_si128(shift as i32)), a)
        }
    }

    unsafe fn call<K: Kernel>(kernel: K) -> K::Output {
        // SAFETY: the contract of the trait.
        unsafe { enter(kernel) }
    }
}
