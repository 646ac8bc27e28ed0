//! Opening a plain file and nothing else: no symbolic link, device, pipe or directory.
//!
//! Used by the store and by the importer. The kernel refuses links where it knows the flag; everywhere the
//! opened file must also be the very file that the path named without following links.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

/// `O_NOFOLLOW | O_NONBLOCK`: links are refused, and a pipe that takes the file's place does not hang us.
#[cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "x86", target_arch = "riscv64")))]
const OPEN_FLAGS: i32 = 0o400_000 | 0o4_000;
#[cfg(all(target_os = "linux", any(target_arch = "aarch64", target_arch = "arm")))]
const OPEN_FLAGS: i32 = 0o100_000 | 0o4_000;
/// Elsewhere the comparison below is the only guard.
#[cfg(not(all(
    target_os = "linux",
    any(
        target_arch = "x86_64",
        target_arch = "x86",
        target_arch = "riscv64",
        target_arch = "aarch64",
        target_arch = "arm"
    )
)))]
const OPEN_FLAGS: i32 = 0;

/// Opens a regular file for reading; returns it with its size in bytes.
///
/// # Errors
/// `InvalidInput` when the path names anything but a regular file, else what the system says.
pub(crate) fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let named = fs::symlink_metadata(path)?;
    if !named.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let file = fs::OpenOptions::new().read(true).custom_flags(OPEN_FLAGS).open(path)?;
    let opened = file.metadata()?;
    if !opened.is_file() || (opened.dev(), opened.ino()) != (named.dev(), named.ino()) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the file was exchanged while it was opened"));
    }
    Ok((file, opened.len()))
}
