//! AVX-512 backend of the product: integer dot products in `int8`, f32 in `dense`.

pub(super) mod int8;
pub(super) mod dense;
