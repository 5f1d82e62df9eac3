// Many calls as one.
#include <omp.h>

#include "attend.h"
#include "heads.h"
#include "linear.h"

#pragma GCC visibility push(default)
extern "C" {

struct kvfold_op {
    int64_t kind;  // 0: linear, 1: heads, 2: attention
    const void* call;
};

// seconds: null, or where the time of each kind is added up.
void kvfold_run(const kvfold_op* ops, int64_t count, double* seconds) {
    for (; count--; ++ops) {
        const double start = seconds ? omp_get_wtime() : 0;
        if (ops->kind == 0) kvfold_multiply(static_cast<const kvfold_linear*>(ops->call));
        if (ops->kind == 1) kvfold_turn_heads(static_cast<const kvfold_heads*>(ops->call));
        if (ops->kind == 2) kvfold_attend_sealed(static_cast<const kvfold_sealed*>(ops->call));
        if (seconds) seconds[ops->kind] += omp_get_wtime() - start;
    }
}
}
#pragma GCC visibility pop
