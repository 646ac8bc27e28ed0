//! A forward step takes nothing from the heap once its buffers have grown: the heap is the one place where the engine
//! thread could meet a lock or the system. Counted over all threads by an allocator that counts, so this test has a
//! process to itself.

use std::alloc::System;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::lora::{LoraDtype, LoraPair};
use model::adapter::LoraAdapter;
use model::base::BaseModel;
use model::forward::{Runtime, RuntimeOptions, kv_layout};
use model::info::{Linear, ModelInfo, Numerics};
use model::step::{Forward, Run, Step};
use shared::hash::ContentHash;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const ROWS_MAX: usize = 64;
const PAGES_EACH: u32 = 8;
const N_STREAMS: usize = 8;

/// The model that scripts/fetch-model gets.
fn model_file() -> PathBuf {
    let cached = || Path::new(&std::env::var_os("HOME").expect("HOME is set")).join(".cache/tenantry");
    let path = std::env::var_os("TENANTRY_MODEL")
        .map_or_else(|| cached().join("SmolLM2-135M-Instruct.Q4_1.gguf"), PathBuf::from);
    assert!(path.is_file(), "no model at {}; hint: run scripts/fetch-model", path.display());
    path
}

fn adapter(info: &ModelInfo, rank: usize) -> Arc<LoraAdapter> {
    let pair = |linear: Linear| {
        let (n_out, n_in) = info.linear_shape(linear);
        let (a, b) = (vec![0.01; rank * n_in], vec![0.01; n_out * rank]);
        LoraPair::new(rank, n_in, n_out, &a, &b, 1.0, LoraDtype::F16, None).expect("a valid pair")
    };
    let layers: Vec<[Option<LoraPair>; 7]> =
        (0..info.n_layers).map(|_| Linear::ALL.map(|linear| Some(pair(linear)))).collect();
    let bytes = layers.iter().flatten().flatten().map(LoraPair::bytes).sum();
    Arc::new(LoraAdapter { hash: ContentHash([rank as u8; 32]), layers, rank_max: rank, bytes })
}

/// A stream's tokens after `start`, with an adapter for every other stream.
fn run(stream: usize, start: usize, n: usize, adapters: &[Arc<LoraAdapter>]) -> Run {
    let first = stream as u32 * PAGES_EACH;
    let adapter = (stream % 2 == 1).then(|| adapters[stream / 2 % adapters.len()].clone());
    let tokens = (0..n).map(|i| (1000 + 7 * i + stream) as u32).collect();
    Run { tokens, start, pages: (first..first + PAGES_EACH).collect(), adapter, logits: vec![n - 1] }
}

#[test]
fn a_forward_step_allocates_nothing_once_its_buffers_have_grown() {
    for numerics in [Numerics::Fast, Numerics::Exact] {
        let base = Arc::new(BaseModel::load(&model_file(), numerics).expect("the real model"));
        let adapters = [4, 16, 40].map(|rank| adapter(&base.info, rank));
        let options = RuntimeOptions {
            threads: 2,
            rows_max: ROWS_MAX,
            kv_bytes: N_STREAMS * PAGES_EACH as usize * kv_layout(&base.info).bytes_per_page(),
            n_logits_max: N_STREAMS,
            poison_freed_pages: false,
        };
        let mut runtime = Runtime::new(base, options).expect("a runtime");
        let decoding = |start: usize| (0..N_STREAMS).map(move |stream| (stream, start, 1));
        let prompts = [(0, 0, 20), (1, 0, 20), (2, 0, 17)];
        let mixed = [(0, 20, 1), (1, 20, 1), (3, 0, 48)];
        let steps: Vec<Step> = [prompts.to_vec(), mixed.to_vec(), decoding(100).collect(), vec![(5, 64, 1)]]
            .into_iter()
            .map(|runs| Step { runs: runs.into_iter().map(|(s, start, n)| run(s, start, n, &adapters)).collect() })
            .collect();
        // Every buffer meets its largest step.
        for step in &steps {
            runtime.forward(step);
        }
        let region = Region::new(ALLOCATOR);
        for _ in 0..3 {
            for step in &steps {
                assert!(runtime.forward(step).iter().all(|logit| logit.is_finite()));
            }
        }
        let change = region.change();
        assert_eq!((change.allocations, change.reallocations, change.deallocations), (0, 0, 0), "{numerics:?}");
    }
}
