// Tiles of a linear layer with AVX-512 VNNI: one product takes four inputs of sixteen rows.
#pragma once
#include <immintrin.h>

#include "linear.h"

namespace kvfold {
namespace {

inline __m512 widen(const uint16_t* x) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

// Adds the products of w with four numbers that all lanes share. Spelt out, because GCC 12 loads them on their own and
// copies the sum before every product: three instructions for one.
inline void add_products(__m512i& sum, __m512i w, const int8_t* x) {
    using Four __attribute__((may_alias)) = int32_t;
    asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(w), "m"(*reinterpret_cast<const Four*>(x)));
}

template <int Bits, int Blocks, int Tokens>
void coded_tile(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t tile, float (&sums)[Tokens][Blocks][kLinearRows]) {
    constexpr int kVectors = kGroup * kLinearRows * Bits / 8 / 64;
    const int64_t stride = in.groups * kVectors * 64;
    const uint8_t* codes = l.codes + block * stride;
    constexpr int kScales = Bits == 4 ? 2 : 1;
    const uint16_t* scales = l.scales + block * in.groups * kScales * kLinearRows;
    const int8_t* x = in.codes + tile * in.width * Tokens;
    const float* steps = in.scales + tile * in.groups * Tokens;
    const int32_t* sums_of_codes = in.sums + tile * in.groups * Tokens;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 found[Tokens][Blocks];
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) found[t][b] = _mm512_setzero_ps();
    for (int64_t g = 0; g < in.groups; ++g, steps += Tokens, sums_of_codes += Tokens) {
        __m512i acc[Tokens][Blocks];
#pragma GCC unroll 16
        for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
            for (int b = 0; b < Blocks; ++b) acc[t][b] = Bits == 4 ? _mm512_setzero_si512() : _mm512_set1_epi32(sums_of_codes[t]);
#pragma GCC unroll 1
        for (int i = 0; i < kVectors; ++i, codes += 64) {
            __m512i w[Blocks], high[Blocks];
#pragma GCC unroll 2
            for (int b = 0; b < Blocks; ++b) {
                w[b] = _mm512_loadu_si512(codes + b * stride);
                if constexpr (Bits == 4) {
                    high[b] = _mm512_and_si512(_mm512_srli_epi16(w[b], 4), low);
                    w[b] = _mm512_and_si512(w[b], low);
                }
            }
#pragma GCC unroll 16
            for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
                for (int b = 0; b < Blocks; ++b) add_products(acc[t][b], w[b], x + 4 * t);
            x += 4 * Tokens;
            if constexpr (Bits == 4) {
#pragma GCC unroll 16
                for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
                    for (int b = 0; b < Blocks; ++b) add_products(acc[t][b], high[b], x + 4 * t);
                x += 4 * Tokens;
            }
        }
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) {
            const uint16_t* own = scales + (b * in.groups + g) * kScales * kLinearRows;
            const __m512 scale = widen(own), least = Bits == 4 ? widen(own + kLinearRows) : _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int t = 0; t < Tokens; ++t) {
                __m512 product = _mm512_mul_ps(scale, _mm512_cvtepi32_ps(acc[t][b]));
                if constexpr (Bits == 4)
                    product = _mm512_fmadd_ps(least, _mm512_set1_ps(float(sums_of_codes[t])), product);
                found[t][b] = _mm512_fmadd_ps(product, _mm512_set1_ps(steps[t]), found[t][b]);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) _mm512_store_ps(sums[t][b], found[t][b]);
}

template <int Blocks, int Tokens>
void plain_tile(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t tile, float (&sums)[Tokens][Blocks][kLinearRows]) {
    const int64_t pairs = in.width / 2, stride = pairs * 64;
    const uint8_t* codes = l.codes + block * stride;
    const float* x = in.numbers + tile * in.width * Tokens;
    const __m512i high = _mm512_set1_epi32(int32_t(0xffff0000));
    __m512 found[Tokens][Blocks];
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) found[t][b] = _mm512_setzero_ps();
    for (int64_t i = 0; i < pairs; ++i, codes += 64, x += 2 * Tokens) {
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) {
            const __m512i w = _mm512_loadu_si512(codes + b * stride);
            const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
            const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(w, high));
#pragma GCC unroll 16
            for (int t = 0; t < Tokens; ++t) {
                found[t][b] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[t]), found[t][b]);
                found[t][b] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[Tokens + t]), found[t][b]);
            }
        }
    }
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) _mm512_store_ps(sums[t][b], found[t][b]);
}

}  // namespace
}  // namespace kvfold
