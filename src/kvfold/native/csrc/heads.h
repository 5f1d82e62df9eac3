// Queries and keys between their projection and attention: QK norm, RoPE and a method's maps, in place.
#pragma once
#include <cstdint>

#pragma GCC visibility push(default)
extern "C" {

// qkv: [tokens] rows of H + 2 G heads, queries first. What is null is left out. Mirrored in kvfold.model.packed_heads.
struct kvfold_heads {
    void* qkv;
    int64_t stride, tokens, heads, kv_heads, dim, wide;
    const float* gain;  // of the QK norm, [H + G][d]
    double eps;
    const float *cos, *sin;  // [tokens][d], the first half of the sines negated
    const float *query_map, *key_map;  // [G][d][d], a head being a row from the left
    const float* key_shift;            // [G][d]
    const void* kernels;
};

void kvfold_turn_heads(const kvfold_heads* call);
}
#pragma GCC visibility pop

namespace kvfold {

// One head of one token.
void headPortable(const kvfold_heads& call, int64_t token, int64_t head);
void headAvx2(const kvfold_heads& call, int64_t token, int64_t head);
void headVnni(const kvfold_heads& call, int64_t token, int64_t head);

}  // namespace kvfold
