//! The product for every instruction set: integer dot products in `int8`, f32 in `dense`.

pub(super) mod int8;
pub(super) mod dense;
