//! What the CUDA tests share: numbers, and short names for moving them.

use kernels::backend::{Backend, force};
use kernels::cuda::Buffer;

// What runs the kernels is chosen by the root: the emulation, or the device.
pub(crate) use crate::executor::{CUT, Executor, PLAIN, absent};

pub(crate) type Floats = Buffer<Executor, f32>;

/// A small generator (splitmix64); the same seed gives the same numbers.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Bell-shaped around 0, about -3 to 3.
    pub(crate) fn value(&mut self) -> f32 {
        (0..4).map(|_| (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0).sum()
    }

    pub(crate) fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.value()).collect()
    }
}

/// The bits of every value, all NaNs alike.
pub(crate) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| if value.is_nan() { u32::MAX } else { value.to_bits() }).collect()
}

/// Runs `f` with the CPU kernels on their scalar reference.
pub(crate) fn reference<T>(f: impl FnOnce() -> T) -> T {
    let _forced = force(Backend::Scalar);
    f()
}

pub(crate) fn upload(gpu: &Executor, values: &[f32]) -> Floats {
    Buffer::upload(gpu, values).expect("memory")
}

pub(crate) fn download(gpu: &Executor, buffer: &Floats) -> Vec<f32> {
    buffer.download(gpu).expect("memory")
}

/// The message a wrong call panics with.
pub(crate) fn refusal(f: impl FnOnce() + std::panic::UnwindSafe) -> String {
    let panic = std::panic::catch_unwind(f).expect_err("the call was accepted");
    panic.downcast_ref::<String>().cloned().or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).into())).unwrap()
}
