// Products of codes with rounded queries and weights, four at a time. Meanwhile the codes of the next batch are asked for.
#pragma once
#include "digits.h"

// A loop over registers: unrolled before the compiler decides what lies in memory.
#define KVFOLD_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)

namespace kvfold {
namespace {

// sum += codes * digits. GCC copies registers around the intrinsic, which costs as much as the products.
inline void add_products(__m512i& sum, __m512i codes, __m512i digits) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(digits));
}

// The bits of 64 codes, among others, out of the bytes at `window`.
inline __m512i unpacked(const uint8_t* window, __m512i index, __m512i shift) {
    return _mm512_multishift_epi64_epi8(shift, _mm512_permutexvar_epi8(index, _mm512_loadu_si512(window)));
}

// Products of quads [from, to) of U units, the first being `unit`, with queries of D digits: w.product is that, or has it
// added (`more`).
template <int M, int U, int D>
[[gnu::noinline]] void key_sums(const Row& row, int from, int to, bool more, int unit, CodedScratch& w) {
    __m512i high[U][M], low[U][M];
    const uint8_t *data[U], *ahead[U];
    KVFOLD_EACH(u, U) {
        data[u] = w.units[unit + u].key;
        ahead[u] = w.next[unit + u].key;
        KVFOLD_EACH(m, M) high[u][m] = low[u][m] = _mm512_setzero_si512();
    }
    const Quad* const quads = row.quads.data();
    for (int j = from; j < to; ++j) {
        const Quad& quad = quads[j];
        prefetch(ahead[j % U] + quad.offset - j % U * quad.bytes, U * quad.bytes);
        const __m512i index = _mm512_load_si512(quad.index), shift = _mm512_load_si512(quad.shift);
        __m512i digits[D][M];
        KVFOLD_EACH(m, M)
            KVFOLD_EACH(digit, D) digits[digit][m] = _mm512_set1_epi32(w.query[j][m][digit]);
        KVFOLD_EACH(u, U) {
            __m512i codes = unpacked(data[u] + quad.offset, index, shift);
            codes = _mm512_and_si512(codes, _mm512_load_si512(quad.mask));
            KVFOLD_EACH(m, M) {
                add_products(high[u][m], codes, digits[0][m]);
                if (D == 2) add_products(low[u][m], codes, digits[D - 1][m]);
            }
        }
    }
    KVFOLD_EACH(u, U) {
        KVFOLD_EACH(m, M) {
            int32_t* out = w.product[unit + u][m];
            __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(high[u][m], kQueryDigit), low[u][m]);
            if (more) sum = _mm512_add_epi32(sum, _mm512_load_si512(out));
            _mm512_store_si512(out, sum);
        }
    }
}

// Sums of Q groups of four dimensions, which share the reading of weights of D digits.
template <int M, int Q, int D>
[[gnu::noinline]] void value_sums(const Row& row, int span, int first, int units, CodedScratch& w) {
    __m512i index[Q], shift[Q], mask[Q], flip[Q], high[Q][M], low[Q][M];
    int offset[Q], bytes = 0;
    KVFOLD_EACH(q, Q) {
        const Quad& quad = row.quads[first + q];
        index[q] = _mm512_load_si512(quad.index);
        shift[q] = _mm512_load_si512(quad.shift);
        mask[q] = _mm512_load_si512(quad.mask);
        flip[q] = _mm512_load_si512(quad.flip);
        offset[q] = quad.offset;
        bytes += quad.bytes;
        KVFOLD_EACH(m, M) high[q][m] = low[q][m] = _mm512_setzero_si512();
    }
    const Unit *at = w.units, *next = w.next;
    for (int u = 0; u < units; ++u) {
        prefetch(next[u].value + offset[0], bytes);
        __m512i weight[D][M];
        KVFOLD_EACH(digit, D) {
            KVFOLD_EACH(m, M) {
                const auto* data = reinterpret_cast<const __m128i*>(w.weight[digit][m] + kUnit * u);
                weight[digit][m] = _mm512_broadcast_i32x4(_mm_load_si128(data));
            }
        }
        KVFOLD_EACH(q, Q) {
            const __m512i bits = unpacked(at[u].value + offset[q], index[q], shift[q]);
            const __m512i codes = _mm512_ternarylogic_epi64(bits, mask[q], flip[q], 0x6a);  // (bits & mask) ^ flip
            KVFOLD_EACH(m, M) {
                add_products(high[q][m], weight[0][m], codes);
                if (D == 2) add_products(low[q][m], weight[D - 1][m], codes);
            }
        }
    }
    KVFOLD_EACH(q, Q) {
        KVFOLD_EACH(m, M) {
            float* out = w.sums[m][first + q];
            __m512i sum = high[q][m];
            if (D == 2) sum = _mm512_add_epi32(_mm512_slli_epi32(sum, kWeightDigit), low[q][m]);
            const __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_set1_ps(w.share[m][span]));
            _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_load_ps(out), _mm512_set1_ps(w.shrink[m]), found));
        }
    }
}

// The same of a whole span. As many sums at once as there are registers.
template <int M, int D>
void value_products(const Row& row, int span, int units, CodedScratch& w) {
    constexpr int Q = M * D <= 3 ? 4 : M * D <= 8 ? 2 : 1;
    int quad = row.spans[span];
    for (; quad + Q <= row.spans[span + 1]; quad += Q) value_sums<M, Q, D>(row, span, quad, units, w);
    for (; quad < row.spans[span + 1]; ++quad) value_sums<M, 1, D>(row, span, quad, units, w);
}

}  // namespace
}  // namespace kvfold
