//! [`Forward`] on a GPU: weights, KV pages, adapters and activations live there; tokens go in, logits come out.
//!
//! The same pass as [`crate::forward`], in its order, with the kernels of `kernels::cuda`: tokens are looked up, every
//! block adds to the residual stream, the head runs for the rows whose logits are wanted. Written against
//! [`kernels::cuda::Gpu`], so that tests run it on the emulated device and nodes on a real one (feature `cuda`). `weights`
//! brings a model onto the device, `adapters` keeps the adapters of running requests there, `block` is the transformer
//! block.
//!
//! Batch invariance: as on the CPU, every kernel sums a row in an order that depends on that row alone. The bits are
//! others than a CPU's, which is why such a model is loaded with [`Numerics::Gpu`] and says so in its numerics id.
//!
//! What it does not do: numerics other than those; heads that are not a multiple of 32 wide, and inputs that are not a
//! multiple of 8 ([`RuntimeError::Unfit`] says so, and the CPU runs such models). A driver that fails in a step panics,
//! which ends the engine as any other panic does: what it computed before cannot be trusted.

mod weights;
mod adapters;
mod block;

use kernels::cuda::attention::{AttentionPlan, AttentionScratch};
use kernels::cuda::kv::{DeviceKv, supports_head_dim};
use kernels::cuda::lora::{LoraPlan, LoraScratch};
use kernels::cuda::matmul::{Activations, Form, TokenList, embed, products};
use kernels::cuda::rows::{DeviceRope, RowList, RowPlan, rms_norm_of_rows};
use kernels::cuda::{Buffer, Gpu, GpuError};
use kernels::kv::PAGE_TOKENS;

use crate::base::BaseModel;
use crate::forward::plan::{Bounds, Plan};
use crate::forward::{RuntimeError, RuntimeOptions, kv_layout, n_pages, rotary};
use crate::info::{Linear, ModelInfo, Numerics};
use crate::step::{Forward, Step};

pub use self::weights::DeviceWeights;

use self::adapters::Adapters;
use self::block::Pass;

/// A base model, its KV pages and the buffers of one engine on a device.
#[derive(Debug)]
pub struct GpuRuntime<G: Gpu> {
    gpu: G,
    info: ModelInfo,
    weights: DeviceWeights<G>,
    kv: DeviceKv<G>,
    rope: DeviceRope<G>,
    adapters: Adapters<G>,
    /// The last step's, kept while the next has the same rows and adapters.
    lora: Option<LoraPlan<G>>,
    buffers: Buffers<G>,
    plan: Plan<'static>,
    /// `[n_logits_max, vocab]`, for steps that want no more.
    logits: G::Host,
    /// For those that do.
    surplus: Vec<f32>,
    rows_max: usize,
    n_logits_max: usize,
    positions_max: usize,
    poisons: bool,
}

/// The activations of a step on the device, row-major `[rows_max, width]`; a step uses the first rows.
#[derive(Debug)]
pub(crate) struct Buffers<G: Gpu> {
    residual: Buffer<G, f32>,
    /// Also holds the rows of the head, `[max(rows_max, n_logits_max), hidden]`.
    normed: Buffer<G, f32>,
    q: Buffer<G, f32>,
    k: Buffer<G, f32>,
    v: Buffer<G, f32>,
    attended: Buffer<G, f32>,
    gate: Buffer<G, f32>,
    up: Buffer<G, f32>,
    gated: Buffer<G, f32>,
    /// What a block adds to the residual stream.
    projected: Buffer<G, f32>,
    /// `[n_logits_max, vocab]`.
    logits: Buffer<G, f32>,
    activations: Activations<G>,
    lora: LoraScratch<G>,
    attention: AttentionScratch<G>,
}

// === impl GpuRuntime ===

impl<G: Gpu> GpuRuntime<G> {
    /// Brings a model onto the device and takes all memory there.
    ///
    /// # Errors
    /// When a size is 0, `kv_bytes` is below one page, the model is not made for a GPU or does not fit it.
    pub fn new(gpu: G, base: &BaseModel, options: RuntimeOptions) -> Result<Self, RuntimeError> {
        supports(&base.info)?;
        let weights = DeviceWeights::upload(&gpu, &base.weights)?;
        Self::with_weights(gpu, base.info.clone(), weights, options)
    }

    /// As [`GpuRuntime::new`], with weights that are there already.
    ///
    /// # Errors
    /// As [`GpuRuntime::new`].
    pub fn with_weights(
        gpu: G,
        info: ModelInfo,
        weights: DeviceWeights<G>,
        options: RuntimeOptions,
    ) -> Result<Self, RuntimeError> {
        supports(&info)?;
        options.check()?;
        let RuntimeOptions { rows_max, kv_bytes, n_logits_max, poison_freed_pages, .. } = options;
        let layout = kv_layout(&info);
        let n_pages = n_pages(&layout, kv_bytes)?;
        let kv = DeviceKv::new(&gpu, layout, n_pages)?;
        let positions_max = info.context.min(n_pages.saturating_mul(PAGE_TOKENS));
        let rope = DeviceRope::new(&gpu, info.head_dim, positions_max, &rotary::inverse_frequencies(&info))?;
        let buffers = Buffers::new(&gpu, &info, &weights, rows_max, n_logits_max)?;
        Ok(Self {
            weights,
            kv,
            rope,
            adapters: Adapters::default(),
            lora: None,
            buffers,
            plan: Plan::default(),
            logits: gpu.allocate_host(n_logits_max * info.vocab)?,
            surplus: Vec::new(),
            rows_max,
            n_logits_max,
            positions_max,
            poisons: poison_freed_pages || cfg!(debug_assertions),
            info,
            gpu,
        })
    }

    /// Computes a checked step; the logits are in `self.logits` then, or in `self.surplus` if they are more.
    fn run(&mut self, plan: &Plan<'_>) -> Result<(), GpuError> {
        let gpu = &self.gpu;
        // 1. What the kernels have to know of the step: tokens, positions, pages, adapters.
        let tokens = TokenList::new(gpu, &plan.tokens)?;
        let rows = RowPlan::new(gpu, &plan.positions, &places(plan))?;
        let attention = AttentionPlan::new(gpu, &plan.runs, self.info.n_heads, &self.kv)?;
        let segments = self.adapters.of_step(gpu, &self.info, &plan.adapters)?;
        if !self.lora.as_ref().is_some_and(|lora| lora.is_for(&segments)) {
            self.lora = None;
            if !segments.is_empty() {
                self.lora = Some(LoraPlan::new(gpu, &segments)?);
            }
        }
        // 2. Tokens to the residual stream, and through the blocks.
        embed(gpu, self.weights.embed(), &tokens, &mut self.buffers.residual)?;
        let (lora, rope) = (self.lora.as_ref(), &self.rope);
        let pass =
            Pass { gpu, info: &self.info, n_rows: plan.tokens.len(), rope, rows: &rows, attention: &attention, lora };
        for (layer, block) in self.weights.layers.iter().enumerate() {
            pass.attention_block(layer, block, &mut self.kv, &mut self.buffers)?;
            pass.feed_forward_block(layer, block, &mut self.buffers)?;
        }
        // 3. The head, for the rows whose logits are wanted.
        self.head(&plan.logits_rows)
    }

    /// Final norm and output head, `n_logits_max` rows at a time.
    fn head(&mut self, wanted: &[usize]) -> Result<(), GpuError> {
        let (gpu, info, b) = (&self.gpu, &self.info, &mut self.buffers);
        let head = self.weights.head();
        let logits = if wanted.len() <= self.n_logits_max {
            self.surplus = Vec::new();
            &mut self.logits[..wanted.len() * info.vocab]
        } else {
            self.surplus.resize(wanted.len() * info.vocab, 0.0);
            &mut self.surplus[..]
        };
        let chunks = wanted.chunks(self.n_logits_max).zip(logits.chunks_mut(self.n_logits_max * info.vocab));
        for (rows, logits) in chunks {
            let list = RowList::new(gpu, &rows.iter().map(|&row| row as u32).collect::<Vec<_>>())?;
            // What the last block adds is still apart from the residual stream.
            let delta = Some(&b.projected);
            let codes = b.activations.in_passing(head.form(), info.hidden);
            rms_norm_of_rows(
                gpu,
                &mut b.residual,
                delta,
                &list,
                &self.weights.norm,
                info.rms_eps,
                &mut b.normed,
                codes,
            )?;
            b.activations.prepare(gpu, &[head.form()], &b.normed, rows.len(), info.hidden)?;
            products(gpu, &b.activations, rows.len(), &mut [(head, &mut b.logits)])?;
            b.logits.read(gpu, logits)?;
        }
        Ok(())
    }
}

impl<G> Forward for GpuRuntime<G>
where
    G: Gpu + Send,
    G::Memory: Send + Sync,
    G::Host: Send,
{
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
        self.info.vocab
    }

    fn forward(&mut self, step: &Step) -> &[f32] {
        let bounds = Bounds {
            rows_max: self.rows_max,
            positions_max: self.positions_max,
            n_pages: self.kv.n_pages(),
            page_tokens: PAGE_TOKENS,
            vocab: self.info.vocab,
            n_layers: self.info.n_layers,
        };
        let plan = Plan::new(step, &bounds, std::mem::take(&mut self.plan));
        if !plan.tokens.is_empty()
            && let Err(error) = self.run(&plan)
        {
            panic!("the GPU failed in a step of {} rows: {error}", plan.tokens.len());
        }
        let n_logits = plan.logits_rows.len();
        self.plan = plan.into_spare();
        if n_logits <= self.n_logits_max { &self.logits[..n_logits * self.info.vocab] } else { &self.surplus }
    }

    fn page_freed(&mut self, page: u32) {
        if self.poisons
            && let Err(error) = self.kv.poison(&self.gpu, page)
        {
            panic!("the GPU failed to clear page {page}: {error}");
        }
    }
}

/// Page and slot of every row.
fn places(plan: &Plan<'_>) -> Vec<(u32, u32)> {
    let rows = plan.runs.iter().flat_map(|run| {
        let positions = run.start..run.start + run.rows.len();
        positions.map(|position| (run.pages[position / PAGE_TOKENS], (position % PAGE_TOKENS) as u32))
    });
    rows.collect()
}

/// Whether a GPU can compute such a model, loaded with its numerics.
///
/// # Errors
/// Says what keeps it from that.
pub fn supports(info: &ModelInfo) -> Result<(), RuntimeError> {
    if info.numerics != Numerics::Gpu {
        return Err(RuntimeError::WantsCpu);
    }
    if !supports_head_dim(info.head_dim) {
        return Err(RuntimeError::Unfit { what: format!("heads of {}", info.head_dim) });
    }
    let odd = Linear::ALL.into_iter().find(|&linear| !info.linear_shape(linear).1.is_multiple_of(8));
    match odd {
        Some(linear) => {
            Err(RuntimeError::Unfit { what: format!("{} inputs of {linear:?}", info.linear_shape(linear).1) })
        }
        None => Ok(()),
    }
}

// === impl Buffers ===

impl<G: Gpu> Buffers<G> {
    fn new(
        gpu: &G,
        info: &ModelInfo,
        weights: &DeviceWeights<G>,
        rows_max: usize,
        n_logits_max: usize,
    ) -> Result<Self, GpuError> {
        let rows = |width: usize| Buffer::zeros(gpu, rows_max * width);
        let out = |linear: Linear| rows(info.linear_shape(linear).0);
        let widest = info.hidden.max(info.ffn).max(info.linear_shape(Linear::O).1);
        let tallest = rows_max.max(n_logits_max);
        let dense = weights.forms().any(|form| form == Form::Dense);
        let coded = weights.forms().any(|form| form != Form::Dense);
        Ok(Self {
            residual: rows(info.hidden)?,
            normed: Buffer::zeros(gpu, tallest * info.hidden)?,
            q: out(Linear::Q)?,
            k: out(Linear::K)?,
            v: out(Linear::V)?,
            attended: out(Linear::Q)?,
            gate: out(Linear::Gate)?,
            up: out(Linear::Up)?,
            gated: out(Linear::Up)?,
            projected: rows(info.hidden)?,
            logits: Buffer::zeros(gpu, n_logits_max * info.vocab)?,
            activations: Activations::new(gpu, tallest, widest, coded, dense)?,
            lora: LoraScratch::new(gpu)?,
            attention: AttentionScratch::new(gpu)?,
        })
    }
}
