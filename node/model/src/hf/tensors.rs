//! Tensors of safetensors files, read one at a time by their place in the file.
//!
//! The `safetensors` crate checks the header (offsets without gaps, sizes that fit the shapes); the bounds
//! that need the file's length are checked here, before anything is allocated from them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use kernels::matrix::Matrix;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde_json::Value;

use crate::base::LoadError;
use crate::base::assemble::TensorSource;

/// Largest header; a model of 126 layers with long names has 200 KB.
const HEADER_BYTES_MAX: u64 = 32 << 20;

/// Most files of one model; the largest known ones have 191.
const SHARDS_MAX: usize = 1024;

/// All weight files of a directory.
#[derive(Debug)]
pub(super) struct Shards {
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Place>,
    /// Raw bytes of the tensor at hand; kept so that it is allocated once.
    raw: Vec<u8>,
}

#[derive(Debug, Clone)]
struct Place {
    file_idx: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: u64,
    n_bytes: usize,
}

impl Shards {
    /// Opens `model.safetensors`, or the files that `model.safetensors.index.json` names, and reads their headers.
    pub(super) fn open(path: &Path) -> Result<Self, LoadError> {
        let index = path.join("model.safetensors.index.json");
        let single = path.join("model.safetensors");
        let files = if !single.is_file() && index.is_file() { indexed_files(path, &index)? } else { vec![single] };
        let mut shards = Self { files: Vec::new(), tensors: BTreeMap::new(), raw: Vec::new() };
        for file in files {
            shards.add(file)?;
        }
        Ok(shards)
    }

    /// Paths of the files.
    pub(super) fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|(path, _)| path.as_path())
    }

    /// Names and shapes of all tensors.
    pub(super) fn shapes(&self) -> impl Iterator<Item = (&str, Vec<usize>)> {
        self.tensors.iter().map(|(name, place)| (name.as_str(), place.shape.clone()))
    }

    fn add(&mut self, path: PathBuf) -> Result<(), LoadError> {
        let unreadable = |reason: &dyn std::fmt::Display| LoadError::read(&path, reason);
        let mut file = File::open(&path).map_err(|error| unreadable(&error))?;
        let file_bytes = file.metadata().map_err(|error| unreadable(&error))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(|error| unreadable(&error))?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > HEADER_BYTES_MAX.min(file_bytes.saturating_sub(8)) {
            let reason =
                format!("a header of {header_bytes} bytes in a file of {file_bytes}; hint: the file is damaged");
            return Err(unreadable(&reason));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(|error| unreadable(&error))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| unreadable(&error))?;
        let data_start = 8 + header_bytes;
        if data_start + metadata.data_len() as u64 != file_bytes {
            let reason = format!(
                "its header describes {} bytes of tensors, the file has {}; hint: the download is incomplete",
                metadata.data_len(),
                file_bytes - data_start
            );
            return Err(unreadable(&reason));
        }
        let file_idx = self.files.len();
        for name in metadata.offset_keys() {
            let info = metadata.info(&name).expect("offset_keys names tensors of the header");
            let (start, end) = info.data_offsets;
            let start_in_file = data_start + start as u64;
            let (dtype, shape) = (info.dtype, info.shape.clone());
            let place = Place { file_idx, dtype, shape, start: start_in_file, n_bytes: end - start };
            if self.tensors.insert(name.clone(), place).is_some() {
                return Err(unreadable(&format!("tensor {name:?} is also in another file")));
            }
        }
        self.files.push((path, file));
        Ok(())
    }

    fn read(&mut self, name: &str) -> Result<Dtype, LoadError> {
        let place = self.tensors.get(name).ok_or_else(|| LoadError::MissingTensor { name: name.to_owned() })?;
        self.raw.resize(place.n_bytes, 0);
        let file = &mut self.files[place.file_idx].1;
        file.seek(SeekFrom::Start(place.start))
            .and_then(|_| file.read_exact(&mut self.raw))
            .map_err(|error| LoadError::tensor(name, &error))?;
        Ok(place.dtype)
    }
}

impl TensorSource for Shards {
    fn matrix(&mut self, name: &str, shape: (usize, usize), rows: Option<&[u32]>) -> Result<Matrix, LoadError> {
        let (n_out, n_in) = shape;
        let matrix = match self.read(name)? {
            Dtype::F32 => Matrix::from_f32(n_out, n_in, &values(&self.raw, f32::from_le_bytes), rows),
            Dtype::F16 => Matrix::from_f16(n_out, n_in, &values(&self.raw, f16::from_le_bytes), rows),
            Dtype::BF16 => Matrix::from_bf16(n_out, n_in, &values(&self.raw, bf16::from_le_bytes), rows),
            other => return Err(unsupported(name, other)),
        };
        matrix.map_err(|error| LoadError::tensor(name, &error))
    }

    fn vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        Ok(match self.read(name)? {
            Dtype::F32 => values(&self.raw, f32::from_le_bytes),
            Dtype::F16 => values(&self.raw, |bytes| f16::from_le_bytes(bytes).to_f32()),
            Dtype::BF16 => values(&self.raw, |bytes| bf16::from_le_bytes(bytes).to_f32()),
            other => return Err(unsupported(name, other)),
        })
    }
}

/// The files of an index, in order of their names. The names are plain: nothing outside the directory is read.
fn indexed_files(path: &Path, index: &Path) -> Result<Vec<PathBuf>, LoadError> {
    let json = super::need_json(index)?;
    let unreadable = |reason: &str| LoadError::read(index, &reason);
    let map = json["weight_map"].as_object().ok_or_else(|| unreadable("it has no weight_map"))?;
    let names: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
    let names = names.ok_or_else(|| unreadable("weight_map has a value that is no file name"))?;
    if names.is_empty() || names.len() > SHARDS_MAX {
        return Err(unreadable(&format!("it names {} files, the limit is {SHARDS_MAX}", names.len())));
    }
    let plain = |name: &&str| name.ends_with(".safetensors") && !name.contains(['/', '\\']);
    match names.iter().find(|name| !plain(name)) {
        Some(name) => Err(unreadable(&format!("{name:?} is not a plain name of a safetensors file"))),
        None => Ok(names.into_iter().map(|name| path.join(name)).collect()),
    }
}

fn unsupported(name: &str, dtype: Dtype) -> LoadError {
    LoadError::unsupported(&format!("type of tensor {name}"), format!("{dtype:?}"), "F32, F16 and BF16 are read")
}

fn values<const N: usize, T>(raw: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    raw.chunks_exact(N).map(|bytes| decode(bytes.try_into().expect("chunks have N bytes"))).collect()
}
