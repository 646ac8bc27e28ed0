//! Cases of the row-wise operations, stamped on every backend. Tolerance between backends: none.

use proptest::prelude::*;

use super::*;
use crate::backend::Backend;
use crate::testing::{Noise, bits, check, on_every_backend, with};

on_every_backend! {
    norms_rotations_and_gates_equal_the_reference_bit_for_bit,
    the_exponential_inside_swiglu_equals_the_reference_over_its_whole_range,
    maximum_and_first_index_agree_with_a_plain_search,
    rows_alone_equal_rows_in_a_batch,
}

fn norm(n_rows: usize, x: &[f32], w: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len()];
    rms_norm(&Pool::new(2), x, n_rows, w, 1e-5, &mut out);
    out
}

fn rotate(n_rows: usize, n_heads: usize, x: &[f32], positions: &[u32], table: &RopeTable) -> Vec<f32> {
    let mut x = x.to_vec();
    rope(&Pool::new(2), &mut x, n_rows, n_heads, table.head_dim(), positions, table);
    x
}

fn gate(gate: &[f32], up: &[f32]) -> Vec<f32> {
    let mut out = vec![f32::NAN; gate.len()];
    swiglu(&Pool::new(2), gate, up, &mut out);
    out
}

fn table(head_dim: usize, positions: usize) -> RopeTable {
    let inv_freq: Vec<f64> = (0..head_dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    RopeTable::new(head_dim, positions, &inv_freq)
}

fn norms_rotations_and_gates_equal_the_reference_bit_for_bit(backend: Backend) {
    check(60, (1..6usize, 1..4usize, 1..50usize, any::<u64>()), |(n_rows, n_heads, half, seed)| {
        let mut noise = Noise::new(seed);
        let n = n_heads * half * 2;
        let (x, w) = (noise.values(n_rows * n), noise.values(n));
        let up = noise.values(n_rows * n);
        let table = table(half * 2, 64);
        let positions: Vec<u32> = (0..n_rows).map(|_| (noise.bits() % 64) as u32).collect();
        let all = |backend| {
            with(backend, || [norm(n_rows, &x, &w), rotate(n_rows, n_heads, &x, &positions, &table), gate(&x, &up)])
        };
        assert_eq!(all(backend).map(|out| bits(&out)), all(Backend::Scalar).map(|out| bits(&out)));
    });
}

fn the_exponential_inside_swiglu_equals_the_reference_over_its_whole_range(backend: Backend) {
    let mut x: Vec<f32> = (-11_500..10_500).map(|i| i as f32 / 100.0).collect();
    x.extend([f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, f32::MIN_POSITIVE, f32::MAX, f32::MIN]);
    let ones = vec![1.0; x.len()];
    let expected = with(Backend::Scalar, || gate(&x, &ones));
    assert_eq!(bits(&with(backend, || gate(&x, &ones))), bits(&expected));
}

fn maximum_and_first_index_agree_with_a_plain_search(backend: Backend) {
    check(200, (prop::collection::vec(-3i32..4, 0..70), any::<u64>()), |(values, seed)| {
        let mut x: Vec<f32> = values.iter().map(|&v| v as f32).collect();
        let mut noise = Noise::new(seed);
        for value in &mut x {
            match noise.bits() % 16 {
                0 => *value = f32::NAN,
                1 => *value = f32::NEG_INFINITY,
                2 => *value = -0.0,
                _ => {}
            }
        }
        let expected =
            x.iter().enumerate().fold((f32::NEG_INFINITY, 0), |best, (i, &v)| if v > best.0 { (v, i) } else { best });
        let found = with(backend, || max_and_argmax(&x));
        assert_eq!((found.0.to_bits(), found.1), (expected.0.to_bits(), expected.1), "{x:?}");
    });
}

fn rows_alone_equal_rows_in_a_batch(backend: Backend) {
    // Large enough to be split over threads.
    let (n_rows, n) = (130, 576);
    let mut noise = Noise::new(1);
    let (x, w) = (noise.values(n_rows * n), noise.values(n));
    let table = table(64, 256);
    let positions: Vec<u32> = (0..n_rows as u32).collect();
    with(backend, || {
        let normed = norm(n_rows, &x, &w);
        let rotated = rotate(n_rows, 9, &x, &positions, &table);
        for row in [0, 57, 129] {
            let part = row * n..(row + 1) * n;
            assert_eq!(bits(&norm(1, &x[part.clone()], &w)), bits(&normed[part.clone()]));
            let alone = rotate(1, 9, &x[part.clone()], &positions[row..=row], &table);
            assert_eq!(bits(&alone), bits(&rotated[part]));
        }
    });
}

#[test]
fn the_exponential_is_within_two_ulp() {
    let mut worst = 0.0f64;
    for i in -87_300_000..88_700_000i64 {
        if i % 97 != 0 {
            continue;
        }
        let x = i as f32 / 1e6;
        let exact = f64::from(x).exp();
        let ulp = f64::from(f32::from_bits((exact as f32).to_bits() + 1)) - f64::from(exact as f32);
        worst = worst.max((f64::from(exp(x)) - exact).abs() / ulp);
    }
    assert!(worst <= 2.0, "{worst} ulp");
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    assert_eq!(exp(f32::INFINITY), f32::INFINITY);
    assert!(exp(f32::NAN).is_nan());
    // Subnormal results round once.
    assert!((f64::from(exp(-100.0)) - (-100f64).exp()).abs() <= f64::from(f32::from_bits(1)));
}

#[test]
fn norm_rotation_and_gate_agree_with_f64() {
    let mut noise = Noise::new(2);
    let (x, w, up) = (noise.values(64), noise.values(64), noise.values(64));
    let mean = x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / 64.0;
    for ((out, x), w) in norm(1, &x, &w).iter().zip(&x).zip(&w) {
        let exact = f64::from(*x) / (mean + 1e-5f64).sqrt() * f64::from(*w);
        assert!((f64::from(*out) - exact).abs() <= 1e-5 * exact.abs().max(1e-3));
    }
    for ((out, x), up) in gate(&x, &up).iter().zip(&x).zip(&up) {
        let exact = f64::from(*x) / (1.0 + (-f64::from(*x)).exp()) * f64::from(*up);
        assert!((f64::from(*out) - exact).abs() <= 1e-6 * exact.abs().max(1e-3));
    }
    let rotated = rotate(1, 1, &x, &[13], &table(64, 16));
    for i in 0..32 {
        let angle = 13.0 * 10_000f64.powf(-2.0 * i as f64 / 64.0);
        let (a, b) = (f64::from(x[i]), f64::from(x[i + 32]));
        assert!((f64::from(rotated[i]) - (a * angle.cos() - b * angle.sin())).abs() < 1e-6);
        assert!((f64::from(rotated[i + 32]) - (b * angle.cos() + a * angle.sin())).abs() < 1e-6);
    }
}

#[test]
fn additions_add() {
    let mut y = vec![1.0, 2.0, 3.0, 4.0];
    add_in_place(&Pool::new(2), &mut y, &[0.5, 0.5, 0.5, 0.5]);
    add_bias_rows(&mut y, 2, &[10.0, 20.0]);
    assert_eq!(y, [11.5, 22.5, 13.5, 24.5]);
}

#[test]
fn positions_beyond_the_table_are_refused() {
    let table = table(4, 8);
    let call = |position| std::panic::catch_unwind(|| rotate(1, 1, &[1.0; 4], &[position], &table));
    assert!(call(7).is_ok());
    assert!(call(8).is_err());
}
