// Queries as two digits each for integer products with the codes of keys, and what a thread holds at that work.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>

#include "simd.h"

namespace kvfold {
namespace {

// Queries have two digits of seven bits and weights two of eight, where the second is worth its products. Beside codes of
// few bits (Row::fine) weights have one, and queries as long as scores are not uncertain by more than kUncertain for it
// (logarithms to base 2), or by more than kRelative of themselves where the steps of codes come later. Nothing of this
// depends on how the work is shared out.
constexpr int kQueryDigit = 7, kMostQuery = 127 << kQueryDigit;
constexpr int kWeightDigit = 8, kMostDigit = (1 << kWeightDigit) - 1, kMostWeight = (1 << 2 * kWeightDigit) - 1;
constexpr float kUncertain = 1.f / 8, kRelative = 1.f / 64;
constexpr int kMaxSpans = kMaxDim / 4, kMaxQuads = kMaxDim / 4 + kMaxSpans;

// Fractions that are added to weights before these are cut to one digit: many small ones then add up to what they should,
// and neighbours of one size are not all rounded to the same side.
struct Dither {
    alignas(64) float at[kRun];
    constexpr Dither() : at{} {
        for (int i = 0; i < kRun; ++i) {
            const double golden = (i + 1) * 0.6180339887498949;
            at[i] = float(golden - double(int64_t(golden))) * 0.999f;
        }
    }
};
inline constexpr Dither kDither;

struct Unit {
    const uint8_t *key, *value, *key_scale, *value_scale;
};

struct CodedScratch {
    alignas(64) float score[kMaxRows][kRun];
    alignas(64) float scaled[kRun];
    alignas(64) uint8_t weight[2][kMaxRows][kRun];        // high and low digits
    alignas(64) float sums[kMaxRows][kMaxQuads][16];
    alignas(64) int32_t product[kMaxUnits][kMaxRows][16];  // of queries and the codes of keys
    alignas(64) int32_t query[kMaxQuads][kMaxRows][2];     // four high and four low digits
    int fine;                             // quads, from the first, where some query has two digits
    float step[kMaxRows];                 // of the query's lower digit
    const uint8_t* channels;              // keys: scales that the queries were rounded with, if any
    float bias[kMaxRows][kMaxSpans];      // keys: what the codes' centres, or one unit of offset, are worth
    float total[kMaxRows][kMaxSpans];     // values: sum of the weights that the codes were multiplied with
    float lows[kMaxRows][kMaxSpans];      // values: weighted sum of the offsets
    float raw[kMaxRows][kMaxDim];         // values: sums of uncompressed dimensions
    float shrink[kMaxRows];               // of what was found before this batch
    float worth[kMaxRows];                // of a weight of this batch
    float share[kMaxRows][kMaxSpans];     // of a rounded weight
    Unit batches[2][kMaxUnits];           // at work, and asked for meanwhile
    const Unit *units, *next;             // [kMaxUnits] each
};

inline int span_count(const Row& row) { return int(row.spans.size()) - 1; }

// How many quads, from the first, a query needs both digits for, one of the upper being worth `digit`.
inline int fine_quads(const Row& row, const float* q, float digit) {
    int fine = int(row.quads.size());
    if (row.fine()) return fine;
    if (row.scale == Scale::Token || row.scale == Scale::Step) {
        float square = 0;
        for (int d = row.raw; d < row.kept; ++d) square += q[d] / digit * (q[d] / digit);  // is 0 for queries of zeros
        return std::max(0, fine - int(kRelative * kRelative * square / (4.f / 12)));
    }
    float left = kUncertain * kUncertain / (digit * digit);
    while (fine && (left -= row.quads[size_t(fine - 1)].noise) >= 0) --fine;
    return fine;
}

inline void round_query(const Row& row, const Tile& tile, CodedScratch& w) {
    w.channels = nullptr;
    if (row.scale == Scale::Channel) return;  // block by block
    w.fine = 0;
    for (int m = 0; m < tile.rows; ++m) {
        const float* q = tile.query[m];
        float most = 1e-30f;
        for (int d = row.raw; d < row.kept; ++d) most = std::max(most, std::fabs(q[d]));
        const float step = most / kMostQuery, digit = step * (1 << kQueryDigit);
        const int fine = fine_quads(row, q, digit);
        w.step[m] = step;
        w.fine = std::max(w.fine, fine);
        for (int s = 0; s < span_count(row); ++s) {
            float bias = 0;
            for (int j = row.spans[s]; j < row.spans[s + 1]; ++j) {
                int8_t digits[2][4] = {};
                for (int i = 0; i < row.quads[j].dims; ++i) {
                    const int d = row.quads[j].dim + i;
                    const int whole = j < fine ? int(std::nearbyint(q[d] / step))
                                               : int(std::nearbyint(q[d] / digit)) * (1 << kQueryDigit);
                    digits[0][i] = int8_t(whole >> kQueryDigit);
                    digits[1][i] = int8_t(whole & ((1 << kQueryDigit) - 1));
                    bias += step * float(whole) * (row.scale == Scale::Token ? 1.f : -row.centre[d]);
                }
                std::memcpy(w.query[j][m], digits, sizeof(digits));
            }
            w.bias[m][s] = bias;
        }
    }
}

inline __m512 halves_at(const uint8_t* data) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data)));
}

// Rounds the queries for a block whose channels have scales of their own: the step of a channel is folded into the query,
// and its offset adds the same to all scores of the block.
inline void round_for_channels(const Row& row, const Tile& tile, const uint8_t* scales, CodedScratch& w) {
    w.channels = scales;
    w.fine = 0;
    for (int m = 0; m < tile.rows; ++m) {
        alignas(64) float scaled[kMaxDim];
        __m512 most = _mm512_set1_ps(1e-30f), bias = _mm512_setzero_ps();
        for (int d = 0; d < row.kept; d += 16) {
            const __mmask16 there = row.kept - d >= 16 ? 0xffff : __mmask16((1u << (row.kept - d)) - 1);
            const __m512 q = _mm512_maskz_loadu_ps(there, tile.query[m] + d);
            const __m512 low = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, scales + 2 * d));
            const __m512 step = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(there, scales + 2 * (row.kept + d)));
            const __m512 x = _mm512_mul_ps(q, step);
            bias = _mm512_fmadd_ps(q, low, bias);
            most = _mm512_max_ps(most, _mm512_abs_ps(x));
            _mm512_store_ps(scaled + d, x);
        }
        w.step[m] = _mm512_reduce_max_ps(most) / kMostQuery;
        w.bias[m][0] = _mm512_reduce_add_ps(bias);
        const bool fine = fine_quads(row, scaled, w.step[m] * (1 << kQueryDigit));
        if (fine) w.fine = int(row.quads.size());
        const int zeros = fine ? 0 : kQueryDigit;
        const __m512 levels = _mm512_set1_ps(1.f / (w.step[m] * float(1 << zeros)));
        for (int d = 0; d < row.kept; d += 16) {
            __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(scaled + d), levels));
            whole = _mm512_slli_epi32(whole, zeros);
            alignas(16) int8_t digits[2][16];
            _mm_store_si128(reinterpret_cast<__m128i*>(digits[0]), _mm512_cvtepi32_epi8(_mm512_srai_epi32(whole, kQueryDigit)));
            const __m512i low = _mm512_and_si512(whole, _mm512_set1_epi32((1 << kQueryDigit) - 1));
            _mm_store_si128(reinterpret_cast<__m128i*>(digits[1]), _mm512_cvtepi32_epi8(low));
            for (int i = 0; i < 16; i += 4)  // such a row is one span, its quads are full ones but for the last
                for (int digit = 0; digit < 2; ++digit) std::memcpy(&w.query[(d + i) / 4][m][digit], digits[digit] + i, 4);
        }
    }
}

}  // namespace
}  // namespace kvfold
