//! The Rust side of `kernels/cuda/params.h`: parameter blocks and work lists as kernels read them, and the constants
//! both sides count with. The tests of the emulation compare all of it with the C++ side.

/// Rows (or query vectors) of one tensor-core tile.
pub(super) const TILE: usize = 16;
/// Threads of every block.
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub(super) const THREADS: usize = 128;
/// Inputs per partial sum of the shrink kernel.
pub(super) const CHUNK: usize = 512;
/// Ranks per block of the shrink kernel.
pub(super) const RANKS: usize = 32;
/// Output columns per block of the expand kernel.
pub(super) const COLUMNS: usize = 128;
/// Positions whose softmax is taken in one piece.
pub(super) const SPLIT: usize = 256;
/// Marks a tile that writes its result instead of a partial one.
pub(super) const NOWHERE: u32 = u32::MAX;

/// Dimension limits of one launch, as the driver has them.
pub(super) const GRID_MAX: [usize; 3] = [i32::MAX as usize, 65_535, 65_535];

/// The kernels, in the order of the table in `kernels/cuda/emulation.cpp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// First half of the adapter delta.
    LoraShrink,
    /// Second half.
    LoraExpand,
    /// Attention over one or all splits.
    Attention,
    /// Joins splits.
    AttentionCombine,
    /// Residual sum and RMS norm.
    ResidualRmsNorm,
    /// Rotary embedding and KV write.
    RopeStore,
    /// SwiGLU.
    Swiglu,
}

// === impl Kernel ===

impl Kernel {
    /// All of them, in order.
    pub const ALL: [Self; 7] = [
        Self::LoraShrink,
        Self::LoraExpand,
        Self::Attention,
        Self::AttentionCombine,
        Self::ResidualRmsNorm,
        Self::RopeStore,
        Self::Swiglu,
    ];

    /// Its name in the module.
    pub fn name(self) -> &'static str {
        match self {
            Self::LoraShrink => "lora_shrink",
            Self::LoraExpand => "lora_expand",
            Self::Attention => "attention",
            Self::AttentionCombine => "attention_combine",
            Self::ResidualRmsNorm => "residual_rms_norm",
            Self::RopeStore => "rope_store",
            Self::Swiglu => "swiglu",
        }
    }
}

/// What a [`Buffer`](super::Buffer) can hold.
///
/// # Safety
/// Implementors have no padding, and any bytes are a value of theirs.
pub unsafe trait Element: Copy {
    /// All bytes zero.
    const ZERO: Self;
}

// SAFETY: a plain number.
unsafe impl Element for f32 {
    const ZERO: Self = 0.0;
}
// SAFETY: a plain number.
unsafe impl Element for u16 {
    const ZERO: Self = 0;
}
// SAFETY: a plain number.
unsafe impl Element for u32 {
    const ZERO: Self = 0;
}

/// The bytes of some elements.
pub(super) fn bytes<T: Element>(values: &[T]) -> &[u8] {
    // SAFETY: elements have no padding; the length is that of the slice.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}

/// The bytes of some elements, writable.
pub(super) fn bytes_mut<T: Element>(values: &mut [T]) -> &mut [u8] {
    // SAFETY: elements have no padding and accept any bytes; the length is that of the slice.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), size_of_val(values)) }
}

/// Up to [`TILE`] consecutive rows that share an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct LoraTile {
    pub(super) segment: u32,
    pub(super) row: u32,
    pub(super) n_rows: u32,
}

// SAFETY: three numbers of 4 bytes.
unsafe impl Element for LoraTile {
    const ZERO: Self = Self { segment: 0, row: 0, n_rows: 0 };
}

/// An adapter's pair for one linear layer; rank 0 says there is none.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct LoraPairDesc {
    pub(super) a: u64,
    pub(super) b: u64,
    pub(super) row_scale: u64,
    pub(super) rank: u32,
    pub(super) a_pitch: u32,
    pub(super) b_pitch: u32,
    pub(super) planes: u32,
    pub(super) a_inverse: f32,
    pub(super) b_inverse: f32,
    pub(super) scale: f32,
    pub(super) unused: u32,
}

// SAFETY: three numbers of 8 bytes, then eight of 4.
unsafe impl Element for LoraPairDesc {
    const ZERO: Self = Self {
        a: 0,
        b: 0,
        row_scale: 0,
        rank: 0,
        a_pitch: 0,
        b_pitch: 0,
        planes: 0,
        a_inverse: 0.0,
        b_inverse: 0.0,
        scale: 0.0,
        unused: 0,
    };
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct LoraParams {
    pub(super) x: u64,
    pub(super) y: u64,
    pub(super) partial: u64,
    pub(super) tiles: u64,
    pub(super) pairs: u64,
    pub(super) n_rows: u32,
    pub(super) n_in: u32,
    pub(super) n_out: u32,
    pub(super) n_chunks: u32,
    pub(super) stride: u32,
    pub(super) unused: u32,
}

/// Up to [`TILE`] consecutive queries of a run on one key/value head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct AttentionTile {
    pub(super) first_row: u32,
    pub(super) query: u32,
    pub(super) n_queries: u32,
    pub(super) position: u32,
    pub(super) pages: u32,
    pub(super) first_split: u32,
    pub(super) n_splits: u32,
    pub(super) partial: u32,
}

// SAFETY: eight numbers of 4 bytes.
unsafe impl Element for AttentionTile {
    const ZERO: Self =
        Self { first_row: 0, query: 0, n_queries: 0, position: 0, pages: 0, first_split: 0, n_splits: 0, partial: 0 };
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AttentionParams {
    pub(super) q: u64,
    pub(super) out: u64,
    pub(super) kv: u64,
    pub(super) tiles: u64,
    pub(super) pages: u64,
    pub(super) partial: u64,
    pub(super) page_stride: u64,
    pub(super) layer_offset: u64,
    pub(super) n_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) group: u32,
    pub(super) scale: f32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct NormParams {
    pub(super) hidden: u64,
    pub(super) delta: u64,
    pub(super) weight: u64,
    pub(super) out: u64,
    pub(super) n: u32,
    pub(super) eps: f32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RopeParams {
    pub(super) q: u64,
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) kv: u64,
    pub(super) cosines: u64,
    pub(super) sines: u64,
    pub(super) positions: u64,
    pub(super) slots: u64,
    pub(super) page_stride: u64,
    pub(super) layer_offset: u64,
    pub(super) n_heads: u32,
    pub(super) n_kv_heads: u32,
    pub(super) head_dim: u32,
    pub(super) unused: u32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct SwigluParams {
    pub(super) gate: u64,
    pub(super) up: u64,
    pub(super) out: u64,
    pub(super) n: u64,
}

const _: () = assert!(size_of::<LoraTile>() == 12 && size_of::<LoraPairDesc>() == 56);
const _: () = assert!(size_of::<LoraParams>() == 64 && size_of::<AttentionTile>() == 32);
const _: () = assert!(size_of::<AttentionParams>() == 80 && size_of::<NormParams>() == 40);
const _: () = assert!(size_of::<RopeParams>() == 96 && size_of::<SwigluParams>() == 32);

/// What one launch can count.
///
/// # Panics
/// When it is more than 32 bits.
pub(super) fn count(n: usize, what: &str) -> u32 {
    u32::try_from(n).unwrap_or_else(|_| panic!("{n} {what} are more than a launch can count"))
}
