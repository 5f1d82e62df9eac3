// The calls that Python makes; every field is mirrored in library.py.
#pragma once
#include <cstdint>

#include "kernels.h"

#pragma GCC visibility push(default)
extern "C" {

// One sequence of a step: `count` new tokens at rows [first, first + count) of the batch, `length` before them.
// near, far: page ids [layers * kv_heads][columns].
struct kvfold_step {
    const int32_t *near, *far;
    int64_t near_columns, far_columns, length, first, count;
};

// One layer of a step. q: [T][H][d], k, v: [T][G][d] with strides in numbers, the last dimension being dense.
struct kvfold_layer {
    uint8_t* data;
    int64_t page_bytes, layer, kv_heads, group, dim;
    const void *q, *k, *v;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;
    void* out;   // [T][H][d] dense, dtype of q
    float* lse;  // [T][H]
    int64_t wide;  // numbers are float32, not bfloat16
    double scale;
    int64_t exact, sinks, recent, seal, ring;
    int64_t window;  // 0: none
    int64_t sunk;    // the window does not hide the sinks
    const void* near_format;
    const void* const* far_formats;  // [G]
    const kvfold_step* steps;
    int64_t count;
    const void* kernels;
};

int64_t kvfold_layer_size();
int64_t kvfold_step_size();
const void* kvfold_format(const int32_t* words);
void kvfold_attend(const kvfold_layer* call);
int64_t kvfold_format_bytes(const void* format, int64_t which);  // 0: block_bytes, 1: capacity
}
#pragma GCC visibility pop
