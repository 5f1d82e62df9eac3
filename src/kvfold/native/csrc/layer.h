// A layer's numbers: the batch's tensors, pages by table, and the queries that a tile of a kernel takes.
#pragma once
#include <algorithm>

#include "attend.h"

namespace kvfold {

constexpr double kLog2E = 1.4426950408889634;

struct Layer : kvfold_layer {
    explicit Layer(const kvfold_layer& call) : kvfold_layer(call) {}

    // First of `end` rows inside the window of the query that sees all of them, the last one being itself.
    int64_t visible(int64_t end) const { return window ? std::max<int64_t>(0, end - window) : 0; }
    int64_t flat(int64_t head) const { return layer * kv_heads + head; }
    uint8_t* page(const int32_t* pages, int64_t column) const { return data + int64_t(pages[column]) * page_bytes; }

    float number(const void* x, int64_t index) const {
        return wide ? static_cast<const float*>(x)[index] : from_bf16(static_cast<const uint16_t*>(x)[index]);
    }
    // Those that do not round float32 queries and weights, where that is what came.
    const Kernels& instructions() const {
        const auto& best = *static_cast<const Kernels*>(kernels);
        return wide ? *best.exact : best;
    }
    // Keys and values of one new token, uncompressed.
    void store_row(int64_t token, int64_t head, const Format& fmt, uint8_t* out) const {
        const struct { const void* x; int64_t at; const Row& row; uint8_t* out; } sides[] = {
            {k, token * k_token + head * k_head, fmt.key, out},
            {v, token * v_token + head * v_head, fmt.value, out + fmt.key_bytes},
        };
        for (const auto& side : sides) {
            const int bits = side.row.raw_bits;
            for (int d = 0; d < side.row.kept; ++d) write_raw(side.out + d * bits / 8, bits, number(side.x, side.at + d));
        }
    }
};

// Some queries of one step and KV head: which they are and what they ask.
struct Queries {
    int count = 0;
    int64_t query[kMaxRows], head[kMaxRows];  // among the step's queries and the group's heads
    alignas(64) float plain[kMaxRows][kMaxDim], scaled[kMaxRows][kMaxDim];

    void add(const Layer& l, const kvfold_step& step, int64_t kv_head, int64_t which, int64_t group_head) {
        query[count] = which;
        head[count] = group_head;
        const int64_t at = (step.first + which) * l.q_token + (kv_head * l.group + group_head) * l.q_head;
        for (int d = 0; d < l.dim; ++d) {
            plain[count][d] = l.number(l.q, at + d);
            scaled[count][d] = plain[count][d] * float(l.scale * kLog2E);
        }
        ++count;
    }
    // An empty tile of these queries.
    void ask(const Layer& l, Tile& tile) const {
        tile.clear(count, int(l.dim));
        tile.step = float(l.scale * kLog2E);
        for (int m = 0; m < count; ++m) {
            tile.plain[m] = plain[m];
            tile.query[m] = scaled[m];
        }
    }
    // Where the result of query m is among [T][H].
    int64_t out(const Layer& l, const kvfold_step& step, int64_t kv_head, int m) const {
        return (step.first + query[m]) * l.kv_heads * l.group + kv_head * l.group + head[m];
    }
};

}  // namespace kvfold
