// The arithmetic of heads, compiled once for each set of instructions.
#include <cmath>

#include "heads.h"
#include "kernels.h"

namespace kvfold {
namespace {

// y = x M, four rows of M at a time, so that y is passed through fewer times.
void apply(const float* __restrict x, const float* __restrict map, int64_t d, float* __restrict y) {
    for (int64_t j = 0; j < d; ++j) y[j] = 0;
    int64_t i = 0;
    for (; i + 4 <= d; i += 4) {
        const float a = x[i], b = x[i + 1], c = x[i + 2], e = x[i + 3];
        const float* m = map + i * d;
        for (int64_t j = 0; j < d; ++j) y[j] += (a * m[j] + b * m[d + j]) + (c * m[2 * d + j] + e * m[3 * d + j]);
    }
    for (; i < d; ++i)
        for (int64_t j = 0; j < d; ++j) y[j] += x[i] * map[i * d + j];
}

}  // namespace

void KVFOLD_NAMED(head)(const kvfold_heads& c, int64_t token, int64_t head) {
    const int64_t d = c.dim, at = token * c.stride + head * d;
    const bool key = head >= c.heads;
    const int64_t group = key ? head - c.heads : head / (c.heads / c.kv_heads);
    float x[kMaxDim], y[kMaxDim];
    if (c.wide)
        for (int64_t i = 0; i < d; ++i) x[i] = static_cast<const float*>(c.qkv)[at + i];
    else
        for (int64_t i = 0; i < d; ++i) x[i] = from_bf16(static_cast<const uint16_t*>(c.qkv)[at + i]);
    if (c.gain) {
        float square = 0;
        for (int64_t i = 0; i < d; ++i) square += x[i] * x[i];
        const float factor = 1.f / std::sqrt(square / float(d) + float(c.eps));
        for (int64_t i = 0; i < d; ++i) x[i] *= factor * c.gain[head * d + i];
    }
    if (c.cos) {
        const float *cos = c.cos + token * d, *sin = c.sin + token * d;
        const int64_t half = d / 2;
        for (int64_t i = 0; i < half; ++i) y[i] = x[i] * cos[i] + x[i + half] * sin[i];
        for (int64_t i = half; i < d; ++i) y[i] = x[i] * cos[i] + x[i - half] * sin[i];
        for (int64_t i = 0; i < d; ++i) x[i] = y[i];
    }
    const float* map = key ? c.key_map : c.query_map;
    if (map) {
        apply(x, map + group * d * d, d, y);
        for (int64_t i = 0; i < d; ++i) x[i] = y[i];
    }
    if (key && c.key_shift)
        for (int64_t i = 0; i < d; ++i) x[i] += c.key_shift[group * d + i];
    if (c.wide)
        for (int64_t i = 0; i < d; ++i) static_cast<float*>(c.qkv)[at + i] = x[i];
    else
        for (int64_t i = 0; i < d; ++i) static_cast<uint16_t*>(c.qkv)[at + i] = to_bf16(x[i]);
}

}  // namespace kvfold
