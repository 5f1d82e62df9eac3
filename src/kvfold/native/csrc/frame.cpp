#include "frame.h"

#include <cstring>

namespace kvfold {
namespace {

int64_t place(const kvfold_numbers& numbers, int64_t layer, int64_t head) {
    return layer * numbers.layers + head * numbers.heads;
}

// `count` numbers of a layer and head as floats, or null; those that are widened are put at `free`, which moves on.
const float* floats(const kvfold_numbers& numbers, int64_t layer, int64_t head, int count, float*& free) {
    if (!numbers.data) return nullptr;
    const int64_t at = place(numbers, layer, head);
    if (!numbers.half) return static_cast<const float*>(numbers.data) + at;
    const auto* halves = static_cast<const uint16_t*>(numbers.data) + at;
    float* out = free;
    for (int i = 0; i < count; ++i) out[i] = from_f16(halves[i]);
    free += count;
    return out;
}

}  // namespace

Frame::Frame(const kvfold_frame& frame, int64_t layer, int64_t head, int dim, int kept, std::vector<float>& buffer)
    : dim_(dim), kept_(kept), index_(nullptr) {
    buffer.resize(size_t(dim * dim + 2 * dim));
    float* free = buffer.data();
    matrix_ = floats(frame.matrix, layer, head, dim * dim, free);
    scale_ = floats(frame.scale, layer, head, kept, free);
    origin_ = floats(frame.origin, layer, head, dim, free);
    if (frame.index.data) index_ = static_cast<const int16_t*>(frame.index.data) + place(frame.index, layer, head);
}

void Frame::turn(const Kernels& kernels, const float* x, float* out) const {
    if (matrix_)
        kernels.turn(matrix_, dim_, kept_, x, out);
    else
        for (int i = 0; i < kept_; ++i) out[i] = x[index_ ? index_[i] : i];
    for (int i = 0; scale_ && i < kept_; ++i) out[i] *= scale_[i];
}

void Frame::lift(const Kernels& kernels, float* u) const {
    float stored[kMaxDim];
    for (int i = 0; i < kept_; ++i) stored[i] = scale_ ? u[i] * scale_[i] : u[i];
    if (matrix_) return kernels.lift(matrix_, dim_, kept_, stored, u);
    std::memset(u, 0, sizeof(float) * size_t(dim_));
    for (int i = 0; i < kept_; ++i) u[index_ ? index_[i] : i] = stored[i];
}

float Frame::bias(const float* query) const {
    float sum = 0;
    for (int d = 0; origin_ && d < dim_; ++d) sum += query[d] * origin_[d];
    return sum;
}

}  // namespace kvfold
