//! Attention on the device.

use half::f16;
use kernels::attention::{AttnRun, Scratch};
use kernels::cuda::attention::{AttentionPlan, AttentionScratch, attention};
use kernels::cuda::kv::DeviceKv;
use kernels::cuda::rows::{DeviceRope, RowPlan, rope_store};
use kernels::kv::{KvDtype, KvLayout, KvPool, PAGE_TOKENS};
use kernels::pool::Pool;

use super::support::{CUT, Executor, Noise, PLAIN, absent, bits, download, reference, refusal, upload};

const SCALE: f32 = 0.2;
const LAYER: usize = 1;

/// Sequences in the pages of both sides; all else in the pages is NaN.
pub(crate) struct Fixture {
    kv: KvPool,
    device: DeviceKv<Executor>,
    n_heads: usize,
    head_dim: usize,
    pages: Vec<Vec<u32>>,
    k: Vec<Vec<f32>>,
    v: Vec<Vec<f32>>,
}

pub(crate) fn fixture(kv_heads: usize, group: usize, head_dim: usize, lengths: &[usize], seed: u64) -> Fixture {
    let layout =
        KvLayout { n_layers: 2, n_kv_heads: kv_heads, head_dim, page_tokens: PAGE_TOKENS, dtype: KvDtype::F16 };
    let n_pages: usize = lengths.iter().map(|n| n.div_ceil(PAGE_TOKENS)).sum();
    let (mut kv, mut device) = (KvPool::new(layout, n_pages), DeviceKv::new(&PLAIN, layout, n_pages).expect("memory"));
    for page in 0..n_pages as u32 {
        kv.poison(page);
        device.poison(&PLAIN, page).expect("memory");
    }
    let width = kv_heads * head_dim;
    let mut noise = Noise(seed);
    let mut free = (0..n_pages as u32).rev();
    let mut fixture = Fixture { kv, device, n_heads: kv_heads * group, head_dim, pages: vec![], k: vec![], v: vec![] };
    for &n in lengths {
        let pages: Vec<u32> = free.by_ref().take(n.div_ceil(PAGE_TOKENS)).collect();
        let (k, v) = (noise.values(n * width), noise.values(n * width));
        for p in 0..n {
            let (k, v) = (&k[p * width..][..width], &v[p * width..][..width]);
            fixture.kv.store(LAYER, pages[p / PAGE_TOKENS], p % PAGE_TOKENS, k, v);
        }
        store(&mut fixture.device, &pages, &k, &v);
        fixture.pages.push(pages);
        fixture.k.push(k);
        fixture.v.push(v);
    }
    fixture
}

/// Writes positions `0..` of a sequence with the device's own kernel, unrotated: every angle is 0.
fn store(device: &mut DeviceKv<Executor>, pages: &[u32], k: &[f32], v: &[f32]) {
    let KvLayout { n_kv_heads, head_dim, .. } = *device.layout();
    let n = k.len() / (n_kv_heads * head_dim);
    let rope = DeviceRope::new(&PLAIN, head_dim, 1, &vec![0.0; head_dim / 2]).expect("memory");
    let places: Vec<_> = (0..n).map(|p| (pages[p / PAGE_TOKENS], (p % PAGE_TOKENS) as u32)).collect();
    let rows = RowPlan::new(&PLAIN, &vec![0; n], &places).expect("memory");
    let mut q = upload(&PLAIN, &vec![0.0; k.len()]);
    let (k, v) = (upload(&PLAIN, k), upload(&PLAIN, v));
    rope_store(&PLAIN, &mut q, &k, &v, n_kv_heads, &rows, &rope, device, LAYER).expect("a launch");
}

// === impl Fixture ===

impl Fixture {
    fn width(&self) -> usize {
        self.n_heads * self.head_dim
    }

    /// Runs of (sequence, first position, rows), in this order.
    fn runs(&self, chunks: &[(usize, usize, usize)]) -> Vec<AttnRun<'_>> {
        let mut row = 0;
        let run = |&(sequence, start, n): &(usize, usize, usize)| {
            row += n;
            AttnRun { rows: row - n..row, start, pages: self.pages[sequence].as_slice() }
        };
        chunks.iter().map(run).collect()
    }

    pub(crate) fn on_device(&self, gpu: &Executor, chunks: &[(usize, usize, usize)], q: &[f32]) -> Vec<f32> {
        let plan = AttentionPlan::new(gpu, &self.runs(chunks), self.n_heads, &self.device).expect("a plan");
        let mut out = upload(gpu, &vec![f32::NAN; q.len()]);
        let mut scratch = AttentionScratch::new(gpu).expect("memory");
        attention(gpu, &plan, &upload(gpu, q), &self.device, LAYER, SCALE, &mut out, &mut scratch).expect("a launch");
        download(gpu, &out)
    }

    fn on_cpu(&self, chunks: &[(usize, usize, usize)], q: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        reference(|| {
            let (runs, pool) = (self.runs(chunks), Pool::new(1));
            let scratch = &mut Scratch::default();
            kernels::attention::attention(&pool, q, self.n_heads, &runs, &self.kv, LAYER, SCALE, &mut out, scratch);
        });
        out
    }

    /// How far two correct results of a query may lie apart. A score is a chain of head_dim roundings of 2^-24, and q is
    /// split to 22 bits, relative to the sum of magnitudes S; an error e of the scores moves every weight by at most
    /// e^(2e) - 1; the mix adds one rounding per position and the split of the weights; values are below V.
    fn tolerance(&self, sequence: usize, position: usize, head: usize, q: &[f32]) -> f32 {
        let kv_heads = self.kv.layout().n_kv_heads;
        let first = head / (self.n_heads / kv_heads) * self.head_dim;
        let mut magnitude = 0.0f32;
        let mut largest = 0.0f32;
        for p in 0..=position {
            let at = p * kv_heads * self.head_dim + first;
            let (k, v) = (&self.k[sequence][at..][..self.head_dim], &self.v[sequence][at..][..self.head_dim]);
            magnitude = magnitude.max(q.iter().zip(k).map(|(q, k)| (q * k).abs()).sum::<f32>() * SCALE);
            largest = v.iter().fold(largest, |max, v| max.max(v.abs()));
        }
        let unit = 2f32.powi(-24);
        let score = magnitude * ((self.head_dim + 2) as f32 * unit + 2f32.powi(-22)) + 4.0 * unit * magnitude;
        largest * (2.0 * score + (position + 40) as f32 * unit + 2f32.powi(-22))
    }

    /// Compares every value with the reference; the largest share of the tolerance that was used.
    fn worst_share(&self, gpu: &Executor, chunks: &[(usize, usize, usize)], q: &[f32]) -> f32 {
        let (got, expected) = (self.on_device(gpu, chunks, q), self.on_cpu(chunks, q));
        let rows = chunks.iter().flat_map(|&(sequence, start, n)| (start..start + n).map(move |p| (sequence, p)));
        let mut worst = 0.0f32;
        for (row, (sequence, position)) in rows.enumerate() {
            for head in 0..self.n_heads {
                let at = row * self.width() + head * self.head_dim;
                let tolerance = self.tolerance(sequence, position, head, &q[at..][..self.head_dim]);
                for d in at..at + self.head_dim {
                    let share = (got[d] - expected[d]).abs() / tolerance;
                    assert!(share <= 1.0, "position {position} head {head}: {} and {}", got[d], expected[d]);
                    worst = worst.max(share);
                }
            }
        }
        worst
    }
}

#[test]
fn agrees_with_the_reference_for_every_width_and_group() {
    if absent() {
        return;
    }
    let mut worst = 0.0f32;
    for (kv_heads, group, head_dim) in [(2, 1, 32), (1, 3, 64), (2, 4, 96), (1, 7, 128), (1, 20, 32), (1, 2, 256)] {
        let fixture = fixture(kv_heads, group, head_dim, &[41, 23], head_dim as u64);
        // A prefill chunk in the middle of one sequence, a decode row at the end of the other.
        let chunks = [(0, 13, 28), (1, 22, 1)];
        let q = Noise(1).values(29 * fixture.width());
        worst = worst.max(fixture.worst_share(&PLAIN, &chunks, &q));
    }
    assert!(worst > 0.001, "the worst error is {worst} of the tolerance");
}

#[test]
fn agrees_over_several_splits_whole_and_cut() {
    if absent() {
        return;
    }
    let fixture = fixture(1, 4, 32, &[600, 256, 257], 2);
    let chunks = [(0, 599, 1), (1, 255, 1), (2, 250, 7)];
    let q = Noise(3).values(9 * fixture.width());
    for gpu in [PLAIN, CUT] {
        fixture.worst_share(&gpu, &chunks, &q);
    }
    assert_eq!(bits(&fixture.on_device(&PLAIN, &chunks, &q)), bits(&fixture.on_device(&CUT, &chunks, &q)));
}

#[test]
fn a_row_has_the_same_bits_decoded_in_any_chunk_and_beside_anyone() {
    if absent() {
        return;
    }
    let fixture = fixture(2, 3, 32, &[290, 21], 4);
    let width = fixture.width();
    let first = 240;
    let q = Noise(5).values((290 - first) * width);
    let whole = fixture.on_device(&PLAIN, &[(0, first, 290 - first)], &q);
    for row in first..290 {
        let at = (row - first) * width;
        let alone = fixture.on_device(&CUT, &[(0, row, 1)], &q[at..][..width]);
        assert_eq!(bits(&alone), bits(&whole[at..][..width]), "row {row} decoded");
    }
    for cut in [first + 1, 255, 256, 257, 273] {
        let at = (cut - first) * width;
        let mut mixed = Noise(6).values(3 * width);
        mixed.extend_from_slice(&q[at..]);
        let out = fixture.on_device(&PLAIN, &[(1, 18, 3), (0, cut, 290 - cut)], &mixed);
        assert_eq!(bits(&out[3 * width..]), bits(&whole[at..]), "chunk from {cut}");
    }
}

#[test]
fn what_unwritten_slots_hold_never_reaches_a_row() {
    if absent() {
        return;
    }
    // The fixture's pages are NaN beyond each sequence, in a partly filled page too.
    let fixture = fixture(1, 2, 32, &[37], 7);
    let q = Noise(8).values(37 * fixture.width());
    assert!(fixture.on_device(&PLAIN, &[(0, 0, 37)], &q).iter().all(|value| value.is_finite()));
    // Values of later positions of the same sequence, short of NaN, do not reach earlier rows either.
    let before = fixture.on_device(&PLAIN, &[(0, 0, 30)], &q[..30 * fixture.width()]);
    let mut changed = fixture;
    let mut v = changed.v[0].clone();
    v[30 * 32..].fill(1e9);
    store(&mut changed.device, &changed.pages[0].clone(), &changed.k[0].clone(), &v);
    let after = changed.on_device(&PLAIN, &[(0, 0, 37)], &q);
    assert_eq!(bits(&after[..before.len()]), bits(&before));
}

#[test]
fn keys_and_values_lie_where_the_layout_says() {
    if absent() {
        return;
    }
    let fixture = fixture(3, 1, 32, &[20], 9);
    let data = fixture.device.contents(&PLAIN).expect("memory");
    let stored = |x: f32| f16::from_f32(x).to_bits();
    for position in 0..20usize {
        let page = fixture.pages[0][position / 16] as usize;
        for head in 0..3 {
            let block = ((page * 2 + LAYER) * 3 + head) * 2 * 16 * 32;
            for d in 0..32 {
                let (slot, from) = (position % 16, position * 96 + head * 32 + d);
                assert_eq!(data[block + slot * 32 + d], stored(fixture.k[0][from]), "key");
                assert_eq!(data[block + 16 * 32 + d * 16 + slot], stored(fixture.v[0][from]), "value");
            }
        }
    }
    let untouched = |block: usize| data[block..block + 3 * 2 * 16 * 32].iter().all(|&x| f16::from_bits(x).is_nan());
    assert!(untouched(0), "the other layer");
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    if absent() {
        return;
    }
    let fixture = std::panic::AssertUnwindSafe(fixture(2, 2, 32, &[20], 10));
    let plan = |runs: &[AttnRun<'_>], n_heads| {
        refusal(std::panic::AssertUnwindSafe(|| {
            let _ = AttentionPlan::new(&PLAIN, runs, n_heads, &fixture.device);
        }))
    };
    let run = |rows, start, pages| AttnRun { rows, start, pages };
    assert_eq!(plan(&[run(0..1, 0, &[0])], 3), "3 heads on 2");
    assert_eq!(plan(&[run(0..2, 15, &[0])], 4), "17 positions need more than 1 pages");
    assert_eq!(plan(&[run(0..1, 0, &[2])], 4), "a page beyond the pool");
    assert!(plan(&[run(1..2, 0, &[0]), run(0..1, 0, &[1])], 4).contains("out of order"));
}
