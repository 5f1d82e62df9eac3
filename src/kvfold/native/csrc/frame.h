// Coordinates that coded rows are in: queries are turned into them, weighted sums of values lifted out of them.
#pragma once
#include <vector>

#include "layer.h"

namespace kvfold {

// The frame of one side of one layer and head.
class Frame {
  public:
    // kept: dimensions that are stored. Uses `buffer` for what must be widened.
    Frame(const kvfold_frame& frame, int64_t layer, int64_t head, int dim, int kept, std::vector<float>& buffer);

    // x: [d]; out: [kept].
    void turn(const Kernels& kernels, const float* x, float* out) const;
    // u: [kept], room for d; u becomes x [d], without the origin.
    void lift(const Kernels& kernels, float* u) const;
    // What u = 0 is worth to a query, in the model's coordinates.
    float bias(const float* query) const;
    // Where u = 0 lies, [d], or null.
    const float* origin() const { return origin_; }

  private:
    int dim_, kept_;
    const float *matrix_, *scale_, *origin_;
    const int16_t* index_;
};

}  // namespace kvfold
