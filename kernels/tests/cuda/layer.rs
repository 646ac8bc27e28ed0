//! One transformer layer through the device's entries and through the CPU's, for a batch of a prefill chunk and a
//! decoding row with different adapters: the entries compose, in the order a forward pass calls them. The dense products
//! are done by the test on both sides; `matmul` has tests of its own.

use std::sync::Arc;

use kernels::attention::{AttnRun, Scratch};
use kernels::cuda::Buffer;
use kernels::cuda::attention::{AttentionPlan, AttentionScratch};
use kernels::cuda::kv::DeviceKv;
use kernels::cuda::lora::{DeviceAdapter, DevicePair, LoraPlan, LoraScratch, PackedPair};
use kernels::cuda::rows::{DeviceRope, RowPlan, residual_rms_norm, rope_store, swiglu};
use kernels::kv::{KvDtype, KvLayout, KvPool};
use kernels::lora::{LoraDtype, LoraPair, Segment};
use kernels::ops::{self, RopeTable};
use kernels::pool::Pool;

use super::support::{CUT, Executor, Floats, Noise, PLAIN, absent, download, reference, upload};

const HIDDEN: usize = 64;
const HEADS: usize = 2;
const HEAD_DIM: usize = 32;
const KV_WIDTH: usize = HEAD_DIM;
const INNER: usize = 96;
/// Five rows of one sequence, then the first row of another.
const POSITIONS: [u32; 6] = [0, 1, 2, 3, 4, 0];
const PLACES: [(u32, u32); 6] = [(1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (0, 0)];
const SCALE: f32 = 0.18;
const EPS: f32 = 1e-5;

struct Layer {
    norms: [Vec<f32>; 2],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    o: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    down: Vec<f32>,
    /// Rank, A and B of each sequence's adapter; on q only.
    adapters: [(usize, Vec<f32>, Vec<f32>); 2],
    inv_freq: Vec<f64>,
}

fn layer() -> Layer {
    let mut noise = Noise(1);
    let mut matrix = |n_out: usize, n_in: usize| -> Vec<f32> {
        noise.values(n_out * n_in).iter().map(|x| x / (n_in as f32).sqrt()).collect()
    };
    Layer {
        norms: [matrix(1, HIDDEN), matrix(1, HIDDEN)].map(|w| w.iter().map(|w| 1.0 + w).collect()),
        q: matrix(HIDDEN, HIDDEN),
        k: matrix(KV_WIDTH, HIDDEN),
        v: matrix(KV_WIDTH, HIDDEN),
        o: matrix(HIDDEN, HIDDEN),
        gate: matrix(INNER, HIDDEN),
        up: matrix(INNER, HIDDEN),
        down: matrix(HIDDEN, INNER),
        adapters: [8, 3].map(|rank| (rank, matrix(rank, HIDDEN), matrix(HIDDEN, rank))),
        inv_freq: (0..HEAD_DIM / 2).map(|i| 100f64.powf(-(i as f64) / 16.0)).collect(),
    }
}

/// `x` `[n_rows, n_in]` times `w` `[n_out, n_in]`.
fn product(w: &[f32], x: &[f32], n_in: usize) -> Vec<f32> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).fold(0.0, |sum: f32, (x, w)| x.mul_add(*w, sum));
    x.chunks_exact(n_in).flat_map(|x| w.chunks_exact(n_in).map(move |w| dot(x, w))).collect()
}

fn layout() -> KvLayout {
    KvLayout { n_layers: 1, n_kv_heads: 1, head_dim: HEAD_DIM, page_tokens: 16, dtype: KvDtype::F16 }
}

fn runs() -> [AttnRun<'static>; 2] {
    [AttnRun { rows: 0..5, start: 0, pages: &[1] }, AttnRun { rows: 5..6, start: 0, pages: &[0] }]
}

fn on_cpu(layer: &Layer, hidden: &[f32]) -> Vec<f32> {
    let pool = Pool::new(1);
    let mut hidden = hidden.to_vec();
    let n_rows = hidden.len() / HIDDEN;
    let mut x = vec![0.0; hidden.len()];
    ops::rms_norm(&pool, &hidden, n_rows, &layer.norms[0], EPS, &mut x);
    let [mut q, mut k, v] = [&layer.q, &layer.k, &layer.v].map(|w| product(w, &x, HIDDEN));
    let pairs = layer
        .adapters
        .each_ref()
        .map(|(rank, a, b)| LoraPair::new(*rank, HIDDEN, HIDDEN, a, b, 2.0, LoraDtype::F32, None).expect("a pair"));
    let segments = [Segment { rows: 0..5, pair: &pairs[0] }, Segment { rows: 5..6, pair: &pairs[1] }];
    kernels::lora::lora_delta(&pool, &segments, &x, HIDDEN, &mut q, HIDDEN, &mut Default::default());
    let table = RopeTable::new(HEAD_DIM, 8, &layer.inv_freq);
    ops::rope(&pool, &mut q, n_rows, HEADS, HEAD_DIM, &POSITIONS, &table);
    ops::rope(&pool, &mut k, n_rows, 1, HEAD_DIM, &POSITIONS, &table);
    let mut kv = KvPool::new(layout(), 2);
    for (row, (page, slot)) in PLACES.iter().enumerate() {
        let range = row * KV_WIDTH..(row + 1) * KV_WIDTH;
        kv.store(0, *page, *slot as usize, &k[range.clone()], &v[range]);
    }
    let mut mixed = vec![0.0; q.len()];
    kernels::attention::attention(&pool, &q, HEADS, &runs(), &kv, 0, SCALE, &mut mixed, &mut Scratch::default());
    ops::add_in_place(&pool, &mut hidden, &product(&layer.o, &mixed, HIDDEN));
    ops::rms_norm(&pool, &hidden, n_rows, &layer.norms[1], EPS, &mut x);
    let (gate, up) = (product(&layer.gate, &x, HIDDEN), product(&layer.up, &x, HIDDEN));
    let mut inner = vec![0.0; gate.len()];
    ops::swiglu(&pool, &gate, &up, &mut inner);
    ops::add_in_place(&pool, &mut hidden, &product(&layer.down, &inner, INNER));
    hidden
}

fn on_device(gpu: &Executor, layer: &Layer, hidden: &[f32]) -> Vec<f32> {
    let n_rows = hidden.len() / HIDDEN;
    let multiply = |w: &[f32], x: &Floats, n_in: usize| upload(gpu, &product(w, &download(gpu, x), n_in));
    let zeros = |n: usize| -> Floats { Buffer::zeros(gpu, n_rows * n).expect("memory") };
    // Once per model and adapter.
    let rope = DeviceRope::new(gpu, HEAD_DIM, 8, &layer.inv_freq).expect("memory");
    let norms = layer.norms.each_ref().map(|w| upload(gpu, w));
    let mut kv = DeviceKv::new(gpu, layout(), 2).expect("memory");
    let pairs = layer.adapters.each_ref().map(|(rank, a, b)| {
        let pair = PackedPair::new(*rank, HIDDEN, HIDDEN, a, b, 2.0, LoraDtype::F32, None).expect("a pair");
        let pair = DevicePair::upload(gpu, &pair).expect("memory");
        Arc::new(DeviceAdapter::new(gpu, vec![Some(pair)]))
    });
    let [first, second] = pairs;
    let (mut lora_scratch, mut scratch) =
        (LoraScratch::new(gpu).expect("memory"), AttentionScratch::new(gpu).expect("memory"));
    // Once per step.
    let rows = RowPlan::new(gpu, &POSITIONS, &PLACES).expect("memory");
    let adapters = LoraPlan::new(gpu, &[(0..5, first), (5..6, second)]).expect("memory");
    let plan = AttentionPlan::new(gpu, &runs(), HEADS, &kv).expect("memory");
    // Once per layer.
    let (mut hidden, mut x) = (upload(gpu, hidden), zeros(HIDDEN));
    residual_rms_norm(gpu, &mut hidden, None, n_rows, &norms[0], EPS, &mut x, None).expect("a launch");
    let [mut q, k, v] = [&layer.q, &layer.k, &layer.v].map(|w| multiply(w, &x, HIDDEN));
    kernels::cuda::lora::lora_delta(gpu, &adapters, &x, &mut [(0, &mut q)], &mut lora_scratch).expect("a launch");
    rope_store(gpu, &mut q, &k, &v, HEADS, &rows, &rope, &mut kv, 0).expect("a launch");
    let mut mixed = zeros(HIDDEN);
    kernels::cuda::attention::attention(gpu, &plan, &q, &kv, 0, SCALE, &mut mixed, &mut scratch).expect("a launch");
    let delta = multiply(&layer.o, &mixed, HIDDEN);
    residual_rms_norm(gpu, &mut hidden, Some(&delta), n_rows, &norms[1], EPS, &mut x, None).expect("a launch");
    let (gate, up) = (multiply(&layer.gate, &x, HIDDEN), multiply(&layer.up, &x, HIDDEN));
    let mut inner = zeros(INNER);
    swiglu(gpu, &gate, &up, n_rows, INNER, &mut inner, None).expect("a launch");
    let delta = multiply(&layer.down, &inner, INNER);
    residual_rms_norm(gpu, &mut hidden, Some(&delta), n_rows, &norms[0], EPS, &mut x, None).expect("a launch");
    download(gpu, &hidden)
}

#[test]
fn a_layer_on_the_device_agrees_with_the_layer_on_the_cpu() {
    if absent() {
        return;
    }
    let layer = layer();
    let hidden = Noise(2).values(6 * HIDDEN);
    let expected = reference(|| on_cpu(&layer, &hidden));
    for gpu in [PLAIN, CUT] {
        let got = on_device(&gpu, &layer, &hidden);
        let worst = got.iter().zip(&expected).map(|(got, expected)| (got - expected).abs()).fold(0.0, f32::max);
        // Values are about 3; keys and values round alike to f16 on both sides unless an error of 2^-22 moves one over
        // the edge, which is a step of 2^-11 of one key among five.
        assert!(worst < 2e-3, "worst difference {worst}");
    }
}
