//! The GGUF block formats taken apart: unsigned codes, and per group a scale, a minimum and one zero point, so that
//! a weight is `scale * (code - zero) + min`. Scale and minimum are f16, in the K formats times a small integer per
//! group. Called by the packer only. All products in it are exact in f32 and the final sum rounds once, so the values
//! equal ggml's bit for bit, whatever the order ggml computes in.

use half::f16;

/// GGUF block formats, as `general.file_type` and the tensor types name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockType {
    /// 4 bit, scale per 32.
    Q4_0,
    /// 4 bit, scale and minimum per 32.
    Q4_1,
    /// 5 bit, scale per 32.
    Q5_0,
    /// 5 bit, scale and minimum per 32.
    Q5_1,
    /// 8 bit, scale per 32.
    Q8_0,
    /// 2 bit, 4-bit scale and minimum per 16.
    Q2K,
    /// 3 bit, 6-bit scale per 16.
    Q3K,
    /// 4 bit, 6-bit scale and minimum per 32.
    Q4K,
    /// 5 bit, 6-bit scale and minimum per 32.
    Q5K,
    /// 6 bit, 8-bit scale per 16.
    Q6K,
}

/// How a format looks once taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CodeForm {
    /// Bits per code in memory: 4, 5, 6 or 8.
    pub(crate) bits: u32,
    /// Weights per scale: 32 or 16.
    pub(crate) group: usize,
    /// f16 scales (and minima) stand for 256 weights and are multiplied by an i8 per group; else they stand for 32.
    pub(crate) nested: bool,
    /// There is a minimum per group (then `zero_shift` is unused and the zero point is 0).
    pub(crate) has_min: bool,
    /// The zero point is `1 << zero_shift`; every symmetric format has such a one.
    pub(crate) zero_shift: u32,
}

/// Weights per f16 scale of a nested form.
pub(crate) const NEST: usize = 256;

// === impl BlockType ===

impl BlockType {
    /// All formats.
    pub const ALL: [Self; 10] = [
        Self::Q4_0,
        Self::Q4_1,
        Self::Q5_0,
        Self::Q5_1,
        Self::Q8_0,
        Self::Q2K,
        Self::Q3K,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Weights per block; the row length must be a multiple.
    pub const fn block_len(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => 256,
        }
    }

    /// Bytes per block in the file.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    pub(crate) const fn form(self) -> CodeForm {
        let (bits, group, nested, has_min, zero_shift) = match self {
            Self::Q4_0 => (4, 32, false, false, 3),
            Self::Q4_1 => (4, 32, false, true, 0),
            Self::Q5_0 => (5, 32, false, false, 4),
            Self::Q5_1 => (5, 32, false, true, 0),
            Self::Q8_0 => (8, 32, false, false, 7),
            // 2 and 3 bits are kept in 4: nobody serves such bases for speed.
            Self::Q2K => (4, 16, true, true, 0),
            Self::Q3K => (4, 16, true, false, 2),
            Self::Q4K => (4, 32, true, true, 0),
            Self::Q5K => (5, 32, true, true, 0),
            Self::Q6K => (6, 16, true, false, 5),
        };
        CodeForm { bits, group, nested, has_min, zero_shift }
    }
}

/// One block taken apart; only the first `block_len` codes and `block_len / group` factors are meaningful.
#[derive(Debug, Clone)]
pub(crate) struct Block {
    pub(crate) codes: [u8; 256],
    /// f16 bits of the scale.
    pub(crate) scale: u16,
    /// f16 bits of the minimum.
    pub(crate) min: u16,
    /// Nested forms: factor of the scale per group.
    pub(crate) scales: [i8; 16],
    /// Nested forms: factor of the minimum per group.
    pub(crate) mins: [i8; 16],
}

// === impl Block ===

impl Block {
    pub(crate) fn empty() -> Self {
        Self { codes: [0; 256], scale: 0, min: 0, scales: [0; 16], mins: [0; 16] }
    }

    /// Scale and minimum are finite.
    pub(crate) fn is_finite(&self) -> bool {
        f16::from_bits(self.scale).is_finite() && f16::from_bits(self.min).is_finite()
    }

    /// Reads one block of `kind` from exactly `kind.block_bytes()` bytes.
    pub(crate) fn read(&mut self, kind: BlockType, bytes: &[u8]) {
        assert_eq!(bytes.len(), kind.block_bytes());
        match kind {
            BlockType::Q4_0 => self.read_4bit(half_at(bytes, 0), 0, &bytes[2..]),
            BlockType::Q4_1 => self.read_4bit(half_at(bytes, 0), half_at(bytes, 2), &bytes[4..]),
            BlockType::Q5_0 => self.read_5bit(half_at(bytes, 0), 0, &bytes[2..]),
            BlockType::Q5_1 => self.read_5bit(half_at(bytes, 0), half_at(bytes, 2), &bytes[4..]),
            BlockType::Q8_0 => {
                self.scale = half_at(bytes, 0);
                for (code, &byte) in self.codes.iter_mut().zip(&bytes[2..]) {
                    *code = byte.wrapping_add(128);
                }
            }
            BlockType::Q2K => self.read_q2k(bytes),
            BlockType::Q3K => self.read_q3k(bytes),
            BlockType::Q4K => self.read_q45k(&bytes[..16], None, &bytes[16..]),
            BlockType::Q5K => self.read_q45k(&bytes[..16], Some(&bytes[16..48]), &bytes[48..]),
            BlockType::Q6K => self.read_q6k(bytes),
        }
    }

    /// Low nibbles are the first half of the block, high nibbles the second.
    fn read_4bit(&mut self, scale: u16, min: u16, quants: &[u8]) {
        (self.scale, self.min) = (scale, min);
        for (i, &byte) in quants.iter().enumerate() {
            self.codes[i] = byte & 15;
            self.codes[16 + i] = byte >> 4;
        }
    }

    /// As 4 bit, with the fifth bits of all codes in a word in front.
    fn read_5bit(&mut self, scale: u16, min: u16, bytes: &[u8]) {
        let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        self.read_4bit(scale, min, &bytes[4..]);
        for i in 0..32 {
            self.codes[i] |= (((high >> i) & 1) << 4) as u8;
        }
    }

    /// `scales[16]` (4 bit scale, 4 bit minimum), `qs[64]` (2 bit), d, dmin.
    fn read_q2k(&mut self, bytes: &[u8]) {
        (self.scale, self.min) = (half_at(bytes, 80), half_at(bytes, 82) ^ SIGN);
        for (group, &packed) in bytes[..16].iter().enumerate() {
            self.scales[group] = (packed & 15) as i8;
            self.mins[group] = (packed >> 4) as i8;
        }
        for i in 0..256 {
            // Each 32 bytes hold 128 weights: four planes of 2 bits.
            let (plane, at) = ((i % 128) / 32, i / 128 * 32 + i % 32);
            self.codes[i] = (bytes[16 + at] >> (2 * plane)) & 3;
        }
    }

    /// `hmask[32]` (third bits), `qs[64]` (2 bit), `scales[12]` (16 scales of 6 bit), d.
    fn read_q3k(&mut self, bytes: &[u8]) {
        self.scale = half_at(bytes, 108);
        let packed = &bytes[96..108];
        for group in 0..16 {
            let low = (packed[group % 8] >> (4 * (group / 8))) & 15;
            let high = (packed[8 + group % 4] >> (2 * (group / 4))) & 3;
            self.scales[group] = (low | (high << 4)) as i8 - 32;
        }
        for i in 0..256 {
            let (plane, at) = ((i % 128) / 32, i / 128 * 32 + i % 32);
            let low = (bytes[32 + at] >> (2 * plane)) & 3;
            let high = (bytes[i % 32] >> (i / 32)) & 1;
            // A clear third bit means 4 less; with the zero point at 4 that is the plain 3-bit code.
            self.codes[i] = low | (high << 2);
        }
    }

    /// `head`: d, dmin, 12 bytes of 6-bit scales and minima; `high`: fifth bits; `quants`: 4 bit.
    fn read_q45k(&mut self, head: &[u8], high: Option<&[u8]>, quants: &[u8]) {
        (self.scale, self.min) = (half_at(head, 0), half_at(head, 2) ^ SIGN);
        let packed = &head[4..16];
        for group in 0..8 {
            let (scale, min) = if group < 4 {
                (packed[group] & 63, packed[group + 4] & 63)
            } else {
                let low = packed[group + 4];
                ((low & 15) | (packed[group - 4] >> 6 << 4), (low >> 4) | (packed[group] >> 6 << 4))
            };
            self.scales[group] = scale as i8;
            self.mins[group] = min as i8;
        }
        for i in 0..256 {
            // 32 bytes hold 64 weights: low nibbles first.
            let (nibble, at) = ((i % 64) / 32, i / 64 * 32 + i % 32);
            let fifth = high.map_or(0, |high| (high[i % 32] >> (i / 32)) & 1);
            self.codes[i] = ((quants[at] >> (4 * nibble)) & 15) | (fifth << 4);
        }
    }

    /// `ql[128]` (4 bit), `qh[64]` (2 bit), `scales[16]` (i8), d.
    fn read_q6k(&mut self, bytes: &[u8]) {
        self.scale = half_at(bytes, 208);
        for group in 0..16 {
            self.scales[group] = bytes[192 + group] as i8;
        }
        for i in 0..256 {
            let (half, quarter, at) = (i / 128, (i % 128) / 32, i % 32);
            let low = bytes[half * 64 + (quarter % 2) * 32 + at] >> (4 * (quarter / 2)) & 15;
            let high = bytes[128 + half * 32 + at] >> (2 * quarter) & 3;
            self.codes[i] = low | (high << 4);
        }
    }
}

/// Sign of an f16. The K formats subtract their minimum; its sign is turned here, which is exact.
const SIGN: u16 = 0x8000;

fn half_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}
