// Pieces of arithmetic on 16 lanes that both vector kernels need.
#pragma once
#include <immintrin.h>

#include <algorithm>

#include "kernels.h"

namespace kvfold {
namespace {

constexpr int kMaxUnits = kRun / kUnit;

// Asks for bytes that are going to be read: pages are too short for the hardware to guess what follows. A few lines at a
// time, between products: asked for at once they keep all that waits for the nearer caches waiting, too.
inline void prefetch(const uint8_t* data, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(data + i), _MM_HINT_T1);
}

// 2^x for x <= 0, relative error below 3e-6; 0 where x is below the range of floats.
inline __m512 exp2_ps(__m512 x) {
    const __mmask16 there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-126.f), _CMP_GE_OQ);
    x = _mm512_maskz_mov_ps(there, x);
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 part = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.0096181291f);
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.0555041087f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.2402265070f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(0.6931471806f));
    y = _mm512_fmadd_ps(y, part, _mm512_set1_ps(1.f));
    return _mm512_maskz_scalef_ps(there, y, whole);
}

inline float exp2_one(float x) { return _mm512_cvtss_f32(exp2_ps(_mm512_set1_ps(x))); }

// Which of 16 rows from `number` on, those from `end` on left out, a query sees.
inline __mmask16 seen(const Tile& tile, int m, int64_t number, int64_t end) {
    const int64_t low = tile.first[m] - number, high = std::min(tile.last[m], end) - number;
    if (low <= 0 && high >= 16) return 0xffff;
    if (low >= 16 || high <= 0) return 0;
    const uint32_t from = low > 0 ? 0xffffu << low : 0xffffu;
    const uint32_t below = high < 16 ? (1u << high) - 1 : 0xffffu;
    return __mmask16(from & below);
}

inline __m512 widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// Turns the scores of one query into weights relative to their largest one, which is returned (kNone: nothing seen).
inline float weights(const Tile& tile, int m, int64_t number, int rows, float* scores, float& sum) {
    const int groups = (rows + 15) / 16;
    if (rows % 16 || tile.first[m] > number || tile.last[m] < number + rows) {
        for (int u = 0; u < groups; ++u) {
            const __mmask16 visible = seen(tile, m, number + 16 * u, number + rows);
            const __m512 s = _mm512_load_ps(scores + 16 * u);
            _mm512_store_ps(scores + 16 * u, _mm512_mask_mov_ps(_mm512_set1_ps(kNone), visible, s));
        }
    }
    __m512 top = _mm512_set1_ps(kNone), added = _mm512_setzero_ps();
    for (int u = 0; u < groups; ++u) top = _mm512_max_ps(top, _mm512_load_ps(scores + 16 * u));
    const float most = _mm512_reduce_max_ps(top);
    const __m512 base = _mm512_set1_ps(most == kNone ? 0.f : most);
    for (int u = 0; u < groups; ++u) {
        const __m512 weight = exp2_ps(_mm512_sub_ps(_mm512_load_ps(scores + 16 * u), base));
        added = _mm512_add_ps(added, weight);
        _mm512_store_ps(scores + 16 * u, weight);
    }
    sum = _mm512_reduce_add_ps(added);
    return most;
}

// One step of the online softmax: turns the scores of some rows into weights, up to a multiple of 16 of them (those of rows
// that are not there are 0), and adds them to the tile's sum. shrink: what all that was found before is worth now; worth: a
// weight of these rows.
inline void absorb(Tile& tile, int m, int64_t number, int rows, float* scores, float& shrink, float& worth) {
    float sum;
    const float here = weights(tile, m, number, rows, scores, sum);
    const float most = std::max(tile.most[m], here);
    shrink = tile.most[m] == kNone ? 0.f : exp2_one(tile.most[m] - most);
    worth = here == kNone ? 0.f : exp2_one(here - most);
    tile.most[m] = most;
    tile.sum[m] = tile.sum[m] * shrink + sum * worth;
}

// What `rows` rows of these scores received, as Kernels::receive has it.
inline void add_received(const Tile& tile, int64_t number, int rows, const float (*scores)[kRun], float power, float* mass) {
    for (int t = 0; t < rows; t += 16) {
        __m512 sum = _mm512_setzero_ps();
        __mmask16 any = 0;
        for (int m = 0; m < tile.rows; ++m) {
            const __mmask16 visible = seen(tile, m, number + t, number + rows);
            const __m512 share = _mm512_sub_ps(_mm512_load_ps(scores[m] + t), _mm512_set1_ps(tile.most[m]));
            const __m512 weight = exp2_ps(_mm512_mul_ps(share, _mm512_set1_ps(power)));
            sum = _mm512_mask_add_ps(sum, visible, sum, weight);
            any |= visible;
        }
        float* out = mass + number + t;
        _mm512_mask_storeu_ps(out, any, _mm512_add_ps(_mm512_maskz_loadu_ps(any, out), sum));
    }
}

}  // namespace
}  // namespace kvfold
