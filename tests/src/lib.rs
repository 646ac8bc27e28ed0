//! What the tests of the whole workspace share: where the real model is, and tiny generated models.
//!
//! Tests themselves live in `tests/tests/<topic>/main.rs`. Nothing here is part of the product.

#![forbid(unsafe_code)]

use std::path::PathBuf;

pub mod bills;
pub mod cluster;
pub mod http3;
pub mod disk;
pub mod full_disk;
pub mod namespaces;
pub mod network;
pub mod operator;
pub mod process;
pub mod tiny;

/// Path of the real model (SmolLM2-135M-Instruct, GGUF Q4_1): `TENANTRY_MODEL`, else where `scripts/fetch-model`
/// puts it.
///
/// # Panics
/// When the file is not there: a test that needs it fails, it is never skipped silently.
pub fn model_file() -> PathBuf {
    let path = match std::env::var_os("TENANTRY_MODEL") {
        Some(path) => PathBuf::from(path),
        None => {
            let home = PathBuf::from(std::env::var_os("HOME").expect("HOME is set"));
            let cache = std::env::var_os("XDG_CACHE_HOME").map_or(home.join(".cache"), PathBuf::from);
            cache.join("tenantry/SmolLM2-135M-Instruct.Q4_1.gguf")
        }
    };
    assert!(path.is_file(), "no model at {}; hint: run scripts/fetch-model", path.display());
    path
}

/// A file or folder of the committed test data (`tests/data/<name>`).
pub fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("data").join(name)
}
