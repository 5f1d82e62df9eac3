// Tiles of linear layers with weights of 16 bits, in the same order of operations as with AVX-512.
#pragma once
#include <algorithm>

#include "lanes.h"
#include "linear.h"

namespace kvfold {
namespace {

constexpr int kFewTokens = 4;  // whose sums fit into registers beside two vectors of weights

// Tokens from First on.
template <int Blocks, int Tokens, int First = 0>
void plain_tile(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t tile, float (&sums)[Tokens][Blocks][kLinearRows]) {
    constexpr int kCount = std::min(kFewTokens, Tokens - First);
    for (int b = 0; b < Blocks; ++b)
        for (int row = 0; row < kLinearRows; row += 2 * kLanes) {
            const uint8_t* codes = l.codes + ((block + b) * in.width * kLinearRows + 2 * row) * 2;
            const float* x = in.numbers + tile * in.width * Tokens + First;
            Lanes found[kCount][2];
            for (auto& own : found) own[0] = own[1] = Lanes{};
            for (int64_t i = 0; i < in.width; i += 2, codes += 4 * kLinearRows, x += 2 * Tokens) {
                const Pair w[2] = {load_pair<16>(codes), load_pair<16>(codes + 4 * kLanes)};
                for (int t = 0; t < kCount; ++t)
                    for (int odd = 0; odd < 2; ++odd)
                        for (int side = 0; side < 2; ++side) found[t][side] += w[side].part[odd] * x[odd * Tokens + t];
            }
            for (int t = 0; t < kCount; ++t)
                for (int side = 0; side < 2; ++side) store(sums[First + t][b] + row + side * kLanes, found[t][side]);
        }
    if constexpr (First + kCount < Tokens) plain_tile<Blocks, Tokens, First + kCount>(l, in, block, tile, sums);
}

}  // namespace
}  // namespace kvfold
