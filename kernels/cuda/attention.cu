// Causal attention over KV pages, grouped heads, decoding rows and prefill chunks alike. Reference:
// `src/attention/scalar.rs`.
//
//   attention          block (tile of up to TILE queries of one run, key/value head), one or more splits of SPLIT
//                      positions. Per split: scores on tensor cores (warps share out the positions), softmax in two
//                      passes (warps share out the queries), mix with the values on tensor cores (warps share out the
//                      dimensions); then the split joins the running result.
//   attention_combine  joins splits that were computed by different blocks, in the same order by the same operations.
//
// With m, l, o the maximum, weight and mix of a split and M, L, O those of all before it:
//   M' = max(M, m);  L = L * exp(M - M') + l * exp(m - M');  O likewise;  the result is O / L.
//
// A query's bits depend on the query and its own positions alone: splits begin at fixed positions, so neither the chunk
// a row came in, nor its tile, nor the number of blocks per tile can move a boundary. Positions a query does not see
// have weight exactly 0; what no query of the tile sees is read as 0, whatever it holds.
#include "common.cuh"

namespace {

// Weights of a query in shared memory: a multiple of 32 plus 16, so that the lanes of a quarter-warp read different banks.
constexpr uint32_t PITCH = SPLIT + 16;
// Steps whose keys or values are loaded before the first of them is used.
constexpr uint32_t AHEAD = 4;
// Weights are at most 1; scaled by this, the smallest that matter are still normal f16.
constexpr float WEIGHT_SCALE = 16384.0f;

// What the block keeps in shared memory.
struct Shared {
    float* weights;    // [TILE][PITCH] scores, then weights in two parts
    uint32_t* queries; // [head_dim / 16][2 parts][32 lanes][4], as fragments
    float* mix;        // [TILE][head_dim], the running O
    int* exponents;    // [TILE] of the powers of two that scale the queries
    float* maxima;     // [TILE], the running M
    float* sums;       // [TILE], the running L
    float* keep;       // [TILE] exp(M - M') of this split
    float* join;       // [TILE] exp(m - M') of this split
};

__device__ __forceinline__ Shared layout(uint32_t head_dim) {
    Shared s;
    s.weights = reinterpret_cast<float*>(SHARED_BYTES);
    s.queries = reinterpret_cast<uint32_t*>(s.weights + TILE * PITCH);
    s.mix = reinterpret_cast<float*>(s.queries + TILE * head_dim);
    s.exponents = reinterpret_cast<int*>(s.mix + TILE * head_dim);
    s.maxima = reinterpret_cast<float*>(s.exponents + TILE);
    s.sums = s.maxima + TILE;
    s.keep = s.sums + TILE;
    s.join = s.keep + TILE;
    return s;
}

// First of a query's values in q and out.
__device__ __forceinline__ uint64_t place_of(const AttentionParams& p, const AttentionTile& tile, uint32_t index) {
    const uint32_t query = tile.query + index, head = blockIdx.y * p.group + query % p.group;
    const uint64_t row = tile.first_row + query / p.group;
    return (row * p.n_kv_heads * p.group + head) * p.head_dim;
}

// Positions a query sees.
__device__ __forceinline__ uint32_t limit_of(const AttentionParams& p, const AttentionTile& tile, uint32_t index) {
    return tile.position + (tile.query + index) / p.group + 1;
}

// A head's keys in the page of a position.
__device__ __forceinline__ const uint16_t* keys_at(const AttentionParams& p, const AttentionTile& tile, uint32_t position) {
    const uint64_t page = p.pages[tile.pages + position / PAGE];
    return p.kv + page * p.page_stride + p.layer_offset + static_cast<uint64_t>(blockIdx.y) * 2 * PAGE * p.head_dim;
}

// Scales and splits the queries into fragments. The lane `quad` of a fragment holds eight consecutive dimensions, as it
// will read them from a key: fragments 2i and 2i + 1 cover dimensions 32i to 32i + 31. Rows of the tile without a query
// stay as they are, here and below: what a tensor core makes of them reaches no other row and is not stored.
__device__ __forceinline__ void load_queries(const AttentionParams& p, const AttentionTile& tile, const Shared& s) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t index = warp; index < tile.n_queries; index += 4) {
        const float* q = p.q + place_of(p, tile, index);
        float max = 0.0f;
        for (uint32_t d = lane; d < p.head_dim; d += 32) max = fmaxf(max, fabsf(q[d]));
        max = max_over_warp(max);
        const int exponent = scale_exponent(max);
        const float scale = power_of_two(exponent);
        for (uint32_t d = lane * 2; d < p.head_dim; d += 64) {
            const uint32_t even = in_two_parts(__fmul_rn(q[d], scale));
            const uint32_t odd = in_two_parts(__fmul_rn(q[d + 1], scale));
            const uint32_t quad = d % 32 / 8, fragment = d / 32 * 2 + d % 8 / 4, slot = d % 4 / 2 * 2 + index / 8;
            uint32_t* to = s.queries + (fragment * 2 * 32 + index % 8 * 4 + quad) * 4 + slot;
            to[0] = firsts(even, odd);
            to[32 * 4] = rests(even, odd);
        }
        for (uint32_t d = lane; d < p.head_dim; d += 32) s.mix[index * p.head_dim + d] = 0.0f;
        if (lane == 0) {
            s.exponents[index] = exponent;
            s.maxima[index] = of_bits(0xff800000u);
            s.sums[index] = 0.0f;
        }
    }
}

// Scores of all queries for positions begin..end, in groups of 32 positions per warp.
__device__ __forceinline__ void score(const AttentionParams& p, const AttentionTile& tile, const Shared& s,
                                      uint32_t begin, uint32_t end) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    for (uint32_t first = begin + warp * 32; first < end; first += THREADS) {
        float acc[4][4] = {};
        const uint16_t* keys[4];
        bool exists[4];
#pragma unroll
        for (uint32_t n = 0; n < 4; ++n) {
            const uint32_t position = first + n * 8 + group;
            exists[n] = position < end;
            keys[n] = p.kv;
            if (exists[n]) keys[n] = keys_at(p, tile, position) + position % PAGE * p.head_dim + quad * 8;
        }
        for (uint32_t dims = 0; dims < p.head_dim; dims += AHEAD * 32) {
            // All loads before the first product: they take far longer than it.
            uint4 k[AHEAD][4];
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
#pragma unroll
                for (uint32_t n = 0; n < 4; ++n) {
                    k[i][n] = {0, 0, 0, 0};
                    const uint32_t d = dims + i * 32;
                    if (exists[n] && d < p.head_dim) k[i][n] = *reinterpret_cast<const uint4*>(keys[n] + d);
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
                const uint32_t d = dims + i * 32;
                if (d >= p.head_dim) break;
                uint32_t first_parts[2][4], rest_parts[2][4];
#pragma unroll
                for (uint32_t half = 0; half < 2; ++half) {
                    const uint32_t* from = s.queries + ((d / 16 + half) * 2 * 32 + lane) * 4;
                    const uint4 one = *reinterpret_cast<const uint4*>(from);
                    const uint4 two = *reinterpret_cast<const uint4*>(from + 32 * 4);
                    first_parts[half][0] = one.x, first_parts[half][1] = one.y;
                    first_parts[half][2] = one.z, first_parts[half][3] = one.w;
                    rest_parts[half][0] = two.x, rest_parts[half][1] = two.y;
                    rest_parts[half][2] = two.z, rest_parts[half][3] = two.w;
                }
#pragma unroll
                for (uint32_t n = 0; n < 4; ++n) {
                    mma(acc[n], first_parts[0], k[i][n].x, k[i][n].y);
                    mma(acc[n], rest_parts[0], k[i][n].x, k[i][n].y);
                    mma(acc[n], first_parts[1], k[i][n].z, k[i][n].w);
                    mma(acc[n], rest_parts[1], k[i][n].z, k[i][n].w);
                }
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 16; ++i) {
            const uint32_t n = i / 4, part = i % 4, row = group + part / 2 * 8;
            const float dot = __fmul_rn(acc[n][part], power_of_two(-s.exponents[row]));
            s.weights[row * PITCH + first - begin + n * 8 + quad * 2 + part % 2] = __fmul_rn(dot, p.scale);
        }
    }
}

// Turns scores into weights in two parts, and updates M, L and the factors of O. A warp does every fourth query.
__device__ __forceinline__ void soften(const AttentionParams& p, const AttentionTile& tile, const Shared& s,
                                       uint32_t begin, uint32_t padded) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (uint32_t index = warp; index < tile.n_queries; index += 4) {
        float* weights = s.weights + index * PITCH;
        uint32_t n = 0;
        if (limit_of(p, tile, index) > begin) {
            n = smaller(limit_of(p, tile, index) - begin, SPLIT);
        }
        float max = of_bits(0xff800000u);
        for (uint32_t i = lane; i < n; i += 32) max = fmaxf(max, weights[i]);
        max = max_over_warp(max);
        float sum = 0.0f;
        for (uint32_t i = lane; i < padded; i += 32) {
            const float weight = i < n ? exp_exactly(__fsub_rn(weights[i], max)) : 0.0f;
            sum = __fadd_rn(sum, weight);
            weights[i] = of_bits(in_two_parts(__fmul_rn(weight, WEIGHT_SCALE)));
        }
        sum = sum_over_warp(sum);
        if (lane == 0) {
            const float before = s.maxima[index], after = fmaxf(before, max);
            const float keep = n > 0 ? exp_exactly(__fsub_rn(before, after)) : 1.0f;
            const float join = n > 0 ? exp_exactly(__fsub_rn(max, after)) : 0.0f;
            s.keep[index] = keep;
            s.join[index] = join;
            s.maxima[index] = after;
            s.sums[index] = __fmaf_rn(s.sums[index], keep, __fmul_rn(sum, join));
        }
    }
}

// Mixes the values of positions begin..end and joins the result to O. A warp takes every fourth group of 8 dimensions.
__device__ __forceinline__ void mix(const AttentionParams& p, const AttentionTile& tile, const Shared& s, uint32_t begin,
                                    uint32_t end) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
    for (uint32_t first = warp * 8; first < p.head_dim; first += 4 * 32) {
        float acc[4][4] = {};
        for (uint32_t pages = begin; pages < end; pages += AHEAD * PAGE) {
            uint2 v[AHEAD][4];
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
                const uint32_t position = pages + i * PAGE, at = position - begin + quad * 4;
                const uint16_t* values = p.kv;
                if (position < end) values = keys_at(p, tile, position) + PAGE * p.head_dim;
                const uint32_t left = end > begin + at ? end - begin - at : 0;
                const uint64_t seen = left >= 4 ? ~0ull : (1ull << (16 * left)) - 1;
#pragma unroll
                for (uint32_t n = 0; n < 4; ++n) {
                    const uint32_t dim = first + n * 32 + group;
                    v[i][n] = {0, 0};
                    if (position < end && first + n * 32 < p.head_dim) {
                        v[i][n] = *reinterpret_cast<const uint2*>(values + dim * PAGE + quad * 4);
                    }
                    v[i][n].x &= static_cast<uint32_t>(seen), v[i][n].y &= static_cast<uint32_t>(seen >> 32);
                }
            }
#pragma unroll
            for (uint32_t i = 0; i < AHEAD; ++i) {
                const uint32_t position = pages + i * PAGE, at = position - begin + quad * 4;
                if (position >= end) break;
                const uint4 low = *reinterpret_cast<const uint4*>(s.weights + group * PITCH + at);
                const uint4 high = *reinterpret_cast<const uint4*>(s.weights + (group + 8) * PITCH + at);
                const uint32_t first_parts[4] = {firsts(low.x, low.y), firsts(high.x, high.y), firsts(low.z, low.w),
                                                 firsts(high.z, high.w)};
                const uint32_t rest_parts[4] = {rests(low.x, low.y), rests(high.x, high.y), rests(low.z, low.w),
                                                rests(high.z, high.w)};
#pragma unroll
                for (uint32_t n = 0; n < 4; ++n) {
                    if (first + n * 32 >= p.head_dim) break;
                    mma(acc[n], first_parts, v[i][n].x, v[i][n].y);
                    mma(acc[n], rest_parts, v[i][n].x, v[i][n].y);
                }
            }
        }
#pragma unroll
        for (uint32_t i = 0; i < 16; ++i) {
            const uint32_t n = i / 4, part = i % 4, row = group + part / 2 * 8;
            const uint32_t dim = first + n * 32 + quad * 2 + part % 2;
            if (dim >= p.head_dim) continue;
            float* o = s.mix + row * p.head_dim + dim;
            const float part_mix = __fmul_rn(acc[n][part], 1.0f / WEIGHT_SCALE);
            *o = __fmaf_rn(*o, s.keep[row], __fmul_rn(part_mix, s.join[row]));
        }
    }
}

// Where a tile's partial results of one place lie.
__device__ __forceinline__ float* partial_at(const AttentionParams& p, uint32_t place) {
    return p.partial + (static_cast<uint64_t>(place) * p.n_kv_heads + blockIdx.y) * TILE * (p.head_dim + 2);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) attention(const AttentionParams p) {
    await_kernels_before();
    const AttentionTile tile = p.tiles[blockIdx.x];
    const Shared s = layout(p.head_dim);
    load_queries(p, tile, s);
    SYNC(4);
    const uint32_t limit = limit_of(p, tile, tile.n_queries - 1);
    for (uint32_t split = tile.first_split; split < tile.first_split + tile.n_splits; ++split) {
        const uint32_t begin = split * SPLIT, end = smaller(begin + SPLIT, limit);
        score(p, tile, s, begin, end);
        SYNC(5);
        soften(p, tile, s, begin, (end - begin + PAGE - 1) / PAGE * PAGE);
        SYNC(6);
        mix(p, tile, s, begin, end);
        SYNC(7);
    }
    for (uint32_t i = threadIdx.x; i < tile.n_queries * p.head_dim; i += THREADS) {
        const uint32_t index = i / p.head_dim, d = i % p.head_dim;
        if (tile.partial == NOWHERE) {
            p.out[place_of(p, tile, index) + d] = __fmul_rn(s.mix[i], __fdiv_rn(1.0f, s.sums[index]));
        } else {
            partial_at(p, tile.partial)[i] = s.mix[i];
        }
    }
    if (tile.partial != NOWHERE && threadIdx.x < tile.n_queries) {
        float* tail = partial_at(p, tile.partial) + TILE * p.head_dim;
        tail[threadIdx.x] = s.maxima[threadIdx.x];
        tail[TILE + threadIdx.x] = s.sums[threadIdx.x];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_combine(const AttentionParams p) {
    let_next_start();
    await_kernels_before();
    // Splits whose numbers are loaded before the first of them is used.
    constexpr uint32_t BATCH = 8;
    const AttentionTile tile = p.tiles[blockIdx.x];
    const uint32_t i = blockIdx.z * THREADS + threadIdx.x, index = i / p.head_dim, d = i % p.head_dim;
    if (index >= tile.n_queries) return;
    const uint32_t n_splits = smaller(tile.n_splits, (limit_of(p, tile, index) + SPLIT - 1) / SPLIT);
    float max = of_bits(0xff800000u), sum = 0.0f, mixed = 0.0f;
    for (uint32_t first = 0; first < n_splits; first += BATCH) {
        float maxima[BATCH] = {}, sums[BATCH] = {}, mixes[BATCH] = {};
#pragma unroll
        for (uint32_t split = 0; split < BATCH; ++split) {
            if (first + split >= n_splits) break;
            const float* from = partial_at(p, tile.partial + first + split);
            const float* tail = from + TILE * p.head_dim;
            maxima[split] = tail[index], sums[split] = tail[TILE + index], mixes[split] = from[i];
        }
#pragma unroll
        for (uint32_t split = 0; split < BATCH; ++split) {
            if (first + split >= n_splits) break;
            const float after = fmaxf(max, maxima[split]);
            const float keep = exp_exactly(__fsub_rn(max, after)), join = exp_exactly(__fsub_rn(maxima[split], after));
            sum = __fmaf_rn(sum, keep, __fmul_rn(sums[split], join));
            mixed = __fmaf_rn(mixed, keep, __fmul_rn(mixes[split], join));
            max = after;
        }
    }
    p.out[place_of(p, tile, index) + d] = __fmul_rn(mixed, __fdiv_rn(1.0f, sum));
}
