//! The text of a base: facts, tokenizer and chat template, apart from its weights. With it alone a node can take requests.
//!
//! [`pack`] makes one block of bytes of it, for nodes that do not have the model's files; [`read`] understands such a
//! block by the loaders of those files, so that both ends come to the same tokens. A GGUF file's text is its header, a
//! Hugging Face directory's are its files but the safetensors. The block names the content hash of the whole model; how
//! it travels, and who vouches for it, is the node's affair.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use shared::hash::ContentHash;

use crate::base::LoadError;
use crate::info::{ModelInfo, Numerics};
use crate::template::ChatTemplate;
use crate::tokenizer::Tokenizer;

/// Largest block: the largest `tokenizer.json` that is read, and the other files of a directory.
pub const TEXT_BYTES_MAX: u64 = 192 << 20;

/// First bytes of a block; the number is that of its layout.
const MAGIC: &[u8; 8] = b"TNTYTXT1";
/// Under this name a block has the header of a GGUF file.
const GGUF: &str = "head.gguf";
/// Files of a block: a directory has five that are text.
const FILES_MAX: u32 = 16;

/// What of a base is text.
#[derive(Debug)]
pub struct ModelText {
    /// Facts. Those that only the forward pass needs may lack what stands in tensors.
    pub info: ModelInfo,
    /// Tokenizer.
    pub tokenizer: Tokenizer,
    /// Chat template, when the model has one.
    pub template: Option<Arc<ChatTemplate>>,
}

/// The text of the model at `path`, whose content is `hash`.
///
/// # Errors
/// Names the file that cannot be read.
pub fn pack(path: &Path, hash: ContentHash) -> Result<Vec<u8>, LoadError> {
    let files: Vec<(String, u64, Vec<u8>)> = if path.is_dir() {
        let texts = crate::hf::texts(path)?.into_iter();
        texts.map(|(name, bytes)| (name, bytes.len() as u64, bytes)).collect()
    } else {
        let (head, file_bytes) = crate::gguf::head(path)?;
        vec![(GGUF.to_owned(), file_bytes, head)]
    };
    let mut block = Vec::with_capacity(files.iter().map(|(_, _, bytes)| bytes.len() + 64).sum::<usize>() + 64);
    block.extend_from_slice(MAGIC);
    block.extend_from_slice(&hash.0);
    block.extend_from_slice(&(files.len() as u32).to_le_bytes());
    for (name, whole_bytes, bytes) in files {
        block.extend_from_slice(&(name.len() as u32).to_le_bytes());
        block.extend_from_slice(name.as_bytes());
        block.extend_from_slice(&whole_bytes.to_le_bytes());
        block.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        block.extend_from_slice(&bytes);
    }
    Ok(block)
}

/// Understands a block, for a base that is computed with `numerics`.
///
/// # Errors
/// When it is no block, or what a loader of its files refuses.
pub fn read(block: &[u8], numerics: Numerics) -> Result<ModelText, LoadError> {
    let mut rest = block;
    let magic = take(&mut rest, MAGIC.len() as u64)?;
    if magic != MAGIC {
        return Err(damaged("it begins with other bytes; hint: another release wrote it"));
    }
    let hash = ContentHash(fixed(&mut rest)?);
    let n_files = u32::from_le_bytes(fixed(&mut rest)?);
    if n_files > FILES_MAX {
        return Err(damaged(&format!("{n_files} files, the limit is {FILES_MAX}")));
    }
    let mut files = BTreeMap::new();
    let mut gguf_bytes = None;
    for _ in 0..n_files {
        let name_bytes = u32::from_le_bytes(fixed(&mut rest)?);
        let name = String::from_utf8_lossy(take(&mut rest, u64::from(name_bytes))?).into_owned();
        let whole_bytes = u64::from_le_bytes(fixed(&mut rest)?);
        let n_bytes = u64::from_le_bytes(fixed(&mut rest)?);
        gguf_bytes = gguf_bytes.or((name == GGUF).then_some(whole_bytes));
        files.insert(name, take(&mut rest, n_bytes)?.to_vec());
    }
    match (gguf_bytes, files.get(GGUF)) {
        (Some(file_bytes), Some(head)) => crate::gguf::text(head, file_bytes, hash, numerics),
        _ => crate::hf::text(&files, hash, numerics),
    }
}

fn fixed<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], LoadError> {
    let bytes = take(rest, N as u64)?;
    Ok(bytes.try_into().expect("so many bytes were taken"))
}

fn take<'a>(rest: &mut &'a [u8], n_bytes: u64) -> Result<&'a [u8], LoadError> {
    let n_bytes = usize::try_from(n_bytes).unwrap_or(usize::MAX);
    let (taken, left) = rest.split_at_checked(n_bytes).ok_or_else(|| damaged("it is cut short"))?;
    *rest = left;
    Ok(taken)
}

fn damaged(reason: &str) -> LoadError {
    LoadError::read(Path::new("the text of a base"), &reason)
}
