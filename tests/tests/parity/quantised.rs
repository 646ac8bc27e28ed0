//! GGUF files of every number format against candle: candle quantises and writes the file; we read it; candle
//! computes with the same file dequantised by its own code to f32, so that both sides have the same weights and
//! neither rounds activations.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_qwen2};
use model::info::Numerics;
use tests::tiny::{Quantisation, Random, TinySpec};

use crate::lab::{self, Lab};

/// As in `families`: two float32 paths over equal weights.
const LOGIT_DIFF_MAX: f32 = 1e-3;

fn read(path: &Path) -> (Content, File) {
    let mut file = File::open(path).expect("open the GGUF file");
    let content = Content::read(&mut file).expect("read the GGUF header");
    (content, file)
}

/// Rewrites `path` through `change(name, tensor)`; tensors for which it returns `None` are left out.
fn rewrite(
    path: &Path,
    to: &Path,
    metadata: &[(&str, gguf_file::Value)],
    change: impl Fn(&str, QTensor) -> Option<QTensor>,
) {
    let (content, mut file) = read(path);
    let mut names: Vec<&String> = content.tensor_infos.keys().collect();
    names.sort();
    let tensors: Vec<(&str, QTensor)> = names
        .into_iter()
        .filter_map(|name| {
            let tensor = content.tensor(&mut file, name, &Device::Cpu).expect("read a tensor");
            Some((name.as_str(), change(name, tensor)?))
        })
        .collect();
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let kept = content.metadata.iter().filter(|(key, _)| metadata.iter().all(|(other, _)| other != key));
    let mut metadata: Vec<(&str, &gguf_file::Value)> = kept
        .map(|(key, value)| (key.as_str(), value))
        .chain(metadata.iter().map(|(key, value)| (*key, value)))
        .collect();
    metadata.sort_by_key(|(key, _)| *key);
    let mut out = BufWriter::new(File::create(to).expect("create the GGUF file"));
    gguf_file::write(&mut out, &metadata, &tensors).expect("write the GGUF file");
}

fn dense(tensor: &QTensor) -> Tensor {
    tensor.dequantize(&Device::Cpu).expect("dequantise")
}

/// The same file with every tensor as f32.
fn dequantised(path: &Path) -> PathBuf {
    let to = path.with_extension("dense.gguf");
    rewrite(path, &to, &[], |_, tensor| Some(QTensor::quantize(&dense(&tensor), GgmlDType::F32).expect("f32")));
    to
}

fn candle_logits(path: &Path, tokens: &[u32]) -> Vec<f32> {
    let (content, mut file) = read(path);
    let architecture = content.metadata["general.architecture"].to_string().expect("a string").clone();
    let tokens = Tensor::new(tokens, &Device::Cpu).and_then(|tokens| tokens.unsqueeze(0)).expect("tokens");
    let logits = if architecture == "qwen2" {
        let mut model = quantized_qwen2::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).expect("load");
        model.forward(&tokens, 0)
    } else {
        let mut model = quantized_llama::ModelWeights::from_gguf(content, &mut file, &Device::Cpu).expect("load");
        model.forward(&tokens, 0)
    };
    logits.and_then(|logits| logits.flatten_all()?.to_vec1::<f32>()).expect("candle computes")
}

/// Our exact logits of `path` against candle's on the dequantised file; and, printed only, against candle on the
/// quantised file, which rounds activations to 8 bits.
fn compare(path: &Path, vocab: usize) {
    let base = lab::load(path, Numerics::Exact);
    let mut lab = Lab::new(&base, 2, 64, 128, 1);
    let mut random = Random::new(9);
    let tokens: Vec<u32> = (0..50).map(|_| random.below(vocab) as u32).collect();
    let mut sequence = lab.sequence(&tokens, 0, None);
    let ours = lab.finish(&mut sequence);
    let off = lab::distance(&ours, &candle_logits(&dequantised(path), &tokens));
    let rounded = lab::distance(&ours, &candle_logits(path, &tokens));
    let name = path.file_name().expect("a file").to_string_lossy();
    println!("{name}: {off} from candle in f32, {rounded} from candle with rounded activations");
    assert!(off <= LOGIT_DIFF_MAX, "{name} differs by {off}");
}

#[test]
fn floats_and_blocks_of_32_agree_with_candle() {
    let dir = lab::folder("blocks-of-32");
    let spec = TinySpec::llama();
    let blocks = [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q5_0, GgmlDType::Q5_1, GgmlDType::Q8_0];
    let all = blocks.map(Quantisation::All);
    for quantisation in [Quantisation::F32, Quantisation::F16].into_iter().chain(all) {
        compare(&spec.write_gguf(&dir, quantisation), tests::tiny::VOCAB);
    }
}

#[test]
fn k_quants_agree_with_candle() {
    let dir = lab::folder("k-quants");
    let spec = TinySpec::wide();
    let blocks = [GgmlDType::Q2K, GgmlDType::Q3K, GgmlDType::Q4K, GgmlDType::Q5K, GgmlDType::Q6K];
    let all = blocks.map(Quantisation::All);
    for quantisation in [Quantisation::Q4KM, Quantisation::Q5KM].into_iter().chain(all) {
        compare(&spec.write_gguf(&dir, quantisation), tests::tiny::VOCAB);
    }
}

#[test]
fn qwen2_files_agree_with_candle() {
    let dir = lab::folder("qwen2");
    for quantisation in [Quantisation::F16, Quantisation::All(GgmlDType::Q8_0)] {
        compare(&TinySpec::qwen2().write_gguf(&dir, quantisation), tests::tiny::VOCAB);
    }
}

#[test]
fn the_real_model_requantised_agrees_with_candle() {
    // Three layers are enough: what matters are the widths. 576 is no multiple of 256, so most tensors of a
    // "Q4_K_M" of this model fall back to blocks of 32, as in files that llama.cpp makes of it.
    const N_LAYERS: u32 = 3;
    let dir = lab::folder("real");
    let kept = |name: &str| match name.strip_prefix("blk.").and_then(|rest| rest.split('.').next()) {
        Some(layer) => layer.parse::<u32>().expect("a layer number") < N_LAYERS,
        None => true,
    };
    for (label, wanted, fallback) in [
        ("q4_k_m", GgmlDType::Q4K, GgmlDType::Q5_0),
        ("q5_k_m", GgmlDType::Q5K, GgmlDType::Q5_1),
        ("q8_0", GgmlDType::Q8_0, GgmlDType::Q8_0),
        ("f16", GgmlDType::F16, GgmlDType::F16),
    ] {
        let path = dir.join(format!("{label}.gguf"));
        let blocks = [("llama.block_count", gguf_file::Value::U32(N_LAYERS))];
        rewrite(&tests::model_file(), &path, &blocks, |name, tensor| {
            if !kept(name) {
                return None;
            }
            let dense = dense(&tensor);
            let (rank, n_in) = (dense.rank(), *dense.dims().last().expect("a shape"));
            let dtype = match rank {
                1 => GgmlDType::F32,
                _ if n_in.is_multiple_of(wanted.block_size()) => wanted,
                _ => fallback,
            };
            Some(QTensor::quantize(&dense, dtype).expect("whole blocks"))
        });
        compare(&path, 49152);
    }
}
