//! Everything unsafe and everything fast: CPU kernels with a scalar reference each.
//!
//! Knows nothing of models, tenants or requests: plain slices in, plain slices out. Each operation is a folder with a
//! safe entry that checks every length, a scalar reference, and backends chosen at run time.
//!
//! | operation | what |
//! |---|---|
//! | [`matmul`] | activations (f32 or int8) × packed weights (GGUF blocks, f32, f16, bf16) |
//! | [`lora`] | per-row adapter deltas, ranks 1 to 256 mixed, DoRA |
//! | [`attention`] | causal, grouped heads, over [`kv`] pages in f32 or f16 |
//! | [`ops`] | RMS norm, rotary, SwiGLU, exponential, maximum |
//!
//! Each has a scalar reference and one vector form, written against sixteen lanes (`simd`) and compiled for AVX2, AVX2
//! with AVX-VNNI, and AVX-512 with VNNI. On other machines, ARM included, the scalar reference runs. [`cuda`] has
//! all of them on a GPU, with promises of its own.
//!
//! **Invariant: every CPU backend gives the bits of the scalar reference.** Vector lanes are independent outputs (columns,
//! positions, dimensions); each output is one fixed sequence of operations, fused multiply-adds where the reference has
//! `mul_add`. Where a sum has several partial sums, their number and the tree that joins them depend on its length
//! alone. The tolerance between backends is therefore zero (all NaNs count as equal).
//!
//! **Invariant: a row's bits depend on that row alone**: not on other rows of the call, their number, the number of
//! threads or the split of the work.
//!
//! Nothing allocates once the scratch buffers have grown to the largest step. `unsafe` stays inside this crate.

#![deny(unsafe_op_in_unsafe_fn)]

pub mod backend;
pub mod pool;
pub mod peak;
mod aligned;
pub mod mapping;
pub mod memory;
mod simd;
pub mod matrix;
pub mod matmul;
pub mod lora;
pub mod kv;
pub mod attention;
pub mod ops;
pub mod cuda;
#[cfg(test)]
mod testing;
