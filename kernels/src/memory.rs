//! Large pages for buffers of many megabytes that are filled at once: the system then gives and clears them in pieces
//! of 2 MiB instead of 4 KiB. Used for the files of adapters, whose first use waits for it. It allocates nothing.

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
