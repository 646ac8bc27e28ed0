//! Which instruction set the kernels use: found once at run time, never at compile time, so that one binary
//! runs everywhere and keeps its scalar fallback. Every safe entry asks [`active`]; tests may force a choice.
//! Does not decide anything about results: all backends give the same bits.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// An instruction set the kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Plain Rust: the reference, and the fallback on any machine. Correct and slow.
    Scalar,
    /// x86-64 with AVX-512 F, BW, VL and VNNI (Intel Ice Lake and later, AMD Zen 4 and later).
    Avx512,
}

/// Value of `FORCED` when nothing is forced.
const UNFORCED: u8 = u8::MAX;

static FORCED: AtomicU8 = AtomicU8::new(UNFORCED);
static FORCE_LOCK: Mutex<()> = Mutex::new(());

/// The best backend of this machine.
pub fn detect() -> Backend {
    static FOUND: OnceLock<Backend> = OnceLock::new();
    *FOUND.get_or_init(probe)
}

/// The backend in use: the detected one unless a test forces another.
pub fn active() -> Backend {
    match FORCED.load(Ordering::Relaxed) {
        0 => Backend::Scalar,
        1 => Backend::Avx512,
        _ => detect(),
    }
}

/// The choice in one line, for the start-up log.
pub fn describe() -> &'static str {
    match active() {
        Backend::Scalar => "kernels: scalar (no AVX-512 F+BW+VL+VNNI found; correct but slow)",
        Backend::Avx512 => "kernels: AVX-512 (F, BW, VL, VNNI) for matmul, lora_delta, attention and row operations",
    }
}

/// Keeps a forced backend until dropped; see [`force_for_tests`].
#[derive(Debug)]
pub struct ForcedBackend {
    _lock: MutexGuard<'static, ()>,
}

/// Makes every kernel of the process use `backend` until the guard is dropped. One test at a time: a second call
/// waits for the first guard.
///
/// # Panics
/// When this machine lacks the backend.
pub fn force_for_tests(backend: Backend) -> ForcedBackend {
    assert!(backend == Backend::Scalar || detect() == backend, "this machine has no {backend:?}");
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
fn probe() -> Backend {
    let found = std::is_x86_feature_detected!("avx512f")
        && std::is_x86_feature_detected!("avx512bw")
        && std::is_x86_feature_detected!("avx512vl")
        && std::is_x86_feature_detected!("avx512vnni")
        && std::is_x86_feature_detected!("fma")
        && std::is_x86_feature_detected!("f16c");
    if found { Backend::Avx512 } else { Backend::Scalar }
}

#[cfg(not(target_arch = "x86_64"))]
fn probe() -> Backend {
    Backend::Scalar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forced_backend_lasts_as_long_as_its_guard() {
        let guard = force_for_tests(Backend::Scalar);
        assert_eq!(active(), Backend::Scalar);
        assert!(describe().contains("scalar"));
        drop(guard);
        let _again = force_for_tests(detect());
        assert_eq!(active(), detect());
    }
}
