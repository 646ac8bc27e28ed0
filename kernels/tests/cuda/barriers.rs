//! Planted faults: every barrier of every kernel is left out once, and the emulation must show it.

use kernels::cuda::emulation::{Emulated, N_BARRIERS};
use kernels::cuda::rows::residual_rms_norm;
use kernels::lora::LoraDtype;

use super::support::{Noise, PLAIN, bits, download, upload};
use super::{attention, lora, matmul};

/// The results of all kernels that have barriers, as bits.
fn everything(gpu: &Emulated) -> Vec<u32> {
    let mut noise = Noise(1);
    let mut all = Vec::new();
    let pair = lora::case(40, 600, 40, LoraDtype::F16, false, 2);
    let (x, y) = (noise.values(17 * 600), noise.values(17 * 40));
    all.extend(bits(&lora::on_device(gpu, &[(0..17, &pair)], &x, &y)));
    let fixture = attention::fixture(1, 4, 64, &[300], 3);
    let q = noise.values(8 * 4 * 64);
    all.extend(bits(&fixture.on_device(gpu, &[(0, 292, 8)], &q)));
    let (mut hidden, weight) = (upload(gpu, &noise.values(2 * 200)), upload(gpu, &noise.values(200)));
    let mut out = upload(gpu, &[0.0; 400]);
    residual_rms_norm(gpu, &mut hidden, None, 2, &weight, 1e-5, &mut out, None).expect("a launch");
    all.extend(bits(&download(gpu, &out)));
    for matrix in matmul::one_of_each_kind(64, 576) {
        // For a kernel whose warps work alone, and for the tall one.
        for n_rows in [9, 65] {
            let x = noise.values(n_rows * 576);
            all.extend(matmul::on_device(gpu, &[&matrix], &x).iter().flat_map(|out| bits(out)));
        }
    }
    all
}

#[test]
fn the_order_of_threads_changes_nothing() {
    let forwards = everything(&PLAIN);
    assert!(forwards.iter().all(|&bits| f32::from_bits(bits).is_finite()));
    assert_eq!(everything(&Emulated { backwards: true, ..PLAIN }), forwards);
}

#[test]
fn every_missing_barrier_shows() {
    let right = everything(&PLAIN);
    for barrier in 1..=N_BARRIERS {
        let wrong = |backwards| everything(&Emulated { backwards, skip_barrier: barrier, ..PLAIN }) != right;
        assert!(wrong(false) || wrong(true), "nobody missed barrier {barrier}");
    }
}
