//! The regression gate for speed: how much faster a step is than the same multiply-adds in a plain loop, timed in
//! the same process, and what it costs in relation to other steps.
//!
//! Never wall time: one compute thread, and its CPU time as the system counts it, so that a busy machine changes
//! neither side. All kinds take turns and the least of several rounds counts. Limits lie a quarter below what was
//! measured when they were set; whoever makes a kernel slower in one shape meets them, whoever makes it faster
//! raises them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::backend::Backend;
use model::adapter::{self, AdapterFiles, AdapterLimits, LoraAdapter};
use model::base::BaseModel;
use model::forward::{Runtime, RuntimeOptions, kv_layout};
use model::info::Numerics;
use model::step::{Forward, Run, Step};
use shared::hash::ContentHash;

/// Positions before each decoded row.
const CONTEXT: usize = 128;
const N_STREAMS: usize = 16;
const PREFILL_ROWS: usize = 256;
/// CPU time that one measurement takes at least. The counter moves with the scheduler's tick (1 to 10 ms).
const MEASURED_NS: u64 = 150_000_000;
const ROUNDS: usize = 3;
/// Billions of multiply-adds for one row: all linear products of the layers, and of the vocabulary.
const LAYERS_G: f64 = 0.1062;
const HEAD_G: f64 = 0.0283;
/// How much faster than the plain loop each kind must be, in the order of the test.
const FASTER_LEAST: [f64; 5] = [2.5, 7.7, 7.4, 6.1, 12.0];

/// CPU time of this thread so far, in nanoseconds.
fn cpu_ns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux counts CPU time per thread");
    text.split_whitespace().next().and_then(|ns| ns.parse().ok()).expect("the first field is CPU time")
}

/// The model that scripts/fetch-model gets.
fn model_file() -> PathBuf {
    let cached = || Path::new(&std::env::var_os("HOME").expect("HOME is set")).join(".cache/tenantry");
    let path = std::env::var_os("TENANTRY_MODEL")
        .map_or_else(|| cached().join("SmolLM2-135M-Instruct.Q4_1.gguf"), PathBuf::from);
    assert!(path.is_file(), "no model at {}; hint: run scripts/fetch-model", path.display());
    path
}

/// The same weights under 16 names, each in memory of its own.
fn adapters(base: &BaseModel) -> Vec<Arc<LoraAdapter>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/adapters/pixelforge-games");
    let read = |name: &str| std::fs::read(folder.join(name)).expect("a file of the test data");
    let files = AdapterFiles::Peft { config: read("adapter_config.json"), weights: read("adapter_model.safetensors") };
    let pack = |name: usize| {
        let checked = adapter::check(&files, &base.info, &AdapterLimits::default()).expect("a valid adapter");
        Arc::new(checked.pack(ContentHash([name as u8; 32]), &base.weights).expect("an adapter that fits"))
    };
    (0..N_STREAMS).map(pack).collect()
}

struct Gate {
    runtime: Runtime,
    adapters: Vec<Arc<LoraAdapter>>,
}

impl Gate {
    fn new() -> Self {
        let base = Arc::new(BaseModel::load(&model_file(), Numerics::Fast).expect("the real model"));
        let pages = N_STREAMS * PREFILL_ROWS.div_ceil(kernels::kv::PAGE_TOKENS);
        let options = RuntimeOptions {
            threads: 1,
            rows_max: PREFILL_ROWS,
            kv_bytes: pages * kv_layout(&base.info).bytes_per_page(),
            n_logits_max: N_STREAMS,
            poison_freed_pages: false,
        };
        let adapters = adapters(&base);
        Self { runtime: Runtime::new(base, options).expect("a runtime"), adapters }
    }

    /// `n` streams with `rows` tokens each after `start`; stream i has adapter i modulo `n_adapters`.
    fn step(&self, n: usize, rows: usize, start: usize, n_adapters: usize) -> Step {
        let pages_each = (start + rows).div_ceil(self.runtime.page_tokens()) as u32;
        let run = |place: usize| Run {
            tokens: (0..rows).map(|row| (1000 + 7 * row + place) as u32).collect(),
            start,
            pages: (0..pages_each).map(|page| place as u32 * pages_each + page).collect(),
            adapter: (n_adapters > 0).then(|| self.adapters[place % n_adapters].clone()),
            logits: vec![rows - 1],
        };
        Step { runs: (0..n).map(run).collect() }
    }

    /// CPU seconds of one step.
    fn cost(&mut self, step: &Step) -> f64 {
        self.runtime.forward(step);
        let start = cpu_ns();
        let mut n_steps = 0;
        while cpu_ns() - start < MEASURED_NS {
            std::hint::black_box(self.runtime.forward(step));
            n_steps += 1;
        }
        (cpu_ns() - start) as f64 / 1e9 / f64::from(n_steps)
    }
}

/// CPU seconds of a billion multiply-adds in the plainest loop: f32, out of the cache, vectorised by the compiler
/// alone for any x86-64.
fn plain_loop() -> f64 {
    const N: usize = 1 << 14;
    let (weights, x) = (vec![0.5_f32; 4 * N], vec![0.25_f32; N]);
    let (start, mut n_rows) = (cpu_ns(), 0);
    while cpu_ns() - start < MEASURED_NS {
        for row in std::hint::black_box(&weights).chunks_exact(N) {
            let mut sums = [0.0_f32; 16];
            for (w, x) in row.chunks_exact(16).zip(x.chunks_exact(16)) {
                for lane in 0..16 {
                    sums[lane] += w[lane] * x[lane];
                }
            }
            std::hint::black_box(sums);
            n_rows += 1;
        }
    }
    (cpu_ns() - start) as f64 / (n_rows * N) as f64
}

#[test]
fn steps_are_as_much_faster_than_a_plain_loop_as_they_were() {
    let mut gate = Gate::new();
    let kinds = [
        ("one row", gate.step(1, 1, CONTEXT, 0)),
        ("16 rows", gate.step(N_STREAMS, 1, CONTEXT, 0)),
        ("16 rows of one adapter", gate.step(N_STREAMS, 1, CONTEXT, 1)),
        ("16 rows of 16 adapters", gate.step(N_STREAMS, 1, CONTEXT, N_STREAMS)),
        ("256 rows of a prompt", gate.step(1, PREFILL_ROWS, 0, 0)),
    ];
    let (mut plain, mut costs) = (f64::MAX, [f64::MAX; 5]);
    for _ in 0..ROUNDS {
        plain = plain.min(plain_loop());
        for (least, (_, step)) in costs.iter_mut().zip(&kinds) {
            *least = least.min(gate.cost(step));
        }
    }
    println!("{}; a billion multiply-adds in a plain loop: {plain:.4} s", kernels::backend::describe());
    for ((name, step), (cost, least)) in kinds.iter().zip(costs.into_iter().zip(FASTER_LEAST)) {
        let billions = step.n_rows() as f64 * LAYERS_G + step.n_logits() as f64 * HEAD_G;
        let faster = billions * plain / cost;
        println!("{name}: {:.2} ms, {faster:.2} times faster than the loop, at least {least}", cost * 1e3);
        // The limits are those of the fastest backend; others print and pass.
        assert!(faster >= least || kernels::backend::active() != Backend::Avx512, "{name}: {faster:.2}, not {least}");
    }
    let [one, base, _, mixed, _] = costs;
    // A kernel that reads the weights once per row shows 16, one that runs adapters one after the other 2 and more.
    assert!(base / one <= 8.0, "16 rows cost {:.2} times one", base / one);
    assert!(mixed / base <= 2.0, "16 rows of 16 adapters cost {:.2} times 16 of the base", mixed / base);
}
