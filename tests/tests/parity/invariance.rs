//! Batch invariance: the bits of a row depend on its own tokens, keys, values and adapter. Whatever else is in the
//! batch, wherever its sequence was cut, in whichever pages it lies, with however many threads: identical logits.
//! The reference is every sequence alone, one token per step, one thread.

use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use model::adapter::LoraAdapter;
use model::base::BaseModel;
use model::info::{Linear, Numerics};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tests::tiny::{self, AdapterSpec, Quantisation, Random, TinySpec};

use crate::lab::{self, Lab, Sequence, digest};

/// Rows per step in the mixed runs.
const ROWS_MAX: usize = 96;

/// What a test mixes: a model and what may be put on it.
pub(crate) struct Bench {
    base: Arc<BaseModel>,
    adapters: Vec<Option<Arc<LoraAdapter>>>,
    vocab: usize,
}

/// One random mix.
#[derive(Debug, Clone)]
struct Mix {
    seed: u64,
    threads: usize,
    /// Length and adapter of each sequence.
    sequences: Vec<(usize, usize)>,
    /// Longest chunk.
    chunk_max: usize,
}

fn mixes(n_adapters: usize, length_max: usize, n_max: usize) -> impl Strategy<Value = Mix> {
    let sequence = (1..=length_max, 0..n_adapters);
    (any::<u64>(), 1..=3_usize, prop::collection::vec(sequence, 1..=n_max), 1..=64_usize)
        .prop_map(|(seed, threads, sequences, chunk_max)| Mix { seed, threads, sequences, chunk_max })
}

/// Digest of the logits at every position of a sequence that runs alone, token by token.
fn alone(bench: &Bench, tokens: &[u32], adapter: usize) -> Vec<blake3::Hash> {
    let mut lab = Lab::new(&bench.base, 1, 1, tokens.len() + 16, 0);
    let mut sequence = lab.sequence(tokens, 0, bench.adapters[adapter].as_ref());
    (0..tokens.len()).map(|_| digest(&lab.step(&mut [(&mut sequence, 1)], true)[0])).collect()
}

/// Runs the mix in random steps; returns the digests of every sequence.
fn mixed(bench: &Bench, mix: &Mix, tokens: &[Vec<u32>]) -> Vec<Vec<blake3::Hash>> {
    let mut random = Random::new(mix.seed);
    let positions = tokens.iter().map(|tokens| tokens.len() + 16).sum();
    let mut lab = Lab::new(&bench.base, mix.threads, ROWS_MAX, positions, mix.seed);
    let mut sequences: Vec<Sequence> = Vec::new();
    for (tokens, (_, adapter)) in tokens.iter().zip(&mix.sequences) {
        sequences.push(lab.sequence(tokens, 0, bench.adapters[*adapter].as_ref()));
    }
    let mut digests = vec![Vec::new(); sequences.len()];
    while sequences.iter().any(|sequence| sequence.left() > 0) {
        let mut order: Vec<usize> = (0..sequences.len()).filter(|&i| sequences[i].left() > 0).collect();
        for place in (1..order.len()).rev() {
            order.swap(place, random.below(place + 1));
        }
        order.truncate(1 + random.below(order.len()));
        let mut rows_left = ROWS_MAX;
        let mut chosen: Vec<(usize, usize)> = Vec::new();
        for i in order {
            let n = (1 + random.below(mix.chunk_max)).min(sequences[i].left()).min(rows_left);
            if n > 0 {
                rows_left -= n;
                chosen.push((i, n));
            }
        }
        let mut slots: Vec<Option<&mut Sequence>> = sequences.iter_mut().map(Some).collect();
        let mut parts: Vec<(&mut Sequence, usize)> =
            chosen.iter().map(|&(i, n)| (slots[i].take().expect("chosen once"), n)).collect();
        let mut rows = lab.step(&mut parts, true).into_iter();
        for (i, n) in chosen {
            digests[i].extend(rows.by_ref().take(n).map(|logits| digest(&logits)));
        }
    }
    digests
}

fn holds(bench: &Bench, mix: &Mix) -> Result<(), TestCaseError> {
    let mut random = Random::new(mix.seed ^ 1);
    let tokens: Vec<Vec<u32>> = mix
        .sequences
        .iter()
        .map(|(length, _)| (0..*length).map(|_| random.below(bench.vocab) as u32).collect())
        .collect();
    let digests = mixed(bench, mix, &tokens);
    for ((tokens, (_, adapter)), mixed) in tokens.iter().zip(&mix.sequences).zip(&digests) {
        let alone = alone(bench, tokens, *adapter);
        prop_assert_eq!(alone.len(), mixed.len());
        let first_off = alone.iter().zip(mixed).position(|(a, b)| a != b);
        prop_assert_eq!(first_off, None, "a row of {} tokens with adapter {} differs", tokens.len(), adapter);
    }
    Ok(())
}

pub(crate) fn check(bench: &Bench, cases: u32, length_max: usize, n_max: usize) {
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let strategy = mixes(bench.adapters.len(), length_max, n_max);
    runner.run(&strategy, |mix| holds(bench, &mix)).expect("identical bits");
}

/// A tiny model (`None`: floats) with adapters of several ranks, on some and on all linear layers.
fn tiny_bench(test: &str, spec: &TinySpec, quantisation: Option<Quantisation>) -> Bench {
    // Fast numerics round activations only before quantised weights.
    let numerics = if quantisation.is_some() { Numerics::Fast } else { Numerics::Exact };
    tiny_bench_with(test, spec, quantisation, numerics)
}

/// As [`tiny_bench`], with numerics of choice.
pub(crate) fn tiny_bench_with(
    test: &str,
    spec: &TinySpec,
    quantisation: Option<Quantisation>,
    numerics: Numerics,
) -> Bench {
    let dir = lab::folder(test);
    let path = match quantisation {
        None => spec.write_hf(&dir),
        Some(quantisation) => spec.write_gguf(&dir, quantisation),
    };
    let base = lab::load(&path, numerics);
    let kinds: [(usize, &[Linear]); 5] = [
        (1, &[Linear::Q, Linear::V]),
        (4, &Linear::ALL),
        (16, &[Linear::Q, Linear::K, Linear::V, Linear::O]),
        (16, &Linear::ALL),
        (37, &[Linear::Down, Linear::Gate]),
    ];
    let pack = |(seed, (rank, targets)): (usize, (usize, &[Linear]))| {
        Some(lab::pack(&base, &AdapterSpec::new(seed as u64, rank, targets).files(spec)))
    };
    let adapters = std::iter::once(None).chain(kinds.into_iter().enumerate().map(pack)).collect();
    Bench { base, adapters, vocab: tiny::VOCAB }
}

#[test]
fn any_mix_gives_identical_bits_with_exact_numerics() {
    check(&tiny_bench("mix-exact", &TinySpec::llama(), None), 32, 150, 12);
}

#[test]
fn any_mix_gives_identical_bits_with_fast_numerics_on_blocks_of_32() {
    check(&tiny_bench("mix-q8", &TinySpec::llama(), Some(Quantisation::All(GgmlDType::Q8_0))), 32, 150, 12);
    check(&tiny_bench("mix-q4", &TinySpec::llama(), Some(Quantisation::All(GgmlDType::Q4_1))), 32, 150, 12);
}

#[test]
fn any_mix_gives_identical_bits_with_fast_numerics_on_k_quants() {
    check(&tiny_bench("mix-k", &TinySpec::wide(), Some(Quantisation::Q4KM)), 16, 100, 8);
}

#[test]
fn any_mix_of_a_qwen2_gives_identical_bits() {
    check(&tiny_bench("mix-qwen2", &TinySpec::qwen2(), Some(Quantisation::All(GgmlDType::Q8_0))), 16, 100, 8);
}

/// The real model with three of its adapters.
pub(crate) fn real_bench(numerics: Numerics) -> Bench {
    let base = lab::load(&tests::model_file(), numerics);
    let packed = ["harbor-logistics", "northbank", "metrix-dora"]
        .map(|name| Some(lab::pack(&base, &tiny::read_adapter(&tests::data("adapters").join(name)))));
    let adapters = std::iter::once(None).chain(packed).collect();
    let vocab = base.info.vocab;
    Bench { base, adapters, vocab }
}

#[test]
fn any_mix_of_the_real_model_gives_identical_bits() {
    check(&real_bench(Numerics::Fast), 3, 40, 5);
}

#[test]
fn keys_of_a_freed_page_show_as_nan() {
    // What tests with poisoned pages rest on: whoever still reads a freed page cannot miss it.
    let bench = tiny_bench("poison", &TinySpec::llama(), None);
    let mut lab = Lab::new(&bench.base, 1, 32, 64, 0);
    let mut sequence = lab.sequence(&[1; 20], 0, None);
    let first = lab.step(&mut [(&mut sequence, 18)], false);
    assert!(first[0].iter().all(|logit| logit.is_finite()));
    lab.poison(&sequence);
    let after = lab.step(&mut [(&mut sequence, 2)], false);
    assert!(after[0].iter().all(|logit| logit.is_nan()));
}

#[test]
fn more_logits_than_the_runtime_keeps_are_the_same_logits() {
    let bench = tiny_bench("many-logits", &TinySpec::llama(), None);
    let tokens: Vec<u32> = (3..83).collect();
    let mut lab = Lab::new(&bench.base, 2, 96, 96, 0);
    let mut sequence = lab.sequence(&tokens, 0, None);
    assert!(tokens.len() > lab::N_LOGITS_MAX);
    let rows = lab.step(&mut [(&mut sequence, tokens.len())], true);
    let digests: Vec<_> = rows.iter().map(|logits| digest(logits)).collect();
    assert_eq!(digests, alone(&bench, &tokens, 0));
}

#[test]
fn adapters_of_a_tiny_model_change_most_answers() {
    // The generator's promise on which isolation tests rest: a wrong adapter shows.
    let bench = tiny_bench("strong-adapters", &TinySpec::llama(), None);
    let mut random = Random::new(3);
    let mut changed = vec![0; bench.adapters.len()];
    for _ in 0..20 {
        let tokens: Vec<u32> = (0..20).map(|_| random.below(bench.vocab) as u32).collect();
        let best: Vec<u32> = bench
            .adapters
            .iter()
            .map(|adapter| {
                let mut lab = Lab::new(&bench.base, 1, 32, 64, 0);
                let mut sequence = lab.sequence(&tokens, 0, adapter.as_ref());
                lab::argmax(&lab.finish(&mut sequence))
            })
            .collect();
        changed.iter_mut().zip(&best).for_each(|(count, best_one)| *count += u32::from(*best_one != best[0]));
    }
    assert_eq!(changed[0], 0);
    assert!(changed[1..].iter().all(|&count| count >= 10), "next tokens changed, of 20: {changed:?}");
}
