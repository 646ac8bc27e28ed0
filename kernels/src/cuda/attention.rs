//! Attention on the device: turns runs into tiles for the kernel, checks pages and lengths, and says which tiles are cut
//! into several blocks so that a few long sequences fill the device too. The same runs as on the CPU.

use std::ptr::from_ref;

use super::kv::DeviceKv;
use super::params::{AttentionParams, AttentionTile, GRID_MAX, Kernel, NOWHERE, SPLIT, THREADS, TILE, count};
use super::rows::expect_rows;
use super::{Buffer, Gpu, GpuError};
use crate::attention::AttnRun;
use crate::kv::PAGE_TOKENS;

/// Partial results kept at once, in values: 256 MiB, 64 sequences of 15 thousand positions. Tiles beyond it are not cut.
const PARTIAL_MAX: usize = 64 << 20;

/// The runs of a step, as tiles on the device; one for all layers.
#[derive(Debug)]
pub struct AttentionPlan<G: Gpu> {
    n_heads: usize,
    n_kv_heads: usize,
    head_dim: usize,
    rows_end: usize,
    pages_end: usize,
    tiles: Buffer<G, AttentionTile>,
    /// Tiles whose splits were computed apart.
    joins: Buffer<G, AttentionTile>,
    n_places: usize,
    pages: Buffer<G, u32>,
}

/// Memory reused from call to call; grows to the largest step and stays.
#[derive(Debug)]
pub struct AttentionScratch<G: Gpu> {
    partial: Buffer<G, f32>,
}

// === impl AttentionScratch ===

impl<G: Gpu> AttentionScratch<G> {
    /// Empty.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G) -> Result<Self, GpuError> {
        Ok(Self { partial: Buffer::zeros(gpu, 0)? })
    }
}

// === impl AttentionPlan ===

impl<G: Gpu> AttentionPlan<G> {
    /// Plans a step: `runs` in ascending row order, for `n_heads` query heads on the heads of `kv`.
    ///
    /// # Panics
    /// When runs overlap, a page is missing or does not exist, or the heads do not divide.
    ///
    /// # Errors
    /// When the device has no room.
    pub fn new(gpu: &G, runs: &[AttnRun<'_>], n_heads: usize, kv: &DeviceKv<G>) -> Result<Self, GpuError> {
        let n_kv_heads = kv.layout().n_kv_heads;
        assert!(n_heads > 0 && n_heads.is_multiple_of(n_kv_heads), "{n_heads} heads on {n_kv_heads}");
        assert!(n_kv_heads <= GRID_MAX[1], "{n_kv_heads} key/value heads");
        let head_dim = kv.layout().head_dim;
        let (mut rows_end, mut pages) = (0, Vec::new());
        let mut whole = Vec::new();
        for run in runs {
            assert!(run.rows.start >= rows_end && run.rows.end >= run.rows.start, "runs overlap or are out of order");
            let positions = run.start + run.rows.len();
            let n_pages = positions.div_ceil(PAGE_TOKENS);
            assert!(run.pages.len() >= n_pages, "{positions} positions need more than {} pages", run.pages.len());
            let used = &run.pages[..n_pages];
            assert!(used.iter().all(|&page| (page as usize) < kv.n_pages()), "a page beyond the pool");
            rows_end = run.rows.end;
            tiles_of(run, n_heads / n_kv_heads, count(pages.len(), "pages"), &mut whole);
            pages.extend_from_slice(used);
        }
        let places_max = PARTIAL_MAX / (n_kv_heads * TILE * (head_dim + 2));
        let cut = Cut::new(&whole, gpu.blocks_to_fill() / n_kv_heads, places_max);
        Ok(Self {
            n_heads,
            n_kv_heads,
            head_dim,
            rows_end,
            pages_end: pages.iter().max().map_or(0, |&page| page as usize + 1),
            tiles: Buffer::upload(gpu, &cut.tiles)?,
            joins: Buffer::upload(gpu, &cut.joins)?,
            n_places: cut.n_places,
            pages: Buffer::upload(gpu, &pages)?,
        })
    }
}

/// Softmax attention of every row of the plan's runs over its own sequence: `q` and `out` `[n_rows, n_heads * head_dim]`,
/// scores multiplied by `scale`. The keys and values of the rows themselves must have been stored before. Rows
/// outside of all runs are left alone.
///
/// # Panics
/// When a buffer is too short, or the plan was made for other pages.
///
/// # Errors
/// When the device has no room or the driver refuses.
pub fn attention<G: Gpu>(
    gpu: &G,
    plan: &AttentionPlan<G>,
    q: &Buffer<G, f32>,
    kv: &DeviceKv<G>,
    layer: usize,
    scale: f32,
    out: &mut Buffer<G, f32>,
    scratch: &mut AttentionScratch<G>,
) -> Result<(), GpuError> {
    let layout = kv.layout();
    let same = plan.n_kv_heads == layout.n_kv_heads && plan.head_dim == layout.head_dim;
    assert!(same && plan.pages_end <= kv.n_pages(), "the plan was made for other pages");
    expect_rows("q", q, plan.rows_end, plan.n_heads * plan.head_dim);
    expect_rows("out", out, plan.rows_end, plan.n_heads * plan.head_dim);
    let layer_offset = kv.layer_offset(layer) as u64;
    scratch.partial.grow(gpu, plan.n_places * plan.n_kv_heads * TILE * (plan.head_dim + 2))?;
    let mut params = AttentionParams {
        q: q.address(gpu),
        out: out.address(gpu),
        kv: kv.data.address(gpu),
        tiles: plan.tiles.address(gpu),
        pages: plan.pages.address(gpu),
        partial: scratch.partial.address(gpu),
        page_stride: kv.page_stride() as u64,
        layer_offset,
        n_kv_heads: count(plan.n_kv_heads, "heads"),
        head_dim: count(plan.head_dim, "dimensions"),
        group: count(plan.n_heads / plan.n_kv_heads, "heads"),
        scale,
    };
    if !plan.tiles.is_empty() {
        let shared_bytes = 4 * TILE * (SPLIT + 16 + 2 * plan.head_dim + 5);
        let grid = [plan.tiles.len(), plan.n_kv_heads, 1];
        // SAFETY: the parameters of this kernel; tiles name rows, pages and places that were checked or reserved above.
        unsafe { gpu.launch(Kernel::Attention, grid, shared_bytes, from_ref(&params).cast())? };
    }
    if !plan.joins.is_empty() {
        params.tiles = plan.joins.address(gpu);
        let grid = [plan.joins.len(), plan.n_kv_heads, (TILE * plan.head_dim).div_ceil(THREADS)];
        // SAFETY: as above; every place of these tiles was written by the launch before.
        unsafe { gpu.launch(Kernel::AttentionCombine, grid, 0, from_ref(&params).cast())? };
    }
    Ok(())
}

/// Tiles in launch order, those to join, and the partial results between them.
#[derive(Debug, PartialEq, Eq)]
struct Cut {
    tiles: Vec<AttentionTile>,
    joins: Vec<AttentionTile>,
    n_places: usize,
}

// === impl Cut ===

impl Cut {
    /// Cuts tiles into their splits, in order, while that is wanted to have `wanted` tiles and places are left.
    fn new(whole: &[AttentionTile], wanted: usize, places_max: usize) -> Self {
        let mut cut = Self { tiles: Vec::new(), joins: Vec::new(), n_places: 0 };
        for tile in whole {
            let n_splits = tile.n_splits as usize;
            if whole.len() >= wanted || n_splits == 1 || cut.n_places + n_splits > places_max {
                cut.tiles.push(*tile);
                continue;
            }
            let partial = count(cut.n_places, "partial results");
            cut.joins.push(AttentionTile { partial, ..*tile });
            cut.tiles.extend((0..tile.n_splits).map(|split| AttentionTile {
                first_split: split,
                n_splits: 1,
                partial: partial + split,
                ..*tile
            }));
            cut.n_places += n_splits;
        }
        cut
    }
}

/// Appends a run's tiles, uncut.
fn tiles_of(run: &AttnRun<'_>, group: usize, pages: u32, tiles: &mut Vec<AttentionTile>) {
    let n_queries = run.rows.len() * group;
    count(run.rows.end, "rows");
    count(run.start + n_queries, "queries");
    tiles.extend((0..n_queries).step_by(TILE).map(|query| {
        let n_queries = TILE.min(n_queries - query);
        let limit = run.start + (query + n_queries - 1) / group + 1;
        AttentionTile {
            first_row: run.rows.start as u32,
            query: query as u32,
            n_queries: n_queries as u32,
            position: run.start as u32,
            pages,
            first_split: 0,
            n_splits: limit.div_ceil(SPLIT) as u32,
            partial: NOWHERE,
        }
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiles(start: usize, n_rows: usize, group: usize) -> Vec<AttentionTile> {
        let mut tiles = Vec::new();
        tiles_of(&AttnRun { rows: 3..3 + n_rows, start, pages: &[] }, group, 7, &mut tiles);
        tiles
    }

    #[test]
    fn tiles_cover_every_query_once_and_end_at_their_last_position() {
        let tiles = tiles(250, 9, 5);
        let queries: Vec<_> = tiles.iter().map(|tile| (tile.query, tile.n_queries)).collect();
        assert_eq!(queries, [(0, 16), (16, 16), (32, 13)]);
        // Rows 0 to 3, 3 to 6 and 6 to 8 of the run end at positions 253, 256 and 258.
        assert_eq!(tiles.iter().map(|tile| tile.n_splits).collect::<Vec<_>>(), [1, 2, 2]);
        assert!(tiles.iter().all(|tile| tile.first_row == 3 && tile.pages == 7 && tile.partial == NOWHERE));
    }

    #[test]
    fn tiles_are_cut_only_where_the_device_would_idle_and_places_are_left() {
        let whole = [tiles(1000, 1, 4), tiles(10, 1, 4), tiles(600, 1, 4)].concat();
        assert_eq!(Cut::new(&whole, 3, 100), Cut { tiles: whole.clone(), joins: vec![], n_places: 0 });
        let cut = Cut::new(&whole, 4, 100);
        assert_eq!((cut.tiles.len(), cut.joins.len(), cut.n_places), (4 + 1 + 3, 2, 7));
        assert_eq!(cut.joins[1].partial, 4);
        assert_eq!(cut.tiles[7].partial, 6);
        let tight = Cut::new(&whole, 4, 5);
        assert_eq!((tight.tiles.len(), tight.joins.len(), tight.n_places), (4 + 1 + 1, 1, 4));
    }
}
