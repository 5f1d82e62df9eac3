// Blocks of few tokens, a byte per dimension, put together to units of 16 tokens as the vector kernels read them.
#pragma once
#include <cstring>

#include "kernels.h"

namespace kvfold {
namespace {

// `dims` bytes of each of N blocks to N bytes of each dimension.
template <int N>
void interleave(const uint8_t* const* blocks, int offset, int dims, uint8_t* __restrict out) {
    const uint8_t* own[N];
    for (int i = 0; i < N; ++i) own[i] = blocks[i] + offset;
    for (int d = 0; d < dims; ++d)
        for (int i = 0; i < N; ++i) out[N * d + i] = own[i][d];
}

// One side of `count` blocks; in the blocks it begins at `offset`.
inline void regroup_side(const Row& from, const Row& to, const uint8_t* const* blocks, int count, int offset, uint8_t* out) {
    const int tokens = from.unit, together = kUnit / tokens;
    const auto part = together == 2 ? interleave<2> : together == 4 ? interleave<4> : together == 8 ? interleave<8> : interleave<16>;
    for (int i = 0; i < count; i += together) part(blocks + i, offset, from.kept, out + i / together * to.unit_bytes);
    for (int i = 0; from.scale == Scale::Step && i < count; ++i)
        std::memcpy(out + to.scales + i * tokens, blocks[i] + offset + from.scales, size_t(tokens));
}

// Calls add(run) for the rows of runs in pages of the format that they are regrouped to.
template <class Add>
void each_regrouped(const Format& fmt, const Run* runs, int count, Scratch& scratch, Add add) {
    const uint8_t* blocks[kRun + kUnit];
    int found = 0;
    int64_t number = count ? runs->number : 0;
    const auto flush = [&] {
        const int tokens = found * fmt.block, whole = (tokens + kUnit - 1) / kUnit * kUnit;
        for (int i = found; i < whole / fmt.block; ++i) blocks[i] = blocks[0];  // to fill the last unit; nobody sees them
        const Format& to = *fmt.regrouped;
        regroup_side(fmt.key, to.key, blocks, whole / fmt.block, 0, scratch.regrouped);
        regroup_side(fmt.value, to.value, blocks, whole / fmt.block, fmt.key_bytes, scratch.regrouped + to.key_bytes);
        add(Run{scratch.regrouped, 0, whole, number});
        number += tokens;
        found = 0;
    };
    for (; count--; ++runs) {
        for (int row = runs->first; row < runs->last; row += fmt.block) {
            blocks[found++] = runs->page + size_t(row / fmt.block) * fmt.block_bytes;
            if (found * fmt.block == kRun) flush();
        }
    }
    if (found) flush();
}

}  // namespace
}  // namespace kvfold
