// Threads share the heads of all tokens.
#include "heads.h"

#include <omp.h>

#include "kernels.h"

extern "C" {

void kvfold_turn_heads(const kvfold_heads* call) {
    const kvfold_heads& c = *call;
    const auto head = static_cast<const kvfold::Kernels*>(c.kernels)->head;
    const int64_t heads = c.heads + c.kv_heads;
#pragma omp parallel for schedule(static) if (c.tokens * heads >= 24)
    for (int64_t i = 0; i < c.tokens * heads; ++i) head(c, i / heads, i % heads);
}
}
