//! Activations rounded to int8 with a scale per block of 32 inputs, and the sums that fold in zero points and
//! minima. Called once per product group. A row's codes depend on that row alone.
//!
//! Rule of a block: `m = max |x|`; scale `m / 127`; code `round(x * (127 / m))`, ties to even. A block whose `m` is
//! below [`TINY`] counts as zero; one with a NaN or infinity gets the scale NaN, so that damage stays visible.

use super::scalar::quantise_row;
use super::vector::int8::QuantiseRow;
use crate::aligned::Aligned;
use crate::backend::Backend;
use crate::pool::Pool;

/// Inputs per activation scale.
pub(super) const BLOCK: usize = 32;
/// 2^-100: below it 127 / m could overflow; no activation that matters is that small.
pub(super) const TINY: f32 = f32::from_bits(27 << 23);
/// Rows handed out at once.
const ROWS_PER_TASK: usize = 8;

/// Rounded activations; valid for the rows of the last [`Activations::fill`].
#[derive(Debug, Default)]
pub(super) struct Activations {
    /// `[n_rows, n_in]` i8.
    codes: Aligned,
    /// `[n_rows, n_in / 32]` f32.
    scales: Aligned,
    /// `[n_rows, n_in / 32]` i32: minus the sum of the codes of each block.
    neg_sums32: Aligned,
    /// `[n_rows, n_in / 16]` i32: minus the sum of the codes of each half block.
    neg_sums16: Aligned,
    /// `[n_rows, n_in / 32]` f32: scale times sum of codes.
    sums32: Aligned,
    /// `[n_rows, n_in / 16]` f32.
    sums16: Aligned,
}

/// One rounded row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    pub(super) codes: &'a [i8],
    pub(super) scales: &'a [f32],
    pub(super) neg_sums32: &'a [i32],
    pub(super) neg_sums16: &'a [i32],
    pub(super) sums32: &'a [f32],
    pub(super) sums16: &'a [f32],
}

/// Where one row goes.
pub(super) struct RowMut<'a> {
    pub(super) codes: &'a mut [i8],
    pub(super) scales: &'a mut [f32],
    pub(super) neg_sums32: &'a mut [i32],
    pub(super) neg_sums16: &'a mut [i32],
    pub(super) sums32: &'a mut [f32],
    pub(super) sums16: &'a mut [f32],
}

// === impl Activations ===

impl Activations {
    /// Rounds `x` `[n_rows, n_in]`; `n_in` is a multiple of 32.
    pub(super) fn fill(&mut self, pool: &Pool, backend: Backend, x: &[f32], n_rows: usize, n_in: usize) {
        let n_blocks = n_rows * (n_in / BLOCK);
        self.codes.grow::<i8>(n_rows * n_in);
        self.scales.grow::<f32>(n_blocks);
        self.neg_sums32.grow::<i32>(n_blocks);
        self.neg_sums16.grow::<i32>(2 * n_blocks);
        self.sums32.grow::<f32>(n_blocks);
        self.sums16.grow::<f32>(2 * n_blocks);
        let target = Target::new(self, n_in);
        pool.run_chunks(n_rows, ROWS_PER_TASK, &|rows| {
            for row in rows {
                // SAFETY: the buffers were grown to `n_rows` rows above and are borrowed by `target`; each row is
                // handed out once.
                let to = unsafe { target.row(row) };
                let row = QuantiseRow { x: &x[row * n_in..][..n_in], to };
                // SAFETY: the active backend is available; the slices fit (see `Target::row`).
                unsafe { backend.run(row, |row| quantise_row(row.x, row.to)) };
            }
        });
    }

    /// A row of the last fill, which must have had this `n_in`.
    pub(super) fn row(&self, row: usize, n_in: usize) -> Row<'_> {
        let (n32, n16) = (n_in / 32, n_in / 16);
        Row {
            codes: &self.codes.view()[row * n_in..][..n_in],
            scales: &self.scales.view()[row * n32..][..n32],
            neg_sums32: &self.neg_sums32.view()[row * n32..][..n32],
            neg_sums16: &self.neg_sums16.view()[row * n16..][..n16],
            sums32: &self.sums32.view()[row * n32..][..n32],
            sums16: &self.sums16.view()[row * n16..][..n16],
        }
    }
}

/// The buffers as raw pointers, so that threads can fill different rows.
struct Target<'a> {
    n_in: usize,
    codes: *mut i8,
    scales: *mut f32,
    neg_sums32: *mut i32,
    neg_sums16: *mut i32,
    sums32: *mut f32,
    sums16: *mut f32,
    _borrow: std::marker::PhantomData<&'a mut Activations>,
}

// SAFETY: rows are disjoint and handed out once (contract of `row`).
unsafe impl Sync for Target<'_> {}

// === impl Target ===

impl<'a> Target<'a> {
    fn new(of: &'a mut Activations, n_in: usize) -> Self {
        Self {
            n_in,
            codes: of.codes.view_mut::<i8>().as_mut_ptr(),
            scales: of.scales.view_mut::<f32>().as_mut_ptr(),
            neg_sums32: of.neg_sums32.view_mut::<i32>().as_mut_ptr(),
            neg_sums16: of.neg_sums16.view_mut::<i32>().as_mut_ptr(),
            sums32: of.sums32.view_mut::<f32>().as_mut_ptr(),
            sums16: of.sums16.view_mut::<f32>().as_mut_ptr(),
            _borrow: std::marker::PhantomData,
        }
    }

    /// # Safety
    /// The buffers hold more than `row` rows, and no row is asked for twice at a time.
    unsafe fn row(&self, row: usize) -> RowMut<'a> {
        let (n32, n16) = (self.n_in / 32, self.n_in / 16);
        // SAFETY: in bounds and exclusive by the contract.
        unsafe {
            RowMut {
                codes: std::slice::from_raw_parts_mut(self.codes.add(row * self.n_in), self.n_in),
                scales: std::slice::from_raw_parts_mut(self.scales.add(row * n32), n32),
                neg_sums32: std::slice::from_raw_parts_mut(self.neg_sums32.add(row * n32), n32),
                neg_sums16: std::slice::from_raw_parts_mut(self.neg_sums16.add(row * n16), n16),
                sums32: std::slice::from_raw_parts_mut(self.sums32.add(row * n32), n32),
                sums16: std::slice::from_raw_parts_mut(self.sums16.add(row * n16), n16),
            }
        }
    }
}

/// Scale and reciprocal of a block with the largest magnitude `m` (bits of `|x|`, compared as integers, so that a
/// NaN or infinity wins). Shared by the backends.
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
