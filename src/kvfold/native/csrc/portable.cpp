// Attention for any machine, every format, float arithmetic. Compiled once for any machine and once for AVX2.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "regroup.h"
#include "unpack.h"

namespace kvfold {
namespace {

struct Work {
    alignas(64) float query[kMaxRows][kMaxDim];  // filled up with zeros to whole vectors
    float weight[kMaxRows][kRun];                // scores at first
    float sums[kMaxRows][kMaxDim * kLanes];      // of weighted values, and of codes still over lanes
    Numbers numbers, small;
};
static_assert(sizeof(Work) <= sizeof(Scratch));

// Up to 16 consecutive rows of a page.
struct Unit {
    const uint8_t* page;
    int row, tokens;
    int64_t number;
};
constexpr int kUnits = kRun / kUnit;  // whose weights are found together

constexpr int padded(int kept) { return (kept + kUnit - 1) / kUnit * kUnit; }

constexpr int kTogether = kLanes / 2;  // queries whose sums fit into registers

// Calls f(first, count as a constant) for so many queries at a time.
template <class F>
void each_few(int rows, F f) {
    int m = 0;
    for (; m + kTogether <= rows; m += kTogether) f(m, std::integral_constant<int, kTogether>());
    if (rows - m == 1) f(m, std::integral_constant<int, 1>());
    if (rows - m == 2) f(m, std::integral_constant<int, 2>());
    if (rows - m == 3) f(m, std::integral_constant<int, std::min(3, kTogether)>());
}

const uint8_t* side_of(const Format& fmt, const Row& side, const Unit& unit) {
    return unit.page + size_t(unit.row / fmt.block) * fmt.block_bytes + (&side == &fmt.key ? 0 : fmt.key_bytes);
}

// Codes of one side of a unit as numbers, zeros behind its tokens.
void read_codes(const Format& fmt, const Row& side, const Unit& unit, Work& w) {
    if (side.unit == kUnit) {
        decode(side, fmt.block, side_of(fmt, side, unit), unit.row % fmt.block / kUnit, w.numbers);
    } else {
        Unit part = unit;
        for (int t = 0; t < unit.tokens; t += side.unit, part.row += side.unit) {
            decode(side, fmt.block, side_of(fmt, side, part), part.row % fmt.block / side.unit, w.small);
            for (int d = 0; d < side.kept; ++d) std::copy_n(w.small[d], side.unit, w.numbers[d] + t);
        }
    }
    // What nobody wrote may be NaN.
    for (int d = 0; unit.tokens < kUnit && d < side.kept; ++d) std::fill(w.numbers[d] + unit.tokens, w.numbers[d] + kUnit, 0.f);
}

template <int M>
void score_codes(int kept, const Numbers& keys, const float (*query)[kMaxDim], float (*out)[kRun]) {
    Lanes found[M][kParts];
    for (auto& own : found) std::fill_n(own, kParts, Lanes{});
    for (int d = 0; d < kept; ++d)
        for (int part = 0; part < kParts; ++part) {
            const auto key = load<Lanes>(keys[d] + kLanes * part);
            for (int m = 0; m < M; ++m) found[m][part] += query[m][d] * key;
        }
    for (int m = 0; m < M; ++m) std::memcpy(out[m], found[m], sizeof found[m]);
}

template <int Bits>
Pair load_pair(const uint8_t* data, int count) {
    if (count >= 2 * kLanes) return load_pair<Bits>(data);
    uint8_t own[2 * kLanes * Bits / 8] = {};
    std::memcpy(own, data, size_t(count) * Bits / 8);
    return load_pair<Bits>(own);
}

// As many sums at a time as there are lanes: tokens times queries.
template <int Bits, int M>
void score_raw(int kept, const uint8_t* data, int stride, int tokens, const float (*query)[kMaxDim], float (*out)[kRun]) {
    constexpr int together = kLanes / (M == 3 ? 4 : M);
    for (int t = 0; t < tokens; t += together) {
        Lanes products[kLanes] = {};
        const uint8_t* own[together];
        for (int i = 0; i < together; ++i) own[i] = data + size_t(std::min(t + i, tokens - 1)) * stride;
        for (int d = 0; d < kept; d += 2 * kLanes) {
            for (int i = 0; i < together; ++i) {
                const Pair keys = load_pair<Bits>(own[i] + d * Bits / 8, kept - d);
                for (int m = 0; m < M; ++m)
                    for (int part = 0; part < 2; ++part)
                        products[i * M + m] += load<Lanes>(query[m] + d + part * kLanes) * keys.part[part];
            }
        }
        const Lanes found = sums(products);
        for (int i = 0; i < together; ++i)
            for (int m = 0; m < M; ++m) out[m][t + i] = found[i * M + m];
    }
}

// Scores of a unit for all queries, at `at`; kNone for tokens that a query does not see.
void score(const Format& fmt, const Tile& tile, const Unit& unit, int at, Work& w) {
    const Row& row = fmt.key;
    if (!fmt.raw()) read_codes(fmt, row, unit, w);
    each_few(tile.rows, [&](int m, auto count) {
        float(*out)[kRun] = reinterpret_cast<float(*)[kRun]>(w.weight[m] + at);
        const auto raw = row.raw_bits == 16 ? score_raw<16, count> : score_raw<32, count>;
        if (fmt.raw())
            raw(row.kept, side_of(fmt, row, unit), fmt.block_bytes, unit.tokens, w.query + m, out);
        else
            score_codes<count>(row.kept, w.numbers, w.query + m, out);
    });
    for (int m = 0; m < tile.rows; ++m) {
        const auto from = int(std::max<int64_t>(tile.first[m] - unit.number, 0));
        const auto to = int(std::min<int64_t>(tile.last[m] - unit.number, unit.tokens));
        for (int t = 0; t < kUnit; ++t) w.weight[m][at + t] = t >= from && t < to ? w.weight[m][at + t] : kNone;
    }
}

// Turns scores into weights and brings what the tile holds to the same largest score.
void weigh(Tile& tile, int m, int count, float* weight) {
    Lanes most = all(tile.most[m]), total{};
    for (int t = 0; t < count; t += kLanes) {
        const auto x = load<Lanes>(weight + t);
        most = x > most ? x : most;
    }
    float top = most[0];
    for (int i = 1; i < kLanes; ++i) top = std::max(top, most[i]);
    if (top == kNone) {
        std::fill_n(weight, count, 0.f);
        return;
    }
    for (int t = 0; t < count; t += kLanes) {
        const Lanes x = exp2_of(load<Lanes>(weight + t) - top);
        store(weight + t, x);
        total += x;
    }
    float added = 0;
    for (int i = 0; i < kLanes; ++i) added += total[i];
    const float shrink = std::exp2(tile.most[m] - top);
    tile.most[m] = top;
    tile.sum[m] = tile.sum[m] * shrink + added;
    for (int d = 0; d < tile.dim; ++d) tile.out[m][d] *= shrink;
}

template <int M>
void add_codes(int kept, const Numbers& values, const float (*weight)[kRun], float (*sums)[kMaxDim * kLanes]) {
    Lanes own[M][kParts];
    for (int m = 0; m < M; ++m) std::memcpy(own[m], weight[m], sizeof own[m]);
    for (int d = 0; d < kept; ++d)
        for (int m = 0; m < M; ++m) {
            auto sum = load<Lanes>(sums[m] + d * kLanes);
            for (int part = 0; part < kParts; ++part) sum += own[m][part] * load<Lanes>(values[d] + kLanes * part);
            store(sums[m] + d * kLanes, sum);
        }
}

template <int Bits, int M>
void add_raw(int kept, const uint8_t* data, int stride, int tokens, const float (*weight)[kRun],
             float (*sums)[kMaxDim * kLanes]) {
    for (int d = 0; d < kept; d += 2 * kLanes) {
        Pair found[M];
        for (int m = 0; m < M; ++m) found[m] = load<Pair>(sums[m] + d);
        for (int t = 0; t < tokens; ++t) {
            const Pair values = load_pair<Bits>(data + size_t(t) * stride + d * Bits / 8, kept - d);
            for (int m = 0; m < M; ++m)
                for (int part = 0; part < 2; ++part) found[m].part[part] += weight[m][t] * values.part[part];
        }
        for (int m = 0; m < M; ++m) std::memcpy(sums[m] + d, &found[m], sizeof found[m]);
    }
}

void add_values(const Format& fmt, const Tile& tile, const Unit& unit, int at, Work& w) {
    const Row& row = fmt.value;
    if (!fmt.raw()) read_codes(fmt, row, unit, w);
    each_few(tile.rows, [&](int m, auto count) {
        const auto weight = reinterpret_cast<const float(*)[kRun]>(w.weight[m] + at);
        const auto raw = row.raw_bits == 16 ? add_raw<16, count> : add_raw<32, count>;
        if (fmt.raw())
            raw(row.kept, side_of(fmt, row, unit), fmt.block_bytes, unit.tokens, weight, w.sums + m);
        else
            add_codes<count>(row.kept, w.numbers, weight, w.sums + m);
    });
}

// Adds the sums to what the tile holds.
void gather(const Format& fmt, Tile& tile, const Work& w) {
    const Row& row = fmt.value;
    for (int m = 0; m < tile.rows; ++m) {
        float* out = tile.out[m];
        if (fmt.raw()) {
            for (int d = 0; d < row.kept; ++d) out[d] += w.sums[m][place_of(d, row.raw_bits)];
        } else {
            for (int d = 0; d < row.kept; d += kLanes) {
                Lanes own[kLanes];
                std::memcpy(own, w.sums[m] + d * kLanes, sizeof own);
                store(out + d, load<Lanes>(out + d) + sums(own));
            }
        }
    }
}

// Calls work(units, how many) for the rows of runs, up to kRun of them at a time.
template <class F>
void each_units(const Run* runs, int count, F work) {
    Unit units[kUnits];
    int found = 0;
    for (; count--; ++runs)
        for (int row = runs->first; row < runs->last; row += kUnit) {
            units[found++] = {runs->page, row, std::min(kUnit, runs->last - row), runs->number + row - runs->first};
            if (found == kUnits) work(units, std::exchange(found, 0));
        }
    if (found) work(units, found);
}

Work& begin(const Format& fmt, const Tile& tile, Scratch& scratch) {
    auto& w = *reinterpret_cast<Work*>(scratch.bytes);
    const Row& row = fmt.key;
    for (int m = 0; m < tile.rows; ++m) {
        std::fill_n(w.query[m], padded(row.kept), 0.f);
        for (int d = 0; d < row.kept; ++d) w.query[m][fmt.raw() ? place_of(d, row.raw_bits) : d] = tile.query[m][d];
    }
    return w;
}

void attend(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    if (fmt.regrouped)
        return each_regrouped(fmt, runs, count, scratch, [&](const Run& run) { attend(*fmt.regrouped, tile, &run, 1, scratch); });
    Work& w = begin(fmt, tile, scratch);
    each_units(runs, count, [&](const Unit* units, int n) {
        for (int i = 0; i < n; ++i) score(fmt, tile, units[i], kUnit * i, w);
        for (int m = 0; m < tile.rows; ++m) {
            weigh(tile, m, kUnit * n, w.weight[m]);
            std::fill_n(w.sums[m], padded(fmt.value.kept) * (fmt.raw() ? 1 : kLanes), 0.f);
        }
        for (int i = 0; i < n; ++i) add_values(fmt, tile, units[i], kUnit * i, w);
        gather(fmt, tile, w);
    });
}

void receive(const Format& fmt, const Tile& tile, const Run* runs, int count, float power, float* mass, Scratch& scratch) {
    if (fmt.regrouped)
        return each_regrouped(fmt, runs, count, scratch, [&](const Run& run) {
            receive(*fmt.regrouped, tile, &run, 1, power, mass, scratch);
        });
    Work& w = begin(fmt, tile, scratch);
    each_units(runs, count, [&](const Unit* units, int n) {
        for (int i = 0; i < n; ++i) {
            score(fmt, tile, units[i], 0, w);
            for (int m = 0; m < tile.rows; ++m) {
                for (int t = 0; t < kUnit; t += kLanes)
                    store(w.weight[m] + t, exp2_of(power * (load<Lanes>(w.weight[m] + t) - tile.most[m])));
                // Units may be filled up with rows that there is no mass for; nobody sees those.
                const int seen = int(std::min<int64_t>(tile.last[m] - units[i].number, units[i].tokens));
                for (int t = 0; t < seen; ++t) mass[units[i].number + t] += w.weight[m][t];
            }
        }
    });
}

// Four rows at a time, so that `out` is passed through fewer times.
void turn(const float* __restrict matrix, int dim, int kept, const float* __restrict x, float* __restrict out) {
    std::fill_n(out, kept, 0.f);
    int d = 0;
    for (; d + 4 <= dim; d += 4) {
        const float* m = matrix + d * dim;
        for (int i = 0; i < kept; ++i)
            out[i] += (x[d] * m[i] + x[d + 1] * m[dim + i]) + (x[d + 2] * m[2 * dim + i] + x[d + 3] * m[3 * dim + i]);
    }
    for (; d < dim; ++d)
        for (int i = 0; i < kept; ++i) out[i] += x[d] * matrix[d * dim + i];
}

void lift(const float* matrix, int dim, int kept, const float* u, float* out) {
    constexpr int lanes = 8;
    for (int d = 0; d < dim; ++d, matrix += dim) {
        float sums[lanes] = {};
        int i = 0;
        for (; i + lanes <= kept; i += lanes)
            for (int lane = 0; lane < lanes; ++lane) sums[lane] += matrix[i + lane] * u[i + lane];
        for (; i < kept; ++i) sums[i % lanes] += matrix[i] * u[i];
        out[d] = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    }
}

}  // namespace

extern const Kernels KVFOLD_NAMED(k){
    attend, receive, turn, lift, KVFOLD_NAME, &KVFOLD_NAMED(k), &KVFOLD_NAMED(kLinear), KVFOLD_NAMED(head)};

}  // namespace kvfold
