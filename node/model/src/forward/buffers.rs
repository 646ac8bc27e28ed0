//! The activations of a step: allocated once for the largest step, reused by all.

use kernels::lora::Segment;
use kernels::{attention, lora, matmul};

use super::plan::Plan;
use crate::info::{Linear, ModelInfo};

/// Row-major activations, each `[rows_max, width]`; a step uses the first rows.
#[derive(Debug)]
pub(super) struct Buffers {
    /// The residual stream, `[rows_max, hidden]`.
    pub(super) residual: Vec<f32>,
    /// Rows picked for the head, `[n_logits_max, hidden]`.
    pub(super) gathered: Vec<f32>,
    /// After an RMS norm, `[max(rows_max, n_logits_max), hidden]`.
    pub(super) normed: Vec<f32>,
    /// Queries, `[rows_max, n_heads * head_dim]`.
    pub(super) q: Vec<f32>,
    /// Keys, `[rows_max, n_kv_heads * head_dim]`.
    pub(super) k: Vec<f32>,
    /// Values, as keys.
    pub(super) v: Vec<f32>,
    /// Weighted values of all heads, as queries.
    pub(super) attended: Vec<f32>,
    /// Gate of the feed-forward layer, `[rows_max, ffn]`.
    pub(super) gate: Vec<f32>,
    /// Up projection, as gate.
    pub(super) up: Vec<f32>,
    /// `silu(gate) * up`, as gate.
    pub(super) gated: Vec<f32>,
    /// What a block adds to the residual stream, `[rows_max, hidden]`.
    pub(super) projected: Vec<f32>,
    /// What the step returns, `[n_logits, vocab]`.
    pub(super) logits: Vec<f32>,
    /// Memory of the last step's plan.
    pub(super) plan: Plan<'static>,
    /// Memory of the segments of one block's linear layers.
    pub(super) segments: Vec<Segment<'static>>,
    /// Scratch of the kernels.
    pub(super) matmul: matmul::Scratch,
    /// Scratch of the kernels.
    pub(super) lora: lora::Scratch,
    /// Scratch of the kernels.
    pub(super) attention: attention::Scratch,
}

// === impl Buffers ===

impl Buffers {
    /// For steps of up to `rows_max` rows; room for `n_logits_max` rows of logits is kept.
    pub(super) fn new(info: &ModelInfo, rows_max: usize, n_logits_max: usize) -> Self {
        let rows = |width: usize| vec![0.0; rows_max * width];
        let out = |linear: Linear| rows(info.linear_shape(linear).0);
        Self {
            residual: rows(info.hidden),
            gathered: vec![0.0; n_logits_max * info.hidden],
            normed: vec![0.0; rows_max.max(n_logits_max) * info.hidden],
            q: out(Linear::Q),
            k: out(Linear::K),
            v: out(Linear::V),
            attended: out(Linear::Q),
            gate: out(Linear::Gate),
            up: out(Linear::Up),
            gated: out(Linear::Up),
            projected: rows(info.hidden),
            logits: Vec::with_capacity(n_logits_max * info.vocab),
            plan: Plan::default(),
            segments: Vec::new(),
            matmul: matmul::Scratch::default(),
            lora: lora::Scratch::default(),
            attention: attention::Scratch::default(),
        }
    }

    /// Makes `logits` exactly `[n_logits, vocab]`; what an earlier large step needed beyond `n_logits_max` rows is freed.
    pub(super) fn size_logits(&mut self, n_logits: usize, n_logits_max: usize, vocab: usize) {
        self.logits.resize(n_logits * vocab, 0.0);
        self.logits.shrink_to(n_logits_max * vocab);
    }
}
