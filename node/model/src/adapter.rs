//! A tenant's LoRA adapter: from untrusted files to packed matrices.
//!
//! Files are checked in full before anything is allocated from their claims ([`check`]), then packed into
//! the layout the kernels want. What comes out computes exactly what PEFT would, or the file is refused by
//! naming the field. GGUF LoRA files take the same road.

use kernels::lora::LoraPair;
use shared::hash::ContentHash;

use crate::info::Linear;

/// A packed adapter, ready for the forward pass. Its memory is cleared when it is dropped.
#[derive(Debug)]
pub struct LoraAdapter {
    /// Content hash of the files it came from.
    pub hash: ContentHash,
    /// Per transformer layer, in the order of [`Linear::ALL`]; `None` leaves the base layer alone.
    pub layers: Vec<[Option<LoraPair>; 7]>,
    /// Largest rank in it.
    pub rank_max: usize,
    /// Bytes of engine memory.
    pub bytes: usize,
}

impl LoraAdapter {
    /// The pair for one linear layer.
    pub fn pair(&self, layer: usize, linear: Linear) -> Option<&LoraPair> {
        self.layers.get(layer).and_then(|pairs| pairs[linear as usize].as_ref())
    }
}
