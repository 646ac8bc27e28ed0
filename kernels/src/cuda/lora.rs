//! Adapter deltas on the device, `y += scale · B(A x)`, for a batch in which every segment has an adapter of its own.
//!
//! Pairs are kept in f16, scaled by a power of two per matrix so that the largest value lies in [2^14, 2^15): f16 and bf16
//! values keep their bits (bf16 ones below 2^-29 of the largest are rounded), f32 values are kept in two f16 parts, 22
//! bits or 2^-39 of the largest. A pair costs its rank: ranks are padded to multiples of 4 in B and not at all in A.

use std::ops::Range;
use std::ptr::from_ref;
use std::sync::Arc;

use super::halves;
use super::params::{
    CHUNK, COLUMNS, GRID_MAX, Kernel, LoraLayer, LoraPairDesc, LoraParams, LoraTile, PRODUCTS_MAX, RANKS, TILE, count,
};
use super::rows::expect_rows;
use super::{Buffer, Element, Gpu, GpuError};
use crate::lora::{LoraDtype, LoraError, LoraPair, RANK_MAX};
use crate::memory;

/// Inputs of a layer come in groups of this, so that a lane reads 16 aligned bytes.
const INPUTS: usize = 8;

/// Why a pair cannot be on a device.
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

/// A pair as the device will have it, still on the host: making it takes a core far longer than copying it, so whoever
/// uploads an adapter may make its pairs on several.
#[derive(Debug)]
pub struct PackedPair {
    rank: usize,
    n_in: usize,
    n_out: usize,
    scale: f32,
    planes: usize,
    a: Vec<u16>,
    b: Vec<u16>,
    a_inverse: f32,
    b_inverse: f32,
    row_scale: Option<Vec<f32>>,
}

/// An adapter on the device: a pair or none for each linear layer of a model, numbered by whoever makes it.
#[derive(Debug)]
pub struct DeviceAdapter<G: Gpu> {
    pairs: Vec<Option<DevicePair<G>>>,
    descriptions: Vec<LoraPairDesc>,
}

/// The adapters of a step, which it keeps alive: tiles of rows, and the pairs of each segment.
#[derive(Debug)]
pub struct LoraPlan<G: Gpu> {
    segments: Vec<(Range<usize>, Arc<DeviceAdapter<G>>)>,
    /// Per linear layer: inputs, outputs and largest rank, which is 0 when no segment has a pair there.
    layers: Vec<(usize, usize, usize)>,
    /// `[segments][layers]`.
    descriptions: Buffer<G, LoraPairDesc>,
    tiles: Buffer<G, LoraTile>,
    rows_end: usize,
}

/// Memory reused from call to call; grows to the largest step and stays.
#[derive(Debug)]
pub struct LoraScratch<G: Gpu> {
    /// Per layer of a call `[chunks][n_rows][largest padded rank]`: A x.
    partial: Buffer<G, f32>,
}

// === impl PackedPair ===

impl PackedPair {
    /// Packs row-major `a` and `b`; arguments as of [`crate::lora::LoraPair::new`].
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
        Ok(Self {
            rank,
            n_in,
            n_out,
            scale,
            planes,
            a,
            b,
            a_inverse,
            b_inverse,
            row_scale: row_scale.map(<[f32]>::to_vec),
        })
    }

    /// The device's form of a pair of the CPU kernels; values stay as they are, f32 ones keep 22 bits.
    ///
    /// # Errors
    /// When the inputs are no multiple of 8.
    pub fn of(pair: &LoraPair) -> Result<Self, DevicePairError> {
        let (mut a, mut b) = pair.matrices();
        let (rank, n_in, n_out) = (pair.rank(), pair.n_in(), pair.n_out());
        let packed = Self::new(rank, n_in, n_out, &a, &b, pair.scale(), pair.dtype(), pair.row_scale());
        memory::clear(&mut a);
        memory::clear(&mut b);
        packed
    }
}

impl Drop for PackedPair {
    /// A tenant's weights do not stay behind in freed memory of the host.
    fn drop(&mut self) {
        memory::clear(&mut self.a);
        memory::clear(&mut self.b);
    }
}

// === impl DevicePair ===

impl<G: Gpu> DevicePair<G> {
    /// Uploads a pair.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn upload(gpu: &G, pair: &PackedPair) -> Result<Self, GpuError> {
        let PackedPair { rank, n_in, n_out, scale, planes, ref a, ref b, a_inverse, b_inverse, ref row_scale } = *pair;
        let row_scale = row_scale.as_ref().map(|scale| Buffer::upload(gpu, scale)).transpose()?;
        let (a, b) = (Buffer::upload(gpu, a)?, Buffer::upload(gpu, b)?);
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
            matrix.fill(gpu, 0, matrix.len(), 0)?;
        }
        if let Some(row_scale) = &mut self.row_scale {
            row_scale.fill(gpu, 0, row_scale.len(), 0)?;
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

// === impl DeviceAdapter ===

impl<G: Gpu> DeviceAdapter<G> {
    /// Takes the pairs of all linear layers, in the numbers by which [`lora_delta`] will name them.
    pub fn new(gpu: &G, pairs: Vec<Option<DevicePair<G>>>) -> Self {
        let describe =
            |pair: &Option<DevicePair<G>>| pair.as_ref().map_or(LoraPairDesc::ZERO, |pair| pair.describe(gpu));
        let descriptions = pairs.iter().map(describe).collect();
        Self { pairs, descriptions }
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        self.pairs.iter().flatten().map(DevicePair::bytes).sum()
    }

    /// Overwrites all weights with zeros.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn clear(&mut self, gpu: &G) -> Result<(), GpuError> {
        self.pairs.iter_mut().flatten().try_for_each(|pair| pair.clear(gpu))
    }
}

// === impl LoraPlan ===

impl<G: Gpu> LoraPlan<G> {
    /// Plans a step: `segments` are rows that share an adapter, ascending and apart, with that adapter.
    ///
    /// # Panics
    /// When segments overlap, or the adapters have different numbers of linear layers or different shapes.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, segments: &[(Range<usize>, Arc<DeviceAdapter<G>>)]) -> Result<Self, GpuError> {
        let n_layers = segments.first().map_or(0, |(_, adapter)| adapter.pairs.len());
        let (mut rows_end, mut tiles, mut descriptions) = (0, Vec::new(), Vec::new());
        let mut layers = vec![(0, 0, 0); n_layers];
        for (segment, (rows, adapter)) in segments.iter().enumerate() {
            assert!(rows.start >= rows_end && rows.end >= rows.start, "segments overlap or are out of order");
            assert_eq!(adapter.pairs.len(), n_layers, "adapters of different models");
            rows_end = rows.end;
            tiles.extend(rows.clone().step_by(TILE).map(|row| LoraTile {
                segment: count(segment, "segments"),
                row: count(row, "rows"),
                n_rows: TILE.min(rows.end - row) as u32,
            }));
            descriptions.extend_from_slice(&adapter.descriptions);
            for (layer, pair) in layers.iter_mut().zip(&adapter.pairs) {
                let Some(pair) = pair else { continue };
                let (n_in, n_out, rank) = *layer;
                let same = rank == 0 || (n_in, n_out) == (pair.n_in, pair.n_out);
                assert!(same, "the pairs of one linear layer have different shapes");
                *layer = (pair.n_in, pair.n_out, rank.max(pair.rank));
            }
        }
        count(descriptions.len(), "pairs");
        let (descriptions, tiles) = (Buffer::upload(gpu, &descriptions)?, Buffer::upload(gpu, &tiles)?);
        Ok(Self { segments: segments.to_vec(), layers, descriptions, tiles, rows_end })
    }

    /// Whether this is the plan for these segments, so that the next step need not make it again.
    pub fn is_for(&self, segments: &[(Range<usize>, Arc<DeviceAdapter<G>>)]) -> bool {
        let mut pairs = segments.iter().zip(&self.segments);
        segments.len() == self.segments.len()
            && pairs.all(|(wanted, known)| wanted.0 == known.0 && Arc::ptr_eq(&wanted.1, &known.1))
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

/// `y[row] += scale · B(A x[row])` for the rows of each segment that has a pair, for up to three linear layers of the same
/// inputs, each given by its number; with a row scale (DoRA) `y[row] = row_scale * (y[row] + scale · B(A x[row]))`. `x`
/// `[n_rows, n_in]`, each `y` `[n_rows, n_out]`.
///
/// # Panics
/// When there is no such layer, a shape differs, or a buffer is too short.
///
/// # Errors
/// When the device has no room or the driver refuses.
pub fn lora_delta<G: Gpu>(
    gpu: &G,
    plan: &LoraPlan<G>,
    x: &Buffer<G, f32>,
    ys: &mut [(usize, &mut Buffer<G, f32>)],
    scratch: &mut LoraScratch<G>,
) -> Result<(), GpuError> {
    assert!(ys.len() <= PRODUCTS_MAX, "{} layers in a launch", ys.len());
    let wanted = ys.iter_mut().filter(|(layer, _)| plan.layers[*layer].2 > 0);
    let mut layers = [LoraLayer::NONE; PRODUCTS_MAX];
    let (mut n_layers, mut n_blocks, mut rank, mut inputs) = (0, 0, 0, 0);
    let n_rows = plan.rows_end;
    for (layer, y) in wanted {
        let (n_in, n_out, layer_rank) = plan.layers[*layer];
        assert!(n_layers == 0 || inputs == n_in, "layers of {inputs} and {n_in} inputs in a launch");
        expect_rows("y", y, n_rows, n_out);
        let (pair, first_block) = (count(*layer, "pairs"), count(n_blocks, "blocks"));
        layers[n_layers] =
            LoraLayer { y: y.address(gpu), partial: 0, pair, n_out: count(n_out, "outputs"), first_block, unused: 0 };
        (n_layers, n_blocks, rank, inputs) =
            (n_layers + 1, n_blocks + n_out.div_ceil(COLUMNS), rank.max(layer_rank), n_in);
    }
    if n_layers == 0 || plan.tiles.is_empty() {
        return Ok(());
    }
    expect_rows("x", x, n_rows, inputs);
    let (n_chunks, stride) = (inputs.div_ceil(CHUNK), rank.next_multiple_of(4));
    let n_ranks = n_layers * rank.div_ceil(RANKS);
    assert!(n_chunks <= GRID_MAX[1] && n_blocks <= GRID_MAX[1], "layers of {n_blocks} blocks and {inputs} inputs");
    let n_partial = n_chunks * n_rows * stride;
    scratch.partial.grow(gpu, n_layers * n_partial)?;
    for (index, layer) in layers[..n_layers].iter_mut().enumerate() {
        layer.partial = scratch.partial.address(gpu) + (index * n_partial * size_of::<f32>()) as u64;
    }
    let params = LoraParams {
        x: x.address(gpu),
        tiles: plan.tiles.address(gpu),
        pairs: plan.descriptions.address(gpu),
        layers,
        n_layers: n_layers as u32,
        n_pairs: plan.layers.len() as u32,
        n_rows: count(n_rows, "rows"),
        n_in: inputs as u32,
        n_chunks: n_chunks as u32,
        stride: stride as u32,
    };
    let shrink = ([plan.tiles.len(), n_chunks, n_ranks], 4 * (4 * TILE + 4 * TILE * RANKS));
    let expand = ([plan.tiles.len(), n_blocks, 1], 4 * (TILE + TILE * (RANK_MAX + 16)));
    // SAFETY: the parameters of this kernel; tiles name rows below `n_rows`, descriptions name buffers of the adapters,
    // which the plan keeps; `partial` holds every chunk of every row of every layer.
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
    let (scale, inverse) = halves::scale_of(values.iter().fold(0.0f32, |max, value| max.max(value.abs())));
    let n_rows = values.len() / width;
    let mut bits = vec![0; planes * n_rows * pitch];
    for (row, values) in values.chunks_exact(width).enumerate() {
        for (column, value) in values.iter().enumerate() {
            let (high, low) = halves::parts(*value, scale);
            bits[row * pitch + column] = high;
            if planes == 2 {
                bits[(n_rows + row) * pitch + column] = low;
            }
        }
    }
    (bits, inverse)
}

fn expect_length(what: &'static str, expected: usize, got: usize) -> Result<(), LoraError> {
    if expected == got { Ok(()) } else { Err(LoraError::Length { what, expected, got }) }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

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
