//! The GPU backend: what a device is to this crate ([`Gpu`]), memory on it ([`Buffer`]), and safe entries for the
//! kernels in `kernels/cuda/*.cu`, with the checks of the CPU entries.
//!
//! | operation | entry | kernels |
//! |---|---|---|
//! | products with frozen weights, embedding | [`matmul::products`], [`matmul::embed`] | `matmul_1` to `matmul_tall` (tensor cores), `round_rows`, `split_rows`, `embed_rows` |
//! | adapter deltas for mixed ranks, DoRA | [`lora::lora_delta`] | `lora_shrink`, `lora_expand` (tensor cores) |
//! | attention over KV pages, decoding and prefill | [`attention::attention`] | `attention` (tensor cores), `attention_combine` |
//! | residual sum and RMS norm | [`rows::residual_rms_norm`] | `residual_rms_norm` |
//! | rotary embedding and KV write | [`rows::rope_store`] | `rope_store` |
//! | SwiGLU, biases | [`rows::swiglu`], [`rows::add_bias`] | `swiglu`, `add_bias` |
//!
//! `model::gpu` composes them into a forward pass: per step one `RowPlan`, `AttentionPlan` and `LoraPlan`, per layer the
//! entries above in the order of `model::forward`.
//!
//! **How it is checked.** One set of cases compares every entry with the scalar reference of the CPU kernels: run by the
//! emulation of the same sources on a CPU (`emulation`, feature `cuda-emulation`), which every machine can, and by a
//! device through the driver (`tests/cuda_device.rs`, feature `cuda`), which ran on an NVIDIA H100, also under
//! compute-sanitizer (memcheck, racecheck, synccheck). No other device has run them: sm_80, sm_86 and sm_89 are
//! compiled for, not tried. [`cost`] has computed speeds beside measured ones.
//!
//! **Invariant: a row's bits depend on its own tokens, KV and adapter only.** Sums are cut at fixed inputs, ranks and
//! positions; decoding and prefill take one path, in which a lone row is a tile with empty rows beside it. On hardware
//! this rests on a tensor core computing each row of a product from that row alone, and on a product with zeros
//! leaving a sum as it is. The row-wise operations give the bits of the scalar reference, and so do products with coded
//! weights, up to the sum of four parts; the rest on tensor cores differs from it in the order of summation and keeps 22
//! bits of f32 operands, so it is compared within a tolerance, and a stream that moves between CPU and GPU may change
//! its bits.

mod params;
mod halves;
pub mod lora;
pub mod kv;
pub mod attention;
pub mod matmul;
pub mod rows;
pub mod cost;
#[cfg(feature = "cuda")]
pub mod device;
#[cfg(feature = "cuda-emulation")]
pub mod emulation;

use std::ffi::c_void;
use std::marker::PhantomData;

pub use self::params::{Element, Kernel};

/// Why a GPU cannot be used or an operation on it failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GpuError {
    /// No GPU can be used by this process; the CPU kernels can.
    #[error("no GPU: {reason}")]
    Unavailable {
        /// What is missing.
        reason: String,
    },
    /// The driver refused a call: out of memory, or a fault of an earlier kernel.
    #[error("{call} failed: {reason}")]
    Driver {
        /// What was tried.
        call: &'static str,
        /// The driver's answer.
        reason: String,
    },
}

/// Whether this process can use a GPU; the reason if not. Never panics, and costs nothing when the answer is no.
///
/// # Errors
/// Without the feature `cuda`, a driver or a device that can run the kernels.
pub fn available() -> Result<(), GpuError> {
    #[cfg(feature = "cuda")]
    return device::probe();
    #[cfg(not(feature = "cuda"))]
    Err(GpuError::Unavailable { reason: "this binary was built without the feature cuda".into() })
}

/// A device that can hold memory and run the kernels: `device::Device`, or `emulation::Emulated` in tests. Work is done
/// in the order it was asked for.
pub trait Gpu {
    /// A stretch of its memory, freed by `Drop`, aligned to 64 bytes.
    type Memory: std::fmt::Debug;
    /// Numbers in the host's memory that the device can write at full speed.
    type Host: std::ops::DerefMut<Target = [f32]> + std::fmt::Debug;

    /// `n_bytes` zeros.
    ///
    /// # Errors
    /// When the device has no room.
    fn allocate(&self, n_bytes: usize) -> Result<Self::Memory, GpuError>;

    /// `len` zeros on the host's side.
    ///
    /// # Errors
    /// When the host has no room that stays in place.
    fn allocate_host(&self, len: usize) -> Result<Self::Host, GpuError>;

    /// Copies `bytes` to the device, from byte `at` of `to` on. They fit, as the caller checked.
    ///
    /// # Errors
    /// When the driver refuses.
    fn write(&self, to: &mut Self::Memory, at: usize, bytes: &[u8]) -> Result<(), GpuError>;

    /// Sets `n_bytes` bytes from `at` on to `byte`. They exist, as the caller checked.
    ///
    /// # Errors
    /// When the driver refuses.
    fn fill(&self, memory: &mut Self::Memory, at: usize, n_bytes: usize, byte: u8) -> Result<(), GpuError>;

    /// Waits for all work before, then copies the first bytes of `from` back. There are as many, as the caller checked.
    ///
    /// # Errors
    /// When the driver refuses, or work before this failed.
    fn read(&self, from: &Self::Memory, bytes: &mut [u8]) -> Result<(), GpuError>;

    /// Where the memory lies, as kernels see it.
    fn address(&self, memory: &Self::Memory) -> u64;

    /// Blocks that keep the whole device busy; below this, work is cut finer. Never changes a result.
    fn blocks_to_fill(&self) -> usize;

    /// Starts a kernel.
    ///
    /// # Safety
    /// - `params` points to the parameter block of `kernel`.
    /// - All that the kernel reads and writes through it for this grid exists, and lives until the kernel has ended.
    ///
    /// # Errors
    /// When the driver refuses.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        shared_bytes: usize,
        params: *const c_void,
    ) -> Result<(), GpuError>;
}

/// Numbers in the memory of a device.
#[derive(Debug)]
pub struct Buffer<G: Gpu, T: Element> {
    memory: G::Memory,
    len: usize,
    element: PhantomData<T>,
}

// === impl Buffer ===

impl<G: Gpu, T: Element> Buffer<G, T> {
    /// `len` zeros.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn zeros(gpu: &G, len: usize) -> Result<Self, GpuError> {
        // An empty allocation has no address; one element costs nothing.
        let n_bytes = len.max(1).checked_mul(size_of::<T>()).expect("a buffer size fits the address space");
        Ok(Self { memory: gpu.allocate(n_bytes)?, len, element: PhantomData })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn upload(gpu: &G, values: &[T]) -> Result<Self, GpuError> {
        let mut buffer = Self::zeros(gpu, values.len())?;
        buffer.write(gpu, 0, values)?;
        Ok(buffer)
    }

    /// Overwrites the elements from `at` on.
    ///
    /// # Panics
    /// When they reach beyond the end.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn write(&mut self, gpu: &G, at: usize, values: &[T]) -> Result<(), GpuError> {
        let end = at.checked_add(values.len()).expect("an index fits the address space");
        assert!(end <= self.len, "elements {at}..{end} of {}", self.len);
        gpu.write(&mut self.memory, at * size_of::<T>(), params::bytes(values))
    }

    /// Sets every byte of `n` elements from `at` on to `byte`.
    ///
    /// # Panics
    /// When they reach beyond the end.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn fill(&mut self, gpu: &G, at: usize, n: usize, byte: u8) -> Result<(), GpuError> {
        let end = at.checked_add(n).expect("an index fits the address space");
        assert!(end <= self.len, "elements {at}..{end} of {}", self.len);
        gpu.fill(&mut self.memory, at * size_of::<T>(), n * size_of::<T>(), byte)
    }

    /// Copies the first elements to `values`, after all work asked for before.
    ///
    /// # Panics
    /// When there are fewer.
    ///
    /// # Errors
    /// When the driver refuses, or work before this failed.
    pub fn read(&self, gpu: &G, values: &mut [T]) -> Result<(), GpuError> {
        assert!(values.len() <= self.len, "{} elements of {}", values.len(), self.len);
        gpu.read(&self.memory, params::bytes_mut(values))
    }

    /// A copy of all elements, after all work asked for before.
    ///
    /// # Errors
    /// When the driver refuses, or work before this failed.
    pub fn download(&self, gpu: &G) -> Result<Vec<T>, GpuError> {
        let mut values = vec![T::ZERO; self.len];
        gpu.read(&self.memory, params::bytes_mut(&mut values))?;
        Ok(values)
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Makes room for `len` elements; what was there is lost when it grows.
    pub(crate) fn grow(&mut self, gpu: &G, len: usize) -> Result<(), GpuError> {
        if self.len < len {
            *self = Self::zeros(gpu, len)?;
        }
        Ok(())
    }

    fn address(&self, gpu: &G) -> u64 {
        gpu.address(&self.memory)
    }
}

#[cfg(test)]
mod tests {
    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_build_without_the_feature_says_so() {
        let reason = super::available().expect_err("no GPU").to_string();
        assert_eq!(reason, "no GPU: this binary was built without the feature cuda");
    }
}
