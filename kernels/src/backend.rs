//! Which instruction set the kernels use: found once at run time, never at compile time, so that one binary
//! runs everywhere and keeps its scalar fallback. Every safe entry asks [`active`]; tests and benches may force a choice.
//! Does not decide anything about results: all backends give the same bits.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

#[cfg(target_arch = "x86_64")]
use crate::simd::avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use crate::simd::avx512::Avx512;
use crate::simd::{Kernel, Simd};

/// An instruction set the kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Plain Rust: the reference, and the fallback on any machine. Correct and slow.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C (Intel Haswell and later, AMD Zen and later).
    Avx2,
    /// The same with AVX-VNNI (Intel Alder Lake and later, AMD Zen 5).
    Avx2Vnni,
    /// x86-64 with AVX-512 F, BW, VL and VNNI (Intel Ice Lake and later, AMD Zen 4 and later).
    Avx512,
}

/// Value of `FORCED` when nothing is forced.
const UNFORCED: u8 = u8::MAX;

static FORCED: AtomicU8 = AtomicU8::new(UNFORCED);
static FORCE_LOCK: Mutex<()> = Mutex::new(());

// === impl Backend ===

impl Backend {
    /// All, slowest first.
    pub const ALL: [Self; 4] = [Self::Scalar, Self::Avx2, Self::Avx2Vnni, Self::Avx512];

    /// Whether this machine can run it.
    pub fn is_available(self) -> bool {
        static FOUND: OnceLock<[bool; 4]> = OnceLock::new();
        FOUND.get_or_init(|| Self::ALL.map(probe))[self as usize]
    }

    /// Runs a kernel with these instructions, or `reference` where it is [`Backend::Scalar`].
    ///
    /// # Safety
    /// The backend is available; what the kernel itself asks for holds.
    #[inline]
    pub(crate) unsafe fn run<K: Kernel>(self, kernel: K, reference: impl FnOnce(K) -> K::Output) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the contract of this function.
            Self::Avx2 => unsafe { Avx2::<false>::call(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the contract of this function.
            Self::Avx2Vnni => unsafe { Avx2::<true>::call(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the contract of this function.
            Self::Avx512 => unsafe { Avx512::call(kernel) },
            _ => reference(kernel),
        }
    }
}

/// The best backend of this machine.
pub fn detect() -> Backend {
    Backend::ALL.into_iter().rev().find(|backend| backend.is_available()).unwrap_or(Backend::Scalar)
}

/// The backend in use: the detected one unless one is forced.
pub fn active() -> Backend {
    Backend::ALL.get(usize::from(FORCED.load(Ordering::Relaxed))).copied().unwrap_or_else(detect)
}

/// The choice in one line, for the start-up log.
pub fn describe() -> &'static str {
    match active() {
        Backend::Scalar => "kernels: scalar (no AVX2+FMA+F16C found; correct but slow)",
        Backend::Avx2 => "kernels: AVX2 (with FMA, F16C) for matmul, lora_delta, attention and row operations",
        Backend::Avx2Vnni => "kernels: AVX2 with AVX-VNNI for matmul, lora_delta, attention and row operations",
        Backend::Avx512 => "kernels: AVX-512 (F, BW, VL, VNNI) for matmul, lora_delta, attention and row operations",
    }
}

/// Keeps a forced backend until dropped; see [`force`].
#[derive(Debug)]
pub struct ForcedBackend {
    _lock: MutexGuard<'static, ()>,
}

/// Makes every kernel of the process use `backend` until the guard is dropped, for tests and benches. One at a time: a
/// second call waits for the first guard.
///
/// # Panics
/// When this machine lacks the backend.
pub fn force(backend: Backend) -> ForcedBackend {
    assert!(backend.is_available(), "this machine has no {backend:?}");
    let lock = FORCE_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    FORCED.store(backend as u8, Ordering::Relaxed);
    ForcedBackend { _lock: lock }
}

// === impl ForcedBackend ===

impl Drop for ForcedBackend {
    fn drop(&mut self) {
        FORCED.store(UNFORCED, Ordering::Relaxed);
    }
}

#[cfg(target_arch = "x86_64")]
fn probe(backend: Backend) -> bool {
    use std::is_x86_feature_detected as has;
    let avx2 = has!("avx2") && has!("fma") && has!("f16c");
    match backend {
        Backend::Scalar => true,
        Backend::Avx2 => avx2,
        Backend::Avx2Vnni => avx2 && has!("avxvnni"),
        Backend::Avx512 => avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512vl") && has!("avx512vnni"),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn probe(backend: Backend) -> bool {
    backend == Backend::Scalar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_backend_lasts_as_long_as_its_guard() {
        let guard = force(Backend::Scalar);
        assert_eq!(active(), Backend::Scalar);
        assert!(describe().contains("scalar"));
        drop(guard);
        let _again = force(detect());
        assert_eq!(active(), detect());
    }
}
