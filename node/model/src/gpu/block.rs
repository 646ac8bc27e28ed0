//! One transformer block on the device, as `forward::block` has it, with neighbouring row-wise operations in one launch.
//! What a block adds to the residual stream is added by the norm that reads it next.

use kernels::cuda::attention::{AttentionPlan, attention};
use kernels::cuda::kv::DeviceKv;
use kernels::cuda::lora::{LoraPlan, lora_delta};
use kernels::cuda::matmul::{Activations, DeviceMatrix, Form, products};
use kernels::cuda::rows::{DeviceRope, RowPlan, add_bias, residual_rms_norm, rope_store, swiglu};
use kernels::cuda::{Buffer, Gpu, GpuError};

use super::Buffers;
use super::adapters::pair_index;
use super::weights::DeviceLayer;
use crate::info::{Linear, ModelInfo};

/// What every block of one step shares.
pub(super) struct Pass<'a, G: Gpu> {
    pub(super) gpu: &'a G,
    pub(super) info: &'a ModelInfo,
    pub(super) n_rows: usize,
    pub(super) rope: &'a DeviceRope<G>,
    pub(super) rows: &'a RowPlan<G>,
    pub(super) attention: &'a AttentionPlan<G>,
    pub(super) lora: Option<&'a LoraPlan<G>>,
}

// === impl Pass ===

impl<G: Gpu> Pass<'_, G> {
    /// `projected = O(attention(rope(Q(norm)), rope(K(norm)), V(norm)))`, after adding what the block before left there.
    pub(super) fn attention_block(
        &self,
        layer: usize,
        block: &DeviceLayer<G>,
        kv: &mut DeviceKv<G>,
        b: &mut Buffers<G>,
    ) -> Result<(), GpuError> {
        let Self { gpu, info, n_rows, .. } = *self;
        let qkv = [Linear::Q, Linear::K, Linear::V];
        let form = block.linear(Linear::Q).form();
        let codes = b.activations.in_passing(form, info.hidden);
        let delta = (layer > 0).then_some(&b.projected);
        residual_rms_norm(gpu, &mut b.residual, delta, n_rows, &block.attn_norm, info.rms_eps, &mut b.normed, codes)?;
        let outs = [&mut b.q, &mut b.k, &mut b.v];
        project(self, layer, block, qkv, &b.normed, outs, &mut b.activations, &mut b.lora)?;
        if let Some([q_bias, k_bias, v_bias]) = &block.qkv_bias {
            add_bias(gpu, &mut b.q, n_rows, q_bias)?;
            add_bias(gpu, &mut b.k, n_rows, k_bias)?;
            add_bias(gpu, &mut b.v, n_rows, v_bias)?;
        }
        rope_store(gpu, &mut b.q, &b.k, &b.v, info.n_heads, self.rows, self.rope, kv, layer)?;
        let scale = 1.0 / (info.head_dim as f32).sqrt();
        attention(gpu, self.attention, &b.q, kv, layer, scale, &mut b.attended, &mut b.attention)?;
        b.activations.renew();
        let outs = [&mut b.projected];
        project(self, layer, block, [Linear::O], &b.attended, outs, &mut b.activations, &mut b.lora)
    }

    /// `projected = Down(silu(Gate(norm)) * Up(norm))`, after adding what attention left there.
    pub(super) fn feed_forward_block(
        &self,
        layer: usize,
        block: &DeviceLayer<G>,
        b: &mut Buffers<G>,
    ) -> Result<(), GpuError> {
        let Self { gpu, info, n_rows, .. } = *self;
        let codes = b.activations.in_passing(block.linear(Linear::Gate).form(), info.hidden);
        let delta = Some(&b.projected);
        residual_rms_norm(gpu, &mut b.residual, delta, n_rows, &block.ffn_norm, info.rms_eps, &mut b.normed, codes)?;
        let outs = [&mut b.gate, &mut b.up];
        let linears = [Linear::Gate, Linear::Up];
        project(self, layer, block, linears, &b.normed, outs, &mut b.activations, &mut b.lora)?;
        let codes = b.activations.in_passing(block.linear(Linear::Down).form(), info.ffn);
        swiglu(gpu, &b.gate, &b.up, n_rows, info.ffn, &mut b.gated, codes)?;
        let outs = [&mut b.projected];
        project(self, layer, block, [Linear::Down], &b.gated, outs, &mut b.activations, &mut b.lora)
    }
}

/// Linear layers of the same input `x`: `out = W x` for all rows, then each row's own adapter on top. Biases come after.
fn project<G: Gpu, const N: usize>(
    pass: &Pass<'_, G>,
    layer: usize,
    block: &DeviceLayer<G>,
    linears: [Linear; N],
    x: &Buffer<G, f32>,
    mut outs: [&mut Buffer<G, f32>; N],
    activations: &mut Activations<G>,
    lora: &mut kernels::cuda::lora::LoraScratch<G>,
) -> Result<(), GpuError> {
    let (gpu, n_rows) = (pass.gpu, pass.n_rows);
    let matrices: [&DeviceMatrix<G>; N] = linears.map(|linear| block.linear(linear));
    let forms: [Form; N] = matrices.map(DeviceMatrix::form);
    activations.prepare(gpu, &forms, x, n_rows, matrices[0].n_in())?;
    let mut list: Vec<_> = matrices.into_iter().zip(outs.iter_mut().map(|out| &mut **out)).collect();
    products(gpu, activations, n_rows, &mut list)?;
    let Some(plan) = pass.lora else { return Ok(()) };
    let indices = linears.map(|linear| pair_index(layer, linear));
    let mut list: Vec<_> = indices.into_iter().zip(outs).collect();
    lora_delta(gpu, plan, x, &mut list, lora)
}
