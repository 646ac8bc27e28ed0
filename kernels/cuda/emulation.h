// CUDA on one CPU thread, to check the kernels where no GPU is: the same sources, compiled as C++17.
//
// A fiber per CUDA thread, blocks one after the other. A fiber runs until it ends or waits: for the block at `SYNC`, or
// for its warp in a shuffle or tensor-core product. A warp runs as far as it can before the next begins. Shared memory
// starts as NaN in every block, and the order of warps and lanes can be turned round; so a missing barrier shows as
// NaN or as different bits. What can never go on
// (a barrier that some threads skip, lanes in different operations) is an error with the block and thread in it.
// A launch may leave out one barrier by its number, which is how the tests show that each is needed and missed.
//
// What it does not do: a read beyond a buffer in global memory goes unnoticed unless its value reaches a result (beyond
// shared memory, a write is noticed); lanes of a warp do not run in step, atomics are absent (no kernel uses
// them), an asynchronous copy happens when its thread waits for it and not before, and `mma` adds its products in ascending order with one rounding each, where a tensor core has an order and
// rounding of its own. x86-64 with the System V calling convention only: the switch between fibers is assembly.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if !defined(__x86_64__) || defined(_WIN32)
#error "the emulation switches fibers in x86-64 System V assembly; build without the feature cuda-emulation"
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct float4 { float x, y, z, w; };
struct uint4 { uint32_t x, y, z, w; };
struct uint2 { uint32_t x, y; };

namespace emulation {

struct Dim { uint32_t x, y, z; };

// The operations in which a warp waits for all its lanes.
enum class Collective : uint32_t { shuffle_xor, mma, mma_int, sync };

void wait_for_block(uint32_t id);
// Hands `argument` over; returns when the last lane of the warp has come and computed the operation for all.
void wait_for_warp(Collective operation, void* argument);

void wait_for_warp_barrier(uint32_t id);
void async_copy(void* to, const void* from);
void async_commit();
void async_wait(uint32_t left);

uint16_t f16_bits(float x);
float f16_value(uint16_t bits);

struct Shuffle { float value; uint32_t mask; float result; };
struct Mma { float* c; const uint32_t* a; uint32_t b[2]; };
// `k` is 32, or 16 with two words of a and one of b.
struct MmaInt { int32_t* c; uint32_t a[4]; uint32_t b[2]; uint32_t k; bool unsigned_a; };

extern thread_local Dim thread_index, block_index, grid_size;
extern thread_local unsigned char* shared_bytes;

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define SHARED_BYTES emulation::shared_bytes
#define SYNC(id) emulation::wait_for_block(id)
#define SYNC_WARP(id) emulation::wait_for_warp_barrier(id)

static inline void async_copy(void* to, const void* from) { emulation::async_copy(to, from); }
static inline void async_commit() { emulation::async_commit(); }
template <uint32_t left>
static inline void async_wait() {
    emulation::async_wait(left);
}

static inline void await_kernels_before() {}
static inline void let_next_start() {}
static inline uint16_t f16_bits(float x) { return emulation::f16_bits(x); }
static inline float f16_value(uint16_t bits) { return emulation::f16_value(bits); }

static inline float shuffle_xor(float x, int mask) {
    emulation::Shuffle shuffle{x, static_cast<uint32_t>(mask), 0.0f};
    emulation::wait_for_warp(emulation::Collective::shuffle_xor, &shuffle);
    return shuffle.result;
}

static inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::Mma product{c, a, {b0, b1}};
    emulation::wait_for_warp(emulation::Collective::mma, &product);
}

template <bool unsigned_a>
static inline void mma_int(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::MmaInt product{c, {a[0], a[1], a[2], a[3]}, {b0, b1}, 32, unsigned_a};
    emulation::wait_for_warp(emulation::Collective::mma_int, &product);
}

static inline void mma_int_short(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    emulation::MmaInt product{c, {a0, a1, 0, 0}, {b, 0}, 16, false};
    emulation::wait_for_warp(emulation::Collective::mma_int, &product);
}

// Named roundings: the compiler is told to contract nothing, so plain operators have one rounding each.
static inline float __fadd_rn(float x, float y) { return x + y; }
static inline float __fsub_rn(float x, float y) { return x - y; }
static inline float __fmul_rn(float x, float y) { return x * y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fsqrt_rn(float x) { return std::sqrt(x); }
static inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
static inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
static inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
