//! Strict reader of a GGUF header: what it returns is consistent with itself and with the file's length.
//!
//! Every loader of GGUF bytes calls it first, for base models ([`read`], from a file) and for LoRA adapters
//! ([`parse`], from memory). Every count, length and offset is checked against a named limit and against the
//! bytes that are really there *before* anything is allocated from it, so a hostile file costs at most its
//! own size plus a few MiB. It reads no tensor data and knows no model: which keys and tensors must exist
//! is decided by its callers.
//!
//! Format: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>, versions 2 and 3, little-endian.

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;

use candle_core::quantized::GgmlDType;

pub use super::value::{Array, Scalar, Texts, Value};

/// Bounds on a header, by what kind of file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most tensors.
    pub tensors_max: u64,
    /// Most metadata entries.
    pub keys_max: u64,
    /// Longest tensor name or key, in bytes.
    pub name_bytes_max: u64,
    /// Longest metadata text, in bytes.
    pub text_bytes_max: u64,
    /// Most entries of a metadata array.
    pub array_max: u64,
}

impl Limits {
    /// For base models: the largest known vocabularies have 256 thousand tokens and 514 thousand merges.
    pub const BASE: Self = Self {
        tensors_max: 16_384,
        keys_max: 4_096,
        name_bytes_max: 256,
        text_bytes_max: 1 << 20,
        array_max: 1_000_000,
    };

    /// For LoRA adapters: two tensors per linear layer and a handful of keys.
    pub const ADAPTER: Self =
        Self { tensors_max: 8_192, keys_max: 256, name_bytes_max: 256, text_bytes_max: 64 << 10, array_max: 4_096 };
}

/// A tensor as the header describes it; its bytes are known to lie inside the file, apart from all others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDesc {
    /// Name, unique in the file.
    pub name: String,
    /// One to four dimensions in ggml order (fastest first): `[n_in, n_out]` for a matrix.
    pub dims: Vec<usize>,
    /// Storage type; `dims[0]` is a multiple of its block.
    pub dtype: GgmlDType,
    /// Where its bytes are, from the start of the file.
    pub bytes: Range<u64>,
}

impl TensorDesc {
    /// Number of values.
    pub fn n_values(&self) -> usize {
        self.dims.iter().product()
    }
}

/// A checked header.
#[derive(Debug, Clone)]
pub struct GgufFile {
    metadata: BTreeMap<String, Value>,
    tensors: Vec<TensorDesc>,
    by_name: Vec<u32>,
    header_bytes: u64,
}

/// Why a file is not a GGUF file that we read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GgufError {
    /// Reading failed.
    #[error("cannot read the file: {0}")]
    Io(String),
    /// The first four bytes are something else.
    #[error(
        "not a GGUF file: it starts with {found:02x?} instead of \"GGUF\"; hint: was the download interrupted, or is it a Git LFS pointer?"
    )]
    Magic {
        /// First bytes of the file.
        found: [u8; 4],
    },
    /// A version we do not read.
    #[error(
        "GGUF version {found} is not supported; hint: versions 2 and 3 (little-endian) are, convert the file again"
    )]
    Version {
        /// Version found.
        found: u32,
    },
    /// The file ends inside the header or inside a tensor.
    #[error(
        "{what} needs {needed} bytes at offset {offset} but the file has {file_bytes}; hint: the file is cut short or damaged"
    )]
    Truncated {
        /// What was being read.
        what: String,
        /// Bytes it needs.
        needed: u64,
        /// Where it starts.
        offset: u64,
        /// Length of the file.
        file_bytes: u64,
    },
    /// A count or length over its limit.
    #[error(
        "{what} is {found}, the limit is {max}; hint: no real model needs that many, the file is damaged or hostile"
    )]
    TooMany {
        /// What is too large.
        what: String,
        /// Value found.
        found: u64,
        /// Limit.
        max: u64,
    },
    /// A field with a value that cannot be right.
    #[error("{what}: {found}; hint: {expected}")]
    Invalid {
        /// Which field.
        what: String,
        /// What was found.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// A name that occurs twice.
    #[error("{what} {name:?} occurs twice; hint: the file is damaged or hostile")]
    Duplicate {
        /// Key or tensor.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap; hint: the file is damaged or hostile")]
    Overlap {
        /// The earlier one.
        first: String,
        /// The later one.
        second: String,
    },
    /// A required key is absent or has another type.
    #[error(
        "metadata key {key:?} is missing or not {expected}; hint: convert the model again with a current converter"
    )]
    Key {
        /// The key.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
}

/// Checks a file held in memory.
///
/// # Errors
/// Names the first thing that is wrong.
pub fn parse(bytes: &[u8], limits: &Limits) -> Result<GgufFile, GgufError> {
    read(bytes, bytes.len() as u64, limits)
}

/// Checks the header of a file of `file_bytes` bytes; `reader` stands at its start and should be buffered.
///
/// # Errors
/// Names the first thing that is wrong.
pub fn read(reader: impl Read, file_bytes: u64, limits: &Limits) -> Result<GgufFile, GgufError> {
    let mut source = Source { reader, at: 0, file_bytes };
    let (n_tensors, n_keys) = read_preamble(&mut source, limits)?;
    let metadata = read_metadata(&mut source, n_keys, limits)?;
    let alignment = alignment_of(&metadata)?;
    let mut tensors = Vec::new();
    for _ in 0..n_tensors {
        tensors.push(read_tensor(&mut source, limits)?);
    }
    let header_bytes = source.at;
    place_tensors(&mut tensors, header_bytes, alignment, file_bytes)?;
    let by_name = index_names(&tensors)?;
    Ok(GgufFile { metadata, tensors, by_name, header_bytes })
}

// === impl GgufFile ===

impl GgufFile {
    /// Bytes of the file before the tensors' data and the gap in front of it.
    pub fn header_bytes(&self) -> u64 {
        self.header_bytes
    }

    /// Tensors in file order.
    pub fn tensors(&self) -> &[TensorDesc] {
        &self.tensors
    }

    /// One tensor.
    pub fn tensor(&self, name: &str) -> Option<&TensorDesc> {
        let found = self.by_name.binary_search_by(|&idx| self.tensors[idx as usize].name.as_str().cmp(name)).ok()?;
        Some(&self.tensors[self.by_name[found] as usize])
    }

    /// One metadata value.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata in the order of the keys.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.metadata.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// An unsigned number, if the key is there and is one.
    pub fn uint(&self, key: &str) -> Option<u64> {
        self.value(key).and_then(Value::as_uint)
    }

    /// A floating-point number, if the key is there and is one.
    pub fn float(&self, key: &str) -> Option<f64> {
        self.value(key).and_then(Value::as_float)
    }

    /// A boolean, if the key is there and is one.
    pub fn flag(&self, key: &str) -> Option<bool> {
        self.value(key).and_then(Value::as_flag)
    }

    /// A text, if the key is there and is one.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.value(key).and_then(Value::as_text)
    }

    /// An array of texts, if the key is there and is one.
    pub fn texts(&self, key: &str) -> Option<&Texts> {
        self.value(key).and_then(Value::as_texts)
    }

    /// An array of numbers, if the key is there and is one.
    pub fn numbers(&self, key: &str) -> Option<&Array> {
        self.value(key).and_then(Value::as_numbers)
    }

    /// An unsigned number that must be there.
    ///
    /// # Errors
    /// [`GgufError::Key`] when it is not.
    pub fn need_uint(&self, key: &str) -> Result<u64, GgufError> {
        self.uint(key).ok_or_else(|| GgufError::Key { key: key.to_owned(), expected: "an unsigned number" })
    }

    /// A text that must be there.
    ///
    /// # Errors
    /// [`GgufError::Key`] when it is not.
    pub fn need_text(&self, key: &str) -> Result<&str, GgufError> {
        self.text(key).ok_or_else(|| GgufError::Key { key: key.to_owned(), expected: "a text" })
    }
}

// === reading ===

fn read_preamble(source: &mut Source<impl Read>, limits: &Limits) -> Result<(u64, u64), GgufError> {
    let magic: [u8; 4] = source.fixed("the magic number")?;
    if &magic != b"GGUF" {
        return Err(GgufError::Magic { found: magic });
    }
    let version = source.u32("the version")?;
    if !matches!(version, 2 | 3) {
        return Err(GgufError::Version { found: version });
    }
    let n_tensors = bounded("the number of tensors", source.u64("the number of tensors")?, limits.tensors_max)?;
    let n_keys = bounded("the number of metadata keys", source.u64("the number of metadata keys")?, limits.keys_max)?;
    Ok((n_tensors, n_keys))
}

fn read_metadata(
    source: &mut Source<impl Read>,
    n_keys: u64,
    limits: &Limits,
) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..n_keys {
        let key = source.text("a metadata key", limits.name_bytes_max)?;
        let value = read_value(source, &key, limits)?;
        if metadata.contains_key(&key) {
            return Err(GgufError::Duplicate { what: "metadata key", name: key });
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn read_value(source: &mut Source<impl Read>, key: &str, limits: &Limits) -> Result<Value, GgufError> {
    const TEXT: u32 = 8;
    const ARRAY: u32 = 9;
    let what = || format!("metadata {key:?}");
    match source.u32(key)? {
        TEXT => Ok(Value::Text(source.text(&what(), limits.text_bytes_max)?)),
        ARRAY => {
            let item = source.u32(key)?;
            let len = bounded(&format!("the length of array {key:?}"), source.u64(key)?, limits.array_max)?;
            match item {
                TEXT => read_texts(source, &what(), len, limits),
                ARRAY => Err(invalid(what(), "an array of arrays", "arrays of arrays are not used by any model")),
                code => {
                    let scalar = scalar_of(code, &what())?;
                    let bytes = source.bytes(&what(), len * scalar.size() as u64)?;
                    Array::new(scalar, bytes)
                        .map(Value::Numbers)
                        .ok_or_else(|| invalid(what(), "a boolean that is neither 0 nor 1", "booleans are 0 or 1"))
                }
            }
        }
        code => {
            let scalar = scalar_of(code, &what())?;
            let bytes = source.bytes(&what(), scalar.size() as u64)?;
            scalar
                .decode(&bytes)
                .ok_or_else(|| invalid(what(), "a boolean that is neither 0 nor 1", "booleans are 0 or 1"))
        }
    }
}

fn read_texts(source: &mut Source<impl Read>, what: &str, len: u64, limits: &Limits) -> Result<Value, GgufError> {
    const LENGTH_BYTES: u64 = 8;
    // An entry takes at least its length field, so a larger count cannot be true.
    source.reserve(what, len * LENGTH_BYTES)?;
    let mut texts = Texts::with_capacity(len as usize);
    for _ in 0..len {
        let text = source.text(what, limits.text_bytes_max)?;
        texts.push(&text).ok_or_else(|| GgufError::TooMany {
            what: format!("the bytes of {what}"),
            found: u64::from(u32::MAX) + 1,
            max: u64::from(u32::MAX),
        })?;
    }
    Ok(Value::Texts(texts))
}

fn read_tensor(source: &mut Source<impl Read>, limits: &Limits) -> Result<TensorDesc, GgufError> {
    let name = source.text("a tensor name", limits.name_bytes_max)?;
    let what = || format!("tensor {name:?}");
    let n_dims = source.u32(&name)?;
    if !(1..=4).contains(&n_dims) {
        return Err(invalid(what(), &format!("{n_dims} dimensions"), "a tensor has one to four"));
    }
    let mut dims = Vec::with_capacity(n_dims as usize);
    let mut n_values = 1_u64;
    for _ in 0..n_dims {
        let dim = source.u64(&name)?;
        n_values = n_values.checked_mul(dim).filter(|&n| n > 0 && n <= isize::MAX as u64).ok_or_else(|| {
            invalid(what(), &format!("dimension {dim}"), "dimensions are above zero and their product fits the file")
        })?;
        dims.push(dim as usize);
    }
    let code = source.u32(&name)?;
    let dtype = dtype_of(code).ok_or_else(|| {
        invalid(
            what(),
            &format!("storage type {code}"),
            "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0 and Q2_K to Q6_K are read; quantise the model to one of them",
        )
    })?;
    let block = dtype.block_size() as u64;
    if !(dims[0] as u64).is_multiple_of(block) {
        return Err(invalid(what(), &format!("rows of {} values", dims[0]), "rows are a multiple of the block size"));
    }
    let size = (n_values / block).checked_mul(dtype.type_size() as u64);
    let size = size.ok_or_else(|| invalid(what(), "more bytes than can be counted", "the shape is damaged"))?;
    let offset = source.u64(&name)?;
    let end = offset.checked_add(size);
    let end = end.ok_or_else(|| invalid(what(), &format!("offset {offset}"), "offsets lie inside the file"))?;
    Ok(TensorDesc { name, dims, dtype, bytes: offset..end })
}

/// Turns offsets within the data section into ranges of the file and checks that they fit and are apart.
fn place_tensors(
    tensors: &mut [TensorDesc],
    header_bytes: u64,
    alignment: u64,
    file_bytes: u64,
) -> Result<(), GgufError> {
    let data_start = header_bytes.next_multiple_of(alignment);
    for tensor in tensors.iter_mut() {
        let Range { start, end } = tensor.bytes;
        if !start.is_multiple_of(alignment) {
            let found = format!("offset {start} with alignment {alignment}");
            return Err(invalid(format!("tensor {:?}", tensor.name), &found, "offsets are multiples of the alignment"));
        }
        let needed = end - start;
        match data_start.checked_add(end) {
            Some(end) if end <= file_bytes => tensor.bytes = data_start + start..end,
            _ => {
                let what = format!("tensor {:?}", tensor.name);
                return Err(GgufError::Truncated {
                    what,
                    needed,
                    offset: data_start.saturating_add(start),
                    file_bytes,
                });
            }
        }
    }
    let mut order: Vec<&TensorDesc> = tensors.iter().collect();
    order.sort_by_key(|tensor| tensor.bytes.start);
    match order.windows(2).find(|pair| pair[0].bytes.end > pair[1].bytes.start) {
        Some(pair) => Err(GgufError::Overlap { first: pair[0].name.clone(), second: pair[1].name.clone() }),
        None => Ok(()),
    }
}

fn index_names(tensors: &[TensorDesc]) -> Result<Vec<u32>, GgufError> {
    let name = |idx: u32| tensors[idx as usize].name.as_str();
    let mut by_name: Vec<u32> = (0..tensors.len() as u32).collect();
    by_name.sort_by(|&a, &b| name(a).cmp(name(b)));
    match by_name.windows(2).find(|pair| name(pair[0]) == name(pair[1])) {
        Some(pair) => Err(GgufError::Duplicate { what: "tensor", name: name(pair[0]).to_owned() }),
        None => Ok(by_name),
    }
}

fn alignment_of(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    const DEFAULT: u64 = 32;
    let Some(value) = metadata.get("general.alignment") else { return Ok(DEFAULT) };
    match value.as_uint() {
        Some(alignment) if alignment.is_power_of_two() && (8..=4096).contains(&alignment) => Ok(alignment),
        _ => {
            let found = value.as_uint().map_or_else(|| "not a number".to_owned(), |found| found.to_string());
            Err(invalid("general.alignment".to_owned(), &found, "it is a power of two from 8 to 4096"))
        }
    }
}

fn scalar_of(code: u32, what: &str) -> Result<Scalar, GgufError> {
    Scalar::from_code(code)
        .ok_or_else(|| invalid(what.to_owned(), &format!("value type {code}"), "value types are 0 to 12"))
}

fn dtype_of(code: u32) -> Option<GgmlDType> {
    Some(match code {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        30 => GgmlDType::BF16,
        _ => return None,
    })
}

fn bounded(what: &str, found: u64, max: u64) -> Result<u64, GgufError> {
    if found > max { Err(GgufError::TooMany { what: what.to_owned(), found, max }) } else { Ok(found) }
}

fn invalid(what: String, found: &str, expected: &'static str) -> GgufError {
    GgufError::Invalid { what, found: found.to_owned(), expected }
}

/// A reader that knows how much is left, so that no length is believed beyond it.
struct Source<R> {
    reader: R,
    at: u64,
    file_bytes: u64,
}

impl<R: Read> Source<R> {
    /// Fails unless `n_bytes` more bytes are there.
    fn reserve(&self, what: &str, n_bytes: u64) -> Result<(), GgufError> {
        if n_bytes > self.file_bytes.saturating_sub(self.at) {
            let (offset, file_bytes) = (self.at, self.file_bytes);
            return Err(GgufError::Truncated { what: what.to_owned(), needed: n_bytes, offset, file_bytes });
        }
        Ok(())
    }

    fn fill(&mut self, what: &str, out: &mut [u8]) -> Result<(), GgufError> {
        self.reserve(what, out.len() as u64)?;
        self.reader.read_exact(out).map_err(|error| GgufError::Io(error.to_string()))?;
        self.at += out.len() as u64;
        Ok(())
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        self.fill(what, &mut out)?;
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.fixed(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.fixed(what).map(u64::from_le_bytes)
    }

    fn bytes(&mut self, what: &str, n_bytes: u64) -> Result<Vec<u8>, GgufError> {
        self.reserve(what, n_bytes)?;
        let mut out = vec![0; n_bytes as usize];
        self.fill(what, &mut out)?;
        Ok(out)
    }

    fn text(&mut self, what: &str, bytes_max: u64) -> Result<String, GgufError> {
        let n_bytes = self.u64(what)?;
        if n_bytes > bytes_max {
            return Err(GgufError::TooMany { what: format!("the length of {what}"), found: n_bytes, max: bytes_max });
        }
        let bytes = self.bytes(what, n_bytes)?;
        String::from_utf8(bytes).map_err(|_| invalid(what.to_owned(), "bytes that are not UTF-8", "texts are UTF-8"))
    }
}

#[cfg(test)]
mod tests;
