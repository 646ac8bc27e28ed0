//! Sixteen lanes at a time, whatever the machine calls them: the one seam between kernels and instruction sets.
//!
//! A kernel is written once against [`Simd`] and stamped for every instruction set by [`Simd::call`], which enters a
//! function compiled for it; everything below is inlined there. A closure, also one given to `array::map`, would not be
//! inlined for sure and its instructions become calls, many times slower: kernels use loops and `inline(always)` functions. Sixteen is the panel width of `matrix`, the page length
//! of `kv` and the number of partial sums of `ops`; a set with narrower registers uses several of them. Decides nothing
//! about results: each operation is exactly defined (IEEE single precision, fused where it says so, or integer).

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;

/// Element kinds of [`Simd::load`] as const parameters.
pub(crate) const F32: u8 = 0;
/// Half precision.
pub(crate) const F16: u8 = 1;
/// bfloat16.
pub(crate) const BF16: u8 = 2;

/// Bytes of a cache line.
pub(crate) const LINE: usize = 64;

/// Brings the cache line of an address, which need not exist, as near as the second cache.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 has the instruction, and it ignores addresses that cannot be read.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// What a kernel does once the instruction set is known.
pub(crate) trait Kernel {
    /// What it returns.
    type Output;

    /// Does it; `#[inline(always)]` in every implementation, so that it is compiled for `S`.
    ///
    /// # Safety
    /// The CPU has the instructions of `S`.
    unsafe fn run<S: Simd>(self) -> Self::Output;
}

/// An instruction set: sixteen f32 ([`Simd::F`]) or sixteen 32-bit integers, also 64 bytes ([`Simd::I`]).
///
/// # Safety
/// Of every function: the CPU has the instructions of the set, and pointers reach as far as the name says; a kernel
/// that was entered through [`Simd::call`] may rely on the first.
pub(crate) trait Simd: Copy {
    /// Sixteen f32.
    type F: Copy;
    /// Sixteen i32, or 64 bytes: four per lane.
    type I: Copy;
    /// Vectors that fit the registers.
    const VECTORS: usize;
    /// [`Simd::dot`] counts 8-bit codes from 128 itself; else it takes them as they are, as it does all shorter codes.
    const CENTRES_8_BIT: bool;

    /// Runs a kernel in a function compiled for this set, not inlined into its caller.
    unsafe fn call<K: Kernel>(kernel: K) -> K::Output;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self::F;
    /// Elements `at..at + 16` of kind `K`, widened exactly.
    unsafe fn load<const K: u8>(base: *const u8, at: usize) -> Self::F;
    /// As `load` for the first `n <= 16` elements; the others are 0 and not read.
    unsafe fn load_first<const K: u8>(base: *const u8, at: usize, n: usize) -> Self::F;
    /// Sixteen values.
    unsafe fn store(to: *mut f32, v: Self::F);
    /// The first `n <= 16` lanes.
    unsafe fn store_first(to: *mut f32, v: Self::F, n: usize);
    /// `a + b`.
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    unsafe fn div(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn mul_add(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `a * b - c`, rounded once.
    unsafe fn mul_sub(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: `b` where either is NaN.
    unsafe fn greater(a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`: `b` where either is NaN.
    unsafe fn smaller(a: Self::F, b: Self::F) -> Self::F;
    /// The sign turned, of NaN too.
    unsafe fn neg(a: Self::F) -> Self::F;
    /// `a` in the first `n <= 16` lanes, `b` in the others.
    unsafe fn select_first(n: usize, a: Self::F, b: Self::F) -> Self::F;
    /// `a > b` picks `yes` (with its index lanes), else `no`.
    unsafe fn select_greater(
        a: Self::F,
        b: Self::F,
        yes: (Self::F, Self::I),
        no: (Self::F, Self::I),
    ) -> (Self::F, Self::I);
    /// Nearest integers, ties to even.
    unsafe fn round(a: Self::F) -> Self::I;
    /// As f32, rounded to nearest.
    unsafe fn float(a: Self::I) -> Self::F;
    /// `2^n` for `n` from -126 to 127.
    unsafe fn power_of_two(n: Self::I) -> Self::F;
    /// The bits.
    unsafe fn bits(a: Self::F) -> Self::I;

    /// All lanes `x`.
    unsafe fn isplat(x: i32) -> Self::I;
    /// 64 bytes.
    unsafe fn iload(from: *const u8) -> Self::I;
    /// 64 bytes.
    unsafe fn istore(to: *mut i32, v: Self::I);
    /// Sixteen i8, sign-extended.
    unsafe fn widen_i8(from: *const u8) -> Self::I;
    /// The low byte of each lane.
    unsafe fn narrow_i8(to: *mut i8, v: Self::I);
    /// Lane by lane.
    unsafe fn iadd(a: Self::I, b: Self::I) -> Self::I;
    /// Lane by lane.
    unsafe fn isub(a: Self::I, b: Self::I) -> Self::I;
    /// The larger, as unsigned numbers.
    unsafe fn umax(a: Self::I, b: Self::I) -> Self::I;
    /// The largest lane, as unsigned numbers.
    unsafe fn largest(a: Self::I) -> u32;
    /// The sum of all lanes, which fits.
    unsafe fn total(a: Self::I) -> i32;
    /// `a >> 1`, towards negative infinity.
    unsafe fn half(a: Self::I) -> Self::I;
    /// Bit by bit.
    unsafe fn and(a: Self::I, b: Self::I) -> Self::I;
    /// Bit by bit.
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;
    /// Each lane shifted right by `n < 32`, zeros coming in.
    unsafe fn shift_right(a: Self::I, n: usize) -> Self::I;
    /// Each lane shifted left by `n < 32`.
    unsafe fn shift_left(a: Self::I, n: usize) -> Self::I;

    /// Per lane, the sum over four quads of unsigned codes (below `2^bits`) times signed activations (above -128), the
    /// four bytes of a lane each, plus `acc`. Exact: nothing saturates. `bits` is a constant of the caller.
    unsafe fn dot(bits: u32, acc: Self::I, codes: [Self::I; 4], x: [Self::I; 4]) -> Self::I;

    /// A value per lane `l`: lane `l >> shift` of `a`.
    unsafe fn spread(a: Self::F, shift: u32) -> Self::F;
}

/// The 16 lanes of a vector.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn lanes<S: Simd>(v: S::F) -> [f32; 16] {
    let mut out = [0.0; 16];
    // SAFETY: the array takes 16 values; the rest is the contract of this function.
    unsafe { S::store(out.as_mut_ptr(), v) };
    out
}

/// The 16 lanes of a vector of integers.
///
/// # Safety
/// The CPU has the instructions of `S`.
#[inline(always)]
pub(crate) unsafe fn int_lanes<S: Simd>(v: S::I) -> [i32; 16] {
    let mut out = [0; 16];
    // SAFETY: the array takes 16 values; the rest is the contract of this function.
    unsafe { S::istore(out.as_mut_ptr(), v) };
    out
}

/// Stamps trait functions whose body is one expression under the trait's contract.
macro_rules! instructions {
    ($($(#[$meta:meta])* fn $name:ident $(<const $c:ident: $ct:ty>)? ($($arg:ident: $t:ty),* $(,)?) $(-> $r:ty)? $body:block)*) => {
        $(
            $(#[$meta])*
            #[inline(always)]
            unsafe fn $name $(<const $c: $ct>)? ($($arg: $t),*) $(-> $r)? {
                // SAFETY: the contract of the trait: the instructions exist and the pointers reach far enough.
                unsafe { $body }
            }
        )*
    };
}
pub(crate) use instructions;
