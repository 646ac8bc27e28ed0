//! Loops that do nothing but read, or nothing but multiply: what a thread of this machine can reach. Only benches call
//! them, to show the kernels as fractions of a limit measured in the same run. They use the best instructions found,
//! whatever backend is forced.

use crate::backend;
use crate::simd::{F32, Kernel, Simd, int_lanes, lanes};

/// Independent sums: enough to hide the latency of a multiply-add on any machine so far.
const CHAINS: usize = 12;
/// Multiplications and additions of a step of [`int8`].
pub const INT8_OPERATIONS_PER_STEP: usize = CHAINS * 4 * 16 * 4 * 2;
/// Multiplications and additions of a step of [`prim@f32`].
pub const F32_OPERATIONS_PER_STEP: usize = CHAINS * 16 * 2;

/// Reads every byte once.
pub fn read(data: &[u8]) {
    // SAFETY: the detected backend is available.
    unsafe {
        backend::detect().run(Read(data), |k| std::hint::black_box(k.0.iter().fold(0, |sum, byte| sum ^ byte)).into())
    };
}

/// `steps` times [`INT8_OPERATIONS_PER_STEP`] in int8.
pub fn int8(steps: usize) {
    // SAFETY: the detected backend is available.
    unsafe { backend::detect().run(Int8(steps), |_| ()) };
}

/// `steps` times [`F32_OPERATIONS_PER_STEP`] in f32.
pub fn f32(steps: usize) {
    // SAFETY: the detected backend is available.
    unsafe { backend::detect().run(Floats(steps), |_| ()) };
}

struct Read<'a>(&'a [u8]);

impl Kernel for Read<'_> {
    type Output = i32;

    #[inline(always)]
    unsafe fn run<S: Simd>(self) -> i32 {
        // SAFETY: chunks have 512 bytes.
        unsafe {
            let mut sums = [S::isplat(0); 8];
            for chunk in self.0.chunks_exact(512) {
                for (i, sum) in sums.iter_mut().enumerate() {
                    *sum = S::or(*sum, S::iload(chunk.as_ptr().add(i * 64)));
                }
            }
            std::hint::black_box(sums.map(|sum| int_lanes::<S>(sum)[0])).into_iter().sum()
        }
    }
}

struct Int8(usize);

impl Kernel for Int8 {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: registers only.
        unsafe {
            let mut sums = [S::isplat(0); CHAINS];
            let (codes, mut x) = ([S::isplat(0x0302_0104); 4], S::isplat(0x0101_0101));
            for _ in 0..self.0 {
                for sum in &mut sums {
                    *sum = S::dot(4, *sum, codes, [x; 4]);
                }
                // The operand changes, so that nothing can be computed ahead.
                x = S::iadd(x, codes[0]);
            }
            std::hint::black_box(sums.map(|sum| int_lanes::<S>(sum)[0]));
        }
    }
}

struct Floats(usize);

impl Kernel for Floats {
    type Output = ();

    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the loads stay inside the array.
        unsafe {
            let mut sums = [S::splat(0.0); CHAINS];
            let (half, mut x) = (S::load::<F32>([0.5f32; 16].as_ptr().cast(), 0), S::splat(1.0));
            for _ in 0..self.0 {
                for sum in &mut sums {
                    *sum = S::mul_add(*sum, half, x);
                }
                x = S::add(x, half);
            }
            std::hint::black_box(sums.map(|sum| lanes::<S>(sum)[0]));
        }
    }
}
