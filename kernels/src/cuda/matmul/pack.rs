//! From the CPU's panels to the records that `kernels/cuda/matmul.cu` describes. Called when a model is loaded onto a
//! device; decides which form a matrix gets. Values stay exactly those of the file, in another order: f32 ones keep 22
//! bits, formats of 5 and 6 bits take 8.

use half::{bf16, f16};

use crate::cuda::halves;
use crate::cuda::params::{CODED_ROWS, DENSE_ROWS};
use crate::matrix::{CodeForm, Coded, Matrix, NEST, PANEL, Storage};

/// How weights are kept on the device. With inputs in blocks of 64 (dense: 32), padded with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Form {
    /// Signed 4-bit codes, an f16 scale per 32 (Q4_0): 4.5 bits a weight.
    Z4 = 0,
    /// 4-bit codes, an f16 scale and minimum per 32 (Q4_1): 5 bits.
    P4 = 1,
    /// 4-bit codes, a factor of an f16 scale and one of a minimum per 32 (Q4_K): 5 bits.
    N4 = 2,
    /// Signed 8-bit codes, an f16 scale per 32 (Q8_0, Q5_0): 8.5 bits.
    Z8 = 3,
    /// 8-bit codes, a factor of a scale and one of a minimum per 16 (Q6_K, Q5_K, Q5_1, Q2_K, Q3_K): 10 bits.
    N8 = 4,
    /// f16, scaled by a power of two; one or two planes: 16 or 32 bits.
    Dense = 5,
}

// === impl Form ===

impl Form {
    /// Bytes of a record, of each plane if dense.
    pub(super) fn record_bytes(self) -> usize {
        match self {
            Self::Z4 => 576,
            Self::P4 | Self::N4 => 640,
            Self::Z8 => 1088,
            Self::N8 => 1280,
            Self::Dense => 1024,
        }
    }

    /// Bytes of a record of rows for a product with such weights.
    pub(super) fn rows_bytes(self) -> usize {
        if self == Self::Dense { DENSE_ROWS } else { CODED_ROWS }
    }

    /// Records of a panel.
    pub(super) fn n_blocks(self, n_in: usize) -> usize {
        n_in.div_ceil(if self == Self::Dense { 32 } else { 64 })
    }

    fn of(form: CodeForm) -> Self {
        let CodeForm { bits, group, nested, has_min, .. } = form;
        match (bits, group, nested, has_min) {
            (4, 32, false, false) => Self::Z4,
            (4, 32, false, true) => Self::P4,
            (4, 32, true, true) => Self::N4,
            (5 | 8, 32, false, false) => Self::Z8,
            _ => Self::N8,
        }
    }
}

/// A matrix as bytes for the device.
pub(super) struct Packed {
    pub(super) form: Form,
    pub(super) planes: usize,
    pub(super) inverse: f32,
    pub(super) bytes: Vec<u8>,
}

pub(super) fn pack(matrix: &Matrix) -> Packed {
    match &matrix.storage {
        Storage::F32(panels) => dense(matrix, panels.view::<f32>().iter().copied(), 2),
        Storage::F16(panels) => {
            dense(matrix, panels.view::<u16>().iter().map(|&bits| f16::from_bits(bits).to_f32()), 1)
        }
        Storage::BF16(panels) => {
            dense(matrix, panels.view::<u16>().iter().map(|&bits| bf16::from_bits(bits).to_f32()), 1)
        }
        Storage::Coded(coded) => {
            let form = Form::of(coded.form);
            let n_blocks = form.n_blocks(matrix.n_in());
            let mut bytes = vec![0; matrix.n_panels() * n_blocks * form.record_bytes()];
            for (index, record) in bytes.chunks_exact_mut(form.record_bytes()).enumerate() {
                let place = Place { coded, n_in: matrix.n_in(), panel: index / n_blocks, first: index % n_blocks * 64 };
                place.write(form, record);
            }
            Packed { form, planes: 1, inverse: 1.0, bytes }
        }
    }
}

/// Sixteen outputs and 64 inputs of a coded matrix, of which the last 32 may be missing.
struct Place<'a> {
    coded: &'a Coded,
    n_in: usize,
    panel: usize,
    first: usize,
}

// === impl Place ===

impl Place<'_> {
    fn write(&self, form: Form, record: &mut [u8]) {
        let (codes, factors) = record.split_at_mut(if matches!(form, Form::Z8 | Form::N8) { 1024 } else { 512 });
        for side in 0..2usize {
            let first = self.first + side * 32;
            if first >= self.n_in {
                continue;
            }
            match form {
                Form::Z4 => self.write_nibbles(side, first, 0x8888_8888, codes),
                Form::P4 | Form::N4 => self.write_nibbles(side, first, 0, codes),
                _ => self.write_bytes(side, first, codes),
            }
            for lane in 0..PANEL {
                self.write_factors(form, lane, side, first, factors);
            }
        }
    }

    /// The CPU's words of eight codes are those of the device: inputs 4q to 4q + 3 low, 16 + those high.
    fn write_nibbles(&self, side: usize, first: usize, turned: u32, to: &mut [u8]) {
        let words = self.coded.codes.view::<u8>();
        let from = &words[(self.panel * self.n_in + first) * PANEL / 2..][..256];
        for quad in 0..4 {
            for lane in 0..PANEL {
                let bytes = from[quad * 64 + lane * 4..][..4].try_into().expect("four bytes");
                let word = u32::from_le_bytes(bytes) ^ turned;
                let at = (lane % 8 * 4 + quad) * 16 + (side * 2 + lane / 8) * 4;
                to[at..at + 4].copy_from_slice(&word.to_le_bytes());
            }
        }
    }

    fn write_bytes(&self, side: usize, first: usize, to: &mut [u8]) {
        let zero = self.coded.zero();
        for lane in 0..PANEL {
            for k in 0..32 {
                let code = i32::from(self.coded.code(self.panel, lane, first + k, self.n_in)) - zero;
                let at = side * 512 + (lane % 8 * 4 + k % 16 / 4) * 16 + (k / 16 * 2 + lane / 8) * 4 + k % 4;
                to[at] = code as i8 as u8;
            }
        }
    }

    fn write_factors(&self, form: Form, lane: usize, side: usize, first: usize, to: &mut [u8]) {
        let CodeForm { group, nested, has_min, .. } = self.coded.form;
        let per_half = if nested { NEST } else { group };
        let at = (self.panel * (self.n_in / per_half) + first / per_half) * PANEL + lane;
        let scale = self.coded.scales.view::<u16>()[at];
        let min = if has_min { self.coded.mins.view::<u16>()[at] } else { 0 };
        // Factors of a nested form; 1 where a scale stands for itself.
        let subs = |of: &crate::aligned::Aligned, k: usize| match nested {
            true => of.view::<u8>()[(self.panel * (self.n_in / group) + (first + k) / group) * PANEL + lane],
            false => 1,
        };
        let sub_min = |k: usize| if has_min { subs(&self.coded.sub_mins, k) } else { 0 };
        let (row, output) = (lane % 8, lane / 8);
        let mut put = |at: usize, half: u16| to[at..at + 2].copy_from_slice(&half.to_le_bytes());
        match form {
            Form::Z4 | Form::Z8 => put(row * 8 + output * 4 + side * 2, scale),
            Form::P4 => {
                put(row * 16 + output * 8 + side * 4, scale);
                put(row * 16 + output * 8 + side * 4 + 2, min);
            }
            Form::N4 => {
                let base = row * 16 + output * 8;
                put(base, scale);
                put(base + 2, min);
                to[base + 4 + side * 2] = subs(&self.coded.sub_scales, 0);
                to[base + 5 + side * 2] = sub_min(0);
            }
            Form::N8 => {
                let base = row * 32 + output * 16;
                let pair = if side == 0 { base } else { base + 12 };
                put(pair, scale);
                put(pair + 2, min);
                for half in 0..2 {
                    to[base + 4 + side * 2 + half] = subs(&self.coded.sub_scales, half * 16);
                    to[base + 8 + side * 2 + half] = sub_min(half * 16);
                }
            }
            Form::Dense => unreachable!("dense weights have no factors"),
        }
    }
}

/// Dense panels `[panel][n_in][16]` as planes of f16.
fn dense(matrix: &Matrix, values: impl Iterator<Item = f32> + Clone, planes: usize) -> Packed {
    let (n_in, n_blocks) = (matrix.n_in(), Form::Dense.n_blocks(matrix.n_in()));
    let max = values.clone().fold(0.0f32, |max, value| max.max(value.abs()));
    let (scale, inverse) = halves::scale_of(max);
    let mut bytes = vec![0; matrix.n_panels() * n_blocks * planes * 1024];
    for (index, value) in values.enumerate() {
        let (lane, k, panel) = (index % PANEL, index / PANEL % n_in, index / PANEL / n_in);
        let record = (panel * n_blocks + k / 32) * planes * 1024;
        let at = record + lane / 8 * 512 + (lane % 8 * 4 + k % 32 / 8) * 16 + k % 8 * 2;
        let (high, low) = halves::parts(value, scale);
        bytes[at..at + 2].copy_from_slice(&high.to_le_bytes());
        if planes == 2 {
            bytes[at + 1024..at + 1026].copy_from_slice(&low.to_le_bytes());
        }
    }
    Packed { form: Form::Dense, planes, inverse, bytes }
}

/// Undoes the scaling of [`random_panel`]'s dense weights.
pub(super) const RANDOM_INVERSE: f32 = 1.0;

/// A panel of random codes with scales such that weights lie around ± 1 / √n_in.
pub(super) fn random_panel(n_in: usize, form: Form, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bits = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let mut bytes = vec![0u8; form.n_blocks(n_in) * form.record_bytes()];
    let size = 1.0 / (n_in as f32).sqrt();
    let half = |value: f32| f16::from_f32(value).to_le_bytes();
    for record in bytes.chunks_exact_mut(form.record_bytes()) {
        if form == Form::Dense {
            for value in record.chunks_exact_mut(2) {
                value.copy_from_slice(&half((bits() as f32 / (1u64 << 30) as f32 - 1.0) * size * 1.7));
            }
            continue;
        }
        let (codes, factors) = record.split_at_mut(if matches!(form, Form::Z8 | Form::N8) { 1024 } else { 512 });
        codes.iter_mut().for_each(|code| *code = bits() as u8);
        match form {
            Form::Z4 => factors.chunks_exact_mut(2).for_each(|f| f.copy_from_slice(&half(size / 4.6))),
            Form::Z8 => factors.chunks_exact_mut(2).for_each(|f| f.copy_from_slice(&half(size / 74.0))),
            Form::P4 => factors.chunks_exact_mut(4).for_each(|f| {
                f[..2].copy_from_slice(&half(size / 4.6));
                f[2..].copy_from_slice(&half(size / 4.6 * -7.5));
            }),
            Form::N4 => factors.chunks_exact_mut(8).for_each(|f| {
                f[..2].copy_from_slice(&half(size / 4.6 / 32.0));
                f[2..4].copy_from_slice(&half(size / 4.6 / 32.0 * -7.5));
                f[4..].fill(32);
            }),
            _ => factors.chunks_exact_mut(16).for_each(|f| {
                f[..2].copy_from_slice(&half(size / 74.0 / 32.0));
                f[4..8].fill(32);
                f[12..14].copy_from_slice(&half(size / 74.0 / 32.0));
            }),
        }
    }
    bytes
}
