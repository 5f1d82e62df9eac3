// Uncompressed rows of 16 bits, one token after the other.
#pragma once
#include <algorithm>
#include <cstring>

#include "simd.h"

namespace kvfold {
namespace {

// Two numbers to be multiplied with a pair of 16-bit numbers: in 16 bits where the machine multiplies these.
#ifdef __AVX512BF16__
using Pair = uint32_t;
inline Pair make_pair(float even, float odd) { return to_bf16(even) | uint32_t(to_bf16(odd)) << 16; }
#else
struct Pair {
    float even, odd;
};
inline Pair make_pair(float even, float odd) { return {even, odd}; }
#endif

// Adds the products of pairs of 16-bit numbers to 32-bit sums.
struct PairSum {
#ifdef __AVX512BF16__
    __m512bh pairs;
    explicit PairSum(__m512i x) : pairs((__m512bh)x) {}
    __m512 add(__m512 sum, Pair other) const {
        return _mm512_dpbf16_ps(sum, pairs, (__m512bh)_mm512_set1_epi32(int(other)));
    }
#else
    __m512 even, odd;
    explicit PairSum(__m512i x)
        : even(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16))),
          odd(_mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u))))) {}
    __m512 add(__m512 sum, Pair other) const {
        return _mm512_fmadd_ps(odd, _mm512_set1_ps(other.odd), _mm512_fmadd_ps(even, _mm512_set1_ps(other.even), sum));
    }
#endif
};

struct RawScratch {
    alignas(64) float score[kMaxRows][kRun];
    alignas(64) uint32_t pairs[kMaxDim / 2][16];        // two dimensions of 16 tokens
    alignas(64) Pair query[kMaxDim / 2][kMaxRows];      // the same of queries
    alignas(64) Pair weight[kMaxRows][kRun / 2];        // of two tokens
    alignas(64) float sums[kMaxRows][kMaxDim / 16][16];
    float shrink[kMaxRows], worth[kMaxRows];
};

inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
        y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
        y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
        y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
        x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
        x[i + 4] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0x88);
        x[i + 12] = _mm512_shuffle_i32x4(y[i + 4], y[i + 12], 0xdd);
    }
}

// `dims` 16-bit numbers from data, up to 32 of them.
inline __m512i load_numbers(const uint8_t* data, int dims) {
    const __mmask32 there = dims >= 32 ? ~__mmask32(0) : (__mmask32(1) << dims) - 1;
    return _mm512_maskz_loadu_epi16(there, data);
}

// Where a run's tokens are, rows being `stride` bytes apart within a page, and those that come next.
struct RawTokens {
    const uint8_t *data, *next;
    int stride, count;
};

template <int M>
void raw_keys(const Row& row, const RawTokens& tokens, int start, float step, RawScratch& w) {
    for (int dim = 0; dim < row.kept; dim += 32) {
        __m512i x[16];
        for (int t = 0; t < 16; ++t)
            x[t] = start + t < tokens.count
                       ? load_numbers(tokens.data + size_t(start + t) * tokens.stride + 2 * dim, row.kept - dim)
                       : _mm512_setzero_si512();
        for (int t = 0; t < 16; ++t) prefetch(tokens.next + size_t(start + t) * tokens.stride + 2 * dim, 1);
        transpose(x);
        for (int i = 0; i < 16; ++i) _mm512_store_si512(w.pairs[dim / 2 + i], x[i]);
    }
    __m512 sums[M];
    for (int m = 0; m < M; ++m) sums[m] = _mm512_setzero_ps();
    for (int pair = 0; pair < (row.kept + 1) / 2; ++pair) {
        const PairSum keys(_mm512_load_si512(w.pairs[pair]));
        for (int m = 0; m < M; ++m) sums[m] = keys.add(sums[m], w.query[pair][m]);
    }
    for (int m = 0; m < M; ++m) _mm512_store_ps(w.score[m] + start, _mm512_mul_ps(sums[m], _mm512_set1_ps(step)));
}

#ifdef __AVX512BF16__
inline void pair_weights(const float* x, int count, Pair* out) {
    for (int t = 0; t < count; t += 16) {
        const __m512i bits = _mm512_castps_si512(_mm512_load_ps(x + t));
        const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), even), 16);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out + t / 2), _mm512_cvtepi32_epi16(rounded));
    }
}
#else
inline void pair_weights(const float* x, int count, Pair* out) { std::memcpy(out, x, sizeof(float) * size_t(count)); }
#endif

template <int M>
void raw_values(const Row& row, const RawTokens& tokens, RawScratch& w) {
    for (int dim = 0; dim < row.kept; dim += 32) {
        __m512 low[M], high[M];
        for (int m = 0; m < M; ++m) low[m] = high[m] = _mm512_setzero_ps();
        for (int t = 0; t < tokens.count; t += 2) {
            const uint8_t* data = tokens.data + size_t(t) * tokens.stride + 2 * dim;
            const uint8_t* next = tokens.next + size_t(t) * tokens.stride + 2 * dim;
            prefetch(next, 1), prefetch(next + tokens.stride, 1);
            const __m512i a = load_numbers(data, row.kept - dim);
            const __m512i b = t + 1 < tokens.count ? load_numbers(data + tokens.stride, row.kept - dim) : _mm512_setzero_si512();
            const PairSum first(_mm512_unpacklo_epi16(a, b)), second(_mm512_unpackhi_epi16(a, b));
            for (int m = 0; m < M; ++m) {
                low[m] = first.add(low[m], w.weight[m][t / 2]);
                high[m] = second.add(high[m], w.weight[m][t / 2]);
            }
        }
        for (int m = 0; m < M; ++m) {
            const __m512 shrink = _mm512_set1_ps(w.shrink[m]), worth = _mm512_set1_ps(w.worth[m]);
            float(*sums)[16] = w.sums[m] + dim / 16;
            _mm512_store_ps(sums[0], _mm512_fmadd_ps(low[m], worth, _mm512_mul_ps(_mm512_load_ps(sums[0]), shrink)));
            _mm512_store_ps(sums[1], _mm512_fmadd_ps(high[m], worth, _mm512_mul_ps(_mm512_load_ps(sums[1]), shrink)));
        }
    }
}

template <int M>
void add_tokens(const Format& fmt, Tile& tile, int64_t number, RawTokens tokens, RawScratch& w) {
    const int groups = (tokens.count + 15) / 16;
    for (int g = 0; g < groups; ++g) raw_keys<M>(fmt.key, tokens, 16 * g, tile.step, w);
    for (int m = 0; m < M; ++m) {
        absorb(tile, m, number, tokens.count, w.score[m], w.shrink[m], w.worth[m]);
        pair_weights(w.score[m], 16 * groups, w.weight[m]);
    }
    tokens.data += fmt.key_bytes;
    tokens.next += fmt.key_bytes;
    raw_values<M>(fmt.value, tokens, w);
}

inline void pair_queries(const Row& row, const Tile& tile, RawScratch& w) {
    for (int m = 0; m < tile.rows; ++m)
        for (int d = 0; d < row.kept; d += 2)
            w.query[d / 2][m] = make_pair(tile.plain[m][d], d + 1 < row.kept ? tile.plain[m][d + 1] : 0.f);
}

// Calls add(number, tokens) for the tokens of runs, at most kRun of them at once.
template <class Add>
void each_tokens(const Format& fmt, const Run* runs, int count, Add add) {
    for (; count--; ++runs) {
        for (int row = runs->first; row < runs->last; row += kRun) {
            const uint8_t* data = runs->page + size_t(row) * fmt.block_bytes;
            const uint8_t* next = data + size_t(kRun) * fmt.block_bytes;
            if (row + kRun >= runs->last && count) next = runs[1].page + size_t(runs[1].first) * fmt.block_bytes;
            add(runs->number + row - runs->first, RawTokens{data, next, fmt.block_bytes, std::min(kRun, runs->last - row)});
        }
    }
}

template <int M>
void receive_raw(const Format& fmt, const Tile& tile, const Run* runs, int count, float power, float* mass, Scratch& scratch) {
    auto& w = *reinterpret_cast<RawScratch*>(scratch.bytes);
    pair_queries(fmt.key, tile, w);
    each_tokens(fmt, runs, count, [&](int64_t number, const RawTokens& tokens) {
        for (int start = 0; start < tokens.count; start += 16) raw_keys<M>(fmt.key, tokens, start, tile.step, w);
        add_received(tile, number, tokens.count, w.score, power, mass);
    });
}

template <int M>
void attend_raw(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    static_assert(sizeof(RawScratch) <= sizeof(Scratch));
    auto& w = *reinterpret_cast<RawScratch*>(scratch.bytes);
    Tile found;
    found.clear(M, tile.dim);
    found.step = tile.step;
    pair_queries(fmt.key, tile, w);
    for (int m = 0; m < M; ++m) {
        found.first[m] = tile.first[m];
        found.last[m] = tile.last[m];
        std::memset(w.sums[m], 0, sizeof(w.sums[m][0]) * ((fmt.value.kept + 31) / 32 * 2));
    }
    each_tokens(fmt, runs, count, [&](int64_t number, const RawTokens& tokens) { add_tokens<M>(fmt, found, number, tokens, w); });
    for (int m = 0; m < M; ++m)
        for (int d = 0; d < fmt.value.kept; ++d)
            found.out[m][d] = w.sums[m][d / 32 * 2 + d % 8 / 4][d % 32 / 8 * 4 + d % 4];
    merge(tile, found);
}

}  // namespace
}  // namespace kvfold
