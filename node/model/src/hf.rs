//! Loads a Hugging Face directory.

use std::path::Path;

use crate::base::{BaseModel, LoadError};
use crate::info::Numerics;

/// Loads everything.
pub(crate) fn load(path: &Path, _numerics: Numerics) -> Result<BaseModel, LoadError> {
    Err(LoadError::read(path, &"not written"))
}
