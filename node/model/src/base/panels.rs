//! A packed copy of a base model's matrices in a file, mapped read-only: loading it again is mapping it, and a second
//! process on the machine shares the memory of the first.
//!
//! The file is named by the content hash of the model and the version of the packed layout, so it is never out of date.
//! Its own hash stands at its end and is checked before anything is used. It is written beside its name and renamed,
//! and never changed. A copy that is missing, damaged or cannot be written costs the time of packing, nothing else.
//! Whoever writes a copy removes what an earlier program left: copies of older layouts and half-written ones.
//!
//! Layout, all in lines of 64 bytes: a header (magic, layout version, model hash), the matrices in the order in which
//! they are read, a last line with the BLAKE3 hash of everything before it.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use kernels::mapping::Mapping;
use kernels::matrix::{Matrix, PACKED_LAYOUT};
use shared::hash::ContentHash;

use super::LoadError;
use super::assemble::TensorSource;
use crate::weights::Weights;

const MAGIC: &[u8; 8] = b"TNTPANEL";
const LINE: usize = 64;
/// A half-written copy that nobody has written to for so long is nobody's: a line is written every few milliseconds.
const ABANDONED_AFTER: Duration = Duration::from_secs(600);

/// Reads all weights with `read`, from the packed copy in `folder` if there is a good one; else packs them, leaves a
/// copy and reads that.
///
/// # Errors
/// Those of `read`; trouble with the copy is only logged.
pub(crate) fn weights<S: TensorSource>(
    folder: Option<&Path>,
    hash: &ContentHash,
    source: &mut S,
    read: impl Fn(&mut PanelSource<'_, S>) -> Result<Weights, LoadError>,
) -> Result<Weights, LoadError> {
    let Some(folder) = folder else {
        return read(&mut PanelSource { inner: source, copy: Copy::None });
    };
    let path = folder.join(format!("{hash}-{PACKED_LAYOUT}.panels"));
    if let Some(copy) = open(&path, hash) {
        match read(&mut PanelSource { inner: source, copy }) {
            Ok(weights) => return Ok(weights),
            // What is wrong with the model itself shows again below.
            Err(error) => drop(unusable(&path, &error)),
        }
    }
    let mut packing = PanelSource { inner: source, copy: Copy::create(folder, &path, hash) };
    let packed = read(&mut packing)?;
    let written = packing.finish();
    match written.then(|| open(&path, hash)).flatten() {
        // This process too lives on the shared copy.
        Some(copy) => Ok(read(&mut PanelSource { inner: source, copy }).unwrap_or(packed)),
        None => Ok(packed),
    }
}

/// A source whose matrices come from the copy, or go there.
pub(crate) struct PanelSource<'a, S> {
    inner: &'a mut S,
    copy: Copy,
}

enum Copy {
    None,
    Reading { file: Arc<Mapping>, at: usize },
    Writing(Box<Writer>),
}

struct Writer {
    out: Hashing,
    temporary: PathBuf,
    path: PathBuf,
}

/// Writes and hashes.
struct Hashing {
    out: BufWriter<File>,
    hasher: blake3::Hasher,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.out.write_all(bytes)?;
        self.hasher.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

fn header(hash: &ContentHash) -> [u8; LINE] {
    let mut line = [0; LINE];
    line[..8].copy_from_slice(MAGIC);
    line[8..12].copy_from_slice(&PACKED_LAYOUT.to_le_bytes());
    line[16..48].copy_from_slice(&hash.0);
    line
}

/// The copy, if it is there and whole.
fn open(path: &Path, hash: &ContentHash) -> Option<Copy> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => return unusable(path, &error),
    };
    let file = match Mapping::open(&file) {
        Ok(file) => file,
        Err(error) => return unusable(path, &error),
    };
    let bytes = file.bytes();
    if bytes.len() < 2 * LINE || !bytes.len().is_multiple_of(LINE) || bytes[..LINE] != header(hash) {
        return unusable(path, &"its header or length is wrong");
    }
    let (body, end) = bytes.split_at(bytes.len() - LINE);
    if end[..32] != *blake3::hash(body).as_bytes() {
        return unusable(path, &"its content has another hash than it says");
    }
    Some(Copy::Reading { file: Arc::new(file), at: LINE })
}

fn unusable(path: &Path, why: &dyn std::fmt::Display) -> Option<Copy> {
    tracing::warn!(file = %path.display(), %why, "packed copy of the base model is not used; it will be written anew");
    None
}

// === impl Copy ===

impl Copy {
    fn create(folder: &Path, path: &Path, hash: &ContentHash) -> Self {
        let temporary = folder.join(format!("{hash}-{}.tmp", std::process::id()));
        let start = || -> io::Result<Hashing> {
            std::fs::create_dir_all(folder)?;
            let out = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
            let mut out = Hashing { out, hasher: blake3::Hasher::new() };
            out.write_all(&header(hash))?;
            Ok(out)
        };
        match start() {
            Ok(out) => {
                remove_leftovers(folder, &temporary);
                Self::Writing(Box::new(Writer { out, temporary, path: path.to_owned() }))
            }
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "the packed copy of the base model cannot be written");
                Self::None
            }
        }
    }
}

impl Writer {
    fn finish(mut self) -> io::Result<()> {
        let mut line = [0; LINE];
        line[..32].copy_from_slice(self.out.hasher.finalize().as_bytes());
        self.out.out.write_all(&line)?;
        let file = self.out.out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.sync_all()?;
        std::fs::rename(&self.temporary, &self.path)
    }
}

/// Removes copies of older layouts and abandoned half-written ones. `fresh` was just written to: its time is now.
fn remove_leftovers(folder: &Path, fresh: &Path) {
    let modified = |path: &Path| path.metadata().and_then(|facts| facts.modified());
    let now = modified(fresh).unwrap_or(SystemTime::UNIX_EPOCH);
    for path in std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()) {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.rsplit_once('-'));
        let number = stem.and_then(|(_, number)| number.parse::<u32>().ok());
        let is_old = match path.extension().and_then(|extension| extension.to_str()) {
            Some("panels") => number.is_some_and(|layout| layout < PACKED_LAYOUT),
            Some("tmp") => {
                let idle = modified(&path).ok().and_then(|then| now.duration_since(then).ok());
                number.is_some() && idle.is_some_and(|idle| idle > ABANDONED_AFTER)
            }
            _ => false,
        };
        if is_old {
            let removed = std::fs::remove_file(&path);
            tracing::info!(file = %path.display(), ok = removed.is_ok(), "left-over packed copy removed");
        }
    }
}

// === impl PanelSource ===

impl<S> PanelSource<'_, S> {
    /// Ends a copy that was being written; whether there is a new one.
    fn finish(self) -> bool {
        let Copy::Writing(writer) = self.copy else {
            return false;
        };
        let (temporary, path) = (writer.temporary.clone(), writer.path.clone());
        match writer.finish() {
            Ok(()) => true,
            Err(error) => {
                give_up(&temporary, &path, &error);
                false
            }
        }
    }
}

/// A half-written copy takes room for nothing.
fn give_up(temporary: &Path, path: &Path, error: &io::Error) {
    tracing::warn!(file = %path.display(), %error, "the packed copy of the base model cannot be written");
    // It may not exist.
    let _ = std::fs::remove_file(temporary);
}

impl<S: TensorSource> TensorSource for PanelSource<'_, S> {
    fn matrix(&mut self, name: &str, shape: (usize, usize), rows: Option<&[u32]>) -> Result<Matrix, LoadError> {
        if let Copy::Reading { file, at } = &mut self.copy {
            return match Matrix::from_packed(file, *at) {
                Ok((matrix, end)) if (matrix.n_out(), matrix.n_in()) == shape => {
                    *at = end;
                    Ok(matrix)
                }
                // The hash was right, so a program with the same layout version wrote something else.
                Ok(_) | Err(_) => {
                    Err(LoadError::tensor(name, &"the packed copy does not have it; hint: delete the copy"))
                }
            };
        }
        let matrix = self.inner.matrix(name, shape, rows)?;
        if let Copy::Writing(writer) = &mut self.copy
            && let Err(error) = matrix.write_packed(&mut writer.out)
        {
            give_up(&writer.temporary, &writer.path, &error);
            self.copy = Copy::None;
        }
        Ok(matrix)
    }

    fn vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        self.inner.vector(name)
    }
}
