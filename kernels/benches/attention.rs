//! Attention in the shape of SmolLM2-135M (9 heads on 3 of width 64): 16 decoding rows and one prefill chunk of 64, at
//! several contexts; one thread. Throughput counts multiply-adds of scores and mixes.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::attention::{AttnRun, Scratch, attention};
use kernels::kv::{KvDtype, KvLayout, KvPool, PAGE_TOKENS};
use kernels::pool::Pool;

fn attend(c: &mut Criterion) {
    let pool = Pool::new(1);
    for dtype in [KvDtype::F16, KvDtype::F32] {
        let layout = KvLayout { n_layers: 1, n_kv_heads: 3, head_dim: 64, page_tokens: PAGE_TOKENS, dtype };
        let kv = KvPool::new(layout, 1024);
        let pages: Vec<u32> = (0..1024).collect();
        let mut group = c.benchmark_group(format!("attention/{dtype:?}"));
        for context in [128, 1024] {
            for (name, n_runs, n_rows) in [("decode16", 16, 1), ("prefill64", 1, 64)] {
                let runs: Vec<_> = (0..n_runs)
                    .map(|i| AttnRun {
                        rows: i * n_rows..(i + 1) * n_rows,
                        start: context - n_rows,
                        pages: &pages[i * 64..(i + 1) * 64],
                    })
                    .collect();
                let q: Vec<f32> = (0..n_runs * n_rows * 576).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
                let mut out = vec![0.0; q.len()];
                let mut scratch = Scratch::default();
                group.throughput(Throughput::Elements((n_runs * n_rows * (context - n_rows / 2) * 576 * 2) as u64));
                group.bench_function(BenchmarkId::new(name, context), |b| {
                    b.iter(|| attention(&pool, &q, 9, &runs, &kv, 0, 0.125, &mut out, &mut scratch));
                });
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_millis(400))
        .warm_up_time(std::time::Duration::from_millis(100));
    targets = attend
}
criterion_main!(benches);
