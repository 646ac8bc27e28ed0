//! GGUF LoRA files: the same adapter with llama.cpp's names, a single alpha, and its row order.

use super::pack::CheckedModule;
use super::{AdapterError, AdapterLimits};
use crate::info::ModelInfo;

/// Checks a file.
pub(super) fn check<'a>(
    _bytes: &'a [u8],
    _info: &ModelInfo,
    _limits: &AdapterLimits,
) -> Result<Vec<CheckedModule<'a>>, AdapterError> {
    Err(AdapterError::unsupported("adapter file", "gguf", "upload a PEFT directory"))
}
