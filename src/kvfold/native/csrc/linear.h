// Products of activations with packed weights; the structure is mirrored in kvfold.model.packed.
//
// Weights [rows][inputs] lie in blocks of 16 rows, so that one register holds the same few inputs of 16 rows:
//   16 bits: bfloat16, [rows / 16][inputs / 2][16][2];
//    8 bits: codes + 128, [rows / 16][inputs / 4][16][4], one scale for 32 inputs of a row;
//    4 bits: codes from a least number on, the same, low and high half of a byte being two consecutive fours, one scale
//            and one least number for 32 inputs.
// Scales are bfloat16, [rows / 16][groups][16], of 4 bits [rows / 16][groups][2][16] with the least numbers second. Rows and inputs are padded, to 16 and to whole groups. For coded weights
// activations are rounded to eight bits per token and group, so that products are of integers.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// out = (prologue(x) W^T + bias) + onto, row by row. x, onto: [tokens] rows with strides in numbers.
struct kvfold_linear {
    const void* x;
    int64_t x_stride, tokens;
    int64_t rows, inputs, bits;
    const uint8_t* codes;
    const uint16_t* scales;
    const float* bias;  // or null
    const void* onto;   // or null
    int64_t onto_stride;
    void* out;          // [tokens][rows], dense
    int64_t wide;       // x, onto and out are float32, not bfloat16
    int64_t norm;       // 0: none, 1: x / rms(x) * gain, 2: (x - mean) / deviation * gain + shift
    const float *gain, *shift;
    double eps;
    int64_t activation;  // of x: 0 none, 1 silu, 2 gelu, 3 gelu with tanh, 4 relu
    int64_t gated;       // x is [gate, up], and the input activation(gate) * up
    const void* kernels;
};

void kvfold_multiply(const kvfold_linear* call);
}
#pragma GCC visibility pop

namespace kvfold {

constexpr int kLinearRows = 16;  // rows of weights in a block

constexpr int kGroup = 32;  // inputs that share a scale

inline int group_of(int64_t bits) { return bits == 16 ? 2 : kGroup; }

// A call's input, made ready once. Tokens lie in tiles of `tile`, side by side for each input, the last tile being filled
// up with what nobody reads.
struct Inputs {
    int64_t width;   // inputs with their padding
    int64_t groups;
    int tile;
    float* numbers;  // [tiles][width][tile]
    int8_t* codes;   // [tiles][width / 4][tile][4]
    float* scales;   // [tiles][groups][tile]
    int32_t* sums;   // [tiles][groups][tile]; of 8 bits times -128, what the weights' codes are counted from
};

constexpr int kMaxTile = 12;  // tokens whose sums fit into registers beside one block of weights
constexpr int kPairTile = 6;  // beside two

// What a set of instructions has to offer.
struct LinearKernels {
    // Applies the prologue to one token. `row` has room for twice the padded width.
    void (*prepare)(const kvfold_linear&, const Inputs&, int64_t token, float* row);
    // Blocks of rows [block, end) for tiles [first, last).
    void (*multiply)(const kvfold_linear&, const Inputs&, int64_t block, int64_t end, int64_t first, int64_t last);
};

}  // namespace kvfold
