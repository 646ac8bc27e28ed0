//! The Rust side of `kernels/cuda/params.h`: parameter blocks and work lists as kernels read them, and the constants
//! both sides count with. The tests of the emulation compare all of it with the C++ side.

/// Rows (or query vectors) of one tensor-core tile.
pub(super) const TILE: usize = 16;
/// Threads of a block of every kernel but the norm, whose rows are few and long.
pub(super) const THREADS: usize = 128;
/// Threads of a block of the norm.
#[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
pub(super) const NORM_THREADS: usize = 512;
/// Inputs per partial sum of the shrink kernel.
pub(super) const CHUNK: usize = 512;
/// Ranks per block of the shrink kernel.
pub(super) const RANKS: usize = 32;
/// Output columns per block of the expand kernel.
pub(super) const COLUMNS: usize = 128;
/// Positions whose softmax is taken in one piece.
pub(super) const SPLIT: usize = 256;
/// Bytes of a record of eight rows and 64 inputs in codes.
pub(super) const CODED_ROWS: usize = 704;
/// Bytes of a record of eight rows and 32 inputs in two f16 parts.
pub(super) const DENSE_ROWS: usize = 1024;
/// Blocks of inputs in the rings of the products with 1, 2, 4 and 8 tiles of rows.
pub(super) const MATMUL_STAGES: [usize; 4] = [8, 6, 4, 3];
/// Matrices, and layers of adapters, of one launch.
pub(super) const PRODUCTS_MAX: usize = 3;
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
    /// Adds a bias to every row.
    AddBias,
    /// Rounds rows to 8-bit codes.
    RoundRows,
    /// Splits rows into two f16 parts.
    SplitRows,
    /// Looks tokens up.
    EmbedRows,
    /// A product for up to 8 rows a block.
    Matmul1,
    /// Up to 16.
    Matmul2,
    /// Up to 32.
    Matmul4,
    /// Up to 64.
    Matmul8,
    /// 64 rows and four panels a block.
    MatmulTall,
}

// === impl Kernel ===

impl Kernel {
    /// All of them, in order.
    pub const ALL: [Self; 16] = [
        Self::LoraShrink,
        Self::LoraExpand,
        Self::Attention,
        Self::AttentionCombine,
        Self::ResidualRmsNorm,
        Self::RopeStore,
        Self::Swiglu,
        Self::AddBias,
        Self::RoundRows,
        Self::SplitRows,
        Self::EmbedRows,
        Self::Matmul1,
        Self::Matmul2,
        Self::Matmul4,
        Self::Matmul8,
        Self::MatmulTall,
    ];

    /// Threads of a block.
    #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
    pub(super) fn threads(self) -> usize {
        if self == Self::ResidualRmsNorm { NORM_THREADS } else { THREADS }
    }

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
            Self::AddBias => "add_bias",
            Self::RoundRows => "round_rows",
            Self::SplitRows => "split_rows",
            Self::EmbedRows => "embed_rows",
            Self::Matmul1 => "matmul_1",
            Self::Matmul2 => "matmul_2",
            Self::Matmul4 => "matmul_4",
            Self::Matmul8 => "matmul_8",
            Self::MatmulTall => "matmul_tall",
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
unsafe impl Element for u8 {
    const ZERO: Self = 0;
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

/// One linear layer of a launch.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct LoraLayer {
    pub(super) y: u64,
    pub(super) partial: u64,
    pub(super) pair: u32,
    pub(super) n_out: u32,
    pub(super) first_block: u32,
    pub(super) unused: u32,
}

// === impl LoraLayer ===

impl LoraLayer {
    pub(super) const NONE: Self = Self { y: 0, partial: 0, pair: 0, n_out: 0, first_block: 0, unused: 0 };
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct LoraParams {
    pub(super) x: u64,
    pub(super) tiles: u64,
    pub(super) pairs: u64,
    pub(super) layers: [LoraLayer; PRODUCTS_MAX],
    pub(super) n_layers: u32,
    pub(super) n_pairs: u32,
    pub(super) n_rows: u32,
    pub(super) n_in: u32,
    pub(super) n_chunks: u32,
    pub(super) stride: u32,
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
    pub(super) rows: u64,
    pub(super) codes: u64,
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
    pub(super) codes: u64,
    pub(super) n: u64,
    pub(super) width: u32,
    pub(super) n_tiles: u32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct BiasParams {
    pub(super) y: u64,
    pub(super) bias: u64,
    pub(super) n_values: u64,
    pub(super) n: u32,
    pub(super) unused: u32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct RoundParams {
    pub(super) x: u64,
    pub(super) codes: u64,
    pub(super) n_in: u32,
    pub(super) n_blocks: u32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct SplitParams {
    pub(super) x: u64,
    pub(super) parts: u64,
    pub(super) exponents: u64,
    pub(super) n_in: u32,
    pub(super) n_blocks: u32,
}

/// One matrix of weights of a product.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct ProductDesc {
    pub(super) weights: u64,
    pub(super) out: u64,
    pub(super) n_out: u32,
    pub(super) first_panel: u32,
    pub(super) form: u32,
    pub(super) n_blocks: u32,
    pub(super) inverse: f32,
    pub(super) planes: u32,
}

// === impl ProductDesc ===

impl ProductDesc {
    pub(super) const NONE: Self =
        Self { weights: 0, out: 0, n_out: 0, first_panel: 0, form: 0, n_blocks: 0, inverse: 0.0, planes: 0 };
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct MatmulParams {
    pub(super) codes: u64,
    pub(super) parts: u64,
    pub(super) exponents: u64,
    pub(super) products: [ProductDesc; PRODUCTS_MAX],
    pub(super) n_products: u32,
    pub(super) n_panels: u32,
    pub(super) n_rows: u32,
    pub(super) unused: u32,
}

#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct EmbedParams {
    pub(super) table: ProductDesc,
    pub(super) tokens: u64,
    pub(super) n_in: u32,
    pub(super) unused: u32,
}

const _: () = assert!(size_of::<LoraTile>() == 12 && size_of::<LoraPairDesc>() == 56);
const _: () = assert!(size_of::<LoraParams>() == 144 && size_of::<LoraLayer>() == 32);
const _: () = assert!(size_of::<AttentionTile>() == 32);
const _: () = assert!(size_of::<AttentionParams>() == 80 && size_of::<NormParams>() == 56);
const _: () = assert!(size_of::<RopeParams>() == 96 && size_of::<SwigluParams>() == 48);
const _: () = assert!(size_of::<BiasParams>() == 32 && size_of::<RoundParams>() == 24);
const _: () = assert!(size_of::<SplitParams>() == 32 && size_of::<ProductDesc>() == 40);
const _: () = assert!(size_of::<MatmulParams>() == 160 && size_of::<EmbedParams>() == 56);

/// What one launch can count.
///
/// # Panics
/// When it is more than 32 bits.
pub(super) fn count(n: usize, what: &str) -> u32 {
    u32::try_from(n).unwrap_or_else(|_| panic!("{n} {what} are more than a launch can count"))
}
