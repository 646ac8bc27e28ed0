//! Adapter deltas on the device.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};
use kernels::cuda::lora::{DeviceAdapter, DevicePair, DevicePairError, LoraPlan, LoraScratch, PackedPair, lora_delta};
use kernels::lora::{LoraDtype, LoraPair, Scratch, Segment};
use kernels::pool::Pool;
use proptest::prelude::*;

use super::support::{CUT, Executor, Noise, PLAIN, absent, bits, download, reference, refusal, upload};

const DTYPES: [LoraDtype; 3] = [LoraDtype::F32, LoraDtype::F16, LoraDtype::BF16];
const SCALE: f32 = 0.37;

/// A pair for both sides, and its plain matrices.
pub(crate) struct Case {
    rank: usize,
    n_in: usize,
    n_out: usize,
    pair: LoraPair,
    /// Of one linear layer.
    device: Arc<DeviceAdapter<Executor>>,
    a: Vec<f32>,
    b: Vec<f32>,
    row_scale: Option<Vec<f32>>,
}

pub(crate) fn case(rank: usize, n_in: usize, n_out: usize, dtype: LoraDtype, dora: bool, seed: u64) -> Case {
    let mut noise = Noise(seed);
    let round = |v: &f32| match dtype {
        LoraDtype::F32 => *v,
        LoraDtype::F16 => f16::from_f32(*v).to_f32(),
        LoraDtype::BF16 => bf16::from_f32(*v).to_f32(),
    };
    let a: Vec<f32> = noise.values(rank * n_in).iter().map(round).collect();
    let b: Vec<f32> = noise.values(n_out * rank).iter().map(round).collect();
    let row_scale = dora.then(|| noise.values(n_out));
    let pair = LoraPair::new(rank, n_in, n_out, &a, &b, SCALE, dtype, row_scale.clone()).expect("a pair");
    let device = PackedPair::new(rank, n_in, n_out, &a, &b, SCALE, dtype, row_scale.as_deref()).expect("a pair");
    let device = DevicePair::upload(&PLAIN, &device).expect("memory");
    let device = Arc::new(DeviceAdapter::new(&PLAIN, vec![Some(device)]));
    Case { rank, n_in, n_out, pair, device, a, b, row_scale }
}

/// Applies segments on the device.
pub(crate) fn on_device(gpu: &Executor, parts: &[(Range<usize>, &Case)], x: &[f32], y: &[f32]) -> Vec<f32> {
    let segments: Vec<_> = parts.iter().map(|(rows, case)| (rows.clone(), Arc::clone(&case.device))).collect();
    let plan = LoraPlan::new(gpu, &segments).expect("a plan");
    let (x, mut y) = (upload(gpu, x), upload(gpu, y));
    let mut scratch = LoraScratch::new(gpu).expect("memory");
    lora_delta(gpu, &plan, &x, &mut [(0, &mut y)], &mut scratch).expect("a launch");
    download(gpu, &y)
}

fn on_cpu(parts: &[(Range<usize>, &Case)], x: &[f32], y: &[f32]) -> Vec<f32> {
    let (n_in, n_out) = (parts[0].1.n_in, parts[0].1.n_out);
    let segments: Vec<_> = parts.iter().map(|(rows, case)| Segment { rows: rows.clone(), pair: &case.pair }).collect();
    let mut y = y.to_vec();
    reference(|| {
        kernels::lora::lora_delta(&Pool::new(1), &segments, x, n_in, &mut y, n_out, &mut Scratch::default());
    });
    y
}

/// How far two correct results may lie apart: each has at most one rounding of 2^-24 per term of its chains (n_in inputs,
/// then rank, then a few), the device splits both f32 operands to 22 bits; all relative to the sum of magnitudes.
fn tolerance(case: &Case, x: &[f32], y: f32, column: usize) -> f32 {
    let shrunk = |rank: usize| -> f32 { x.iter().zip(&case.a[rank * case.n_in..]).map(|(x, a)| (x * a).abs()).sum() };
    let delta: f32 = (0..case.rank).map(|rank| case.b[column * case.rank + rank].abs() * shrunk(rank)).sum();
    let steps = (case.n_in + case.rank + 8) as f32 * 2f32.powi(-24) + 4.0 * 2f32.powi(-22);
    let factor = case.row_scale.as_ref().map_or(1.0, |scale| scale[column].abs());
    (SCALE * delta + y.abs()) * steps * factor
}

/// Compares every value of a batch; the largest share of the tolerance that was used.
fn worst_share(parts: &[(Range<usize>, &Case)], x: &[f32], y: &[f32]) -> f32 {
    let (got, expected) = (on_device(&PLAIN, parts, x, y), on_cpu(parts, x, y));
    let mut worst = 0.0f32;
    for (rows, case) in parts {
        for row in rows.clone() {
            let x = &x[row * case.n_in..][..case.n_in];
            for column in 0..case.n_out {
                let at = row * case.n_out + column;
                let share = (got[at] - expected[at]).abs() / tolerance(case, x, y[at], column);
                assert!(share <= 1.0, "rank {} row {row} column {column}: {} and {}", case.rank, got[at], expected[at]);
                worst = worst.max(share);
            }
        }
    }
    worst
}

#[test]
fn agrees_with_the_reference_for_every_kind_of_rank_and_dtype() {
    if absent() {
        return;
    }
    let (n_in, n_out, n_rows) = (72, 40, 3);
    let mut worst = 0.0f32;
    for rank in [1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 64, 100, 256] {
        for dtype in DTYPES {
            for dora in [false, true] {
                let case = case(rank, n_in, n_out, dtype, dora, rank as u64);
                let mut noise = Noise(9);
                let (x, y) = (noise.values(n_rows * n_in), noise.values(n_rows * n_out));
                worst = worst.max(worst_share(&[(0..n_rows, &case)], &x, &y));
            }
        }
    }
    // A tolerance that is never approached would hide a lost part of the operands.
    assert!(worst > 0.02, "the worst error is {worst} of the tolerance");
}

#[test]
fn agrees_over_several_chunks_column_blocks_and_tiles() {
    if absent() {
        return;
    }
    let first = case(16, 1160, 150, LoraDtype::F16, false, 1);
    let second = case(40, 1160, 150, LoraDtype::BF16, true, 2);
    let mut noise = Noise(3);
    let (x, y) = (noise.values(37 * 1160), noise.values(37 * 150));
    worst_share(&[(0..33, &first), (34..36, &second)], &x, &y);
}

#[test]
fn values_of_very_different_size_keep_their_precision() {
    if absent() {
        return;
    }
    let case = case(8, 64, 24, LoraDtype::F32, false, 4);
    let mut noise = Noise(5);
    for magnitude in [1e-20f32, 1e-6, 1e6, 1e20] {
        let x: Vec<f32> = noise.values(2 * 64).iter().map(|x| x * magnitude).collect();
        worst_share(&[(0..2, &case)], &x, &[0.0; 48]);
    }
}

#[test]
fn random_batches_agree_with_the_reference() {
    if absent() {
        return;
    }
    let shape = (1..40usize, 1..20usize, 1..60usize, 1..20usize, 0..3usize, any::<bool>(), any::<u64>());
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    });
    runner
        .run(&shape, |(rank, n_in, n_out, n_rows, dtype, dora, seed)| {
            let n_in = n_in * 8;
            let first = case(rank, n_in, n_out, DTYPES[dtype], dora, seed);
            let second = case(1 + rank % 8, n_in, n_out, DTYPES[(dtype + 1) % 3], false, seed ^ 1);
            let mut noise = Noise(seed ^ 2);
            let (x, y) = (noise.values((n_rows + 4) * n_in), noise.values((n_rows + 4) * n_out));
            worst_share(&[(0..n_rows, &first), (n_rows + 1..n_rows + 4, &second)], &x, &y);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_row_has_the_same_bits_alone_in_a_mixed_batch_and_in_any_order() {
    if absent() {
        return;
    }
    let (n_in, n_out, n_rows) = (1032, 136, 30);
    let cases: Vec<_> = [16, 3, 64, 1, 8]
        .iter()
        .enumerate()
        .map(|(i, &rank)| case(rank, n_in, n_out, DTYPES[i % 3], i == 2, i as u64))
        .collect();
    let mut noise = Noise(6);
    let (x, y) = (noise.values(n_rows * n_in), noise.values(n_rows * n_out));
    let ends = [0, 1, 4, 23, 24, 30];
    let parts: Vec<_> = (0..5).map(|i| (ends[i]..ends[i + 1], &cases[i])).collect();
    let batch = on_device(&PLAIN, &parts, &x, &y);
    // The same segments, last first.
    let mut turned: Vec<(Range<usize>, &Case)> = Vec::new();
    let (mut turned_x, mut turned_y) = (Vec::new(), Vec::new());
    for (rows, case) in parts.iter().rev() {
        let start = turned_x.len() / n_in;
        turned.push((start..start + rows.len(), *case));
        turned_x.extend_from_slice(&x[rows.start * n_in..rows.end * n_in]);
        turned_y.extend_from_slice(&y[rows.start * n_out..rows.end * n_out]);
    }
    let backwards = on_device(&CUT, &turned, &turned_x, &turned_y);
    for ((rows, case), (turned_rows, _)) in parts.iter().rev().zip(&turned) {
        let together = &batch[rows.start * n_out..rows.end * n_out];
        assert_eq!(bits(&backwards[turned_rows.start * n_out..turned_rows.end * n_out]), bits(together));
        for row in rows.clone() {
            let (x, y) = (&x[row * n_in..][..n_in], &y[row * n_out..][..n_out]);
            let alone = on_device(&PLAIN, &[(0..1, *case)], x, y);
            assert_eq!(bits(&alone), bits(&batch[row * n_out..][..n_out]), "row {row}");
        }
    }
}

#[test]
fn rows_without_an_adapter_or_a_pair_keep_their_bits() {
    if absent() {
        return;
    }
    let case = case(4, 32, 20, LoraDtype::F16, true, 7);
    let mut noise = Noise(8);
    let (x, mut y) = (noise.values(7 * 32), noise.values(7 * 20));
    y[0] = f32::NAN;
    y[5 * 20] = -0.0;
    // Rows 1 and 2 have an adapter with a pair in layer 1, row 4 one without, row 6 one that reads NaN. Layer 0 has no pairs.
    let mut poisoned = x.clone();
    poisoned[6 * 32] = f32::NAN;
    let pair = DevicePair::upload(&PLAIN, &PackedPair::of(&case.pair).expect("a pair")).expect("memory");
    let with = Arc::new(DeviceAdapter::new(&PLAIN, vec![None, Some(pair)]));
    let without = Arc::new(DeviceAdapter::new(&PLAIN, vec![None, None]));
    let segments = [(1..3, Arc::clone(&with)), (4..5, without), (6..7, with)];
    let plan = LoraPlan::new(&PLAIN, &segments).expect("a plan");
    let (x, mut out) = (upload(&PLAIN, &poisoned), upload(&PLAIN, &y));
    let mut scratch = LoraScratch::new(&PLAIN).expect("memory");
    lora_delta(&PLAIN, &plan, &x, &mut [(0, &mut out)], &mut scratch).expect("nothing to do");
    assert_eq!(bits(&download(&PLAIN, &out)), bits(&y));
    lora_delta(&PLAIN, &plan, &x, &mut [(1, &mut out)], &mut scratch).expect("a launch");
    let out = download(&PLAIN, &out);
    for row in [0, 3, 4, 5] {
        assert_eq!(bits(&out[row * 20..][..20]), bits(&y[row * 20..][..20]), "row {row}");
    }
    assert!(out[20..60].iter().zip(&y[20..60]).all(|(out, y)| out.is_finite() && out != y));
    assert!(out[120..].iter().all(|out| out.is_nan()), "a NaN in a row's input is a NaN in its output");
}

#[test]
fn pairs_that_do_not_fit_are_refused() {
    if absent() {
        return;
    }
    let new = |rank: usize, n_in: usize, a: usize, b: usize| {
        PackedPair::new(rank, n_in, 3, &vec![0.0; a], &vec![0.0; b], 1.0, LoraDtype::F32, None)
    };
    assert!(matches!(new(0, 8, 0, 0), Err(DevicePairError::Pair(_))));
    assert_eq!(new(257, 8, 0, 0).unwrap_err().to_string(), "rank 257 is not within 1 to 256");
    assert_eq!(new(2, 12, 24, 6).unwrap_err().to_string(), "12 inputs are no multiple of 8");
    assert_eq!(new(2, 8, 15, 6).unwrap_err().to_string(), "matrix A has 15 values, the shape says 16");
    let pair = DevicePair::upload(&PLAIN, &new(2, 8, 16, 6).expect("a pair")).expect("memory");
    // Two planes of A [2, 8] and of B [3, 4 (2 padded)].
    assert_eq!(pair.bytes(), 2 * 2 * (2 * 8 + 3 * 4));
    let adapter = Arc::new(DeviceAdapter::new(&PLAIN, vec![Some(pair)]));
    let segments = |rows: [Range<usize>; 2]| rows.map(|rows| (rows, Arc::clone(&adapter)));
    let overlapping = segments([2..4, 3..5]);
    let refused = refusal(std::panic::AssertUnwindSafe(|| {
        let _ = LoraPlan::new(&PLAIN, &overlapping);
    }));
    assert!(refused.contains("overlap"), "{refused}");
    let apart = segments([0..1, 1..2]);
    let refused = refusal(std::panic::AssertUnwindSafe(|| {
        let plan = LoraPlan::new(&PLAIN, &apart).expect("a plan");
        let (x, mut y) = (upload(&PLAIN, &[0.0; 8]), upload(&PLAIN, &[0.0; 6]));
        let _ = lora_delta(&PLAIN, &plan, &x, &mut [(0, &mut y)], &mut LoraScratch::new(&PLAIN).expect("memory"));
    }));
    assert_eq!(refused, "x has 8 values, [2, 8] needs 16");
}

#[test]
fn a_cleared_pair_adds_nothing() {
    if absent() {
        return;
    }
    let mut case = case(4, 32, 20, LoraDtype::F32, false, 7);
    Arc::get_mut(&mut case.device).expect("the only owner").clear(&PLAIN).expect("memory");
    let y = Noise(1).values(20);
    assert_eq!(bits(&on_device(&PLAIN, &[(0..1, &case)], &[1.0; 32], &y)), bits(&y));
}

#[test]
fn layers_of_a_launch_have_the_bits_of_their_own_launches() {
    if absent() {
        return;
    }
    let (n_in, n_rows) = (520, 20);
    let shapes = [(16, 130), (3, 40), (70, 260)];
    let adapter = |seed: u64, leave_out: usize| {
        let pairs = shapes.iter().enumerate().map(|(layer, &(rank, n_out))| {
            let case = case(rank + seed as usize, n_in, n_out, DTYPES[layer], layer == 1, seed + layer as u64);
            (layer != leave_out)
                .then(|| DevicePair::upload(&PLAIN, &PackedPair::of(&case.pair).expect("a pair")).expect("memory"))
        });
        Arc::new(DeviceAdapter::new(&PLAIN, pairs.collect()))
    };
    let plan = LoraPlan::new(&PLAIN, &[(0..7, adapter(0, 1)), (8..20, adapter(5, 9))]).expect("a plan");
    let mut noise = Noise(11);
    let x = upload(&PLAIN, &noise.values(n_rows * n_in));
    let ys = shapes.map(|(_, n_out)| noise.values(n_rows * n_out));
    let mut scratch = LoraScratch::new(&PLAIN).expect("memory");
    let mut together = ys.each_ref().map(|y| upload(&PLAIN, y));
    let [first, second, third] = &mut together;
    let list = &mut [(0, first), (1, second), (2, third)];
    lora_delta(&PLAIN, &plan, &x, list, &mut scratch).expect("a launch");
    for (layer, (y, together)) in ys.iter().zip(&together).enumerate() {
        let mut alone = upload(&CUT, y);
        lora_delta(&CUT, &plan, &x, &mut [(layer, &mut alone)], &mut scratch).expect("a launch");
        assert_eq!(bits(&download(&PLAIN, together)), bits(&download(&CUT, &alone)), "layer {layer}");
        assert_ne!(bits(&download(&CUT, &alone)), bits(y));
    }
}
