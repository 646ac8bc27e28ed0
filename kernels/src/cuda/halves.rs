//! Numbers in f16 parts: scaled by a power of two that brings the largest of a matrix to [2^14, 2^15), then rounded to f16,
//! with what that left over in a second part where 22 bits are wanted. Adapters and dense weights are kept so.

use half::f16;

/// The power of two for values up to `max` (not negative), and its inverse.
pub(super) fn scale_of(max: f32) -> (f32, f32) {
    // As in the kernels: within bounds that keep the inverse a normal number.
    let exponent = (141 - (max.to_bits() >> 23) as i32).clamp(-120, 120);
    (2f32.powi(exponent), 2f32.powi(-exponent))
}

/// The f16 bits of a scaled value, and of the rest.
pub(super) fn parts(value: f32, scale: f32) -> (u16, u16) {
    let high = f16::from_f32(value * scale);
    (high.to_bits(), f16::from_f32(value * scale - high.to_f32()).to_bits())
}
