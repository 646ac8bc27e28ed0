//! Products with frozen weights on the device. Where weights are coded, every quarter of the inputs has the bits of the
//! CPU's product over these inputs, so results are compared with `==`; dense ones within a tolerance.

use half::{bf16, f16};
use kernels::cuda::matmul::{Activations, DeviceMatrix, Form, TokenList, embed, products};
use kernels::cuda::rows::{residual_rms_norm, swiglu};
use kernels::matmul::{Precision, Scratch, matmul};
use kernels::matrix::{BlockType, Matrix};
use kernels::pool::Pool;

use super::support::{CUT, Executor, Noise, PLAIN, absent, bits, download, reference, refusal, upload};

/// A GGUF tensor: random codes, scales of a plausible size.
struct Blocks {
    kind: BlockType,
    n_out: usize,
    n_in: usize,
    data: Vec<u8>,
}

fn blocks(kind: BlockType, n_out: usize, n_in: usize, seed: u64) -> Blocks {
    let mut noise = Noise(seed);
    let n_blocks = n_out * n_in / kind.block_len();
    let mut data: Vec<u8> = (0..n_blocks * kind.block_bytes()).map(|_| noise.bits() as u8).collect();
    for block in data.chunks_exact_mut(kind.block_bytes()) {
        // Where the format keeps its f16 numbers.
        let halves: &[usize] = match kind {
            BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
            BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
            BlockType::Q2K => &[80, 82],
            BlockType::Q3K => &[108],
            BlockType::Q6K => &[208],
        };
        for &at in halves {
            block[at..at + 2].copy_from_slice(&f16::from_f32(noise.value() * 0.01).to_le_bytes());
        }
    }
    Blocks { kind, n_out, n_in, data }
}

// === impl Blocks ===

impl Blocks {
    fn matrix(&self) -> Matrix {
        Matrix::from_blocks(self.n_out, self.n_in, self.kind, &self.data, None).expect("a matrix")
    }

    /// The CPU's product over some inputs of every row: `[n_rows, n_out]`.
    fn part(&self, x: &[f32], begin: usize, end: usize) -> Vec<f32> {
        let n_rows = x.len() / self.n_in;
        if begin == end {
            return vec![0.0; n_rows * self.n_out];
        }
        let (len, bytes) = (self.kind.block_len(), self.kind.block_bytes());
        assert!(begin.is_multiple_of(len) && end.is_multiple_of(len), "a quarter cuts a block");
        let row_bytes = self.n_in / len * bytes;
        let rows = self.data.chunks_exact(row_bytes);
        let data: Vec<u8> = rows.flat_map(|row| &row[begin / len * bytes..end / len * bytes]).copied().collect();
        let w = Matrix::from_blocks(self.n_out, end - begin, self.kind, &data, None).expect("a matrix");
        let x: Vec<f32> = x.chunks_exact(self.n_in).flat_map(|row| &row[begin..end]).copied().collect();
        let mut out = vec![0.0; n_rows * self.n_out];
        reference(|| matmul(&Pool::new(1), Precision::Int8, &x, n_rows, &w, &mut out, &mut Scratch::default()));
        out
    }

    /// The four quarters, added in order.
    fn expected(&self, x: &[f32]) -> Vec<f32> {
        let n_blocks = self.n_in.div_ceil(64);
        let bound = |part: usize| (n_blocks * part / 4 * 64).min(self.n_in);
        let mut quarters = (0..4).map(|part| self.part(x, bound(part), bound(part + 1)));
        let mut sum = quarters.next().expect("four quarters");
        for quarter in quarters {
            sum.iter_mut().zip(quarter).for_each(|(sum, value)| *sum += value);
        }
        sum
    }
}

/// Products of all rows with some matrices in one launch.
pub(crate) fn on_device(gpu: &Executor, matrices: &[&DeviceMatrix<Executor>], x: &[f32]) -> Vec<Vec<f32>> {
    let n_in = matrices[0].n_in();
    let n_rows = x.len() / n_in;
    let mut activations = Activations::new(gpu, n_rows, n_in, true, true).expect("memory");
    let x = upload(gpu, x);
    if matrices.iter().any(|matrix| matrix.form() != Form::Dense) {
        activations.round(gpu, &x, n_rows, n_in).expect("a launch");
    }
    if matrices.iter().any(|matrix| matrix.form() == Form::Dense) {
        activations.split(gpu, &x, n_rows, n_in).expect("a launch");
    }
    let mut outs: Vec<_> =
        matrices.iter().map(|matrix| upload(gpu, &vec![f32::NAN; n_rows * matrix.n_out()])).collect();
    let mut list: Vec<_> = matrices.iter().copied().zip(&mut outs).collect();
    products(gpu, &activations, n_rows, &mut list).expect("a launch");
    outs.iter().map(|out| download(gpu, out)).collect()
}

/// Formats whose quarters have the CPU's bits: one step per group of the CPU.
const EXACT: [(BlockType, usize); 8] = [
    (BlockType::Q4_0, 32),
    (BlockType::Q4_1, 32),
    (BlockType::Q5_0, 32),
    (BlockType::Q8_0, 32),
    (BlockType::Q3K, 256),
    (BlockType::Q4K, 256),
    (BlockType::Q6K, 256),
    (BlockType::Q4_1, 64),
];

#[test]
fn coded_products_have_the_bits_of_the_reference_for_every_number_of_rows() {
    if absent() {
        return;
    }
    for (index, (kind, unit)) in EXACT.into_iter().enumerate() {
        // K formats: quarters of whole blocks. Others: an odd number of blocks of 32, so that the last record is half full.
        let n_in = if unit == 256 { 1024 } else { 64 * 9 + 32 };
        let weights = blocks(kind, 40, n_in, index as u64);
        let matrix = DeviceMatrix::upload(&PLAIN, &weights.matrix()).expect("memory");
        let x = Noise(90 + index as u64).values(131 * n_in);
        let expected = weights.expected(&x);
        // Every kernel, with and without a rest; 131 rows go through the tall one on PLAIN.
        for n_rows in [1, 8, 9, 16, 31, 60, 131] {
            for gpu in [PLAIN, CUT] {
                let got = on_device(&gpu, &[&matrix], &x[..n_rows * n_in]).remove(0);
                assert_eq!(bits(&got), bits(&expected[..n_rows * 40]), "{kind:?}, {n_rows} rows");
            }
        }
    }
}

#[test]
fn formats_with_two_steps_per_group_agree_within_their_roundings() {
    if absent() {
        return;
    }
    for kind in [BlockType::Q5_1, BlockType::Q5K, BlockType::Q2K] {
        let weights = blocks(kind, 24, 1024, 3);
        let x = Noise(4).values(3 * 1024);
        let got = on_device(&PLAIN, &[&DeviceMatrix::upload(&PLAIN, &weights.matrix()).expect("memory")], &x).remove(0);
        let mut row = vec![0.0; 1024];
        for (at, (got, expected)) in got.iter().zip(weights.expected(&x)).enumerate() {
            weights.matrix().row(at % 24, &mut row);
            // A rounding of 2^-24 for each of two steps per 16 inputs on either side, relative to the sum of magnitudes,
            // of which codes and minima may each be several times the weight.
            let magnitude: f32 = row.iter().zip(&x[at / 24 * 1024..]).map(|(w, x)| (w * x).abs()).sum();
            let tolerance = 16.0 * magnitude * 256.0 * 2f32.powi(-24);
            assert!((got - expected).abs() <= tolerance, "{kind:?}: {got} and {expected}, tolerance {tolerance}");
        }
    }
}

/// Dense weights in every dtype, as the device keeps them.
fn dense(n_out: usize, n_in: usize, seed: u64) -> [Matrix; 3] {
    let values: Vec<f32> = Noise(seed).values(n_out * n_in).iter().map(|v| v * 0.05).collect();
    let halves: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
    let brains: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
    [
        Matrix::from_f32(n_out, n_in, &values, None).expect("a matrix"),
        Matrix::from_f16(n_out, n_in, &halves, None).expect("a matrix"),
        Matrix::from_bf16(n_out, n_in, &brains, None).expect("a matrix"),
    ]
}

/// A coded matrix and a dense one, for tests of all kernels.
pub(crate) fn one_of_each_kind(n_out: usize, n_in: usize) -> [DeviceMatrix<Executor>; 2] {
    let [full, ..] = dense(n_out, n_in, 17);
    [blocks(BlockType::Q4_1, n_out, n_in, 18).matrix(), full]
        .map(|matrix| DeviceMatrix::upload(&PLAIN, &matrix).expect("memory"))
}

#[test]
fn dense_products_agree_with_sums_in_f64() {
    if absent() {
        return;
    }
    let (n_out, n_in, n_rows) = (40, 8 * 37, 70);
    let mut worst = 0.0f64;
    for matrix in dense(n_out, n_in, 1) {
        let device = DeviceMatrix::upload(&PLAIN, &matrix).expect("memory");
        let x = Noise(2).values(n_rows * n_in);
        let got = on_device(&PLAIN, &[&device], &x).remove(0);
        let mut row = vec![0.0; n_in];
        for column in 0..n_out {
            matrix.row(column, &mut row);
            for line in 0..n_rows {
                let x = &x[line * n_in..][..n_in];
                let terms = || x.iter().zip(&row).map(|(x, w)| f64::from(*x) * f64::from(*w));
                let (sum, magnitude) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
                // Both operands keep 22 bits; sums round to 2^-24 per step. A tensor core may cut instead of round, which
                // is twice that.
                let tolerance = magnitude * (2.0 * 2f64.powi(-22) + 2.0 * n_in as f64 * 2f64.powi(-24));
                let share = (f64::from(got[line * n_out + column]) - sum).abs() / tolerance;
                assert!(share <= 1.0, "{} and {sum}", got[line * n_out + column]);
                worst = worst.max(share);
            }
        }
    }
    assert!(worst > 0.002, "the worst error is {worst} of the tolerance");
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_any_batch() {
    if absent() {
        return;
    }
    let (n_out, n_in) = (40, 640);
    for matrix in one_of_each_kind(n_out, n_in) {
        let x = Noise(7).values(131 * n_in);
        let whole = on_device(&PLAIN, &[&matrix], &x).remove(0);
        for (first, n_rows) in [(0, 131), (0, 1), (77, 1), (3, 12), (20, 30), (64, 60)] {
            let got = on_device(&CUT, &[&matrix], &x[first * n_in..][..n_rows * n_in]).remove(0);
            assert_eq!(bits(&got), bits(&whole[first * n_out..][..n_rows * n_out]), "rows from {first}");
        }
    }
}

#[test]
fn several_matrices_of_a_launch_have_the_bits_of_their_own_launches() {
    if absent() {
        return;
    }
    let n_in = 256;
    let [full, half, _] = dense(20, n_in, 8);
    let matrices = [blocks(BlockType::Q4K, 70, n_in, 9).matrix(), full, half]
        .map(|matrix| DeviceMatrix::upload(&PLAIN, &matrix).expect("memory"));
    for n_rows in [3, 100] {
        let x = Noise(10).values(n_rows * n_in);
        let together = on_device(&PLAIN, &matrices.each_ref(), &x);
        for (matrix, together) in matrices.iter().zip(together) {
            assert_eq!(bits(&on_device(&CUT, &[matrix], &x)[0]), bits(&together));
        }
    }
}

#[test]
fn damage_stays_in_its_row() {
    if absent() {
        return;
    }
    let weights = blocks(BlockType::Q4_1, 16, 128, 11);
    let matrix = DeviceMatrix::upload(&PLAIN, &weights.matrix()).expect("memory");
    let mut x = Noise(12).values(3 * 128);
    let clean = on_device(&PLAIN, &[&matrix], &x).remove(0);
    x[128 + 5] = f32::NAN;
    x[2 * 128 + 70] = f32::INFINITY;
    let got = on_device(&PLAIN, &[&matrix], &x).remove(0);
    assert_eq!(bits(&got[..16]), bits(&clean[..16]));
    assert!(got[16..].iter().all(|value| value.is_nan()), "a NaN or infinity in a row shows in all its outputs");
}

#[test]
fn rows_rounded_in_passing_give_the_same_products() {
    if absent() {
        return;
    }
    let (n_rows, n_in) = (11, 192);
    let matrix = DeviceMatrix::upload(&PLAIN, &blocks(BlockType::Q8_0, 32, n_in, 13).matrix()).expect("memory");
    let mut noise = Noise(14);
    let (hidden, weight) = (noise.values(n_rows * n_in), noise.values(n_in));
    let (gate, up) = (noise.values(n_rows * n_in), noise.values(n_rows * n_in));
    let mut activations = Activations::new(&PLAIN, n_rows, n_in, true, false).expect("memory");
    let product = |activations: &Activations<Executor>| {
        let mut out = upload(&PLAIN, &vec![0.0; n_rows * 32]);
        products(&PLAIN, activations, n_rows, &mut [(&matrix, &mut out)]).expect("a launch");
        bits(&download(&PLAIN, &out))
    };
    let mut x = upload(&PLAIN, &vec![0.0; n_rows * n_in]);
    let (mut hidden, weight) = (upload(&PLAIN, &hidden), upload(&PLAIN, &weight));
    residual_rms_norm(&PLAIN, &mut hidden, None, n_rows, &weight, 1e-5, &mut x, Some(&mut activations))
        .expect("a launch");
    let passing = product(&activations);
    activations.round(&PLAIN, &x, n_rows, n_in).expect("a launch");
    assert_eq!(product(&activations), passing);
    let (gate, up) = (upload(&PLAIN, &gate), upload(&PLAIN, &up));
    swiglu(&PLAIN, &gate, &up, n_rows, n_in, &mut x, Some(&mut activations)).expect("a launch");
    let passing = product(&activations);
    activations.round(&PLAIN, &x, n_rows, n_in).expect("a launch");
    assert_eq!(product(&activations), passing);
}

#[test]
fn embeddings_are_the_rows_of_the_table() {
    if absent() {
        return;
    }
    let (n_out, n_in) = (50, 512);
    let coded = BlockType::ALL.map(|kind| blocks(kind, n_out, n_in, 15).matrix());
    let tokens = [0, 49, 7, 16, 7];
    for matrix in coded.into_iter().chain(dense(n_out, n_in, 16)) {
        let device = DeviceMatrix::upload(&PLAIN, &matrix).expect("memory");
        let mut out = upload(&PLAIN, &vec![0.0; tokens.len() * n_in]);
        embed(&PLAIN, &device, &TokenList::new(&PLAIN, &tokens).expect("memory"), &mut out).expect("a launch");
        let got = download(&PLAIN, &out);
        let mut expected = vec![0.0; n_in];
        for (got, token) in got.chunks_exact(n_in).zip(tokens) {
            matrix.row(token as usize, &mut expected);
            for (got, expected) in got.iter().zip(&expected) {
                // Equal, but for f32 tables: 22 bits, and what lies far below the largest.
                let bound = if device.form() == Form::Dense { expected.abs() * 2f32.powi(-22) + 1e-12 } else { 0.0 };
                assert!((got - expected).abs() <= bound, "{:?}: {got} and {expected}", device.form());
            }
        }
    }
}

#[test]
fn products_that_do_not_fit_are_refused() {
    if absent() {
        return;
    }
    let refused = |x_rows: usize, out: usize, form_only: bool| {
        refusal(move || {
            let matrix = DeviceMatrix::upload(&PLAIN, &blocks(BlockType::Q8_0, 16, 64, 1).matrix()).expect("memory");
            let mut x = Activations::new(&PLAIN, 4, 64, true, true).expect("memory");
            let values = upload(&PLAIN, &vec![0.0; x_rows * 64]);
            if form_only {
                x.split(&PLAIN, &values, x_rows, 64).expect("a launch");
            } else {
                x.round(&PLAIN, &values, x_rows, 64).expect("a launch");
            }
            let mut out = upload(&PLAIN, &vec![0.0; out]);
            let _ = products(&PLAIN, &x, 2, &mut [(&matrix, &mut out)]);
        })
    };
    assert!(refused(2, 31, false).starts_with("out has 31 values, [2, 16] needs 32"));
    assert!(refused(1, 32, false).contains("of other rows"));
    assert!(refused(2, 32, true).contains("of other rows"));
    assert!(refused(9, 32, false).contains("need 1408 bytes of 704"));
    let beyond = refusal(|| {
        let matrix = DeviceMatrix::upload(&PLAIN, &blocks(BlockType::Q8_0, 16, 64, 1).matrix()).expect("memory");
        let mut out = upload(&PLAIN, &[0.0; 64]);
        let _ = embed(&PLAIN, &matrix, &TokenList::new(&PLAIN, &[16]).expect("memory"), &mut out);
    });
    assert_eq!(beyond, "a token beyond the table's 16");
}
