//! The frozen weights of a base model on a device: uploaded once when an engine starts.

use kernels::cuda::matmul::{DeviceMatrix, Form};
use kernels::cuda::{Buffer, Gpu, GpuError};

use crate::info::{Linear, ModelInfo};
use crate::weights::Weights;

/// One transformer block.
#[derive(Debug)]
pub(super) struct DeviceLayer<G: Gpu> {
    pub(super) attn_norm: Buffer<G, f32>,
    /// In the order of [`Linear::ALL`].
    linears: Vec<DeviceMatrix<G>>,
    pub(super) qkv_bias: Option<[Buffer<G, f32>; 3]>,
    pub(super) ffn_norm: Buffer<G, f32>,
}

/// All weights. Quantised ones keep their codes.
#[derive(Debug)]
pub struct DeviceWeights<G: Gpu> {
    embed: DeviceMatrix<G>,
    pub(super) layers: Vec<DeviceLayer<G>>,
    pub(super) norm: Buffer<G, f32>,
    /// None when tied to the embedding.
    head: Option<DeviceMatrix<G>>,
}

// === impl DeviceLayer ===

impl<G: Gpu> DeviceLayer<G> {
    pub(super) fn linear(&self, linear: Linear) -> &DeviceMatrix<G> {
        &self.linears[linear as usize]
    }
}

// === impl DeviceWeights ===

impl<G: Gpu> DeviceWeights<G> {
    /// Repacks and uploads the weights of a CPU.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn upload(gpu: &G, weights: &Weights) -> Result<Self, GpuError> {
        let matrix = |matrix| DeviceMatrix::upload(gpu, matrix);
        let vector = |values: &[f32]| Buffer::upload(gpu, values);
        let layers = weights.layers.iter().map(|layer| {
            let bias = |[q, k, v]: &[Vec<f32>; 3]| Ok::<_, GpuError>([vector(q)?, vector(k)?, vector(v)?]);
            Ok(DeviceLayer {
                attn_norm: vector(&layer.attn_norm)?,
                linears: layer.linears.iter().map(matrix).collect::<Result<_, _>>()?,
                qkv_bias: layer.qkv_bias.as_ref().map(bias).transpose()?,
                ffn_norm: vector(&layer.ffn_norm)?,
            })
        });
        let layers = layers.collect::<Result<_, GpuError>>()?;
        let tied = std::sync::Arc::ptr_eq(&weights.embed, &weights.head);
        let head = if tied { None } else { Some(matrix(&weights.head)?) };
        Ok(Self { embed: matrix(&weights.embed)?, layers, norm: vector(&weights.norm)?, head })
    }

    /// Weights that mean nothing, of a plausible size, for measuring.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn random(gpu: &G, info: &ModelInfo, form: Form) -> Result<Self, GpuError> {
        let ones = || Buffer::upload(gpu, &vec![1.0; info.hidden]);
        let matrix =
            |(n_out, n_in): (usize, usize), seed: usize| DeviceMatrix::random(gpu, n_out, n_in, form, seed as u64);
        let layers = (0..info.n_layers).map(|layer| {
            let linears =
                Linear::ALL.into_iter().map(|linear| matrix(info.linear_shape(linear), layer * 7 + linear as usize));
            let linears = linears.collect::<Result<_, GpuError>>()?;
            Ok(DeviceLayer { attn_norm: ones()?, linears, qkv_bias: None, ffn_norm: ones()? })
        });
        let layers = layers.collect::<Result<_, GpuError>>()?;
        let table = (info.vocab, info.hidden);
        Ok(Self { embed: matrix(table, 7001)?, layers, norm: ones()?, head: Some(matrix(table, 7002)?) })
    }

    pub(super) fn embed(&self) -> &DeviceMatrix<G> {
        &self.embed
    }

    pub(super) fn head(&self) -> &DeviceMatrix<G> {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Forms of all matrices that are multiplied.
    pub(super) fn forms(&self) -> impl Iterator<Item = Form> {
        let linears = self.layers.iter().flat_map(|layer| &layer.linears);
        linears.chain([self.head()]).map(DeviceMatrix::form)
    }

    /// Bytes held on the device by matrices.
    pub fn bytes(&self) -> usize {
        let linears = self.layers.iter().flat_map(|layer| &layer.linears);
        linears.chain([&self.embed]).chain(&self.head).map(DeviceMatrix::bytes).sum()
    }
}
