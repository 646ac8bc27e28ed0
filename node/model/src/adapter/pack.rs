//! From checked views to packed matrices: row order, DoRA factors, the kernels' layout.
//!
//! The last step of loading an adapter; everything it reads has been checked, so only the base weights can
//! still make it fail (a DoRA row that cancels its base row).

use std::borrow::Cow;

use kernels::lora::{LoraDtype, LoraPair};
use kernels::matrix::Matrix;
use shared::hash::ContentHash;

use super::tensor::TensorView;
use super::{AdapterError, AdapterFiles, AdapterSummary, LoraAdapter};
use crate::info::{Linear, ModelInfo};
use crate::weights::Weights;

/// How the rows of `lora_B` are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RowOrder {
    /// As everywhere inside: rotary partners are `i` and `i + head_dim/2`.
    HuggingFace,
    /// As llama-architecture GGUF files keep q and k: rotary partners are `2i` and `2i + 1`.
    Interleaved {
        /// Rows per head.
        head_dim: usize,
    },
}

/// One linear layer's checked tensors.
#[derive(Debug)]
pub(super) struct CheckedModule<'a> {
    pub(super) layer: usize,
    pub(super) linear: Linear,
    pub(super) rank: usize,
    /// Factor of `B·A`.
    pub(super) scale: f32,
    /// `[rank, n_in]`.
    pub(super) a: TensorView<'a>,
    /// `[n_out, rank]`.
    pub(super) b: TensorView<'a>,
    pub(super) b_rows: RowOrder,
    /// `[n_out]`, only for DoRA.
    pub(super) magnitude: Option<TensorView<'a>>,
}

/// An adapter that passed every check; borrows the files it came from.
#[derive(Debug)]
pub struct CheckedAdapter<'a> {
    summary: AdapterSummary,
    n_layers: usize,
    modules: Vec<CheckedModule<'a>>,
}

// === impl CheckedAdapter ===

impl<'a> CheckedAdapter<'a> {
    pub(super) fn new(files: &AdapterFiles, info: &ModelInfo, modules: Vec<CheckedModule<'a>>) -> Self {
        let summary = AdapterSummary {
            kind: files.kind(),
            rank_max: modules.iter().map(|module| module.rank).max().unwrap_or(0),
            modules: modules.len(),
            bytes: files.bytes(),
            dora: modules.iter().any(|module| module.magnitude.is_some()),
        };
        Self { summary, n_layers: info.n_layers, modules }
    }

    /// Facts for records and budgets.
    pub fn summary(&self) -> AdapterSummary {
        self.summary
    }

    /// The checked modules, for tests of what packing reads.
    #[cfg(test)]
    pub(super) fn modules(&self) -> &[CheckedModule<'a>] {
        &self.modules
    }

    /// Packs the adapter, whose files have this content hash, for one base model. Needs the weights for DoRA only.
    /// Memory: the packed adapter; for DoRA and mixed types one module in f32 besides.
    ///
    /// # Errors
    /// [`AdapterError::Invalid`] when a DoRA factor is not finite: the adapter cancels a row of the base.
    ///
    /// # Panics
    /// When `weights` are not those of the model the adapter was checked against.
    pub fn pack(&self, hash: ContentHash, weights: &Weights) -> Result<LoraAdapter, AdapterError> {
        assert_eq!(weights.layers.len(), self.n_layers, "an adapter is packed for the base it was checked against");
        let mut layers: Vec<[Option<LoraPair>; 7]> = (0..self.n_layers).map(|_| Default::default()).collect();
        for module in &self.modules {
            let base = weights.layers[module.layer].linear(module.linear);
            layers[module.layer][module.linear as usize] = Some(module.pack(base)?);
        }
        let bytes = layers.iter().flatten().flatten().map(LoraPair::bytes).sum();
        Ok(LoraAdapter { hash, layers, rank_max: self.summary.rank_max, bytes })
    }
}

// === impl CheckedModule ===

/// One module's matrices in f32 and in the order used inside.
#[derive(Debug)]
pub(super) struct Unpacked {
    /// `[rank, n_in]`.
    pub(super) a: Vec<f32>,
    /// `[n_out, rank]`.
    pub(super) b: Vec<f32>,
    /// `[n_out]`, only for DoRA.
    pub(super) row_scale: Option<Vec<f32>>,
}

impl CheckedModule<'_> {
    fn pack(&self, base: &Matrix) -> Result<LoraPair, AdapterError> {
        let (n_in, n_out) = (self.a.cols, self.b.rows);
        assert_eq!(
            (base.n_out(), base.n_in()),
            (n_out, n_in),
            "an adapter is packed for the base it was checked against"
        );
        // Both halves keep the stored type; a mixed pair becomes f32, which holds either exactly.
        let same_type = self.a.dtype == self.b.dtype;
        let dtype = if same_type { self.a.dtype.lora() } else { LoraDtype::F32 };
        let pair = if same_type && self.magnitude.is_none() {
            LoraPair::from_le_bytes(self.rank, n_in, n_out, self.a.bytes, &self.b_bytes(), self.scale, dtype)
        } else {
            let Unpacked { a, b, row_scale } = self.unpack(|i, row| base.row(i, row))?;
            LoraPair::new(self.rank, n_in, n_out, &a, &b, self.scale, dtype, row_scale)
        };
        pair.map_err(|error| AdapterError::invalid(format!("{}: {error}", self.name())))
    }

    /// The rows of B in the order used inside.
    fn b_bytes(&self) -> Cow<'_, [u8]> {
        match self.b_rows {
            RowOrder::HuggingFace => Cow::Borrowed(self.b.bytes),
            RowOrder::Interleaved { head_dim } => {
                Cow::Owned(to_hugging_face_rows(self.b.bytes, self.rank * self.b.dtype.size(), head_dim))
            }
        }
    }

    /// Reads the stored values; `base_row` writes a row of the base weights and is asked for DoRA only.
    pub(super) fn unpack(&self, base_row: impl FnMut(usize, &mut [f32])) -> Result<Unpacked, AdapterError> {
        let a = self.a.to_f32();
        let b = TensorView { bytes: &self.b_bytes(), ..self.b }.to_f32();
        let row_scale = match self.magnitude {
            None => None,
            Some(magnitude) => Some(self.dora_factors(base_row, &a, &b, &magnitude.to_f32())?),
        };
        Ok(Unpacked { a, b, row_scale })
    }

    /// `magnitude / ‖W + s·B·A‖₂` per output row, the norm over the inputs (DoRA, arXiv 2402.09353, section 4; the
    /// same axis as PEFT).
    fn dora_factors(
        &self,
        mut base_row: impl FnMut(usize, &mut [f32]),
        a: &[f32],
        b: &[f32],
        magnitude: &[f32],
    ) -> Result<Vec<f32>, AdapterError> {
        let n_in = self.a.cols;
        let mut row = vec![0.0_f32; n_in];
        let mut delta = vec![0.0_f32; n_in];
        let mut factors = Vec::with_capacity(magnitude.len());
        for (i, (&wanted, b_row)) in magnitude.iter().zip(b.chunks_exact(self.rank)).enumerate() {
            base_row(i, &mut row);
            delta.fill(0.0);
            for (&weight, a_row) in b_row.iter().zip(a.chunks_exact(n_in)) {
                delta.iter_mut().zip(a_row).for_each(|(sum, &value)| *sum += weight * value);
            }
            let square: f64 = row.iter().zip(&delta).map(|(&w, &d)| f64::from(w + self.scale * d).powi(2)).sum();
            let factor = (f64::from(wanted) / square.sqrt()) as f32;
            if !factor.is_finite() {
                return Err(AdapterError::invalid(format!(
                    "{}: lora_magnitude_vector {wanted} over row norm {} at output {i} is not finite",
                    self.name(),
                    square.sqrt()
                )));
            }
            factors.push(factor);
        }
        Ok(factors)
    }

    fn name(&self) -> String {
        format!("layer {} {}", self.layer, self.linear.hf_path())
    }
}

/// Undoes the row permutation of llama-architecture GGUF files: row `2i + p` of a head goes back to `i + p·head_dim/2`.
/// `width` is the length of a row in bytes.
fn to_hugging_face_rows(rows: &[u8], width: usize, head_dim: usize) -> Vec<u8> {
    let half = head_dim / 2;
    let mut out = vec![0; rows.len()];
    let heads = out.chunks_exact_mut(head_dim * width).zip(rows.chunks_exact(head_dim * width));
    for (to, from) in heads {
        for (at, row) in from.chunks_exact(width).enumerate() {
            let place = (at % 2 * half + at / 2) * width;
            to[place..place + width].copy_from_slice(row);
        }
    }
    out
}
