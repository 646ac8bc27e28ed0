//! Drives a [`Runtime`] by hand: sequences, pages and steps without a scheduler.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kernels::kv::PAGE_TOKENS;
use model::adapter::{self, AdapterFiles, AdapterLimits, LoraAdapter};
use model::base::BaseModel;
use model::forward::{Runtime, RuntimeOptions, kv_layout};
use model::info::Numerics;
use model::step::{Forward, Run, Step};
use tests::tiny::Random;

/// Logits rows a runtime of these tests keeps.
pub(crate) const N_LOGITS_MAX: usize = 64;

/// A folder of its own for one test.
pub(crate) fn folder(test: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("parity").join(test);
    std::fs::create_dir_all(&dir).expect("create a folder for the test");
    dir
}

pub(crate) fn load(path: &Path, numerics: Numerics) -> Arc<BaseModel> {
    Arc::new(BaseModel::load(path, numerics).unwrap_or_else(|error| panic!("{}: {error}", path.display())))
}

pub(crate) fn pack(base: &BaseModel, files: &AdapterFiles) -> Arc<LoraAdapter> {
    let checked = adapter::check(files, &base.info, &AdapterLimits::default()).expect("a valid adapter");
    Arc::new(checked.pack(files.content_hash(), &base.weights).expect("an adapter that fits"))
}

/// A sequence in progress.
#[derive(Debug, Clone)]
pub(crate) struct Sequence {
    pub(crate) tokens: Vec<u32>,
    pub(crate) adapter: Option<Arc<LoraAdapter>>,
    done: usize,
    pages: Vec<u32>,
}

impl Sequence {
    /// Positions that are not computed yet.
    pub(crate) fn left(&self) -> usize {
        self.tokens.len() - self.done
    }
}

/// A runtime and its free pages.
pub(crate) struct Lab {
    runtime: Box<dyn Forward>,
    free: Vec<u32>,
}

impl Lab {
    /// Pages are handed out in an order shuffled by `seed`, so that neighbours in a sequence are not neighbours in memory.
    pub(crate) fn new(base: &Arc<BaseModel>, threads: usize, rows_max: usize, positions: usize, seed: u64) -> Self {
        let options = |kv_bytes| RuntimeOptions {
            threads,
            rows_max,
            kv_bytes,
            n_logits_max: N_LOGITS_MAX,
            poison_freed_pages: true,
        };
        let page_bytes = kv_layout(&base.info).bytes_per_page();
        let kv_bytes = positions.div_ceil(PAGE_TOKENS) * page_bytes;
        let runtime: Box<dyn Forward> = match base.info.numerics {
            #[cfg(any(feature = "cuda", feature = "cuda-emulation"))]
            Numerics::Gpu => crate::gpu::runtime(base, options(kv_bytes)),
            _ => Box::new(Runtime::new(base.clone(), options(kv_bytes)).expect("a runtime")),
        };
        let mut free: Vec<u32> = (0..runtime.n_pages() as u32).collect();
        let mut random = Random::new(seed);
        for place in (1..free.len()).rev() {
            free.swap(place, random.below(place + 1));
        }
        Self { runtime, free }
    }

    /// Starts a sequence with pages for `tokens` and `more` positions.
    pub(crate) fn sequence(&mut self, tokens: &[u32], more: usize, adapter: Option<&Arc<LoraAdapter>>) -> Sequence {
        let n_pages = (tokens.len() + more).div_ceil(self.runtime.page_tokens());
        assert!(n_pages <= self.free.len(), "the lab has too few pages for this test");
        let pages = self.free.split_off(self.free.len() - n_pages);
        Sequence { tokens: tokens.to_vec(), adapter: adapter.cloned(), done: 0, pages }
    }

    /// Tells the runtime that the pages of a sequence were freed.
    pub(crate) fn poison(&mut self, sequence: &Sequence) {
        sequence.pages.iter().for_each(|&page| self.runtime.page_freed(page));
    }

    /// Ends a sequence: its pages are freed.
    pub(crate) fn end(&mut self, sequence: Sequence) {
        self.poison(&sequence);
        self.free.extend(sequence.pages);
    }

    /// Computes the next `n` tokens of each sequence in one step; returns the logits of every row, or of the last
    /// row of each sequence.
    pub(crate) fn step(&mut self, parts: &mut [(&mut Sequence, usize)], every_row: bool) -> Vec<Vec<f32>> {
        let runs = parts
            .iter()
            .map(|(sequence, n)| Run {
                tokens: sequence.tokens[sequence.done..sequence.done + n].to_vec(),
                start: sequence.done,
                pages: sequence.pages.clone(),
                adapter: sequence.adapter.clone(),
                logits: if every_row { (0..*n).collect() } else { vec![n - 1] },
            })
            .collect();
        parts.iter_mut().for_each(|(sequence, n)| sequence.done += *n);
        let vocab = self.runtime.vocab();
        self.runtime.forward(&Step { runs }).chunks_exact(vocab).map(<[f32]>::to_vec).collect()
    }

    /// Computes all tokens that are left, in chunks; returns the logits of the last one.
    pub(crate) fn finish(&mut self, sequence: &mut Sequence) -> Vec<f32> {
        let mut last = Vec::new();
        while sequence.left() > 0 {
            let n = sequence.left().min(self.runtime.rows_max());
            last = self.step(&mut [(sequence, n)], false).pop().expect("one row of logits");
        }
        last
    }
}

/// Digest of the bits of a row of logits.
pub(crate) fn digest(logits: &[f32]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    logits.iter().for_each(|logit| {
        hasher.update(&logit.to_bits().to_le_bytes());
    });
    hasher.finalize()
}

/// Natural-log probabilities of all tokens, in f64.
pub(crate) fn log_probabilities(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    logits.iter().map(|&logit| f64::from(logit - max) - sum.ln()).collect()
}

/// The first of the largest logits.
pub(crate) fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, &logit) in logits.iter().enumerate() {
        if logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// Largest absolute difference.
pub(crate) fn distance(ours: &[f32], theirs: &[f32]) -> f32 {
    assert_eq!(ours.len(), theirs.len());
    assert!(ours.iter().chain(theirs).all(|x| x.is_finite()), "a logit is not finite");
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
