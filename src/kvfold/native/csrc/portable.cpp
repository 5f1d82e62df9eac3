// Attention in plain C++, every format, float arithmetic. Compiled once for any machine and once for AVX2.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace kvfold {
namespace {

// One unit of keys or values as numbers, [dims][16].
using Numbers = float[kMaxDim][kUnit];

// `count` codes of one dimension, up to 16.
void unpack(const uint8_t* data, int width, int count, float* out) {
    const uint64_t mask = (uint64_t(1) << width) - 1;
    for (int first = 0; first < count; first += 8, data += width) {
        uint64_t stream;
        std::memcpy(&stream, data, 8);
        for (int i = 0; i < std::min(8, count - first); ++i) out[first + i] = float(stream >> (width * i) & mask);
    }
}

float half_at(const uint8_t* data) {
    uint16_t x;
    std::memcpy(&x, data, 2);
    return from_f16(x);
}

float step_of(uint8_t byte) {
    return std::exp2(float(int(byte) - 128) / kStepsPerOctave);
}

// A unit of a block, its tokens being put at `at`.
void decode(const Row& row, int block, const uint8_t* data, int unit, int at, Numbers& out) {
    const uint8_t* codes = data + unit * row.unit_bytes;
    const uint8_t* scales = data + row.scales;
    for (int d = 0; d < row.kept; ++d) {
        float* numbers = out[d] + at;
        if (d < row.raw) {
            for (int t = 0; t < row.unit; ++t) numbers[t] = read_raw(codes + row.offsets[d] + t * row.raw_bits / 8, row.raw_bits);
            continue;
        }
        unpack(codes + row.offsets[d], row.widths[d], row.unit, numbers);
        if (row.scale == Scale::Static) {
            for (int t = 0; t < row.unit; ++t) numbers[t] -= row.centre[d];
        } else if (row.scale == Scale::Channel) {
            const float low = half_at(scales + 2 * d), step = half_at(scales + 2 * (row.kept + d));
            for (int t = 0; t < row.unit; ++t) numbers[t] = numbers[t] * step + low;
        }
    }
    if (row.scale == Scale::Step) {
        for (int t = 0; t < row.unit; ++t) {
            const float step = step_of(scales[unit * row.unit + t]);
            for (int d = 0; d < row.kept; ++d) out[d][at + t] = (out[d][at + t] - row.centre[d]) * step;
        }
    }
    if (row.scale == Scale::Token) {
        const int size = row.kept / row.groups;
        for (int g = 0; g < row.groups; ++g) {
            const uint8_t* low = scales + 2 * (g * block + unit * row.unit);
            const uint8_t* step = low + 2 * row.groups * block;
            for (int t = 0; t < row.unit; ++t) {
                const float a = half_at(step + 2 * t), b = half_at(low + 2 * t);
                for (int d = g * size; d < (g + 1) * size; ++d) out[d][at + t] = out[d][at + t] * a + b;
            }
        }
    }
}

// 2^x for x <= 0 in operations that compilers turn into vector ones, relative error below 3e-7; 0 below 2^-126.
inline float exp2_of(float x) {
    const float inside = std::max(x, -126.f), rounding = 12582912.f;  // 1.5 * 2^23: what is added to it loses its fraction
    const float whole = (inside + rounding) - rounding, part = inside - whole;
    float y = 0.00015403530f;
    for (const float c : {0.0013333558f, 0.0096181291f, 0.0555041087f, 0.2402265070f, 0.6931471806f, 1.f}) y = y * part + c;
    const int32_t bits = (int32_t(whole) + 127) * (1 << 23);
    float scale;
    std::memcpy(&scale, &bits, 4);
    const float found = y * scale;
    return x < -126.f ? 0.f : found;
}

inline float sum_of(const float (&x)[kUnit]) {
    float eight[8], four[4];
    for (int i = 0; i < 8; ++i) eight[i] = x[i] + x[i + 8];
    for (int i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
    return (four[0] + four[2]) + (four[1] + four[3]);
}

// Scores of 16 tokens, kNone for those that a query does not see. Returns the largest.
float score(const Tile& tile, int m, int kept, const Numbers& keys, int64_t number, int tokens, float (&out)[kUnit]) {
    std::fill_n(out, kUnit, 0.f);
    for (int d = 0; d < kept; ++d) {
        const float q = tile.query[m][d];
        for (int t = 0; t < kUnit; ++t) out[t] += q * keys[d][t];
    }
    float most = kNone;
    for (int t = 0; t < kUnit; ++t) {
        const bool seen = t < tokens && number + t >= tile.first[m] && number + t < tile.last[m];
        if (!seen) out[t] = kNone;
        most = std::max(most, out[t]);
    }
    return most;
}

// Online softmax over 16 tokens.
void add(Tile& tile, int kept_keys, const Numbers& keys, int kept_values, const Numbers& values, int64_t number, int tokens) {
    for (int m = 0; m < tile.rows; ++m) {
        float weight[kUnit];
        const float most = std::max(tile.most[m], score(tile, m, kept_keys, keys, number, tokens, weight));
        if (most == kNone) continue;
        const float shrink = std::exp2(tile.most[m] - most);
        for (int t = 0; t < kUnit; ++t) weight[t] = exp2_of(weight[t] - most);
        tile.most[m] = most;
        tile.sum[m] = tile.sum[m] * shrink + sum_of(weight);
        float* out = tile.out[m];
        for (int d = 0; d < kept_values; ++d) {
            float found[kUnit];
            for (int t = 0; t < kUnit; ++t) {
                const float value = weight[t] == 0 ? 0.f : values[d][t];  // what nobody wrote may be NaN
                found[t] = weight[t] * value;
            }
            out[d] = out[d] * shrink + sum_of(found);
        }
        for (int d = kept_values; d < tile.dim; ++d) out[d] *= shrink;
    }
}

// One side of uncompressed tokens, `stride` bytes apart.
void read_tokens(const Row& row, const uint8_t* data, int stride, int tokens, Numbers& out) {
    for (int t = 0; t < kUnit; ++t, data += stride)
        for (int d = 0; d < row.kept; ++d) out[d][t] = t < tokens ? read_raw(data + d * row.raw_bits / 8, row.raw_bits) : 0;
}

// Keys or values of up to 16 tokens of a page from row `row` on.
void read_rows(const Format& fmt, const Row& side, const uint8_t* page, int row, int tokens, Numbers& out) {
    for (int t = 0; t < tokens; t += side.unit, row += side.unit) {
        const uint8_t* block = page + size_t(row / fmt.block) * fmt.block_bytes + (&side == &fmt.key ? 0 : fmt.key_bytes);
        if (fmt.raw()) return read_tokens(side, block, fmt.block_bytes, tokens, out);
        decode(side, fmt.block, block, row % fmt.block / side.unit, t, out);
    }
}

// Calls add(page, row, number, tokens) for up to 16 tokens of the runs at a time.
template <class Add>
void each_unit(const Run* runs, int count, Add add) {
    for (; count--; ++runs)
        for (int row = runs->first; row < runs->last; row += kUnit)
            add(runs->page, row, runs->number + row - runs->first, std::min(kUnit, runs->last - row));
}

void attend(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    static_assert(2 * sizeof(Numbers) <= sizeof(Scratch));
    auto* sides = reinterpret_cast<Numbers*>(scratch.bytes);
    each_unit(runs, count, [&](const uint8_t* page, int row, int64_t number, int tokens) {
        read_rows(fmt, fmt.key, page, row, tokens, sides[0]);
        read_rows(fmt, fmt.value, page, row, tokens, sides[1]);
        add(tile, fmt.key.kept, sides[0], fmt.value.kept, sides[1], number, tokens);
    });
}

void receive(const Format& fmt, const Tile& tile, const Run* runs, int count, float power, float* mass, Scratch& scratch) {
    auto& keys = *reinterpret_cast<Numbers*>(scratch.bytes);
    each_unit(runs, count, [&](const uint8_t* page, int row, int64_t number, int tokens) {
        read_rows(fmt, fmt.key, page, row, tokens, keys);
        for (int m = 0; m < tile.rows; ++m) {
            float scores[kUnit];
            score(tile, m, fmt.key.kept, keys, number, tokens, scores);
            for (int t = 0; t < kUnit; ++t)
                if (scores[t] != kNone) mass[number + t] += exp2_of(power * (scores[t] - tile.most[m]));
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
