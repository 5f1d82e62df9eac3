// Tiles of coded linear layers with AVX2, in the same order of operations as with AVX-512: one product takes four inputs of
// eight rows, of 4 bits each, so that 16 bits hold the sums of a whole group. Codes of 8 bits are two digits.
#pragma once
#include <immintrin.h>

#include "kernels.h"
#include "linear.h"

namespace kvfold {
namespace {

static_assert(kGroup * 15 * 127 / 2 < 1 << 15);  // a sum's products: every second of the group's

inline __m256 widen(const uint16_t* x) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

inline __m256i add_products(__m256i sum, __m256i w, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, _mm256_set1_epi32(four)));
}

// A group's codes of eight rows, on which those of the next four inputs follow 64 bytes later, and what turns their
// products with a token's codes into numbers.
struct Eight {
    const uint8_t* codes;
    __m256 scale, least;
};

// Adds the products with tokens [t, t + Count) of a tile, so few that their sums stay in registers.
template <int Bits, int Count, int Tokens, int Stride>
void add_group(const Eight& rows, const Inputs& in, int64_t group, int t, float* sums) {
    constexpr int kVectors = kGroup * kLinearRows * Bits / 8 / 64;
    const int8_t* x = in.codes + group * kGroup * Tokens + 4 * t;
    const __m256i digit = _mm256_set1_epi8(15), one = _mm256_set1_epi16(1), sixteen = _mm256_set1_epi16(16);
    __m256i low[Count], high[Count];
#pragma GCC unroll 6
    for (int i = 0; i < Count; ++i) low[i] = high[i] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (int vector = 0; vector < kVectors; ++vector) {
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows.codes + 64 * vector));
        const __m256i first = _mm256_and_si256(w, digit), second = _mm256_and_si256(_mm256_srli_epi16(w, 4), digit);
#pragma GCC unroll 6
        for (int i = 0; i < Count; ++i) {
            low[i] = add_products(low[i], first, x + 4 * i);
            if constexpr (Bits == 8) high[i] = add_products(high[i], second, x + 4 * i);
        }
        x += 4 * Tokens;
        if constexpr (Bits == 4) {
#pragma GCC unroll 6
            for (int i = 0; i < Count; ++i) low[i] = add_products(low[i], second, x + 4 * i);
            x += 4 * Tokens;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < Count; ++i) {
        const int64_t at = group * Tokens + t + i;
        __m256i total = _mm256_madd_epi16(low[i], one);
        if constexpr (Bits == 8)
            total = _mm256_add_epi32(_mm256_add_epi32(total, _mm256_madd_epi16(high[i], sixteen)), _mm256_set1_epi32(in.sums[at]));
        __m256 product = _mm256_mul_ps(rows.scale, _mm256_cvtepi32_ps(total));
        if constexpr (Bits == 4) product = _mm256_fmadd_ps(rows.least, _mm256_set1_ps(float(in.sums[at])), product);
        float* sum = sums + (t + i) * Stride;
        _mm256_storeu_ps(sum, _mm256_fmadd_ps(product, _mm256_set1_ps(in.scales[at]), _mm256_loadu_ps(sum)));
    }
}

template <int Bits, int Blocks, int Tokens>
void coded_tile(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t tile, float (&sums)[Tokens][Blocks][kLinearRows]) {
    constexpr int kBytes = kGroup * kLinearRows * Bits / 8, kScales = Bits == 4 ? 2 : 1, kStride = Blocks * kLinearRows;
    constexpr int kFew = Tokens > kMaxTile / 2 ? (Tokens + 1) / 2 : Tokens;
    __builtin_memset(sums, 0, sizeof sums);
    for (int64_t g = 0; g < in.groups; ++g)
        for (int b = 0; b < Blocks; ++b) {
            const int64_t own = (block + b) * in.groups + g, group = tile * in.groups + g;
            const uint16_t* scales = l.scales + own * kScales * kLinearRows;
            for (int row = 0; row < kLinearRows; row += 8) {
                const __m256 least = Bits == 4 ? widen(scales + kLinearRows + row) : _mm256_setzero_ps();
                const Eight rows{l.codes + own * kBytes + 4 * row, widen(scales + row), least};
                add_group<Bits, kFew, Tokens, kStride>(rows, in, group, 0, sums[0][b] + row);
                if constexpr (kFew < Tokens) add_group<Bits, Tokens - kFew, Tokens, kStride>(rows, in, group, kFew, sums[0][b] + row);
            }
        }
}

}  // namespace
}  // namespace kvfold
