// The arithmetic of heads, compiled once for each set of instructions.
#include <cmath>

#include "heads.h"
#include "kernels.h"

namespace kvfold {

void KVFOLD_NAMED(head)(const kvfold_heads& c, int64_t token, int64_t head) {
    const int64_t d = c.dim, at = token * c.stride + head * d;
    const bool key = head >= c.heads;
    const int64_t group = key ? head - c.heads : head / (c.heads / c.kv_heads);
    float x[kMaxDim], y[kMaxDim];
    load_numbers(c.qkv, c.wide, at, d, x);
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
        static_cast<const Kernels*>(c.kernels)->turn(map + group * d * d, int(d), int(d), x, y);
        for (int64_t i = 0; i < d; ++i) x[i] = y[i];
    }
    if (key && c.key_shift)
        for (int64_t i = 0; i < d; ++i) x[i] += c.key_shift[group * d + i];
    store_numbers(c.qkv, c.wide, at, d, x);
}

}  // namespace kvfold
