//! A matrix as it lies in memory, written to a file and found again in a mapped one.
//!
//! A descriptor line of 64 bytes (storage, rows, columns), then the buffers as they are, all of them whole lines. The
//! model's loader writes them one after the other and keeps a hash over all; here only lengths are checked.

use std::io::{self, Write};
use std::sync::Arc;

use super::{BlockType, Coded, Matrix, MatrixError, PANEL, Storage, check_shape};
use crate::aligned::Aligned;
use crate::mapping::Mapping;

/// Version of the packed layout: changes whenever the same weights would be packed into other bytes.
pub const PACKED_LAYOUT: u32 = 1;

const LINE: usize = 64;
/// Storage numbers of the dense dtypes; those of codes follow in the order of [`BlockType::ALL`].
const DENSE: [u32; 3] = [0, 1, 2];

// === impl Matrix ===

impl Matrix {
    /// Writes the packed form.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write_packed(&self, out: &mut impl Write) -> io::Result<()> {
        let (storage, buffers) = match &self.storage {
            Storage::F32(panels) => (DENSE[0], vec![panels]),
            Storage::F16(panels) => (DENSE[1], vec![panels]),
            Storage::BF16(panels) => (DENSE[2], vec![panels]),
            Storage::Coded(coded) => {
                let format = BlockType::ALL.iter().position(|kind| kind.form() == coded.form);
                let format = format.expect("every form is that of a block type") as u32;
                (DENSE.len() as u32 + format, coded.buffers().to_vec())
            }
        };
        let mut line = [0; LINE];
        line[..4].copy_from_slice(&storage.to_le_bytes());
        line[8..16].copy_from_slice(&(self.n_out as u64).to_le_bytes());
        line[16..24].copy_from_slice(&(self.n_in as u64).to_le_bytes());
        out.write_all(&line)?;
        buffers.into_iter().try_for_each(|buffer| out.write_all(buffer.view::<u8>()))
    }

    /// The matrix that was written at byte `at` of a file, reading from the map, and where the next one starts.
    ///
    /// # Errors
    /// When what stands there is no matrix or is cut off.
    pub fn from_packed(file: &Arc<Mapping>, at: usize) -> Result<(Self, usize), MatrixError> {
        let line = at.checked_add(LINE).and_then(|end| file.bytes().get(at..end)).ok_or(MatrixError::Packed { at })?;
        let number = |range: std::ops::Range<usize>| {
            let bytes: [u8; 8] = line[range].try_into().expect("eight bytes");
            usize::try_from(u64::from_le_bytes(bytes)).unwrap_or(usize::MAX)
        };
        let (storage, n_out, n_in) = (number(0..8), number(8..16), number(16..24));
        check_shape(n_out, n_in, None)?;
        let mut end = at + LINE;
        let mut next = |bytes: usize| {
            let bytes = bytes.next_multiple_of(LINE);
            let part = Aligned::mapped(file, end, bytes).ok_or(MatrixError::Packed { at })?;
            end += bytes;
            Ok::<_, MatrixError>(part)
        };
        let n_panels = n_out.div_ceil(PANEL);
        let n_values = n_panels * PANEL * n_in;
        let storage = match (storage, storage.checked_sub(DENSE.len()).and_then(|at| BlockType::ALL.get(at))) {
            (0, _) => Storage::F32(next(4 * n_values)?),
            (1, _) => Storage::F16(next(2 * n_values)?),
            (2, _) => Storage::BF16(next(2 * n_values)?),
            (_, Some(kind)) if n_in.is_multiple_of(kind.block_len()) => {
                let form = kind.form();
                let [codes, high, scales, mins, sub_scales, sub_mins] =
                    Coded::sizes(form, n_panels, n_in).map(&mut next);
                Storage::Coded(Coded {
                    form,
                    codes: codes?,
                    high: high?,
                    scales: scales?,
                    mins: mins?,
                    sub_scales: sub_scales?,
                    sub_mins: sub_mins?,
                })
            }
            _ => return Err(MatrixError::Packed { at }),
        };
        Ok((Self { n_out, n_in, storage }, end))
    }
}
