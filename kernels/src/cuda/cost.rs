//! What a GPU should reach, from bytes and operations: **computed**, with what an H100 was seen to do beside it.
//!
//! A decode step reads every weight once for all its rows, every adapter once for its rows, and the keys and values of
//! every sequence; it computes two operations per weight and row. Each takes as long as its bytes at the bandwidth or
//! its operations at the peak, whichever is longer; the parts follow one another. The *limit* takes the vendor's
//! figures as they are, the *expectation* a share of them ([`BANDWIDTH_SHARE`], [`PEAK_SHARE`]) and the gaps between
//! kernels ([`GAP_S`]). Sampling, tokenising and HTTP are not in it. [`MEASURED`] is of the whole forward pass, the host's
//! part and the copy of all logits included.
//!
#![doc = include_str!("../../cuda/cost.md")]

use std::fmt::Write as _;

/// Share of the vendor's bandwidth that a good kernel reads at; 0.8 to 0.9 is usual for long streams.
pub const BANDWIDTH_SHARE: f64 = 0.75;
/// Share of the vendor's dense tensor-core peak that a good product reaches at these sizes.
pub const PEAK_SHARE: f64 = 0.5;
/// Pause between two kernels of a stream.
pub const GAP_S: f64 = 1e-6;
/// Share of the memory that weights, adapters and KV may take.
pub const MEMORY_SHARE: f64 = 0.9;
/// Kernels per layer besides the two per adapter delta: two norms, rotary and KV write, attention and its join, SwiGLU,
/// and seven products.
const KERNELS_PER_LAYER: f64 = 13.0;
/// Linear layers an adapter changes.
const LINEARS: f64 = 7.0;

/// A GPU by its data sheet.
#[derive(Debug, Clone, Copy)]
pub struct GpuFacts {
    /// Name.
    pub name: &'static str,
    /// Memory bandwidth.
    pub bytes_per_s: f64,
    /// Dense f16 products with f32 sums on tensor cores.
    pub flops_per_s: f64,
    /// Memory.
    pub bytes: f64,
}

/// A base model of the llama family by its shape.
#[derive(Debug, Clone, Copy)]
pub struct BaseFacts {
    /// Name.
    pub name: &'static str,
    /// Layers.
    pub n_layers: f64,
    /// Width of the residual stream.
    pub hidden: f64,
    /// Width of all query heads together.
    pub q_width: f64,
    /// Width of all key heads together; as wide as all value heads.
    pub kv_width: f64,
    /// Width of the feed-forward part.
    pub intermediate: f64,
    /// Rows of the head.
    pub vocabulary: f64,
}

/// One decode step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// Sequences, one token each.
    pub batch: f64,
    /// Different adapters among them.
    pub adapters: f64,
    /// Rank of each, on all seven linear layers, in f16.
    pub rank: f64,
    /// Positions each sequence attends, in f16.
    pub context: f64,
    /// Bits per base weight, scales included.
    pub weight_bits: f64,
}

/// H100 SXM and RTX 4090, as their data sheets have them.
pub const GPUS: [GpuFacts; 2] = [
    GpuFacts { name: "H100 SXM", bytes_per_s: 3.35e12, flops_per_s: 989e12, bytes: 80e9 },
    GpuFacts { name: "RTX 4090", bytes_per_s: 1.008e12, flops_per_s: 165e12, bytes: 24e9 },
];

/// Llama 3.1 8B and Mistral 7B.
pub const BASES: [BaseFacts; 2] = [
    BaseFacts {
        name: "Llama 3.1 8B",
        n_layers: 32.0,
        hidden: 4096.0,
        q_width: 4096.0,
        kv_width: 1024.0,
        intermediate: 14_336.0,
        vocabulary: 128_256.0,
    },
    BaseFacts {
        name: "Mistral 7B",
        n_layers: 32.0,
        hidden: 4096.0,
        q_width: 4096.0,
        kv_width: 1024.0,
        intermediate: 14_336.0,
        vocabulary: 32_768.0,
    },
];

/// Decoded tokens a second of all sequences together, as they were seen.
#[derive(Debug, Clone, Copy)]
pub struct Measured {
    /// Name of the device, as in [`GPUS`].
    pub gpu: &'static str,
    /// Name of the base, as in [`BASES`]; weights of its shape without a meaning.
    pub base: &'static str,
    /// Bits per weight the model counts with; the device kept 5 for its 4.5 (`Form::N4`).
    pub weight_bits: f64,
    /// For each of [`CELLS`].
    pub tokens_per_s: [f64; CELLS.len()],
}

/// Streams and different adapters of the table's columns.
pub const CELLS: [(u32, u32); 7] = [(1, 0), (1, 1), (8, 8), (16, 16), (64, 1), (64, 16), (64, 64)];

/// What was seen, and by what: `gpu_speed` of the crate `model`, medians of 15 steps at 1,024 positions.
pub const MEASURED: [Measured; 2] = [
    Measured {
        gpu: "H100 SXM",
        base: "Llama 3.1 8B",
        weight_bits: 4.5,
        tokens_per_s: [221.0, 176.0, 1220.0, 1967.0, 4138.0, 4020.0, 3280.0],
    },
    Measured {
        gpu: "H100 SXM",
        base: "Llama 3.1 8B",
        weight_bits: 16.0,
        tokens_per_s: [139.0, 120.0, 860.0, 1414.0, 2217.0, 2229.0, 1990.0],
    },
];

/// When, on what and by which command.
const MEASURED_HOW: &str = "Measured on 2026-11-22 on an NVIDIA H100 80GB HBM3 (driver \
     580.159.04), by `gpu_speed -- 8b-q4k 1024` and `8b-f16 1024`: the whole forward pass with the host's part and the copy \
     of all logits, medians of 15 steps, weights without a meaning, 5 bits a weight where the model counts 4.5. Nothing else \
     was measured.";

// === impl BaseFacts ===

impl BaseFacts {
    /// Weights read in a step: all layers and the head, not the embedding table.
    pub fn weights(&self) -> f64 {
        let attention = 2.0 * self.hidden * self.q_width + 2.0 * self.hidden * self.kv_width;
        self.n_layers * (attention + 3.0 * self.hidden * self.intermediate) + self.hidden * self.vocabulary
    }

    /// Numbers of an adapter of rank 1: inputs plus outputs of the seven linear layers, over all layers.
    pub fn adapter_width(&self) -> f64 {
        let attention = 2.0 * (self.hidden + self.q_width) + 2.0 * (self.hidden + self.kv_width);
        self.n_layers * (attention + 3.0 * (self.hidden + self.intermediate))
    }

    /// Numbers of KV per position.
    pub fn kv_width_total(&self) -> f64 {
        2.0 * self.n_layers * self.kv_width
    }
}

/// Bytes of memory that base (with its embedding table), adapters and KV take.
pub fn memory_bytes(base: &BaseFacts, step: &Step) -> f64 {
    let weights = (base.weights() + base.hidden * base.vocabulary) * step.weight_bits / 8.0;
    let adapters = base.adapter_width() * step.rank * 2.0 * step.adapters;
    weights + adapters + base.kv_width_total() * 2.0 * step.context * step.batch
}

/// Seconds of a step: (at the limit, expected).
pub fn step_seconds(gpu: &GpuFacts, base: &BaseFacts, step: &Step) -> (f64, f64) {
    let weights = (base.weights() * step.weight_bits / 8.0, 2.0 * base.weights() * step.batch);
    // Operands in two f16 parts: every product is done twice. Rows of a tile are computed whether used or not.
    let adapter_rows = step.adapters * (step.batch / step.adapters.max(1.0) / 16.0).ceil() * 16.0;
    let adapter = base.adapter_width() * step.rank;
    let adapters = (adapter * 2.0 * step.adapters, 2.0 * 2.0 * adapter * adapter_rows);
    let kv = base.kv_width_total() * step.context * step.batch;
    let group = base.q_width / base.kv_width;
    let attention = (kv * 2.0, 2.0 * 2.0 * kv * (group / 16.0).ceil() * 16.0);
    let launches = base.n_layers * (KERNELS_PER_LAYER + if step.adapters > 0.0 { 2.0 * LINEARS } else { 0.0 });
    let sum = |bandwidth: f64, peak: f64| -> f64 {
        [weights, adapters, attention]
            .iter()
            .map(|(bytes, flops)| (bytes / (gpu.bytes_per_s * bandwidth)).max(flops / (gpu.flops_per_s * peak)))
            .sum()
    };
    (sum(1.0, 1.0), sum(BANDWIDTH_SHARE, PEAK_SHARE) + launches * GAP_S)
}

/// The table in this page, as Markdown: decoded tokens a second of all sequences together, expectation and limit, and what
/// was measured.
pub fn table() -> String {
    let mut out = format!(
        "Decoded tokens a second of all sequences together: expected (limit), **computed**; and in bold as **measured**.\n\
         Rank 16 on all seven linear layers in f16, 1,024 positions of context, KV in f16; – does not fit the memory. A\n\
         column is streams and different adapters.\n\n\
         {MEASURED_HOW}\n\n\
         | GPU | base | weights |"
    );
    for (batch, adapters) in CELLS {
        write!(out, " {batch}, {} |", if adapters == 0 { "none".to_owned() } else { adapters.to_string() })
            .expect("a string takes all");
    }
    out.push_str("\n|---|---|---|---|---|---|---|---|---|---|\n");
    for gpu in &GPUS {
        for base in &BASES {
            for (bits, name) in [(4.5, "4-bit"), (16.0, "f16")] {
                write!(out, "| {} | {} | {name} |", gpu.name, base.name).expect("a string takes all");
                let seen = MEASURED.iter().find(|m| m.gpu == gpu.name && m.base == base.name && m.weight_bits == bits);
                for (cell, (batch, adapters)) in CELLS.into_iter().enumerate() {
                    write!(out, " {} |", entry(gpu, base, bits, batch, adapters, seen.map(|m| m.tokens_per_s[cell])))
                        .expect("a string takes all");
                }
                out.push('\n');
            }
        }
    }
    out
}

/// One cell.
fn entry(gpu: &GpuFacts, base: &BaseFacts, bits: f64, batch: u32, adapters: u32, seen: Option<f64>) -> String {
    let (batch, adapters) = (f64::from(batch), f64::from(adapters));
    let step = Step { batch, adapters, rank: 16.0, context: 1024.0, weight_bits: bits };
    if memory_bytes(base, &step) > gpu.bytes * MEMORY_SHARE {
        return "–".to_owned();
    }
    let (limit, expected) = step_seconds(gpu, base, &step);
    let computed = format!("{:.0} ({:.0})", batch / expected, batch / limit);
    seen.map_or(computed.clone(), |seen| format!("{computed} **{seen:.0}**"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Step = Step { batch: 1.0, adapters: 0.0, rank: 16.0, context: 0.0, weight_bits: 16.0 };

    fn close(got: f64, wanted: f64) {
        assert!((got / wanted - 1.0).abs() < 1e-3, "{got} is not {wanted}");
    }

    #[test]
    fn weights_and_adapters_have_the_published_sizes() {
        // Llama 3.1 8B has 8.03 billion parameters; without the embedding table of 525 million, 7.50.
        close(BASES[0].weights(), 7.504e9);
        // Rank 16 on all linear layers: the 41.9 million trainable parameters that PEFT prints.
        close(BASES[0].adapter_width() * 16.0, 41.94e6);
        // 128 KiB of f16 KV per position.
        close(BASES[0].kv_width_total() * 2.0, 131_072.0);
    }

    #[test]
    fn one_stream_is_bound_by_reading_the_weights() {
        let (limit, expected) = step_seconds(&GPUS[0], &BASES[0], &BASE);
        close(limit, 2.0 * 7.504e9 / 3.35e12);
        close(expected, limit / BANDWIDTH_SHARE + 32.0 * 13.0 * 1e-6);
    }

    #[test]
    fn different_adapters_add_their_bytes_and_the_same_adapter_does_not() {
        let seconds = |adapters| step_seconds(&GPUS[0], &BASES[0], &Step { batch: 64.0, adapters, ..BASE }).0;
        let adapter_s = 2.0 * 41.94e6 / 3.35e12;
        close(seconds(64.0) - seconds(0.0), 64.0 * adapter_s);
        close(seconds(16.0) - seconds(0.0), 16.0 * adapter_s);
        // 64 rows of one adapter: twice two operations per row and number are still below its bytes' time.
        close(seconds(1.0) - seconds(0.0), adapter_s);
    }

    #[test]
    fn large_batches_are_bound_by_arithmetic() {
        let batch = 4096.0;
        let (limit, _) = step_seconds(&GPUS[1], &BASES[1], &Step { batch, weight_bits: 4.5, ..BASE });
        close(limit, 2.0 * BASES[1].weights() * batch / 165e12);
    }

    #[test]
    fn long_contexts_add_their_keys_and_values() {
        let at = |context| step_seconds(&GPUS[1], &BASES[0], &Step { batch: 8.0, context, ..BASE }).0;
        close(at(4096.0) - at(0.0), 8.0 * 4096.0 * 131_072.0 / 1.008e12);
    }

    #[test]
    fn what_does_not_fit_the_memory_is_not_promised() {
        let step = Step { batch: 64.0, adapters: 64.0, context: 1024.0, ..BASE };
        // 16.06 GB of weights, 5.37 GB of adapters, 8.59 GB of KV.
        close(memory_bytes(&BASES[0], &step), 16.06e9 + 5.368e9 + 8.590e9);
        assert!(table().contains("– |"));
    }

    #[test]
    fn the_page_shows_what_the_model_computes() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/cost.md");
        if std::env::var_os("UPDATE").is_some() {
            std::fs::write(file, table()).expect("a writable repository");
        }
        let page = std::fs::read_to_string(file).expect("cuda/cost.md");
        assert_eq!(page, table(), "hint: run this test with UPDATE=1 and read the diff");
    }
}
