//! The CUDA kernels, emulated on the CPU behind their safe entries, against the scalar reference of the CPU kernels.
//! What this cannot show: timing, the rounding inside a tensor core, and the driver calls. `cuda_device.rs` runs the same
//! cases on a device.

mod cuda {
    pub(super) mod attention;
    pub(super) mod barriers;
    pub(super) mod layer;
    pub(super) mod lora;
    pub(super) mod matmul;
    pub(super) mod rows;
    pub(super) mod support;
}

use half::f16;
use kernels::cuda::emulation;

/// What the cases run on: the emulation.
mod executor {
    pub(crate) use kernels::cuda::emulation::Emulated as Executor;

    /// Whole tiles, from the first thread to the last.
    pub(crate) const PLAIN: Executor = Executor { backwards: false, skip_barrier: 0, blocks_to_fill: 0 };
    /// Cuts work into as many blocks as it can, and runs threads from the last to the first.
    pub(crate) const CUT: Executor = Executor { backwards: true, skip_barrier: 0, blocks_to_fill: usize::MAX };

    /// The emulation is always there.
    pub(crate) const fn absent() -> bool {
        false
    }
}

#[test]
fn both_sides_agree_on_layouts_and_constants() {
    for (name, ours, theirs) in emulation::facts() {
        assert_eq!(ours, theirs, "{name}");
    }
}

#[test]
fn half_precision_of_the_emulation_is_that_of_ieee() {
    for bits in 0..=u16::MAX {
        let value = f16::from_bits(bits).to_f32();
        let read = emulation::f16_value(bits);
        assert!(read.to_bits() == value.to_bits() || read.is_nan() && value.is_nan(), "{bits:#x}");
        // The value, its neighbours in f32, and the middle between it and the next f16 with its neighbours.
        let middle = (value + f16::from_bits(bits.wrapping_add(1)).to_f32()) / 2.0;
        for around in [value, middle] {
            for offset in [-1i32, 0, 1] {
                let x = f32::from_bits(around.to_bits().wrapping_add_signed(offset));
                let (got, wanted) = (emulation::f16_bits(x), f16::from_f32(x));
                assert!(got == wanted.to_bits() || wanted.is_nan() && f16::from_bits(got).is_nan(), "{x:e}");
            }
        }
    }
}
