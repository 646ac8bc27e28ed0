// The machine behind emulation.h, and the one entry the Rust side calls.
#define TENANTRY_EMULATION
#include "all.cu"

#include <cstdio>
#include <memory>
#include <vector>

// Saves the callee-saved registers on the running stack, leaves its pointer in *save and goes on at `load`.
extern "C" void tenantry_switch_stack(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl tenantry_switch_stack
.hidden tenantry_switch_stack
.type tenantry_switch_stack,@function
tenantry_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size tenantry_switch_stack,.-tenantry_switch_stack
)");

namespace emulation {

thread_local Dim thread_index, block_index, grid_size;
thread_local unsigned char* shared_bytes;

namespace {

constexpr uint32_t WARP = 32;
// A kernel's frame is a few hundred bytes; std::fma and the collectives need little more.
constexpr size_t STACK_BYTES = 32 * 1024;
// Below a stack's first byte nothing may be written: the last word of it is checked at the end.
constexpr uint64_t CANARY = 0x7465'6e61'6e74'7279;

enum class State { ready, at_barrier, in_warp, done };

struct Copy {
    void* to;
    const void* from;
    uint32_t group;
};

struct Fiber {
    void* stack_pointer;
    State state;
    uint32_t barrier;
    Collective operation;
    void* argument;
    // Copies asked for, with the group they belong to, and groups committed so far.
    std::vector<Copy> copies;
    uint32_t groups;
};

// One launch. Lives on the caller's stack; fibers find it through `machine`.
struct Machine {
    void (*kernel)(const void*);
    const void* params;
    uint32_t skip_barrier;
    bool backwards;
    std::vector<Fiber> fibers;
    std::unique_ptr<uint64_t[]> stacks;
    std::vector<uint64_t> shared;
    void* scheduler;
    uint32_t running;
    char* message;
    size_t message_bytes;
    bool failed;
};

thread_local Machine* machine;

void yield() { tenantry_switch_stack(&machine->fibers[machine->running].stack_pointer, machine->scheduler); }

void fail(const char* what) {
    if (machine->failed) return;
    machine->failed = true;
    std::snprintf(machine->message, machine->message_bytes, "block (%u, %u, %u), thread %u: %s", block_index.x,
                  block_index.y, block_index.z, machine->running, what);
}

void fiber_main() {
    machine->kernel(machine->params);
    machine->fibers[machine->running].state = State::done;
    for (;;) yield();
}

void shuffle_warp(Fiber* lanes) {
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        auto* to = static_cast<Shuffle*>(lanes[lane].argument);
        to->result = static_cast<Shuffle*>(lanes[lane ^ to->mask].argument)->value;
    }
}

// Lane (4 * group + quad) holds a: rows group and group + 8, columns 2 * quad, + 1, + 8, + 9; b: those rows of column
// group; c: rows group and group + 8, columns 2 * quad and + 1 (PTX ISA, "Matrix Fragments for mma.m16n8k16").
void mma_warp(Fiber* lanes) {
    float a[16][16], b[16][8];
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        const auto* from = static_cast<const Mma*>(lanes[lane].argument);
        const uint32_t group = lane / 4, quad = lane % 4;
        for (uint32_t i = 0; i < 8; ++i) {
            const uint32_t row = group + i / 2 % 2 * 8, k = quad * 2 + i % 2 + i / 4 * 8;
            a[row][k] = f16_value(static_cast<uint16_t>(from->a[i / 2] >> (i % 2 * 16)));
        }
        for (uint32_t i = 0; i < 4; ++i) {
            b[quad * 2 + i % 2 + i / 2 * 8][group] = f16_value(static_cast<uint16_t>(from->b[i / 2] >> (i % 2 * 16)));
        }
    }
    float sums[16][8] = {};
    auto value = [&](uint32_t row, uint32_t column) -> float& {
        return static_cast<Mma*>(lanes[row % 8 * 4 + column / 2].argument)->c[row / 8 * 2 + column % 2];
    };
    for (uint32_t row = 0; row < 16; ++row) {
        for (uint32_t column = 0; column < 8; ++column) sums[row][column] = value(row, column);
        for (uint32_t k = 0; k < 16; ++k) {
            // A product of two f16 is exact in f32.
            for (uint32_t column = 0; column < 8; ++column) sums[row][column] += a[row][k] * b[k][column];
        }
        for (uint32_t column = 0; column < 8; ++column) value(row, column) = sums[row][column];
    }
}

// Lane (4 * group + quad) holds a: rows group and group + 8 of inputs 4 * quad to + 3, then the same of inputs 16 more; b:
// those inputs of column group; c as above (PTX ISA, "Matrix Fragments for mma.m16n8k32" and "m16n8k16", integer).
void mma_int_warp(Fiber* lanes) {
    int32_t a[16][32] = {}, b[32][8] = {};
    const auto* any = static_cast<const MmaInt*>(lanes[0].argument);
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        const auto* from = static_cast<const MmaInt*>(lanes[lane].argument);
        const uint32_t group = lane / 4, quad = lane % 4;
        for (uint32_t word = 0; word < any->k / 8; ++word) {
            for (uint32_t i = 0; i < 4; ++i) {
                const auto byte = static_cast<uint8_t>(from->a[word] >> (i * 8));
                a[group + word % 2 * 8][quad * 4 + i + word / 2 * 16] = any->unsigned_a ? byte : static_cast<int8_t>(byte);
            }
        }
        for (uint32_t word = 0; word < any->k / 16; ++word) {
            for (uint32_t i = 0; i < 4; ++i) {
                b[quad * 4 + i + word * 16][group] = static_cast<int8_t>(from->b[word] >> (i * 8));
            }
        }
    }
    for (uint32_t row = 0; row < 16; ++row) {
        for (uint32_t column = 0; column < 8; ++column) {
            auto* to = static_cast<MmaInt*>(lanes[row % 8 * 4 + column / 2].argument);
            int32_t& sum = to->c[row / 8 * 2 + column % 2];
            for (uint32_t k = 0; k < any->k; ++k) sum += a[row][k] * b[k][column];
        }
    }
}

// Runs `index` until it waits or ends.
void resume(uint32_t index) {
    machine->running = index;
    thread_index = {index, 0, 0};
    tenantry_switch_stack(&machine->scheduler, machine->fibers[index].stack_pointer);
}

void prepare(uint32_t index) {
    uint64_t* low = machine->stacks.get() + index * (STACK_BYTES / 8);
    uint64_t* high = low + STACK_BYTES / 8;
    low[0] = CANARY;
    // Six registers, then where `ret` goes; the stack is then aligned as after a call.
    auto** top = reinterpret_cast<void**>(high) - 8;
    std::memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(fiber_main);
    machine->fibers[index] = {top, State::ready, 0, Collective::mma, nullptr, {}, 0};
}

// Lets a complete barrier go; false when nobody can go on.
bool release_barrier() {
    auto& fibers = machine->fibers;
    for (uint32_t i = 0; i < fibers.size(); ++i) {
        machine->running = i;
        if (fibers[i].state == State::in_warp) return fail("waits for lanes that never come"), false;
        if (fibers[i].state == State::done) return fail("ended while others wait at a barrier"), false;
        if (fibers[i].barrier != fibers[0].barrier) return fail("waits at another barrier than thread 0"), false;
    }
    for (Fiber& fiber : fibers) fiber.state = State::ready;
    return true;
}

// Runs a warp until all its lanes wait for the block or have ended, so that it gets as far ahead of the others as it can.
void run_warp(uint32_t first) {
    for (bool progress = true; progress && !machine->failed;) {
        progress = false;
        for (uint32_t i = 0; i < WARP && !machine->failed; ++i) {
            const uint32_t index = first + (machine->backwards ? WARP - 1 - i : i);
            if (machine->fibers[index].state != State::ready) continue;
            resume(index);
            progress = true;
        }
    }
}

void run_block() {
    const auto n = static_cast<uint32_t>(machine->fibers.size());
    std::memset(machine->shared.data(), 0xff, machine->shared.size() * sizeof(uint64_t));
    for (uint32_t i = 0; i < n; ++i) prepare(i);
    for (;;) {
        for (uint32_t i = 0; i < n / WARP; ++i) {
            run_warp((machine->backwards ? n / WARP - 1 - i : i) * WARP);
            if (machine->failed) return;
        }
        uint32_t done = 0;
        for (const Fiber& fiber : machine->fibers) done += fiber.state == State::done;
        if (done == n) break;
        if (!release_barrier()) return;
    }
    for (uint32_t i = 0; i < n; ++i) {
        machine->running = i;
        if (machine->stacks[i * (STACK_BYTES / 8)] != CANARY) return fail("overran its stack");
    }
    for (size_t i = machine->shared.size() - 2; i < machine->shared.size(); ++i) {
        if (machine->shared[i] != ~0ull) return fail("or another wrote beyond the shared memory of the launch");
    }
}

}  // namespace

void wait_for_block(uint32_t id) {
    if (id == machine->skip_barrier) return;
    Fiber& fiber = machine->fibers[machine->running];
    fiber.state = State::at_barrier;
    fiber.barrier = id;
    yield();
}

void wait_for_warp(Collective operation, void* argument) {
    const uint32_t first = machine->running / WARP * WARP;
    Fiber* lanes = &machine->fibers[first];
    Fiber& own = machine->fibers[machine->running];
    own.state = State::in_warp;
    own.operation = operation;
    own.argument = argument;
    for (uint32_t lane = 0; lane < WARP; ++lane) {
        if (lanes[lane].state != State::in_warp) return yield();
        if (lanes[lane].operation != operation) {
            fail("is in another operation than its warp");
            return yield();
        }
    }
    switch (operation) {
        case Collective::mma: mma_warp(lanes); break;
        case Collective::mma_int: mma_int_warp(lanes); break;
        case Collective::shuffle_xor: shuffle_warp(lanes); break;
        case Collective::sync: break;
    }
    for (uint32_t lane = 0; lane < WARP; ++lane) lanes[lane].state = State::ready;
}

void wait_for_warp_barrier(uint32_t id) {
    if (id != machine->skip_barrier) wait_for_warp(Collective::sync, nullptr);
}

void async_copy(void* to, const void* from) {
    Fiber& fiber = machine->fibers[machine->running];
    fiber.copies.push_back({to, from, fiber.groups});
}

void async_commit() { ++machine->fibers[machine->running].groups; }

void async_wait(uint32_t left) {
    Fiber& fiber = machine->fibers[machine->running];
    size_t done = 0;
    while (done < fiber.copies.size() && fiber.copies[done].group + left < fiber.groups) {
        std::memcpy(fiber.copies[done].to, fiber.copies[done].from, 16);
        ++done;
    }
    fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(done));
}

uint16_t f16_bits(float x) {
    uint32_t bits = __float_as_uint(x);
    const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    // From half way above the largest number on.
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {
        // Below 2^-14 the steps are 2^-24: adding 0.5, whose last place is just that, rounds.
        return sign | static_cast<uint16_t>(__float_as_uint(__uint_as_float(bits) + 0.5f) - 0x3f000000);
    }
    return sign | static_cast<uint16_t>((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

float f16_value(uint16_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, rest = bits & 0x7fff;
    if (rest >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest < 0x400) return std::copysign(static_cast<float>(rest) * 0x1p-24f, __uint_as_float(sign | 0x3f800000));
    return __uint_as_float(sign | ((rest << 13) + 0x38000000));
}

}  // namespace emulation

namespace {

template <typename Params, void (*Kernel)(Params)>
void call(const void* params) {
    Kernel(*static_cast<const Params*>(params));
}

// In the order of `Kernel` on the Rust side.
constexpr void (*KERNELS[])(const void*) = {
    call<const LoraParams, lora_shrink>,
    call<const LoraParams, lora_expand>,
    call<const AttentionParams, attention>,
    call<const AttentionParams, attention_combine>,
    call<const NormParams, residual_rms_norm>,
    call<const RopeParams, rope_store>,
    call<const SwigluParams, swiglu>,
    call<const BiasParams, add_bias>,
    call<const RoundParams, round_rows>,
    call<const SplitParams, split_rows>,
    call<const EmbedParams, embed_rows>,
    call<const MatmulParams, matmul_1>,
    call<const MatmulParams, matmul_2>,
    call<const MatmulParams, matmul_4>,
    call<const MatmulParams, matmul_8>,
    call<const MatmulParams, matmul_tall>,
};

}  // namespace

// Runs a kernel over a grid. Returns 0, or 1 with the reason in `message`. `skip_barrier` 0 leaves out none.
extern "C" int tenantry_emulate(uint32_t kernel, const uint32_t* grid, uint32_t threads, uint32_t shared_bytes,
                                const void* params, uint32_t skip_barrier, int backwards, char* message, size_t message_bytes) {
    using namespace emulation;
    Machine here{};
    here.kernel = KERNELS[kernel];
    here.params = params;
    here.skip_barrier = skip_barrier;
    here.backwards = backwards != 0;
    here.fibers.resize(threads);
    here.stacks.reset(new uint64_t[threads * (STACK_BYTES / 8)]);
    // Two words more, to see what is written beyond the end.
    here.shared.resize((shared_bytes + 15) / 16 * 2 + 2);
    here.message = message;
    here.message_bytes = message_bytes;
    machine = &here;
    emulation::shared_bytes = reinterpret_cast<unsigned char*>(here.shared.data());
    grid_size = {grid[0], grid[1], grid[2]};
    for (uint32_t z = 0; z < grid[2] && !here.failed; ++z) {
        for (uint32_t y = 0; y < grid[1] && !here.failed; ++y) {
            for (uint32_t x = 0; x < grid[0] && !here.failed; ++x) {
                block_index = {x, y, z};
                run_block();
            }
        }
    }
    machine = nullptr;
    return here.failed ? 1 : 0;
}

// Sizes and constants that the Rust side must have alike, in its order; `conversions` for the tests of f16.
extern "C" void tenantry_emulation_facts(uint32_t* facts) {
    const uint32_t all[] = {sizeof(LoraTile), sizeof(LoraPairDesc), sizeof(LoraParams), sizeof(AttentionTile),
                            sizeof(AttentionParams), sizeof(NormParams), sizeof(RopeParams), sizeof(SwigluParams),
                            sizeof(BiasParams), sizeof(RoundParams), sizeof(SplitParams), sizeof(Product),
                            sizeof(MatmulParams), sizeof(EmbedParams), CODED_ROWS, DENSE_ROWS,
                            ((MATMUL_STAGES[0] * 16 + MATMUL_STAGES[1]) * 16 + MATMUL_STAGES[2]) * 16 + MATMUL_STAGES[3],
                            TILE, THREADS, NORM_THREADS, CHUNK, RANKS, COLUMNS, SPLIT, PAGE};
    std::memcpy(facts, all, sizeof all);
}

extern "C" uint16_t tenantry_emulation_f16_bits(float x) { return emulation::f16_bits(x); }
extern "C" float tenantry_emulation_f16_value(uint16_t bits) { return emulation::f16_value(bits); }
