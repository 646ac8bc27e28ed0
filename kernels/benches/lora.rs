//! The adapter delta at the gate layer of SmolLM2-135M: 16 rows with 16 adapters (the mixed batch), 16 rows with one,
//! and a prefill chunk; one thread. Throughput counts multiply-adds.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::lora::{LoraDtype, LoraPair, Scratch, Segment, lora_delta};
use kernels::pool::Pool;

const N_IN: usize = 576;
const N_OUT: usize = 1536;

fn pair(rank: usize) -> LoraPair {
    let values = |n: usize| (0..n).map(|i| (i % 83) as f32 / 256.0).collect::<Vec<_>>();
    let (a, b) = (values(rank * N_IN), values(rank * N_OUT));
    LoraPair::new(rank, N_IN, N_OUT, &a, &b, 2.0, LoraDtype::F16, None).expect("sizes fit")
}

fn deltas(c: &mut Criterion) {
    let pool = Pool::new(1);
    let mut group = c.benchmark_group("lora_delta");
    for rank in [4, 16, 64] {
        let pairs: Vec<LoraPair> = (0..16).map(|_| pair(rank)).collect();
        for (name, n_rows, rows_each) in [("16x1", 16, 1), ("1x16", 16, 16), ("1x256", 256, 256)] {
            let segments: Vec<_> = (0..n_rows / rows_each)
                .map(|i| Segment { rows: i * rows_each..(i + 1) * rows_each, pair: &pairs[i] })
                .collect();
            let x: Vec<f32> = (0..n_rows * N_IN).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
            let mut y = vec![0.0; n_rows * N_OUT];
            let mut scratch = Scratch::default();
            group.throughput(Throughput::Elements((n_rows * rank * (N_IN + N_OUT)) as u64));
            group.bench_function(BenchmarkId::new(name, rank), |b| {
                b.iter(|| lora_delta(&pool, &segments, &x, N_IN, &mut y, N_OUT, &mut scratch));
            });
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_millis(400))
        .warm_up_time(std::time::Duration::from_millis(100));
    targets = deltas
}
criterion_main!(benches);
