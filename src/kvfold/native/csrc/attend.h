// The calls that Python makes; every field is mirrored in kvfold.attention.cpu.calls.
#pragma once
#include <cstdint>

#include "kernels.h"

#pragma GCC visibility push(default)
extern "C" {

// One sequence of a step: `count` new tokens at rows [first, first + count) of the batch, `length` before them.
struct kvfold_step {
    int64_t length, first, count;
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
    int64_t window;  // 0: none
    const kvfold_step* steps;
    int64_t count;
    const void* kernels;
};

// Page ids [layers * kv_heads][columns] of one sequence under a CacheLayout.
struct kvfold_sealed_tables {
    const int32_t *near, *far;
    int64_t near_columns, far_columns;
};

// A layer of sequences under a CacheLayout.
struct kvfold_sealed {
    kvfold_layer layer;
    int64_t exact, sinks, recent, seal, ring;
    int64_t sunk;  // the window does not hide the sinks
    const void* near_format;
    const void* const* far_formats;     // [G]
    const kvfold_sealed_tables* tables;   // per step
};

// Numbers of all layers and heads, those of one at data + layer * layers + head * heads; null: there are none.
struct kvfold_numbers {
    const void* data;
    int64_t layers, heads;
    int64_t half;  // float16, not float32; an index is of int16
};

// Coordinates u [kept] of rows x [d]: x = matrix (scale * u) + origin, or x[index] = u. See kvfold.kv.frame.Lifting.
struct kvfold_frame {
    kvfold_numbers matrix, scale, index, origin;
};

// Tracks of one sequence under a StagedLayout. Heads are counted over all layers.
struct kvfold_tracks {
    const int32_t* pages;   // [tracks][heads][columns]
    const int64_t* rows;    // [tracks][heads] before this step
    int64_t columns;
    const kvfold_frame* frames;  // [coded tracks][2], of keys and of values; a matrix, scale or index makes a frame
};

// What keys of one sequence received from some of the new queries is added to `mass`, the attention weight to the power.
struct kvfold_watch {
    int64_t step, power;
    const int64_t* queries;  // among the step's
    int64_t count;
    float* const* mass;      // [tracks], each [heads][widths[track]]
    const int64_t* widths;
};

// A layer of sequences under a StagedLayout.
struct kvfold_staged {
    kvfold_layer layer;
    int64_t heads, tracks;            // heads: over all layers
    const void* const* formats;       // [tracks][G]
    const kvfold_tracks* tables;      // per step
    const kvfold_watch* watches;
    int64_t watched;
};

int64_t kvfold_struct_size(int64_t which);  // in the order of calls.STRUCTURES, then linear and heads
const void* kvfold_format(const int32_t* words);
int64_t kvfold_format_bytes(const void* format, int64_t which);  // 0: block_bytes, 1: capacity
void kvfold_attend_sealed(const kvfold_sealed* call);
void kvfold_attend_staged(const kvfold_staged* call);
}
#pragma GCC visibility pop
