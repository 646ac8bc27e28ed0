//! What packing reads out of a checked file: row order, scale, DoRA factors.

use std::sync::Arc;

use kernels::lora::{Scratch, Segment, lora_delta};
use kernels::matrix::Matrix;
use kernels::pool::Pool;
use serde_json::json;

use super::super::pack::{CheckedModule, RowOrder, Unpacked};
use super::super::tensor::{Dtype, TensorView};
use super::super::{AdapterFiles, AdapterLimits, check};
use super::gguf::{Key, Recipe};
use super::{RANK, Tensor, pair, peft_files, peft_name, tiny_info};
use crate::info::{Family, Linear, ModelInfo};
use crate::weights::{LayerWeights, Weights};

fn no_base(_: usize, _: &mut [f32]) {
    panic!("the base is needed for DoRA only");
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn view(bytes: &[u8], rows: usize, cols: usize) -> TensorView<'_> {
    TensorView { dtype: Dtype::F32, rows, cols, rank_one: false, bytes }
}

/// A GGUF file's `lora_b` for q of the tiny base, whose values name their row and column.
fn gguf_q(info: &ModelInfo, permute: bool) -> (Recipe, Vec<f32>) {
    let (n_out, _) = info.linear_shape(Linear::Q);
    let rows: Vec<f32> = (0..n_out * RANK).map(|i| i as f32).collect();
    let mut stored = Vec::new();
    for head in 0..info.n_heads {
        // llama.cpp's converter: each head's rows as [2, half], the two axes swapped.
        for i in 0..info.head_dim / 2 {
            for part in 0..2 {
                let row = head * info.head_dim + part * (info.head_dim / 2) + i;
                stored.extend(&rows[row * RANK..(row + 1) * RANK]);
            }
        }
    }
    let mut recipe = Recipe::tiny(info, &[(0, Linear::Q)]);
    recipe.tensors[1].3 = f32_bytes(if permute { &stored } else { &rows });
    (recipe, rows)
}

#[test]
fn llama_gguf_rows_of_q_return_to_their_heads_halves() {
    let info = tiny_info();
    let (recipe, rows) = gguf_q(&info, true);
    let files = AdapterFiles::Gguf(recipe.file());
    let checked = check(&files, &info, &AdapterLimits::default()).unwrap();
    assert_eq!(checked.modules()[0].unpack(no_base).unwrap().b, rows);
}

#[test]
fn only_q_and_k_of_llama_files_are_reordered() {
    let order = |info: &ModelInfo, architecture: &'static str, linear| {
        let recipe = Recipe::tiny(info, &[(1, linear)]).key("general.architecture", Some(Key::Text(architecture)));
        let files = AdapterFiles::Gguf(recipe.file());
        check(&files, info, &AdapterLimits::default()).unwrap().modules()[0].b_rows
    };
    let qwen = ModelInfo { family: Family::Qwen2, ..tiny_info() };
    let mistral = ModelInfo { family: Family::Mistral, ..tiny_info() };
    for linear in Linear::ALL {
        let is_rotary = matches!(linear, Linear::Q | Linear::K);
        let wanted = if is_rotary { RowOrder::Interleaved { head_dim: 4 } } else { RowOrder::HuggingFace };
        assert_eq!(order(&tiny_info(), "llama", linear), wanted, "{linear:?}");
        assert_eq!(order(&mistral, "llama", linear), wanted, "{linear:?}");
        assert_eq!(order(&qwen, "qwen2", linear), RowOrder::HuggingFace, "{linear:?}");
    }
    let (recipe, rows) = gguf_q(&qwen, false);
    let files = AdapterFiles::Gguf(recipe.key("general.architecture", Some(Key::Text("qwen2"))).file());
    let checked = check(&files, &qwen, &AdapterLimits::default()).unwrap();
    assert_eq!(checked.modules()[0].unpack(no_base).unwrap().b, rows);
}

#[test]
fn peft_rows_stay_where_they_are_on_every_base() {
    let info = tiny_info();
    let tensors = pair(&info, 0, Linear::Q, RANK);
    let files = peft_files(&json!({}), &tensors);
    let checked = check(&files, &info, &AdapterLimits::default()).unwrap();
    let Unpacked { a, b, row_scale } = checked.modules()[0].unpack(no_base).unwrap();
    assert_eq!((a, b, row_scale), (tensors[0].values.clone(), tensors[1].values.clone(), None));
}

#[test]
fn gguf_scale_is_alpha_over_rank_or_one() {
    let scale = |alpha| {
        let recipe = Recipe::tiny(&tiny_info(), &[(0, Linear::V)]).key("adapter.lora.alpha", alpha);
        let files = AdapterFiles::Gguf(recipe.file());
        check(&files, &tiny_info(), &AdapterLimits::default()).unwrap().modules()[0].scale
    };
    assert_eq!(scale(Some(Key::Float(8.0))), 4.0);
    assert_eq!(scale(Some(Key::Float(0.0))), 1.0);
    assert_eq!(scale(None), 1.0);
}

#[test]
fn each_module_has_its_own_rank_and_scale() {
    let info = tiny_info();
    let config = json!({
        "use_rslora": true, "r": 4, "lora_alpha": 6, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"layers.1.*": 10},
    });
    let tensors: Vec<Tensor> = [
        pair(&info, 0, Linear::Q, 4),
        pair(&info, 0, Linear::V, 1),
        pair(&info, 1, Linear::Q, 4),
        pair(&info, 1, Linear::V, 1),
    ]
    .concat();
    let files = peft_files(&config, &tensors);
    let checked = check(&files, &info, &AdapterLimits::default()).unwrap();
    let found: Vec<_> =
        checked.modules().iter().map(|module| (module.layer, module.linear, module.rank, module.scale)).collect();
    let wanted = [(0, Linear::Q, 4, 3.0), (0, Linear::V, 1, 6.0), (1, Linear::Q, 4, 5.0), (1, Linear::V, 1, 10.0)];
    assert_eq!(found, wanted);
}

/// Rank 1 over a base of two rows `[3, 4]` and `[0, 2]`, scale 2: `W + s·B·A` has rows `[3, 4]` and `[6, 10]`.
fn dora<'a>(a: &'a [u8], b: &'a [u8], magnitude: &'a [u8]) -> CheckedModule<'a> {
    CheckedModule {
        layer: 0,
        linear: Linear::Q,
        rank: 1,
        scale: 2.0,
        a: view(a, 1, 2),
        b: view(b, 2, 1),
        b_rows: RowOrder::HuggingFace,
        magnitude: Some(TensorView { rank_one: true, ..view(magnitude, 2, 1) }),
    }
}

fn two_rows(i: usize, row: &mut [f32]) {
    row.copy_from_slice(&[[3.0, 4.0], [0.0, 2.0]][i]);
}

#[test]
fn dora_factors_divide_the_magnitude_by_the_row_norm() {
    let (a, b, magnitude) = (f32_bytes(&[3.0, 4.0]), f32_bytes(&[0.0, 1.0]), f32_bytes(&[10.0, -1.0]));
    let factors = dora(&a, &b, &magnitude).unpack(two_rows).unwrap().row_scale.unwrap();
    assert_eq!(factors[0], 2.0);
    assert!((factors[1] + 1.0 / 136.0_f32.sqrt()).abs() < 1e-7, "{}", factors[1]);
}

#[test]
fn a_dora_row_that_cancels_its_base_is_refused() {
    let (a, b, magnitude) = (f32_bytes(&[3.0, 4.0]), f32_bytes(&[-0.5, 0.0]), f32_bytes(&[1.0, 1.0]));
    let error = dora(&a, &b, &magnitude).unpack(two_rows).map(|_| ()).unwrap_err();
    assert_eq!(error.code(), "invalid_lora_adapter");
    assert!(error.to_string().contains("output 0"), "{error}");
}

#[test]
fn dora_files_carry_their_magnitudes_to_packing() {
    let info = tiny_info();
    let mut tensors = pair(&info, 0, Linear::V, RANK).to_vec();
    tensors[1].values.fill(0.0);
    let mut magnitude = Tensor::new(&peft_name(0, Linear::V, "lora_magnitude_vector"), &[4]);
    magnitude.values = vec![1.0, 2.0, 3.0, 4.0];
    tensors.push(magnitude);
    let files = peft_files(&json!({"use_dora": true}), &tensors);
    let checked = check(&files, &info, &AdapterLimits::default()).unwrap();
    // Rows of norm 2: eight halves of √2.
    let unpacked = checked.modules()[0].unpack(|_, row| row.fill(0.5_f32.sqrt())).unwrap();
    for (factor, wanted) in unpacked.row_scale.unwrap().into_iter().zip([0.5, 1.0, 1.5, 2.0]) {
        assert!((factor - wanted).abs() < 1e-6);
    }
}

/// A base whose linear layers hold small distinct values.
fn tiny_weights(info: &ModelInfo) -> Weights {
    let matrix = |n_out: usize, n_in: usize| {
        let values: Vec<f32> = (0..n_out * n_in).map(|i| ((i * 7 + n_out) % 11) as f32 / 8.0 - 0.5).collect();
        Matrix::from_f32(n_out, n_in, &values, None).unwrap()
    };
    let layer = || LayerWeights {
        attn_norm: vec![1.0; info.hidden],
        linears: Linear::ALL.map(|linear| matrix(info.linear_shape(linear).0, info.linear_shape(linear).1)),
        qkv_bias: None,
        ffn_norm: vec![1.0; info.hidden],
    };
    let embed = Arc::new(matrix(info.vocab, info.hidden));
    Weights {
        head: Arc::clone(&embed),
        embed,
        layers: (0..info.n_layers).map(|_| layer()).collect(),
        norm: vec![1.0; info.hidden],
    }
}

/// `y = m ⊙ (W + s·B·A) x / ‖W + s·B·A‖` per row, or `(W + s·B·A) x`, in f64 and in the order of the formula.
fn reference(base: &Matrix, tensors: &[Tensor], scale: f64, x: &[f32]) -> Vec<f64> {
    let mut row = vec![0.0; base.n_in()];
    (0..base.n_out())
        .map(|i| {
            base.row(i, &mut row);
            let weight = |k: usize| {
                let delta: f64 = (0..RANK)
                    .map(|r| {
                        f64::from(tensors[1].values[i * RANK + r]) * f64::from(tensors[0].values[r * base.n_in() + k])
                    })
                    .sum();
                f64::from(row[k]) + scale * delta
            };
            let dot: f64 = x.iter().enumerate().map(|(k, x)| weight(k) * f64::from(*x)).sum();
            let norm = (0..x.len()).map(|k| weight(k).powi(2)).sum::<f64>().sqrt();
            tensors.get(2).map_or(dot, |magnitude| f64::from(magnitude.values[i]) / norm * dot)
        })
        .collect()
}

#[test]
fn packed_adapters_compute_the_formula_with_and_without_dora() {
    let info = tiny_info();
    let weights = tiny_weights(&info);
    let pool = Pool::new(1);
    for dtype in ["F32", "F16", "BF16"] {
        for dora in [false, true] {
            let mut tensors = pair(&info, 1, Linear::Q, RANK).to_vec();
            if dora {
                tensors.push(Tensor::new(&peft_name(1, Linear::Q, "lora_magnitude_vector"), &[8]));
            }
            tensors.iter_mut().for_each(|tensor| tensor.dtype = dtype);
            let files = peft_files(&json!({"use_dora": dora}), &tensors);
            let adapter =
                check(&files, &info, &AdapterLimits::default()).unwrap().pack(files.content_hash(), &weights).unwrap();
            assert!(adapter.pair(0, Linear::Q).is_none() && adapter.pair(1, Linear::K).is_none());
            assert!(adapter.pair(2, Linear::Q).is_none(), "no layer 2");
            assert_eq!((adapter.hash, adapter.rank_max), (files.content_hash(), RANK));
            let packed = adapter.pair(1, Linear::Q).unwrap();
            assert_eq!(adapter.bytes, packed.bytes());

            let base = weights.layers[1].linear(Linear::Q);
            let x: Vec<f32> = (0..8).map(|i| i as f32 / 4.0 - 0.75).collect();
            let wanted = reference(base, &tensors, 2.0, &x);
            let mut row = vec![0.0; 8];
            let mut y: Vec<f32> = (0..8)
                .map(|i| {
                    base.row(i, &mut row);
                    row.iter().zip(&x).map(|(w, x)| w * x).sum()
                })
                .collect();
            let segment = Segment { rows: 0..1, pair: packed };
            lora_delta(&pool, &[segment], &x, 8, &mut y, 8, &mut Scratch::default());
            for (found, wanted) in y.iter().zip(&wanted) {
                assert!((f64::from(*found) - wanted).abs() < 1e-4, "{dtype} dora {dora}: {found} {wanted}");
            }
        }
    }
}

#[test]
fn halves_of_different_types_are_packed_without_loss() {
    let info = tiny_info();
    let mut tensors = pair(&info, 0, Linear::V, RANK).to_vec();
    tensors[0].dtype = "F16";
    tensors[1].dtype = "BF16";
    let files = peft_files(&json!({}), &tensors);
    let packed = check(&files, &info, &AdapterLimits::default())
        .unwrap()
        .pack(files.content_hash(), &tiny_weights(&info))
        .unwrap();
    tensors.iter_mut().for_each(|tensor| tensor.dtype = "F32");
    let files = peft_files(&json!({}), &tensors);
    let exact = check(&files, &info, &AdapterLimits::default())
        .unwrap()
        .pack(files.content_hash(), &tiny_weights(&info))
        .unwrap();
    assert_eq!(packed.bytes, exact.bytes, "kept as f32");
}
