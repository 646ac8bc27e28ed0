//! Content hash of a model's files, streamed.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use shared::hash::ContentHash;

/// Hash of one file, or of the sorted list of (file name, hash) of several.
pub(crate) fn hash_files(files: &[PathBuf]) -> io::Result<ContentHash> {
    if let [file] = files {
        return hash_file(file);
    }
    let mut named = Vec::with_capacity(files.len());
    for file in files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        named.push((name, hash_file(file)?));
    }
    named.sort();
    let list: String = named.iter().map(|(name, hash)| format!("{hash}  {name}\n")).collect();
    Ok(ContentHash::of(list.as_bytes()))
}

fn hash_file(path: &Path) -> io::Result<ContentHash> {
    // Large enough for all SIMD lanes of BLAKE3, small enough for the second-level cache.
    const CHUNK_BYTES: usize = 256 << 10;
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        let n_bytes = file.read(&mut chunk)?;
        if n_bytes == 0 {
            return Ok(ContentHash(*hasher.finalize().as_bytes()));
        }
        hasher.update(&chunk[..n_bytes]);
    }
}
