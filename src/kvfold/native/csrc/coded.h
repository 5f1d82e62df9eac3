// Rows of codes met by integer products (VNNI): queries and weights are rounded to bytes, codes stay what they are.
#pragma once
#include "digits.h"

namespace kvfold {
namespace {

// Asks for the bytes of one unit of the next batch: pages are too short for the hardware to guess what follows.
inline void prefetch(const uint8_t* data, int bytes) {
    for (int i = 0; i < bytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(data + i), _MM_HINT_T1);
}

// 64 codes out of the bytes at `window`, by the tables of a quad.
inline __m512i unpacked(const uint8_t* window, __m512i index, __m512i shift, __m512i mask) {
    const __m512i bytes = _mm512_permutexvar_epi8(index, _mm512_loadu_si512(window));
    return _mm512_and_si512(_mm512_multishift_epi64_epi8(shift, bytes), mask);
}

inline __m512i codes_of(const Quad& quad, const uint8_t* unit) {
    return unpacked(unit + quad.offset, _mm512_load_si512(quad.index), _mm512_load_si512(quad.shift),
                    _mm512_load_si512(quad.mask));
}

inline __m512i four_digits(const int8_t (&digits)[4]) {
    return _mm512_broadcastd_epi32(_mm_loadu_si32(digits));
}

inline __m512 steps_of(const uint8_t* bytes) {
    const __m512i exponent = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512 octaves = _mm512_cvtepi32_ps(_mm512_sub_epi32(exponent, _mm512_set1_epi32(128)));
    const __m512 x = _mm512_mul_ps(octaves, _mm512_set1_ps(1.f / kStepsPerOctave));
    // exp2_ps takes what is not above 0.
    return _mm512_mul_ps(exp2_ps(_mm512_sub_ps(x, _mm512_set1_ps(11.f))), _mm512_set1_ps(2048.f));
}

// Scores of U units for M queries.
template <int M, int U>
void key_products(const Row& row, int block, const Tile& tile, int unit, CodedScratch& w) {
    const int spans = span_count(row);
    for (int s = 0; s < spans; ++s) {
        __m512i high[U][M], low[U][M];
        for (int u = 0; u < U; ++u)
            for (int m = 0; m < M; ++m) high[u][m] = low[u][m] = _mm512_setzero_si512();
        for (int j = row.spans[s]; j < row.spans[s + 1]; ++j) {
            for (int u = 0; u < U; ++u) {
                const __m512i codes = codes_of(row.quads[j], w.units[unit + u].key);
                for (int m = 0; m < M; ++m) {
                    high[u][m] = _mm512_dpbusd_epi32(high[u][m], codes, four_digits(w.query[j][m][0]));
                    low[u][m] = _mm512_dpbusd_epi32(low[u][m], codes, four_digits(w.query[j][m][1]));
                }
            }
        }
        for (int u = 0; u < U; ++u) {
            const uint8_t* scale = w.units[unit + u].key_scale;
            for (int m = 0; m < M; ++m) {
                float* out = w.score[m] + kUnit * (unit + u);
                const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(high[u][m], kQueryDigit), low[u][m]);
                const __m512 product = _mm512_mul_ps(_mm512_cvtepi32_ps(both), _mm512_set1_ps(w.step[m]));
                const __m512 bias = _mm512_set1_ps(w.bias[m][s]);
                if (row.scale == Scale::Static || row.scale == Scale::Channel) {
                    _mm512_store_ps(out, _mm512_add_ps(product, bias));
                } else if (row.scale == Scale::Step) {
                    _mm512_store_ps(out, _mm512_mul_ps(_mm512_add_ps(product, bias), steps_of(scale)));
                } else {
                    const __m512 offset = halves_at(scale + 2 * s * block);
                    const __m512 step = halves_at(scale + 2 * (spans + s) * block);
                    const __m512 before = s ? _mm512_load_ps(out) : _mm512_setzero_ps();
                    _mm512_store_ps(out, _mm512_fmadd_ps(product, step, _mm512_fmadd_ps(bias, offset, before)));
                }
            }
        }
    }
    if (row.quads.empty())
        for (int m = 0; m < M; ++m) std::memset(w.score[m] + kUnit * unit, 0, 4 * kUnit * U);
    for (int d = 0; d < row.raw; ++d) {
        for (int u = 0; u < U; ++u) {
            const auto* data = reinterpret_cast<const __m256i*>(w.units[unit + u].key + row.offsets[d]);
            const __m512 numbers = widen_bf16(_mm256_loadu_si256(data));
            for (int m = 0; m < M; ++m) {
                float* out = w.score[m] + kUnit * (unit + u);
                _mm512_store_ps(out, _mm512_fmadd_ps(numbers, _mm512_set1_ps(tile.query[m][d]), _mm512_load_ps(out)));
            }
        }
    }
}

// Rounds x >= 0 to two digits, its largest value to the largest weight. Returns the step and adds up what came out.
inline float round_weights(const float* x, int units, uint8_t* high, uint8_t* low, float most, float& total) {
    const __m512 levels = _mm512_set1_ps(float(kMostWeight) / most);
    __m512i sum = _mm512_setzero_si512();
    for (int u = 0; u < units; ++u) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + kUnit * u), levels));
        sum = _mm512_add_epi32(sum, whole);
        const __m512i digit = _mm512_srli_epi32(whole, kWeightDigit);
        _mm_store_si128(reinterpret_cast<__m128i*>(high + kUnit * u), _mm512_cvtepi32_epi8(digit));
        _mm_store_si128(reinterpret_cast<__m128i*>(low + kUnit * u), _mm512_cvtepi32_epi8(whole));
    }
    const float step = most / kMostWeight;
    total = float(_mm512_reduce_add_epi32(sum)) * step;
    return step;
}

// Weights of the values of one span: what scales their codes is folded in.
inline void scale_weights(const Row& row, int block, int span, int units, int m, CodedScratch& w) {
    const int spans = span_count(row);
    float* x = w.score[m];
    float most = 1.f;
    if (row.scale == Scale::Step || row.scale == Scale::Token) {
        __m512 top = _mm512_set1_ps(1e-30f), lows = _mm512_setzero_ps();
        for (int u = 0; u < units; ++u) {
            const uint8_t* scale = w.units[u].value_scale;
            const __m512 p = _mm512_load_ps(w.score[m] + kUnit * u);
            const bool token = row.scale == Scale::Token;
            const __m512 step = token ? halves_at(scale + 2 * (spans + span) * block) : steps_of(scale);
            if (token) lows = _mm512_fmadd_ps(p, halves_at(scale + 2 * span * block), lows);
            const __m512 weight = _mm512_mul_ps(p, step);
            _mm512_store_ps(w.scaled + kUnit * u, weight);
            top = _mm512_max_ps(top, weight);
        }
        most = _mm512_reduce_max_ps(top);
        x = w.scaled;
        w.lows[m][span] = w.lows[m][span] * w.shrink[m] + _mm512_reduce_add_ps(lows) * w.worth[m];
    }
    float total;
    const float step = round_weights(x, units, w.weight[0][m], w.weight[1][m], most, total);
    w.share[m][span] = step * w.worth[m];
    w.total[m][span] = w.total[m][span] * w.shrink[m] + total * w.worth[m];
}

// Sums of Q groups of four dimensions, which share the reading of weights.
template <int M, int Q>
void value_products(const Row& row, int span, int quad, int units, CodedScratch& w) {
    __m512i index[Q], shift[Q], mask[Q], flip[Q], sums[2][Q][M];
    int offset[Q];
    for (int q = 0; q < Q; ++q) {
        const Quad& own = row.quads[quad + q];
        index[q] = _mm512_load_si512(own.index);
        shift[q] = _mm512_load_si512(own.shift);
        mask[q] = _mm512_load_si512(own.mask);
        flip[q] = _mm512_load_si512(own.flip);
        offset[q] = own.offset;
        for (int m = 0; m < M; ++m) sums[0][q][m] = sums[1][q][m] = _mm512_setzero_si512();
    }
    for (int u = 0; u < units; ++u) {
        __m512i codes[Q];
        for (int q = 0; q < Q; ++q) {
            const __m512i stored = unpacked(w.units[u].value + offset[q], index[q], shift[q], mask[q]);
            codes[q] = _mm512_xor_si512(stored, flip[q]);
        }
        for (int digit = 0; digit < 2; ++digit) {
            for (int m = 0; m < M; ++m) {
                const auto* data = reinterpret_cast<const __m128i*>(w.weight[digit][m] + kUnit * u);
                const __m512i weight = _mm512_broadcast_i32x4(_mm_load_si128(data));
                for (int q = 0; q < Q; ++q)
                    sums[digit][q][m] = _mm512_dpbusd_epi32(sums[digit][q][m], weight, codes[q]);
            }
        }
    }
    for (int q = 0; q < Q; ++q) {
        for (int m = 0; m < M; ++m) {
            float* out = w.sums[m][quad + q];
            const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(sums[0][q][m], kWeightDigit), sums[1][q][m]);
            const __m512 found = _mm512_mul_ps(_mm512_cvtepi32_ps(both), _mm512_set1_ps(w.share[m][span]));
            _mm512_store_ps(out, _mm512_fmadd_ps(_mm512_load_ps(out), _mm512_set1_ps(w.shrink[m]), found));
        }
    }
}

inline void raw_values(const Row& row, int units, int m, CodedScratch& w) {
    float* sums = w.raw[m];
    for (int d = 0; d < row.raw; ++d) {
        __m512 sum = _mm512_setzero_ps();
        for (int u = 0; u < units; ++u) {
            const auto* data = reinterpret_cast<const __m256i*>(w.units[u].value + row.offsets[d]);
            sum = _mm512_fmadd_ps(widen_bf16(_mm256_loadu_si256(data)), _mm512_load_ps(w.score[m] + kUnit * u), sum);
        }
        sums[d] = sums[d] * w.shrink[m] + _mm512_reduce_add_ps(sum) * w.worth[m];
    }
}

// Scores of one batch of units. with_values: values are going to be read, too.
template <int M, bool with_values>
void score_units(const Format& fmt, const Tile& tile, int units, CodedScratch& w) {
    constexpr int U = M <= 4 ? 2 : 1;  // as many sums as there are registers
    for (int unit = 0, count; unit < units; unit += count) {
        count = std::min(U, units - unit);
        if (fmt.key.scale == Scale::Channel) {
            const uint8_t* scales = w.units[unit].key_scale;
            if (w.units[unit + count - 1].key_scale != scales) count = 1;
            if (w.channels != scales) round_for_channels(fmt.key, tile, scales, w);
        }
        for (int u = unit; u < unit + count && w.next[u].key; ++u) {
            prefetch(w.next[u].key, fmt.key.unit_bytes);
            if (with_values) prefetch(w.next[u].value, fmt.value.unit_bytes);
        }
        if (count == U)
            key_products<M, U>(fmt.key, fmt.block, tile, unit, w);
        else
            key_products<M, 1>(fmt.key, fmt.block, tile, unit, w);
    }
}

// Adds one batch of units, the first being row `number`, to what was found.
template <int M>
void add_units(const Format& fmt, Tile& tile, int64_t number, int units, CodedScratch& w) {
    score_units<M, true>(fmt, tile, units, w);
    for (int m = 0; m < M; ++m) {
        absorb(tile, m, number, kUnit * units, w.score[m], w.shrink[m], w.worth[m]);
        raw_values(fmt.value, units, m, w);
    }
    for (int s = 0; s < span_count(fmt.value); ++s) {
        for (int m = 0; m < M; ++m) scale_weights(fmt.value, fmt.block, s, units, m, w);
        constexpr int Q = M <= 4 ? 2 : 1;
        int quad = fmt.value.spans[s];
        for (; quad + Q <= fmt.value.spans[s + 1]; quad += Q) value_products<M, Q>(fmt.value, s, quad, units, w);
        for (; quad < fmt.value.spans[s + 1]; ++quad) value_products<M, 1>(fmt.value, s, quad, units, w);
    }
}

// Out of lanes into dimensions, with what the codes were counted from.
inline void collect(const Row& row, Tile& tile, const CodedScratch& w) {
    for (int m = 0; m < tile.rows; ++m) {
        for (int d = 0; d < row.raw; ++d) tile.out[m][d] = w.raw[m][d];
        for (int s = 0; s < span_count(row); ++s) {
            for (int j = row.spans[s]; j < row.spans[s + 1]; ++j) {
                for (int i = 0; i < row.quads[j].dims; ++i) {
                    const int d = row.quads[j].dim + i;
                    const float* lanes = w.sums[m][j] + 4 * i;
                    const float found = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
                    const float zero = (row.widths[d] == 8 ? 128.f : 0.f) - (row.scale == Scale::Token ? 0.f : row.centre[d]);
                    tile.out[m][d] = found + zero * w.total[m][s] + w.lows[m][s];
                }
            }
        }
    }
}

// Calls add(number, units) for the units of runs, one batch of them after the other, the next one being known.
template <class Add>
void each_batch(const Format& fmt, const Run* runs, int count, CodedScratch& w, Add add) {
    // Bytes of scales that lie before those of the next token.
    const int key_size = fmt.key.scale == Scale::Channel ? 0 : fmt.key.scale == Scale::Step ? 1 : 2;
    const int value_size = fmt.value.scale == Scale::Step ? 1 : 2;
    const Run* run = runs;
    int row = count ? run->first : 0;
    // The next units of the runs, at most one batch, the one after the last having no address.
    const auto list = [&](Unit* units) {
        int n = 0;
        while (n < kMaxUnits && run < runs + count) {
            if (row >= run->last) {
                if (++run < runs + count) row = run->first;
                continue;
            }
            const uint8_t* block = run->page + size_t(row / fmt.block) * fmt.block_bytes;
            const uint8_t* values = block + fmt.key_bytes;
            const int unit = row % fmt.block / kUnit;
            units[n++] = {
                block + unit * fmt.key.unit_bytes,
                values + unit * fmt.value.unit_bytes,
                block + fmt.key.scales + unit * kUnit * key_size,
                values + fmt.value.scales + unit * kUnit * value_size,
            };
            row += kUnit;
        }
        if (n < kMaxUnits) units[n].key = nullptr;
        return n;
    };
    int64_t number = count ? runs->number : 0;
    for (int units = list(w.batches[0]), batch = 0; units; batch ^= 1) {
        w.units = w.batches[batch];
        w.next = w.batches[batch ^ 1];
        const int more = list(w.batches[batch ^ 1]);
        add(number, units);
        number += kUnit * units;
        units = more;
    }
}

template <int M>
void receive_coded(const Format& fmt, const Tile& tile, const Run* runs, int count, float power, float* mass, Scratch& scratch) {
    auto& w = *reinterpret_cast<CodedScratch*>(scratch.bytes);
    round_query(fmt.key, tile, w);
    each_batch(fmt, runs, count, w, [&](int64_t number, int units) {
        score_units<M, false>(fmt, tile, units, w);
        add_received(tile, number, kUnit * units, w.score, power, mass);
    });
}

template <int M>
void attend_coded(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    static_assert(sizeof(CodedScratch) <= sizeof(Scratch));
    auto& w = *reinterpret_cast<CodedScratch*>(scratch.bytes);
    Tile found;
    found.clear(M, tile.dim);
    for (int m = 0; m < M; ++m) {
        found.query[m] = tile.query[m];
        found.first[m] = tile.first[m];
        found.last[m] = tile.last[m];
        std::fill_n(w.raw[m], fmt.value.raw, 0.f);
        std::fill_n(w.total[m], span_count(fmt.value), 0.f);
        std::fill_n(w.lows[m], span_count(fmt.value), 0.f);
        std::memset(w.sums[m], 0, sizeof(w.sums[m][0]) * fmt.value.quads.size());
    }
    round_query(fmt.key, found, w);
    each_batch(fmt, runs, count, w, [&](int64_t number, int units) { add_units<M>(fmt, found, number, units, w); });
    collect(fmt.value, found, w);
    merge(tile, found);
}

}  // namespace
}  // namespace kvfold
