//! Keys and values of all sequences in pages of 16 positions, shared by all layers.
//!
//! Keys lie transposed, `[head_dim][16 positions]`, so that a vector lane is a position when scoring; values lie
//! `[16 positions][head_dim]`, so that a lane is a dimension when mixing. The forward pass stores rows, `attention`
//! reads them after rounding to the page's dtype. Who owns which page is decided elsewhere.

use std::ops::Range;

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::aligned::{Aligned, Plain};
use crate::attention::{AttnRun, check_runs};
use crate::pool::Pool;

/// Positions per page: the lanes of a 512-bit vector of f32.
pub const PAGE_TOKENS: usize = 16;

/// Rows written at once: a µs or two.
const ROWS_PER_TASK: usize = 4;

/// f16 values converted at once.
const CONVERT: usize = 64;

/// How pages keep their values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// As computed.
    F32,
    /// Rounded to half precision, to nearest even; beyond 65,504 to infinity.
    F16,
}

/// Shape of the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Layers.
    pub n_layers: usize,
    /// Key/value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Positions per page; must be [`PAGE_TOKENS`].
    pub page_tokens: usize,
    /// Kept as.
    pub dtype: KvDtype,
}

/// All pages of a model: `[n_pages][n_layers][n_kv_heads]` blocks of keys `[head_dim][16]` and values `[16][head_dim]`.
#[derive(Debug)]
pub struct KvPool {
    layout: KvLayout,
    n_pages: usize,
    data: Aligned,
}

// === impl KvDtype ===

impl KvDtype {
    const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

// === impl KvLayout ===

impl KvLayout {
    /// Bytes of one page over all layers, keys and values.
    pub fn bytes_per_page(&self) -> usize {
        self.n_layers * self.n_kv_heads * self.block_len() * self.dtype.bytes()
    }

    /// Values of one head in one layer of a page: keys, then values.
    fn block_len(&self) -> usize {
        2 * self.head_dim * PAGE_TOKENS
    }
}

// === impl KvPool ===

impl KvPool {
    /// Reserves `n_pages` pages of zeros; memory is touched when pages are first written.
    ///
    /// # Panics
    /// When the layout has a zero size or other pages than [`PAGE_TOKENS`], or the size overflows.
    pub fn new(layout: KvLayout, n_pages: usize) -> Self {
        assert_eq!(layout.page_tokens, PAGE_TOKENS, "pages have {PAGE_TOKENS} positions");
        assert!(layout.n_layers > 0 && layout.n_kv_heads > 0 && layout.head_dim > 0, "an empty layout: {layout:?}");
        let bytes = layout.bytes_per_page().checked_mul(n_pages).expect("the pool's size fits the address space");
        Self { layout, n_pages, data: Aligned::zeros::<u8>(bytes) }
    }

    /// Shape.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Pages; ids are `0..n_pages`.
    pub fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Bytes of one page over all layers.
    pub fn bytes_per_page(&self) -> usize {
        self.layout.bytes_per_page()
    }

    /// Writes one position: `k` and `v` `[n_kv_heads * head_dim]` into slot `slot` of a page.
    ///
    /// # Panics
    /// When layer, page or slot do not exist or a length does not fit.
    pub fn store(&mut self, layer: usize, page: u32, slot: usize, k: &[f32], v: &[f32]) {
        assert!(slot < PAGE_TOKENS, "no slot {slot}");
        let run = AttnRun { rows: 0..1, start: slot, pages: &[page] };
        self.store_runs(&Pool::new(1), layer, &[run], k, v);
    }

    /// Writes the rows of all runs, `k` and `v` `[n_rows, n_kv_heads * head_dim]`, to their positions. No two rows may
    /// share a position of a page: the later one would not surely win.
    ///
    /// # Panics
    /// When the layer does not exist or a run or length does not fit.
    pub fn store_runs(&mut self, pool: &Pool, layer: usize, runs: &[AttnRun<'_>], k: &[f32], v: &[f32]) {
        let KvLayout { n_layers, n_kv_heads, head_dim, dtype, .. } = self.layout;
        let width = n_kv_heads * head_dim;
        assert!(layer < n_layers, "layer {layer} of {n_layers}");
        assert!(k.len() == v.len() && k.len().is_multiple_of(width), "k and v are not [n_rows, {width}]");
        check_runs(runs, k.len() / width, self);
        let n_units = runs.iter().map(|run| run.rows.len().div_ceil(ROWS_PER_TASK)).sum();
        let data = Shared(self.data.view_mut::<u8>().as_mut_ptr());
        let pool_of = &*self;
        pool.run_chunks(n_units, 1, &|unit| {
            let (run, rows) = find(runs, unit.start);
            for row in rows {
                let position = run.start + row - run.rows.start;
                let (page, slot) = (run.pages[position / PAGE_TOKENS], position % PAGE_TOKENS);
                for head in 0..n_kv_heads {
                    let at = pool_of.block(layer, page, head);
                    let columns = row * width + head * head_dim..row * width + (head + 1) * head_dim;
                    let (k, v) = (&k[columns.clone()], &v[columns]);
                    // SAFETY: layer, page, head and slot exist (checked above), so the block lies inside the data, which
                    // is borrowed exclusively; no other thread writes this slot.
                    unsafe {
                        match dtype {
                            KvDtype::F32 => put(data.of::<f32>(at), slot, k, v),
                            KvDtype::F16 => put_half(data.of::<u16>(at), slot, k, v),
                        }
                    }
                }
            }
        });
    }

    /// Fills a page with NaN, so that reading it by mistake shows.
    ///
    /// # Panics
    /// When the page does not exist.
    pub fn poison(&mut self, page: u32) {
        assert!((page as usize) < self.n_pages, "no page {page}");
        let n = self.bytes_per_page() / self.layout.dtype.bytes();
        let at = page as usize * n;
        match self.layout.dtype {
            KvDtype::F32 => self.data.view_mut::<f32>()[at..at + n].fill(f32::NAN),
            KvDtype::F16 => self.data.view_mut::<u16>()[at..at + n].fill(f16::NAN.to_bits()),
        }
    }

    /// Index of the first value of a head's block in a page.
    fn block(&self, layer: usize, page: u32, head: usize) -> usize {
        let KvLayout { n_layers, n_kv_heads, .. } = self.layout;
        ((page as usize * n_layers + layer) * n_kv_heads + head) * self.layout.block_len()
    }

    /// Where a head of a layer, which exists, lies in all pages.
    pub(crate) fn blocks(&self, layer: usize, head: usize) -> HeadBlocks {
        let bytes = self.layout.dtype.bytes();
        let first = self.data.view::<u8>().as_ptr().wrapping_add(self.block(layer, 0, head) * bytes);
        HeadBlocks { first, page_bytes: self.bytes_per_page(), half_bytes: self.layout.block_len() / 2 * bytes }
    }

    /// Keys `[head_dim][16]` and values `[16][head_dim]` of a head in a page, as stored numbers of `dtype`.
    pub(crate) fn head<T: Plain>(&self, layer: usize, page: u32, head: usize) -> (&[T], &[T]) {
        debug_assert_eq!(size_of::<T>(), self.layout.dtype.bytes());
        let block = &self.data.view::<T>()[self.block(layer, page, head)..][..self.layout.block_len()];
        block.split_at(self.layout.head_dim * PAGE_TOKENS)
    }
}

/// Where the blocks of one head in one layer lie, for kernels that go through many pages.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadBlocks {
    first: *const u8,
    page_bytes: usize,
    /// Bytes of the keys, and of the values after them.
    pub(crate) half_bytes: usize,
}

// === impl HeadBlocks ===

impl HeadBlocks {
    /// First byte of the keys in a page; readable when the page exists.
    #[inline(always)]
    pub(crate) fn keys(&self, page: u32) -> *const u8 {
        self.first.wrapping_add(page as usize * self.page_bytes)
    }

    /// First byte of the values in a page.
    #[inline(always)]
    pub(crate) fn values(&self, page: u32) -> *const u8 {
        self.keys(page).wrapping_add(self.half_bytes)
    }
}

/// The pool's memory, written by several threads in different slots.
#[derive(Clone, Copy)]
struct Shared(*mut u8);

// SAFETY: threads write different slots only (contract of `KvPool::store_runs`).
unsafe impl Sync for Shared {}

// === impl Shared ===

impl Shared {
    /// The number at index `at`; the pointer is good for the memory the whole has.
    fn of<T: Plain>(&self, at: usize) -> *mut T {
        self.0.cast::<T>().wrapping_add(at)
    }
}

/// The run and rows of unit `index`.
fn find<'a, 'b>(runs: &'b [AttnRun<'a>], mut index: usize) -> (&'b AttnRun<'a>, Range<usize>) {
    for run in runs {
        let units = run.rows.len().div_ceil(ROWS_PER_TASK);
        if index < units {
            let first = run.rows.start + index * ROWS_PER_TASK;
            return (run, first..(first + ROWS_PER_TASK).min(run.rows.end));
        }
        index -= units;
    }
    unreachable!("units are counted from the same runs")
}

/// Writes a head's key, transposed, and value into a slot of a block.
///
/// # Safety
/// `block` points to a block of heads as wide as `k` and `v`, and nobody else touches this slot.
unsafe fn put<T: Copy>(block: *mut T, slot: usize, k: &[T], v: &[T]) {
    // SAFETY: the contract of this function.
    unsafe {
        for (d, &k) in k.iter().enumerate() {
            *block.add(d * PAGE_TOKENS + slot) = k;
        }
        let values = block.add((PAGE_TOKENS + slot) * v.len());
        std::ptr::copy_nonoverlapping(v.as_ptr(), values, v.len());
    }
}

/// As [`put`], rounded to half precision.
///
/// # Safety
/// As [`put`].
unsafe fn put_half(block: *mut u16, slot: usize, k: &[f32], v: &[f32]) {
    let values = block.wrapping_add((PAGE_TOKENS + slot) * v.len());
    for (i, (k, v)) in k.chunks(CONVERT).zip(v.chunks(CONVERT)).enumerate() {
        let first = i * CONVERT;
        // SAFETY: the contract of this function.
        unsafe {
            for (d, &k) in to_half(k)[..k.len()].iter().enumerate() {
                *block.add((first + d) * PAGE_TOKENS + slot) = k;
            }
            std::ptr::copy_nonoverlapping(to_half(v).as_ptr(), values.add(first), v.len());
        }
    }
}

fn to_half(values: &[f32]) -> [u16; CONVERT] {
    let mut halves = [f16::ZERO; CONVERT];
    halves[..values.len()].convert_from_f32_slice(values);
    halves.map(f16::to_bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_rows_come_back_rounded_and_poison_reaches_one_page_only() {
        for dtype in [KvDtype::F32, KvDtype::F16] {
            let layout = KvLayout { n_layers: 2, n_kv_heads: 3, head_dim: 72, page_tokens: 16, dtype };
            let mut kv = KvPool::new(layout, 3);
            let k: Vec<f32> = (0..216).map(|i| i as f32 / 7.0).collect();
            let v: Vec<f32> = (0..216).map(|i| -(i as f32) / 3.0).collect();
            kv.store(1, 2, 5, &k, &v);
            kv.poison(1);
            let read = |keys: bool, layer, page, head, d: usize, slot: usize| {
                let at = if keys { d * 16 + slot } else { slot * 72 + d };
                match dtype {
                    KvDtype::F32 => {
                        let (k, v) = kv.head::<f32>(layer, page, head);
                        if keys { k[at] } else { v[at] }
                    }
                    KvDtype::F16 => {
                        let (k, v) = kv.head::<u16>(layer, page, head);
                        f16::from_bits(if keys { k[at] } else { v[at] }).to_f32()
                    }
                }
            };
            let rounded = |x: f32| if dtype == KvDtype::F16 { f16::from_f32(x).to_f32() } else { x };
            for head in 0..3 {
                for d in 0..72 {
                    assert_eq!(read(true, 1, 2, head, d, 5), rounded(k[head * 72 + d]));
                    assert_eq!(read(false, 1, 2, head, d, 5), rounded(v[head * 72 + d]));
                    assert_eq!(read(true, 1, 2, head, d, 4), 0.0);
                    assert_eq!(read(true, 0, 2, head, d, 5), 0.0);
                    assert!(read(true, 0, 1, head, d, 0).is_nan() && read(false, 1, 1, head, d, 15).is_nan());
                }
            }
            assert_eq!(kv.bytes_per_page(), 2 * 3 * 2 * 72 * 16 * if dtype == KvDtype::F32 { 4 } else { 2 });
        }
    }
}
