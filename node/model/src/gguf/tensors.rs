//! Reads tensors of a checked GGUF file, one at a time.

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

use candle_core::Device;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::{bf16, f16};
use kernels::matrix::{BlockType, Matrix};

use super::check::{GgufFile, TensorDesc};
use crate::base::LoadError;
use crate::base::assemble::TensorSource;

/// The tensors of one open file.
#[derive(Debug)]
pub(super) struct GgufTensors<'a> {
    file: File,
    header: &'a GgufFile,
    /// Raw bytes of the tensor at hand; kept so that it is allocated once.
    raw: Vec<u8>,
}

impl<'a> GgufTensors<'a> {
    pub(super) fn new(file: File, header: &'a GgufFile) -> Self {
        Self { file, header, raw: Vec::new() }
    }

    fn read(&mut self, name: &str) -> Result<&'a TensorDesc, LoadError> {
        let header = self.header;
        let desc = header.tensor(name).ok_or_else(|| LoadError::MissingTensor { name: name.to_owned() })?;
        // The header check has found the whole range inside the file.
        self.raw.resize((desc.bytes.end - desc.bytes.start) as usize, 0);
        self.file
            .seek(SeekFrom::Start(desc.bytes.start))
            .and_then(|_| self.file.read_exact(&mut self.raw))
            .map_err(|error| LoadError::tensor(name, &error))?;
        Ok(desc)
    }

    /// Through candle: for storage types without a kernel, and for vectors.
    fn dequantised(&self, desc: &TensorDesc) -> Result<Vec<f32>, LoadError> {
        if desc.dtype == GgmlDType::F32 {
            return Ok(values(&self.raw, f32::from_le_bytes));
        }
        let dims: Vec<usize> = desc.dims.iter().rev().copied().collect();
        QStorage::from_data(Cow::Borrowed(&self.raw), &Device::Cpu, desc.dtype)
            .and_then(|storage| QTensor::new(storage, dims))
            .and_then(|tensor| tensor.dequantize(&Device::Cpu))
            .and_then(|tensor| tensor.flatten_all()?.to_vec1::<f32>())
            .map_err(|error| LoadError::tensor(&desc.name, &error))
    }
}

impl TensorSource for GgufTensors<'_> {
    fn matrix(&mut self, name: &str, shape: (usize, usize), rows: Option<&[u32]>) -> Result<Matrix, LoadError> {
        let desc = self.read(name)?;
        let (n_out, n_in) = shape;
        let matrix = match (block_type(desc.dtype), desc.dtype) {
            (Some(kind), _) => Matrix::from_blocks(n_out, n_in, kind, &self.raw, rows),
            (None, GgmlDType::F16) => Matrix::from_f16(n_out, n_in, &values(&self.raw, f16::from_le_bytes), rows),
            (None, GgmlDType::BF16) => Matrix::from_bf16(n_out, n_in, &values(&self.raw, bf16::from_le_bytes), rows),
            (None, _) => Matrix::from_f32(n_out, n_in, &self.dequantised(desc)?, rows),
        };
        matrix.map_err(|error| LoadError::tensor(name, &error))
    }

    fn vector(&mut self, name: &str) -> Result<Vec<f32>, LoadError> {
        let desc = self.read(name)?;
        self.dequantised(desc)
    }
}

fn block_type(dtype: GgmlDType) -> Option<BlockType> {
    Some(match dtype {
        GgmlDType::Q4_0 => BlockType::Q4_0,
        GgmlDType::Q4_1 => BlockType::Q4_1,
        GgmlDType::Q5_0 => BlockType::Q5_0,
        GgmlDType::Q5_1 => BlockType::Q5_1,
        GgmlDType::Q8_0 => BlockType::Q8_0,
        GgmlDType::Q2K => BlockType::Q2K,
        GgmlDType::Q3K => BlockType::Q3K,
        GgmlDType::Q4K => BlockType::Q4K,
        GgmlDType::Q5K => BlockType::Q5K,
        GgmlDType::Q6K => BlockType::Q6K,
        GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 | GgmlDType::Q8_1 | GgmlDType::Q8K => return None,
    })
}

fn values<const N: usize, T>(raw: &[u8], decode: impl Fn([u8; N]) -> T) -> Vec<T> {
    raw.chunks_exact(N).map(|bytes| decode(bytes.try_into().expect("chunks have N bytes"))).collect()
}
