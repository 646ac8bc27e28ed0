//! Activations rounded to int8 with a scale per block of 32 inputs, and the sums that fold in zero points and
//! minima. Called once per product group. A row's codes depend on that row alone.
//!
//! Rule of a block: `m = max |x|`; scale `m / 127`; code `round(x * (127 / m))`, ties to even. A block whose `m` is
//! below [`TINY`] counts as zero; one with a NaN or infinity gets the scale NaN, so that damage stays visible.
//!
//! Eight rows lie together, block by block, so that a tile of rows is one stream with everything at fixed places.

use super::scalar::quantise_row;
use super::vector::int8::QuantiseRow;
use crate::aligned::OutMat;
use crate::backend::Backend;
use crate::pool::Pool;

/// Inputs per activation scale.
pub(super) const BLOCK: usize = 32;
/// Rows that lie together.
pub(super) const ROWS: usize = 8;
/// 2^-100: below it 127 / m could overflow; no activation that matters is that small.
pub(super) const TINY: f32 = f32::from_bits(27 << 23);

/// 32 inputs of eight rows.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Rounded {
    pub(super) codes: [[i8; BLOCK]; ROWS],
    pub(super) scales: [f32; ROWS],
    /// Minus the sum of the codes.
    pub(super) neg_sums: [i32; ROWS],
    /// Scale times the sum of the codes.
    pub(super) sums: [f32; ROWS],
    /// As `neg_sums`, of each half of the block.
    pub(super) half_neg_sums: [[i32; ROWS]; 2],
    /// As `sums`, of each half of the block.
    pub(super) half_sums: [[f32; ROWS]; 2],
}

const _: () = assert!(size_of::<Rounded>() == 512);

/// Rounded activations; valid for the rows of the last [`Activations::fill`].
#[derive(Debug, Default)]
pub(super) struct Activations {
    /// `[n_rows / 8][n_in / 32]`.
    blocks: Vec<Rounded>,
}

// === impl Activations ===

impl Activations {
    /// Rounds `x` `[n_rows, n_in]`; `n_in` is a multiple of 32.
    pub(super) fn fill(&mut self, pool: &Pool, backend: Backend, x: &[f32], n_rows: usize, n_in: usize) {
        let (n_groups, n_blocks) = (n_rows.div_ceil(ROWS), n_in / BLOCK);
        if self.blocks.len() < n_groups * n_blocks {
            self.blocks.resize(n_groups * n_blocks, Rounded::ZERO);
        }
        let target = OutMat::new(&mut self.blocks[..n_groups * n_blocks], n_groups, n_blocks);
        pool.run_chunks(n_groups, 1, &|groups| {
            // SAFETY: each group is handed out once.
            let blocks = unsafe { target.cols(groups.start, 0, n_blocks) };
            for row in groups.start * ROWS..(groups.end * ROWS).min(n_rows) {
                let kernel = QuantiseRow { x: &x[row * n_in..][..n_in], blocks, row: row % ROWS };
                // SAFETY: the active backend is available.
                unsafe { backend.run(kernel, |k| quantise_row(k.x, k.blocks, k.row)) };
            }
        });
    }

    /// The blocks of the eight rows from `first` on, a multiple of 8; the last fill must have had this `n_in`.
    pub(super) fn rows(&self, first: usize, n_in: usize) -> &[Rounded] {
        debug_assert!(first.is_multiple_of(ROWS));
        &self.blocks[first / ROWS * (n_in / BLOCK)..][..n_in / BLOCK]
    }
}

// === impl Rounded ===

impl Rounded {
    const ZERO: Self = Self {
        codes: [[0; BLOCK]; ROWS],
        scales: [0.0; ROWS],
        neg_sums: [0; ROWS],
        sums: [0.0; ROWS],
        half_neg_sums: [[0; ROWS]; 2],
        half_sums: [[0.0; ROWS]; 2],
    };

    /// Writes what follows from a row's scale and the sums of its codes in both halves.
    #[inline(always)]
    pub(super) fn put(&mut self, row: usize, scale: f32, halves: [i32; 2]) {
        let sum = halves[0] + halves[1];
        self.scales[row] = scale;
        self.neg_sums[row] = -sum;
        self.sums[row] = scale * sum as f32;
        for (half, sum) in halves.into_iter().enumerate() {
            self.half_neg_sums[half][row] = -sum;
            self.half_sums[half][row] = scale * sum as f32;
        }
    }
}

/// Scale and reciprocal of a block with the largest magnitude `m` (bits of `|x|`, compared as integers, so that a
/// NaN or infinity wins). Shared by the backends.
#[inline(always)]
pub(super) fn block_scale(max_bits: u32) -> (f32, f32) {
    let m = f32::from_bits(max_bits);
    if !m.is_finite() {
        (f32::NAN, 0.0)
    } else if m < TINY {
        (0.0, 0.0)
    } else {
        (m / 127.0, 127.0 / m)
    }
}
