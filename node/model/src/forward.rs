//! Computes one [`Step`]: embeds the tokens, sends them through the blocks, and returns the logits asked for.
//!
//! Called by the engine thread through [`Forward`]. Reading order: [`Forward::forward`] below composes the pass,
//! `plan` turns a step into row ranges and checks its bounds, `block` is the transformer block line by line,
//! `rotary` derives the rotary frequencies, `buffers` owns the activations.
//!
//! What it does not do: plan batches, choose tokens, own pages (the scheduler does; here a page is a number).
//!
//! Batch invariance: every row goes through the same sequence of reductions whatever stands beside it. The
//! kernels promise it for their part; here it means that no row's path depends on the number of rows, on where
//! a run was cut, or on whether its positions came by prefill or decode. LoRA segments decide only *which* pair
//! a row gets.

use std::sync::Arc;

use kernels::kv::{KvDtype, KvLayout, KvPool, PAGE_TOKENS};
use kernels::matmul::{self, Precision};
use kernels::ops::{self, RopeTable};
use kernels::pool::Pool;

use crate::base::BaseModel;
use crate::info::{ModelInfo, Numerics};
use crate::step::{Forward, Step};
use crate::weights::Weights;

pub(crate) mod plan;
mod block;
mod buffers;
pub(crate) mod rotary;

use block::Pass;
use buffers::Buffers;
use plan::{Bounds, Plan};

/// Sizes of a [`Runtime`]; all memory is taken when it is made.
#[derive(Debug, Clone)]
pub struct RuntimeOptions {
    /// Threads that compute, the caller's included; at least 1. A GPU has its own and ignores this.
    pub threads: usize,
    /// Most rows (tokens) per step.
    pub rows_max: usize,
    /// Bytes for keys and values; rounded down to whole pages.
    pub kv_bytes: usize,
    /// Logits rows that are kept allocated. A step may ask for more: they are computed in chunks of this size,
    /// and the memory for the surplus is given back with the next step.
    pub n_logits_max: usize,
    /// Fill pages with NaN when they are freed, in release builds too (debug builds always do, and at the start):
    /// what a tenant leaves is cleared, and a read of someone else's keys shows in the logits.
    pub poison_freed_pages: bool,
}

/// Why a runtime cannot be made: the operator's numbers do not fit the model, or the device does not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeError {
    /// The model was loaded for a GPU, and a CPU would compute other bits than its numerics say.
    #[error("the model was loaded with numerics of a GPU; hint: load it with those of a CPU")]
    WantsGpu,
    /// The model was loaded for a CPU, and a GPU would compute other bits.
    #[error("the model was loaded with numerics of a CPU; hint: load it with those of a GPU")]
    WantsCpu,
    /// A GPU cannot compute this model; a CPU can.
    #[error("a GPU cannot run this model: {what}; hint: run it on the CPU")]
    Unfit {
        /// What of the model.
        what: String,
    },
    /// The driver refused, or the device has no room.
    #[error(transparent)]
    Gpu(#[from] kernels::cuda::GpuError),
    /// A size that must be at least 1 is 0.
    #[error("{what} is 0, must be at least 1")]
    Zero {
        /// Field of [`RuntimeOptions`].
        what: &'static str,
    },
    /// The KV budget is below one page.
    #[error(
        "kv memory of {kv_bytes} bytes is below one page of {page_bytes} bytes; hint: give it at least {page_bytes} × (context / {PAGE_TOKENS}) for one full sequence"
    )]
    KvTooSmall {
        /// Bytes given.
        kv_bytes: usize,
        /// Bytes of one page over all layers.
        page_bytes: usize,
    },
}

/// The real [`Forward`]: a base model, its KV pages and the buffers and threads of one engine.
///
/// Memory, besides the weights: `kv_bytes`, about `4 × rows_max × (6 × hidden + 3 × ffn)` bytes of activations, and
/// `4 × n_logits_max × vocab` bytes of logits.
#[derive(Debug)]
pub struct Runtime {
    base: Arc<BaseModel>,
    pool: Pool,
    kv: KvPool,
    rope: RopeTable,
    buffers: Buffers,
    precision: Precision,
    rows_max: usize,
    n_logits_max: usize,
    poisons: bool,
}

/// How the KV pages of a model look: what one page costs is known before any memory is taken.
pub fn kv_layout(info: &ModelInfo) -> KvLayout {
    let dtype = match info.numerics {
        Numerics::Exact => KvDtype::F32,
        Numerics::Fast | Numerics::Gpu => KvDtype::F16,
    };
    let ModelInfo { n_layers, n_kv_heads, head_dim, .. } = *info;
    KvLayout { n_layers, n_kv_heads, head_dim, page_tokens: PAGE_TOKENS, dtype }
}

/// Pages that fit in `kv_bytes`, at least one.
pub(crate) fn n_pages(layout: &KvLayout, kv_bytes: usize) -> Result<usize, RuntimeError> {
    let page_bytes = layout.bytes_per_page();
    match (kv_bytes / page_bytes).min(u32::MAX as usize) {
        0 => Err(RuntimeError::KvTooSmall { kv_bytes, page_bytes }),
        n_pages => Ok(n_pages),
    }
}

// === impl RuntimeOptions ===

impl RuntimeOptions {
    /// Every size is at least 1.
    pub(crate) fn check(&self) -> Result<(), RuntimeError> {
        let sizes = [("threads", self.threads), ("rows_max", self.rows_max), ("n_logits_max", self.n_logits_max)];
        match sizes.into_iter().find(|(_, size)| *size == 0) {
            Some((what, _)) => Err(RuntimeError::Zero { what }),
            None => Ok(()),
        }
    }
}

// === impl Runtime ===

impl Runtime {
    /// Takes all memory and starts the threads.
    ///
    /// # Errors
    /// When a size is 0 or `kv_bytes` is below one page.
    pub fn new(base: Arc<BaseModel>, options: RuntimeOptions) -> Result<Self, RuntimeError> {
        options.check()?;
        let RuntimeOptions { threads, rows_max, kv_bytes, n_logits_max, poison_freed_pages } = options;
        let info = &base.info;
        let precision = match info.numerics {
            Numerics::Exact => Precision::F32,
            Numerics::Fast => Precision::Int8,
            Numerics::Gpu => return Err(RuntimeError::WantsGpu),
        };
        let layout = kv_layout(info);
        let n_pages = n_pages(&layout, kv_bytes)?;
        let mut kv = KvPool::new(layout, n_pages);
        // Pages that were never used hold zeros; filling them all would make the whole budget resident.
        if poison_freed_pages && cfg!(debug_assertions) {
            (0..n_pages as u32).for_each(|page| kv.poison(page));
        }
        let positions_max = info.context.min(n_pages.saturating_mul(PAGE_TOKENS));
        let rope = RopeTable::new(info.head_dim, positions_max, &rotary::inverse_frequencies(info));
        let buffers = Buffers::new(info, rows_max, n_logits_max);
        let poisons = poison_freed_pages || cfg!(debug_assertions);
        let pool = Pool::new(threads);
        Ok(Self { pool, kv, rope, buffers, precision, rows_max, n_logits_max, poisons, base })
    }

    /// The model it runs.
    pub fn base(&self) -> &Arc<BaseModel> {
        &self.base
    }

    /// Bytes of one KV page over all layers.
    pub fn page_bytes(&self) -> usize {
        self.kv.bytes_per_page()
    }
}

impl Forward for Runtime {
    fn page_tokens(&self) -> usize {
        PAGE_TOKENS
    }

    fn n_pages(&self) -> usize {
        self.kv.n_pages()
    }

    fn rows_max(&self) -> usize {
        self.rows_max
    }

    fn vocab(&self) -> usize {
        self.base.info.vocab
    }

    fn forward(&mut self, step: &Step) -> &[f32] {
        let (info, weights) = (&self.base.info, &self.base.weights);
        // 1. Check every bound of the step, and name its rows.
        let bounds = Bounds {
            rows_max: self.rows_max,
            positions_max: self.rope.max_positions(),
            n_pages: self.kv.n_pages(),
            page_tokens: PAGE_TOKENS,
            vocab: info.vocab,
            n_layers: info.n_layers,
        };
        let plan = Plan::new(step, &bounds, std::mem::take(&mut self.buffers.plan));
        // 2. Look the tokens up: the residual stream, [n_rows, hidden].
        embed(weights, info, &plan, &mut self.buffers);
        // 3. Every block adds to the residual stream, and writes its keys and values into the pages.
        let pass = Pass { pool: &self.pool, precision: self.precision, info, rope: &self.rope, plan: &plan };
        for (layer, block) in weights.layers.iter().enumerate() {
            pass.attention_block(layer, block, &mut self.kv, &mut self.buffers);
            pass.feed_forward_block(layer, block, &mut self.buffers);
        }
        pass.add_last(&mut self.buffers);
        // 4. The head, for the rows whose logits are wanted.
        head(&self.pool, self.precision, weights, info, &plan, self.n_logits_max, &mut self.buffers);
        self.buffers.plan = plan.into_spare();
        &self.buffers.logits
    }

    fn page_freed(&mut self, page: u32) {
        if self.poisons {
            self.kv.poison(page);
        }
    }
}

/// Copies the embedding of every token into the residual stream.
fn embed(weights: &Weights, info: &ModelInfo, plan: &Plan<'_>, buffers: &mut Buffers) {
    let rows = buffers.residual.chunks_exact_mut(info.hidden);
    for (&token, row) in plan.tokens.iter().zip(rows) {
        weights.embed.row(token as usize, row);
    }
}

/// Final norm and output head of the wanted rows, `n_logits_max` rows at a time.
fn head(
    pool: &Pool,
    precision: Precision,
    weights: &Weights,
    info: &ModelInfo,
    plan: &Plan<'_>,
    n_logits_max: usize,
    buffers: &mut Buffers,
) {
    buffers.size_logits(plan.logits_rows.len(), n_logits_max, info.vocab);
    let Buffers { residual, gathered, normed, logits, matmul, .. } = buffers;
    let chunks = plan.logits_rows.chunks(n_logits_max).zip(logits.chunks_mut(n_logits_max * info.vocab));
    for (rows, out) in chunks {
        for (&row, to) in rows.iter().zip(gathered.chunks_exact_mut(info.hidden)) {
            to.copy_from_slice(&residual[row * info.hidden..][..info.hidden]);
        }
        let n = rows.len() * info.hidden;
        ops::rms_norm(pool, &gathered[..n], rows.len(), &weights.norm, info.rms_eps, &mut normed[..n]);
        matmul::matmul(pool, precision, &normed[..n], rows.len(), &weights.head, out, matmul);
    }
}
