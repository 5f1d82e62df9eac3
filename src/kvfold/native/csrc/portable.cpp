// Attention in plain C++, every format, float arithmetic. Compiled once for any machine and once for AVX2.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace kvfold {
namespace {

// One unit of keys or values as numbers, [dims][16].
using Numbers = float[kMaxDim][kUnit];

void unpack(const uint8_t* data, int width, float* out) {
    const uint64_t mask = (uint64_t(1) << width) - 1;
    for (int half = 0; half < 2; ++half, data += width) {
        uint64_t stream;
        std::memcpy(&stream, data, 8);
        for (int i = 0; i < 8; ++i) out[8 * half + i] = float(stream >> (width * i) & mask);
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

void decode(const Row& row, int block, const uint8_t* data, int unit, Numbers& out) {
    const uint8_t* codes = data + unit * row.unit_bytes;
    const uint8_t* scales = data + row.scales;
    for (int d = 0; d < row.kept; ++d) {
        float* numbers = out[d];
        if (d < row.raw) {
            for (int t = 0; t < kUnit; ++t) numbers[t] = read_raw(codes + row.offsets[d] + t * row.raw_bits / 8, row.raw_bits);
            continue;
        }
        unpack(codes + row.offsets[d], row.widths[d], numbers);
        if (row.scale == Scale::Static) {
            for (int t = 0; t < kUnit; ++t) numbers[t] -= row.centre[d];
        } else if (row.scale == Scale::Channel) {
            const float low = half_at(scales + 2 * d), step = half_at(scales + 2 * (row.kept + d));
            for (int t = 0; t < kUnit; ++t) numbers[t] = numbers[t] * step + low;
        }
    }
    if (row.scale == Scale::Step) {
        for (int t = 0; t < kUnit; ++t) {
            const float step = step_of(scales[unit * kUnit + t]);
            for (int d = 0; d < row.kept; ++d) out[d][t] = (out[d][t] - row.centre[d]) * step;
        }
    }
    if (row.scale == Scale::Token) {
        const int size = row.kept / row.groups;
        for (int g = 0; g < row.groups; ++g) {
            const uint8_t* low = scales + 2 * (g * block + unit * kUnit);
            const uint8_t* step = low + 2 * row.groups * block;
            for (int t = 0; t < kUnit; ++t) {
                const float a = half_at(step + 2 * t), b = half_at(low + 2 * t);
                for (int d = g * size; d < (g + 1) * size; ++d) out[d][t] = out[d][t] * a + b;
            }
        }
    }
}

// Online softmax over 16 tokens.
void add(Tile& tile, int kept_keys, const Numbers& keys, int kept_values, const Numbers& values, int64_t number, int tokens) {
    for (int m = 0; m < tile.rows; ++m) {
        float score[kUnit] = {};
        for (int d = 0; d < kept_keys; ++d) {
            const float q = tile.query[m][d];
            for (int t = 0; t < kUnit; ++t) score[t] += q * keys[d][t];
        }
        float most = tile.most[m];
        for (int t = 0; t < kUnit; ++t) {
            const bool seen = t < tokens && number + t >= tile.first[m] && number + t < tile.last[m];
            if (!seen) score[t] = kNone;
            most = std::max(most, score[t]);
        }
        if (most == kNone) continue;
        const float shrink = std::exp2(tile.most[m] - most);
        float sum = 0;
        for (int t = 0; t < kUnit; ++t) {
            score[t] = std::exp2(score[t] - most);
            sum += score[t];
        }
        tile.most[m] = most;
        tile.sum[m] = tile.sum[m] * shrink + sum;
        float* out = tile.out[m];
        for (int d = 0; d < kept_values; ++d) {
            float total = 0;
            // What nobody wrote may be NaN; its weight is 0.
            for (int t = 0; t < kUnit; ++t) total += score[t] == 0 ? 0.f : score[t] * values[d][t];
            out[d] = out[d] * shrink + total;
        }
        for (int d = kept_values; d < tile.dim; ++d) out[d] *= shrink;
    }
}

void raw_tokens(const Format& fmt, const uint8_t* data, int tokens, Numbers& keys, Numbers& values) {
    for (int t = 0; t < kUnit; ++t, data += fmt.block_bytes) {
        const bool there = t < tokens;
        for (int d = 0; d < fmt.key.kept; ++d)
            keys[d][t] = there ? read_raw(data + d * fmt.key.raw_bits / 8, fmt.key.raw_bits) : 0;
        for (int d = 0; d < fmt.value.kept; ++d)
            values[d][t] = there ? read_raw(data + fmt.key_bytes + d * fmt.value.raw_bits / 8, fmt.value.raw_bits) : 0;
    }
}

void attend(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    static_assert(2 * sizeof(Numbers) <= sizeof(Scratch));
    auto* sides = reinterpret_cast<Numbers*>(scratch.bytes);
    Numbers &keys = sides[0], &values = sides[1];
    for (; count--; ++runs) {
        for (int row = runs->first; row < runs->last; row += kUnit) {
            const int tokens = std::min(kUnit, runs->last - row);
            const uint8_t* block = runs->page + size_t(row / fmt.block) * fmt.block_bytes;
            if (fmt.raw()) {
                raw_tokens(fmt, block, tokens, keys, values);
            } else {
                const int unit = row % fmt.block / kUnit;
                decode(fmt.key, fmt.block, block, unit, keys);
                decode(fmt.value, fmt.block, block + fmt.key_bytes, unit, values);
            }
            add(tile, fmt.key.kept, keys, fmt.value.kept, values, runs->number + row - runs->first, tokens);
        }
    }
}

}  // namespace

extern const Kernels KVFOLD_NAMED(k){attend, KVFOLD_NAME, &KVFOLD_NAMED(k), &KVFOLD_NAMED(kLinear), KVFOLD_NAMED(turn)};

}  // namespace kvfold
