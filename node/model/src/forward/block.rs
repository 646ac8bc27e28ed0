//! One transformer block, as the Llama papers draw it: attention, then the gated feed-forward layer, each
//! behind an RMS norm and added to the residual stream (Touvron et al. 2023, sections 2.2; Hu et al. 2021 for LoRA).

use kernels::attention::attention;
use kernels::kv::{KvPool, PAGE_TOKENS};
use kernels::lora::{self, Segment};
use kernels::matmul::{self, Precision, Product};
use kernels::ops::{self, RopeTable};
use kernels::pool::Pool;

use super::buffers::Buffers;
use super::plan::Plan;
use crate::info::{Linear, ModelInfo};
use crate::weights::LayerWeights;

/// What every block of one step shares.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) pool: &'a Pool,
    pub(super) precision: Precision,
    pub(super) info: &'a ModelInfo,
    pub(super) rope: &'a RopeTable,
    pub(super) plan: &'a Plan<'a>,
}

// === impl Pass ===

impl Pass<'_> {
    /// `residual += O(attention(rope(Q(norm)), rope(K(norm)), V(norm)))`
    pub(super) fn attention_block(&self, layer: usize, block: &LayerWeights, kv: &mut KvPool, buffers: &mut Buffers) {
        let Self { pool, info, rope, plan, .. } = *self;
        let n_rows = plan.n_rows();
        let (q_width, hidden) = info.linear_shape(Linear::Q);
        let (kv_width, _) = info.linear_shape(Linear::K);
        let b = buffers;
        let residual = &mut b.residual[..n_rows * hidden];
        let normed = &mut b.normed[..n_rows * hidden];
        let (q, attended) = (&mut b.q[..n_rows * q_width], &mut b.attended[..n_rows * q_width]);
        let (k, v) = (&mut b.k[..n_rows * kv_width], &mut b.v[..n_rows * kv_width]);
        let projected = &mut b.projected[..n_rows * hidden];

        ops::rms_norm(pool, residual, n_rows, &block.attn_norm, info.rms_eps, normed);
        let mut qkv = [(Linear::Q, &mut *q), (Linear::K, &mut *k), (Linear::V, &mut *v)];
        self.project(layer, block, normed, &mut qkv, &mut b.matmul, &mut b.lora);
        if let Some([q_bias, k_bias, v_bias]) = &block.qkv_bias {
            ops::add_bias_rows(q, n_rows, q_bias);
            ops::add_bias_rows(k, n_rows, k_bias);
            ops::add_bias_rows(v, n_rows, v_bias);
        }
        ops::rope(pool, q, n_rows, info.n_heads, info.head_dim, &plan.positions, rope);
        ops::rope(pool, k, n_rows, info.n_kv_heads, info.head_dim, &plan.positions, rope);
        self.store(layer, k, v, kv_width, kv);
        let scale = 1.0 / (info.head_dim as f32).sqrt();
        attention(pool, q, info.n_heads, &plan.runs, kv, layer, scale, attended, &mut b.attention);
        self.project(layer, block, attended, &mut [(Linear::O, &mut *projected)], &mut b.matmul, &mut b.lora);
        ops::add_in_place(residual, projected);
    }

    /// `residual += Down(silu(Gate(norm)) * Up(norm))`
    pub(super) fn feed_forward_block(&self, layer: usize, block: &LayerWeights, buffers: &mut Buffers) {
        let Self { pool, info, plan, .. } = *self;
        let (n_rows, hidden, ffn) = (plan.n_rows(), info.hidden, info.ffn);
        let b = buffers;
        let residual = &mut b.residual[..n_rows * hidden];
        let normed = &mut b.normed[..n_rows * hidden];
        let (gate, up) = (&mut b.gate[..n_rows * ffn], &mut b.up[..n_rows * ffn]);
        let gated = &mut b.gated[..n_rows * ffn];
        let projected = &mut b.projected[..n_rows * hidden];

        ops::rms_norm(pool, residual, n_rows, &block.ffn_norm, info.rms_eps, normed);
        let mut gate_up = [(Linear::Gate, &mut *gate), (Linear::Up, &mut *up)];
        self.project(layer, block, normed, &mut gate_up, &mut b.matmul, &mut b.lora);
        ops::swiglu(pool, gate, up, gated);
        self.project(layer, block, gated, &mut [(Linear::Down, &mut *projected)], &mut b.matmul, &mut b.lora);
        ops::add_in_place(residual, projected);
    }

    /// Linear layers of the same input `x`: `out = W x` for all rows, then each row's own adapter on top,
    /// `out += s · B(A x)` (and, for DoRA, the row scale of the sum). Biases come after.
    fn project(
        &self,
        layer: usize,
        block: &LayerWeights,
        x: &[f32],
        linears: &mut [(Linear, &mut [f32])],
        matmul_scratch: &mut matmul::Scratch,
        lora_scratch: &mut lora::Scratch,
    ) {
        let n_rows = self.plan.n_rows();
        let mut products: Vec<Product<'_>> =
            linears.iter_mut().map(|(linear, out)| Product { w: block.linear(*linear), out }).collect();
        matmul::matmul_group(self.pool, self.precision, x, n_rows, &mut products, matmul_scratch);
        for (linear, out) in linears {
            let segments = self.segments(layer, *linear);
            if !segments.is_empty() {
                let (n_out, n_in) = self.info.linear_shape(*linear);
                lora::lora_delta(self.pool, &segments, x, n_in, out, n_out, lora_scratch);
            }
        }
    }

    /// Rows whose adapter changes this linear layer, with what it adds.
    fn segments(&self, layer: usize, linear: Linear) -> Vec<Segment<'_>> {
        self.plan
            .adapters
            .iter()
            .filter_map(|(rows, adapter)| Some(Segment { rows: rows.clone(), pair: adapter.pair(layer, linear)? }))
            .collect()
    }

    /// Writes the keys and values of all rows into their pages, rounding to the pages' dtype. Attention reads them
    /// back from there, also for rows of this step: so a row sees the same numbers whether its past came in this
    /// step or in an earlier one.
    fn store(&self, layer: usize, k: &[f32], v: &[f32], kv_width: usize, kv: &mut KvPool) {
        for run in &self.plan.runs {
            for (place, row) in run.rows.clone().enumerate() {
                let position = run.start + place;
                let page = run.pages[position / PAGE_TOKENS];
                let (k, v) = (&k[row * kv_width..][..kv_width], &v[row * kv_width..][..kv_width]);
                kv.store(layer, page, position % PAGE_TOKENS, k, v);
            }
        }
    }
}
