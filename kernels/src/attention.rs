//! Causal attention over KV pages, for decoding rows and prefill chunks alike; grouped query heads.
//!
//! Checks runs and pages, cuts the work into (row tile, key/value head) units and calls a backend. A row at position
//! `p` attends `0..=p` through the pages of its run; its keys and values are read from the page like all others, so
//! after rounding. Softmax is two passes over absolute positions: the score of a position, the sum of exponentials
//! (16 partial sums by position modulo 16, one fixed tree) and the mix (one chain over positions) do not depend on
//! where a chunk or a tile begins. Slots past a row's position are never part of its result, whatever they hold.

mod scalar;
mod vector;

use std::ops::Range;

use crate::aligned::{Aligned, OutMat};
use crate::backend;
use crate::kv::{HeadBlocks, KvPool, PAGE_TOKENS};
use crate::pool::Pool;

/// Query vectors of one unit, at most (one row's group of heads may be larger): they share loads of keys and values,
/// and their probabilities at 8,192 positions fill most of an L2 cache.
const QUERIES: usize = 24;

/// Consecutive rows of one sequence.
#[derive(Debug, Clone)]
pub struct AttnRun<'a> {
    /// Rows of the batch.
    pub rows: Range<usize>,
    /// Position of the first row in its sequence.
    pub start: usize,
    /// Pages of the sequence by position; cover `start + rows.len()` positions.
    pub pages: &'a [u32],
}

/// Buffers reused from call to call; grow to the longest context and stay.
#[derive(Debug, Default)]
pub struct Scratch {
    /// `[threads][QUERIES or group][positions]` probabilities.
    probabilities: Aligned,
}

/// Softmax attention of every row of `runs` over its own sequence: `q` and `out` `[n_rows, n_heads * head_dim]`.
/// Query head `h` reads key/value head `h / (n_heads / n_kv_heads)`; scores are multiplied by `scale`. Runs are in
/// ascending row order; rows outside of all runs are left alone. The keys and values of the rows themselves must have
/// been stored before.
///
/// # Panics
/// When a length does not fit, runs overlap, or a page is missing or does not exist.
#[expect(clippy::too_many_arguments, reason = "plain slices and facts, as everywhere in this crate")]
pub fn attention(
    pool: &Pool,
    q: &[f32],
    n_heads: usize,
    runs: &[AttnRun<'_>],
    kv: &KvPool,
    layer: usize,
    scale: f32,
    out: &mut [f32],
    scratch: &mut Scratch,
) {
    let layout = kv.layout();
    let width = n_heads * layout.head_dim;
    assert!(n_heads > 0 && n_heads.is_multiple_of(layout.n_kv_heads), "{n_heads} heads on {}", layout.n_kv_heads);
    assert!(layer < layout.n_layers, "layer {layer} of {}", layout.n_layers);
    assert!(q.len() == out.len() && q.len().is_multiple_of(width), "q and out are not [n_rows, {width}]");
    let n_rows = q.len() / width;
    let positions_max = check_runs(runs, n_rows, kv);
    let group = n_heads / layout.n_kv_heads;
    let rows_per_tile = (QUERIES / group).max(1);
    // An odd number of cache lines: queries a multiple of 4 KiB apart would push each other out of the nearest cache.
    let stride = (positions_max.div_ceil(PAGE_TOKENS) | 1) * PAGE_TOKENS;
    let per_thread = rows_per_tile * group * stride;
    scratch.probabilities.grow::<f32>(pool.threads() * per_thread);
    let probabilities = OutMat::new(
        &mut scratch.probabilities.view_mut::<f32>()[..pool.threads() * per_thread],
        pool.threads(),
        per_thread,
    );
    let target = OutMat::new(out, n_rows, width);
    let backend = backend::active();
    let tiles = |run: &AttnRun<'_>| run.rows.len().div_ceil(rows_per_tile);
    let n_tiles: usize = runs.iter().map(tiles).sum();
    // The pages a tile reads, and its rows and first position.
    let tile_of = |mut tile: usize| {
        let run = runs.iter().find(|run| {
            let inside = tile < tiles(run);
            tile -= if inside { 0 } else { tiles(run) };
            inside
        });
        let run = run.expect("tiles are counted from the same runs");
        let first = run.rows.start + tile * rows_per_tile;
        let rows = first..(first + rows_per_tile).min(run.rows.end);
        let position = run.start + tile * rows_per_tile;
        (&run.pages[..(position + rows.len()).div_ceil(PAGE_TOKENS)], rows, position)
    };
    // One head of a tile at a time: with whole tiles, one thread would often wait for the other's last.
    pool.run_stretches(n_tiles * layout.n_kv_heads, 1, &|thread, units| {
        // SAFETY: one row of the buffer per task of this call.
        let probabilities = unsafe { probabilities.cols(thread, 0, per_thread) };
        let (tile, kv_head) = (units.start / layout.n_kv_heads, units.start % layout.n_kv_heads);
        let (pages, rows, position) = tile_of(tile);
        let next = if kv_head + 1 < layout.n_kv_heads {
            Some((kv.blocks(layer, kv_head + 1), pages))
        } else {
            (tile + 1 < n_tiles).then(|| (kv.blocks(layer, 0), tile_of(tile + 1).0))
        };
        let blocks = kv.blocks(layer, kv_head);
        let unit =
            Unit { q, out: target, kv, layer, kv_head, blocks, group, rows, position, pages, next, scale, stride };
        // SAFETY: the active backend is available; shapes were checked on entry, and units are disjoint.
        unsafe { backend.run(vector::Attend(&unit, probabilities), |k| scalar::run(k.0, k.1)) };
    });
}

/// Some rows of one run on one key/value head. Nobody else writes these heads of these rows.
struct Unit<'a> {
    q: &'a [f32],
    out: OutMat,
    kv: &'a KvPool,
    layer: usize,
    kv_head: usize,
    /// Where this head's keys and values lie.
    blocks: HeadBlocks,
    /// Query heads per key/value head.
    group: usize,
    rows: Range<usize>,
    /// Position of the first of these rows.
    position: usize,
    /// Pages up to the last position of these rows.
    pages: &'a [u32],
    /// Blocks and pages of the unit that most likely comes next on this thread; only ever fetched.
    next: Option<(HeadBlocks, &'a [u32])>,
    scale: f32,
    /// Probabilities per query.
    stride: usize,
}

/// One query vector of a unit.
#[derive(Debug, Clone, Copy)]
struct Query {
    row: usize,
    /// First of its columns in `q` and `out`.
    column: usize,
    /// Positions it attends: `0..limit`.
    limit: usize,
}

// === impl Unit ===

impl Unit<'_> {
    fn n_queries(&self) -> usize {
        self.rows.len() * self.group
    }

    /// Queries in row order, so that limits ascend.
    fn query(&self, index: usize) -> Query {
        let head = self.kv_head * self.group + index % self.group;
        Query {
            row: self.rows.start + index / self.group,
            column: head * self.kv.layout().head_dim,
            limit: self.position + index / self.group + 1,
        }
    }

    fn q_of(&self, query: Query) -> &[f32] {
        &self.q[query.row * self.out.n_cols() + query.column..][..self.kv.layout().head_dim]
    }
}

/// Checks all runs; the longest context among them.
pub(crate) fn check_runs(runs: &[AttnRun<'_>], n_rows: usize, kv: &KvPool) -> usize {
    let (mut rows_end, mut positions_max) = (0, 0);
    for run in runs {
        assert!(run.rows.start >= rows_end && run.rows.end >= run.rows.start, "runs overlap or are out of order");
        let positions = run.start + run.rows.len();
        let covered = run.pages.len() * PAGE_TOKENS;
        assert!(covered >= positions, "{positions} positions need more than {} pages", run.pages.len());
        assert!(run.pages.iter().all(|&page| (page as usize) < kv.n_pages()), "a page beyond the pool");
        rows_end = run.rows.end;
        positions_max = positions_max.max(positions);
    }
    assert!(rows_end <= n_rows, "runs reach row {rows_end} of {n_rows}");
    positions_max
}

#[cfg(test)]
mod tests;
