//! A file mapped read-only into memory, so that several processes share one copy of it. Made by the model's loader for
//! packed weights; `matrix` takes its parts.

use std::fs::File;
use std::io;

/// A mapped file.
#[derive(Debug)]
pub struct Mapping {
    map: memmap2::Mmap,
}

// === impl Mapping ===

impl Mapping {
    /// Maps a whole file. Whoever writes such files must replace them by renaming a new one, never change or shorten
    /// one in place: a mapped file that gets shorter ends the process with a bus error on the next read.
    ///
    /// # Errors
    /// When the file cannot be mapped.
    pub fn open(file: &File) -> io::Result<Self> {
        // SAFETY: the contract above; within it the bytes do not change as long as the map lives.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(Self { map })
    }

    /// The content.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }
}
