//! Adapters from a plain directory tree: `<root>/<tenant>/adapter.gguf`, or the two files of a PEFT adapter.
//!
//! The layout that hand-rolled servers use (`/models/adapters/{tenant}/adapter.gguf`). Called by the admin
//! side, which then checks, stores and registers what it got; this only reads, and only plain files: links,
//! devices, pipes and files with a second name elsewhere are refused, so that nothing outside the tree can
//! be pulled in. Nothing is written or removed.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use model::adapter::AdapterFiles;
use shared::id::TenantId;

use crate::store::nofollow;

/// The GGUF file of a tenant.
pub const GGUF_NAME: &str = "adapter.gguf";
/// The configuration of a PEFT adapter.
pub const PEFT_CONFIG_NAME: &str = "adapter_config.json";
/// The weights of a PEFT adapter.
pub const PEFT_WEIGHTS_NAME: &str = "adapter_model.safetensors";

/// Why a file or directory was not imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// A directory whose name is no tenant id: rename it.
    #[error("{} is not named like a tenant: {rule}", path.display())]
    NotATenant {
        /// The directory.
        path: PathBuf,
        /// The rule for names.
        rule: &'static str,
    },
    /// A link, device, pipe, or a file with several names: copy the file itself there.
    #[error("{} is {found}; hint: only plain files in plain directories are imported, copy the file there", path.display())]
    NotPlain {
        /// What was found.
        path: PathBuf,
        /// In words.
        found: &'static str,
    },
    /// Larger than allowed.
    #[error("{} has {found_bytes} bytes, the limit is {max_bytes}", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// Most bytes allowed.
        max_bytes: u64,
    },
    /// Neither file name is there.
    #[error("{} holds neither {GGUF_NAME} nor {PEFT_CONFIG_NAME} and {PEFT_WEIGHTS_NAME}", path.display())]
    NoAdapter {
        /// The directory.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("read {}: {source}", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// The system's words.
        source: io::Error,
    },
}

/// A tenant's directory in the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImportEntry {
    /// The tenant it is named after.
    pub tenant: TenantId,
    /// The directory.
    pub dir: PathBuf,
}

/// The tenants' directories below `root`, sorted by name, and what is there besides.
///
/// # Errors
/// [`ImportError::Io`] when `root` cannot be listed; single wrong entries are returned beside the good ones.
pub fn entries(root: &Path) -> Result<(Vec<ImportEntry>, Vec<ImportError>), ImportError> {
    let (mut found, mut refused) = (Vec::new(), Vec::new());
    let mut paths = Vec::new();
    for entry in fs::read_dir(root).map_err(|source| ImportError::Io { path: root.to_owned(), source })? {
        paths.push(entry.map_err(|source| ImportError::Io { path: root.to_owned(), source })?.path());
    }
    paths.sort();
    for path in paths {
        match entry_of(&path) {
            Ok(tenant) => found.push(ImportEntry { tenant, dir: path }),
            Err(error) => refused.push(error),
        }
    }
    Ok((found, refused))
}

fn entry_of(path: &Path) -> Result<TenantId, ImportError> {
    let meta = fs::symlink_metadata(path).map_err(|source| ImportError::Io { path: path.to_owned(), source })?;
    if !meta.is_dir() {
        let found = if meta.is_symlink() { "a symbolic link" } else { "not a directory" };
        return Err(ImportError::NotPlain { path: path.to_owned(), found });
    }
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.parse()
        .map_err(|error: shared::id::InvalidId| ImportError::NotATenant { path: path.to_owned(), rule: error.rule })
}

impl ImportEntry {
    /// Reads the adapter of this directory: the GGUF file if there is one, else the PEFT files. Of all files
    /// together at most `bytes_max` are read.
    ///
    /// # Errors
    /// [`ImportError`] names the file.
    pub fn read(&self, bytes_max: u64) -> Result<AdapterFiles, ImportError> {
        // Looked at again: the tree may have changed since it was listed.
        entry_of(&self.dir)?;
        if let Some(bytes) = read_plain(&self.dir.join(GGUF_NAME), bytes_max)? {
            return Ok(AdapterFiles::Gguf(bytes));
        }
        let config = read_plain(&self.dir.join(PEFT_CONFIG_NAME), bytes_max)?;
        let rest = bytes_max - config.as_ref().map_or(0, |bytes| bytes.len() as u64);
        match (config, read_plain(&self.dir.join(PEFT_WEIGHTS_NAME), rest)?) {
            (Some(config), Some(weights)) => Ok(AdapterFiles::Peft { config, weights }),
            _ => Err(ImportError::NoAdapter { path: self.dir.clone() }),
        }
    }
}

/// The bytes of a plain file, or `None` if there is nothing of that name.
fn read_plain(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, ImportError> {
    let io = |source| ImportError::Io { path: path.to_owned(), source };
    let not_plain = |found| ImportError::NotPlain { path: path.to_owned(), found };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
        Ok(meta) if meta.is_symlink() => return Err(not_plain("a symbolic link")),
        Ok(meta) if !meta.is_file() => return Err(not_plain("not a plain file")),
        Ok(_) => {}
    }
    let (file, found_bytes) = nofollow::open_regular(path).map_err(io)?;
    let meta = file.metadata().map_err(io)?;
    if meta.nlink() > 1 {
        return Err(not_plain("a file with several names (hard links)"));
    }
    if found_bytes > bytes_max {
        return Err(ImportError::TooLarge { path: path.to_owned(), found_bytes, max_bytes: bytes_max });
    }
    let mut bytes = Vec::new();
    file.take(found_bytes).read_to_end(&mut bytes).map_err(io)?;
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::process::Command;

    use super::*;

    struct Tree(PathBuf);

    impl Tree {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("tenantry-import-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            fs::create_dir_all(path.join("tree")).expect("the temporary directory is writable");
            Self(path)
        }

        fn root(&self) -> PathBuf {
            self.0.join("tree")
        }

        fn dir(&self, tenant: &str) -> PathBuf {
            let dir = self.root().join(tenant);
            fs::create_dir_all(&dir).expect("made");
            dir
        }

        fn read(&self, tenant: &str) -> Result<AdapterFiles, ImportError> {
            ImportEntry { tenant: tenant.parse().expect("tenant"), dir: self.root().join(tenant) }.read(1000)
        }
    }

    impl Drop for Tree {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn tenants_directories_are_found_and_both_formats_read() {
        let tree = Tree::new("both");
        fs::write(tree.dir("acme").join(GGUF_NAME), b"GGUF").expect("written");
        fs::write(tree.dir("baker").join(PEFT_CONFIG_NAME), b"{}").expect("written");
        fs::write(tree.dir("baker").join(PEFT_WEIGHTS_NAME), b"weights").expect("written");
        tree.dir("cedar");
        tree.dir("..hidden");
        fs::write(tree.root().join("README"), b"text").expect("written");
        let (found, refused) = entries(&tree.root()).expect("listed");
        let names: Vec<&str> = found.iter().map(|entry| entry.tenant.as_str()).collect();
        assert_eq!(names, ["acme", "baker", "cedar"]);
        assert!(matches!(refused[..], [ImportError::NotATenant { .. }, ImportError::NotPlain { .. }]), "{refused:?}");
        assert_eq!(found[0].read(1000).expect("read"), AdapterFiles::Gguf(b"GGUF".to_vec()));
        let peft = AdapterFiles::Peft { config: b"{}".to_vec(), weights: b"weights".to_vec() };
        assert_eq!(found[1].read(1000).expect("read"), peft);
        assert!(matches!(found[2].read(1000), Err(ImportError::NoAdapter { .. })));
        assert!(matches!(found[1].read(8), Err(ImportError::TooLarge { found_bytes: 7, max_bytes: 6, .. })));
    }

    #[test]
    fn nothing_outside_the_tree_is_read_through_links_pipes_or_second_names() {
        let tree = Tree::new("links");
        let secret = tree.0.join("secret");
        fs::write(&secret, b"secret").expect("written");
        symlink(&secret, tree.dir("linked").join(GGUF_NAME)).expect("linked");
        fs::hard_link(&secret, tree.dir("hard").join(GGUF_NAME)).expect("linked");
        fs::create_dir(tree.dir("folder").join(GGUF_NAME)).expect("made");
        assert!(Command::new("mkfifo").arg(tree.dir("pipe").join(GGUF_NAME)).status().expect("runs").success());
        symlink("/dev/zero", tree.dir("device").join(GGUF_NAME)).expect("linked");
        for tenant in ["linked", "hard", "folder", "pipe", "device"] {
            assert!(matches!(tree.read(tenant), Err(ImportError::NotPlain { .. })), "{tenant}");
        }
        let elsewhere = tree.0.join("elsewhere");
        fs::create_dir(&elsewhere).expect("made");
        fs::write(elsewhere.join(GGUF_NAME), b"secret").expect("written");
        symlink(&elsewhere, tree.root().join("whole-dir")).expect("linked");
        assert!(matches!(tree.read("whole-dir"), Err(ImportError::NotPlain { .. })));
    }
}
