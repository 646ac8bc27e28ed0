//! One transformer block, as the Llama papers draw it: attention, then the gated feed-forward layer, each
//! behind an RMS norm and added to the residual stream (Touvron et al. 2023, sections 2.2; Hu et al. 2021 for LoRA).

use kernels::attention::attention;
use kernels::kv::KvPool;
use kernels::lora::{self, Delta, Segment};
use kernels::matmul::{self, Precision, Product};
use kernels::ops::{self, RopeTable};
use kernels::pool::Pool;

use super::buffers::Buffers;
use super::plan::{Plan, emptied};
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
    /// `projected = O(attention(rope(Q(norm)), rope(K(norm)), V(norm)))`, after `residual += projected` of the layer
    /// before: additions wait for the norm that reads them.
    pub(super) fn attention_block(&self, layer: usize, block: &LayerWeights, kv: &mut KvPool, buffers: &mut Buffers) {
        let Self { pool, precision, info, rope, plan } = *self;
        let n_rows = plan.n_rows();
        let (q_width, hidden) = info.linear_shape(Linear::Q);
        let (kv_width, _) = info.linear_shape(Linear::K);
        let b = buffers;
        let residual = &mut b.residual[..n_rows * hidden];
        let normed = &mut b.normed[..n_rows * hidden];
        let (q, attended) = (&mut b.q[..n_rows * q_width], &mut b.attended[..n_rows * q_width]);
        let (k, v) = (&mut b.k[..n_rows * kv_width], &mut b.v[..n_rows * kv_width]);
        let projected = &mut b.projected[..n_rows * hidden];

        let added = (layer > 0).then_some(&*projected);
        matmul::add_and_norm(pool, precision, residual, added, &block.attn_norm, info.rms_eps, normed, &mut b.matmul);
        let mut tools = Tools { segments: &mut b.segments, matmul: &mut b.matmul, lora: &mut b.lora };
        let qkv = [(Linear::Q, &mut *q), (Linear::K, &mut *k), (Linear::V, &mut *v)];
        self.project(layer, block, normed, true, qkv, &mut tools);
        if let Some([q_bias, k_bias, v_bias]) = &block.qkv_bias {
            ops::add_bias_rows(q, n_rows, q_bias);
            ops::add_bias_rows(k, n_rows, k_bias);
            ops::add_bias_rows(v, n_rows, v_bias);
        }
        ops::rope(pool, q, n_rows, info.n_heads, info.head_dim, &plan.positions, rope);
        ops::rope(pool, k, n_rows, info.n_kv_heads, info.head_dim, &plan.positions, rope);
        // Attention reads keys and values back from the pages, also those of this step: so a row sees the same rounded
        // numbers whether its past came in this step or in an earlier one.
        kv.store_runs(pool, layer, &plan.runs, k, v);
        let scale = 1.0 / (info.head_dim as f32).sqrt();
        attention(pool, q, info.n_heads, &plan.runs, kv, layer, scale, attended, &mut b.attention);
        self.project(layer, block, attended, false, [(Linear::O, projected)], &mut tools);
    }

    /// `projected = Down(silu(Gate(norm)) * Up(norm))`, after `residual += projected` of the attention.
    pub(super) fn feed_forward_block(&self, layer: usize, block: &LayerWeights, buffers: &mut Buffers) {
        let Self { pool, precision, info, plan, .. } = *self;
        let (n_rows, hidden, ffn) = (plan.n_rows(), info.hidden, info.ffn);
        let b = buffers;
        let residual = &mut b.residual[..n_rows * hidden];
        let normed = &mut b.normed[..n_rows * hidden];
        let (gate, up) = (&mut b.gate[..n_rows * ffn], &mut b.up[..n_rows * ffn]);
        let gated = &mut b.gated[..n_rows * ffn];
        let projected = &mut b.projected[..n_rows * hidden];

        let added = Some(&*projected);
        matmul::add_and_norm(pool, precision, residual, added, &block.ffn_norm, info.rms_eps, normed, &mut b.matmul);
        let mut tools = Tools { segments: &mut b.segments, matmul: &mut b.matmul, lora: &mut b.lora };
        self.project(layer, block, normed, true, [(Linear::Gate, &mut *gate), (Linear::Up, &mut *up)], &mut tools);
        matmul::gate(pool, precision, n_rows, gate, up, gated, tools.matmul);
        self.project(layer, block, gated, true, [(Linear::Down, projected)], &mut tools);
    }

    /// The last `residual += projected`, which no norm of a layer follows.
    pub(super) fn add_last(&self, buffers: &mut Buffers) {
        let n = self.plan.n_rows() * self.info.hidden;
        ops::add_in_place(self.pool, &mut buffers.residual[..n], &buffers.projected[..n]);
    }

    /// Linear layers of the same input `x`: `out = W x` for all rows, then each row's own adapter on top,
    /// `out += s · B(A x)` (and, for DoRA, the row scale of the sum). Biases come after. `prepared` says that a kernel has
    /// just made `x` and left what the product wants of it.
    fn project<const N: usize>(
        &self,
        layer: usize,
        block: &LayerWeights,
        x: &[f32],
        prepared: bool,
        mut linears: [(Linear, &mut [f32]); N],
        tools: &mut Tools<'_>,
    ) {
        let mut products = linears.each_mut().map(|(linear, out)| Product { w: block.linear(*linear), out });
        let multiply = if prepared { matmul::matmul_group_prepared } else { matmul::matmul_group };
        multiply(self.pool, self.precision, x, self.plan.n_rows(), &mut products, tools.matmul);
        if self.plan.adapters.is_empty() {
            return;
        }
        // The segments of all layers one after the other; `ends` says where each layer's stop.
        let mut segments: Vec<Segment<'_>> = std::mem::take(tools.segments);
        let ends = linears.each_ref().map(|(linear, _)| {
            segments.extend(self.plan.adapters.iter().filter_map(|(rows, adapter)| {
                Some(Segment { rows: rows.clone(), pair: adapter.pair(layer, *linear)? })
            }));
            segments.len()
        });
        let mut start = 0;
        let mut at = ends.into_iter();
        let mut deltas = linears.map(|(linear, y)| {
            let end = at.next().expect("one end per layer");
            let own = &segments[std::mem::replace(&mut start, end)..end];
            Delta { segments: own, y, n_out: self.info.linear_shape(linear).0 }
        });
        let n_in = x.len() / self.plan.n_rows();
        lora::lora_delta_group(self.pool, x, n_in, &mut deltas, tools.lora);
        *tools.segments = emptied(segments);
    }
}

/// What [`Pass::project`] works with besides its operands.
struct Tools<'a> {
    segments: &'a mut Vec<Segment<'static>>,
    matmul: &'a mut matmul::Scratch,
    lora: &'a mut lora::Scratch,
}
