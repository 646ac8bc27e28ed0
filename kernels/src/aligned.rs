//! Memory aligned to cache lines, so that a 64-byte vector load never crosses one: owned, or part of a mapped file.
//! Holds the packed panels of `matrix`, the pairs of `lora` and the pages of `kv`; knows nothing of what is in it.

use std::alloc::{Layout, alloc_zeroed, handle_alloc_error};
use std::sync::Arc;

use memmap2::MmapMut;

use crate::mapping::Mapping;

/// Buffers from this size on are pages of the system, which take memory only where they are written; the allocator would
/// write zeros over all of them.
const PAGES_FROM: usize = 4 << 20;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

const _: () = assert!(size_of::<Line>() == 64 && align_of::<Line>() == 64);

/// Number types without padding, for which every bit pattern is a value.
///
/// # Safety
/// Implementors are such types, and their alignment divides 64.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: integers and floats, aligned to at most 4 bytes.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for i8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for i32 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}

/// A zero-initialised buffer, or a read-only part of a file, whose first byte starts a cache line.
pub(crate) struct Aligned {
    lines: Lines,
}

enum Lines {
    Owned(Vec<Line>),
    Pages(MmapMut),
    Mapped { file: Arc<Mapping>, first: usize, n: usize },
}

impl Default for Aligned {
    fn default() -> Self {
        Self { lines: Lines::Owned(Vec::new()) }
    }
}

// === impl Aligned ===

impl Aligned {
    /// `n` zeros of type `T`, rounded up to whole lines.
    pub(crate) fn zeros<T: Plain>(n: usize) -> Self {
        let bytes = n.checked_mul(size_of::<T>()).expect("a buffer size fits the address space");
        let n_lines = bytes.div_ceil(64);
        if n_lines == 0 {
            return Self::default();
        }
        let layout = Layout::array::<Line>(n_lines).expect("a buffer size fits the address space");
        if layout.size() >= PAGES_FROM {
            let pages = MmapMut::map_anon(layout.size()).unwrap_or_else(|_| handle_alloc_error(layout));
            return Self { lines: Lines::Pages(pages) };
        }
        // SAFETY: the layout is not empty; zeros are a valid `Line`; pointer, length and capacity are what `Vec` with
        // the global allocator and this layout expects.
        let lines = unsafe {
            let ptr = alloc_zeroed(layout);
            if ptr.is_null() {
                handle_alloc_error(layout);
            }
            Vec::from_raw_parts(ptr.cast::<Line>(), n_lines, n_lines)
        };
        Self { lines: Lines::Owned(lines) }
    }

    /// `bytes` of a mapped file from byte `at`, both whole lines; `None` when the file does not have them.
    pub(crate) fn mapped(file: &Arc<Mapping>, at: usize, bytes: usize) -> Option<Self> {
        let in_lines = at.is_multiple_of(64) && bytes.is_multiple_of(64);
        let fits = at.checked_add(bytes).is_some_and(|end| end <= file.bytes().len());
        (in_lines && fits)
            .then(|| Self { lines: Lines::Mapped { file: Arc::clone(file), first: at / 64, n: bytes / 64 } })
    }

    fn lines(&self) -> &[Line] {
        match &self.lines {
            Lines::Owned(lines) => lines,
            // SAFETY: a mapping starts at a page, `zeros` asked for whole lines, and any bytes are a `Line`.
            Lines::Pages(pages) => unsafe { std::slice::from_raw_parts(pages.as_ptr().cast(), pages.len() / 64) },
            // SAFETY: a mapping starts at a page, the range was checked in `mapped`, and any bytes are a `Line`.
            Lines::Mapped { file, first, n } => unsafe {
                std::slice::from_raw_parts(file.bytes().as_ptr().cast::<Line>().add(*first), *n)
            },
        }
    }

    /// # Panics
    /// When the memory belongs to a file.
    fn lines_mut(&mut self) -> &mut [Line] {
        match &mut self.lines {
            Lines::Owned(lines) => lines,
            // SAFETY: as in `lines`, and the borrow is exclusive.
            Lines::Pages(pages) => unsafe {
                std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), pages.len() / 64)
            },
            Lines::Mapped { .. } => unreachable!("nothing writes into packed weights"),
        }
    }

    /// Makes room for at least `n` values; keeps what is there when it is enough already, and forgets it otherwise.
    pub(crate) fn grow<T: Plain>(&mut self, n: usize) {
        if self.lines().len() < (n * size_of::<T>()).div_ceil(64) {
            *self = Self::zeros::<T>(n);
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.lines().len() * 64
    }

    /// The whole buffer as numbers.
    pub(crate) fn view<T: Plain>(&self) -> &[T] {
        // SAFETY: `Plain` types accept any bytes and are aligned by 64; the length covers whole lines only.
        unsafe { std::slice::from_raw_parts(self.lines().as_ptr().cast(), self.bytes() / size_of::<T>()) }
    }

    /// The whole buffer as numbers, writable.
    pub(crate) fn view_mut<T: Plain>(&mut self) -> &mut [T] {
        let lines = self.lines_mut();
        // SAFETY: as in `view`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 64 / size_of::<T>()) }
    }

    /// Overwrites everything with zeros in a way the compiler may not leave out.
    pub(crate) fn clear(&mut self) {
        for line in self.lines_mut() {
            // SAFETY: a valid, exclusive reference.
            unsafe { std::ptr::write_volatile(line, Line([0; 64])) };
        }
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    }
}

impl std::fmt::Debug for Aligned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Aligned({} bytes)", self.bytes())
    }
}

/// An output matrix `[n_rows, n_cols]` that several threads write, each its own rows and columns.
pub(crate) struct OutMat<T = f32> {
    ptr: *mut T,
    n_rows: usize,
    n_cols: usize,
}

// SAFETY: threads reach the memory only through `cols`, whose contract forbids overlap.
unsafe impl<T: Send> Send for OutMat<T> {}
// SAFETY: as above.
unsafe impl<T: Send + Sync> Sync for OutMat<T> {}

// === impl OutMat ===

impl<T> Clone for OutMat<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for OutMat<T> {}

impl<T> OutMat<T> {
    /// # Panics
    /// When the slice does not have `n_rows * n_cols` values.
    pub(crate) fn new(out: &mut [T], n_rows: usize, n_cols: usize) -> Self {
        assert_eq!(out.len(), n_rows * n_cols, "output is not [{n_rows}, {n_cols}]");
        Self { ptr: out.as_mut_ptr(), n_rows, n_cols }
    }

    /// Columns `start..start + len` of a row.
    ///
    /// # Safety
    /// The slice given to `new` is still borrowed for this, and no other thread holds any of these columns.
    #[expect(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(crate) unsafe fn cols(&self, row: usize, start: usize, len: usize) -> &mut [T] {
        debug_assert!(row < self.n_rows && start + len <= self.n_cols);
        // SAFETY: inside the slice checked in `new`; exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(row * self.n_cols + start), len) }
    }

    /// As [`OutMat::cols`], to read what earlier tasks wrote.
    ///
    /// # Safety
    /// The slice given to `new` is still borrowed for this, and no thread writes these columns meanwhile.
    pub(crate) unsafe fn cols_shared(&self, row: usize, start: usize, len: usize) -> &[T] {
        debug_assert!(row < self.n_rows && start + len <= self.n_cols);
        // SAFETY: inside the slice checked in `new`; not written by the caller's promise.
        unsafe { std::slice::from_raw_parts(self.ptr.add(row * self.n_cols + start), len) }
    }

    pub(crate) fn n_cols(&self) -> usize {
        self.n_cols
    }
}
