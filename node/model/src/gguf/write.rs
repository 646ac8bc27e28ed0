//! Writes small GGUF files: tiny models for tests, and files that are wrong on purpose.
//!
//! Tests of this and other crates call it. It writes what it is told and checks nothing; version 3, alignment
//! 32. Large files are not its business: everything is held in memory.
//!
//! ```
//! use model::gguf::write::GgufWriter;
//! let mut file = GgufWriter::default();
//! file.text("general.architecture", "llama").uint("llama.block_count", 2);
//! file.tensor_f32("output_norm.weight", &[4], &[1.0; 4]);
//! let bytes = file.finish();
//! assert!(model::gguf::check::parse(&bytes, &model::gguf::check::Limits::BASE).is_ok());
//! ```

/// Collects metadata and tensors, then lays them out.
#[derive(Debug, Clone, Default)]
pub struct GgufWriter {
    keys: Vec<u8>,
    n_keys: u64,
    infos: Vec<u8>,
    n_tensors: u64,
    data: Vec<u8>,
}

/// Alignment of the data section and of every tensor; the format's default.
const ALIGNMENT: usize = 32;

impl GgufWriter {
    /// Adds a text.
    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.value(key, 8, &sized(value.as_bytes()))
    }

    /// Adds a 32-bit unsigned number.
    pub fn uint(&mut self, key: &str, value: u32) -> &mut Self {
        self.value(key, 4, &value.to_le_bytes())
    }

    /// Adds a 32-bit float.
    pub fn float(&mut self, key: &str, value: f32) -> &mut Self {
        self.value(key, 6, &value.to_le_bytes())
    }

    /// Adds a boolean.
    pub fn flag(&mut self, key: &str, value: bool) -> &mut Self {
        self.value(key, 7, &[u8::from(value)])
    }

    /// Adds an array of texts.
    pub fn texts<S: AsRef<str>>(&mut self, key: &str, values: &[S]) -> &mut Self {
        let mut bytes = array_head(8, values.len());
        values.iter().for_each(|value| bytes.extend(sized(value.as_ref().as_bytes())));
        self.value(key, 9, &bytes)
    }

    /// Adds an array of 32-bit signed numbers, as `tokenizer.ggml.token_type` is.
    pub fn ints(&mut self, key: &str, values: &[i32]) -> &mut Self {
        let mut bytes = array_head(5, values.len());
        values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        self.value(key, 9, &bytes)
    }

    /// Adds an array of 32-bit floats, as `tokenizer.ggml.scores` is.
    pub fn floats(&mut self, key: &str, values: &[f32]) -> &mut Self {
        let mut bytes = array_head(6, values.len());
        values.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
        self.value(key, 9, &bytes)
    }

    /// Adds a value of any type by the format's type number and raw bytes.
    pub fn value(&mut self, key: &str, type_code: u32, bytes: &[u8]) -> &mut Self {
        self.keys.extend(sized(key.as_bytes()));
        self.keys.extend(type_code.to_le_bytes());
        self.keys.extend(bytes);
        self.n_keys += 1;
        self
    }

    /// Adds an f32 tensor; `dims` in ggml order: `[n_in, n_out]` for a matrix.
    pub fn tensor_f32(&mut self, name: &str, dims: &[u64], values: &[f32]) -> &mut Self {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensor(name, dims, 0, &bytes)
    }

    /// Adds a tensor by the format's type number (0 F32, 1 F16, 3 Q4_1, 8 Q8_0, 30 BF16, …) and raw bytes.
    pub fn tensor(&mut self, name: &str, dims: &[u64], type_code: u32, bytes: &[u8]) -> &mut Self {
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        self.tensor_info(name, dims, type_code, offset)
    }

    /// Describes a tensor without data of its own: for files that are wrong on purpose.
    pub fn tensor_info(&mut self, name: &str, dims: &[u64], type_code: u32, offset: u64) -> &mut Self {
        self.infos.extend(sized(name.as_bytes()));
        self.infos.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| self.infos.extend(dim.to_le_bytes()));
        self.infos.extend(type_code.to_le_bytes());
        self.infos.extend(offset.to_le_bytes());
        self.n_tensors += 1;
        self
    }

    /// The file.
    pub fn finish(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(3_u32.to_le_bytes());
        file.extend(self.n_tensors.to_le_bytes());
        file.extend(self.n_keys.to_le_bytes());
        file.extend(&self.keys);
        file.extend(&self.infos);
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(&self.data);
        file
    }
}

fn sized(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u64).to_le_bytes().to_vec();
    out.extend(bytes);
    out
}

fn array_head(type_code: u32, len: usize) -> Vec<u8> {
    let mut out = type_code.to_le_bytes().to_vec();
    out.extend((len as u64).to_le_bytes());
    out
}
