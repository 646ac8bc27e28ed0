//! Small secret files (`cluster.key`, `admin.key`): created once, complete or not at all, private to their owner.
//!
//! Called at start by the cluster key and the admin key. It decides nothing about what the text means.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Longest key file: far above any key, far below harm.
const KEY_FILE_BYTES_MAX: u64 = 4096;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The operating system refused.
    #[error("cannot {action} key file {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Others could read the key.
    #[error("key file {} has mode {mode:03o}, so others can read it; hint: chmod 600 {}", path.display(), path.display())]
    TooOpen {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The content is not a key.
    #[error("key file {} does not hold {expected}; hint: restore it from your backup, a new key does not open old data", path.display())]
    Malformed {
        /// Which file.
        path: PathBuf,
        /// What belongs there.
        expected: &'static str,
    },
}

/// The trimmed text of `path`.
///
/// # Errors
/// When the file is missing, unreadable, longer than 4 KiB, not UTF-8, or accessible to group or others.
pub fn load(path: &Path) -> Result<Zeroizing<String>, KeyFileError> {
    let io_error = |source| KeyFileError::Io { action: "read", path: path.to_owned(), source };
    let file = fs::File::open(path).map_err(io_error)?;
    let meta = file.metadata().map_err(io_error)?;
    let mode = meta.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(KeyFileError::TooOpen { path: path.to_owned(), mode });
    }
    let malformed = || KeyFileError::Malformed { path: path.to_owned(), expected: "one short line of text" };
    let mut text = Zeroizing::new(String::with_capacity(256));
    let n_bytes = file
        .take(KEY_FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .map_err(|error| if error.kind() == io::ErrorKind::InvalidData { malformed() } else { io_error(error) })?;
    if n_bytes as u64 > KEY_FILE_BYTES_MAX {
        return Err(malformed());
    }
    Ok(Zeroizing::new(text.trim().to_owned()))
}

/// The text of `path`, or of a new file (mode 0600) that holds `fresh()`.
///
/// The file appears complete or not at all. Of two processes that create it at once one wins, and both
/// return what the winner wrote.
///
/// # Errors
/// As [`load`], and when the file cannot be created.
pub fn load_or_create(
    path: &Path,
    fresh: impl FnOnce() -> Zeroizing<String>,
) -> Result<Zeroizing<String>, KeyFileError> {
    if !path.exists() {
        create(path, &fresh()).map_err(|source| KeyFileError::Io {
            action: "create",
            path: path.to_owned(),
            source,
        })?;
    }
    load(path)
}

/// Writes a private temporary file, makes it durable, then links it to its name unless that exists.
fn create(path: &Path, text: &str) -> io::Result<()> {
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    fs::create_dir_all(dir)?;
    let mut temporary = path.as_os_str().to_owned();
    let mut unique = [0_u8; 8];
    getrandom::fill(&mut unique).map_err(|error| io::Error::other(error.to_string()))?;
    temporary.push(format!(".{:016x}.new", u64::from_le_bytes(unique)));
    let temporary = PathBuf::from(temporary);
    let written = (|| {
        let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        writeln!(file, "{text}")?;
        file.sync_all()?;
        match fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    })();
    let _ = fs::remove_file(&temporary);
    written?;
    fs::File::open(dir)?.sync_all()
}
