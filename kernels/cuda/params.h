// What host and kernels exchange: parameter blocks, work lists and the constants both sides count with. The Rust side is
// `src/cuda/params.rs`; tests under emulation compare sizes and constants. Plain C++, for nvcc and for the emulation.
#pragma once

#include <cstdint>

// Rows (or query vectors) of one tensor-core tile.
constexpr uint32_t TILE = 16;
// Threads of a block of every kernel but the norm, whose rows are few and long.
constexpr uint32_t THREADS = 128;
constexpr uint32_t NORM_THREADS = 512;
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
// Forms of weights; FORM_DENSE is f16, the others are codes with scales (see matmul.cu).
constexpr uint32_t FORM_Z4 = 0, FORM_P4 = 1, FORM_N4 = 2, FORM_Z8 = 3, FORM_N8 = 4, FORM_DENSE = 5;
// Bytes of a record of eight rows and 64 inputs in codes, and of eight rows and 32 inputs in two parts.
constexpr uint32_t CODED_ROWS = 704;
constexpr uint32_t DENSE_ROWS = 1024;
// Blocks of inputs in the rings of the products with 1, 2, 4 and 8 tiles of rows: as many as keep the memory busy, as few
// as leave room for several blocks on a multiprocessor.
constexpr uint32_t MATMUL_STAGES[4] = {8, 6, 4, 3};
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

// One linear layer of a launch.
struct LoraLayer {
    float* y;             // [n_rows][n_out]
    float* partial;       // [n_chunks][n_rows][stride]
    uint32_t pair;        // which of an adapter's pairs
    uint32_t n_out;
    uint32_t first_block; // of COLUMNS outputs; those of the layers before it
    uint32_t unused;
};

// Up to three layers of the same inputs.
struct LoraParams {
    const float* x;       // [n_rows][n_in]
    const LoraTile* tiles;
    const LoraPairDesc* pairs;  // [segments][n_pairs]
    LoraLayer layers[3];
    uint32_t n_layers;
    uint32_t n_pairs;
    uint32_t n_rows;
    uint32_t n_in;
    uint32_t n_chunks;
    uint32_t stride;
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
    const uint32_t* rows; // row of hidden and delta that each row of out is made from, hidden then stays; or null
    unsigned char* codes; // as RoundParams, or null
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
    unsigned char* codes; // as RoundParams, or null
    uint64_t n;
    uint32_t width;       // of a row; matters with codes only
    uint32_t n_tiles;     // of eight rows; likewise
};

struct BiasParams {
    float* y;             // [n_rows][n]
    const float* bias;    // [n]
    uint64_t n_values;
    uint32_t n;
    uint32_t unused;
};

// Rounds rows to 8-bit codes, for products with coded weights.
struct RoundParams {
    const float* x;       // [n_rows][n_in]
    unsigned char* codes; // [n_blocks][n_rows / 8] records of CODED_ROWS bytes
    uint32_t n_in;
    uint32_t n_blocks;    // of 64 inputs
};

// Splits rows into two f16 parts, for products with dense weights.
struct SplitParams {
    const float* x;       // [n_rows][n_in]
    unsigned char* parts; // [n_blocks][n_rows / 8] records of DENSE_ROWS bytes
    int32_t* exponents;   // [n_rows]
    uint32_t n_in;
    uint32_t n_blocks;    // of 32 inputs
};

// One matrix of weights of a product: panels of 16 outputs, a record per panel and block of inputs.
struct Product {
    const unsigned char* weights;
    float* out;           // [n_rows][n_out]
    uint32_t n_out;
    uint32_t first_panel; // panels of the products before it
    uint32_t form;
    uint32_t n_blocks;    // of 64 inputs, dense: of 32
    float inverse;        // dense: what undoes the scaling of the weights
    uint32_t planes;      // dense: 1, or 2 where the second holds what rounding to f16 left over
};

struct MatmulParams {
    const unsigned char* codes; // of the rows, as RoundParams
    const unsigned char* parts; // of the rows, as SplitParams
    const int32_t* exponents;
    Product products[3];
    uint32_t n_products;
    uint32_t n_panels;    // of all products
    uint32_t n_rows;
    uint32_t unused;
};

struct EmbedParams {
    Product table;        // out [n_rows][n_in]
    const uint32_t* tokens;
    uint32_t n_in;
    uint32_t unused;
};
