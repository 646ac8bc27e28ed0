//! How near the kernels come to this machine: read bandwidth, int8 and f32 peak are probed first, in the same run, then
//! each kernel is timed in the shapes of SmolLM2-135M and shown as a fraction of the limit that binds it.
//!
//! ```text
//! cargo run --release -p kernels --example limits -- [threads] [avx2|avx2-vnni|avx512]
//! ```
//!
//! `cargo bench --bench limits` runs it too.
//!
//! One row is held against the bandwidth of memory, with weights in rotation so that no cache holds them; more rows
//! against the int8 peak, attention and adapters with one row each against both. The best of several rounds counts,
//! because the machine may be shared.

use criterion::measurement::{Measurement, WallTime};
use kernels::attention::{self, AttnRun, attention};
use kernels::backend::{self, Backend};
use kernels::kv::{KvDtype, KvLayout, KvPool, PAGE_TOKENS};
use kernels::lora::{self, LoraDtype, LoraPair, Segment, lora_delta};
use kernels::matmul::{self, Precision, matmul};
use kernels::matrix::{BlockType, Matrix};
use kernels::ops;
use kernels::peak;
use kernels::pool::Pool;

/// Bytes in rotation: several times the largest L3 cache of the machines this was written on.
const COLD_BYTES: usize = 128 << 20;
const ROUNDS: usize = 7;

pub(crate) fn main() {
    // Cargo gives benches options of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with("--")).collect();
    let threads = arguments.first().map_or(2, |text| text.parse().expect("threads"));
    let chosen = match arguments.get(1).map(String::as_str) {
        None => backend::detect(),
        Some("avx2") => Backend::Avx2,
        Some("avx2-vnni") => Backend::Avx2Vnni,
        Some("avx512") => Backend::Avx512,
        Some(other) => panic!("no backend is called {other}"),
    };
    let limits = Limits::probe(threads);
    let _forced = backend::force(chosen);
    println!("{}; {threads} threads", backend::describe());
    println!(
        "limits: read {:.1} GB/s from memory, int8 {:.0} GOP/s, f32 {:.0} GFLOP/s",
        limits.bandwidth / 1e9,
        limits.int8 / 1e9,
        limits.f32 / 1e9
    );
    let pool = Pool::new(threads);
    println!("fork and join: {:.2} µs", 1e6 * seconds(1000, || pool.run(threads, &|_| {})) / 1000.0);
    products(&pool, &limits);
    adapters(&pool, &limits);
    attentions(&pool, &limits);
    rows(&pool, &limits);
}

/// What the machine can do with these threads, per second.
struct Limits {
    bandwidth: f64,
    int8: f64,
    f32: f64,
}

// === impl Limits ===

impl Limits {
    fn probe(threads: usize) -> Self {
        let pool = Pool::new(threads);
        let data = vec![1u8; COLD_BYTES];
        let part = COLD_BYTES / threads;
        let read = seconds(1, || pool.run(threads, &|i| peak::read(&data[i * part..][..part])));
        const STEPS: usize = 1_000_000;
        let int8 = seconds(1, || pool.run(threads, &|_| peak::int8(STEPS)));
        let f32 = seconds(1, || pool.run(threads, &|_| peak::f32(STEPS)));
        let per_second = |each: usize, seconds: f64| (STEPS * threads * each) as f64 / seconds;
        Self {
            bandwidth: COLD_BYTES as f64 / read,
            int8: per_second(peak::INT8_OPERATIONS_PER_STEP, int8),
            f32: per_second(peak::F32_OPERATIONS_PER_STEP, f32),
        }
    }

    fn show(&self, name: &str, seconds: f64, bytes: f64, int8: f64, f32: f64) {
        let bound = bytes / self.bandwidth + int8 / self.int8 + f32 / self.f32;
        println!("{name:44} {:9.1} µs, {:4.0} % of the limit", seconds * 1e6, 100.0 * bound / seconds);
    }
}

/// Shortest of several rounds of `n` calls, after one that warms up.
fn seconds(n: usize, mut f: impl FnMut()) -> f64 {
    f();
    let round = |f: &mut dyn FnMut()| {
        let start = WallTime.start();
        for _ in 0..n {
            f();
        }
        WallTime.end(start).as_secs_f64()
    };
    (0..ROUNDS).map(|_| round(&mut f)).fold(f64::MAX, f64::min)
}

fn noise(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 2_654_435_761) % 1009) as f32 / 504.0 - 1.0).collect()
}

fn matrix(kind: BlockType, n_out: usize, n_in: usize) -> Matrix {
    let n = n_out * n_in / kind.block_len() * kind.block_bytes();
    // Every byte below 0x3c: any two of them are a finite f16.
    let bytes: Vec<u8> = (0..n).map(|i| (i * 37 % 59) as u8).collect();
    Matrix::from_blocks(n_out, n_in, kind, &bytes, None).expect("sizes fit")
}

fn products(pool: &Pool, limits: &Limits) {
    for kind in [BlockType::Q4_1, BlockType::Q8_0, BlockType::Q4K, BlockType::Q6K] {
        // K formats want rows of whole blocks of 256.
        let n_in = if kind.block_len() == 256 { 768 } else { 576 };
        for (name, n_out, n_in) in [("gate", 1536, n_in), ("down", 576, 1536), ("head", 49152, n_in)] {
            let one = matrix(kind, n_out, n_in);
            let n_cold = (COLD_BYTES / one.bytes()).max(1);
            let cold: Vec<Matrix> = (0..n_cold).map(|_| matrix(kind, n_out, n_in)).collect();
            for n_rows in [1, 4, 16, 64, 256] {
                if name == "head" && n_rows > 16 {
                    continue;
                }
                let (x, mut out) = (noise(n_rows * n_in), vec![0.0; n_rows * n_out]);
                let mut scratch = matmul::Scratch::default();
                let n = if n_rows > 16 { 8.min(n_cold) } else { n_cold };
                let mut next = 0;
                let time = seconds(n, || {
                    next = (next + 1) % n_cold;
                    matmul(pool, Precision::Int8, &x, n_rows, &cold[next], &mut out, &mut scratch);
                }) / n as f64;
                let operations = (2 * n_rows * n_out * n_in) as f64;
                let bytes = if n_rows <= 16 { one.bytes() as f64 } else { 0.0 };
                limits.show(&format!("{name} {kind:?}, {n_rows} rows"), time, bytes, operations, 0.0);
            }
        }
    }
}

fn adapters(pool: &Pool, limits: &Limits) {
    let (n_in, n_out) = (576, 1536);
    for (name, rank, n_segments, each) in [
        ("16 adapters, a row each", 16, 16, 1),
        ("one adapter, 16 rows", 16, 1, 16),
        ("one adapter, 256 rows", 16, 1, 256),
    ] {
        let (a, b) = (noise(rank * n_in), noise(rank * n_out));
        let pair = || LoraPair::new(rank, n_in, n_out, &a, &b, 1.0, LoraDtype::F16, None).expect("sizes fit");
        let bytes = pair().bytes() * n_segments;
        let n_cold = COLD_BYTES / bytes;
        let pairs: Vec<LoraPair> = (0..n_segments * n_cold).map(|_| pair()).collect();
        let n_rows = n_segments * each;
        let (x, mut y) = (noise(n_rows * n_in), vec![0.0; n_rows * n_out]);
        let mut scratch = lora::Scratch::default();
        let mut next = 0;
        let time = seconds(n_cold, || {
            next = (next + 1) % n_cold;
            let segments: Vec<_> = (0..n_segments)
                .map(|i| Segment { rows: i * each..(i + 1) * each, pair: &pairs[next * n_segments + i] })
                .collect();
            lora_delta(pool, &segments, &x, n_in, &mut y, n_out, &mut scratch);
        }) / n_cold as f64;
        let operations = (2 * n_rows * rank * (n_in + n_out)) as f64;
        limits.show(&format!("lora_delta, {name}"), time, bytes as f64, 0.0, operations);
    }
}

fn attentions(pool: &Pool, limits: &Limits) {
    const PAGES_EACH: usize = 128;
    let layout = KvLayout { n_layers: 1, n_kv_heads: 3, head_dim: 64, page_tokens: PAGE_TOKENS, dtype: KvDtype::F16 };
    let kv = KvPool::new(layout, 16 * PAGES_EACH);
    let pages: Vec<u32> = (0..(16 * PAGES_EACH) as u32).collect();
    for (name, n_runs, each, context) in [
        ("decode, 16 rows at 128", 16, 1, 128),
        ("decode, 16 rows at 2048", 16, 1, 2048),
        ("prefill, 256 rows to 256", 1, 256, 256),
        ("prefill, 256 rows to 1024", 1, 256, 1024),
    ] {
        let runs: Vec<_> = (0..n_runs)
            .map(|i| AttnRun {
                rows: i * each..(i + 1) * each,
                start: context - each,
                pages: &pages[i * PAGES_EACH..][..PAGES_EACH],
            })
            .collect();
        let q = noise(n_runs * each * 576);
        let mut out = vec![0.0; q.len()];
        let mut scratch = attention::Scratch::default();
        let time = seconds(20, || attention(pool, &q, 9, &runs, &kv, 0, 0.125, &mut out, &mut scratch)) / 20.0;
        // A multiply-add per head dimension for the score and one for the mix.
        let positions: usize = (0..each).map(|row| context - row).sum();
        let operations = (n_runs * positions * 576 * 4) as f64;
        limits.show(&format!("attention, {name}"), time, 0.0, 0.0, operations);
    }
}

fn rows(pool: &Pool, limits: &Limits) {
    let (x, w, mut out) = (noise(16 * 576), noise(576), vec![0.0; 16 * 576]);
    let bytes = |values: usize| (values * 4) as f64;
    let time = seconds(1000, || ops::rms_norm(pool, &x, 16, &w, 1e-5, &mut out)) / 1000.0;
    limits.show("rms_norm, 16 rows (against memory)", time, bytes(2 * 16 * 576), 0.0, 0.0);
    let (gate, up, mut out) = (noise(16 * 1536), noise(16 * 1536), vec![0.0; 16 * 1536]);
    let time = seconds(1000, || ops::swiglu(pool, &gate, &up, &mut out)) / 1000.0;
    limits.show("swiglu, 16 rows (against memory)", time, bytes(3 * 16 * 1536), 0.0, 0.0);
}
