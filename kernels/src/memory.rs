//! What this program asks of the system's memory, beside memory itself: large pages and few arenas.
//!
//! Large pages for buffers of many megabytes that are filled at once: the system then gives and clears them in pieces
//! of 2 MiB instead of 4 KiB. Used for the files of adapters, whose first use waits for it. It allocates nothing.
//!
//! glibc gives each thread that finds the others busy an arena of its own, up to eight per core, and an arena returns
//! only what lies at its end. A node whose blocking threads come and go grew by 13 MB in 200 s of adapter loads; with
//! two arenas it stayed within 0.1 %. Small blocks come from each thread's own cache either way, and the engine
//! allocates nothing in a step.

/// Size and alignment of a large page on the systems where they can be asked for.
const LARGE_PAGE: usize = 2 << 20;

/// Asks the system for large pages behind the whole large pages of `buffer` that it has not given out yet. A wish: where
/// it cannot be had nothing changes but speed.
pub fn prefer_large_pages(buffer: &mut [u8]) {
    let first = buffer.as_ptr().align_offset(LARGE_PAGE);
    let n_bytes = buffer.len().saturating_sub(first) / LARGE_PAGE * LARGE_PAGE;
    if n_bytes > 0 {
        advise(&mut buffer[first..first + n_bytes]);
    }
}

/// Overwrites numbers with zeros in a way the compiler may not leave out: a tenant's weights do not stay behind in memory
/// that is about to be freed.
pub(crate) fn clear<T: Copy + Default>(values: &mut [T]) {
    for value in values {
        // SAFETY: a valid, exclusive reference.
        unsafe { std::ptr::write_volatile(value, T::default()) };
    }
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}

#[cfg(target_os = "linux")]
fn advise(pages: &mut [u8]) {
    // SAFETY: the range is whole pages of a live allocation that is ours alone; the advice changes neither content nor
    // access, only how the system backs it. Its refusal (no such pages in this system) is no error.
    unsafe {
        libc::madvise(pages.as_mut_ptr().cast(), pages.len(), libc::MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
fn advise(_: &mut [u8]) {}

/// Arenas on a small machine.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS_MIN: usize = 2;
/// Arenas on a large one: enough that request threads seldom meet.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const ARENAS_MAX: usize = 8;

/// Bounds the number of arenas; called once by the binary, before it starts threads: one a core, from two to eight. Does nothing where the C
/// library is not glibc, or where its environment variable `MALLOC_ARENA_MAX` says otherwise.
pub fn bound_arenas() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    if std::env::var_os("MALLOC_ARENA_MAX").is_none() {
        let cores = std::thread::available_parallelism().map_or(ARENAS_MIN, usize::from);
        let arenas = cores.clamp(ARENAS_MIN, ARENAS_MAX) as libc::c_int;
        // SAFETY: mallopt takes two plain numbers and may be called at any time; a value it refuses changes nothing.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, arenas) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_of_any_size_keep_their_content() {
        for n_bytes in [0, 1, LARGE_PAGE - 1, LARGE_PAGE, 5 * LARGE_PAGE + 7] {
            let mut buffer = vec![3_u8; n_bytes];
            prefer_large_pages(&mut buffer);
            assert!(buffer.iter().all(|&byte| byte == 3));
        }
    }
}
