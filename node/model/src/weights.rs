//! The frozen weights of a base model, packed for `kernels`; built once by a loader, then only read.

use std::sync::Arc;

use kernels::matrix::Matrix;

use crate::info::Linear;

/// One transformer block.
#[derive(Debug)]
pub struct LayerWeights {
    /// RMS norm before attention, `[hidden]`.
    pub attn_norm: Vec<f32>,
    /// The seven linear layers in the order of [`Linear::ALL`]; shapes as `ModelInfo::linear_shape`.
    pub linears: [Matrix; 7],
    /// Biases of q, k and v (Qwen2), in that order.
    pub qkv_bias: Option<[Vec<f32>; 3]>,
    /// RMS norm before the feed-forward layer, `[hidden]`.
    pub ffn_norm: Vec<f32>,
}

impl LayerWeights {
    /// One linear layer.
    pub fn linear(&self, linear: Linear) -> &Matrix {
        &self.linears[linear as usize]
    }
}

/// All weights.
#[derive(Debug)]
pub struct Weights {
    /// Token embedding, `[vocab, hidden]`.
    pub embed: Arc<Matrix>,
    /// Blocks in order.
    pub layers: Vec<LayerWeights>,
    /// Final RMS norm, `[hidden]`.
    pub norm: Vec<f32>,
    /// Output head, `[vocab, hidden]`; the same `Arc` as `embed` when tied.
    pub head: Arc<Matrix>,
}

impl Weights {
    /// Bytes held, counting a tied head once.
    pub fn bytes(&self) -> usize {
        let head = if Arc::ptr_eq(&self.embed, &self.head) { 0 } else { self.head.bytes() };
        let layers: usize = self.layers.iter().flat_map(|layer| &layer.linears).map(Matrix::bytes).sum();
        self.embed.bytes() + head + layers
    }
}
