//! A disk so small that a test can fill it: a tmpfs in place of a folder.
//!
//! Mounting needs rights. A process without them gets them for itself alone by starting again in namespaces of its own
//! ([`again_with_mounts`]); where that is forbidden too, whoever asked says that it was skipped.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

/// Set in a process that was started again.
const AGAIN: &str = "TENANTRY_OWN_MOUNTS";
const FILLER: &str = "filler";

/// A mounted disk; unmounted when dropped.
#[derive(Debug)]
pub struct SmallDisk {
    at: PathBuf,
}

// === impl SmallDisk ===

impl SmallDisk {
    /// Mounts a disk of so many bytes over a folder, which is made if it is not there.
    ///
    /// # Errors
    /// When this process may not.
    pub fn mount(at: &Path, n_bytes: u64) -> io::Result<Self> {
        std::fs::create_dir_all(at)?;
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={n_bytes},mode=700"), "tmpfs"]).arg(at);
        match command.stderr(Stdio::null()).status() {
            Ok(status) if status.success() => Ok(Self { at: at.to_owned() }),
            Ok(_) => Err(io::ErrorKind::PermissionDenied.into()),
            Err(error) => Err(error),
        }
    }

    /// Takes all room that is left; says how many bytes that was.
    ///
    /// # Panics
    /// When the disk fails otherwise than by being full.
    pub fn fill(&self) -> u64 {
        let mut file = OpenOptions::new().create(true).append(true).open(self.at.join(FILLER)).expect("a filler");
        let (mut n_bytes, mut piece) = (0, vec![1; 1 << 20]);
        loop {
            match file.write(&piece) {
                Ok(written) => n_bytes += written as u64,
                Err(error) if error.kind() != io::ErrorKind::StorageFull => panic!("filling a disk: {error}"),
                Err(_) if piece.len() == 1 => return n_bytes,
                Err(_) => piece.truncate(piece.len() / 2),
            }
        }
    }

    /// Gives the room back.
    pub fn free(&self) {
        let file = File::create(self.at.join(FILLER)).expect("the filler can be cut");
        file.set_len(0).expect("the filler can be cut");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a node may still hold a file there.
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).stderr(Stdio::null()).status();
    }
}

/// Runs this very program with these arguments where it may mount. `None` when it was started so, or cannot be.
pub fn again_with_mounts(words: &[&str]) -> Option<ExitStatus> {
    again_apart(&["--map-root-user", "--mount"], words)
}

/// Runs this very program with these arguments in namespaces of its own, as `unshare` makes them. `None` when it was
/// started so, or they cannot be had.
pub fn again_apart(namespaces: &[&str], words: &[&str]) -> Option<ExitStatus> {
    let may = |command: &mut Command| command.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(namespaces);
        command
    };
    if is_apart() || !may(unshare().arg("true")) {
        return None;
    }
    let own = std::env::current_exe().expect("a program knows its file");
    unshare().arg(own).args(words).env(AGAIN, "1").status().ok()
}

/// This program was started by [`again_apart`].
pub fn is_apart() -> bool {
    std::env::var_os(AGAIN).is_some()
}
