// A linear layer: the input is made ready, then threads share the blocks of rows.
#include "linear.h"

#include <algorithm>
#include <vector>

#include <omp.h>

#include "kernels.h"

namespace kvfold {
namespace {

constexpr int64_t kTiles = 8;  // of a task: their input stays in the second-level cache

int64_t padded(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// Memory that stays for the next call.
uint8_t* working_memory(size_t bytes) {
    thread_local std::vector<uint8_t> memory;
    if (memory.size() < bytes + 64) memory.resize(bytes + 64);
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) & ~uintptr_t(63));
}

Inputs make_inputs(const kvfold_linear& l, int64_t tiles) {
    Inputs in{};
    in.width = padded(l.inputs, group_of(l.bits));
    in.tile = int((l.tokens + tiles - 1) / tiles);
    const size_t room = size_t(tiles * in.tile);
    if (l.bits == 16) {
        in.numbers = reinterpret_cast<float*>(working_memory(room * size_t(in.width) * sizeof(float)));
        return in;
    }
    in.groups = in.width / group_of(l.bits);
    const size_t codes = room * size_t(in.width), scales = room * size_t(in.groups);
    uint8_t* memory = working_memory(codes + scales * (sizeof(float) + sizeof(int32_t)));
    in.codes = reinterpret_cast<int8_t*>(memory);
    in.scales = reinterpret_cast<float*>(memory + codes);
    in.sums = reinterpret_cast<int32_t*>(in.scales + scales);
    return in;
}

}  // namespace
}  // namespace kvfold

extern "C" {

void kvfold_multiply(const kvfold_linear* call) {
    using namespace kvfold;
    const kvfold_linear& l = *call;
    const LinearKernels& kernels = *static_cast<const Kernels*>(l.kernels)->linear;
    const int64_t tiles = (l.tokens + kMaxTile - 1) / kMaxTile, parts = (tiles + kTiles - 1) / kTiles;
    const Inputs in = make_inputs(l, tiles);
    const int64_t blocks = padded(l.rows, kLinearRows) / kLinearRows;
    const int threads = omp_get_max_threads();
    // An even number of blocks, which may be worked off in pairs; several tasks for each thread.
    const int64_t size = std::max<int64_t>(2, blocks * parts / (4 * threads) / 2 * 2);
    const int64_t tasks = (blocks + size - 1) / size;
#pragma omp parallel
    {
        thread_local std::vector<float> row;  // stays, as the working memory does
        if (row.size() < size_t(2 * in.width)) row.resize(size_t(2 * in.width));
#pragma omp for schedule(static)
        for (int64_t token = 0; token < l.tokens; ++token) kernels.prepare(l, in, token, row.data());
#pragma omp for schedule(dynamic, 1) collapse(2) nowait
        for (int64_t part = 0; part < parts; ++part)
            for (int64_t task = 0; task < tasks; ++task)
                kernels.multiply(l, in, task * size, std::min(blocks, task * size + size), part * kTiles,
                                 std::min(tiles, part * kTiles + kTiles));
    }
}
}
