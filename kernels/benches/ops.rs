//! The row operations at 16 rows of SmolLM2-135M, one thread; throughput counts values.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kernels::ops::{RopeTable, add_in_place, max_and_argmax, rms_norm, rope, swiglu};
use kernels::pool::Pool;

fn row_operations(c: &mut Criterion) {
    let pool = Pool::new(1);
    let values = |n: usize| (0..n).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect::<Vec<_>>();
    let mut group = c.benchmark_group("ops");
    let (x, w, mut out) = (values(16 * 576), values(576), values(16 * 576));
    group.throughput(Throughput::Elements(16 * 576));
    group.bench_function("rms_norm", |b| b.iter(|| rms_norm(&pool, &x, 16, &w, 1e-5, &mut out)));
    let table = RopeTable::new(64, 2048, &[0.01; 32]);
    let positions: Vec<u32> = (100..116).collect();
    group.bench_function("rope", |b| b.iter(|| rope(&pool, &mut out, 16, 9, 64, &positions, &table)));
    group.bench_function("add_in_place", |b| b.iter(|| add_in_place(&pool, &mut out, &x)));
    let (gate, up, mut out) = (values(16 * 1536), values(16 * 1536), values(16 * 1536));
    group.throughput(Throughput::Elements(16 * 1536));
    group.bench_function("swiglu", |b| b.iter(|| swiglu(&pool, &gate, &up, &mut out)));
    let logits = values(49152);
    group.throughput(Throughput::Elements(49152));
    group.bench_function("max_and_argmax", |b| b.iter(|| max_and_argmax(&logits)));
}

fn forks(c: &mut Criterion) {
    let pool = Pool::new(2);
    c.bench_function("pool/fork_join_2_threads", |b| b.iter(|| pool.run(2, &|_| {})));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_millis(400))
        .warm_up_time(std::time::Duration::from_millis(100));
    targets = row_operations, forks
}
criterion_main!(benches);
