//! Frozen weights `[n_out, n_in]`, repacked once at load into the layout the products read.
//!
//! Panels of 16 output columns, so that a vector lane is an output column. Quantised weights keep their codes (4-bit
//! ones in 4 bits) in the order `vpdpbusd` wants: per column four consecutive inputs side by side; a weight is
//! `scale * (code - zero) + min` with scale and minimum per group of 32 or 16 inputs. Dense weights keep
//! their dtype, one input after the other. Made by the model's loaders, read by `matmul` and for embedding lookups.

mod blocks;

use half::{bf16, f16};

pub use self::blocks::BlockType;
pub(crate) use self::blocks::CodeForm;

use self::blocks::Block;
use crate::aligned::Aligned;

/// Output columns per panel: the lanes of a 512-bit vector of f32.
pub(crate) const PANEL: usize = 16;

/// Why a matrix was refused; what the file says does not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MatrixError {
    /// The data has another size than the shape says: the file is damaged or the shape wrong.
    #[error("a [{n_out}, {n_in}] matrix of {kind} takes {expected} {unit}, got {got}")]
    Length {
        /// Rows.
        n_out: usize,
        /// Columns.
        n_in: usize,
        /// Element or block type.
        kind: &'static str,
        /// Wanted.
        expected: usize,
        /// Of what.
        unit: &'static str,
        /// Found.
        got: usize,
    },
    /// Rows of this format are whole blocks.
    #[error("rows of {n_in} weights are no whole blocks of {block_len}")]
    PartialBlock {
        /// Columns.
        n_in: usize,
        /// Weights per block.
        block_len: usize,
    },
    /// The shape is empty or its size overflows.
    #[error("a matrix cannot have the shape [{n_out}, {n_in}]")]
    Shape {
        /// Rows.
        n_out: usize,
        /// Columns.
        n_in: usize,
    },
    /// The order of rows does not name one existing row per output row.
    #[error("the row order has {len} entries for {n_out} rows, or an entry outside of them")]
    RowOrder {
        /// Entries.
        len: usize,
        /// Rows.
        n_out: usize,
    },
    /// A quantisation scale is infinite or not a number: the file is damaged.
    #[error("row {row} has a block whose scale is not finite")]
    NotFinite {
        /// Row in the file.
        row: usize,
    },
}

/// Packed weights `[n_out, n_in]`; immutable, shared by all threads.
#[derive(Debug)]
pub struct Matrix {
    n_out: usize,
    n_in: usize,
    pub(crate) storage: Storage,
}

/// The three dense dtypes, and codes.
#[derive(Debug)]
pub(crate) enum Storage {
    /// `[panel][n_in][16]` f32.
    F32(Aligned),
    /// The same in f16 bits.
    F16(Aligned),
    /// The same in bf16 bits.
    BF16(Aligned),
    /// Quantised.
    Coded(Coded),
}

/// Quantised panels. With `n_groups = n_in / group`:
/// codes, 8 bit: `[panel][n_in / 4][16 columns][4 inputs]`; 4 bit: per 32 inputs four lines of 64 bytes, line `i` with
/// the quad of inputs `i` in the low and `i + 4` in the high nibbles; scales, mins: `[panel][n_groups][16]`.
#[derive(Debug)]
pub(crate) struct Coded {
    pub(crate) form: CodeForm,
    pub(crate) codes: Aligned,
    pub(crate) scales: Aligned,
    pub(crate) mins: Aligned,
}

// === impl Matrix ===

impl Matrix {
    /// Packs row-major `[n_out, n_in]` f32. `rows[i]`, if given, is the source row of output row `i`.
    ///
    /// # Errors
    /// When lengths or the row order do not fit the shape.
    pub fn from_f32(n_out: usize, n_in: usize, data: &[f32], rows: Option<&[u32]>) -> Result<Self, MatrixError> {
        let panels = pack_dense(n_out, n_in, "f32", data, rows, |value| value)?;
        Ok(Self { n_out, n_in, storage: Storage::F32(panels) })
    }

    /// Packs row-major `[n_out, n_in]` f16; kept in f16.
    ///
    /// # Errors
    /// As [`Matrix::from_f32`].
    pub fn from_f16(n_out: usize, n_in: usize, data: &[f16], rows: Option<&[u32]>) -> Result<Self, MatrixError> {
        let panels = pack_dense(n_out, n_in, "f16", data, rows, f16::to_bits)?;
        Ok(Self { n_out, n_in, storage: Storage::F16(panels) })
    }

    /// Packs row-major `[n_out, n_in]` bf16; kept in bf16.
    ///
    /// # Errors
    /// As [`Matrix::from_f32`].
    pub fn from_bf16(n_out: usize, n_in: usize, data: &[bf16], rows: Option<&[u32]>) -> Result<Self, MatrixError> {
        let panels = pack_dense(n_out, n_in, "bf16", data, rows, bf16::to_bits)?;
        Ok(Self { n_out, n_in, storage: Storage::BF16(panels) })
    }

    /// Packs the blocks of a GGUF tensor, rows one after the other. The values stay exactly those of the file.
    ///
    /// # Errors
    /// When lengths or the row order do not fit the shape, or a scale is not finite.
    pub fn from_blocks(
        n_out: usize,
        n_in: usize,
        kind: BlockType,
        data: &[u8],
        rows: Option<&[u32]>,
    ) -> Result<Self, MatrixError> {
        check_shape(n_out, n_in, rows)?;
        let block_len = kind.block_len();
        if !n_in.is_multiple_of(block_len) {
            return Err(MatrixError::PartialBlock { n_in, block_len });
        }
        let row_bytes = n_in / block_len * kind.block_bytes();
        let expected = n_out.checked_mul(row_bytes).ok_or(MatrixError::Shape { n_out, n_in })?;
        if data.len() != expected {
            let got = data.len();
            return Err(MatrixError::Length { n_out, n_in, kind: "blocks", expected, unit: "bytes", got });
        }
        let mut coded = Coded::zeros(kind.form(), n_out.div_ceil(PANEL), n_in);
        let mut block = Block::empty();
        for row in 0..n_out {
            let source = rows.map_or(row, |rows| rows[row] as usize);
            let bytes = &data[source * row_bytes..][..row_bytes];
            for (index, bytes) in bytes.chunks_exact(kind.block_bytes()).enumerate() {
                block.read(kind, bytes);
                if !coded.put(row, n_in, index * block_len, block_len, &block) {
                    return Err(MatrixError::NotFinite { row: source });
                }
            }
        }
        Ok(Self { n_out, n_in, storage: Storage::Coded(coded) })
    }

    /// Rows: the width of a product's output.
    pub fn n_out(&self) -> usize {
        self.n_out
    }

    /// Columns: the width of a product's input.
    pub fn n_in(&self) -> usize {
        self.n_in
    }

    /// Panels of 16 output columns, the last one padded with zeros.
    pub(crate) fn n_panels(&self) -> usize {
        self.n_out.div_ceil(PANEL)
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        match &self.storage {
            Storage::F32(panels) | Storage::F16(panels) | Storage::BF16(panels) => panels.bytes(),
            Storage::Coded(coded) => coded.codes.bytes() + coded.scales.bytes() + coded.mins.bytes(),
        }
    }

    /// Row `i`, dequantised, into `out` `[n_in]`.
    ///
    /// # Panics
    /// When `i` is no row or `out` has another length.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n_out, "row {i} of {}", self.n_out);
        assert_eq!(out.len(), self.n_in, "a row has {} values", self.n_in);
        for (k, value) in out.iter_mut().enumerate() {
            *value = self.value(i / PANEL, i % PANEL, k);
        }
    }

    /// One weight: column `lane` of a panel, input `k`.
    pub(crate) fn value(&self, panel: usize, lane: usize, k: usize) -> f32 {
        let at = (panel * self.n_in + k) * PANEL + lane;
        match &self.storage {
            Storage::F32(panels) => panels.view::<f32>()[at],
            Storage::F16(panels) => f16::from_bits(panels.view::<u16>()[at]).to_f32(),
            Storage::BF16(panels) => bf16::from_bits(panels.view::<u16>()[at]).to_f32(),
            Storage::Coded(coded) => coded.value(panel, lane, k, self.n_in),
        }
    }
}

// === impl Coded ===

impl Coded {
    fn zeros(form: CodeForm, n_panels: usize, n_in: usize) -> Self {
        let n_codes = n_panels * PANEL * n_in;
        let n_scales = n_codes / form.group;
        let of_scales = |n| if form.wide { Aligned::zeros::<f32>(n) } else { Aligned::zeros::<u16>(n) };
        Self {
            form,
            codes: Aligned::zeros::<u8>(if form.four_bit { n_codes / 2 } else { n_codes }),
            scales: of_scales(n_scales),
            mins: of_scales(if form.has_min { n_scales } else { 0 }),
        }
    }

    /// Byte of the code and whether it is in the high nibble.
    fn code_at(&self, panel: usize, lane: usize, k: usize, n_in: usize) -> (usize, bool) {
        if self.form.four_bit {
            let (quad, base) = (k % 32 / 4, (panel * n_in + k / 32 * 32) * PANEL / 2);
            (base + quad % 4 * 64 + lane * 4 + k % 4, quad >= 4)
        } else {
            ((panel * n_in + k / 4 * 4) * PANEL + lane * 4 + k % 4, false)
        }
    }

    pub(crate) fn code(&self, panel: usize, lane: usize, k: usize, n_in: usize) -> u8 {
        let (at, high) = self.code_at(panel, lane, k, n_in);
        let byte = self.codes.view::<u8>()[at];
        match (self.form.four_bit, high) {
            (true, true) => byte >> 4,
            (true, false) => byte & 15,
            (false, _) => byte,
        }
    }

    /// The zero point.
    pub(crate) fn zero(&self) -> i32 {
        if self.form.has_min { 0 } else { 1 << self.form.zero_shift }
    }

    fn factor(&self, of: &Aligned, at: usize) -> f32 {
        if self.form.wide { of.view::<f32>()[at] } else { f16::from_bits(of.view::<u16>()[at]).to_f32() }
    }

    pub(crate) fn scale(&self, panel: usize, lane: usize, group: usize, n_in: usize) -> f32 {
        self.factor(&self.scales, (panel * (n_in / self.form.group) + group) * PANEL + lane)
    }

    /// The minimum of a group; only for forms that have one.
    pub(crate) fn min(&self, panel: usize, lane: usize, group: usize, n_in: usize) -> f32 {
        self.factor(&self.mins, (panel * (n_in / self.form.group) + group) * PANEL + lane)
    }

    fn value(&self, panel: usize, lane: usize, k: usize, n_in: usize) -> f32 {
        let code = (i32::from(self.code(panel, lane, k, n_in)) - self.zero()) as f32;
        let scale = self.scale(panel, lane, k / self.form.group, n_in);
        // The product is exact (at most 23 significant bits), so the sum rounds once, fused or not.
        if self.form.has_min { scale * code + self.min(panel, lane, k / self.form.group, n_in) } else { scale * code }
    }

    /// Writes one block of a row; false when a scale or minimum is not finite.
    fn put(&mut self, row: usize, n_in: usize, start: usize, len: usize, block: &Block) -> bool {
        let (panel, lane) = (row / PANEL, row % PANEL);
        for quad in 0..len / 4 {
            let (at, high) = self.code_at(panel, lane, start + quad * 4, n_in);
            let bytes = &mut self.codes.view_mut::<u8>()[at..at + 4];
            for (byte, &code) in bytes.iter_mut().zip(&block.codes[quad * 4..]) {
                *byte |= if high { code << 4 } else { code };
            }
        }
        let form = self.form;
        for group in 0..len / form.group {
            let at = (panel * (n_in / form.group) + start / form.group + group) * PANEL + lane;
            put_factor(&mut self.scales, form.wide, at, block.scales[group]);
            if form.has_min {
                put_factor(&mut self.mins, form.wide, at, block.mins[group]);
            }
        }
        let n_groups = len / form.group;
        block.scales[..n_groups].iter().chain(&block.mins[..n_groups]).all(|factor| factor.is_finite())
    }
}

fn put_factor(of: &mut Aligned, wide: bool, at: usize, value: f32) {
    if wide {
        of.view_mut::<f32>()[at] = value;
    } else {
        // Exact: the value came from f16.
        of.view_mut::<u16>()[at] = f16::from_f32(value).to_bits();
    }
}

fn check_shape(n_out: usize, n_in: usize, rows: Option<&[u32]>) -> Result<(), MatrixError> {
    // Sixteen times room for the padding of the last panel and four bytes a value.
    let padded = n_out.checked_next_multiple_of(PANEL).and_then(|n| n.checked_mul(n_in)).and_then(|n| n.checked_mul(4));
    if n_out == 0 || n_in == 0 || padded.is_none() {
        return Err(MatrixError::Shape { n_out, n_in });
    }
    match rows {
        Some(rows) if rows.len() != n_out || rows.iter().any(|&row| row as usize >= n_out) => {
            Err(MatrixError::RowOrder { len: rows.len(), n_out })
        }
        _ => Ok(()),
    }
}

fn pack_dense<T: Copy, U: crate::aligned::Plain>(
    n_out: usize,
    n_in: usize,
    kind: &'static str,
    data: &[T],
    rows: Option<&[u32]>,
    convert: impl Fn(T) -> U,
) -> Result<Aligned, MatrixError> {
    check_shape(n_out, n_in, rows)?;
    if data.len() != n_out * n_in {
        let (expected, got) = (n_out * n_in, data.len());
        return Err(MatrixError::Length { n_out, n_in, kind, expected, unit: "values", got });
    }
    let mut panels = Aligned::zeros::<U>(n_out.div_ceil(PANEL) * PANEL * n_in);
    let packed = panels.view_mut::<U>();
    for row in 0..n_out {
        let source = rows.map_or(row, |rows| rows[row] as usize);
        let base = row / PANEL * PANEL * n_in + row % PANEL;
        for (k, &value) in data[source * n_in..][..n_in].iter().enumerate() {
            packed[base + k * PANEL] = convert(value);
        }
    }
    Ok(panels)
}

#[cfg(test)]
mod tests;
