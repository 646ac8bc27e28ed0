//! Values of GGUF metadata, kept as compactly as in the file.
//!
//! [`check`](super::check) makes them, loaders and tokenizers read them. Arrays stay flat byte runs: a
//! vocabulary of 150 thousand texts is two allocations, and a hostile array cannot grow while being read.

/// Type of a number or boolean in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scalar {
    /// 8-bit unsigned.
    U8,
    /// 8-bit signed.
    I8,
    /// 16-bit unsigned.
    U16,
    /// 16-bit signed.
    I16,
    /// 32-bit unsigned.
    U32,
    /// 32-bit signed.
    I32,
    /// 32-bit float.
    F32,
    /// One byte, 0 or 1.
    Bool,
    /// 64-bit unsigned.
    U64,
    /// 64-bit signed.
    I64,
    /// 64-bit float.
    F64,
}

/// One metadata value; integers and floats are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// Any unsigned integer.
    Uint(u64),
    /// Any signed integer.
    Int(i64),
    /// Any float.
    Float(f64),
    /// Boolean.
    Flag(bool),
    /// Text.
    Text(String),
    /// Array of texts.
    Texts(Texts),
    /// Array of numbers or booleans.
    Numbers(Array),
}

/// A flat array of numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    scalar: Scalar,
    bytes: Vec<u8>,
}

/// A flat array of texts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Texts {
    joined: String,
    ends: Vec<u32>,
}

// === impl Scalar ===

impl Scalar {
    /// By its number in the file format; texts (8) and arrays (9) are no scalars.
    pub(super) fn from_code(code: u32) -> Option<Self> {
        Some(match code {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// Decodes `size()` little-endian bytes; `None` for a boolean that is neither 0 nor 1.
    pub(super) fn decode(self, bytes: &[u8]) -> Option<Value> {
        let mut wide = [0_u8; 8];
        wide[..self.size()].copy_from_slice(bytes);
        let raw = u64::from_le_bytes(wide);
        Some(match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => Value::Uint(raw),
            Self::I8 => Value::Int(i64::from(raw as i8)),
            Self::I16 => Value::Int(i64::from(raw as i16)),
            Self::I32 => Value::Int(i64::from(raw as i32)),
            Self::I64 => Value::Int(raw as i64),
            Self::F32 => Value::Float(f64::from(f32::from_bits(raw as u32))),
            Self::F64 => Value::Float(f64::from_bits(raw)),
            Self::Bool if raw > 1 => return None,
            Self::Bool => Value::Flag(raw == 1),
        })
    }
}

// === impl Value ===

impl Value {
    /// As an unsigned number; signed numbers count when they are not negative.
    pub fn as_uint(&self) -> Option<u64> {
        match self {
            Self::Uint(value) => Some(*value),
            Self::Int(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// As a float; integers count.
    pub fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            Self::Uint(value) => Some(*value as f64),
            Self::Int(value) => Some(*value as f64),
            _ => None,
        }
    }

    /// As a boolean.
    pub fn as_flag(&self) -> Option<bool> {
        if let Self::Flag(value) = self { Some(*value) } else { None }
    }

    /// As a text.
    pub fn as_text(&self) -> Option<&str> {
        if let Self::Text(value) = self { Some(value) } else { None }
    }

    /// As an array of texts.
    pub fn as_texts(&self) -> Option<&Texts> {
        if let Self::Texts(value) = self { Some(value) } else { None }
    }

    /// As an array of numbers.
    pub fn as_numbers(&self) -> Option<&Array> {
        if let Self::Numbers(value) = self { Some(value) } else { None }
    }
}

// === impl Array ===

impl Array {
    /// Takes `n × scalar.size()` bytes; `None` for a boolean that is neither 0 nor 1.
    pub(super) fn new(scalar: Scalar, bytes: Vec<u8>) -> Option<Self> {
        if scalar == Scalar::Bool && bytes.iter().any(|&byte| byte > 1) {
            return None;
        }
        Some(Self { scalar, bytes })
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.bytes.len() / self.scalar.size()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Entries as values.
    pub fn iter(&self) -> impl Iterator<Item = Value> {
        let scalar = self.scalar;
        self.bytes.chunks_exact(scalar.size()).map(move |bytes| scalar.decode(bytes).expect("checked when it was made"))
    }

    /// Entries as unsigned numbers; `None` when one is not.
    pub fn uints(&self) -> Option<Vec<u64>> {
        self.iter().map(|value| value.as_uint()).collect()
    }

    /// Entries as f32; `None` when one is a boolean.
    pub fn floats(&self) -> Option<Vec<f32>> {
        self.iter().map(|value| value.as_float().map(|float| float as f32)).collect()
    }
}

// === impl Texts ===

impl Texts {
    pub(super) fn with_capacity(n_texts: usize) -> Self {
        Self { joined: String::new(), ends: Vec::with_capacity(n_texts) }
    }

    /// Adds a text; `None` when all together pass 4 GiB.
    pub(super) fn push(&mut self, text: &str) -> Option<()> {
        let end = u32::try_from(self.joined.len() + text.len()).ok()?;
        self.joined.push_str(text);
        self.ends.push(end);
        Some(())
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// One entry.
    pub fn get(&self, idx: usize) -> Option<&str> {
        let end = *self.ends.get(idx)? as usize;
        let start = if idx == 0 { 0 } else { self.ends[idx - 1] as usize };
        Some(&self.joined[start..end])
    }

    /// All entries.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        (0..self.len()).map(|idx| self.get(idx).expect("idx is below len"))
    }
}
