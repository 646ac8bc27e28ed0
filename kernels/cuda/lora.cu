// Batched adapter deltas, y += scale * B(A x), ranks 1 to 256 mixed, up to three layers of the same inputs in a launch. Reference: `src/lora/scalar.rs`.
//
//   shrink  block (tile, chunk of CHUNK inputs, RANKS ranks of a layer): each of four warps takes a quarter of the chunk on tensor
//           cores; the quarters are added as (0 + 1) + (2 + 3) and stored as one partial sum per chunk.
//   expand  block (tile, COLUMNS outputs of a layer): adds the partial sums in the order of the chunks, multiplies by B, ends
//           y = fma(scale, delta, y) and, for DoRA, y *= row_scale.
//
// A row's bits depend on the row and its pair alone: chunks and quarters lie at fixed inputs, a tensor-core product
// computes each row of a tile from that row, and a short segment takes the same path as a tall one. Rows of a tile
// beyond its segment count as zeros and are never stored.
//
// The order of inputs inside a fragment is permuted (a lane reads eight consecutive ones), alike for both operands.
#include "common.cuh"

namespace {

// Inputs per warp of a shrink block.
constexpr uint32_t QUARTER = CHUNK / 4;
// Values from one row of an expand block's shared ranks to the next: a multiple of 32 plus 16, so that the lanes of a
// quarter-warp read different banks.
constexpr uint32_t SHRUNK_PITCH = 256 + 16;

// Eight consecutive inputs of a row.
struct Eight {
    float values[8];
};

__device__ __forceinline__ Eight load_eight(const float* x, bool exists) {
    Eight e = {};
    if (exists) {
        const float4 low = *reinterpret_cast<const float4*>(x);
        const float4 high = *reinterpret_cast<const float4*>(x + 4);
        e.values[0] = low.x, e.values[1] = low.y, e.values[2] = low.z, e.values[3] = low.w;
        e.values[4] = high.x, e.values[5] = high.y, e.values[6] = high.z, e.values[7] = high.w;
    }
    return e;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lora_shrink(const __grid_constant__ LoraParams p) {
    await_kernels_before();
    const LoraTile tile = p.tiles[blockIdx.x];
    const LoraLayer& layer = p.layers[blockIdx.z % p.n_layers];
    const LoraPairDesc pair = p.pairs[tile.segment * p.n_pairs + layer.pair];
    const uint32_t first_rank = blockIdx.z / p.n_layers * RANKS;
    if (first_rank >= pair.rank) return;
    constexpr uint32_t STEPS = QUARTER / 32;
    float* maxima = reinterpret_cast<float*>(SHARED_BYTES);                       // [4 warps][TILE]
    float* sums = reinterpret_cast<float*>(SHARED_BYTES) + 4 * TILE;              // [4 warps][TILE][RANKS]
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const uint32_t begin = blockIdx.y * CHUNK, end = smaller(begin + CHUNK, p.n_in);
    const uint32_t first_k = begin + warp * QUARTER + quad * 8;
    // All loads first: a decoding row is bound by the latency of memory, not by its speed.
    const float* low_row = p.x + static_cast<uint64_t>(tile.row + group) * p.n_in;
    const float* high_row = low_row + static_cast<uint64_t>(8) * p.n_in;
    Eight low[STEPS], high[STEPS];
    uint4 a[STEPS][RANKS / 8];
#pragma unroll
    for (uint32_t step = 0; step < STEPS; ++step) {
        const uint32_t k = first_k + step * 32;
        low[step] = load_eight(low_row + k, k < end && group < tile.n_rows);
        high[step] = load_eight(high_row + k, k < end && group + 8 < tile.n_rows);
#pragma unroll
        for (uint32_t n = 0; n < RANKS / 8; ++n) {
            const uint32_t rank = first_rank + n * 8 + group;
            a[step][n] = {0, 0, 0, 0};
            if (rank < pair.rank && k < end) {
                a[step][n] = *reinterpret_cast<const uint4*>(pair.a + static_cast<uint64_t>(rank) * pair.a_pitch + k);
            }
        }
    }

    // The powers of two that scale the rows, by the largest of a row in the whole chunk.
    float low_max = 0.0f, high_max = 0.0f;
#pragma unroll
    for (uint32_t i = 0; i < STEPS * 8; ++i) {
        low_max = fmaxf(low_max, fabsf(low[i / 8].values[i % 8]));
        high_max = fmaxf(high_max, fabsf(high[i / 8].values[i % 8]));
    }
    for (int mask = 2; mask > 0; mask /= 2) {
        low_max = fmaxf(low_max, shuffle_xor(low_max, mask));
        high_max = fmaxf(high_max, shuffle_xor(high_max, mask));
    }
    if (quad == 0) maxima[warp * TILE + group] = low_max, maxima[warp * TILE + group + 8] = high_max;
    SYNC(1);
    const auto exponent_of = [maxima](uint32_t row) {
        return scale_exponent(fmaxf(fmaxf(maxima[row], maxima[TILE + row]), fmaxf(maxima[2 * TILE + row], maxima[3 * TILE + row])));
    };

    const float low_scale = power_of_two(exponent_of(group)), high_scale = power_of_two(exponent_of(group + 8));
    float acc[RANKS / 8][4] = {};
#pragma unroll
    for (uint32_t step = 0; step < STEPS; ++step) {
        uint32_t low_parts[8], high_parts[8];
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            low_parts[i] = in_two_parts(__fmul_rn(low[step].values[i], low_scale));
            high_parts[i] = in_two_parts(__fmul_rn(high[step].values[i], high_scale));
        }
        uint32_t first[2][4], rest[2][4];
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
            const uint32_t i = half * 4;
            first[half][0] = firsts(low_parts[i], low_parts[i + 1]), rest[half][0] = rests(low_parts[i], low_parts[i + 1]);
            first[half][1] = firsts(high_parts[i], high_parts[i + 1]), rest[half][1] = rests(high_parts[i], high_parts[i + 1]);
            first[half][2] = firsts(low_parts[i + 2], low_parts[i + 3]), rest[half][2] = rests(low_parts[i + 2], low_parts[i + 3]);
            first[half][3] = firsts(high_parts[i + 2], high_parts[i + 3]), rest[half][3] = rests(high_parts[i + 2], high_parts[i + 3]);
        }
#pragma unroll
        for (uint32_t n = 0; n < RANKS / 8; ++n) {
            if (first_rank + n * 8 >= pair.rank) break;
            mma(acc[n], first[0], a[step][n].x, a[step][n].y);
            mma(acc[n], rest[0], a[step][n].x, a[step][n].y);
            mma(acc[n], first[1], a[step][n].z, a[step][n].w);
            mma(acc[n], rest[1], a[step][n].z, a[step][n].w);
            if (pair.planes == 2) {
                const uint32_t rank = first_rank + n * 8 + group, k = first_k + step * 32;
                uint4 left = {0, 0, 0, 0};
                if (rank < pair.rank && k < end) {
                    left = *reinterpret_cast<const uint4*>(pair.a + static_cast<uint64_t>(pair.rank + rank) * pair.a_pitch + k);
                }
                mma(acc[n], first[0], left.x, left.y);
                mma(acc[n], first[1], left.z, left.w);
            }
        }
    }

#pragma unroll
    for (uint32_t n = 0; n < RANKS / 8; ++n) {
        float* to = sums + (warp * TILE + group) * RANKS + n * 8 + quad * 2;
        to[0] = acc[n][0], to[1] = acc[n][1];
        to[8 * RANKS] = acc[n][2], to[8 * RANKS + 1] = acc[n][3];
    }
    SYNC(2);
    for (uint32_t i = threadIdx.x; i < TILE * RANKS; i += THREADS) {
        const uint32_t row = i / RANKS, rank = first_rank + i % RANKS;
        if (row >= tile.n_rows || rank >= pair.rank) continue;
        const float lower = __fadd_rn(sums[i], sums[TILE * RANKS + i]);
        const float upper = __fadd_rn(sums[2 * TILE * RANKS + i], sums[3 * TILE * RANKS + i]);
        const float sum = __fmul_rn(__fadd_rn(lower, upper), power_of_two(-exponent_of(row)));
        const uint64_t place = static_cast<uint64_t>(blockIdx.y) * p.n_rows + tile.row + row;
        layer.partial[place * p.stride + rank] = __fmul_rn(sum, pair.a_inverse);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) lora_expand(const __grid_constant__ LoraParams p) {
    await_kernels_before();
    const LoraTile tile = p.tiles[blockIdx.x];
    uint32_t index = 0;
    while (index + 1 < p.n_layers && blockIdx.y >= p.layers[index + 1].first_block) ++index;
    const LoraLayer& layer = p.layers[index];
    const LoraPairDesc pair = p.pairs[tile.segment * p.n_pairs + layer.pair];
    if (pair.rank == 0) return;
    int* exponents = reinterpret_cast<int*>(SHARED_BYTES);                               // [TILE]
    uint32_t* shrunk = reinterpret_cast<uint32_t*>(SHARED_BYTES + TILE * sizeof(int));  // [TILE][SHRUNK_PITCH], split
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const uint32_t padded = (pair.rank + 15) / 16 * 16;
    const uint32_t first_column = (blockIdx.y - layer.first_block) * COLUMNS + warp * 32;
    const auto load_b = [&](uint32_t n, uint32_t k, uint32_t plane) {
        const uint32_t column = first_column + n * 8 + group;
        uint2 b = {0, 0};
        if (column < layer.n_out && k < pair.b_pitch) {
            b = *reinterpret_cast<const uint2*>(pair.b + static_cast<uint64_t>(plane * layer.n_out + column) * pair.b_pitch + k);
        }
        return b;
    };
    // What does not depend on the ranks is loaded before them.
    uint2 b[4];
    float y[16];
#pragma unroll
    for (uint32_t n = 0; n < 4; ++n) b[n] = load_b(n, quad * 4, 0);
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
        const uint32_t row = group + i % 4 / 2 * 8, column = first_column + i / 4 * 8 + quad * 2 + i % 2;
        y[i] = 0.0f;
        if (row < tile.n_rows && column < layer.n_out) {
            y[i] = layer.y[static_cast<uint64_t>(tile.row + row) * layer.n_out + column];
        }
    }
    for (uint32_t i = threadIdx.x; i < tile.n_rows * padded; i += THREADS) {
        const uint32_t row = i / padded, rank = i % padded;
        float sum = 0.0f;
        if (rank < pair.rank) {
            const float* from = layer.partial + static_cast<uint64_t>(tile.row + row) * p.stride + rank;
#pragma unroll 8
            for (uint32_t chunk = 0; chunk < p.n_chunks; ++chunk) {
                sum = __fadd_rn(sum, from[static_cast<uint64_t>(chunk) * p.n_rows * p.stride]);
            }
        }
        shrunk[row * SHRUNK_PITCH + rank] = bits_of(sum);
    }
    SYNC(3);
    for (uint32_t row = warp; row < tile.n_rows; row += 4) {
        uint32_t* values = shrunk + row * SHRUNK_PITCH;
        float max = 0.0f;
        for (uint32_t rank = lane; rank < padded; rank += 32) max = fmaxf(max, fabsf(of_bits(values[rank])));
        max = max_over_warp(max);
        const int exponent = scale_exponent(max);
        if (lane == 0) exponents[row] = exponent;
        for (uint32_t rank = lane; rank < padded; rank += 32) {
            values[rank] = in_two_parts(__fmul_rn(of_bits(values[rank]), power_of_two(exponent)));
        }
    }
    SYNC(12);

    float acc[4][4] = {};
    for (uint32_t k = quad * 4; k < padded; k += 16) {
        const uint4 low = *reinterpret_cast<const uint4*>(shrunk + group * SHRUNK_PITCH + k);
        const uint4 high = *reinterpret_cast<const uint4*>(shrunk + (group + 8) * SHRUNK_PITCH + k);
        const uint32_t first[4] = {firsts(low.x, low.y), firsts(high.x, high.y), firsts(low.z, low.w),
                                   firsts(high.z, high.w)};
        const uint32_t rest[4] = {rests(low.x, low.y), rests(high.x, high.y), rests(low.z, low.w),
                                  rests(high.z, high.w)};
#pragma unroll
        for (uint32_t n = 0; n < 4; ++n) {
            const uint2 now = b[n];
            b[n] = load_b(n, k + 16, 0);
            mma(acc[n], first, now.x, now.y);
            mma(acc[n], rest, now.x, now.y);
            if (pair.planes == 2) {
                const uint2 left = load_b(n, k, 1);
                mma(acc[n], first, left.x, left.y);
            }
        }
    }

#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
        const uint32_t n = i / 4, part = i % 4;
        const uint32_t row = group + part / 2 * 8, column = first_column + n * 8 + quad * 2 + part % 2;
        if (row >= tile.n_rows || column >= layer.n_out) continue;
        const float delta = __fmul_rn(__fmul_rn(acc[n][part], power_of_two(-exponents[row])), pair.b_inverse);
        const float sum = __fmaf_rn(pair.scale, delta, y[i]);
        layer.y[static_cast<uint64_t>(tile.row + row) * layer.n_out + column] =
            pair.row_scale != nullptr ? __fmul_rn(sum, pair.row_scale[column]) : sum;
    }
}
