//! Cases of the adapter delta, stamped on every backend. Tolerance between backends: none.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::testing::{Noise, bits, check, on_every_backend, with};

on_every_backend! {
    equals_the_reference_bit_for_bit,
    agrees_with_f64_for_every_kind_of_rank,
    a_row_alone_equals_the_row_in_a_mixed_batch,
    rows_without_an_adapter_keep_their_bits,
    a_group_of_layers_equals_separate_calls,
}

const DTYPES: [LoraDtype; 3] = [LoraDtype::F32, LoraDtype::F16, LoraDtype::BF16];

fn rounded(dtype: LoraDtype, values: Vec<f32>) -> Vec<f32> {
    let round = |v: f32| match dtype {
        LoraDtype::F32 => v,
        LoraDtype::F16 => f16::from_f32(v).to_f32(),
        LoraDtype::BF16 => bf16::from_f32(v).to_f32(),
    };
    values.into_iter().map(round).collect()
}

/// A pair and its plain matrices, in values of its dtype.
struct Case {
    pair: LoraPair,
    a: Vec<f32>,
    b: Vec<f32>,
    row_scale: Option<Vec<f32>>,
}

fn case(rank: usize, n_in: usize, n_out: usize, dtype: LoraDtype, dora: bool, noise: &mut Noise) -> Case {
    let a = rounded(dtype, noise.values(rank * n_in));
    let b = rounded(dtype, noise.values(n_out * rank));
    let row_scale = dora.then(|| noise.values(n_out));
    let pair = LoraPair::new(rank, n_in, n_out, &a, &b, 0.37, dtype, row_scale.clone()).unwrap();
    Case { pair, a, b, row_scale }
}

/// Applies segments (rows, case) on a backend.
fn delta(backend: Backend, threads: usize, parts: &[(Range<usize>, &Case)], x: &[f32], y: &[f32]) -> Vec<f32> {
    let (n_in, n_out) = (parts[0].1.pair.n_in(), parts[0].1.pair.n_out());
    let segments: Vec<_> = parts.iter().map(|(rows, case)| Segment { rows: rows.clone(), pair: &case.pair }).collect();
    let mut y = y.to_vec();
    with(backend, || lora_delta(&Pool::new(threads), &segments, x, n_in, &mut y, n_out, &mut Scratch::default()));
    y
}

fn equals_the_reference_bit_for_bit(backend: Backend) {
    let shape = (1..40usize, 1..90usize, 1..50usize, 1..20usize, 0..3usize, any::<bool>(), any::<u64>());
    check(80, shape, |(rank, n_in, n_out, n_rows, dtype, dora, seed)| {
        let mut noise = Noise::new(seed);
        let first = case(rank, n_in, n_out, DTYPES[dtype], dora, &mut noise);
        let second = case(1 + rank % 8, n_in, n_out, DTYPES[(dtype + 1) % 3], false, &mut noise);
        let (x, y) = (noise.values((n_rows + 4) * n_in), noise.values((n_rows + 4) * n_out));
        let parts = [(0..n_rows, &first), (n_rows + 1..n_rows + 4, &second)];
        let expected = delta(Backend::Scalar, 1, &parts, &x, &y);
        // Three threads split two tiles into steps, one thread does not.
        for threads in [1, 3] {
            assert_eq!(bits(&delta(backend, threads, &parts, &x, &y)), bits(&expected));
        }
    });
}

fn agrees_with_f64_for_every_kind_of_rank(backend: Backend) {
    let (n_in, n_out, n_rows) = (75, 40, 5);
    for rank in [1, 2, 3, 4, 7, 8, 9, 16, 17, 64, 100, 256] {
        for dtype in DTYPES {
            for dora in [false, true] {
                let mut noise = Noise::new(rank as u64);
                let case = case(rank, n_in, n_out, dtype, dora, &mut noise);
                let (x, y) = (noise.values(n_rows * n_in), noise.values(n_rows * n_out));
                let out = delta(backend, 2, &[(0..n_rows, &case)], &x, &y);
                for row in 0..n_rows {
                    let x = &x[row * n_in..][..n_in];
                    for column in 0..n_out {
                        let (mut sum, mut magnitude) = (0.0f64, 0.0f64);
                        for r in 0..rank {
                            let b = f64::from(case.b[column * rank + r]);
                            for (x, a) in x.iter().zip(&case.a[r * n_in..]) {
                                let term = b * f64::from(*x) * f64::from(*a);
                                sum += term;
                                magnitude += term.abs();
                            }
                        }
                        let mut exact = f64::from(y[row * n_out + column]) + f64::from(0.37f32) * sum;
                        let factor = case.row_scale.as_ref().map_or(1.0, |scale| f64::from(scale[column]));
                        exact *= factor;
                        // Chains of n_in and rank steps, the tree, scale and sum: (n_in + rank + 8) roundings.
                        let steps = (n_in + rank + 8) as f64;
                        let tolerance = steps * f64::from(2f32.powi(-24)) * (0.37 * magnitude + exact.abs() + 4.0);
                        let error = (f64::from(out[row * n_out + column]) - exact).abs();
                        assert!(error <= tolerance * factor.abs().max(1.0), "rank {rank} {dtype:?}: {error}");
                    }
                }
            }
        }
    }
}

fn a_row_alone_equals_the_row_in_a_mixed_batch(backend: Backend) {
    let mut noise = Noise::new(4);
    let (n_in, n_out) = (96, 80);
    let cases: Vec<_> = [16, 3, 64, 1, 8]
        .iter()
        .enumerate()
        .map(|(i, &rank)| case(rank, n_in, n_out, DTYPES[i % 3], i == 2, &mut noise))
        .collect();
    let ends = [1, 4, 23, 24, 30];
    let (x, y) = (noise.values(30 * n_in), noise.values(30 * n_out));
    let parts: Vec<_> = (0..5).map(|i| (if i == 0 { 0 } else { ends[i - 1] }..ends[i], &cases[i])).collect();
    for threads in [1, 2, 8] {
        let batch = delta(backend, threads, &parts, &x, &y);
        for (rows, case) in &parts {
            for row in rows.clone() {
                let (x, y) = (&x[row * n_in..][..n_in], &y[row * n_out..][..n_out]);
                let alone = delta(backend, 1, &[(0..1, case)], x, y);
                assert_eq!(bits(&alone), bits(&batch[row * n_out..][..n_out]), "row {row}, {threads} threads");
            }
        }
    }
}

fn rows_without_an_adapter_keep_their_bits(backend: Backend) {
    let mut noise = Noise::new(5);
    let case = case(4, 32, 20, LoraDtype::F16, true, &mut noise);
    let (x, mut y) = (noise.values(6 * 32), noise.values(6 * 20));
    // Even a NaN or a negative zero of theirs.
    y[0] = f32::NAN;
    y[5 * 20] = -0.0;
    let out = delta(backend, 2, &[(1..3, &case), (4..5, &case)], &x, &y);
    for row in [0, 3, 5] {
        assert_eq!(bits(&out[row * 20..][..20]), bits(&y[row * 20..][..20]));
    }
    assert_ne!(bits(&out[20..40]), bits(&y[20..40]));
}

fn a_group_of_layers_equals_separate_calls(backend: Backend) {
    let mut noise = Noise::new(8);
    let n_in = 64;
    let cases =
        [(16, 48), (3, 20), (40, 33)].map(|(rank, n_out)| case(rank, n_in, n_out, LoraDtype::F16, false, &mut noise));
    for n_rows in [1, 5, 40] {
        let x = noise.values(n_rows * n_in);
        // The middle layer has no adapter for the first row.
        let ranges = [0..n_rows, n_rows.min(1)..n_rows, 0..n_rows];
        let segments: Vec<_> =
            cases.iter().zip(&ranges).map(|(case, rows)| [Segment { rows: rows.clone(), pair: &case.pair }]).collect();
        let before = [48, 20, 33].map(|n_out| noise.values(n_rows * n_out));
        let mut together = before.clone();
        let mut deltas: Vec<_> = together
            .iter_mut()
            .zip(&segments)
            .zip(&cases)
            .map(|((y, segments), case)| Delta { segments, y, n_out: case.pair.n_out() })
            .collect();
        with(backend, || lora_delta_group(&Pool::new(2), &x, n_in, &mut deltas, &mut Scratch::default()));
        for i in 0..3 {
            let alone = delta(backend, 1, &[(ranges[i].clone(), &cases[i])], &x, &before[i]);
            assert_eq!(bits(&together[i]), bits(&alone), "layer {i}, {n_rows} rows");
        }
    }
}

#[test]
fn small_ranks_cost_their_share() {
    let mut noise = Noise::new(6);
    let bytes = |rank, noise: &mut Noise| case(rank, 576, 576, LoraDtype::F16, false, noise).pair.bytes();
    let sixteen = bytes(16, &mut noise);
    assert_eq!(sixteen, 16 * (576 + 576) * 2);
    assert_eq!(bytes(4, &mut noise), sixteen / 4);
    assert_eq!(bytes(1, &mut noise), sixteen / 16);
    assert_eq!(bytes(64, &mut noise), sixteen * 4);
}

#[test]
fn values_of_the_dtype_are_kept_exactly() {
    let mut noise = Noise::new(7);
    for dtype in DTYPES {
        for rank in [3, 20] {
            let case = case(rank, 21, 18, dtype, false, &mut noise);
            for r in 0..rank {
                for k in 0..21 {
                    assert_eq!(case.pair.read(&case.pair.a, case.pair.a_at(r, k)), case.a[r * 21 + k]);
                }
            }
        }
    }
}

#[test]
fn wrong_ranks_and_sizes_are_refused() {
    let new = |rank, a: usize, b: usize, scale: Option<usize>| {
        let scale = scale.map(|n| vec![1.0; n]);
        LoraPair::new(rank, 4, 3, &vec![0.0; a], &vec![0.0; b], 1.0, LoraDtype::F32, scale).map(|pair| pair.rank())
    };
    assert_eq!(new(2, 8, 6, Some(3)), Ok(2));
    assert_eq!(new(0, 0, 0, None).unwrap_err().to_string(), "rank 0 is not within 1 to 256");
    assert_eq!(new(257, 0, 0, None), Err(LoraError::Rank { rank: 257 }));
    assert_eq!(new(2, 7, 6, None).unwrap_err().to_string(), "matrix A has 7 values, the shape says 8");
    assert!(matches!(new(2, 8, 5, None), Err(LoraError::Length { what: "matrix B", .. })));
    assert!(matches!(new(2, 8, 6, Some(4)), Err(LoraError::Length { what: "the row scale", .. })));
    assert!(matches!(
        LoraPair::new(1, usize::MAX, 1, &[], &[], 1.0, LoraDtype::F32, None),
        Err(LoraError::Shape { .. })
    ));
}
