// Rows of codes met by integer products (VNNI): queries and weights are rounded to bytes, codes stay what they are.
#pragma once
#include "products.h"

namespace kvfold {
namespace {

inline __m512 steps_of(const uint8_t* bytes) {
    const __m512i exponent = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
    const __m512 octaves = _mm512_cvtepi32_ps(_mm512_sub_epi32(exponent, _mm512_set1_epi32(128)));
    const __m512 x = _mm512_mul_ps(octaves, _mm512_set1_ps(1.f / kStepsPerOctave));
    // exp2_ps takes what is not above 0.
    return _mm512_mul_ps(exp2_ps(_mm512_sub_ps(x, _mm512_set1_ps(11.f))), _mm512_set1_ps(2048.f));
}

// Asks for the scales of one unit and span.
inline void prefetch_scales(const Row& row, int block, int span, const uint8_t* scale) {
    if (row.scale == Scale::Step) prefetch(scale, 1);
    if (row.scale != Scale::Token) return;
    prefetch(scale + 2 * span * block, 1);
    prefetch(scale + 2 * (span_count(row) + span) * block, 1);
}

// Scores of U units for M queries.
template <int M, int U>
void score(const Row& row, int block, const Tile& tile, int unit, CodedScratch& w) {
    constexpr int F = 2 * U * M <= 24 ? U : U / 2;  // units whose sums of two digits fit into registers
    const int spans = span_count(row);
    for (int s = 0; s < spans; ++s) {
        const int from = row.spans[s], to = row.spans[s + 1], fine = std::clamp(w.fine, from, to);
        for (int u = 0; from < fine && u < U; u += F) key_sums<M, F, 2>(row, from, fine, false, unit + u, w);
        if (fine < to) key_sums<M, U, 1>(row, fine, to, from < fine, unit, w);
        for (int u = unit; u < unit + U; ++u) {
            const uint8_t* scale = w.units[u].key_scale;
            prefetch_scales(row, block, s, w.next[u].key_scale);
            for (int m = 0; m < M; ++m) {
                float* out = w.score[m] + kUnit * u;
                const __m512 found = _mm512_cvtepi32_ps(_mm512_load_si512(w.product[u][m]));
                const __m512 product = _mm512_mul_ps(found, _mm512_set1_ps(w.step[m]));
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
            prefetch(w.next[unit + u].key + row.offsets[d], 1);
            const __m512 numbers = widen_bf16(_mm256_loadu_si256(data));
            for (int m = 0; m < M; ++m) {
                float* out = w.score[m] + kUnit * (unit + u);
                _mm512_store_ps(out, _mm512_fmadd_ps(numbers, _mm512_set1_ps(tile.query[m][d]), _mm512_load_ps(out)));
            }
        }
    }
}

// Rounds x >= 0 to D digits, its largest value to the largest weight. Returns the step and adds up what came out.
template <int D>
float round_weights(const float* x, int units, uint8_t* high, uint8_t* low, float most, float& total) {
    constexpr int kLargest = D == 2 ? kMostWeight : kMostDigit;
    const __m512 levels = _mm512_set1_ps(float(kLargest) / most);
    __m512i sum = _mm512_setzero_si512();
    for (int u = 0; u < units; ++u) {
        const __m512 added = D == 2 ? _mm512_set1_ps(0.5f) : _mm512_load_ps(kDither.at + kUnit * u);
        const __m512i whole = _mm512_cvttps_epi32(_mm512_fmadd_ps(_mm512_load_ps(x + kUnit * u), levels, added));
        sum = _mm512_add_epi32(sum, whole);
        const __m512i digit = D == 2 ? _mm512_srli_epi32(whole, kWeightDigit) : whole;
        _mm_store_si128(reinterpret_cast<__m128i*>(high + kUnit * u), _mm512_cvtepi32_epi8(digit));
        if (D == 2) _mm_store_si128(reinterpret_cast<__m128i*>(low + kUnit * u), _mm512_cvtepi32_epi8(whole));
    }
    const float step = most / float(kLargest);
    total = float(_mm512_reduce_add_epi32(sum)) * step;
    return step;
}

// Weights of the values of one span: what scales their codes is folded in.
template <int D>
void scale_weights(const Row& row, int block, int span, int units, int m, CodedScratch& w) {
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
    const float step = round_weights<D>(x, units, w.weight[0][m], w.weight[1][m], most, total);
    w.share[m][span] = step * w.worth[m];
    w.total[m][span] = w.total[m][span] * w.shrink[m] + total * w.worth[m];
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

// Scores of one batch of units.
template <int M>
void score_units(const Format& fmt, const Tile& tile, int units, CodedScratch& w) {
    constexpr int U = M <= 3 ? 4 : 2;  // as many sums as there are registers
    for (int unit = 0, count; unit < units; unit += count) {
        count = unit + U <= units ? U : 1;
        if (fmt.key.scale == Scale::Channel) {
            const uint8_t* scales = w.units[unit].key_scale;
            if (w.units[unit + count - 1].key_scale != scales) count = 1;
            if (w.channels != scales) {
                prefetch(w.next[unit].key_scale, 4 * fmt.key.kept);
                round_for_channels(fmt.key, tile, scales, w);
            }
        }
        if (count == U)
            score<M, U>(fmt.key, fmt.block, tile, unit, w);
        else
            score<M, 1>(fmt.key, fmt.block, tile, unit, w);
    }
}

template <int M, int D>
void add_values(const Format& fmt, int units, CodedScratch& w) {
    for (int s = 0; s < span_count(fmt.value); ++s) {
        for (int u = 0; u < units; ++u) prefetch_scales(fmt.value, fmt.block, s, w.next[u].value_scale);
        for (int m = 0; m < M; ++m) scale_weights<D>(fmt.value, fmt.block, s, units, m, w);
        value_products<M, D>(fmt.value, s, units, w);
    }
}

// Adds one batch of units, the first being row `number`, to what was found.
template <int M>
void add_units(const Format& fmt, Tile& tile, int64_t number, int units, CodedScratch& w) {
    score_units<M>(fmt, tile, units, w);
    for (int u = 0; u < units; ++u) prefetch(w.next[u].value, 2 * kUnit * fmt.value.raw);
    for (int m = 0; m < M; ++m) {
        absorb(tile, m, number, kUnit * units, w.score[m], w.shrink[m], w.worth[m]);
        raw_values(fmt.value, units, m, w);
    }
    fmt.value.fine() ? add_values<M, 2>(fmt, units, w) : add_values<M, 1>(fmt, units, w);
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
    const Run *run = runs, *const end = runs + count;
    int left = 0, unit = 0;  // units of the run that are to come; the next one's number in its block
    const uint8_t* block = nullptr;
    Unit last{};
    // The next units of the runs, at most one batch.
    const auto list = [&](Unit* units) {
        int n = 0;
        for (; n < kMaxUnits; ++n) {
            for (; !left && run < end; ++run) {
                left = (run->last - run->first + kUnit - 1) / kUnit;
                unit = run->first % fmt.block / kUnit;
                block = run->page + size_t(run->first / fmt.block) * fmt.block_bytes;
            }
            if (!left) break;
            const uint8_t* values = block + fmt.key_bytes;
            last = {
                block + unit * fmt.key.unit_bytes,
                values + unit * fmt.value.unit_bytes,
                block + fmt.key.scales + unit * kUnit * key_size,
                values + fmt.value.scales + unit * kUnit * value_size,
            };
            units[n] = last;
            --left;
            if (++unit * kUnit == fmt.block) {
                unit = 0;
                block += fmt.block_bytes;
            }
        }
        std::fill(units + n, units + kMaxUnits, last);  // what is not there is asked for as what is
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
        score_units<M>(fmt, tile, units, w);
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
