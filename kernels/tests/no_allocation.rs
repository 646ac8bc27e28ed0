//! A step must not allocate once its buffers have grown: the heap is the one place where the engine thread could meet
//! a lock. Counted with an allocator of our own, so this test has a process to itself.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use kernels::attention::{self, AttnRun, attention};
use kernels::kv::{KvDtype, KvLayout, KvPool, PAGE_TOKENS};
use kernels::lora::{self, LoraDtype, LoraPair, Segment, lora_delta};
use kernels::matmul::{self, Precision, Product, matmul_group};
use kernels::matrix::{BlockType, Matrix};
use kernels::ops;
use kernels::pool::Pool;

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_second_step_of_the_same_size_allocates_nothing() {
    const ROWS: usize = 70;
    let pool = Pool::new(2);
    let w = Matrix::from_blocks(64, 64, BlockType::Q4_1, &[0; 64 * 64 / 32 * 20], None).unwrap();
    let pair = LoraPair::new(8, 64, 64, &[0.5; 512], &[0.5; 512], 1.0, LoraDtype::F16, None).unwrap();
    let layout = KvLayout { n_layers: 1, n_kv_heads: 2, head_dim: 16, page_tokens: PAGE_TOKENS, dtype: KvDtype::F16 };
    let mut kv = KvPool::new(layout, 5);
    let table = ops::RopeTable::new(16, 128, &[0.1; 8]);
    let positions: Vec<u32> = (0..ROWS as u32).collect();
    let (mut x, norm) = (vec![0.25; ROWS * 64], vec![1.0; 64]);
    let (mut q, mut up, mut out) = (x.clone(), x.clone(), x.clone());
    let (mut product, mut delta, mut attend) =
        (matmul::Scratch::default(), lora::Scratch::default(), attention::Scratch::default());
    let mut step = |rows: usize| {
        ops::rms_norm(&pool, &x[..rows * 64], rows, &norm, 1e-5, &mut out[..rows * 64]);
        for precision in [Precision::Int8, Precision::F32] {
            let mut products =
                [Product { w: &w, out: &mut q[..rows * 64] }, Product { w: &w, out: &mut up[..rows * 64] }];
            matmul_group(&pool, precision, &out[..rows * 64], rows, &mut products, &mut product);
        }
        let segments = [Segment { rows: 0..rows / 2, pair: &pair }, Segment { rows: rows / 2..rows, pair: &pair }];
        lora_delta(&pool, &segments, &out[..rows * 64], 64, &mut q[..rows * 64], 64, &mut delta);
        ops::rope(&pool, &mut q[..rows * 64], rows, 4, 16, &positions[..rows], &table);
        let runs = [AttnRun { rows: 0..rows, start: 0, pages: &[0, 1, 2, 3, 4] }];
        kv.store_runs(&pool, 0, &runs, &q[..rows * 32], &up[..rows * 32]);
        attention(&pool, &q[..rows * 64], 4, &runs, &kv, 0, 0.25, &mut out[..rows * 64], &mut attend);
        ops::swiglu(&pool, &q[..rows * 64], &up[..rows * 64], &mut x[..rows * 64]);
        ops::max_and_argmax(&x)
    };
    step(ROWS);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for rows in [ROWS, 1, 17, ROWS] {
        step(rows);
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
}
