// Tiles of coded linear layers in plain C++, in the same order of operations as with vector products.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "linear.h"

namespace kvfold {
namespace {

// One group of 16 rows' codes with one token's.
template <int Bits>
void dot_group(const uint8_t* codes, const int8_t* x, int step, int32_t* acc) {
    constexpr int kFours = kGroup / 4;
    for (int four = 0; four < kFours; ++four, x += step) {
        const uint8_t* w = codes + (Bits == 4 ? four / 2 : four) * 64;
        const int shift = Bits == 4 ? four % 2 * 4 : 0, mask = Bits == 4 ? 15 : 255;
        for (int r = 0; r < kLinearRows; ++r)
            for (int j = 0; j < 4; ++j) acc[r] += (w[4 * r + j] >> shift & mask) * int32_t(x[j]);
    }
}

template <int Bits, int Blocks, int Tokens>
void coded_tile(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t tile, float (&sums)[Tokens][Blocks][kLinearRows]) {
    constexpr int kBytes = kGroup * kLinearRows * Bits / 8, kScales = Bits == 4 ? 2 : 1;
    for (int b = 0; b < Blocks; ++b) {
        const uint8_t* codes = l.codes + (block + b) * in.groups * kBytes;
        const uint16_t* scales = l.scales + (block + b) * in.groups * kScales * kLinearRows;
        for (int t = 0; t < Tokens; ++t)
            for (int r = 0; r < kLinearRows; ++r) sums[t][b][r] = 0;
        for (int64_t g = 0; g < in.groups; ++g)
            for (int t = 0; t < Tokens; ++t) {
                const int64_t at = (tile * in.groups + g) * Tokens + t;
                int32_t acc[kLinearRows];
                for (int r = 0; r < kLinearRows; ++r) acc[r] = Bits == 4 ? 0 : in.sums[at];
                dot_group<Bits>(codes + g * kBytes, in.codes + (tile * in.width + g * kGroup) * Tokens + 4 * t, 4 * Tokens, acc);
                const uint16_t* own = scales + g * kScales * kLinearRows;
                for (int r = 0; r < kLinearRows; ++r) {
                    float product = from_bf16(own[r]) * float(acc[r]);
                    if (Bits == 4) product += from_bf16(own[kLinearRows + r]) * float(in.sums[at]);
                    sums[t][b][r] += product * in.scales[at];
                }
            }
    }
}

}  // namespace
}  // namespace kvfold
