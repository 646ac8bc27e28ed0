// What the kernels share: exact arithmetic, numbers in two f16 parts, the tensor-core product.
//
// Arithmetic names its rounding (`__fmaf_rn`, `__fmul_rn`, …), so that nvcc contracts nothing and the row-wise kernels
// give the bits of the scalar reference. Tensor cores take f16: an f32 operand is scaled by a power of two that
// brings the largest value of its vector to [2^14, 2^15), and split into its f16 rounding and the f16 rounding of the
// rest, which keeps 22 bits and needs two products.
#pragma once

#include "params.h"

#ifdef TENANTRY_EMULATION
#include "emulation.h"
#else
#define SYNC(id) __syncthreads()
#define SYNC_WARP(id) __syncwarp()
extern __shared__ __align__(16) unsigned char shared_bytes[];
#define SHARED_BYTES shared_bytes

static __device__ __forceinline__ uint16_t f16_bits(float x) {
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

static __device__ __forceinline__ float f16_value(uint16_t bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}

static __device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// c [16 rows][8 columns] += a [16][16] b [16][8]; fragments as PTX lays mma.m16n8k16 out.
static __device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// In every kernel, before any thread may return: waits until all kernels before this one have ended and what they wrote is
// seen. Only frozen weights may be read before it. Devices before sm_90 start a kernel when the one before has ended.
static __device__ __forceinline__ void await_kernels_before() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the blocks of the next kernel be started beside those of this one. For kernels that leave the device empty: beside
// a large one they would crowd where its first blocks ended.
static __device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Copies 16 bytes from global to shared memory; they are there after an `async_wait` for the group they were committed in.
static __device__ __forceinline__ void async_copy(void* to, const void* from) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(from) : "memory");
}

static __device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last `left`.
template <uint32_t left>
static __device__ __forceinline__ void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}

// c [16 rows][8 columns] += a [16][32] b [32][8] in integers; fragments as PTX lays mma.m16n8k32 out. `unsigned_a` says
// how the bytes of a are read; those of b have a sign.
template <bool unsigned_a>
static __device__ __forceinline__ void mma_int(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    if (unsigned_a) {
        asm(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// As above with 16 inputs, all bytes with a sign: mma.m16n8k16.
static __device__ __forceinline__ void mma_int_short(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}
#endif

static __device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }
static __device__ __forceinline__ float of_bits(uint32_t bits) { return __uint_as_float(bits); }
static __device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }

// 2^n for -126 <= n <= 127.
static __device__ __forceinline__ float power_of_two(int n) { return of_bits(static_cast<uint32_t>(n + 127) << 23); }

// The power of two that brings `max` (not negative) to [2^14, 2^15), as exponent. Bounded so that its inverse exists.
static __device__ __forceinline__ int scale_exponent(float max) {
    const int shift = 141 - static_cast<int>(bits_of(max) >> 23);
    return shift < -120 ? -120 : shift > 120 ? 120 : shift;
}

// The f16 rounding of x in the low half, that of the rest in the high half.
static __device__ __forceinline__ uint32_t in_two_parts(float x) {
    const uint16_t high = f16_bits(x);
    const uint16_t low = f16_bits(__fsub_rn(x, f16_value(high)));
    return static_cast<uint32_t>(high) | static_cast<uint32_t>(low) << 16;
}

// The first parts of two numbers, and the rests.
static __device__ __forceinline__ uint32_t firsts(uint32_t x, uint32_t y) { return (x & 0xffffu) | y << 16; }
static __device__ __forceinline__ uint32_t rests(uint32_t x, uint32_t y) { return x >> 16 | (y & 0xffff0000u); }

static __device__ __forceinline__ uint32_t shuffle_bits(uint32_t x, int mask) {
    return bits_of(shuffle_xor(of_bits(x), mask));
}

static __device__ __forceinline__ float max_over_warp(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

static __device__ __forceinline__ float sum_over_warp(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x = __fadd_rn(x, shuffle_xor(x, mask));
    return x;
}

// e^x, the same operations as `ops::exp` and so the same bits.
static __device__ __forceinline__ float exp_exactly(float x) {
    x = x < -110.0f ? -110.0f : x;
    x = x > 100.0f ? 100.0f : x;
    const float n = rintf(__fmul_rn(x, 1.44269504088896340736f));
    const float r = __fmaf_rn(n, 2.1219444e-4f, __fmaf_rn(n, -355.0f / 512.0f, x));
    float p = 1.9875691e-4f;
    p = __fmaf_rn(p, r, 1.3981999e-3f);
    p = __fmaf_rn(p, r, 8.333452e-3f);
    p = __fmaf_rn(p, r, 4.1665796e-2f);
    p = __fmaf_rn(p, r, 1.6666665e-1f);
    p = __fmaf_rn(p, r, 0.5f);
    p = __fadd_rn(__fmaf_rn(p, __fmul_rn(r, r), r), 1.0f);
    // NaN converts to some integer; the product stays NaN.
    const int whole = static_cast<int>(n == n ? n : 0.0f);
    const int first = whole >> 1;
    return __fmul_rn(__fmul_rn(p, power_of_two(first)), power_of_two(whole - first));
}
