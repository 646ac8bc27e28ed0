//! The kernels on the CPU, for tests: the same sources compiled as C++ (`kernels/cuda/emulation.h` says how and what it
//! leaves out), behind the same entries. x86-64 Linux and a C++ compiler only, feature `cuda-emulation`. Slow, and no
//! backend for serving.

use std::ffi::{c_char, c_int, c_void};

use super::params::{
    AttentionParams, AttentionTile, BiasParams, CHUNK, CODED_ROWS, COLUMNS, DENSE_ROWS, EmbedParams, LoraPairDesc,
    LoraParams, LoraTile, MATMUL_STAGES, MatmulParams, NORM_THREADS, NormParams, ProductDesc, RANKS, RopeParams,
    RoundParams, SPLIT, SplitParams, SwigluParams, THREADS, TILE,
};
use super::{Gpu, GpuError, Kernel};
use crate::aligned::Aligned;
use crate::kv::PAGE_TOKENS;

/// Barriers in the kernels have the numbers `1..=N_BARRIERS`.
pub const N_BARRIERS: u32 = 15;

/// How kernels are run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Emulated {
    /// Runs the threads of a block from the last to the first between barriers. Correct kernels give the same bits.
    pub backwards: bool,
    /// Leaves out the barrier of this number; 0 for none.
    pub skip_barrier: u32,
    /// See [`Gpu::blocks_to_fill`].
    pub blocks_to_fill: usize,
}

unsafe extern "C" {
    fn tenantry_emulate(
        kernel: u32,
        grid: *const u32,
        threads: u32,
        shared_bytes: u32,
        params: *const c_void,
        skip_barrier: u32,
        backwards: c_int,
        message: *mut c_char,
        message_bytes: usize,
    ) -> c_int;
    fn tenantry_emulation_facts(facts: *mut u32);
    fn tenantry_emulation_f16_bits(x: f32) -> u16;
    fn tenantry_emulation_f16_value(bits: u16) -> f32;
}

// === impl Emulated ===

impl Gpu for Emulated {
    type Memory = Memory;
    type Host = Vec<f32>;

    fn allocate(&self, n_bytes: usize) -> Result<Memory, GpuError> {
        Ok(Memory(Aligned::zeros::<u8>(n_bytes)))
    }

    fn allocate_host(&self, len: usize) -> Result<Vec<f32>, GpuError> {
        Ok(vec![0.0; len])
    }

    fn write(&self, to: &mut Memory, at: usize, bytes: &[u8]) -> Result<(), GpuError> {
        to.0.view_mut::<u8>()[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn fill(&self, memory: &mut Memory, at: usize, n_bytes: usize, byte: u8) -> Result<(), GpuError> {
        memory.0.view_mut::<u8>()[at..at + n_bytes].fill(byte);
        Ok(())
    }

    fn read(&self, from: &Memory, bytes: &mut [u8]) -> Result<(), GpuError> {
        bytes.copy_from_slice(&from.0.view::<u8>()[..bytes.len()]);
        Ok(())
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.0.view::<u8>().as_ptr().expose_provenance() as u64
    }

    fn blocks_to_fill(&self) -> usize {
        self.blocks_to_fill
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        grid: [usize; 3],
        shared_bytes: usize,
        params: *const c_void,
    ) -> Result<(), GpuError> {
        let grid = grid.map(|n| n as u32);
        let mut message = [0u8; 200];
        // SAFETY: the contract of this function; grid and message are as long as the other side takes them.
        let failed = unsafe {
            tenantry_emulate(
                kernel as u32,
                grid.as_ptr(),
                kernel.threads() as u32,
                shared_bytes as u32,
                params,
                self.skip_barrier,
                c_int::from(self.backwards),
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if failed == 0 {
            return Ok(());
        }
        let end = message.iter().position(|&byte| byte == 0).unwrap_or(message.len());
        let reason = String::from_utf8_lossy(&message[..end]).into_owned();
        Err(GpuError::Driver { call: kernel.name(), reason })
    }
}

/// A stretch of ordinary memory.
#[derive(Debug)]
pub struct Memory(Aligned);

/// Names, and both sides' values, of everything that must be alike in Rust and C++.
pub fn facts() -> Vec<(&'static str, usize, usize)> {
    let ours = [
        ("LoraTile", size_of::<LoraTile>()),
        ("LoraPairDesc", size_of::<LoraPairDesc>()),
        ("LoraParams", size_of::<LoraParams>()),
        ("AttentionTile", size_of::<AttentionTile>()),
        ("AttentionParams", size_of::<AttentionParams>()),
        ("NormParams", size_of::<NormParams>()),
        ("RopeParams", size_of::<RopeParams>()),
        ("SwigluParams", size_of::<SwigluParams>()),
        ("BiasParams", size_of::<BiasParams>()),
        ("RoundParams", size_of::<RoundParams>()),
        ("SplitParams", size_of::<SplitParams>()),
        ("Product", size_of::<ProductDesc>()),
        ("MatmulParams", size_of::<MatmulParams>()),
        ("EmbedParams", size_of::<EmbedParams>()),
        ("CODED_ROWS", CODED_ROWS),
        ("DENSE_ROWS", DENSE_ROWS),
        ("MATMUL_STAGES", MATMUL_STAGES.iter().fold(0, |all, stages| 16 * all + stages)),
        ("TILE", TILE),
        ("THREADS", THREADS),
        ("NORM_THREADS", NORM_THREADS),
        ("CHUNK", CHUNK),
        ("RANKS", RANKS),
        ("COLUMNS", COLUMNS),
        ("SPLIT", SPLIT),
        ("PAGE", PAGE_TOKENS),
    ];
    let mut theirs = [0u32; 25];
    // SAFETY: the other side writes as many numbers.
    unsafe { tenantry_emulation_facts(theirs.as_mut_ptr()) };
    ours.into_iter().zip(theirs).map(|((name, ours), theirs)| (name, ours, theirs as usize)).collect()
}

/// The emulation's own rounding to f16.
pub fn f16_bits(x: f32) -> u16 {
    // SAFETY: a pure function.
    unsafe { tenantry_emulation_f16_bits(x) }
}

/// The emulation's own reading of f16.
pub fn f16_value(bits: u16) -> f32 {
    // SAFETY: a pure function.
    unsafe { tenantry_emulation_f16_value(bits) }
}
