//! The packed A and B of one linear layer. Made by the adapter loader, read by `lora_delta`, cleared when dropped, so
//! that a tenant's weights do not stay behind in freed memory.
//!
//! Lanes of A are ranks. A rank below 16 is padded to a power of two only, and the rest of a vector holds the next
//! inputs: with padded rank `w` a vector covers `16 / w` inputs, and their partial sums are added at the end. So a
//! rank-4 pair costs a quarter of a rank-16 pair in memory and time.

use half::{bf16, f16};

use crate::aligned::{Aligned, Plain};
use crate::matrix::PANEL;

/// Largest rank accepted.
pub const RANK_MAX: usize = 256;

/// How a pair's values are kept. Values that came from this dtype are kept exactly; others are rounded to nearest even.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum LoraDtype {
    /// 4 bytes.
    F32,
    /// 2 bytes, half precision.
    F16,
    /// 2 bytes, bfloat16.
    BF16,
}

/// Why a pair was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LoraError {
    /// Rank 0 or above [`RANK_MAX`].
    #[error("rank {rank} is not within 1 to {max}", max = RANK_MAX)]
    Rank {
        /// Given.
        rank: usize,
    },
    /// An empty layer, or one whose size overflows.
    #[error("a pair cannot have the shape [{n_out}, {n_in}]")]
    Shape {
        /// Rows of B.
        n_out: usize,
        /// Columns of A.
        n_in: usize,
    },
    /// A matrix or vector has another size than rank and shape say.
    #[error("{what} has {got} values, the shape says {expected}")]
    Length {
        /// Which.
        what: &'static str,
        /// Wanted.
        expected: usize,
        /// Found.
        got: usize,
    },
}

/// Packed A `[rank, n_in]` and B `[n_out, rank]` of one linear layer, with their scale. Cleared on drop.
#[derive(Debug)]
pub struct LoraPair {
    rank: usize,
    n_in: usize,
    n_out: usize,
    pub(super) scale: f32,
    pub(super) dtype: LoraDtype,
    /// `[rank panel][steps][16]`; lane `s * width + r` of step `i` is A's row `r`, column `i * (16 / width) + s`.
    pub(super) a: Aligned,
    /// `[output panel][rank][16]`.
    pub(super) b: Aligned,
    /// DoRA: `[n_out]`.
    pub(super) row_scale: Option<Vec<f32>>,
}

// === impl LoraPair ===

impl LoraPair {
    /// Packs `a` `[rank, n_in]` and `b` `[n_out, rank]`, row-major. `scale` is what PEFT calls scaling (alpha / rank or
    /// alpha / √rank). `row_scale` `[n_out]` makes it DoRA: `y = row_scale * (y + delta)`.
    ///
    /// # Errors
    /// When the rank is out of range or a length does not fit.
    pub fn new(
        rank: usize,
        n_in: usize,
        n_out: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
        dtype: LoraDtype,
        row_scale: Option<Vec<f32>>,
    ) -> Result<Self, LoraError> {
        check_shape(rank, n_in, n_out)?;
        expect_length("matrix A", rank * n_in, a.len())?;
        expect_length("matrix B", n_out * rank, b.len())?;
        if let Some(row_scale) = &row_scale {
            expect_length("the row scale", n_out, row_scale.len())?;
        }
        let mut pair = Self::zeros(rank, n_in, n_out, scale, dtype, row_scale);
        match dtype {
            LoraDtype::F32 => pair.fill::<f32, f32>(a, b, |value| value),
            LoraDtype::F16 => pair.fill::<f32, u16>(a, b, |value| f16::from_f32(value).to_bits()),
            LoraDtype::BF16 => pair.fill::<f32, u16>(a, b, |value| bf16::from_f32(value).to_bits()),
        }
        Ok(pair)
    }

    /// As [`LoraPair::new`], from the little-endian values of a file in the dtype they are kept in.
    ///
    /// # Errors
    /// When the rank is out of range or a length does not fit.
    pub fn from_le_bytes(
        rank: usize,
        n_in: usize,
        n_out: usize,
        a: &[u8],
        b: &[u8],
        scale: f32,
        dtype: LoraDtype,
    ) -> Result<Self, LoraError> {
        check_shape(rank, n_in, n_out)?;
        let size = if dtype == LoraDtype::F32 { 4 } else { 2 };
        expect_length("the bytes of matrix A", rank * n_in * size, a.len())?;
        expect_length("the bytes of matrix B", n_out * rank * size, b.len())?;
        let mut pair = Self::zeros(rank, n_in, n_out, scale, dtype, None);
        match dtype {
            LoraDtype::F32 => pair.fill::<[u8; 4], f32>(a.as_chunks().0, b.as_chunks().0, f32::from_le_bytes),
            LoraDtype::F16 | LoraDtype::BF16 => {
                pair.fill::<[u8; 2], u16>(a.as_chunks().0, b.as_chunks().0, u16::from_le_bytes);
            }
        }
        Ok(pair)
    }

    fn zeros(
        rank: usize,
        n_in: usize,
        n_out: usize,
        scale: f32,
        dtype: LoraDtype,
        row_scale: Option<Vec<f32>>,
    ) -> Self {
        let mut pair =
            Self { rank, n_in, n_out, scale, dtype, a: Aligned::default(), b: Aligned::default(), row_scale };
        let n_a = pair.rank_panels() * pair.steps() * PANEL;
        let n_b = n_out.div_ceil(PANEL) * rank * PANEL;
        let of = |n| if dtype == LoraDtype::F32 { Aligned::zeros::<f32>(n) } else { Aligned::zeros::<u16>(n) };
        (pair.a, pair.b) = (of(n_a), of(n_b));
        pair
    }

    /// Packs both matrices: each panel is a transpose of at most 16 rows.
    fn fill<S: Copy, T: Plain>(&mut self, a: &[S], b: &[S], read: impl Fn(S) -> T + Copy) {
        let (rank, n_in, width, steps) = (self.rank, self.n_in, self.width(), self.steps());
        let panels = self.a.view_mut::<T>().chunks_exact_mut(steps * PANEL);
        for (rows, panel) in a.chunks(PANEL * n_in).zip(panels) {
            transpose(rows, n_in, panel, width, read);
        }
        let panels = self.b.view_mut::<T>().chunks_exact_mut(rank * PANEL);
        for (rows, panel) in b.chunks(PANEL * rank).zip(panels) {
            transpose(rows, rank, panel, PANEL, read);
        }
    }

    /// Rank.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Columns of A: the width of the layer's input.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Rows of B: the width of the layer's output.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.a.bytes() + self.b.bytes() + self.row_scale.as_ref().map_or(0, |scale| size_of_val(scale.as_slice()))
    }

    /// Lanes per input: the rank padded to a power of two, at most 16.
    pub(super) fn width(&self) -> usize {
        self.rank.next_power_of_two().min(PANEL)
    }

    /// Panels of 16 ranks.
    pub(super) fn rank_panels(&self) -> usize {
        self.rank.div_ceil(PANEL)
    }

    /// Vectors of A per rank panel.
    pub(super) fn steps(&self) -> usize {
        self.n_in.div_ceil(PANEL / self.width())
    }

    /// A `[rank, n_in]` and B `[n_out, rank]`, row-major, for another device's packing.
    pub(crate) fn matrices(&self) -> (Vec<f32>, Vec<f32>) {
        let (rank, n_in, n_out) = (self.rank, self.n_in, self.n_out);
        let (mut a, mut b) = (vec![0.0; rank * n_in], vec![0.0; n_out * rank]);
        for (r, row) in a.chunks_exact_mut(n_in).enumerate() {
            row.iter_mut().enumerate().for_each(|(k, value)| *value = self.read(&self.a, self.a_at(r, k)));
        }
        for (column, row) in b.chunks_exact_mut(rank).enumerate() {
            let first = column / PANEL * rank * PANEL + column % PANEL;
            row.iter_mut().enumerate().for_each(|(r, value)| *value = self.read(&self.b, first + r * PANEL));
        }
        (a, b)
    }

    /// What the delta is multiplied by.
    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    /// How values are kept.
    pub(crate) fn dtype(&self) -> LoraDtype {
        self.dtype
    }

    /// DoRA's factors, `[n_out]`.
    pub(crate) fn row_scale(&self) -> Option<&[f32]> {
        self.row_scale.as_deref()
    }

    /// Where A's row `r`, column `k` lies.
    pub(super) fn a_at(&self, r: usize, k: usize) -> usize {
        let inputs = PANEL / self.width();
        (r / PANEL * self.steps() + k / inputs) * PANEL + k % inputs * self.width() + r % PANEL
    }

    /// A packed value as f32.
    pub(super) fn read(&self, of: &Aligned, at: usize) -> f32 {
        match self.dtype {
            LoraDtype::F32 => of.view::<f32>()[at],
            LoraDtype::F16 => f16::from_bits(of.view::<u16>()[at]).to_f32(),
            LoraDtype::BF16 => bf16::from_bits(of.view::<u16>()[at]).to_f32(),
        }
    }
}

impl Drop for LoraPair {
    fn drop(&mut self) {
        self.a.clear();
        self.b.clear();
        for value in self.row_scale.iter_mut().flatten() {
            // SAFETY: a valid, exclusive reference; volatile, so that the store is not left out.
            unsafe { std::ptr::write_volatile(value, 0.0) };
        }
    }
}

/// `to[c * stride + r] = from[r * n_cols + c]`.
fn transpose<S: Copy, T: Copy>(from: &[S], n_cols: usize, to: &mut [T], stride: usize, read: impl Fn(S) -> T) {
    for (r, row) in from.chunks_exact(n_cols).enumerate() {
        for (slot, &value) in to.chunks_exact_mut(stride).zip(row) {
            slot[r] = read(value);
        }
    }
}

/// Sizes that pass do not overflow, nor do they padded.
fn check_shape(rank: usize, n_in: usize, n_out: usize) -> Result<(), LoraError> {
    if rank == 0 || rank > RANK_MAX {
        return Err(LoraError::Rank { rank });
    }
    let sizes = n_in.checked_mul(2 * RANK_MAX * 4).zip(n_out.checked_mul(2 * RANK_MAX * 4));
    if n_in == 0 || n_out == 0 || sizes.is_none() { Err(LoraError::Shape { n_out, n_in }) } else { Ok(()) }
}

fn expect_length(what: &'static str, expected: usize, got: usize) -> Result<(), LoraError> {
    if expected == got { Ok(()) } else { Err(LoraError::Length { what, expected, got }) }
}
