//! Times of the CUDA kernels on a device, beside what the bytes they must move and the operations they must do would take.
//!
//! ```text
//! scripts/cuda-toolkit && cargo run --release -p kernels --features cuda --example cuda_times -- [products|lora|attention|rows]
//! ```
//!
//! Each figure is the median of several replays of a graph of many launches that rotate over different weights and pages,
//! more than the L2 holds. `bound` is bytes at 3.35 TB/s or operations at 989 (f16) or 1979 (int8) T/s, the data sheet of
//! an H100 SXM; on another device only the times mean something.

use std::sync::Arc;
use std::time::Duration;

use kernels::attention::AttnRun;
use kernels::cuda::attention::{AttentionPlan, AttentionScratch, attention};
use kernels::cuda::device::Device;
use kernels::cuda::kv::DeviceKv;
use kernels::cuda::lora::{DeviceAdapter, DevicePair, LoraPlan, LoraScratch, PackedPair, lora_delta};
use kernels::cuda::matmul::{Activations, DeviceMatrix, Form, products};
use kernels::cuda::rows::{DeviceRope, RowPlan, residual_rms_norm, rope_store, swiglu};
use kernels::cuda::{Buffer, GpuError};
use kernels::kv::{KvDtype, KvLayout, PAGE_TOKENS};
use kernels::lora::LoraDtype;

const BYTES_PER_S: f64 = 3.35e12;
const F16_PER_S: f64 = 989e12;
const INT8_PER_S: f64 = 1979e12;
/// More than the L2 of any device of today.
const ROTATED_BYTES: usize = 256 << 20;
const SAMPLES: usize = 7;

type Result<T> = std::result::Result<T, GpuError>;

fn main() -> Result<()> {
    let gpu = Device::new(0)?;
    println!("{}; bound: 3.35 TB/s, 989 Tflop/s f16, 1979 Top/s int8", gpu.describe());
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let is_wanted = |part: &str| wanted.is_empty() || wanted.iter().any(|name| name == part);
    if is_wanted("products") {
        time_products(&gpu)?;
    }
    if is_wanted("lora") {
        time_lora(&gpu)?;
    }
    if is_wanted("attention") {
        time_attention(&gpu)?;
    }
    if is_wanted("rows") {
        time_rows(&gpu)?;
    }
    Ok(())
}

/// One line: microseconds, the bound's, and the share of the bound that is reached.
fn report(what: &str, time: Duration, bytes: f64, operations: f64, operations_per_s: f64) {
    let seconds = time.as_secs_f64();
    let (for_bytes, for_operations) = (bytes / BYTES_PER_S, operations / operations_per_s);
    let bound = for_bytes.max(for_operations);
    let by = if for_bytes >= for_operations { "bytes" } else { "operations" };
    println!(
        "{what:<58} {:9.2} us  bound {:8.2} us ({by:10}) {:5.1} %  {:7.0} GB/s {:7.1} T/s",
        seconds * 1e6,
        bound * 1e6,
        100.0 * bound / seconds,
        bytes / seconds / 1e9,
        operations / seconds / 1e12
    );
}

fn floats(gpu: &Device, n: usize) -> Result<Buffer<Device, f32>> {
    let values: Vec<f32> = (0..n).map(|i| ((i * 2_654_435_761) >> 7 & 0xffff) as f32 / 32_768.0 - 1.0).collect();
    Buffer::upload(gpu, &values)
}

/// Linear layers of Llama 3.1 8B that share their inputs, and SmolLM2's widest.
const LAYERS: [(&str, usize, &[usize]); 6] = [
    ("8B qkv", 4096, &[4096, 1024, 1024]),
    ("8B o", 4096, &[4096]),
    ("8B gate, up", 4096, &[14_336, 14_336]),
    ("8B down", 14_336, &[4096]),
    ("8B head", 4096, &[128_256]),
    ("SmolLM2 gate, up", 576, &[1536, 1536]),
];

fn time_products(gpu: &Device) -> Result<()> {
    for (form, name) in [(Form::N4, "Q4_K"), (Form::P4, "Q4_1"), (Form::Z8, "Q8_0"), (Form::Dense, "f16")] {
        for (layer, n_in, outs) in LAYERS {
            if form == Form::P4 && !layer.starts_with("SmolLM2") && layer != "8B o" {
                continue;
            }
            let one: Vec<_> =
                outs.iter().map(|&n_out| DeviceMatrix::random(gpu, n_out, n_in, form, 1)).collect::<Result<_>>()?;
            let bytes: usize = one.iter().map(DeviceMatrix::bytes).sum();
            let mut sets = vec![one];
            for seed in 1..(ROTATED_BYTES / bytes).clamp(1, 24) as u64 {
                let set = outs.iter().map(|&n_out| DeviceMatrix::random(gpu, n_out, n_in, form, seed + 1));
                sets.push(set.collect::<Result<_>>()?);
            }
            for n_rows in [1, 8, 16, 32, 64, 512] {
                let x = floats(gpu, n_rows * n_in)?;
                let mut activations = Activations::new(gpu, n_rows, n_in, form != Form::Dense, form == Form::Dense)?;
                if form == Form::Dense {
                    activations.split(gpu, &x, n_rows, n_in)?;
                } else {
                    activations.round(gpu, &x, n_rows, n_in)?;
                }
                let mut ys: Vec<_> =
                    outs.iter().map(|n_out| Buffer::zeros(gpu, n_rows * n_out)).collect::<Result<_>>()?;
                let n_launches = sets.len().max(2);
                let time = gpu.time(SAMPLES, || {
                    for launch in 0..n_launches {
                        let set = &sets[launch % sets.len()];
                        let mut list: Vec<_> = set.iter().zip(&mut ys).collect();
                        products(gpu, &activations, n_rows, &mut list)?;
                    }
                    Ok(())
                })?;
                let n_out: usize = outs.iter().sum();
                let operations = 2.0 * (n_in * n_out * n_rows) as f64;
                // The dense kernel does every product twice; the bound does not.
                let peak = if form == Form::Dense { F16_PER_S } else { INT8_PER_S };
                let moved = bytes + 4 * n_rows * (n_in + n_out);
                report(
                    &format!("{name} {layer}, {n_rows} rows"),
                    time / n_launches as u32,
                    moved as f64,
                    operations,
                    peak,
                );
            }
        }
    }
    Ok(())
}

fn time_lora(gpu: &Device) -> Result<()> {
    const RANK: usize = 16;
    for (layer, n_in, n_out) in
        [("8B q, o", 4096, 4096), ("8B gate", 4096, 14_336), ("8B down", 14_336, 4096), ("SmolLM2 gate", 576, 1536)]
    {
        let values: Vec<f32> = (0..RANK * n_in.max(n_out)).map(|i| (i % 97) as f32 / 970.0 - 0.05).collect();
        let pair = || {
            let (a, b) = (&values[..RANK * n_in], &values[..RANK * n_out]);
            let packed = PackedPair::new(RANK, n_in, n_out, a, b, 1.0, LoraDtype::F16, None).expect("a pair");
            DevicePair::upload(gpu, &packed).expect("memory")
        };
        let bytes = pair().bytes();
        // Different pairs for every launch of a graph, so that none is in the cache.
        let n_sets = (ROTATED_BYTES / bytes / 64).clamp(1, 16);
        let adapters: Vec<_> =
            (0..64).map(|_| Arc::new(DeviceAdapter::new(gpu, (0..n_sets).map(|_| Some(pair())).collect()))).collect();
        for (n_rows, n_adapters) in [(1, 1), (8, 8), (16, 1), (16, 16), (64, 1), (64, 16), (64, 64)] {
            let each = n_rows / n_adapters;
            let segments: Vec<_> = adapters[..n_adapters]
                .iter()
                .enumerate()
                .map(|(i, a)| (i * each..(i + 1) * each, Arc::clone(a)))
                .collect();
            let plan = LoraPlan::new(gpu, &segments)?;
            let (x, mut y) = (floats(gpu, n_rows * n_in)?, floats(gpu, n_rows * n_out)?);
            let mut scratch = LoraScratch::new(gpu)?;
            lora_delta(gpu, &plan, &x, &mut [(0, &mut y)], &mut scratch)?;
            let time = gpu.time(SAMPLES, || {
                (0..n_sets).try_for_each(|set| lora_delta(gpu, &plan, &x, &mut [(set, &mut y)], &mut scratch))
            })?;
            let moved = bytes * n_adapters + 4 * n_rows * (n_in + 2 * n_out);
            let operations = 2.0 * (RANK * (n_in + n_out) * n_rows) as f64;
            let what = format!("lora {layer}, {n_rows} rows, {n_adapters} adapters of rank 16");
            report(&what, time / n_sets as u32, moved as f64, operations, F16_PER_S);
        }
    }
    Ok(())
}

fn time_attention(gpu: &Device) -> Result<()> {
    for (name, n_kv_heads, group, head_dim, n_layers) in [("8B", 8, 4, 128, 8), ("SmolLM2", 3, 3, 64, 8)] {
        let layout = KvLayout { n_layers, n_kv_heads, head_dim, page_tokens: PAGE_TOKENS, dtype: KvDtype::F16 };
        let n_pages = 64 * 4096 / PAGE_TOKENS;
        let mut kv = DeviceKv::new(gpu, layout, n_pages)?;
        let n_heads = n_kv_heads * group;
        fill(gpu, &mut kv, n_pages)?;
        let pages: Vec<u32> = (0..n_pages as u32).map(|page| (page * 2741) % n_pages as u32).collect();
        let mut scratch = AttentionScratch::new(gpu)?;
        let mut time = |what: String, runs: &[AttnRun<'_>], positions: usize, operations: f64| -> Result<()> {
            let n_rows = runs.last().map_or(0, |run| run.rows.end);
            let plan = AttentionPlan::new(gpu, runs, n_heads, &kv)?;
            let (q, mut out) =
                (floats(gpu, n_rows * n_heads * head_dim)?, Buffer::zeros(gpu, n_rows * n_heads * head_dim)?);
            attention(gpu, &plan, &q, &kv, 0, 0.1, &mut out, &mut scratch)?;
            let time = gpu.time(SAMPLES, || {
                (0..n_layers).try_for_each(|layer| attention(gpu, &plan, &q, &kv, layer, 0.1, &mut out, &mut scratch))
            })?;
            let moved = positions * n_kv_heads * head_dim * 4 + 8 * n_rows * n_heads * head_dim;
            report(&what, time / n_layers as u32, moved as f64, operations, F16_PER_S);
            Ok(())
        };
        for n_rows in [1, 8, 16, 64] {
            for context in [128, 1024, 4096] {
                let each = context / PAGE_TOKENS;
                let runs: Vec<_> = (0..n_rows)
                    .map(|row| AttnRun {
                        rows: row..row + 1,
                        start: context - 1,
                        pages: &pages[row * each..(row + 1) * each],
                    })
                    .collect();
                let operations = (4 * n_rows * context * n_heads * head_dim) as f64;
                time(format!("attention {name}, {n_rows} rows at {context}"), &runs, n_rows * context, operations)?;
            }
        }
        for start in [0, 2048] {
            let runs = [AttnRun { rows: 0..512, start, pages: &pages }];
            let operations = (4 * 512 * (start + 256) * n_heads * head_dim) as f64;
            time(format!("attention {name}, a chunk of 512 after {start}"), &runs, start + 512, operations)?;
        }
    }
    Ok(())
}

/// Writes keys and values into every page, through the kernel that does it in a step.
fn fill(gpu: &Device, kv: &mut DeviceKv<Device>, n_pages: usize) -> Result<()> {
    let KvLayout { n_layers, n_kv_heads, head_dim, .. } = *kv.layout();
    let rope = DeviceRope::new(gpu, head_dim, 1, &vec![0.0; head_dim / 2])?;
    let n = 4096;
    let (mut q, k) = (floats(gpu, n * n_kv_heads * head_dim)?, floats(gpu, n * n_kv_heads * head_dim)?);
    for first in (0..n_pages * PAGE_TOKENS).step_by(n) {
        let places: Vec<_> =
            (first..first + n).map(|slot| ((slot / PAGE_TOKENS) as u32, (slot % PAGE_TOKENS) as u32)).collect();
        let rows = RowPlan::new(gpu, &vec![0; n], &places)?;
        for layer in 0..n_layers {
            rope_store(gpu, &mut q, &k, &k, n_kv_heads, &rows, &rope, kv, layer)?;
        }
    }
    gpu.wait()
}

fn time_rows(gpu: &Device) -> Result<()> {
    const LAUNCHES: u32 = 20;
    for (name, hidden, ffn, n_heads, n_kv_heads, head_dim) in
        [("8B", 4096, 14_336, 32, 8, 128), ("SmolLM2", 576, 1536, 9, 3, 64)]
    {
        for n_rows in [1, 16, 64, 512] {
            let (mut residual, delta, weight) =
                (floats(gpu, n_rows * hidden)?, floats(gpu, n_rows * hidden)?, floats(gpu, hidden)?);
            let (gate, up, mut gated) =
                (floats(gpu, n_rows * ffn)?, floats(gpu, n_rows * ffn)?, floats(gpu, n_rows * ffn)?);
            let mut codes = Activations::new(gpu, n_rows, ffn, true, false)?;
            let mut out = floats(gpu, n_rows * hidden)?;
            let repeat =
                |work: &mut dyn FnMut() -> Result<()>| gpu.time(SAMPLES, || (0..LAUNCHES).try_for_each(|_| work()));
            let time = repeat(&mut || {
                residual_rms_norm(gpu, &mut residual, Some(&delta), n_rows, &weight, 1e-5, &mut out, Some(&mut codes))
            })?;
            report(&format!("norm {name}, {n_rows} rows"), time / LAUNCHES, (17 * n_rows * hidden) as f64, 0.0, 1.0);
            let time = repeat(&mut || swiglu(gpu, &gate, &up, n_rows, ffn, &mut gated, Some(&mut codes)))?;
            report(&format!("swiglu {name}, {n_rows} rows"), time / LAUNCHES, (13 * n_rows * ffn) as f64, 0.0, 1.0);
            let time = repeat(&mut || codes.round(gpu, &gate, n_rows, hidden))?;
            report(&format!("round {name}, {n_rows} rows"), time / LAUNCHES, (5 * n_rows * hidden) as f64, 0.0, 1.0);
            let layout = KvLayout { n_layers: 1, n_kv_heads, head_dim, page_tokens: PAGE_TOKENS, dtype: KvDtype::F16 };
            let mut kv = DeviceKv::new(gpu, layout, 64)?;
            let rope = DeviceRope::new(gpu, head_dim, 1, &vec![0.0; head_dim / 2])?;
            let places: Vec<_> = (0..n_rows).map(|row| ((row / 16) as u32, (row % 16) as u32)).collect();
            let rows = RowPlan::new(gpu, &vec![0; n_rows], &places)?;
            let (mut q, k) = (floats(gpu, n_rows * n_heads * head_dim)?, floats(gpu, n_rows * n_kv_heads * head_dim)?);
            let time = repeat(&mut || rope_store(gpu, &mut q, &k, &k, n_heads, &rows, &rope, &mut kv, 0))?;
            let moved = 8 * n_rows * n_heads * head_dim + 12 * n_rows * n_kv_heads * head_dim;
            report(&format!("rotary {name}, {n_rows} rows"), time / LAUNCHES, moved as f64, 0.0, 1.0);
        }
    }
    Ok(())
}
