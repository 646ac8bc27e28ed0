//! Cases of attention, stamped on every backend. Tolerance between backends: none.

use half::f16;
use proptest::prelude::*;

use super::*;
use crate::backend::Backend;
use crate::kv::{KvDtype, KvLayout};
use crate::testing::{Noise, bits, check, on_every_backend, with};

on_every_backend! {
    equals_the_reference_bit_for_bit,
    agrees_with_a_softmax_in_f64,
    a_row_is_the_same_in_any_chunk_batch_and_thread,
    what_unwritten_and_later_slots_hold_never_reaches_a_row,
}

/// A sequence: its keys and values by position, and where they are stored.
struct Sequence {
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
    pages: Vec<u32>,
}

struct Fixture {
    kv: KvPool,
    n_heads: usize,
    sequences: Vec<Sequence>,
}

/// Sequences of the given lengths in poisoned pages, handed out from the last page down.
fn fixture(dtype: KvDtype, kv_heads: usize, group: usize, head_dim: usize, lengths: &[usize], seed: u64) -> Fixture {
    let layout = KvLayout { n_layers: 2, n_kv_heads: kv_heads, head_dim, page_tokens: PAGE_TOKENS, dtype };
    let mut noise = Noise::new(seed);
    let n_pages: usize = lengths.iter().map(|n| n.div_ceil(PAGE_TOKENS)).sum();
    let mut kv = KvPool::new(layout, n_pages);
    (0..n_pages as u32).for_each(|page| kv.poison(page));
    let mut free = (0..n_pages as u32).rev();
    let width = kv_heads * head_dim;
    let sequences = lengths
        .iter()
        .map(|&n| {
            let pages: Vec<u32> = free.by_ref().take(n.div_ceil(PAGE_TOKENS)).collect();
            let rows = |noise: &mut Noise| (0..n).map(|_| noise.values(width)).collect::<Vec<_>>();
            let (k, v) = (rows(&mut noise), rows(&mut noise));
            for p in 0..n {
                kv.store(1, pages[p / PAGE_TOKENS], p % PAGE_TOKENS, &k[p], &v[p]);
            }
            Sequence { k, v, pages }
        })
        .collect();
    Fixture { kv, n_heads: kv_heads * group, sequences }
}

// === impl Fixture ===

impl Fixture {
    /// Attends (sequence, first position, rows) in this order; `q` has all their rows.
    fn attend(&self, backend: Backend, threads: usize, chunks: &[(usize, usize, usize)], q: &[f32]) -> Vec<f32> {
        let mut row = 0;
        let runs: Vec<_> = chunks
            .iter()
            .map(|&(sequence, start, n)| {
                row += n;
                AttnRun { rows: row - n..row, start, pages: &self.sequences[sequence].pages }
            })
            .collect();
        let mut out = vec![f32::NAN; q.len()];
        with(backend, || {
            let pool = Pool::new(threads);
            attention(&pool, q, self.n_heads, &runs, &self.kv, 1, 0.3, &mut out, &mut Scratch::default());
        });
        out
    }

    fn width(&self) -> usize {
        self.n_heads * self.kv.layout().head_dim
    }
}

fn equals_the_reference_bit_for_bit(backend: Backend) {
    let dtype = prop_oneof![Just(KvDtype::F32), Just(KvDtype::F16)];
    let shape = (dtype, 1..3usize, 1..7usize, 1..75usize, 1..60usize, 1..40usize, any::<u64>());
    check(60, shape, |(dtype, kv_heads, group, half_dim, first, second, seed)| {
        let head_dim = half_dim.min(66) * 2;
        let fixture = fixture(dtype, kv_heads, group, head_dim, &[first, second], seed);
        // A prefill chunk in the middle of one sequence, a decode row at the end of the other.
        let start = first / 3;
        let chunks = [(0, start, first - start), (1, second - 1, 1)];
        let q = Noise::new(seed ^ 1).values((first - start + 1) * fixture.width());
        let expected = fixture.attend(Backend::Scalar, 1, &chunks, &q);
        assert!(expected.iter().all(|value| value.is_finite()));
        assert_eq!(bits(&fixture.attend(backend, 2, &chunks, &q)), bits(&expected));
    });
}

fn agrees_with_a_softmax_in_f64(backend: Backend) {
    for (dtype, group, head_dim, n) in [(KvDtype::F32, 3, 64, 50), (KvDtype::F16, 1, 128, 33), (KvDtype::F16, 7, 8, 16)]
    {
        let fixture = fixture(dtype, 2, group, head_dim, &[n], 3);
        let q = Noise::new(9).values(n * fixture.width());
        let out = fixture.attend(backend, 1, &[(0, 0, n)], &q);
        let stored = |x: f32| f64::from(if dtype == KvDtype::F16 { f16::from_f32(x).to_f32() } else { x });
        let sequence = &fixture.sequences[0];
        for row in 0..n {
            for head in 0..fixture.n_heads {
                let kv = head / group * head_dim;
                let at = row * fixture.width() + head * head_dim;
                let dot = |k: &[f32]| -> f64 {
                    (0..head_dim).map(|d| f64::from(q[at + d]) * stored(k[kv + d])).sum::<f64>() * f64::from(0.3f32)
                };
                let scores: Vec<f64> = (0..=row).map(|p| dot(&sequence.k[p])).collect();
                let max = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                for d in 0..head_dim {
                    let exact: f64 =
                        (0..=row).map(|p| (scores[p] - max).exp() / sum * stored(sequence.v[p][kv + d])).sum();
                    // Scores up to about 100 with relative error head_dim * 2^-24 move a probability by a part in 10^4
                    // at the very most; values are below 4.
                    let error = (f64::from(out[at + d]) - exact).abs();
                    assert!(error < 1e-4, "row {row} head {head} dim {d}: {error}");
                }
            }
        }
    }
}

fn a_row_is_the_same_in_any_chunk_batch_and_thread(backend: Backend) {
    for dtype in [KvDtype::F32, KvDtype::F16] {
        let fixture = fixture(dtype, 2, 3, 64, &[70, 21], 4);
        let width = fixture.width();
        let q = Noise::new(5).values(70 * width);
        let whole = fixture.attend(backend, 1, &[(0, 0, 70)], &q);
        for threads in [2, 3] {
            assert_eq!(bits(&fixture.attend(backend, threads, &[(0, 0, 70)], &q)), bits(&whole));
        }
        for row in 0..70 {
            let alone = fixture.attend(backend, 1, &[(0, row, 1)], &q[row * width..][..width]);
            assert_eq!(bits(&alone), bits(&whole[row * width..][..width]), "row {row} decoded");
        }
        // Beside another sequence, in chunks that begin anywhere.
        for cut in [1, 15, 16, 17, 37] {
            let other = Noise::new(6).values(3 * width);
            let mut mixed = other;
            mixed.extend_from_slice(&q[cut * width..][..(70 - cut) * width]);
            let out = fixture.attend(backend, 2, &[(1, 18, 3), (0, cut, 70 - cut)], &mixed);
            assert_eq!(bits(&out[3 * width..]), bits(&whole[cut * width..]), "chunk from {cut}");
        }
    }
}

fn what_unwritten_and_later_slots_hold_never_reaches_a_row(backend: Backend) {
    for dtype in [KvDtype::F32, KvDtype::F16] {
        let mut fixture = fixture(dtype, 1, 2, 16, &[40], 7);
        let q = Noise::new(8).values(20 * fixture.width());
        let before = fixture.attend(backend, 1, &[(0, 0, 20)], &q);
        assert!(before.iter().all(|value| value.is_finite()), "poison of unwritten slots came through");
        // Row 10's keys and values become NaN: rows 0 to 9 of the same tile must not change.
        let (pages, nan) = (fixture.sequences[0].pages.clone(), [f32::NAN; 16]);
        fixture.kv.store(1, pages[0], 10, &nan, &nan);
        let after = fixture.attend(backend, 1, &[(0, 0, 20)], &q);
        let width = fixture.width();
        assert_eq!(bits(&after[..10 * width]), bits(&before[..10 * width]));
        assert!(after[10 * width..].iter().all(|value| value.is_nan()), "damage of an attended position shows");
    }
}

#[test]
fn missing_pages_and_overlapping_runs_are_refused() {
    let fixture = fixture(KvDtype::F32, 1, 1, 4, &[20], 1);
    let q = vec![0.0; 4 * 4];
    let call = |start: usize, n: usize, pages: &[u32], again: bool| {
        std::panic::catch_unwind(|| {
            let mut runs = vec![AttnRun { rows: 0..n, start, pages }];
            if again {
                runs.push(AttnRun { rows: n - 1..n, start, pages });
            }
            let mut out = q.clone();
            attention(&Pool::new(1), &q, 1, &runs, &fixture.kv, 0, 1.0, &mut out, &mut Scratch::default());
        })
        .is_ok()
    };
    assert!(call(16, 4, &[1, 0], false));
    assert!(!call(16, 4, &[1], false), "a page too few");
    assert!(!call(0, 4, &[2], false), "a page beyond the pool");
    assert!(!call(0, 4, &[1], true), "a row twice");
    assert!(!call(0, 5, &[1], false), "a row beyond the batch");
}
