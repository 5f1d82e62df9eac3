// The arithmetic of linear layers, compiled once for each set of instructions.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels.h"
#include "linear.h"
#if defined __AVX512VNNI__
#include "linear_vnni.h"
#elif defined __AVX2__
#include "linear_avx2.h"
#include "linear_plain.h"
#else
#include "linear_portable.h"
#include "linear_plain.h"
#endif

namespace kvfold {
namespace {

constexpr int kSums = 16;

// e^x to about 2e-7 of itself, in operations that compilers vectorise.
inline float exp_of(float x) {
    x = std::min(std::max(x * 1.44269504f, -126.f), 126.f);
    const float whole = (x + 12582912.f) - 12582912.f, part = x - whole;
    float y = 1.535336188319500e-4f;
    y = y * part + 1.339887440266574e-3f;
    y = y * part + 9.618437357674640e-3f;
    y = y * part + 5.550332471162809e-2f;
    y = y * part + 2.402264791363012e-1f;
    y = y * part + 6.931472028550421e-1f;
    y = y * part + 1.f;
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return y * scale;
}

// Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline float erf_of(float x) {
    const float size = std::fabs(x), t = 1.f / (1.f + 0.3275911f * size);
    float y = 1.061405429f;
    y = y * t - 1.453152027f;
    y = y * t + 1.421413741f;
    y = y * t - 0.284496736f;
    y = y * t + 0.254829592f;
    return std::copysign(1.f - y * t * exp_of(-size * size), x);
}

inline float silu(float x) { return x / (1.f + exp_of(-x)); }
inline float gelu(float x) { return 0.5f * x * (1.f + erf_of(x * 0.70710678f)); }
inline float gelu_tanh(float x) {
    const float inner = 0.79788456f * (x + 0.044715f * x * x * x);
    return x - x / (1.f + exp_of(2 * inner));
}
inline float relu(float x) { return std::max(x, 0.f); }

template <float (*F)(float)>
void activate(float* x, const float* up, int64_t n) {
    if (up)
        for (int64_t i = 0; i < n; ++i) x[i] = F(x[i]) * up[i];
    else
        for (int64_t i = 0; i < n; ++i) x[i] = F(x[i]);
}

// Sixteen sums side by side, which is what vector units add.
template <class F>
float sum_of(int64_t n, F term) {
    float lanes[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= n; i += kSums)
        for (int j = 0; j < kSums; ++j) lanes[j] += term(i + j);
    float total = 0;
    for (; i < n; ++i) total += term(i);
    for (float lane : lanes) total += lane;
    return total;
}

void normalise(const kvfold_linear& l, float* x) {
    const int64_t n = l.inputs;
    const float mean = l.norm == 2 ? sum_of(n, [&](int64_t i) { return x[i]; }) / float(n) : 0.f;
    const float square = sum_of(n, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); }) / float(n);
    const float factor = 1.f / std::sqrt(square + float(l.eps));
    for (int64_t i = 0; i < n; ++i) x[i] = (x[i] - mean) * factor * l.gain[i];
    if (l.shift)
        for (int64_t i = 0; i < n; ++i) x[i] += l.shift[i];
}

void quantise(const kvfold_linear& l, const Inputs& in, int64_t token, const float* x) {
    constexpr int size = kGroup;
    const int factor_of_sum = l.bits == 4 ? 1 : -128, tile = in.tile;
    const int64_t at = token / tile * in.groups * tile + token % tile;
    int8_t* codes = in.codes + token / tile * in.width * tile + token % tile * 4;
    for (int64_t g = 0; g < in.groups; ++g, x += size) {
        float most[kSums] = {};
        for (int i = 0; i < size; i += kSums)
            for (int j = 0; j < kSums; ++j) most[j] = std::max(most[j], std::fabs(x[i + j]));
        float top = 0;
        for (float lane : most) top = std::max(top, lane);
        // Numbers that are not finite make the scale, and so the result, not finite either: NaN * 0 is NaN, inf * 0 too.
        float finite = 0;
        for (int i = 0; i < size; ++i) finite += x[i] * 0.f;
        const float factor = top > 1e-30f && finite == 0 ? 127.f / top : 0.f;
        int8_t own[kGroup];
        int32_t sum = 0;
        for (int i = 0; i < size; ++i) {
            const int32_t code = int32_t((x[i] * factor + 12582912.f) - 12582912.f);
            own[i] = int8_t(code);
            sum += code;
        }
        for (int i = 0; i < size; i += 4, codes += 4 * tile) std::memcpy(codes, own + i, 4);
        in.scales[at + g * tile] = top / 127.f + finite;
        in.sums[at + g * tile] = factor_of_sum * sum;
    }
}

void prepare(const kvfold_linear& l, const Inputs& in, int64_t token, float* x) {
    const int64_t n = l.gated ? 2 * l.inputs : l.inputs;
    load_numbers(l.x, l.wide, token * l.x_stride, n, x);
    if (l.norm) normalise(l, x);
    const float* up = l.gated ? x + l.inputs : nullptr;
    if (l.activation == 1) activate<silu>(x, up, l.inputs);
    if (l.activation == 2) activate<gelu>(x, up, l.inputs);
    if (l.activation == 3) activate<gelu_tanh>(x, up, l.inputs);
    if (l.activation == 4) activate<relu>(x, up, l.inputs);
    std::fill(x + l.inputs, x + in.width, 0.f);
    if (l.bits != 16) {
        quantise(l, in, token, x);
        return;
    }
    float* numbers = in.numbers + token / in.tile * in.width * in.tile + token % in.tile;
    for (int64_t i = 0; i < in.width; ++i) numbers[i * in.tile] = x[i];
}

// Results of one token for N rows.
template <class N>
void finish(const kvfold_linear& l, int64_t token, int64_t row, const float* sums, N n) {
    float y[kLinearRows];
    for (int i = 0; i < n; ++i) y[i] = sums[i];
    if (l.bias)
        for (int i = 0; i < n; ++i) y[i] += l.bias[row + i];
    if (l.onto) {
        float onto[kLinearRows];
        load_numbers(l.onto, l.wide, token * l.onto_stride + row, n, onto);
        for (int i = 0; i < n; ++i) y[i] += onto[i];
    }
    store_numbers(l.out, l.wide, token * l.rows + row, n, y);
}

template <int Bits, int Blocks, int Tokens>
void tiles(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t first, int64_t last) {
    alignas(64) float sums[Tokens][Blocks][kLinearRows];
    for (int64_t tile = first; tile < last; ++tile) {
        if constexpr (Bits == 16)
            plain_tile<Blocks, Tokens>(l, in, block, tile, sums);
        else
            coded_tile<Bits, Blocks, Tokens>(l, in, block, tile, sums);
        const int64_t token = tile * Tokens;
        for (int t = 0; t < Tokens && token + t < l.tokens; ++t)
            for (int b = 0; b < Blocks; ++b) {
                const int64_t row = (block + b) * kLinearRows;
                if (row + kLinearRows <= l.rows)
                    finish(l, token + t, row, sums[t][b], std::integral_constant<int, kLinearRows>());
                else
                    finish(l, token + t, row, sums[t][b], int(l.rows - row));
            }
    }
}

template <int Bits, int Tokens>
void blocks(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t end, int64_t first, int64_t last) {
    if constexpr (Tokens <= kPairTile)
        for (; block + 2 <= end; block += 2) tiles<Bits, 2, Tokens>(l, in, block, first, last);
    for (; block < end; ++block) tiles<Bits, 1, Tokens>(l, in, block, first, last);
}

template <int Bits, int... N>
void by_tile(std::integer_sequence<int, N...>, const kvfold_linear& l, const Inputs& in, int64_t block, int64_t end,
             int64_t first, int64_t last) {
    static constexpr decltype(&blocks<Bits, 1>) sizes[] = {blocks<Bits, N + 1>...};
    sizes[in.tile - 1](l, in, block, end, first, last);
}

void multiply(const kvfold_linear& l, const Inputs& in, int64_t block, int64_t end, int64_t first, int64_t last) {
    constexpr std::make_integer_sequence<int, kMaxTile> sizes;
    if (l.bits == 4) by_tile<4>(sizes, l, in, block, end, first, last);
    if (l.bits == 8) by_tile<8>(sizes, l, in, block, end, first, last);
    if (l.bits == 16) by_tile<16>(sizes, l, in, block, end, first, last);
}

}  // namespace

extern const LinearKernels KVFOLD_NAMED(kLinear){prepare, multiply};

}  // namespace kvfold
