//! Row-wise operations on the device: the bits of the scalar reference.

use half::f16;
use kernels::cuda::kv::DeviceKv;
use kernels::cuda::rows::{DeviceRope, RowPlan, residual_rms_norm, rope_store, swiglu};
use kernels::kv::{KvDtype, KvLayout, PAGE_TOKENS};
use kernels::ops::{self, RopeTable};
use kernels::pool::Pool;

use super::support::{CUT, Noise, PLAIN, absent, bits, download, reference, refusal, upload};

#[test]
fn rms_norm_with_and_without_a_residual_has_the_bits_of_the_reference() {
    if absent() {
        return;
    }
    for (n_rows, n) in [(1, 1), (3, 15), (2, 17), (4, 576), (2, 1000)] {
        let mut noise = Noise(n as u64);
        let (hidden, delta) = (noise.values(n_rows * n), noise.values(n_rows * n));
        let weight = noise.values(n);
        for with_delta in [false, true] {
            let mut sum = hidden.clone();
            if with_delta {
                ops::add_in_place(&kernels::pool::Pool::new(1), &mut sum, &delta);
            }
            let mut expected = vec![0.0; n_rows * n];
            reference(|| ops::rms_norm(&Pool::new(1), &sum, n_rows, &weight, 1e-5, &mut expected));
            for gpu in [PLAIN, CUT] {
                let mut device_hidden = upload(&gpu, &hidden);
                let delta = upload(&gpu, &delta);
                let mut out = upload(&gpu, &vec![0.0; n_rows * n]);
                let delta = with_delta.then_some(&delta);
                let weight = upload(&gpu, &weight);
                residual_rms_norm(&gpu, &mut device_hidden, delta, n_rows, &weight, 1e-5, &mut out, None)
                    .expect("a launch");
                assert_eq!(bits(&download(&gpu, &out)), bits(&expected), "[{n_rows}, {n}]");
                assert_eq!(bits(&download(&gpu, &device_hidden)), bits(&sum));
            }
        }
    }
}

#[test]
fn rotary_embedding_has_the_bits_of_the_reference_in_queries_and_pages() {
    if absent() {
        return;
    }
    let (n_rows, n_heads, n_kv_heads, head_dim) = (5, 3, 2, 64);
    let inv_freq: Vec<f64> = (0..head_dim / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / head_dim as f64)).collect();
    let positions = [0, 1, 40, 2047, 7];
    let places = [(2, 0), (0, 15), (1, 3), (2, 1), (0, 0)];
    let mut noise = Noise(1);
    let q = noise.values(n_rows * n_heads * head_dim);
    let mut k = noise.values(n_rows * n_kv_heads * head_dim);
    let v = noise.values(n_rows * n_kv_heads * head_dim);
    // Beyond f16: kept as its largest number.
    k[head_dim - 1] = 1e9;
    let layout = KvLayout { n_layers: 3, n_kv_heads, head_dim, page_tokens: PAGE_TOKENS, dtype: KvDtype::F16 };
    let mut kv = DeviceKv::new(&PLAIN, layout, 3).expect("memory");
    let rope = DeviceRope::new(&PLAIN, head_dim, 2048, &inv_freq).expect("memory");
    let rows = RowPlan::new(&PLAIN, &positions, &places).expect("memory");
    let mut device_q = upload(&PLAIN, &q);
    let (device_k, device_v) = (upload(&PLAIN, &k), upload(&PLAIN, &v));
    rope_store(&PLAIN, &mut device_q, &device_k, &device_v, n_heads, &rows, &rope, &mut kv, 2).expect("a launch");

    let table = RopeTable::new(head_dim, 2048, &inv_freq);
    let (mut expected_q, mut expected_k) = (q, k);
    reference(|| {
        let pool = Pool::new(1);
        ops::rope(&pool, &mut expected_q, n_rows, n_heads, head_dim, &positions, &table);
        ops::rope(&pool, &mut expected_k, n_rows, n_kv_heads, head_dim, &positions, &table);
    });
    assert_eq!(bits(&download(&PLAIN, &device_q)), bits(&expected_q));
    let data = kv.contents(&PLAIN).expect("memory");
    let stored = |x: f32| f16::from_f32(x.clamp(-65_504.0, 65_504.0)).to_bits();
    for (row, (page, slot)) in places.iter().enumerate() {
        for head in 0..n_kv_heads {
            let block = ((*page as usize * 3 + 2) * n_kv_heads + head) * 2 * 16 * head_dim;
            for d in 0..head_dim {
                let from = (row * n_kv_heads + head) * head_dim + d;
                assert_eq!(data[block + *slot as usize * head_dim + d], stored(expected_k[from]));
                assert_eq!(data[block + (head_dim + d) * 16 + *slot as usize], stored(v[from]));
            }
        }
    }
}

#[test]
fn swiglu_has_the_bits_of_the_reference_for_every_kind_of_number() {
    if absent() {
        return;
    }
    let mut noise = Noise(2);
    let mut gate: Vec<f32> = noise.values(3000).iter().map(|x| x * 40.0).collect();
    let up = noise.values(3000);
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MIN_POSITIVE, 1e-42, -110.0, 100.5];
    gate[..9].copy_from_slice(&special);
    let mut expected = vec![0.0; 3000];
    reference(|| ops::swiglu(&Pool::new(1), &gate, &up, &mut expected));
    let mut out = upload(&PLAIN, &vec![0.0; 3000]);
    swiglu(&PLAIN, &upload(&PLAIN, &gate), &upload(&PLAIN, &up), 1, 2999, &mut out, None).expect("a launch");
    expected[2999] = 0.0;
    assert_eq!(bits(&download(&PLAIN, &out)), bits(&expected));
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    if absent() {
        return;
    }
    let refused = refusal(|| {
        let mut short = upload(&PLAIN, &[0.0; 7]);
        let (mut hidden, weight) = (upload(&PLAIN, &[0.0; 8]), upload(&PLAIN, &[0.0; 4]));
        let _ = residual_rms_norm(&PLAIN, &mut hidden, None, 2, &weight, 1e-5, &mut short, None);
    });
    assert_eq!(refused, "out has 7 values, [2, 4] needs 8");
    let plan = |places: &'static [(u32, u32)]| {
        refusal(move || {
            let _ = RowPlan::new(&PLAIN, &[0, 1], places);
        })
    };
    assert_eq!(plan(&[(0, 0), (0, 16)]), "a slot beyond its page");
    assert_eq!(plan(&[(0, 3), (0, 3)]), "two rows share a place");
    assert_eq!(plan(&[(0, 3), (u32::MAX, 3)]), "a page beyond what a slot number holds");
    assert!(plan(&[(0, 3)]).contains("one place per position"));
    let beyond = |position: u32, page: u32, layer: usize| {
        refusal(move || {
            let layout = KvLayout { n_layers: 1, n_kv_heads: 1, head_dim: 32, page_tokens: 16, dtype: KvDtype::F16 };
            let mut kv = DeviceKv::new(&PLAIN, layout, 1).expect("memory");
            let rope = DeviceRope::new(&PLAIN, 32, 4, &[0.0; 16]).expect("memory");
            let rows = RowPlan::new(&PLAIN, &[position], &[(page, 0)]).expect("memory");
            let (mut q, k) = (upload(&PLAIN, &[0.0; 32]), upload(&PLAIN, &[0.0; 32]));
            let _ = rope_store(&PLAIN, &mut q, &k, &k, 1, &rows, &rope, &mut kv, layer);
        })
    };
    assert_eq!(beyond(4, 0, 0), "a position beyond the table's 4");
    assert_eq!(beyond(0, 1, 0), "a page beyond the pool");
    assert_eq!(beyond(0, 0, 1), "layer 1 of 1");
}
