// Codes of a unit as numbers.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "lanes.h"

namespace kvfold {
namespace {

// A side of a unit, token by token for each dimension.
using Numbers = float[kMaxDim][kUnit];

constexpr int kParts = kUnit / kLanes;

// What the numbers of a dimension are multiplied with and what is added.
struct Affine {
    Lanes factor[kParts], offset[kParts];
};

// Where the codes of a dimension's vectors lie. A window of 32 bits holds four of any width, of the narrow ones as many as
// there are lanes.
template <int Width>
struct Places {
    static constexpr int kHeld = Width <= 4 ? kLanes : 4;
    uint32_t window[kParts][kLanes / kHeld];  // first bytes
    uint32_t shift[kParts][kLanes];           // bits of the window before a lane's code
    int32_t second[kLanes];                   // whether it is in the second window

    constexpr Places() : window(), shift(), second() {
        for (int i = 0; i < kUnit; ++i) {
            const int first = i / kHeld * kHeld * Width;  // maybe in the middle of a byte
            window[i / kLanes][i % kLanes / kHeld] = first / 8;
            shift[i / kLanes][i % kLanes] = first % 8 + i % kHeld * Width;
            second[i % kLanes] = -(i % kLanes / kHeld);
        }
    }
};

// A vector of the codes of a dimension, or of uncompressed numbers. The width is known when it is compiled, so that one
// shift moves all of them.
template <int Width>
inline Lanes load_codes(const uint8_t* data, int part) {
    if constexpr (Width == 32) {
        return load<Lanes>(data + 4 * kLanes * part);
    } else if constexpr (Width == 16) {
        return (Lanes)(__builtin_convertvector(load<Halves>(data + 2 * kLanes * part), Words) << 16);
    } else {
        static constexpr Places<Width> places;
        Words bits = load<uint32_t>(data + places.window[part][0]) | Words{};
        if constexpr (places.kHeld < kLanes)
            bits = load<Whole>(places.second) ? load<uint32_t>(data + places.window[part][1]) | Words{} : bits;
        return numbers_of(bits >> load<Words>(places.shift[part]) & ((1u << Width) - 1));
    }
}

// Scales of a unit, made ready for all of its dimensions.
struct Scales {
    const Row& row;
    const uint8_t* data;  // of the block
    int block, first;     // tokens of the block, and those before the unit
    Lanes steps[kParts];
    float channels[2][kMaxDim];

    Scales(const Row& r, const uint8_t* scales, int tokens, int before) : row(r), data(scales), block(tokens), first(before) {
        if (row.scale == Scale::Step)
            for (int part = 0; part < kParts; ++part) {
                const Words bytes = __builtin_convertvector(load<Bytes>(data + first + kLanes * part), Words);
                steps[part] = exp2_of((numbers_of(bytes) - 128.f) / float(kStepsPerOctave));
            }
        if (row.scale == Scale::Channel)
            for (int side = 0; side < 2; ++side)
                for (int d = 0; d < row.kept; d += kLanes) store(channels[side] + d, widen_f16(data + 2 * (side * row.kept + d)));
    }

    // What dimension `d` has, and all others of its part unless scales are by channel.
    Affine of(int d) const {
        const uint8_t* low = data + 2 * (d / (row.kept / row.groups) * block + first);
        const uint8_t* step = low + 2 * row.groups * block;
        Affine found;
        for (int part = 0; part < kParts; ++part) {
            found.factor[part] = all(1);
            found.offset[part] = all(-row.centre[d]);
            if (row.scale == Scale::Step) {
                found.factor[part] = steps[part];
                found.offset[part] *= steps[part];
            }
            if (row.scale == Scale::Token) {
                found.factor[part] = widen_f16(step + 2 * kLanes * part);
                found.offset[part] = widen_f16(low + 2 * kLanes * part);
            }
        }
        return found;
    }
    Affine of_channel(int d) const {
        Affine found;
        std::fill_n(found.factor, kParts, all(channels[1][d]));
        std::fill_n(found.offset, kParts, all(channels[0][d]));
        return found;
    }
};

// Dimensions [d, end), which have one width, from their codes on.
template <int Width, bool Channels>
void unpack(const uint8_t* data, const Scales& scales, int d, int end, Numbers& out) {
    Affine by = scales.of(d);
    for (; d < end; ++d, data += Width * scales.row.unit / 8) {
        if constexpr (Channels) by = scales.of_channel(d);
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part)
            store(out[d] + kLanes * part, load_codes<Width>(data, part) * by.factor[part] + by.offset[part]);
    }
}

template <bool Channels>
auto unpack_of(int width) {
    switch (width) {
        case 1: return unpack<1, Channels>;
        case 2: return unpack<2, Channels>;
        case 3: return unpack<3, Channels>;
        case 4: return unpack<4, Channels>;
        case 5: return unpack<5, Channels>;
        case 6: return unpack<6, Channels>;
        case 7: return unpack<7, Channels>;
        case 8: return unpack<8, Channels>;
        case 16: return unpack<16, Channels>;
        default: return unpack<32, Channels>;
    }
}

// A unit of a block. Of a smaller block, what lies behind its tokens is not theirs.
inline void decode(const Row& row, int block, const uint8_t* data, int unit, Numbers& out) {
    const Scales scales(row, data + row.scales, block, unit * row.unit);
    const uint8_t* codes = data + unit * row.unit_bytes;
    for (size_t part = 0; part + 1 < row.parts.size(); ++part) {
        const int d = row.parts[part];
        const auto unpack = (row.scale == Scale::Channel ? unpack_of<true> : unpack_of<false>)(row.widths[d]);
        unpack(codes + row.offsets[d], scales, d, row.parts[part + 1], out);
    }
}

}  // namespace
}  // namespace kvfold
