//! Keys and values on the device, in pages of 16 positions shared by all layers, f16 only.
//!
//! The other way round than on the CPU: keys lie `[16 positions][head_dim]` and values `[head_dim][16 positions]`, because
//! a lane of a tensor-core product wants neighbouring dimensions of a key and neighbouring positions of a value.
//! `rows::rope_store` writes them, `attention` reads them. Who owns which page is decided elsewhere.

use super::{Buffer, Gpu, GpuError};
use crate::kv::{KvDtype, KvLayout, PAGE_TOKENS};

/// All pages of a model: `[n_pages][n_layers][n_kv_heads]` blocks of keys `[16][head_dim]` and values `[head_dim][16]`.
#[derive(Debug)]
pub struct DeviceKv<G: Gpu> {
    layout: KvLayout,
    n_pages: usize,
    pub(super) data: Buffer<G, u16>,
}

// === impl DeviceKv ===

impl<G: Gpu> DeviceKv<G> {
    /// Reserves `n_pages` pages of zeros.
    ///
    /// # Panics
    /// When the layout is empty, not f16, has other pages than [`PAGE_TOKENS`], or heads that are not a multiple of 32
    /// wide, up to 256.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, layout: KvLayout, n_pages: usize) -> Result<Self, GpuError> {
        let KvLayout { n_layers, n_kv_heads, head_dim, page_tokens, dtype } = layout;
        assert!(dtype == KvDtype::F16, "pages on the device are f16, not {dtype:?}");
        assert_eq!(page_tokens, PAGE_TOKENS, "pages have {PAGE_TOKENS} positions");
        assert!(n_layers > 0 && n_kv_heads > 0 && n_pages > 0, "an empty layout: {layout:?}");
        assert!(supports_head_dim(head_dim), "heads of {head_dim} on the device");
        let len = layout.bytes_per_page().checked_mul(n_pages).expect("the pool's size fits the address space") / 2;
        Ok(Self { layout, n_pages, data: Buffer::zeros(gpu, len)? })
    }

    /// Shape.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Pages; ids are `0..n_pages`.
    pub fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Fills a page with NaN, so that reading it by mistake shows.
    ///
    /// # Panics
    /// When the page does not exist.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn poison(&mut self, gpu: &G, page: u32) -> Result<(), GpuError> {
        assert!((page as usize) < self.n_pages, "no page {page}");
        let n = self.page_stride();
        // All bits set are a NaN.
        self.data.fill(gpu, page as usize * n, n, 0xff)
    }

    /// A copy of all pages, f16 bits, for checks.
    ///
    /// # Errors
    /// When the driver refuses.
    pub fn contents(&self, gpu: &G) -> Result<Vec<u16>, GpuError> {
        self.data.download(gpu)
    }

    /// Values from a page to the next.
    pub(super) fn page_stride(&self) -> usize {
        self.layout.bytes_per_page() / 2
    }

    /// Values from the start of a page to a layer's first head.
    ///
    /// # Panics
    /// When the layer does not exist.
    pub(super) fn layer_offset(&self, layer: usize) -> usize {
        assert!(layer < self.layout.n_layers, "layer {layer} of {}", self.layout.n_layers);
        layer * self.layout.n_kv_heads * 2 * PAGE_TOKENS * self.layout.head_dim
    }
}

/// Whether heads of this width can be attended on the device; a model with others runs on the CPU.
pub fn supports_head_dim(head_dim: usize) -> bool {
    head_dim > 0 && head_dim.is_multiple_of(32) && head_dim <= 256
}
