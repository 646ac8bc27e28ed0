//! AVX-512 loads shared by the backends.

use std::arch::x86_64::*;

/// Element kinds of [`load16`] as const parameters.
pub(crate) const F32: u8 = 0;
/// Half precision.
pub(crate) const F16: u8 = 1;
/// bfloat16.
pub(crate) const BF16: u8 = 2;

/// Lanes `0..n` set; `n` at most 16.
#[inline]
pub(crate) fn first_lanes(n: usize) -> __mmask16 {
    debug_assert!(n <= 16);
    ((1u32 << n) - 1) as __mmask16
}

/// Sixteen elements of kind `K` from element `at` on, as f32.
///
/// # Safety
/// The CPU has AVX-512 F; the elements exist.
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) unsafe fn load16<const K: u8>(base: *const u8, at: usize) -> __m512 {
    // SAFETY: the contract of this function.
    unsafe {
        match K {
            F32 => _mm512_loadu_ps(base.cast::<f32>().add(at)),
            F16 => _mm512_cvtph_ps(_mm256_loadu_si256(base.cast::<u16>().add(at).cast())),
            _ => {
                let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(base.cast::<u16>().add(at).cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            }
        }
    }
}

/// As [`load16`] for the first `n` elements only; the others are 0 and not read.
///
/// # Safety
/// The CPU has AVX-512 F, BW and VL; the first `n` elements exist; `K` is F32 or F16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[inline]
pub(crate) unsafe fn load_first<const K: u8>(base: *const u8, at: usize, n: usize) -> __m512 {
    let mask = first_lanes(n);
    // SAFETY: the mask keeps the load inside the promised elements.
    unsafe {
        match K {
            F32 => _mm512_maskz_loadu_ps(mask, base.cast::<f32>().add(at)),
            _ => _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, base.cast::<u16>().add(at).cast())),
        }
    }
}
