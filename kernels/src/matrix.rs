//! Frozen weights `[n_out, n_in]`, repacked once at load into the layout the products read.
//!
//! Panels of 16 output columns, so that a vector lane is an output column. Quantised weights keep their codes, in as
//! many bits as in the file, in the order `vpdpbusd` wants: per column four consecutive inputs side by side; a weight is
//! `scale * (code - zero) + min` with scale and minimum per group of 32 or 16 inputs, kept as the file has them: f16
//! per 32 inputs, or f16 per 256 times a small integer per group. Dense weights keep their dtype, one input after the
//! other. Made by the model's loaders, read by `matmul` and for embedding lookups.

mod blocks;
mod packed;

use half::{bf16, f16};

pub use self::blocks::BlockType;
pub(crate) use self::blocks::{CodeForm, NEST};
pub use self::packed::PACKED_LAYOUT;

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
    /// No packed matrix stands in the file at this place.
    #[error("there is no packed matrix at byte {at} of the file")]
    Packed {
        /// Place in the file.
        at: usize,
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
/// codes of 8 bits: `[panel][n_in / 4][16 columns][4 inputs]`; shorter ones: per 32 inputs four lines of 64 bytes, line
/// `i` with the quad of inputs `i` in the low and `i + 4` in the high nibbles. What goes beyond 4 bits stands in `high`:
/// of 5 bits one line per 32 inputs, bit `q` of a byte for quad `q`; of 6 bits two lines, for quads 0 to 3 and 4 to 7,
/// two bits each. Scales and minima: f16 `[panel][n_groups][16]`; nested: f16 `[panel][n_in / 256][16]` and i8
/// `[panel][n_groups][16]` in `sub_scales` and `sub_mins`.
#[derive(Debug)]
pub(crate) struct Coded {
    pub(crate) form: CodeForm,
    pub(crate) codes: Aligned,
    pub(crate) high: Aligned,
    pub(crate) scales: Aligned,
    pub(crate) mins: Aligned,
    pub(crate) sub_scales: Aligned,
    pub(crate) sub_mins: Aligned,
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
            Storage::Coded(coded) => coded.bytes(),
        }
    }

    /// Row `i`, dequantised, into `out` `[n_in]`.
    ///
    /// # Panics
    /// When `i` is no row or `out` has another length.
    pub fn row(&self, i: usize, out: &mut [f32]) {
        assert!(i < self.n_out, "row {i} of {}", self.n_out);
        assert_eq!(out.len(), self.n_in, "a row has {} values", self.n_in);
        let (panel, lane) = (i / PANEL, i % PANEL);
        if let Storage::Coded(coded) = &self.storage {
            return coded.row(panel, lane, out);
        }
        for (k, value) in out.iter_mut().enumerate() {
            *value = self.value(panel, lane, k);
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
        let [codes, high, scales, mins, sub_scales, sub_mins] =
            Self::sizes(form, n_panels, n_in).map(Aligned::zeros::<u8>);
        Self { form, codes, high, scales, mins, sub_scales, sub_mins }
    }

    /// Bytes of the six buffers, in the order of the fields.
    fn sizes(form: CodeForm, n_panels: usize, n_in: usize) -> [usize; 6] {
        let n = n_panels * PANEL * n_in;
        let n_scales = n / if form.nested { NEST } else { form.group };
        let n_subs = if form.nested { n / form.group } else { 0 };
        let of_mins = |n| if form.has_min { n } else { 0 };
        [
            if form.bits == 8 { n } else { n / 2 },
            if form.bits == 8 { 0 } else { n / 8 * (form.bits as usize - 4) },
            2 * n_scales,
            2 * of_mins(n_scales),
            n_subs,
            of_mins(n_subs),
        ]
    }

    /// The buffers, in the order of [`Coded::sizes`].
    pub(crate) fn buffers(&self) -> [&Aligned; 6] {
        let Self { form: _, codes, high, scales, mins, sub_scales, sub_mins } = self;
        [codes, high, scales, mins, sub_scales, sub_mins]
    }

    fn bytes(&self) -> usize {
        self.buffers().into_iter().map(Aligned::bytes).sum()
    }

    /// Byte of the code, or of its low four bits, and how far to the left these are.
    fn code_at(&self, panel: usize, lane: usize, k: usize, n_in: usize) -> (usize, u32) {
        if self.form.bits == 8 {
            return ((panel * n_in + k / 4 * 4) * PANEL + lane * 4 + k % 4, 0);
        }
        let (quad, base) = (k % 32 / 4, (panel * n_in + k / 32 * 32) * PANEL / 2);
        (base + quad % 4 * 64 + lane * 4 + k % 4, if quad >= 4 { 4 } else { 0 })
    }

    /// Byte of the code's bits beyond four, and how far to the left these are; only for 5 and 6 bits.
    fn high_at(&self, panel: usize, lane: usize, k: usize, n_in: usize) -> (usize, u32) {
        let (quad, block, byte) = (k % 32 / 4, (panel * n_in + k) / 32, lane * 4 + k % 4);
        match self.form.bits {
            5 => (block * 64 + byte, quad as u32),
            _ => (block * 128 + quad / 4 * 64 + byte, 2 * (quad % 4) as u32),
        }
    }

    pub(crate) fn code(&self, panel: usize, lane: usize, k: usize, n_in: usize) -> u8 {
        let (at, shift) = self.code_at(panel, lane, k, n_in);
        let low = self.codes.view::<u8>()[at] >> shift;
        match self.form.bits {
            8 => low,
            4 => low & 15,
            bits => {
                let (at, shift) = self.high_at(panel, lane, k, n_in);
                let high = (self.high.view::<u8>()[at] >> shift) & ((1 << (bits - 4)) - 1);
                low & 15 | high << 4
            }
        }
    }

    /// The zero point.
    pub(crate) fn zero(&self) -> i32 {
        if self.form.has_min { 0 } else { 1 << self.form.zero_shift }
    }

    /// Scale or minimum of a group; exact in f32 (11 bits of f16 times 8).
    fn factor(&self, of: &Aligned, subs: &Aligned, panel: usize, lane: usize, group: usize, n_in: usize) -> f32 {
        let form = self.form;
        let half = |index: usize| f16::from_bits(of.view::<u16>()[index * PANEL + lane]).to_f32();
        let at = panel * (n_in / form.group) + group;
        if form.nested {
            let sub = subs.view::<u8>()[at * PANEL + lane] as i8;
            half(panel * (n_in / NEST) + group * form.group / NEST) * f32::from(sub)
        } else {
            half(at)
        }
    }

    pub(crate) fn scale(&self, panel: usize, lane: usize, group: usize, n_in: usize) -> f32 {
        self.factor(&self.scales, &self.sub_scales, panel, lane, group, n_in)
    }

    /// The minimum of a group; only for forms that have one.
    pub(crate) fn min(&self, panel: usize, lane: usize, group: usize, n_in: usize) -> f32 {
        self.factor(&self.mins, &self.sub_mins, panel, lane, group, n_in)
    }

    fn value(&self, panel: usize, lane: usize, k: usize, n_in: usize) -> f32 {
        let factors = self.factors(panel, lane, k / self.form.group, n_in);
        self.dequantised(self.code(panel, lane, k, n_in), factors)
    }

    /// A whole row; its factors are looked up once per group.
    fn row(&self, panel: usize, lane: usize, out: &mut [f32]) {
        let (n_in, len) = (out.len(), self.form.group);
        for (group, values) in out.chunks_exact_mut(len).enumerate() {
            let factors = self.factors(panel, lane, group, n_in);
            for (k, value) in values.iter_mut().enumerate() {
                *value = self.dequantised(self.code(panel, lane, group * len + k, n_in), factors);
            }
        }
    }

    /// Scale and, where the form has one, minimum of a group.
    fn factors(&self, panel: usize, lane: usize, group: usize, n_in: usize) -> (f32, Option<f32>) {
        let min = self.form.has_min.then(|| self.min(panel, lane, group, n_in));
        (self.scale(panel, lane, group, n_in), min)
    }

    fn dequantised(&self, code: u8, (scale, min): (f32, Option<f32>)) -> f32 {
        let code = (i32::from(code) - self.zero()) as f32;
        // The product is exact (at most 23 significant bits), so the sum rounds once, fused or not.
        min.map_or(scale * code, |min| scale * code + min)
    }

    /// Writes one block of a row; false when its scale or minimum is not finite.
    fn put(&mut self, row: usize, n_in: usize, start: usize, len: usize, block: &Block) -> bool {
        let (panel, lane) = (row / PANEL, row % PANEL);
        let form = self.form;
        for quad in 0..len / 4 {
            let codes = &block.codes[quad * 4..][..4];
            let (at, shift) = self.code_at(panel, lane, start + quad * 4, n_in);
            for (byte, &code) in self.codes.view_mut::<u8>()[at..at + 4].iter_mut().zip(codes) {
                *byte |= if form.bits == 8 { code } else { (code & 15) << shift };
            }
            if form.bits == 5 || form.bits == 6 {
                let (at, shift) = self.high_at(panel, lane, start + quad * 4, n_in);
                for (byte, &code) in self.high.view_mut::<u8>()[at..at + 4].iter_mut().zip(codes) {
                    *byte |= (code >> 4) << shift;
                }
            }
        }
        let block_at = (panel * (n_in / len) + start / len) * PANEL + lane;
        self.scales.view_mut::<u16>()[block_at] = block.scale;
        if form.has_min {
            self.mins.view_mut::<u16>()[block_at] = block.min;
        }
        for group in 0..if form.nested { len / form.group } else { 0 } {
            let at = (panel * (n_in / form.group) + start / form.group + group) * PANEL + lane;
            self.sub_scales.view_mut::<u8>()[at] = block.scales[group] as u8;
            if form.has_min {
                self.sub_mins.view_mut::<u8>()[at] = block.mins[group] as u8;
            }
        }
        block.is_finite()
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
