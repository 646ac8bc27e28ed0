// What host and kernels exchange: parameter blocks, work lists and the constants both sides count with. The Rust side is
// `src/cuda/params.rs`; tests under emulation compare sizes and constants. Plain C++, for nvcc and for the emulation.
#pragma once

#include <cstdint>

// Rows (or query vectors) of one tensor-core tile.
constexpr uint32_t TILE = 16;
// Threads of every block.
constexpr uint32_t THREADS = 128;
// Inputs per partial sum of the shrink kernel. Fixed, because it decides the order of summation.
constexpr uint32_t CHUNK = 512;
// Ranks per block of the shrink kernel.
constexpr uint32_t RANKS = 32;
// Output columns per block of the expand kernel.
constexpr uint32_t COLUMNS = 128;
// Positions whose softmax is taken in one piece. Fixed, because it decides the order of summation.
constexpr uint32_t SPLIT = 256;
// Positions per KV page.
constexpr uint32_t PAGE = 16;
// Marks a tile that writes its result instead of a partial one.
constexpr uint32_t NOWHERE = 0xffffffffu;

// Up to TILE consecutive rows that share an adapter.
struct LoraTile {
    uint32_t segment;
    uint32_t row;
    uint32_t n_rows;
};

// An adapter's pair for one linear layer; rank 0 says there is none.
struct LoraPairDesc {
    // f16 bits: `planes` times `[rank][a_pitch]`, values times 1 / a_inverse.
    const uint16_t* a;
    // f16 bits: `planes` times `[n_out][b_pitch]`, values times 1 / b_inverse.
    const uint16_t* b;
    // DoRA, `[n_out]`, or null.
    const float* row_scale;
    uint32_t rank;
    uint32_t a_pitch;
    uint32_t b_pitch;
    // 1, or 2 where the second holds what rounding to f16 left over.
    uint32_t planes;
    float a_inverse;
    float b_inverse;
    float scale;
    uint32_t unused;
};

struct LoraParams {
    const float* x;       // [n_rows][n_in]
    float* y;             // [n_rows][n_out]
    float* partial;       // [n_chunks][n_rows][stride]
    const LoraTile* tiles;
    const LoraPairDesc* pairs;
    uint32_t n_rows;
    uint32_t n_in;
    uint32_t n_out;
    uint32_t n_chunks;
    uint32_t stride;
    uint32_t unused;
};

// Up to TILE consecutive queries of a run on one key/value head; query i is row i / group, head i % group.
struct AttentionTile {
    uint32_t first_row;   // batch row of the run's first row
    uint32_t query;       // first query of the tile within its run
    uint32_t n_queries;
    uint32_t position;    // of the run's first row
    uint32_t pages;       // where the run's pages begin in the list
    uint32_t first_split;
    uint32_t n_splits;
    uint32_t partial;     // first place in the partial results, or NOWHERE
};

struct AttentionParams {
    const float* q;       // [n_rows][n_heads * head_dim]
    float* out;           // same
    const uint16_t* kv;   // [n_pages][n_layers][n_kv_heads]{keys [PAGE][head_dim], values [head_dim][PAGE]}, f16 bits
    const AttentionTile* tiles;
    const uint32_t* pages;
    float* partial;       // [place][n_kv_heads]{sums [TILE][head_dim], maxima [TILE], weights [TILE]}
    uint64_t page_stride; // values from a page to the next
    uint64_t layer_offset;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t group;
    float scale;
};

struct NormParams {
    float* hidden;        // [n_rows][n]
    const float* delta;   // [n_rows][n] added to hidden first, or null
    const float* weight;  // [n]
    float* out;           // [n_rows][n]
    uint32_t n;
    float eps;
};

struct RopeParams {
    float* q;             // [n_rows][n_heads * head_dim], rotated in place
    const float* k;       // [n_rows][n_kv_heads * head_dim]
    const float* v;       // same
    uint16_t* kv;
    const float* cosines; // [positions][head_dim / 2]
    const float* sines;
    const uint32_t* positions;
    const uint32_t* slots; // page * PAGE + slot of each row
    uint64_t page_stride;
    uint64_t layer_offset;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t unused;
};

struct SwigluParams {
    const float* gate;
    const float* up;
    float* out;
    uint64_t n;
};
