//! Adapter deltas on the device, `y += scale · B(A x)`, for a batch in which every segment has an adapter of its own.
//!
//! Pairs are kept in f16, scaled by a power of two per matrix so that the largest value lies in [2^14, 2^15): f16 and bf16
//! values keep their bits (bf16 ones below 2^-29 of the largest are rounded), f32 values are kept in two f16 parts, 22
//! bits or 2^-39 of the largest. A pair costs its rank: ranks are padded to multiples of 4 in B and not at all in A.

use std::marker::PhantomData;
use std::ops::Range;
use std::ptr::from_ref;

use half::f16;

use super::params::{CHUNK, COLUMNS, GRID_MAX, Kernel, LoraPairDesc, LoraParams, LoraTile, RANKS, TILE, count};
use super::rows::expect_rows;
use super::{Buffer, Element, Gpu, GpuError};
use crate::lora::{LoraDtype, LoraError, RANK_MAX};

/// Inputs of a layer come in groups of this, so that a lane reads 16 aligned bytes.
const INPUTS: usize = 8;

/// Why a pair was not uploaded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DevicePairError {
    /// Its rank or sizes do not fit.
    #[error(transparent)]
    Pair(#[from] LoraError),
    /// The layer's inputs are no multiple of 8; such a model runs on the CPU.
    #[error("{n_in} inputs are no multiple of 8")]
    Inputs {
        /// Columns of A.
        n_in: usize,
    },
    /// The device has no room.
    #[error(transparent)]
    Gpu(#[from] GpuError),
}

/// A `[rank, n_in]` and B `[n_out, rank]` of one linear layer on the device. Overwritten with zeros by
/// [`DevicePair::clear`]; dropping alone frees.
#[derive(Debug)]
pub struct DevicePair<G: Gpu> {
    rank: usize,
    n_in: usize,
    n_out: usize,
    scale: f32,
    planes: usize,
    a: Buffer<G, u16>,
    b: Buffer<G, u16>,
    a_inverse: f32,
    b_inverse: f32,
    row_scale: Option<Buffer<G, f32>>,
}

/// The adapters of a step: tiles of rows, and for every linear layer (a call) the pair of each segment.
#[derive(Debug)]
pub struct LoraPlan<'p, G: Gpu> {
    calls: Vec<Call<G>>,
    tiles: Buffer<G, LoraTile>,
    rows_end: usize,
    /// The pairs are read until the plan is gone.
    pairs: PhantomData<&'p DevicePair<G>>,
}

/// One linear layer of a plan.
#[derive(Debug)]
struct Call<G: Gpu> {
    n_in: usize,
    n_out: usize,
    /// Largest rank; 0 when no segment has a pair here.
    rank: usize,
    pairs: Buffer<G, LoraPairDesc>,
}

/// Memory reused from call to call; grows to the largest step and stays.
#[derive(Debug)]
pub struct LoraScratch<G: Gpu> {
    /// `[chunks][n_rows][largest padded rank]`: A x.
    partial: Buffer<G, f32>,
}

// === impl DevicePair ===

impl<G: Gpu> DevicePair<G> {
    /// Uploads row-major `a` and `b`; arguments as of [`crate::lora::LoraPair::new`].
    ///
    /// # Errors
    /// When the rank is out of range, a length does not fit, or the device has no room.
    #[expect(clippy::too_many_arguments, reason = "as the pair of the CPU kernels, and the device")]
    pub fn new(
        gpu: &G,
        rank: usize,
        n_in: usize,
        n_out: usize,
        a: &[f32],
        b: &[f32],
        scale: f32,
        dtype: LoraDtype,
        row_scale: Option<&[f32]>,
    ) -> Result<Self, DevicePairError> {
        if rank == 0 || rank > RANK_MAX {
            return Err(LoraError::Rank { rank }.into());
        }
        let fits = |n: usize| n > 0 && n.checked_mul(4 * RANK_MAX).is_some_and(|n| n <= u32::MAX as usize);
        if !fits(n_in) || !fits(n_out) {
            return Err(LoraError::Shape { n_out, n_in }.into());
        }
        if !n_in.is_multiple_of(INPUTS) {
            return Err(DevicePairError::Inputs { n_in });
        }
        expect_length("matrix A", rank * n_in, a.len())?;
        expect_length("matrix B", n_out * rank, b.len())?;
        if let Some(row_scale) = row_scale {
            expect_length("the row scale", n_out, row_scale.len())?;
        }
        let planes = if dtype == LoraDtype::F32 { 2 } else { 1 };
        let (a, a_inverse) = in_planes(a, n_in, n_in, planes);
        let (b, b_inverse) = in_planes(b, rank, b_pitch(rank), planes);
        let row_scale = row_scale.map(|scale| Buffer::upload(gpu, scale)).transpose()?;
        let (a, b) = (Buffer::upload(gpu, &a)?, Buffer::upload(gpu, &b)?);
        Ok(Self { rank, n_in, n_out, scale, planes, a, b, a_inverse, b_inverse, row_scale })
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        2 * (self.a.len() + self.b.len()) + 4 * self.row_scale.as_ref().map_or(0, Buffer::len)
    }

    /// Overwrites the weights with zeros, so that a tenant's adapter does not stay behind in freed memory.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn clear(&mut self, gpu: &G) -> Result<(), GpuError> {
        for matrix in [&mut self.a, &mut self.b] {
            matrix.write(gpu, 0, &vec![0; matrix.len()])?;
        }
        if let Some(row_scale) = &mut self.row_scale {
            row_scale.write(gpu, 0, &vec![0.0; row_scale.len()])?;
        }
        Ok(())
    }

    fn describe(&self, gpu: &G) -> LoraPairDesc {
        LoraPairDesc {
            a: self.a.address(gpu),
            b: self.b.address(gpu),
            row_scale: self.row_scale.as_ref().map_or(0, |scale| scale.address(gpu)),
            rank: self.rank as u32,
            a_pitch: self.n_in as u32,
            b_pitch: b_pitch(self.rank) as u32,
            planes: self.planes as u32,
            a_inverse: self.a_inverse,
            b_inverse: self.b_inverse,
            scale: self.scale,
            unused: 0,
        }
    }
}

// === impl LoraPlan ===

impl<'p, G: Gpu> LoraPlan<'p, G> {
    /// Plans a step: `segments` are rows that share an adapter, ascending and apart; `calls[i][s]` is the pair of segment
    /// `s` for linear layer `i`, if its adapter has one. Uploads a few bytes per segment and call, once per step.
    ///
    /// # Panics
    /// When segments overlap, a call does not have one entry per segment, or its pairs have different shapes.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, segments: &[Range<usize>], calls: &[Vec<Option<&'p DevicePair<G>>>]) -> Result<Self, GpuError> {
        let (mut rows_end, mut tiles) = (0, Vec::new());
        for (segment, rows) in segments.iter().enumerate() {
            assert!(rows.start >= rows_end && rows.end >= rows.start, "segments overlap or are out of order");
            rows_end = rows.end;
            tiles.extend(rows.clone().step_by(TILE).map(|row| LoraTile {
                segment: count(segment, "segments"),
                row: count(row, "rows"),
                n_rows: TILE.min(rows.end - row) as u32,
            }));
        }
        let calls = calls.iter().map(|pairs| Call::new(gpu, segments.len(), pairs)).collect::<Result<_, _>>()?;
        Ok(Self { calls, tiles: Buffer::upload(gpu, &tiles)?, rows_end, pairs: PhantomData })
    }
}

// === impl Call ===

impl<G: Gpu> Call<G> {
    fn new(gpu: &G, n_segments: usize, pairs: &[Option<&DevicePair<G>>]) -> Result<Self, GpuError> {
        assert_eq!(pairs.len(), n_segments, "one pair or none per segment");
        let first = pairs.iter().flatten().next();
        let (n_in, n_out) = first.map_or((0, 0), |pair| (pair.n_in, pair.n_out));
        let same = pairs.iter().flatten().all(|pair| pair.n_in == n_in && pair.n_out == n_out);
        assert!(same, "the pairs of one linear layer have different shapes");
        let rank = pairs.iter().flatten().map(|pair| pair.rank).max().unwrap_or(0);
        let describe = |pair: &Option<&DevicePair<G>>| pair.map_or(LoraPairDesc::ZERO, |pair| pair.describe(gpu));
        let pairs: Vec<_> = pairs.iter().map(describe).collect();
        Ok(Self { n_in, n_out, rank, pairs: Buffer::upload(gpu, &pairs)? })
    }
}

// === impl LoraScratch ===

impl<G: Gpu> LoraScratch<G> {
    /// Empty.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G) -> Result<Self, GpuError> {
        Ok(Self { partial: Buffer::zeros(gpu, 0)? })
    }
}

/// `y[row] += scale · B(A x[row])` for the rows of each segment that has a pair in this call; with a row scale (DoRA)
/// `y[row] = row_scale * (y[row] + scale · B(A x[row]))`. `x` `[n_rows, n_in]`, `y` `[n_rows, n_out]`.
///
/// # Panics
/// When there is no such call, a shape differs, or a buffer is too short.
///
/// # Errors
/// When the device has no room or the driver refuses.
pub fn lora_delta<G: Gpu>(
    gpu: &G,
    plan: &LoraPlan<'_, G>,
    call: usize,
    x: &Buffer<G, f32>,
    y: &mut Buffer<G, f32>,
    scratch: &mut LoraScratch<G>,
) -> Result<(), GpuError> {
    let Call { n_in, n_out, rank, ref pairs } = plan.calls[call];
    if rank == 0 || plan.tiles.is_empty() {
        return Ok(());
    }
    let n_rows = plan.rows_end;
    expect_rows("x", x, n_rows, n_in);
    expect_rows("y", y, n_rows, n_out);
    let (n_chunks, stride) = (n_in.div_ceil(CHUNK), rank.next_multiple_of(4));
    assert!(n_chunks <= GRID_MAX[1] && n_out.div_ceil(COLUMNS) <= GRID_MAX[1], "a layer of [{n_out}, {n_in}]");
    scratch.partial.grow(gpu, n_chunks * n_rows * stride)?;
    let params = LoraParams {
        x: x.address(gpu),
        y: y.address(gpu),
        partial: scratch.partial.address(gpu),
        tiles: plan.tiles.address(gpu),
        pairs: pairs.address(gpu),
        n_rows: n_rows as u32,
        n_in: n_in as u32,
        n_out: n_out as u32,
        n_chunks: n_chunks as u32,
        stride: stride as u32,
        unused: 0,
    };
    let shrink = ([plan.tiles.len(), n_chunks, rank.div_ceil(RANKS)], 4 * (TILE + 4 * TILE * RANKS));
    let expand = ([plan.tiles.len(), n_out.div_ceil(COLUMNS), 1], 4 * (TILE + TILE * (RANK_MAX + 16)));
    // SAFETY: the parameters of this kernel; tiles name rows below `n_rows`, descriptions name buffers of the pairs,
    // which the plan keeps borrowed; `partial` holds every chunk of every row.
    unsafe { gpu.launch(Kernel::LoraShrink, shrink.0, shrink.1, from_ref(&params).cast())? };
    // SAFETY: as above; the launch before has written what this one reads.
    unsafe { gpu.launch(Kernel::LoraExpand, expand.0, expand.1, from_ref(&params).cast()) }
}

/// Values from a row of B to the next.
fn b_pitch(rank: usize) -> usize {
    rank.next_multiple_of(4)
}

/// Rows of `width` as f16 bits at a distance of `pitch`, scaled by a power of two, and the inverse of that power. The
/// second plane, if any, is what the first left over.
fn in_planes(values: &[f32], width: usize, pitch: usize, planes: usize) -> (Vec<u16>, f32) {
    let max = values.iter().fold(0.0f32, |max, value| max.max(value.abs()));
    // As in the kernels: to [2^14, 2^15), within bounds that keep the inverse a normal number.
    let exponent = (141 - (max.to_bits() >> 23) as i32).clamp(-120, 120);
    let scale = 2f32.powi(exponent);
    let n_rows = values.len() / width;
    let mut bits = vec![0; planes * n_rows * pitch];
    for (row, values) in values.chunks_exact(width).enumerate() {
        for (column, value) in values.iter().enumerate() {
            let high = f16::from_f32(value * scale);
            bits[row * pitch + column] = high.to_bits();
            if planes == 2 {
                bits[(n_rows + row) * pitch + column] = f16::from_f32(value * scale - high.to_f32()).to_bits();
            }
        }
    }
    (bits, 2f32.powi(-exponent))
}

fn expect_length(what: &'static str, expected: usize, got: usize) -> Result<(), LoraError> {
    if expected == got { Ok(()) } else { Err(LoraError::Length { what, expected, got }) }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn planes_keep_half_precision_values_exactly_and_f32_to_22_bits() {
        let values: Vec<f32> = (0..64).map(|i| (i as f32 - 31.7) * 1.37e-3 * 4f32.powi(i % 9 - 4)).collect();
        let read = |bits: &[u16], at: usize, inverse: f32| f16::from_bits(bits[at]).to_f32() * inverse;
        for round in [|v: f32| f16::from_f32(v).to_f32(), |v: f32| bf16::from_f32(v).to_f32()] {
            let rounded: Vec<f32> = values.iter().copied().map(round).collect();
            let (bits, inverse) = in_planes(&rounded, 8, 8, 1);
            assert!(rounded.iter().enumerate().all(|(i, value)| read(&bits, i, inverse) == *value));
        }
        let (bits, inverse) = in_planes(&values, 6, 8, 2);
        let largest = values.iter().fold(0.0, |max: f32, value| max.max(value.abs()));
        for (i, value) in values[..60].iter().enumerate() {
            let at = i / 6 * 8 + i % 6;
            let kept = read(&bits, at, inverse) + read(&bits, 10 * 8 + at, inverse);
            // The rest of a small value is a subnormal f16, whose steps are 2^-24 beside a largest value of 2^14 at least.
            let bound = value.abs() * 2f32.powi(-22) + largest * 2f32.powi(-39);
            assert!((kept - value).abs() <= bound, "{value} became {kept}");
        }
    }

    #[test]
    fn zeros_and_extremes_keep_a_finite_scale() {
        for value in [0.0, f32::MIN_POSITIVE, 1e-40, f32::MAX] {
            let (bits, inverse) = in_planes(&[value; 8], 8, 8, 1);
            assert!(inverse.is_normal() && f16::from_bits(bits[0]).is_finite(), "{value}");
        }
    }
}
