//! Tokens per second of the forward pass alone, without scheduler and HTTP: prefill and decode, base and with 16
//! different adapters, exact and fast numerics.
//!
//! ```text
//! cargo run --release -p model --example speed -- <model file> [threads] [exact|fast|both] [context]
//! ```
//!
//! Each line is the best of several steps (the machine may be shared); decode runs at the given context length.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kernels::lora::{LoraDtype, LoraPair};
use model::adapter::LoraAdapter;
use model::base::BaseModel;
use model::forward::{Runtime, RuntimeOptions};
use model::info::{Linear, ModelInfo, Numerics};
use model::step::{Forward, Run, Step};
use shared::clock::{Clock, SystemClock};
use shared::hash::ContentHash;

/// Rows per prefill step, as a scheduler would cut it.
const CHUNK: usize = 256;
/// Rank of the random adapters, on all seven linear layers.
const RANK: usize = 16;
const N_ADAPTERS: usize = 16;
const BATCH_MAX: usize = 32;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let path = arguments.first().expect("usage: speed <model file> [threads] [exact|fast|both] [context]");
    let threads = arguments.get(1).map_or(2, |text| text.parse().expect("threads"));
    let which = arguments.get(2).map_or("both", String::as_str);
    let context = arguments.get(3).map_or(128, |text| text.parse().expect("context"));
    println!("kernels: {}; {threads} threads; decode at {context} positions", kernels::backend::describe());
    for numerics in [Numerics::Fast, Numerics::Exact] {
        let name = if numerics == Numerics::Fast { "fast" } else { "exact" };
        if which != "both" && which != name {
            continue;
        }
        let mut bench = Bench::new(Path::new(path), numerics, threads, context);
        for adapters in [0, 1, N_ADAPTERS] {
            let prefill = [256, 1024].map(|n| bench.prefill(n, adapters));
            let decode = [1, 4, 16, 32].map(|n| bench.decode(n, adapters));
            println!(
                "{name:5} {adapters:2} adapters | prefill 256: {:6.0}, 1024: {:6.0} tok/s | \
                 decode at batch 1: {:5.0}, 4: {:5.0}, 16: {:5.0}, 32: {:5.0} tok/s",
                prefill[0], prefill[1], decode[0], decode[1], decode[2], decode[3]
            );
        }
    }
}

struct Bench {
    runtime: Runtime,
    adapters: Vec<Arc<LoraAdapter>>,
    clock: SystemClock,
    context: usize,
}

impl Bench {
    fn new(path: &Path, numerics: Numerics, threads: usize, context: usize) -> Self {
        let base = Arc::new(BaseModel::load(path, numerics).expect("load the model"));
        let info = base.info.clone();
        let positions = (BATCH_MAX * (context + 64)).max(2048);
        let scalar_bytes = if numerics == Numerics::Exact { 4 } else { 2 };
        let kv_bytes = positions * info.n_layers * info.n_kv_heads * info.head_dim * 2 * scalar_bytes;
        let options =
            RuntimeOptions { threads, rows_max: CHUNK, kv_bytes, n_logits_max: 32, poison_freed_pages: false };
        let runtime = Runtime::new(base, options).expect("make a runtime");
        let adapters = (0..N_ADAPTERS).map(|seed| Arc::new(random_adapter(&info, seed))).collect();
        Self { runtime, adapters, clock: SystemClock, context }
    }

    fn adapter(&self, n_adapters: usize, place: usize) -> Option<Arc<LoraAdapter>> {
        (n_adapters > 0).then(|| self.adapters[place % n_adapters].clone())
    }

    /// Tokens per second over a prompt of `n` tokens; only the last row has logits. With several adapters, the
    /// rows of each step belong to that many prompts.
    fn prefill(&mut self, n: usize, n_adapters: usize) -> f64 {
        let n_prompts = n_adapters.max(1);
        let each = n / n_prompts;
        let pages_each = each.div_ceil(self.runtime.page_tokens()) as u32;
        let chunk = (CHUNK / n_prompts).min(each);
        let best = (0..2).map(|_| {
            (0..each / chunk)
                .map(|part| {
                    let runs = (0..n_prompts).map(|place| Run {
                        tokens: (0..chunk).map(|i| (1000 + 7 * i + place) as u32).collect(),
                        start: part * chunk,
                        pages: (0..pages_each).map(|page| place as u32 * pages_each + page).collect(),
                        adapter: self.adapter(n_adapters, place),
                        logits: vec![chunk - 1],
                    });
                    let step = Step { runs: runs.collect() };
                    self.timed(&step)
                })
                .sum::<Duration>()
        });
        let best = best.min().expect("two rounds");
        n as f64 / best.as_secs_f64()
    }

    /// Tokens per second with one row each for `n` sequences.
    fn decode(&mut self, n: usize, n_adapters: usize) -> f64 {
        let pages_each = (self.context + 1).div_ceil(self.runtime.page_tokens()) as u32;
        let runs = (0..n).map(|place| Run {
            tokens: vec![2000 + place as u32],
            start: self.context,
            pages: (0..pages_each).map(|page| place as u32 * pages_each + page).collect(),
            adapter: self.adapter(n_adapters, place),
            logits: vec![0],
        });
        let step = Step { runs: runs.collect() };
        let best = (0..12).map(|_| self.timed(&step)).min().expect("twelve rounds");
        n as f64 / best.as_secs_f64()
    }

    fn timed(&mut self, step: &Step) -> Duration {
        let start = self.clock.now();
        std::hint::black_box(self.runtime.forward(step));
        self.clock.now() - start
    }
}

/// Random values of a plausible size; their meaning does not matter for speed.
fn random_adapter(info: &ModelInfo, seed: usize) -> LoraAdapter {
    let mut state = seed as u32 + 1;
    let mut values = |n: usize| -> Vec<f32> {
        (0..n)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.02
            })
            .collect()
    };
    let layers: Vec<[Option<LoraPair>; 7]> = (0..info.n_layers)
        .map(|_| {
            Linear::ALL.map(|linear| {
                let (n_out, n_in) = info.linear_shape(linear);
                let (a, b) = (values(RANK * n_in), values(n_out * RANK));
                Some(LoraPair::new(RANK, n_in, n_out, &a, &b, 1.0, LoraDtype::F16, None).expect("a valid pair"))
            })
        })
        .collect();
    let bytes = layers.iter().flatten().flatten().map(LoraPair::bytes).sum();
    LoraAdapter { hash: ContentHash([seed as u8; 32]), layers, rank_max: RANK, bytes }
}
