//! Tokens per second of the forward pass on a GPU, without scheduler and HTTP: a model file, or weights that mean nothing in
//! the shape of Llama 3.1 8B.
//!
//! ```text
//! cargo run --release -p model --features cuda --example gpu_speed -- <model file | 8b-q4k | 8b-q8 | 8b-f16> [context]
//! ```
//!
//! A line is the median of several steps, all work of the host and the copy of the logits included. Different streams
//! have different pages; adapters have rank 16 on all seven linear layers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kernels::cuda::device::Device;
use kernels::cuda::matmul::Form;
use kernels::lora::{LoraDtype, LoraPair};
use model::adapter::LoraAdapter;
use model::base::BaseModel;
use model::forward::{RuntimeOptions, kv_layout};
use model::gpu::{DeviceWeights, GpuRuntime};
use model::info::{Family, Linear, ModelInfo, Numerics, RopeScaling};
use model::step::{Forward, Run, Step};
use shared::clock::{Clock, SystemClock};
use shared::hash::ContentHash;

/// Rows per prefill step.
const CHUNK: usize = 512;
const RANK: usize = 16;
const BATCH_MAX: usize = 64;
const N_STEPS: usize = 15;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let name = arguments.first().expect("usage: gpu_speed <model file | 8b-q4k | 8b-q8 | 8b-f16> [context]");
    let context = arguments.get(1).map_or(1024, |text| text.parse().expect("context"));
    let clock = SystemClock;
    let start = clock.now();
    let mut bench = Bench::new(name, context);
    println!("{name} loaded in {:.1} s; decoding at {context} positions", (clock.now() - start).as_secs_f64());
    for n_adapters in [0, 1, 8, 16, 64] {
        if n_adapters > 1 && arguments.iter().any(|word| word == "few") {
            continue;
        }
        bench.make_adapters(n_adapters);
        let first = clock.now();
        bench.decode(n_adapters.max(1), n_adapters, 1);
        let first = clock.now() - first;
        println!("{n_adapters:2} adapters: first step with them {:7.1} ms", first.as_secs_f64() * 1e3);
        for n in [1, 8, 16, 32, 64] {
            if n < n_adapters {
                continue;
            }
            let step = bench.decode(n, n_adapters, N_STEPS);
            let per_s = n as f64 / step.as_secs_f64();
            println!(
                "{n_adapters:2} adapters, {n:2} rows: {:8.3} ms a step, {per_s:7.0} tok/s",
                step.as_secs_f64() * 1e3
            );
        }
        let step = bench.prefill(n_adapters);
        let per_s = CHUNK as f64 / step.as_secs_f64();
        println!("{n_adapters:2} adapters, prefill of {CHUNK}: {:8.3} ms, {per_s:7.0} tok/s", step.as_secs_f64() * 1e3);
    }
}

struct Bench {
    runtime: GpuRuntime<Device>,
    info: ModelInfo,
    adapters: Vec<Arc<LoraAdapter>>,
    clock: SystemClock,
    context: usize,
}

impl Bench {
    fn new(name: &str, context: usize) -> Self {
        let gpu = Device::new(0).expect("a GPU");
        println!("{}", gpu.describe());
        let form = match name {
            "8b-q4k" => Some(Form::N4),
            "8b-q8" => Some(Form::Z8),
            "8b-f16" => Some(Form::Dense),
            _ => None,
        };
        let options = |info: &ModelInfo| RuntimeOptions {
            threads: 1,
            rows_max: CHUNK,
            kv_bytes: kv_layout(info).bytes_per_page() * (BATCH_MAX * (context + 16)).div_ceil(16).max(CHUNK / 16),
            n_logits_max: BATCH_MAX,
            poison_freed_pages: false,
        };
        let (info, runtime) = match form {
            Some(form) => {
                let info = llama_8b();
                let weights = DeviceWeights::random(&gpu, &info, form).expect("room for the weights");
                println!("{:.2} GB of weights", weights.bytes() as f64 / 1e9);
                (info.clone(), GpuRuntime::with_weights(gpu, info.clone(), weights, options(&info)))
            }
            None => {
                let base = BaseModel::load(Path::new(name), Numerics::Gpu).expect("load the model");
                (base.info.clone(), GpuRuntime::new(gpu, &base, options(&base.info)))
            }
        };
        Self { runtime: runtime.expect("a runtime"), info, adapters: Vec::new(), clock: SystemClock, context }
    }

    /// Makes adapters until there are `n`, on all cores.
    fn make_adapters(&mut self, n: usize) {
        let info = &self.info;
        let made: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (self.adapters.len()..n)
                .map(|seed| scope.spawn(move || Arc::new(random_adapter(info, seed))))
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("an adapter")).collect()
        });
        self.adapters.extend(made);
    }

    fn adapter(&self, n_adapters: usize, place: usize) -> Option<Arc<LoraAdapter>> {
        (n_adapters > 0).then(|| self.adapters[place % n_adapters].clone())
    }

    /// The median time of a step with one row each for `n` sequences.
    fn decode(&mut self, n: usize, n_adapters: usize, n_steps: usize) -> Duration {
        let pages_each = (self.context + 1).div_ceil(self.runtime.page_tokens()) as u32;
        let runs = (0..n).map(|place| Run {
            tokens: vec![2000 + place as u32],
            start: self.context,
            pages: (0..pages_each).map(|page| place as u32 * pages_each + page).collect(),
            adapter: self.adapter(n_adapters, place * n_adapters / n),
            logits: vec![0],
        });
        let step = Step { runs: runs.collect() };
        self.median(&step, n_steps)
    }

    /// The median time of a chunk of one prompt.
    fn prefill(&mut self, n_adapters: usize) -> Duration {
        let run = Run {
            tokens: (0..CHUNK).map(|i| (1000 + 7 * i) as u32).collect(),
            start: 0,
            pages: (0..(CHUNK / 16) as u32).collect(),
            adapter: self.adapter(n_adapters, 0),
            logits: vec![CHUNK - 1],
        };
        self.median(&Step { runs: vec![run] }, 5)
    }

    fn median(&mut self, step: &Step, n_steps: usize) -> Duration {
        let mut times: Vec<Duration> = (0..n_steps)
            .map(|_| {
                let start = self.clock.now();
                let logits = self.runtime.forward(step);
                let time = self.clock.now() - start;
                assert!(logits.iter().all(|logit| logit.is_finite()), "a logit is not a number");
                time
            })
            .collect();
        times.sort();
        times[times.len() / 2]
    }
}

fn llama_8b() -> ModelInfo {
    ModelInfo {
        hash: ContentHash([0; 32]),
        family: Family::Llama,
        n_layers: 32,
        hidden: 4096,
        n_heads: 32,
        n_kv_heads: 8,
        head_dim: 128,
        ffn: 14_336,
        vocab: 128_256,
        context: 8192,
        rms_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: RopeScaling::None,
        bos: None,
        add_bos: false,
        eos: vec![2],
        numerics: Numerics::Gpu,
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
