//! Cases of the product, stamped on every backend. Tolerance between backends: none.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::matrix::BlockType;
use crate::ops;
use crate::testing::{Noise, bits, check, on_every_backend, with};

on_every_backend! {
    equals_the_reference_bit_for_bit,
    a_row_alone_equals_the_row_in_a_batch,
    threads_and_split_leave_no_trace,
    a_group_equals_separate_products,
    prepared_products_equal_separate_steps,
    f32_products_are_as_close_as_f32_sums_can_be,
    int8_products_stay_within_the_rounding_of_activations,
    damaged_activations_show_in_their_row_only,
    tiny_and_zero_activations_give_zero,
}

/// Block formats, then f32, f16, bf16.
const N_KINDS: usize = BlockType::ALL.len() + 3;

/// Random weights of storage kind `kind`. Blocks are random bytes with tame factors: every code and scale occurs.
fn matrix(kind: usize, n_out: usize, n_in: usize, noise: &mut Noise) -> Matrix {
    let Some(&kind) = BlockType::ALL.get(kind) else {
        let values = noise.values(n_out * n_in);
        return match kind - BlockType::ALL.len() {
            0 => Matrix::from_f32(n_out, n_in, &values, None),
            1 => Matrix::from_f16(n_out, n_in, &values.iter().map(|&v| f16::from_f32(v)).collect::<Vec<_>>(), None),
            _ => Matrix::from_bf16(n_out, n_in, &values.iter().map(|&v| bf16::from_f32(v)).collect::<Vec<_>>(), None),
        }
        .unwrap();
    };
    let mut bytes: Vec<u8> =
        (0..n_out * n_in / kind.block_len() * kind.block_bytes()).map(|_| noise.bits() as u8).collect();
    for block in bytes.chunks_exact_mut(kind.block_bytes()) {
        let halves: &[usize] = match kind {
            BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
            BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
            BlockType::Q2K => &[80, 82],
            BlockType::Q3K => &[108],
            BlockType::Q6K => &[208],
        };
        for &at in halves {
            block[at..at + 2].copy_from_slice(&f16::from_f32(noise.value() / 64.0).to_le_bytes());
        }
    }
    Matrix::from_blocks(n_out, n_in, kind, &bytes, None).unwrap()
}

fn product(backend: Backend, threads: usize, precision: Precision, x: &[f32], w: &Matrix) -> Vec<f32> {
    with(backend, || {
        let n_rows = x.len() / w.n_in();
        let mut out = vec![f32::NAN; n_rows * w.n_out()];
        matmul(&Pool::new(threads), precision, x, n_rows, w, &mut out, &mut Scratch::default());
        out
    })
}

/// Storage kind, outputs, inputs in units of 32 (256 for K-quants), rows, precision, seed.
fn shapes() -> impl Strategy<Value = (usize, usize, usize, usize, Precision, u64)> {
    let precision = prop_oneof![Just(Precision::F32), Just(Precision::Int8)];
    (0..N_KINDS, 1..72usize, 1..5usize, 1..11usize, precision, any::<u64>())
}

fn inputs(kind: usize, units: usize) -> usize {
    match BlockType::ALL.get(kind) {
        Some(kind) if kind.block_len() == 256 => 256,
        Some(_) => units * 32,
        // Dense rows may have any length.
        None => units * 37,
    }
}

fn equals_the_reference_bit_for_bit(backend: Backend) {
    check(60, shapes(), |(kind, n_out, units, n_rows, precision, seed)| {
        let mut noise = Noise::new(seed);
        let n_in = inputs(kind, units);
        let w = matrix(kind, n_out, n_in, &mut noise);
        let x = noise.values(n_rows * n_in);
        let expected = product(Backend::Scalar, 1, precision, &x, &w);
        assert_eq!(bits(&product(backend, 1, precision, &x, &w)), bits(&expected));
    });
    // Shapes that fill whole row blocks, several stretches of inputs, and every storage kind.
    for kind in 0..N_KINDS {
        let mut noise = Noise::new(kind as u64);
        let n_in = if kind < BlockType::ALL.len() { 768 } else { 700 };
        let w = matrix(kind, 37, n_in, &mut noise);
        let x = noise.values(67 * n_in);
        for precision in [Precision::F32, Precision::Int8] {
            // Every tile, and tiles after full ones.
            for n_rows in (1..=8).chain([67]) {
                let x = &x[..n_rows * n_in];
                let expected = product(Backend::Scalar, 1, precision, x, &w);
                assert_eq!(bits(&product(backend, 2, precision, x, &w)), bits(&expected), "kind {kind} {precision:?}");
            }
        }
    }
}

fn a_row_alone_equals_the_row_in_a_batch(backend: Backend) {
    check(40, shapes(), |(kind, n_out, units, n_rows, precision, seed)| {
        let mut noise = Noise::new(seed);
        let n_in = inputs(kind, units);
        let w = matrix(kind, n_out, n_in, &mut noise);
        let x = noise.values(n_rows * n_in);
        let batch = product(backend, 1, precision, &x, &w);
        for row in 0..n_rows {
            let alone = product(backend, 1, precision, &x[row * n_in..][..n_in], &w);
            assert_eq!(bits(&alone), bits(&batch[row * n_out..][..n_out]));
        }
    });
}

fn threads_and_split_leave_no_trace(backend: Backend) {
    let mut noise = Noise::new(5);
    for kind in [1, 4, 9, 10] {
        let w = matrix(kind, 130, 256, &mut noise);
        let x = noise.values(70 * 256);
        for precision in [Precision::F32, Precision::Int8] {
            let one = product(backend, 1, precision, &x, &w);
            for threads in [2, 3] {
                assert_eq!(bits(&product(backend, threads, precision, &x, &w)), bits(&one));
            }
        }
    }
}

fn a_group_equals_separate_products(backend: Backend) {
    let mut noise = Noise::new(6);
    // Mixed on purpose: 4 bit, dense and 8 bit, of different widths.
    let matrices = [matrix(1, 50, 96, &mut noise), matrix(11, 16, 96, &mut noise), matrix(4, 33, 96, &mut noise)];
    let x = noise.values(3 * 96);
    for precision in [Precision::F32, Precision::Int8] {
        let mut outs = matrices.each_ref().map(|w| vec![0.0; 3 * w.n_out()]);
        with(backend, || {
            let mut products: Vec<_> = matrices.iter().zip(&mut outs).map(|(w, out)| Product { w, out }).collect();
            matmul_group(&Pool::new(2), precision, &x, 3, &mut products, &mut Scratch::default());
        });
        for (w, out) in matrices.iter().zip(&outs) {
            assert_eq!(bits(out), bits(&product(backend, 1, precision, &x, w)));
        }
    }
}

/// Sum and sum of magnitudes in f64 of one output.
fn exact(x: &[f32], w: &[f32]) -> (f64, f64) {
    let terms = || x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
    (terms().sum(), terms().map(f64::abs).sum())
}

/// A chain of n fused steps is off by at most n · 2^-24 · Σ|x w| (Higham, Accuracy and Stability, section 3.1, with the
/// unit roundoff 2^-24; the higher-order part is below the slack of rounding n up by one).
fn chain_tolerance(steps: usize, magnitude: f64) -> f64 {
    (steps + 1) as f64 * f64::from(2f32.powi(-24)) * magnitude
}

fn prepared_products_equal_separate_steps(backend: Backend) {
    let (hidden, inner) = (96, 288);
    let mut noise = Noise::new(29);
    let (up, down) = (matrix(1, inner, hidden, &mut noise), matrix(4, hidden, inner, &mut noise));
    let w = noise.values(hidden);
    for (n_rows, precision) in [(1, Precision::Int8), (8, Precision::F32), (19, Precision::Int8)] {
        let (start, added) = (noise.values(n_rows * hidden), noise.values(n_rows * hidden));
        let steps = |together: bool, threads: usize| {
            with(backend, || {
                let (pool, mut scratch) = (Pool::new(threads), Scratch::default());
                let (mut residual, mut normed) = (start.clone(), vec![f32::NAN; n_rows * hidden]);
                let (mut wide, mut gated) = (vec![f32::NAN; n_rows * inner], vec![f32::NAN; n_rows * inner]);
                let mut out = vec![f32::NAN; n_rows * hidden];
                if together {
                    let added = Some(&added[..]);
                    add_and_norm(&pool, precision, &mut residual, added, &w, 1e-5, &mut normed, &mut scratch);
                    let products = &mut [Product { w: &up, out: &mut wide }];
                    matmul_group_prepared(&pool, precision, &normed, n_rows, products, &mut scratch);
                    gate(&pool, precision, n_rows, &wide, &wide, &mut gated, &mut scratch);
                    let products = &mut [Product { w: &down, out: &mut out }];
                    matmul_group_prepared(&pool, precision, &gated, n_rows, products, &mut scratch);
                } else {
                    ops::add_in_place(&pool, &mut residual, &added);
                    ops::rms_norm(&pool, &residual, n_rows, &w, 1e-5, &mut normed);
                    matmul(&pool, precision, &normed, n_rows, &up, &mut wide, &mut scratch);
                    ops::swiglu(&pool, &wide, &wide, &mut gated);
                    matmul(&pool, precision, &gated, n_rows, &down, &mut out, &mut scratch);
                }
                [bits(&residual), bits(&normed), bits(&gated), bits(&out)]
            })
        };
        let expected = steps(false, 1);
        assert_eq!(steps(true, 1), expected, "{n_rows} rows");
        assert_eq!(steps(true, 3), expected, "{n_rows} rows on three threads");
    }
}

#[test]
fn a_product_of_something_else_than_what_was_prepared_is_refused() {
    let w = matrix(1, 32, 32, &mut Noise::new(1));
    let multiply = || {
        let mut out = [0.0; 32];
        let products = &mut [Product { w: &w, out: &mut out }];
        matmul_group_prepared(&Pool::new(1), Precision::Int8, &[0.0; 32], 1, products, &mut Scratch::default());
    };
    assert!(std::panic::catch_unwind(multiply).is_err());
}

fn f32_products_are_as_close_as_f32_sums_can_be(backend: Backend) {
    for kind in 0..N_KINDS {
        let mut noise = Noise::new(100 + kind as u64);
        let (n_out, n_in) = (20, 512);
        let w = matrix(kind, n_out, n_in, &mut noise);
        let x = noise.values(2 * n_in);
        let out = product(backend, 1, Precision::F32, &x, &w);
        let mut row = vec![0.0; n_in];
        for column in 0..n_out {
            w.row(column, &mut row);
            for (r, x) in x.chunks(n_in).enumerate() {
                let (sum, magnitude) = exact(x, &row);
                let error = (f64::from(out[r * n_out + column]) - sum).abs();
                assert!(error <= chain_tolerance(n_in, magnitude), "kind {kind}: {error}");
            }
        }
    }
}

/// Rounding moves an activation by at most half a step, `m / 254` with `m` the largest magnitude of its block (a
/// thousandth more for the rounding of the step itself); so an output by at most `Σ |w| m / 254`, plus the f32 sums
/// over twice the groups.
fn int8_products_stay_within_the_rounding_of_activations(backend: Backend) {
    for kind in 0..BlockType::ALL.len() {
        let mut noise = Noise::new(200 + kind as u64);
        let (n_out, n_in) = (20, 512);
        let w = matrix(kind, n_out, n_in, &mut noise);
        let x = noise.values(2 * n_in);
        let out = product(backend, 1, Precision::Int8, &x, &w);
        let mut row = vec![0.0; n_in];
        let mut used = 0.0f64;
        for column in 0..n_out {
            w.row(column, &mut row);
            for (r, x) in x.chunks(n_in).enumerate() {
                let rounding: f64 = x
                    .chunks(32)
                    .zip(row.chunks(32))
                    .map(|(x, w)| {
                        let m = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                        f64::from(m) / 254.0 * 1.001 * w.iter().map(|w| f64::from(w.abs())).sum::<f64>()
                    })
                    .sum();
                let (sum, _) = exact(x, &row);
                // Code and minimum parts may cancel, so the sums are bounded by their separate magnitudes: codes reach
                // 63 steps of scale against a weight's own size; a factor 64 covers it.
                let magnitude: f64 = x.iter().zip(&row).map(|(x, w)| f64::from(x.abs() * w.abs())).sum();
                let error = (f64::from(out[r * n_out + column]) - sum).abs();
                assert!(error <= rounding + 64.0 * chain_tolerance(2 * n_in / 16, magnitude), "kind {kind}: {error}");
                used = used.max(error / rounding);
            }
        }
        // The bound is real: errors are not all far below it.
        assert!(used > 0.01, "kind {kind} uses only {used} of the tolerance");
    }
}

fn damaged_activations_show_in_their_row_only(backend: Backend) {
    let mut noise = Noise::new(8);
    for kind in [1, 4, 8] {
        let w = matrix(kind, 20, 256, &mut noise);
        let clean = noise.values(3 * 256);
        for precision in [Precision::F32, Precision::Int8] {
            let expected = product(backend, 1, precision, &clean, &w);
            for damage in [f32::NAN, f32::INFINITY] {
                let mut x = clean.clone();
                x[256 + 77] = damage;
                let out = product(backend, 1, precision, &x, &w);
                assert!(out[20..40].iter().all(|value| !value.is_finite()), "{precision:?}");
                assert_eq!(bits(&out[..20]), bits(&expected[..20]));
                assert_eq!(bits(&out[40..]), bits(&expected[40..]));
            }
        }
    }
}

fn tiny_and_zero_activations_give_zero(backend: Backend) {
    let w = matrix(1, 20, 64, &mut Noise::new(9));
    for x in [0.0, -0.0, 1e-40, f32::from_bits(1)] {
        let out = product(backend, 1, Precision::Int8, &[x; 64], &w);
        assert!(out.iter().all(|value| *value == 0.0));
    }
}

#[test]
fn wrong_lengths_are_refused_before_any_work() {
    let w = Matrix::from_f32(4, 8, &[1.0; 32], None).unwrap();
    let call = |x: usize, out: usize| {
        std::panic::catch_unwind(|| {
            let (x, mut out) = (vec![0.0; x], vec![0.0; out]);
            matmul(&Pool::new(1), Precision::F32, &x, 2, &w, &mut out, &mut Scratch::default());
        })
    };
    assert!(call(16, 8).is_ok());
    assert!(call(15, 8).is_err());
    assert!(call(16, 9).is_err());
}

#[test]
fn no_rows_is_no_work() {
    let w = Matrix::from_f32(4, 8, &[1.0; 32], None).unwrap();
    matmul(&Pool::new(2), Precision::Int8, &[], 0, &w, &mut [], &mut Scratch::default());
}
