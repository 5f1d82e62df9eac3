// What a set of instructions has to offer: rows of one page met by a few queries.
#pragma once
#include <cstddef>
#include <cstdint>
#include <limits>

#include "format.h"
#include "heads.h"

// The set of instructions that a source is compiled for, which its names end with.
#ifndef KVFOLD_SET
#define KVFOLD_SET Portable
#define KVFOLD_NAME "portable"
#endif
#define KVFOLD_JOIN(name, set) name##set
#define KVFOLD_EXPAND(name, set) KVFOLD_JOIN(name, set)
#define KVFOLD_NAMED(name) KVFOLD_EXPAND(name, KVFOLD_SET)

namespace kvfold {

constexpr int kMaxRows = 8;    // queries that share one read
constexpr int kMaxDim = 256;
constexpr int kRun = kRegrouped;  // tokens whose scores are held at once
constexpr float kNone = -std::numeric_limits<float>::infinity();

// Queries of one KV head and what they have found so far: out is the weighted sum of values, not yet divided by `sum`,
// weights being 2^(score - most).
struct Tile {
    int rows;
    int dim;
    const float* plain[kMaxRows];   // queries as the model made them, [dim]
    const float* query[kMaxRows];   // the same times `step`, so that scores are logarithms to base 2
    float step;
    int64_t first[kMaxRows];        // rows of the source that each query sees: [first, last)
    int64_t last[kMaxRows];
    float most[kMaxRows];
    float sum[kMaxRows];
    alignas(64) float out[kMaxRows][kMaxDim];

    void clear(int count, int d) {
        rows = count;
        dim = d;
        step = 1;
        for (int m = 0; m < count; ++m) {
            most[m] = kNone;
            sum[m] = 0;
            for (int i = 0; i < d; ++i) out[m][i] = 0;
        }
    }
};

// Rows [first, last) of a page, row `first` being number `number` of its source.
struct Run {
    const uint8_t* page;
    int first, last;
    int64_t number;
};

// A thread's working memory. It is handed down: looking up a thread-local variable in a loop costs more than the loop.
struct alignas(64) Scratch {
    uint8_t bytes[128 * 1024];
    uint8_t regrouped[2 * kRun * (kMaxDim + 1) + 64];  // vectors are read whole
};

struct LinearKernels;

struct Kernels {
    // Adds what `count` runs of one format hold to the tile. Runs of coded rows consist of whole units.
    void (*attend)(const Format&, Tile&, const Run*, int count, Scratch&);
    // Adds to mass[number] what each row of the runs received: the sum of 2^(power (score - most)) over the queries that
    // see it, `most` being their final log-sum-exp to base 2.
    void (*receive)(const Format&, const Tile&, const Run*, int count, float power, float* mass, Scratch&);
    // Products of a matrix [dim][dim], of which `kept` columns count: out [kept] = x [dim] matrix, out [dim] = matrix u [kept].
    void (*turn)(const float* matrix, int dim, int kept, const float* x, float* out);
    void (*lift)(const float* matrix, int dim, int kept, const float* u, float* out);
    const char* name;
    const Kernels* exact;  // those that do not round float32 queries and weights to 16 bits
    const LinearKernels* linear;
    void (*head)(const kvfold_heads&, int64_t token, int64_t head);
};

extern const Kernels kPortable, kAvx2, kVnni, kVnniBf16;
extern const LinearKernels kLinearPortable, kLinearAvx2, kLinearVnni;

// Takes what another source found into a tile.
void merge(Tile& into, const Tile& other);

static inline float from_bf16(uint16_t x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

static inline uint16_t to_bf16(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return uint16_t(bits >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// Numbers [at, at + count) of a tensor of float32 (wide) or bfloat16.
static inline void load_numbers(const void* tensor, bool wide, int64_t at, int64_t count, float* out) {
    if (wide)
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<const float*>(tensor)[at + i];
    else
        for (int64_t i = 0; i < count; ++i) out[i] = from_bf16(static_cast<const uint16_t*>(tensor)[at + i]);
}

static inline void store_numbers(void* tensor, bool wide, int64_t at, int64_t count, const float* numbers) {
    if (wide)
        for (int64_t i = 0; i < count; ++i) static_cast<float*>(tensor)[at + i] = numbers[i];
    else
        for (int64_t i = 0; i < count; ++i) static_cast<uint16_t*>(tensor)[at + i] = to_bf16(numbers[i]);
}

// An uncompressed number of 16 or 32 bits.
static inline float read_raw(const uint8_t* data, int bits) {
    float value;
    uint16_t half;
    if (bits == 32) {
        __builtin_memcpy(&value, data, 4);
        return value;
    }
    __builtin_memcpy(&half, data, 2);
    return from_bf16(half);
}

static inline void write_raw(uint8_t* data, int bits, float value) {
    const uint16_t half = to_bf16(value);
    if (bits == 32)
        __builtin_memcpy(data, &value, 4);
    else
        __builtin_memcpy(data, &half, 2);
}

static inline float from_f16(uint16_t x) {
    const uint32_t sign = uint32_t(x & 0x8000) << 16, exponent = x >> 10 & 31, fraction = x & 0x3ff;
    if (exponent == 0) return (sign ? -1.f : 1.f) * float(fraction) * 0x1p-24f;
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | fraction << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

}  // namespace kvfold
