//! The product in the shapes of SmolLM2-135M: one row (decoding), 4 and 16 (a batch), 64 and 256 (prefill), one
//! thread; the throughput column counts multiply-adds, so twice that is operations a second. `head` is the output
//! layer, which no cache holds.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kernels::matmul::{Precision, Scratch, matmul};
use kernels::matrix::{BlockType, Matrix};
use kernels::pool::Pool;

fn matrix(kind: BlockType, n_out: usize, n_in: usize) -> Matrix {
    let mut bytes: Vec<u8> =
        (0..n_out * n_in / kind.block_len() * kind.block_bytes()).map(|i| (i * 37 % 251) as u8).collect();
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        // Scale (and minimum) 2^-6: any finite number will do.
        block[..2].copy_from_slice(&[0, 0x24]);
        if kind == BlockType::Q4_1 {
            block[2..4].copy_from_slice(&[0, 0xa4]);
        }
    }
    Matrix::from_blocks(n_out, n_in, kind, &bytes, None).expect("sizes fit")
}

fn products(c: &mut Criterion) {
    let pool = Pool::new(1);
    let shapes = [("gate", 1536, 576), ("down", 576, 1536), ("head", 49152, 576)];
    for (name, n_out, n_in) in shapes {
        for kind in [BlockType::Q4_1, BlockType::Q8_0] {
            let w = matrix(kind, n_out, n_in);
            for precision in [Precision::Int8, Precision::F32] {
                let mut group = c.benchmark_group(format!("matmul/{name}/{kind:?}/{precision:?}"));
                for n_rows in [1, 4, 16, 64, 256] {
                    if name == "head" && n_rows > 16 {
                        continue;
                    }
                    let x: Vec<f32> = (0..n_rows * n_in).map(|i| (i % 97) as f32 / 48.0 - 1.0).collect();
                    let mut out = vec![0.0; n_rows * n_out];
                    let mut scratch = Scratch::default();
                    group.throughput(Throughput::Elements((n_rows * n_out * n_in) as u64));
                    group.bench_function(BenchmarkId::from_parameter(n_rows), |b| {
                        b.iter(|| matmul(&pool, precision, &x, n_rows, &w, &mut out, &mut scratch));
                    });
                }
            }
        }
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).measurement_time(std::time::Duration::from_millis(400))
        .warm_up_time(std::time::Duration::from_millis(100));
    targets = products
}
criterion_main!(benches);
