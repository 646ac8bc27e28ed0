//! Row-wise operations on the device, each fused with its neighbours in a layer: residual sum with RMS norm, rotary
//! embedding with the KV write, SwiGLU. The bits of `ops` on the CPU.

use std::ptr::from_ref;

use super::kv::DeviceKv;
use super::matmul::Activations;
use super::params::{BiasParams, GRID_MAX, Kernel, NormParams, RopeParams, SwigluParams, count};
use super::{Buffer, Gpu, GpuError};
use crate::kv::PAGE_TOKENS;

/// Columns a norm can take: a row and one number lie in shared memory, of which every device since sm_80 has 163 KiB.
const COLUMNS_MAX: usize = 40_000;
/// Blocks of an element-wise kernel; each goes on with the next part.
const BLOCKS_MAX: usize = 4096;

/// Rotary pairs of a block: two a thread, so that a lone row spreads over the device.
const PAIRS_PER_BLOCK: usize = 256;

/// Cosines and sines of the rotary embedding for every position, computed as in [`crate::ops::RopeTable`].
#[derive(Debug)]
pub struct DeviceRope<G: Gpu> {
    head_dim: usize,
    max_positions: usize,
    /// `[max_positions, head_dim / 2]`.
    cosines: Buffer<G, f32>,
    sines: Buffer<G, f32>,
}

/// Position and KV slot of every row of a step; one for all layers.
#[derive(Debug)]
pub struct RowPlan<G: Gpu> {
    positions: Buffer<G, u32>,
    slots: Buffer<G, u32>,
    positions_end: usize,
    pages_end: usize,
}

/// Some rows of a step, by number.
#[derive(Debug)]
pub struct RowList<G: Gpu> {
    rows: Buffer<G, u32>,
    end: usize,
}

// === impl RowList ===

impl<G: Gpu> RowList<G> {
    /// Uploads the list.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, rows: &[u32]) -> Result<Self, GpuError> {
        let end = rows.iter().max().map_or(0, |&last| last as usize + 1);
        Ok(Self { rows: Buffer::upload(gpu, rows)?, end })
    }

    /// Rows in it.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

// === impl DeviceRope ===

impl<G: Gpu> DeviceRope<G> {
    /// Angles `position * inv_freq[i]` for `max_positions` positions; `inv_freq` `[head_dim / 2]`.
    ///
    /// # Panics
    /// When `head_dim` is odd or `inv_freq` has another length.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, head_dim: usize, max_positions: usize, inv_freq: &[f64]) -> Result<Self, GpuError> {
        assert!(head_dim.is_multiple_of(2), "head_dim {head_dim} is odd");
        assert_eq!(inv_freq.len(), head_dim / 2, "one frequency per pair");
        let table = |of: fn(f64) -> f64| -> Vec<f32> {
            let angles =
                (0..max_positions).flat_map(|position| inv_freq.iter().map(move |freq| position as f64 * freq));
            angles.map(|angle| of(angle) as f32).collect()
        };
        let (cosines, sines) = (Buffer::upload(gpu, &table(f64::cos))?, Buffer::upload(gpu, &table(f64::sin))?);
        Ok(Self { head_dim, max_positions, cosines, sines })
    }
}

// === impl RowPlan ===

impl<G: Gpu> RowPlan<G> {
    /// `positions[row]` in its sequence, and `places[row]`: page and slot its key and value go to, each row's own.
    ///
    /// # Panics
    /// When the lengths differ, a slot is not in a page, or two rows share a place.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, positions: &[u32], places: &[(u32, u32)]) -> Result<Self, GpuError> {
        assert_eq!(positions.len(), places.len(), "one place per position");
        let tokens = PAGE_TOKENS as u32;
        assert!(places.iter().all(|&(_, slot)| slot < tokens), "a slot beyond its page");
        assert!(places.iter().all(|&(page, _)| page < u32::MAX / tokens), "a page beyond what a slot number holds");
        let slots: Vec<u32> = places.iter().map(|(page, slot)| page * tokens + slot).collect();
        let mut sorted = slots.clone();
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0] != pair[1]), "two rows share a place");
        Ok(Self {
            positions: Buffer::upload(gpu, positions)?,
            slots: Buffer::upload(gpu, &slots)?,
            positions_end: positions.iter().max().map_or(0, |&last| last as usize + 1),
            pages_end: places.iter().map(|&(page, _)| page as usize + 1).max().unwrap_or(0),
        })
    }

    /// Rows of the step.
    pub fn n_rows(&self) -> usize {
        self.positions.len()
    }
}

/// `hidden += delta` if given, then `out = hidden / sqrt(mean(hidden²) + eps) * weight`, for the first `n_rows` rows;
/// `hidden`, `delta`, `out` `[n_rows, n]`, `weight` `[n]`. The result is also rounded into `codes` when given.
///
/// # Panics
/// When a buffer is too short.
///
/// # Errors
/// When the driver refuses.
pub fn residual_rms_norm<G: Gpu>(
    gpu: &G,
    hidden: &mut Buffer<G, f32>,
    delta: Option<&Buffer<G, f32>>,
    n_rows: usize,
    weight: &Buffer<G, f32>,
    eps: f32,
    out: &mut Buffer<G, f32>,
    codes: Option<&mut Activations<G>>,
) -> Result<(), GpuError> {
    expect_rows("hidden", hidden, n_rows, weight.len());
    if let Some(delta) = delta {
        expect_rows("delta", delta, n_rows, weight.len());
    }
    norm(gpu, hidden, delta, n_rows, None, weight, eps, out, codes)
}

/// As [`residual_rms_norm`], of some rows only: row `i` of `out` is made from row `rows[i]` of `hidden` and `delta`, which
/// stay as they are. Rows beyond `hidden` are the caller's fault and are refused when the list is made ([`RowList`]).
///
/// # Panics
/// When a buffer is too short.
///
/// # Errors
/// When the driver refuses.
pub fn rms_norm_of_rows<G: Gpu>(
    gpu: &G,
    hidden: &mut Buffer<G, f32>,
    delta: Option<&Buffer<G, f32>>,
    rows: &RowList<G>,
    weight: &Buffer<G, f32>,
    eps: f32,
    out: &mut Buffer<G, f32>,
    codes: Option<&mut Activations<G>>,
) -> Result<(), GpuError> {
    expect_rows("hidden", hidden, rows.end, weight.len());
    if let Some(delta) = delta {
        expect_rows("delta", delta, rows.end, weight.len());
    }
    norm(gpu, hidden, delta, rows.rows.len(), Some(rows), weight, eps, out, codes)
}

#[expect(clippy::too_many_arguments, reason = "plain buffers and facts, as everywhere in this crate")]
fn norm<G: Gpu>(
    gpu: &G,
    hidden: &mut Buffer<G, f32>,
    delta: Option<&Buffer<G, f32>>,
    n_rows: usize,
    rows: Option<&RowList<G>>,
    weight: &Buffer<G, f32>,
    eps: f32,
    out: &mut Buffer<G, f32>,
    codes: Option<&mut Activations<G>>,
) -> Result<(), GpuError> {
    let n = weight.len();
    assert!(n > 0 && n <= COLUMNS_MAX && n_rows <= GRID_MAX[0], "a norm of [{n_rows}, {n}]");
    expect_rows("out", out, n_rows, n);
    if n_rows == 0 {
        return Ok(());
    }
    let params = NormParams {
        hidden: hidden.address(gpu),
        delta: delta.map_or(0, |delta| delta.address(gpu)),
        weight: weight.address(gpu),
        out: out.address(gpu),
        rows: rows.map_or(0, |rows| rows.rows.address(gpu)),
        codes: codes.map_or(0, |codes| codes.codes_for(gpu, n_rows, n)),
        n: count(n, "columns"),
        eps,
    };
    // SAFETY: the parameters of this kernel; block r touches row r of buffers that have `n_rows` rows, or a listed row
    // of buffers that have all of these.
    unsafe { gpu.launch(Kernel::ResidualRmsNorm, [n_rows, 1, 1], (n + 1) * 4, from_ref(&params).cast()) }
}

/// Rotates `q` `[n_rows, n_heads * head_dim]` in place and writes rotated `k` and plain `v`
/// `[n_rows, n_kv_heads * head_dim]` into the rows' slots of `layer`, rounded to f16 (beyond ±65,504 to that).
///
/// # Panics
/// When a buffer is too short, or a position, page or layer does not exist.
///
/// # Errors
/// When the driver refuses.
#[expect(clippy::too_many_arguments, reason = "plain buffers and facts, as everywhere in this crate")]
pub fn rope_store<G: Gpu>(
    gpu: &G,
    q: &mut Buffer<G, f32>,
    k: &Buffer<G, f32>,
    v: &Buffer<G, f32>,
    n_heads: usize,
    rows: &RowPlan<G>,
    rope: &DeviceRope<G>,
    kv: &mut DeviceKv<G>,
    layer: usize,
) -> Result<(), GpuError> {
    let (n_rows, n_kv_heads, head_dim) = (rows.n_rows(), kv.layout().n_kv_heads, kv.layout().head_dim);
    assert_eq!(rope.head_dim, head_dim, "the table is for heads of {}", rope.head_dim);
    assert!(rows.positions_end <= rope.max_positions, "a position beyond the table's {}", rope.max_positions);
    assert!(rows.pages_end <= kv.n_pages(), "a page beyond the pool");
    expect_rows("q", q, n_rows, n_heads * head_dim);
    expect_rows("k", k, n_rows, n_kv_heads * head_dim);
    expect_rows("v", v, n_rows, n_kv_heads * head_dim);
    let layer_offset = kv.layer_offset(layer) as u64;
    if n_rows == 0 {
        return Ok(());
    }
    let params = RopeParams {
        q: q.address(gpu),
        k: k.address(gpu),
        v: v.address(gpu),
        kv: kv.data.address(gpu),
        cosines: rope.cosines.address(gpu),
        sines: rope.sines.address(gpu),
        positions: rows.positions.address(gpu),
        slots: rows.slots.address(gpu),
        page_stride: kv.page_stride() as u64,
        layer_offset,
        n_heads: count(n_heads, "heads"),
        n_kv_heads: count(n_kv_heads, "heads"),
        head_dim: count(head_dim, "dimensions"),
        unused: 0,
    };
    let shares = (n_heads * head_dim / 2).div_ceil(PAIRS_PER_BLOCK).clamp(1, GRID_MAX[1]);
    // SAFETY: the parameters of this kernel; block r touches row r and its slot, all checked above and in the plan.
    unsafe { gpu.launch(Kernel::RopeStore, [n_rows, shares, 1], 0, from_ref(&params).cast()) }
}

/// `out = gate / (1 + exp(-gate)) * up`, all `[n_rows, width]`. The result is also rounded into `codes` when given.
///
/// # Panics
/// When a buffer is shorter.
///
/// # Errors
/// When the driver refuses.
pub fn swiglu<G: Gpu>(
    gpu: &G,
    gate: &Buffer<G, f32>,
    up: &Buffer<G, f32>,
    n_rows: usize,
    width: usize,
    out: &mut Buffer<G, f32>,
    codes: Option<&mut Activations<G>>,
) -> Result<(), GpuError> {
    for (what, buffer) in [("gate", gate), ("up", up), ("out", &*out)] {
        expect_rows(what, buffer, n_rows, width);
    }
    let n = n_rows * width;
    if n == 0 {
        return Ok(());
    }
    let params = SwigluParams {
        gate: gate.address(gpu),
        up: up.address(gpu),
        out: out.address(gpu),
        codes: codes.map_or(0, |codes| codes.codes_for(gpu, n_rows, width)),
        n: n as u64,
        width: count(width, "columns"),
        n_tiles: count(n_rows.div_ceil(8), "tiles"),
    };
    // SAFETY: the parameters of this kernel; it touches the first `n` values, and the records of these rows.
    unsafe { gpu.launch(Kernel::Swiglu, [n.div_ceil(128).min(BLOCKS_MAX), 1, 1], 0, from_ref(&params).cast()) }
}

/// `y += bias` in each of `n_rows` rows.
///
/// # Panics
/// When `y` is shorter.
///
/// # Errors
/// When the driver refuses.
pub fn add_bias<G: Gpu>(gpu: &G, y: &mut Buffer<G, f32>, n_rows: usize, bias: &Buffer<G, f32>) -> Result<(), GpuError> {
    expect_rows("y", y, n_rows, bias.len());
    let n = n_rows * bias.len();
    if n == 0 {
        return Ok(());
    }
    let params = BiasParams {
        y: y.address(gpu),
        bias: bias.address(gpu),
        n_values: n as u64,
        n: count(bias.len(), "columns"),
        unused: 0,
    };
    // SAFETY: the parameters of this kernel; it touches the first `n` values.
    unsafe { gpu.launch(Kernel::AddBias, [n.div_ceil(128).min(BLOCKS_MAX), 1, 1], 0, from_ref(&params).cast()) }
}

/// # Panics
/// When `buffer` is shorter than `n_rows` rows.
pub(super) fn expect_rows<G: Gpu>(what: &str, buffer: &Buffer<G, f32>, n_rows: usize, n: usize) {
    let wanted = n_rows.checked_mul(n).expect("a size fits the address space");
    assert!(buffer.len() >= wanted, "{what} has {} values, [{n_rows}, {n}] needs {wanted}", buffer.len());
}
