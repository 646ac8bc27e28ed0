// Activations rounded to 8 bits with a scale per block of 32 inputs, the rule of `src/matmul/quantise.rs` and so its bits.
//
// Eight rows and 64 inputs make a record of CODED_ROWS bytes, laid out as a tensor-core product wants its second operand:
//   512  codes: lane 4 * row + quad holds inputs 4 * quad to + 3, then 16 + those, of the first 32 inputs, then of the others
//   128  per pair of rows, row and half of the record: the scale, and the scale times the sum of the codes
//    64  per pair of rows, row and half of the record: the scale times the sum of the first 16 codes
#pragma once

#include "common.cuh"

// Records lie [64 inputs][eight rows], so that what a block of a product reads at a time is one stretch.
//
// Rounds 32 consecutive inputs of a row, one per lane of a warp; `block` counts 32 inputs, `codes` are all records.
static __device__ __forceinline__ void round_block(float x, unsigned char* codes, uint64_t row, uint32_t block,
                                                   uint32_t n_tiles) {
    const uint32_t lane = threadIdx.x % 32;
    // Compared as integers, so that a NaN or infinity wins.
    uint32_t max = bits_of(fabsf(x));
    for (int mask = 16; mask > 0; mask /= 2) {
        const uint32_t other = shuffle_bits(max, mask);
        max = max < other ? other : max;
    }
    const bool damaged = max >= 0x7f800000u, tiny = max < 27u << 23;
    const float m = of_bits(max);
    const float scale = damaged ? of_bits(0x7fc00000u) : tiny ? 0.0f : __fdiv_rn(m, 127.0f);
    const float inverse = damaged || tiny ? 0.0f : __fdiv_rn(127.0f, m);
    const int code = damaged ? 0 : static_cast<int>(rintf(__fmul_rn(x, inverse)));
    int half = code;
    for (int mask = 8; mask > 0; mask /= 2) half += static_cast<int>(shuffle_bits(static_cast<uint32_t>(half), mask));
    const int whole = half + static_cast<int>(shuffle_bits(static_cast<uint32_t>(half), 16));
    uint32_t word = (static_cast<uint32_t>(code) & 0xffu) << (lane % 4 * 8);
    word |= shuffle_bits(word, 1);
    word |= shuffle_bits(word, 2);
    unsigned char* record = codes + (static_cast<uint64_t>(block / 2) * n_tiles + row / 8) * CODED_ROWS;
    const uint32_t place = static_cast<uint32_t>(row % 8), side = block % 2;
    if (lane % 4 == 0) {
        const uint32_t to = (place * 4 + lane % 16 / 4) * 16 + side * 8 + lane / 16 * 4;
        *reinterpret_cast<uint32_t*>(record + to) = word;
    }
    if (lane == 0) {
        float* factors = reinterpret_cast<float*>(record + 512) + place * 4 + side * 2;
        factors[0] = scale;
        factors[1] = __fmul_rn(scale, static_cast<float>(whole));
        reinterpret_cast<float*>(record + 640)[place * 2 + side] = __fmul_rn(scale, static_cast<float>(half));
    }
}
