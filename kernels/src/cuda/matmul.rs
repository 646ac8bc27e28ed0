//! Frozen weights on the device and their products: `out = x · wᵀ` for one to many rows, up to three matrices of the same
//! inputs in a launch, and lookups in the embedding table.
//!
//! Quantised weights keep their codes (4 bits, or 8 for longer ones) and the scales of their file; activations are
//! rounded to int8 with a scale per block of 32 as on the CPU, and dot products are exact integers. Dense weights are
//! kept in f16, scaled by a power of two as adapters are (f32 ones in two parts), and activations in two parts.
//!
//! **Invariant: a row's bits depend on that row and the matrix alone.** Inputs are summed in four quarters that begin at
//! fixed places, `((q0 + q1) + q2) + q3`, each a chain over its blocks; which kernel runs depends on the number of rows,
//! but all have this order. A quarter of quantised weights has the bits of `crate::matmul` over its inputs (formats
//! with more than one step per group excepted), so results differ from the CPU's by three roundings at most.

mod pack;

use std::ptr::from_ref;

use super::params::{
    CODED_ROWS, DENSE_ROWS, EmbedParams, GRID_MAX, Kernel, MATMUL_STAGES, MatmulParams, PRODUCTS_MAX, ProductDesc,
    RoundParams, SplitParams, count,
};
use super::rows::expect_rows;
use super::{Buffer, Gpu, GpuError};
use crate::matrix::{Matrix, PANEL};

pub use self::pack::Form;

/// Rows of a tile of the tensor cores.
const TILE_ROWS: usize = 8;
/// Rows of a block at most.
const BLOCK_ROWS: usize = 64;
/// Panels of a block of the tall kernel.
const TALL_PANELS: usize = 4;
/// Inputs that a block of the row-wise kernels takes, so that a lone row spreads over the device.
const INPUTS_PER_BLOCK: usize = 128;

/// A matrix `[n_out, n_in]` of weights on the device.
#[derive(Debug)]
pub struct DeviceMatrix<G: Gpu> {
    n_out: usize,
    n_in: usize,
    form: Form,
    /// Dense: 1, or 2 where the second plane holds what rounding to f16 left over.
    planes: usize,
    /// Dense: undoes the scaling.
    inverse: f32,
    data: Buffer<G, u8>,
}

/// The rows of a step, rounded or split for a product; one set of buffers for all layers, sized once.
#[derive(Debug)]
pub struct Activations<G: Gpu> {
    codes: Buffer<G, u8>,
    parts: Buffer<G, u8>,
    exponents: Buffer<G, u32>,
    /// What codes and parts hold: rows and inputs.
    rounded: (usize, usize),
    split: (usize, usize),
}

// === impl DeviceMatrix ===

impl<G: Gpu> DeviceMatrix<G> {
    /// Repacks and uploads a matrix.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn upload(gpu: &G, matrix: &Matrix) -> Result<Self, GpuError> {
        let (n_out, n_in) = (matrix.n_out(), matrix.n_in());
        let packed = pack::pack(matrix);
        let data = Buffer::upload(gpu, &packed.bytes)?;
        Ok(Self { n_out, n_in, form: packed.form, planes: packed.planes, inverse: packed.inverse, data })
    }

    /// Weights that mean nothing, of a plausible size (products keep the magnitude of their inputs), for measuring.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn random(gpu: &G, n_out: usize, n_in: usize, form: Form, seed: u64) -> Result<Self, GpuError> {
        let panel = pack::random_panel(n_in, form, seed);
        let n_panels = n_out.div_ceil(PANEL);
        let mut data = Buffer::zeros(gpu, n_panels * panel.len())?;
        for index in 0..n_panels {
            data.write(gpu, index * panel.len(), &panel)?;
        }
        Ok(Self { n_out, n_in, form, planes: 1, inverse: pack::RANDOM_INVERSE, data })
    }

    /// Outputs.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Inputs.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// How the weights are kept.
    pub fn form(&self) -> Form {
        self.form
    }

    /// Bytes held on the device.
    pub fn bytes(&self) -> usize {
        self.data.len()
    }

    fn describe(&self, gpu: &G, out: u64, first_panel: usize) -> ProductDesc {
        ProductDesc {
            weights: self.data.address(gpu),
            out,
            n_out: count(self.n_out, "outputs"),
            first_panel: count(first_panel, "panels"),
            form: self.form as u32,
            n_blocks: count(self.form.n_blocks(self.n_in), "blocks"),
            inverse: self.inverse,
            planes: self.planes as u32,
        }
    }
}

// === impl Activations ===

impl<G: Gpu> Activations<G> {
    /// Room for `rows_max` rows of `n_in_max` inputs; `coded` and `dense` say which weights will be multiplied.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, rows_max: usize, n_in_max: usize, coded: bool, dense: bool) -> Result<Self, GpuError> {
        let tiles = rows_max.div_ceil(TILE_ROWS);
        let room = |wanted: bool, n: usize| Buffer::zeros(gpu, if wanted { tiles * n } else { 0 });
        Ok(Self {
            codes: room(coded, n_in_max.div_ceil(64) * CODED_ROWS)?,
            parts: room(dense, n_in_max.div_ceil(32) * DENSE_ROWS)?,
            exponents: Buffer::zeros(gpu, rows_max.next_multiple_of(TILE_ROWS))?,
            rounded: (0, 0),
            split: (0, 0),
        })
    }

    /// These, for a kernel that makes rows of `n_in` and can round them in passing for weights of `form`; none where that is
    /// of no use, or warps do not see whole blocks. [`Activations::prepare`] knows what was done.
    pub fn in_passing(&mut self, form: Form, n_in: usize) -> Option<&mut Self> {
        self.renew();
        (form != Form::Dense && n_in.is_multiple_of(64)).then_some(self)
    }

    /// Makes what products with weights of these forms need of `x` `[n_rows, n_in]`, unless it was made in passing. Forget
    /// older rows with [`Activations::in_passing`] or [`Activations::renew`] first.
    ///
    /// # Panics
    /// When there is no room or `x` is shorter.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn prepare(
        &mut self,
        gpu: &G,
        forms: &[Form],
        x: &Buffer<G, f32>,
        n_rows: usize,
        n_in: usize,
    ) -> Result<(), GpuError> {
        if forms.iter().any(|&form| form != Form::Dense) && self.rounded != (n_rows, n_in) {
            self.round(gpu, x, n_rows, n_in)?;
        }
        if forms.contains(&Form::Dense) && self.split != (n_rows, n_in) {
            self.split(gpu, x, n_rows, n_in)?;
        }
        Ok(())
    }

    /// Forgets what was rounded or split: other rows come.
    pub fn renew(&mut self) {
        (self.rounded, self.split) = ((0, 0), (0, 0));
    }

    /// Where a kernel is to put the codes of what it computes, which are then those of these rows.
    ///
    /// # Panics
    /// When there is no room, or rows of `n_in` cannot be rounded in passing.
    pub(super) fn codes_for(&mut self, gpu: &G, n_rows: usize, n_in: usize) -> u64 {
        assert!(n_in.is_multiple_of(64), "{n_in} inputs are no whole blocks of 64");
        self.reserve_codes(n_rows, n_in);
        self.codes.address(gpu)
    }

    fn reserve_codes(&mut self, n_rows: usize, n_in: usize) {
        let needed = n_rows.div_ceil(TILE_ROWS) * n_in.div_ceil(64) * CODED_ROWS;
        assert!(needed <= self.codes.len(), "codes of [{n_rows}, {n_in}] need {needed} bytes of {}", self.codes.len());
        self.rounded = (n_rows, n_in);
    }

    /// Rounds `x` `[n_rows, n_in]` to codes, for coded weights.
    ///
    /// # Panics
    /// When there is no room or `x` is shorter.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn round(&mut self, gpu: &G, x: &Buffer<G, f32>, n_rows: usize, n_in: usize) -> Result<(), GpuError> {
        expect_rows("x", x, n_rows, n_in);
        assert!(n_in > 0 && n_rows <= GRID_MAX[0], "rows [{n_rows}, {n_in}]");
        self.reserve_codes(n_rows, n_in);
        if n_rows == 0 {
            return Ok(());
        }
        let params = RoundParams {
            x: x.address(gpu),
            codes: self.codes.address(gpu),
            n_in: count(n_in, "inputs"),
            n_blocks: count(n_in.div_ceil(64), "blocks"),
        };
        let grid = [n_rows, n_in.div_ceil(INPUTS_PER_BLOCK).min(GRID_MAX[1]), 1];
        // SAFETY: the parameters of this kernel; rows and their records exist, as checked above.
        unsafe { gpu.launch(Kernel::RoundRows, grid, 0, from_ref(&params).cast()) }
    }

    /// Splits `x` `[n_rows, n_in]` into two f16 parts, for dense weights.
    ///
    /// # Panics
    /// When there is no room or `x` is shorter.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn split(&mut self, gpu: &G, x: &Buffer<G, f32>, n_rows: usize, n_in: usize) -> Result<(), GpuError> {
        expect_rows("x", x, n_rows, n_in);
        assert!(n_in > 0 && n_rows <= GRID_MAX[0], "rows [{n_rows}, {n_in}]");
        let needed = n_rows.div_ceil(TILE_ROWS) * n_in.div_ceil(32) * DENSE_ROWS;
        let fits = needed <= self.parts.len() && n_rows <= self.exponents.len();
        assert!(fits, "parts of [{n_rows}, {n_in}] need {needed} bytes of {}", self.parts.len());
        self.split = (n_rows, n_in);
        if n_rows == 0 {
            return Ok(());
        }
        let params = SplitParams {
            x: x.address(gpu),
            parts: self.parts.address(gpu),
            exponents: self.exponents.address(gpu),
            n_in: count(n_in, "inputs"),
            n_blocks: count(n_in.div_ceil(32), "blocks"),
        };
        // SAFETY: the parameters of this kernel; rows and their records exist, as checked above.
        unsafe { gpu.launch(Kernel::SplitRows, [n_rows, 1, 1], 16, from_ref(&params).cast()) }
    }
}

/// Products of `n_rows` rows, rounded or split before, with one to three matrices of the same inputs; each output
/// `[n_rows, n_out]`.
///
/// # Panics
/// When the activations are of other rows or not made for a matrix's form, or a buffer is too short.
///
/// # Errors
/// When the driver refuses.
pub fn products<G: Gpu>(
    gpu: &G,
    x: &Activations<G>,
    n_rows: usize,
    products: &mut [(&DeviceMatrix<G>, &mut Buffer<G, f32>)],
) -> Result<(), GpuError> {
    assert!(!products.is_empty() && products.len() <= PRODUCTS_MAX, "{} products in a launch", products.len());
    let mut descriptions = [ProductDesc::NONE; PRODUCTS_MAX];
    let mut n_panels = 0;
    for ((matrix, out), description) in products.iter_mut().zip(&mut descriptions) {
        let made = if matrix.form == Form::Dense { x.split } else { x.rounded };
        assert_eq!(made, (n_rows, matrix.n_in), "the activations are of other rows than the product's");
        expect_rows("out", out, n_rows, matrix.n_out);
        *description = matrix.describe(gpu, out.address(gpu), n_panels);
        n_panels += matrix.n_out.div_ceil(PANEL);
    }
    if n_rows == 0 {
        return Ok(());
    }
    assert!(n_panels <= GRID_MAX[1], "{n_panels} panels in a launch");
    let params = MatmulParams {
        codes: x.codes.address(gpu),
        parts: x.parts.address(gpu),
        exponents: x.exponents.address(gpu),
        products: descriptions,
        n_products: products.len() as u32,
        n_panels: n_panels as u32,
        n_rows: count(n_rows, "rows"),
        unused: 0,
    };
    let forms = || products.iter().map(|(matrix, _)| matrix.form);
    let tall = [n_rows.div_ceil(BLOCK_ROWS), n_panels.div_ceil(TALL_PANELS)];
    // Warps of a tall block share rows, so their panels must want the same of them.
    let alike = forms().all(|form| form == products[0].0.form);
    let wanted = n_rows.div_ceil(TILE_ROWS);
    let (kernel, tiles, is_tall): (_, usize, _) = match wanted {
        1 => (Kernel::Matmul1, 1, false),
        2 => (Kernel::Matmul2, 2, false),
        _ if alike && n_rows > BLOCK_ROWS && tall[0] * tall[1] >= gpu.blocks_to_fill() => (Kernel::MatmulTall, 8, true),
        // Eight tiles of dense rows are more shared memory than every device has.
        _ if wanted <= 4 || forms().any(|form| form == Form::Dense) => (Kernel::Matmul4, 4, false),
        _ => (Kernel::Matmul8, 8, false),
    };
    let stages = MATMUL_STAGES[tiles.ilog2() as usize];
    let largest = |of: fn(Form) -> usize| forms().map(of).max().unwrap_or(0);
    let (weights, rows) = (4 * stages * largest(Form::record_bytes), stages * tiles * largest(Form::rows_bytes));
    if is_tall {
        let grid = [tall[0], tall[1], 1];
        // SAFETY: the parameters of this kernel; rows, panels and outputs exist, as checked above.
        return unsafe { gpu.launch(kernel, grid, weights + rows, from_ref(&params).cast()) };
    }
    let grid = [n_rows.div_ceil(tiles * TILE_ROWS), n_panels, 1];
    // SAFETY: as above.
    unsafe { gpu.launch(kernel, grid, weights + 4 * rows, from_ref(&params).cast()) }
}

/// Rows `tokens` of `table` into `out` `[tokens, n_in]`.
///
/// # Panics
/// When `out` is too short. A token beyond the table is the caller's fault and must have been refused before.
///
/// # Errors
/// When the driver refuses.
pub fn embed<G: Gpu>(
    gpu: &G,
    table: &DeviceMatrix<G>,
    tokens: &TokenList<G>,
    out: &mut Buffer<G, f32>,
) -> Result<(), GpuError> {
    assert!(tokens.end <= table.n_out, "a token beyond the table's {}", table.n_out);
    let n_rows = tokens.tokens.len();
    expect_rows("out", out, n_rows, table.n_in);
    if n_rows == 0 {
        return Ok(());
    }
    let params = EmbedParams {
        table: table.describe(gpu, out.address(gpu), 0),
        tokens: tokens.tokens.address(gpu),
        n_in: count(table.n_in, "inputs"),
        unused: 0,
    };
    let grid = [n_rows, table.n_in.div_ceil(INPUTS_PER_BLOCK).min(GRID_MAX[1]), 1];
    // SAFETY: the parameters of this kernel; every token is a row of the table and `out` has a row for it.
    unsafe { gpu.launch(Kernel::EmbedRows, grid, 0, from_ref(&params).cast()) }
}

/// The tokens of a step.
#[derive(Debug)]
pub struct TokenList<G: Gpu> {
    tokens: Buffer<G, u32>,
    end: usize,
}

// === impl TokenList ===

impl<G: Gpu> TokenList<G> {
    /// Uploads them.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, tokens: &[u32]) -> Result<Self, GpuError> {
        let end = tokens.iter().max().map_or(0, |&last| last as usize + 1);
        Ok(Self { tokens: Buffer::upload(gpu, tokens)?, end })
    }
}
