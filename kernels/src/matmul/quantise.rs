//! Activations rounded to int8 with a scale per block of 32 inputs, and the sums that fold in zero points and
//! minima. Called once per product group. A row's codes depend on that row alone.
//!
//! Rule of a block: `m = max |x|`; scale `m / 127`; code `round(x * (127 / m))`, ties to even. A block whose `m` is
//! below [`TINY`] counts as zero; one with a NaN or infinity gets the scale NaN, so that damage stays visible.
//!
//! Eight rows lie together, block by block, so that a tile of rows is one stream with everything at fixed places.

use std::ops::Range;

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
        let target = self.target(n_rows, n_in);
        pool.run_chunks(n_rows.div_ceil(ROWS), 1, &|groups| {
            for row in rows_of(groups.start, n_rows) {
                // SAFETY: each group is handed out once.
                unsafe { round(backend, &target, row, 0, &x[row * n_in..][..n_in]) };
            }
        });
    }

    /// Where the blocks of `n_rows` rows go, `[n_rows / 8][n_in / 32]`.
    pub(super) fn target(&mut self, n_rows: usize, n_in: usize) -> OutMat<Rounded> {
        let (n_groups, n_blocks) = (n_rows.div_ceil(ROWS), n_in / BLOCK);
        if self.blocks.len() < n_groups * n_blocks {
            self.blocks.resize(n_groups * n_blocks, Rounded::ZERO);
        }
        OutMat::new(&mut self.blocks[..n_groups * n_blocks], n_groups, n_blocks)
    }

    /// The blocks of the eight rows from `first` on, a multiple of 8; the last fill must have had this `n_in`.
    pub(super) fn rows(&self, first: usize, n_in: usize) -> &[Rounded] {
        debug_assert!(first.is_multiple_of(ROWS));
        &self.blocks[first / ROWS * (n_in / BLOCK)..][..n_in / BLOCK]
    }
}

/// The rows of a group of eight.
pub(super) fn rows_of(group: usize, n_rows: usize) -> Range<usize> {
    group * ROWS..((group + 1) * ROWS).min(n_rows)
}

/// Rounds inputs of a row from `first` on, both whole blocks.
///
/// # Safety
/// The backend is available, and no other thread touches these blocks of the row's group.
pub(super) unsafe fn round(backend: Backend, target: &OutMat<Rounded>, row: usize, first: usize, x: &[f32]) {
    // SAFETY: the contract of this function.
    unsafe {
        let blocks = target.cols(row / ROWS, first / BLOCK, x.len() / BLOCK);
        backend.run(QuantiseRow { x, blocks, row: row % ROWS }, |k| quantise_row(k.x, k.blocks, k.row));
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
