//! A checked view of one tensor inside an adapter file: dtype, shape, bytes that fit both.
//!
//! Made by the pre-parsers; read when packing. It owns nothing.

use half::{bf16, f16};
use kernels::lora::LoraDtype;

use super::AdapterError;

/// Largest magnitude a weight may have. Trained adapters stay below 100; the cap keeps every value inside
/// f16 and every product of a rank-256 adapter inside f32.
pub(super) const VALUE_ABS_MAX: f32 = 1e4;

/// Element types that can be served as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dtype {
    F32,
    F16,
    Bf16,
}

impl Dtype {
    /// Bytes per element.
    pub(super) fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// The same type in the kernels' words.
    pub(super) fn lora(self) -> LoraDtype {
        match self {
            Self::F32 => LoraDtype::F32,
            Self::F16 => LoraDtype::F16,
            Self::Bf16 => LoraDtype::BF16,
        }
    }
}

/// A matrix `[rows, cols]`, row-major, or a vector `[rows]` (`cols` is 1 and `rank_one` set).
#[derive(Debug, Clone, Copy)]
pub(super) struct TensorView<'a> {
    pub(super) dtype: Dtype,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) rank_one: bool,
    /// Little-endian elements; `rows * cols * dtype.size()` bytes.
    pub(super) bytes: &'a [u8],
}

// === impl TensorView ===

impl TensorView<'_> {
    /// The shape as messages show it.
    pub(super) fn shape(&self) -> String {
        if self.rank_one { format!("[{}]", self.rows) } else { format!("[{}, {}]", self.rows, self.cols) }
    }

    /// Refuses values that are not finite or out of range.
    pub(super) fn check_values(&self, name: &str) -> Result<(), AdapterError> {
        // Magnitudes of floats are ordered as their bits are, with infinities and NaN above all numbers. Without an
        // early exit this is a few instructions per vector.
        let all_fit = match self.dtype {
            Dtype::F32 => {
                let fits = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes) & 0x7fff_ffff <= VALUE_ABS_MAX.to_bits();
                self.bytes.as_chunks().0.iter().fold(true, |all, bytes| all & fits(bytes))
            }
            Dtype::F16 => self.all_below(f16::from_f32(VALUE_ABS_MAX).to_bits()),
            Dtype::Bf16 => self.all_below(bf16::from_f32(VALUE_ABS_MAX).to_bits()),
        };
        if all_fit {
            return Ok(());
        }
        let is_bad = |value: &f32| value.is_nan() || value.abs() > VALUE_ABS_MAX;
        let values = self.to_f32();
        let (at, value) = values.iter().enumerate().find(|(_, value)| is_bad(value)).unwrap_or((0, &f32::NAN));
        Err(AdapterError::invalid(format!(
            "tensor {name} holds {value} at element {at}; weights must be finite and at most {VALUE_ABS_MAX} in magnitude"
        )))
    }

    /// Whether the magnitude bits of all 16-bit elements are at most `bits_max`.
    fn all_below(&self, bits_max: u16) -> bool {
        let fits = |bytes: &[u8; 2]| u16::from_le_bytes(*bytes) & 0x7fff <= bits_max;
        self.bytes.as_chunks().0.iter().fold(true, |all, bytes| all & fits(bytes))
    }

    /// All elements as f32, which is exact for every dtype here.
    pub(super) fn to_f32(self) -> Vec<f32> {
        match self.dtype {
            Dtype::F32 => self.bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::F16 => self.bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
            Dtype::Bf16 => self.bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        }
    }
}
