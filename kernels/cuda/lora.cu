// Batched adapter deltas, y += scale * B(A x), ranks 1 to 256 mixed. Reference: `src/lora/scalar.rs`.
//
//   shrink  block (tile, chunk of CHUNK inputs, RANKS ranks): each of four warps takes a quarter of the chunk on tensor
//           cores; the quarters are added as (0 + 1) + (2 + 3) and stored as one partial sum per chunk.
//   expand  block (tile, COLUMNS outputs): adds the partial sums in the order of the chunks, multiplies by B, ends
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

// Eight consecutive inputs of a row, scaled and split: words i is input i; zeros where there is no such row or input.
__device__ __forceinline__ void eight_parts(const float* x, bool exists, float scale, uint32_t (&parts)[8]) {
    float values[8] = {};
    if (exists) {
        const float4 low = *reinterpret_cast<const float4*>(x);
        const float4 high = *reinterpret_cast<const float4*>(x + 4);
        values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
        values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) parts[i] = in_two_parts(__fmul_rn(values[i], scale));
}

// The exponents of the powers of two that scale a tile's rows over one chunk of inputs.
__device__ __forceinline__ void find_exponents(const LoraParams& p, const LoraTile& tile, uint32_t begin, uint32_t end,
                                               int* exponents) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t row = warp * 4; row < warp * 4 + 4; ++row) {
        float max = 0.0f;
        if (row < tile.n_rows) {
            const float* x = p.x + static_cast<uint64_t>(tile.row + row) * p.n_in;
            for (uint32_t k = begin + lane; k < end; k += 32) max = fmaxf(max, fabsf(x[k]));
        }
        max = max_over_warp(max);
        if (lane == 0) exponents[row] = scale_exponent(max);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) lora_shrink(const LoraParams p) {
    const LoraTile tile = p.tiles[blockIdx.x];
    const LoraPairDesc pair = p.pairs[tile.segment];
    const uint32_t first_rank = blockIdx.z * RANKS;
    if (first_rank >= pair.rank) return;
    int* exponents = reinterpret_cast<int*>(SHARED_BYTES);                      // [TILE]
    float* sums = reinterpret_cast<float*>(SHARED_BYTES + TILE * sizeof(int));  // [4 warps][TILE][RANKS]
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const uint32_t begin = blockIdx.y * CHUNK, end = smaller(begin + CHUNK, p.n_in);
    find_exponents(p, tile, begin, end, exponents);
    SYNC(1);

    const float low_scale = power_of_two(exponents[group]), high_scale = power_of_two(exponents[group + 8]);
    const float* low_row = p.x + static_cast<uint64_t>(tile.row + group) * p.n_in;
    const float* high_row = low_row + static_cast<uint64_t>(8) * p.n_in;
    float acc[RANKS / 8][4] = {};
    for (uint32_t step = 0; step < QUARTER / 32; ++step) {
        const uint32_t k = begin + warp * QUARTER + step * 32 + quad * 8;
        uint32_t low[8], high[8];
        eight_parts(low_row + k, k < end && group < tile.n_rows, low_scale, low);
        eight_parts(high_row + k, k < end && group + 8 < tile.n_rows, high_scale, high);
        uint32_t first[2][4], rest[2][4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int i = half * 4;
            first[half][0] = firsts(low[i], low[i + 1]), rest[half][0] = rests(low[i], low[i + 1]);
            first[half][1] = firsts(high[i], high[i + 1]), rest[half][1] = rests(high[i], high[i + 1]);
            first[half][2] = firsts(low[i + 2], low[i + 3]), rest[half][2] = rests(low[i + 2], low[i + 3]);
            first[half][3] = firsts(high[i + 2], high[i + 3]), rest[half][3] = rests(high[i + 2], high[i + 3]);
        }
#pragma unroll
        for (uint32_t n = 0; n < RANKS / 8; ++n) {
            if (first_rank + n * 8 >= pair.rank) break;
            const uint32_t rank = first_rank + n * 8 + group;
            const uint16_t* at = pair.a + static_cast<uint64_t>(rank) * pair.a_pitch + k;
            const bool exists = rank < pair.rank && k < end;
            uint4 a = {0, 0, 0, 0};
            if (exists) a = *reinterpret_cast<const uint4*>(at);
            mma(acc[n], first[0], a.x, a.y);
            mma(acc[n], rest[0], a.x, a.y);
            mma(acc[n], first[1], a.z, a.w);
            mma(acc[n], rest[1], a.z, a.w);
            if (pair.planes == 2) {
                if (exists) a = *reinterpret_cast<const uint4*>(at + static_cast<uint64_t>(pair.rank) * pair.a_pitch);
                mma(acc[n], first[0], a.x, a.y);
                mma(acc[n], first[1], a.z, a.w);
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
        const float sum = __fmul_rn(__fadd_rn(lower, upper), power_of_two(-exponents[row]));
        const uint64_t place = static_cast<uint64_t>(blockIdx.y) * p.n_rows + tile.row + row;
        p.partial[place * p.stride + rank] = __fmul_rn(sum, pair.a_inverse);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) lora_expand(const LoraParams p) {
    const LoraTile tile = p.tiles[blockIdx.x];
    const LoraPairDesc pair = p.pairs[tile.segment];
    if (pair.rank == 0) return;
    int* exponents = reinterpret_cast<int*>(SHARED_BYTES);                               // [TILE]
    uint32_t* shrunk = reinterpret_cast<uint32_t*>(SHARED_BYTES + TILE * sizeof(int));  // [TILE][SHRUNK_PITCH], split
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    const uint32_t padded = (pair.rank + 15) / 16 * 16;
    for (uint32_t row = warp * 4; row < warp * 4 + 4; ++row) {
        float values[8] = {};
        float max = 0.0f;
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t rank = i * 32 + lane;
            if (row >= tile.n_rows || rank >= pair.rank) continue;
            const float* from = p.partial + static_cast<uint64_t>(tile.row + row) * p.stride + rank;
            for (uint32_t chunk = 0; chunk < p.n_chunks; ++chunk) {
                values[i] = __fadd_rn(values[i], from[static_cast<uint64_t>(chunk) * p.n_rows * p.stride]);
            }
            max = fmaxf(max, fabsf(values[i]));
        }
        max = max_over_warp(max);
        const int exponent = scale_exponent(max);
        if (lane == 0) exponents[row] = exponent;
#pragma unroll
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t rank = i * 32 + lane;
            if (rank < padded) {
                shrunk[row * SHRUNK_PITCH + rank] = in_two_parts(__fmul_rn(values[i], power_of_two(exponent)));
            }
        }
    }
    SYNC(3);

    const uint32_t first_column = blockIdx.y * COLUMNS + warp * 32;
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
            const uint32_t column = first_column + n * 8 + group;
            const bool exists = column < p.n_out && k < pair.b_pitch;
            const uint16_t* at = pair.b + static_cast<uint64_t>(column) * pair.b_pitch + k;
            uint2 b = {0, 0};
            if (exists) b = *reinterpret_cast<const uint2*>(at);
            mma(acc[n], first, b.x, b.y);
            mma(acc[n], rest, b.x, b.y);
            if (pair.planes == 2) {
                if (exists) b = *reinterpret_cast<const uint2*>(at + static_cast<uint64_t>(p.n_out) * pair.b_pitch);
                mma(acc[n], first, b.x, b.y);
            }
        }
    }

#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
        const uint32_t n = i / 4, part = i % 4;
        const uint32_t row = group + part / 2 * 8, column = first_column + n * 8 + quad * 2 + part % 2;
        if (row >= tile.n_rows || column >= p.n_out) continue;
        const float delta = __fmul_rn(__fmul_rn(acc[n][part], power_of_two(-exponents[row])), pair.b_inverse);
        float* y = p.y + static_cast<uint64_t>(tile.row + row) * p.n_out + column;
        const float sum = __fmaf_rn(pair.scale, delta, *y);
        *y = pair.row_scale != nullptr ? __fmul_rn(sum, pair.row_scale[column]) : sum;
    }
}
