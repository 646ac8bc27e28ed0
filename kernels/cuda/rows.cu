// Row-wise operations, fused with what stands beside them in a layer. Reference: `src/ops/scalar.rs`, whose bits they
// give: the same operations in the same order, sixteen partial sums by column modulo 16 where there is a sum.
#include "round.cuh"

// hidden += delta (if any); out = hidden / sqrt(mean(hidden^2) + eps) * weight, also rounded to codes if wanted. Block:
// one row.
extern "C" __global__ void __launch_bounds__(NORM_THREADS) residual_rms_norm(const NormParams p) {
    let_next_start();
    await_kernels_before();
    // Numbers a thread loads before it uses the first: a lone row is bound by the latency of memory.
    constexpr uint32_t BATCH = 8;
    float* row = reinterpret_cast<float*>(SHARED_BYTES);  // [n]
    float* inverse = row + p.n;                           // [1]
    const uint64_t from = static_cast<uint64_t>(p.rows != nullptr ? p.rows[blockIdx.x] : blockIdx.x) * p.n;
    const uint64_t to = static_cast<uint64_t>(blockIdx.x) * p.n;
    for (uint32_t first = threadIdx.x; first < p.n; first += BATCH * NORM_THREADS) {
        float values[BATCH] = {}, deltas[BATCH] = {};
#pragma unroll
        for (uint32_t i = 0; i < BATCH; ++i) {
            const uint32_t at = first + i * NORM_THREADS;
            if (at < p.n) values[i] = p.hidden[from + at];
            if (at < p.n && p.delta != nullptr) deltas[i] = p.delta[from + at];
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; ++i) {
            const uint32_t at = first + i * NORM_THREADS;
            if (at >= p.n) continue;
            if (p.delta != nullptr) {
                values[i] = __fadd_rn(values[i], deltas[i]);
                if (p.rows == nullptr) p.hidden[from + at] = values[i];
            }
            row[at] = values[i];
        }
    }
    SYNC(8);
    if (threadIdx.x < 32) {
        float part = 0.0f;
        for (uint32_t first = threadIdx.x; threadIdx.x < 16 && first < p.n; first += 16 * 16) {
            float values[16];
            // What lies beyond the row adds a zero, which changes no sum of squares.
#pragma unroll
            for (uint32_t i = 0; i < 16; ++i) values[i] = first + i * 16 < p.n ? row[first + i * 16] : 0.0f;
#pragma unroll
            for (uint32_t i = 0; i < 16; ++i) part = __fmaf_rn(values[i], values[i], part);
        }
        // Sums of two are the same in either order, so the exchange gives the reference's tree.
        for (int mask = 8; mask > 0; mask /= 2) part = __fadd_rn(part, shuffle_xor(part, mask));
        if (threadIdx.x == 0) {
            const float mean = __fdiv_rn(part, static_cast<float>(p.n));
            *inverse = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, p.eps)));
        }
    }
    SYNC(9);
    for (uint32_t first = threadIdx.x; first < p.n; first += BATCH * NORM_THREADS) {
        float weights[BATCH] = {};
#pragma unroll
        for (uint32_t i = 0; i < BATCH; ++i) {
            const uint32_t at = first + i * NORM_THREADS;
            if (at < p.n) weights[i] = p.weight[at];
        }
#pragma unroll
        for (uint32_t i = 0; i < BATCH; ++i) {
            const uint32_t at = first + i * NORM_THREADS;
            if (at >= p.n) continue;
            const float value = __fmul_rn(__fmul_rn(row[at], *inverse), weights[i]);
            p.out[to + at] = value;
            if (p.codes != nullptr) round_block(value, p.codes, blockIdx.x, at / 32, (gridDim.x + 7) / 8);
        }
    }
}

// Rounds to f16 for a page; beyond 65504 to the largest number, so that one row can never make its neighbours NaN.
static __device__ __forceinline__ uint16_t stored(float x) {
    x = x > 65504.0f ? 65504.0f : x;
    return f16_bits(x < -65504.0f ? -65504.0f : x);
}

// Rotates q in place, rotates k, and writes k and v into the row's slot. Block: a share of one row.
extern "C" __global__ void __launch_bounds__(THREADS) rope_store(const RopeParams p) {
    let_next_start();
    await_kernels_before();
    const uint32_t row = blockIdx.x, half = p.head_dim / 2;
    const uint32_t first = blockIdx.y * THREADS + threadIdx.x, step = gridDim.y * THREADS;
    const uint32_t slot = p.slots[row] % PAGE;
    const uint64_t page = p.slots[row] / PAGE;
    const float* cosines = p.cosines + static_cast<uint64_t>(p.positions[row]) * half;
    const float* sines = p.sines + static_cast<uint64_t>(p.positions[row]) * half;
    const uint64_t n_kv = static_cast<uint64_t>(p.n_kv_heads) * p.head_dim;
    float* q = p.q + static_cast<uint64_t>(row) * p.n_heads * p.head_dim;
    for (uint32_t i = first; i < p.n_heads * half; i += step) {
        const uint32_t d = i % half;
        float* a = q + static_cast<uint64_t>(i / half) * p.head_dim + d;
        const float x = a[0], y = a[half];
        a[0] = __fmaf_rn(x, cosines[d], -__fmul_rn(y, sines[d]));
        a[half] = __fmaf_rn(y, cosines[d], __fmul_rn(x, sines[d]));
    }
    uint16_t* kv = p.kv + page * p.page_stride + p.layer_offset;
    for (uint32_t i = first; i < p.n_kv_heads * half; i += step) {
        const uint32_t head = i / half, d = i % half;
        const float* a = p.k + row * n_kv + static_cast<uint64_t>(head) * p.head_dim + d;
        uint16_t* keys = kv + static_cast<uint64_t>(head) * 2 * PAGE * p.head_dim + slot * p.head_dim + d;
        const float x = a[0], y = a[half];
        keys[0] = stored(__fmaf_rn(x, cosines[d], -__fmul_rn(y, sines[d])));
        keys[half] = stored(__fmaf_rn(y, cosines[d], __fmul_rn(x, sines[d])));
    }
    for (uint32_t i = first; i < n_kv; i += step) {
        const uint32_t head = i / p.head_dim, d = i % p.head_dim;
        uint16_t* values = kv + (static_cast<uint64_t>(head) * 2 + 1) * PAGE * p.head_dim;
        values[d * PAGE + slot] = stored(p.v[row * n_kv + i]);
    }
}

// out = gate / (1 + exp(-gate)) * up, also rounded to codes if wanted.
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const SwigluParams p) {
    let_next_start();
    await_kernels_before();
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * THREADS;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x; i < p.n; i += step) {
        const float gate = p.gate[i];
        const float value = __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, exp_exactly(-gate))), p.up[i]);
        p.out[i] = value;
        // With codes, rows are whole warps wide.
        if (p.codes != nullptr) {
            round_block(value, p.codes, i / p.width, static_cast<uint32_t>(i % p.width) / 32, p.n_tiles);
        }
    }
}

// y += bias, in every row.
extern "C" __global__ void __launch_bounds__(THREADS) add_bias(const BiasParams p) {
    let_next_start();
    await_kernels_before();
    const uint64_t step = static_cast<uint64_t>(gridDim.x) * THREADS;
    for (uint64_t i = static_cast<uint64_t>(blockIdx.x) * THREADS + threadIdx.x; i < p.n_values; i += step) {
        p.y[i] = __fadd_rn(p.y[i], p.bias[i % p.n]);
    }
}
