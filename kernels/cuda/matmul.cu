// Activations times frozen weights, out = x w^T, one to many rows and up to three matrices of the same inputs in a launch;
// lookups in the embedding table. References: `src/matmul/scalar.rs` for codes, products in f64 for dense weights.
//
//   round_rows  rows to 8-bit codes (round.cuh)
//   split_rows  rows to two f16 parts
//   matmul_N    block (8 * N rows, panel of 16 outputs): four warps take a quarter of the inputs each
//   matmul_tall block (64 rows, four panels of one form): a warp takes the four quarters of its panel one after the other,
//               all share the rows in shared memory
//   embed_rows  rows of the table
//
// Weights are the first operand of the tensor cores (16 outputs), rows the second (8 rows), so that a lone row wastes
// seven eighths of a product and not fifteen sixteenths.
//
// Codes: the dot product of 32 (or 16) codes is exact in integers; then acc = fma(dot, weight scale * row scale, acc) and,
// where the form has minima, acc = fma(minimum, row scale * sum of the row's codes, acc). These are the operations of the
// CPU kernel in its order, within a quarter of the inputs. Integer accumulators start at the bits of 1.5 * 2^23, so that
// their bits are those of a float that is off by just that.
//
// Order of summation, for all forms and all kernels: a chain over the blocks of a quarter, beginning at 0; then
// ((q0 + q1) + q2) + q3. Quarters begin at fixed inputs; so a row's bits depend neither on the number of rows nor on the
// kernel that its number chose.
//
// Records of weights, 16 outputs and 64 inputs (lane 4 * g + quad; outputs g and g + 8):
//   Z4  512 bytes: per lane four words of eight 4-bit codes, [side][output]; low halves of the bytes are inputs 4 * quad
//       to + 3 of the side's 32, high halves 16 + those. Codes are two's complement. 64: f16 scales [g][output][side]
//   P4  as Z4 with codes from 0; 128: f16 pairs (scale, minimum) [g][output][side]
//   N4  as P4; 128: [g][output]{f16 scale, f16 minimum, i8 factors [side]{of the scale, of the minimum}}
//   Z8  1024 bytes: [side][lane]{output g, g + 8, inputs + 16: output g, g + 8}, four signed codes each; 64 as Z4
//   N8  as Z8; 256: [g][output]{f16 scale, f16 minimum of side 0, i8 factors of the scale [16 inputs], of the minimum
//       [16 inputs], f16 scale, f16 minimum of side 1}
//   dense, 16 outputs and 32 inputs: [plane][output][lane]: f16 of inputs 8 * quad to + 7
#include "round.cuh"

namespace {

// Bytes of a record of weights, of each plane if dense.
__device__ __forceinline__ constexpr uint32_t record_bytes(uint32_t form) {
    return form == FORM_Z4 ? 576 : form == FORM_Z8 ? 1088 : form == FORM_N8 ? 1280 : form == FORM_DENSE ? 1024 : 640;
}

// Bytes of a record of rows for a product with such weights.
__device__ __forceinline__ constexpr uint32_t rows_bytes(uint32_t form) {
    return form == FORM_DENSE ? DENSE_ROWS : CODED_ROWS;
}

constexpr float MAGIC = 12582912.0f;
constexpr int32_t MAGIC_BITS = 0x4b400000;

__device__ __forceinline__ float half_of(uint32_t bits, uint32_t high) {
    return f16_value(static_cast<uint16_t>(bits >> (high * 16)));
}

__device__ __forceinline__ float byte_of(uint32_t bits, uint32_t index) {
    return static_cast<float>(static_cast<int8_t>(bits >> (index * 8) & 0xffu));
}

// What a lane holds of a record of rows.
struct Rows {
    uint4 codes;
    float4 low;   // the first row of the lane's pair: scale and sum of side 0, of side 1
    float4 high;  // the second
    float4 firsts;  // sums of the first halves: first row side 0, side 1, second row side 0, side 1; N8 only
};

template <uint32_t form>
__device__ __forceinline__ void load_rows(Rows& x, const unsigned char* record, uint32_t lane) {
    const uint32_t quad = lane % 4;
    x.codes = *reinterpret_cast<const uint4*>(record + lane * 16);
    x.low = *reinterpret_cast<const float4*>(record + 512 + quad * 32);
    x.high = *reinterpret_cast<const float4*>(record + 512 + quad * 32 + 16);
    if (form == FORM_N8) x.firsts = *reinterpret_cast<const float4*>(record + 640 + quad * 16);
}

// What a lane holds of a record of weights.
struct Weights {
    uint4 codes[2];
    uint4 factors[2];
};

template <uint32_t form>
__device__ __forceinline__ void load_weights(Weights& w, const unsigned char* record, uint32_t lane) {
    const uint32_t group = lane / 4;
    constexpr bool eight = form == FORM_Z8 || form == FORM_N8;
    w.codes[0] = *reinterpret_cast<const uint4*>(record + lane * 16);
    if (eight) w.codes[1] = *reinterpret_cast<const uint4*>(record + 512 + lane * 16);
    const unsigned char* factors = record + (eight ? 1024 : 512);
    if (form == FORM_Z4 || form == FORM_Z8) {
        const uint2 both = *reinterpret_cast<const uint2*>(factors + group * 8);
        w.factors[0].x = both.x, w.factors[0].y = both.y;
    } else if (form == FORM_N8) {
        w.factors[0] = *reinterpret_cast<const uint4*>(factors + group * 32);
        w.factors[1] = *reinterpret_cast<const uint4*>(factors + group * 32 + 16);
    } else {
        w.factors[0] = *reinterpret_cast<const uint4*>(factors + group * 16);
    }
}

// The first operand of one side.
template <uint32_t form>
__device__ __forceinline__ void operand(const Weights& w, uint32_t side, uint32_t (&a)[4]) {
    if (form == FORM_Z8 || form == FORM_N8) {
        const uint4 c = w.codes[side];
        a[0] = c.x, a[1] = c.y, a[2] = c.z, a[3] = c.w;
        return;
    }
    const uint32_t low = side == 0 ? w.codes[0].x : w.codes[0].z, high = side == 0 ? w.codes[0].y : w.codes[0].w;
    if (form == FORM_Z4) {
        // Sixteen times the code, sign and all.
        a[0] = low << 4 & 0xf0f0f0f0u, a[1] = high << 4 & 0xf0f0f0f0u, a[2] = low & 0xf0f0f0f0u, a[3] = high & 0xf0f0f0f0u;
    } else {
        a[0] = low & 0x0f0f0f0fu, a[1] = high & 0x0f0f0f0fu;
        a[2] = low >> 4 & 0x0f0f0f0fu, a[3] = high >> 4 & 0x0f0f0f0fu;
    }
}

// Scale and minimum of an output of the lane (0 or 1) for a side and half of it (N8 only).
template <uint32_t form>
__device__ __forceinline__ void factors_of(const Weights& w, uint32_t output, uint32_t side, uint32_t half, float& scale,
                                           float& min) {
    if (form == FORM_Z4 || form == FORM_Z8) {
        scale = half_of(output == 0 ? w.factors[0].x : w.factors[0].y, side);
        if (form == FORM_Z4) scale = __fmul_rn(scale, 0.0625f);
        min = 0.0f;
    } else if (form == FORM_P4) {
        const uint4 f = w.factors[0];
        const uint32_t pair = output == 0 ? (side == 0 ? f.x : f.y) : (side == 0 ? f.z : f.w);
        scale = half_of(pair, 0), min = half_of(pair, 1);
    } else if (form == FORM_N4) {
        const uint4 f = w.factors[0];
        const uint32_t pair = output == 0 ? f.x : f.z, subs = output == 0 ? f.y : f.w;
        scale = __fmul_rn(half_of(pair, 0), byte_of(subs, side * 2));
        min = __fmul_rn(half_of(pair, 1), byte_of(subs, side * 2 + 1));
    } else {
        const uint4 f = w.factors[output];
        const uint32_t pair = side == 0 ? f.x : f.w, index = side * 2 + half;
        scale = __fmul_rn(half_of(pair, 0), byte_of(f.y, index));
        min = __fmul_rn(half_of(pair, 1), byte_of(f.z, index));
    }
}

// acc += what integer accumulators hold.
__device__ __forceinline__ void add(float& acc, int32_t dot, float weight_scale, float row_scale) {
    acc = __fmaf_rn(__fsub_rn(of_bits(static_cast<uint32_t>(dot)), MAGIC), __fmul_rn(weight_scale, row_scale), acc);
}

// One record of weights times one of rows.
template <uint32_t form>
__device__ __forceinline__ void multiply(float (&acc)[4], const uint32_t (&a)[2][4], const float (&scales)[2][2][2],
                                         const float (&mins)[2][2][2], const Rows& x) {
#pragma unroll
    for (uint32_t side = 0; side < 2; ++side) {
        const uint32_t b0 = side == 0 ? x.codes.x : x.codes.z, b1 = side == 0 ? x.codes.y : x.codes.w;
        const float row_scale[2] = {side == 0 ? x.low.x : x.low.z, side == 0 ? x.high.x : x.high.z};
        const float row_sum[2] = {side == 0 ? x.low.y : x.low.w, side == 0 ? x.high.y : x.high.w};
        int32_t dots[2][4] = {{MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS},
                              {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS}};
        if (form == FORM_N8) {
            mma_int_short(dots[0], a[side][0], a[side][1], b0);
            mma_int_short(dots[1], a[side][2], a[side][3], b1);
        } else {
            mma_int<form == FORM_P4 || form == FORM_N4>(dots[0], a[side], b0, b1);
        }
        const float first[2] = {side == 0 ? x.firsts.x : x.firsts.y, side == 0 ? x.firsts.z : x.firsts.w};
#pragma unroll
        for (uint32_t half = 0; half < (form == FORM_N8 ? 2 : 1); ++half) {
#pragma unroll
            for (uint32_t part = 0; part < 4; ++part) {
                const uint32_t output = part / 2, row = part % 2;
                add(acc[part], dots[half][part], scales[output][side][half], row_scale[row]);
                if (form == FORM_P4 || form == FORM_N4) acc[part] = __fmaf_rn(mins[output][side][0], row_sum[row], acc[part]);
                if (form == FORM_N8) {
                    const float sum = half == 0 ? first[row] : __fsub_rn(row_sum[row], first[row]);
                    acc[part] = __fmaf_rn(mins[output][side][half], sum, acc[part]);
                }
            }
        }
    }
}

// One record of coded weights times the records of all rows.
template <uint32_t form, uint32_t tiles>
__device__ __forceinline__ void multiply_coded(float (&acc)[tiles][4], const unsigned char* weights,
                                               const unsigned char* rows, uint32_t n_tiles) {
    const uint32_t lane = threadIdx.x % 32;
    Weights w;
    load_weights<form>(w, weights, lane);
    uint32_t a[2][4];
    float scales[2][2][2], mins[2][2][2];
#pragma unroll
    for (uint32_t side = 0; side < 2; ++side) {
        operand<form>(w, side, a[side]);
#pragma unroll
        for (uint32_t i = 0; i < (form == FORM_N8 ? 4 : 2); ++i) {
            factors_of<form>(w, i % 2, side, i / 2, scales[i % 2][side][i / 2], mins[i % 2][side][i / 2]);
        }
    }
#pragma unroll
    for (uint32_t tile = 0; tile < tiles; ++tile) {
        if (tile >= n_tiles) break;
        Rows x;
        load_rows<form>(x, rows + tile * rows_bytes(form), lane);
        multiply<form>(acc[tile], a, scales, mins, x);
    }
}

// One record of dense weights times the records of all rows; `second` is the record's second plane in global memory.
template <uint32_t tiles>
__device__ __forceinline__ void multiply_dense(float (&acc)[tiles][4], const unsigned char* weights,
                                               const unsigned char* second, const unsigned char* rows,
                                               uint32_t n_tiles) {
    const uint32_t lane = threadIdx.x % 32;
    const auto read = [lane](const unsigned char* record, uint32_t half) {
        return *reinterpret_cast<const uint4*>(record + half * 512 + lane * 16);
    };
    const uint4 low = read(weights, 0), high = read(weights, 1);
    const uint32_t a[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
    uint4 rest_low = {0, 0, 0, 0}, rest_high = {0, 0, 0, 0};
    if (second != nullptr) rest_low = read(second, 0), rest_high = read(second, 1);
    const uint32_t rest[2][4] = {{rest_low.x, rest_high.x, rest_low.y, rest_high.y},
                                 {rest_low.z, rest_high.z, rest_low.w, rest_high.w}};
#pragma unroll
    for (uint32_t tile = 0; tile < tiles; ++tile) {
        if (tile >= n_tiles) break;
        const uint4 one = read(rows + tile * DENSE_ROWS, 0), two = read(rows + tile * DENSE_ROWS, 1);
        mma(acc[tile], a[0], one.x, one.y);
        mma(acc[tile], a[0], two.x, two.y);
        mma(acc[tile], a[1], one.z, one.w);
        mma(acc[tile], a[1], two.z, two.w);
        if (second != nullptr) {
            mma(acc[tile], rest[0], one.x, one.y);
            mma(acc[tile], rest[1], one.z, one.w);
        }
    }
}

// Where a warp's work comes from and goes to.
struct Stream {
    const unsigned char* weights;  // the panel's records
    uint32_t weights_stride;
    const unsigned char* rows;     // the records of the first tile and block of inputs
    uint64_t rows_stride;          // from a block of inputs to the next
    uint32_t n_tiles;
    unsigned char* weights_ring;   // shared memory for STAGES records of weights
    unsigned char* rows_ring;      // and for STAGES times `tiles` records of rows
};

// Asks for the weights of one block of inputs.
template <uint32_t form>
__device__ __forceinline__ void fetch_weights(const Stream& s, uint32_t slot, uint32_t block) {
    const uint32_t lane = threadIdx.x % 32;
    const unsigned char* from = s.weights + static_cast<uint64_t>(block) * s.weights_stride;
    unsigned char* to = s.weights_ring + slot * record_bytes(form);
#pragma unroll
    for (uint32_t i = 0; i < (record_bytes(form) / 16 + 31) / 32; ++i) {
        const uint32_t at = (i * 32 + lane) * 16;
        if (at < record_bytes(form)) async_copy(to + at, from + at);
    }
}

// Asks for the rows of one block of inputs. `first` and `step` say which of the threads that share them this one is.
template <uint32_t form, uint32_t tiles>
__device__ __forceinline__ void fetch_rows(const Stream& s, uint32_t slot, uint32_t block, uint32_t first, uint32_t step) {
    const unsigned char* from = s.rows + block * s.rows_stride;
    unsigned char* to = s.rows_ring + slot * tiles * rows_bytes(form);
    const uint32_t end = s.n_tiles * rows_bytes(form);
#pragma unroll 4
    for (uint32_t at = first * 16; at < end; at += step * 16) async_copy(to + at, from + at);
}

// Quarters first_part to end_part of the inputs, added one after the other to `sum`. With `shared`, four warps with
// panels of their own share the rows; else a warp is alone. A ring of blocks is on its way while one is computed.
template <uint32_t form, uint32_t tiles, uint32_t stages, bool shared>
__device__ __forceinline__ void run(float (&sum)[tiles][4], const Stream& s, uint32_t n_blocks, uint32_t first_part,
                                    uint32_t end_part) {
    const uint32_t first = shared ? threadIdx.x : threadIdx.x % 32, step = shared ? THREADS : 32;
    const uint32_t begin = n_blocks * first_part / 4, end = n_blocks * end_part / 4;
    uint32_t part = first_part, part_end = n_blocks * (first_part + 1) / 4;
    // Weights are frozen: they may come while the kernel that makes the rows still runs.
    for (uint32_t slot = 0; slot + 1 < stages && begin + slot < end; ++slot) fetch_weights<form>(s, slot, begin + slot);
    await_kernels_before();
    for (uint32_t slot = 0; slot + 1 < stages; ++slot) {
        if (begin + slot < end) fetch_rows<form, tiles>(s, slot, begin + slot, first, step);
        async_commit();
    }
    float acc[tiles][4] = {};
    uint32_t slot = 0;
    for (uint32_t block = begin; block < end; ++block) {
        while (block == part_end) {
            ++part, part_end = n_blocks * (part + 1) / 4;
#pragma unroll
            for (uint32_t i = 0; i < tiles * 4; ++i) {
                sum[i / 4][i % 4] = __fadd_rn(sum[i / 4][i % 4], acc[i / 4][i % 4]);
                acc[i / 4][i % 4] = 0.0f;
            }
        }
        async_wait<stages - 2>();
        // This block has come for all threads, and all are done with the block before, whose slot is filled next.
        if (shared) {
            SYNC(13);
        } else {
            SYNC_WARP(14);
        }
        const uint32_t next = slot == 0 ? stages - 1 : slot - 1;
        if (block + stages - 1 < end) {
            fetch_weights<form>(s, next, block + stages - 1);
            fetch_rows<form, tiles>(s, next, block + stages - 1, first, step);
        }
        async_commit();
        const unsigned char* weights = s.weights_ring + slot * record_bytes(form);
        const unsigned char* rows = s.rows_ring + slot * tiles * rows_bytes(form);
        if constexpr (form == FORM_DENSE) {
            const bool two = s.weights_stride > record_bytes(form);
            const unsigned char* record = s.weights + static_cast<uint64_t>(block) * s.weights_stride;
            multiply_dense<tiles>(acc, weights, two ? record + record_bytes(form) : nullptr, rows, s.n_tiles);
        } else {
            multiply_coded<form, tiles>(acc, weights, rows, s.n_tiles);
        }
        slot = slot + 1 == stages ? 0 : slot + 1;
    }
#pragma unroll
    for (uint32_t i = 0; i < tiles * 4; ++i) sum[i / 4][i % 4] = __fadd_rn(sum[i / 4][i % 4], acc[i / 4][i % 4]);
}

// As `run`, for the panel's form.
template <uint32_t tiles, uint32_t stages, bool shared>
__device__ __forceinline__ void run_form(float (&sum)[tiles][4], const MatmulParams& p, const Product& product,
                                         uint32_t panel, uint32_t first_tile, uint32_t first_part, uint32_t end_part) {
    const bool dense = product.form == FORM_DENSE;
    const uint32_t warp = threadIdx.x / 32, n_blocks = product.n_blocks;
    const uint32_t weights_bytes = record_bytes(product.form), tile_bytes = tiles * (dense ? DENSE_ROWS : CODED_ROWS);
    Stream s;
    s.weights_stride = weights_bytes * (dense ? product.planes : 1);
    s.weights = product.weights + static_cast<uint64_t>(panel) * n_blocks * s.weights_stride;
    s.rows_stride = static_cast<uint64_t>((p.n_rows + 7) / 8) * (tile_bytes / tiles);
    s.rows = (dense ? p.parts : p.codes) + first_tile * (tile_bytes / tiles);
    s.n_tiles = smaller((p.n_rows + 7) / 8 - first_tile, tiles);
    s.weights_ring = SHARED_BYTES + warp * stages * (shared ? weights_bytes : weights_bytes + tile_bytes);
    s.rows_ring = shared ? SHARED_BYTES + 4 * stages * weights_bytes : s.weights_ring + stages * weights_bytes;
    switch (product.form) {
        case FORM_Z4: return run<FORM_Z4, tiles, stages, shared>(sum, s, n_blocks, first_part, end_part);
        case FORM_P4: return run<FORM_P4, tiles, stages, shared>(sum, s, n_blocks, first_part, end_part);
        case FORM_N4: return run<FORM_N4, tiles, stages, shared>(sum, s, n_blocks, first_part, end_part);
        case FORM_Z8: return run<FORM_Z8, tiles, stages, shared>(sum, s, n_blocks, first_part, end_part);
        case FORM_N8: return run<FORM_N8, tiles, stages, shared>(sum, s, n_blocks, first_part, end_part);
        default: return run<FORM_DENSE, tiles, stages, shared>(sum, s, n_blocks, first_part, end_part);
    }
}

// The product that a panel belongs to.
__device__ __forceinline__ uint32_t product_of(const MatmulParams& p, uint32_t panel) {
    uint32_t index = 0;
    while (index + 1 < p.n_products && panel >= p.products[index + 1].first_panel) ++index;
    return index;
}

// Stores the sum of the quarters of one output; `part` and `lane` as accumulators lie.
__device__ __forceinline__ void store(const MatmulParams& p, const Product& product, uint32_t panel, uint32_t tile,
                                      uint32_t part, uint32_t lane, float sum) {
    const uint32_t row = tile * 8 + lane % 4 * 2 + part % 2, column = panel * 16 + lane / 4 + part / 2 * 8;
    if (row >= p.n_rows || column >= product.n_out) return;
    if (product.form == FORM_DENSE) {
        sum = __fmul_rn(__fmul_rn(sum, power_of_two(-p.exponents[row])), product.inverse);
    }
    product.out[static_cast<uint64_t>(row) * product.n_out + column] = sum;
}

template <uint32_t tiles, uint32_t stages>
__device__ __forceinline__ void matmul(const MatmulParams& p) {
    const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, first_tile = blockIdx.x * tiles;
    const Product& product = p.products[product_of(p, blockIdx.y)];
    const uint32_t panel = blockIdx.y - product.first_panel;
    float acc[tiles][4] = {};
    run_form<tiles, stages, false>(acc, p, product, panel, first_tile, warp, warp + 1);
    SYNC(15);
    float* quarters = reinterpret_cast<float*>(SHARED_BYTES);  // [4 warps][tiles][4][32 lanes], where the rings were
#pragma unroll
    for (uint32_t i = 0; i < tiles * 4; ++i) quarters[(warp * tiles * 4 + i) * 32 + lane] = acc[i / 4][i % 4];
    SYNC(10);
    for (uint32_t i = warp; i < tiles * 4; i += 4) {
        float sum = 0.0f;
        for (uint32_t part = 0; part < 4; ++part) sum = __fadd_rn(sum, quarters[(part * tiles * 4 + i) * 32 + lane]);
        store(p, product, panel, first_tile + i / 4, i % 4, lane, sum);
    }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS) matmul_1(const __grid_constant__ MatmulParams p) {
    matmul<1, MATMUL_STAGES[0]>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) matmul_2(const __grid_constant__ MatmulParams p) {
    matmul<2, MATMUL_STAGES[1]>(p);
}
// Three blocks a multiprocessor: left to itself, the compiler aims at more for sm_80 and spills.
extern "C" __global__ void __launch_bounds__(THREADS, 3) matmul_4(const __grid_constant__ MatmulParams p) {
    matmul<4, MATMUL_STAGES[2]>(p);
}
extern "C" __global__ void __launch_bounds__(THREADS) matmul_8(const __grid_constant__ MatmulParams p) {
    matmul<8, MATMUL_STAGES[3]>(p);
}

extern "C" __global__ void __launch_bounds__(THREADS) matmul_tall(const __grid_constant__ MatmulParams p) {
    // A warp without a panel computes the last one again: all four fetch the rows.
    const uint32_t wanted = blockIdx.y * 4 + threadIdx.x / 32, lane = threadIdx.x % 32, first_tile = blockIdx.x * 8;
    const uint32_t whole = smaller(wanted, p.n_panels - 1);
    const Product& product = p.products[product_of(p, whole)];
    const uint32_t panel = whole - product.first_panel;
    float sums[8][4] = {};
    run_form<8, MATMUL_STAGES[3], true>(sums, p, product, panel, first_tile, 0, 4);
    if (wanted != whole) return;
#pragma unroll
    for (uint32_t i = 0; i < 32; ++i) store(p, product, panel, first_tile + i / 4, i % 4, lane, sums[i / 4][i % 4]);
}

// Block: one row, every gridDim.y-th group of 128 inputs.
extern "C" __global__ void __launch_bounds__(THREADS) round_rows(const RoundParams p) {
    let_next_start();
    await_kernels_before();
    const uint64_t row = blockIdx.x;
    // To the end of the last record, whose other half may be beyond the row.
    for (uint32_t k = blockIdx.y * THREADS + threadIdx.x; k < p.n_blocks * 64; k += gridDim.y * THREADS) {
        round_block(k < p.n_in ? p.x[row * p.n_in + k] : 0.0f, p.codes, row, k / 32, (gridDim.x + 7) / 8);
    }
}

// Block: one row.
extern "C" __global__ void __launch_bounds__(THREADS) split_rows(const SplitParams p) {
    let_next_start();
    await_kernels_before();
    float* maxima = reinterpret_cast<float*>(SHARED_BYTES);  // [4 warps]
    const uint64_t row = blockIdx.x;
    const float* x = p.x + row * p.n_in;
    float max = 0.0f;
    for (uint32_t k = threadIdx.x; k < p.n_in; k += THREADS) max = fmaxf(max, fabsf(x[k]));
    max = max_over_warp(max);
    if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = max;
    SYNC(11);
    const int exponent = scale_exponent(fmaxf(fmaxf(maxima[0], maxima[1]), fmaxf(maxima[2], maxima[3])));
    if (threadIdx.x == 0) p.exponents[row] = exponent;
    const float scale = power_of_two(exponent);
    for (uint32_t k = threadIdx.x * 2; k < p.n_blocks * 32; k += 2 * THREADS) {
        const uint32_t even = in_two_parts(k < p.n_in ? __fmul_rn(x[k], scale) : 0.0f);
        const uint32_t odd = in_two_parts(k + 1 < p.n_in ? __fmul_rn(x[k + 1], scale) : 0.0f);
        unsigned char* to = p.parts + (static_cast<uint64_t>(k / 32) * ((gridDim.x + 7) / 8) + row / 8) * DENSE_ROWS + (row % 8 * 4 + k % 32 / 8) * 16 + k % 8 * 2;
        *reinterpret_cast<uint32_t*>(to) = firsts(even, odd);
        *reinterpret_cast<uint32_t*>(to + 512) = rests(even, odd);
    }
}

namespace {

// One weight: output `row` of a panel, input `k`.
__device__ __forceinline__ float weight_at(const Product& t, const unsigned char* panel, uint32_t row, uint32_t k) {
    const uint32_t output = row / 8, group = row % 8;
    if (t.form == FORM_DENSE) {
        const uint32_t lane = group * 4 + k % 32 / 8;
        const unsigned char* at = panel + static_cast<uint64_t>(k / 32) * t.planes * 1024 + output * 512 + lane * 16 + k % 8 * 2;
        float value = f16_value(*reinterpret_cast<const uint16_t*>(at));
        if (t.planes == 2) value = __fadd_rn(value, f16_value(*reinterpret_cast<const uint16_t*>(at + 1024)));
        return __fmul_rn(value, t.inverse);
    }
    const unsigned char* record = panel + static_cast<uint64_t>(k / 64) * record_bytes(t.form);
    const uint32_t side = k % 64 / 32, lane = group * 4 + k % 16 / 4, half = k % 32 / 16, byte = k % 4;
    const bool eight = t.form == FORM_Z8 || t.form == FORM_N8;
    const unsigned char* at = record + (eight ? side * 512 + lane * 16 + (half * 2 + output) * 4 : lane * 16 + (side * 2 + output) * 4);
    const unsigned char code = at[byte];
    const unsigned char* f = record + (eight ? 1024 : 512);
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(f);
    const int8_t* bytes = reinterpret_cast<const int8_t*>(f);
    const uint32_t nibble = code >> (half * 4) & 15u;
    if (t.form == FORM_Z4) {
        const float value = static_cast<float>(static_cast<int>(nibble ^ 8u) - 8);
        return __fmul_rn(f16_value(halves[group * 4 + output * 2 + side]), value);
    }
    if (t.form == FORM_Z8) {
        return __fmul_rn(f16_value(halves[group * 4 + output * 2 + side]), static_cast<float>(static_cast<int8_t>(code)));
    }
    if (t.form == FORM_P4) {
        const uint32_t i = group * 8 + output * 4 + side * 2;
        return __fmaf_rn(f16_value(halves[i]), static_cast<float>(nibble), f16_value(halves[i + 1]));
    }
    if (t.form == FORM_N4) {
        const uint32_t i = group * 8 + output * 4;
        const float scale = __fmul_rn(f16_value(halves[i]), static_cast<float>(bytes[2 * i + 4 + side * 2]));
        const float min = __fmul_rn(f16_value(halves[i + 1]), static_cast<float>(bytes[2 * i + 5 + side * 2]));
        return __fmaf_rn(scale, static_cast<float>(nibble), min);
    }
    const uint32_t i = group * 16 + output * 8, pair = i + (side == 0 ? 0 : 6), sub = 2 * i + 4 + side * 2 + half;
    const float scale = __fmul_rn(f16_value(halves[pair]), static_cast<float>(bytes[sub]));
    const float min = __fmul_rn(f16_value(halves[pair + 1]), static_cast<float>(bytes[sub + 4]));
    return __fmaf_rn(scale, static_cast<float>(static_cast<int8_t>(code)), min);
}

}  // namespace

// Block: the embedding of one token, every gridDim.y-th group of 128 values.
extern "C" __global__ void __launch_bounds__(THREADS) embed_rows(const EmbedParams p) {
    let_next_start();
    await_kernels_before();
    const uint32_t token = p.tokens[blockIdx.x];
    const uint64_t bytes = static_cast<uint64_t>(p.table.n_blocks) * record_bytes(p.table.form) *
                           (p.table.form == FORM_DENSE ? p.table.planes : 1);
    const unsigned char* panel = p.table.weights + token / 16 * bytes;
    float* out = p.table.out + static_cast<uint64_t>(blockIdx.x) * p.n_in;
    for (uint32_t k = blockIdx.y * THREADS + threadIdx.x; k < p.n_in; k += gridDim.y * THREADS) {
        out[k] = weight_at(p.table, panel, token % 16, k);
    }
}
