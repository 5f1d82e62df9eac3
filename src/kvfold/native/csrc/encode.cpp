// Rows of numbers to the bytes of a block, exactly as kvfold.kv.packing.encode does it.
#include "encode.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels.h"

namespace kvfold {
namespace {

uint16_t to_f16(float value) {
    value = std::min(65504.f, std::max(-65504.f, value));
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t sign = bits >> 16 & 0x8000;
    const uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude < 0x38800000) {  // below the smallest normal number: fixed point
        return uint16_t(sign | uint32_t(std::nearbyint(std::fabs(value) * 0x1p24f)));
    }
    const uint32_t rounded = magnitude + 0xfff + (magnitude >> 13 & 1);
    return uint16_t(sign | (rounded - 0x38000000) >> 13);
}

uint8_t code(float x, int width) {
    if (std::isnan(x)) x = 0;
    const float top = float((1 << width) - 1);
    return uint8_t(std::min(top, std::max(0.f, std::nearbyint(x))));
}

void put_half(uint8_t* out, size_t index, float value) {
    const uint16_t half = to_f16(value);
    std::memcpy(out + 2 * index, &half, 2);
}

void put_sum(uint8_t* out, size_t index, int value) {
    const int16_t sum = int16_t(value);
    std::memcpy(out + 2 * index, &sum, 2);
}

// Offset and step of `dims` dimensions x `tokens` tokens, rounded to what the reader will see.
void scale_of(const float* x, int d0, int d1, int t0, int t1, int dim, float levels, float& low, float& step) {
    float least = x[t0 * dim + d0], most = least;
    for (int t = t0; t < t1; ++t) {
        for (int d = d0; d < d1; ++d) {
            least = std::min(least, x[t * dim + d]);
            most = std::max(most, x[t * dim + d]);
        }
    }
    low = from_f16(to_f16(least));
    step = from_f16(to_f16((most - least) / levels));
}

}  // namespace

void encode(const Row& row, int block, int dim, const float* x, uint8_t* out) {
    const int unit_tokens = block == 1 ? 1 : kUnit;
    static thread_local uint8_t codes[kMaxDim][256];
    uint8_t* scales = out + row.scales;
    for (int d = row.raw; d < row.kept && row.scale == Scale::Static; ++d)
        for (int t = 0; t < block; ++t) codes[d][t] = code(x[t * dim + d] + row.centre[d], row.widths[d]);
    if (row.scale == Scale::Step) {
        for (int t = 0; t < block; ++t) {
            float step = 1e-30f;
            for (int d = 0; d < row.kept; ++d) step = std::max(step, 2 * std::fabs(x[t * dim + d]) / (2 * row.centre[d]));
            const float octave = std::ceil(kStepsPerOctave * std::log2(step));
            scales[t] = uint8_t(std::min(127.f, std::max(-128.f, octave)) + 128);
            const float rounded = std::exp2(float(int(scales[t]) - 128) / kStepsPerOctave);
            for (int d = 0; d < row.kept; ++d) codes[d][t] = code(x[t * dim + d] / rounded + row.centre[d], row.widths[d]);
        }
    }
    if (row.scale == Scale::Token) {
        const int size = row.kept / row.groups;
        for (int g = 0; g < row.groups; ++g) {
            const int widest = *std::max_element(row.widths.begin() + g * size, row.widths.begin() + (g + 1) * size);
            for (int t = 0; t < block; ++t) {
                float low, step;
                scale_of(x, g * size, (g + 1) * size, t, t + 1, dim, float((1 << widest) - 1), low, step);
                put_half(scales, size_t(g) * block + t, low);
                put_half(scales, size_t(row.groups + g) * block + t, step);
                int sum = 0;
                for (int d = g * size; d < (g + 1) * size; ++d)
                    sum += codes[d][t] = code((x[t * dim + d] - low) / std::max(step, 1e-12f), row.widths[d]);
                if (row.sums) put_sum(scales, size_t(2 * row.groups + g) * block + t, sum);
            }
        }
    }
    if (row.scale == Scale::Channel) {
        for (int d = 0; d < row.kept; ++d) {
            float low, step;
            scale_of(x, d, d + 1, 0, block, dim, float((1 << row.widths[d]) - 1), low, step);
            put_half(scales, d, low);
            put_half(scales, size_t(row.kept) + d, step);
            int sum = 0;
            for (int t = 0; t < block; ++t)
                sum += codes[d][t] = code((x[t * dim + d] - low) / std::max(step, 1e-12f), row.widths[d]);
            if (row.sums) put_sum(scales, size_t(2) * row.kept + d, sum);
        }
    }
    for (int first = 0; first < block; first += unit_tokens) {
        for (int d = 0; d < row.raw; ++d) {
            for (int t = first; t < first + unit_tokens; ++t) {
                write_raw(out, row.raw_bits, x[t * dim + d]);
                out += row.raw_bits / 8;
            }
        }
        for (int d = row.raw; d < row.kept; ++d) {
            const int width = row.widths[d];
            for (int t = first; t < first + unit_tokens; t += 8, out += width) {
                uint64_t stream = 0;
                for (int i = 0; i < 8; ++i) stream |= uint64_t(codes[d][t + i]) << (width * i);
                std::memcpy(out, &stream, width);
            }
        }
    }
}

void encode_block(const Format& fmt, const float* keys, const float* values, uint8_t* out) {
    encode(fmt.key, fmt.block, fmt.head_dim, keys, out);
    encode(fmt.value, fmt.block, fmt.head_dim, values, out + fmt.key_bytes);
}

}  // namespace kvfold
