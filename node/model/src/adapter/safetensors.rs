//! Strict pre-parser of safetensors files: what it lets through has one meaning and fits the file exactly.
//!
//! Stricter than the format: no repeated keys, no empty tensors, no gaps, at most two dimensions, float types
//! only. Reads the header in place; what it allocates is bounded by the header's real bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::tensor::{Dtype, TensorView};
use super::{AdapterError, quote};

/// Longest header. An adapter on all seven layers of an 80-layer model with DoRA needs 0.3 MB.
const HEADER_BYTES_MAX: usize = 1 << 20;
/// Length prefix of the header.
const PREFIX_BYTES: usize = 8;
/// Hint of errors that a damaged transfer explains.
const REEXPORT: &str = "hint: the file is damaged or cut; export it again with save_pretrained";

/// The tensors of a file by name, each with a view that fits its bytes. Values are not looked at yet.
pub(super) fn parse(file: &[u8]) -> Result<BTreeMap<String, TensorView<'_>>, AdapterError> {
    let (header, data) = split(file)?;
    let Header(entries) = serde_json::from_slice(header)
        .map_err(|error| AdapterError::invalid(format!("safetensors header: {error}; {REEXPORT}")))?;
    if entries.is_empty() {
        return Err(AdapterError::invalid("adapter_model.safetensors holds no tensors"));
    }
    check_cover(&entries, data.len())?;
    entries
        .into_iter()
        .map(|(name, entry)| {
            let view = entry.view(&name, data)?;
            Ok((name, view))
        })
        .collect()
}

/// Header and data of a file.
fn split(file: &[u8]) -> Result<(&[u8], &[u8]), AdapterError> {
    let Some((prefix, rest)) = file.split_first_chunk::<PREFIX_BYTES>() else {
        return Err(AdapterError::invalid(format!(
            "adapter_model.safetensors is missing or cut: {} bytes, at least {PREFIX_BYTES} expected",
            file.len()
        )));
    };
    let claimed = u64::from_le_bytes(*prefix);
    let length = usize::try_from(claimed).unwrap_or(usize::MAX);
    if length > HEADER_BYTES_MAX || length > rest.len() {
        return Err(AdapterError::invalid(format!(
            "safetensors header claims {claimed} bytes; {} follow and at most {HEADER_BYTES_MAX} are allowed; {REEXPORT}",
            rest.len()
        )));
    }
    let (header, data) = rest.split_at(length);
    if header.first() != Some(&b'{') {
        return Err(AdapterError::invalid(format!("safetensors header does not start with '{{'; {REEXPORT}")));
    }
    Ok((header, data))
}

/// The tensors must lie one after another and cover the data exactly.
fn check_cover(entries: &BTreeMap<String, Entry>, data_bytes: usize) -> Result<(), AdapterError> {
    let mut by_place: Vec<(&String, &Entry)> = entries.iter().collect();
    by_place.sort_by_key(|(_, entry)| (entry.begin, entry.end));
    let mut at = 0_u64;
    for (name, entry) in by_place {
        if entry.begin != at || entry.end <= entry.begin {
            return Err(AdapterError::invalid(format!(
                "tensor {}: data_offsets [{}, {}], expected to begin at {at}; {REEXPORT}",
                quote(name),
                entry.begin,
                entry.end
            )));
        }
        at = entry.end;
    }
    if at == data_bytes as u64 {
        Ok(())
    } else {
        Err(AdapterError::invalid(format!(
            "the tensors of adapter_model.safetensors end at byte {at} of the data, which has {data_bytes} bytes; {REEXPORT}"
        )))
    }
}

/// All tensors of a header.
struct Header(BTreeMap<String, Entry>);

/// One tensor as the header describes it.
struct Entry {
    dtype: String,
    shape: Shape,
    begin: u64,
    end: u64,
}

// === impl Entry ===

impl Entry {
    /// The view, once dtype, shape and byte length agree. The offsets have been checked against the data.
    fn view<'a>(&self, name: &str, data: &'a [u8]) -> Result<TensorView<'a>, AdapterError> {
        let dtype = self.dtype(name)?;
        let (rows, cols, rank_one) = match self.shape {
            Shape::One(rows) => (rows, 1, true),
            Shape::Two(rows, cols) => (rows, cols, false),
        };
        let bytes = rows.checked_mul(cols).and_then(|n| n.checked_mul(dtype.size() as u64));
        if bytes.is_none() || bytes == Some(0) || bytes != Some(self.end - self.begin) {
            return Err(AdapterError::invalid(format!(
                "tensor {}: shape {:?} of {} needs {} bytes, data_offsets give {}; {REEXPORT}",
                quote(name),
                self.shape,
                self.dtype,
                bytes.map_or_else(|| "too many".to_owned(), |n| n.to_string()),
                self.end - self.begin
            )));
        }
        let place = |at: u64| usize::try_from(at).expect("offsets were checked against the data length");
        Ok(TensorView {
            dtype,
            rows: place(rows),
            cols: place(cols),
            rank_one,
            bytes: &data[place(self.begin)..place(self.end)],
        })
    }

    fn dtype(&self, name: &str) -> Result<Dtype, AdapterError> {
        const KNOWN: [&str; 20] = [
            "BOOL",
            "F4",
            "F6_E2M3",
            "F6_E3M2",
            "U8",
            "I8",
            "F8_E5M2",
            "F8_E4M3",
            "F8_E8M0",
            "F8_E4M3FNUZ",
            "F8_E5M2FNUZ",
            "I16",
            "U16",
            "I32",
            "U32",
            "C64",
            "F64",
            "I64",
            "U64",
            "F128",
        ];
        match self.dtype.as_str() {
            "F32" => Ok(Dtype::F32),
            "F16" => Ok(Dtype::F16),
            "BF16" => Ok(Dtype::Bf16),
            other if KNOWN.contains(&other) => Err(AdapterError::unsupported(
                format!("dtype of tensor {}", quote(name)),
                other,
                "store the weights as F32, F16 or BF16",
            )),
            other => Err(AdapterError::invalid(format!(
                "tensor {}: unknown dtype {}; use F32, F16 or BF16",
                quote(name),
                quote(other)
            ))),
        }
    }
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut entries = BTreeMap::new();
        let mut has_metadata = false;
        while let Some(name) = map.next_key::<String>()? {
            let repeated = if name == "__metadata__" {
                map.next_value::<Metadata>()?;
                std::mem::replace(&mut has_metadata, true)
            } else {
                let entry: Entry = map.next_value()?;
                entries.insert(name.clone(), entry).is_some()
            };
            if repeated {
                return Err(de::Error::custom(format_args!("key {} stands twice", quote(&name))));
            }
        }
        Ok(Header(entries))
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        // A derived struct refuses unknown and repeated fields by itself.
        #[derive(serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Fields {
            dtype: String,
            shape: Shape,
            data_offsets: (u64, u64),
        }
        let Fields { dtype, shape, data_offsets: (begin, end) } = Fields::deserialize(deserializer)?;
        Ok(Self { dtype, shape, begin, end })
    }
}

/// One or two dimensions, as an adapter's tensors have.
#[derive(Clone, Copy)]
enum Shape {
    One(u64),
    Two(u64, u64),
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::One(rows) => write!(f, "[{rows}]"),
            Self::Two(rows, cols) => write!(f, "[{rows}, {cols}]"),
        }
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

struct ShapeVisitor;

impl<'de> Visitor<'de> for ShapeVisitor {
    type Value = Shape;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shape of one or two sizes")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Shape, A::Error> {
        let first: u64 = items.next_element()?.ok_or_else(|| de::Error::invalid_length(0, &self))?;
        let Some(second) = items.next_element::<u64>()? else { return Ok(Shape::One(first)) };
        // Read no further than the third size: a list of a million of them is refused without being kept.
        match items.next_element::<IgnoredAny>()? {
            None => Ok(Shape::Two(first, second)),
            Some(_) => Err(de::Error::invalid_length(3, &self)),
        }
    }
}

/// `__metadata__`: checked to be an object of strings with no key twice, then dropped.
struct Metadata;

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MetadataVisitor)
    }
}

struct MetadataVisitor;

impl<'de> Visitor<'de> for MetadataVisitor {
    type Value = Metadata;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("__metadata__ as an object of strings")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
        let mut keys = BTreeSet::new();
        while let Some((key, _)) = map.next_entry::<String, String>()? {
            if let Some(repeated) = keys.replace(key) {
                return Err(de::Error::custom(format_args!("key {} stands twice", quote(&repeated))));
            }
        }
        Ok(Metadata)
    }
}
