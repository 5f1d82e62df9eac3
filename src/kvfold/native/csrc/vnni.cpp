// Attention with AVX-512 VNNI and VBMI; compiled once more with products of bfloat16 where the machine has them.
#include "coded.h"
#include "raw.h"
#include "regroup.h"

namespace kvfold {
namespace {

template <int M>
void attend_rows(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    if (fmt.raw())
        attend_raw<M>(fmt, tile, runs, count, scratch);
    else
        attend_coded<M>(fmt, tile, runs, count, scratch);
}

template <int M>
void receive_rows(const Format& fmt, const Tile& tile, const Run* runs, int count, float power, float* mass, Scratch& scratch) {
    if (fmt.raw())
        receive_raw<M>(fmt, tile, runs, count, power, mass, scratch);
    else
        receive_coded<M>(fmt, tile, runs, count, power, mass, scratch);
}

void attend(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    if (fmt.regrouped)
        return each_regrouped(fmt, runs, count, scratch, [&](const Run& run) { attend(*fmt.regrouped, tile, &run, 1, scratch); });
    if (!(fmt.key.fast && fmt.value.fast)) return kAvx2.attend(fmt, tile, runs, count, scratch);
    using Attend = void (*)(const Format&, Tile&, const Run*, int, Scratch&);
    static constexpr Attend by_rows[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>, attend_rows<4>,
                                         attend_rows<5>, attend_rows<6>, attend_rows<7>, attend_rows<8>};
    by_rows[tile.rows - 1](fmt, tile, runs, count, scratch);
}

void receive(const Format& fmt, const Tile& tile, const Run* runs, int count, float power, float* mass, Scratch& scratch) {
    if (fmt.regrouped)
        return each_regrouped(fmt, runs, count, scratch, [&](const Run& run) {
            receive(*fmt.regrouped, tile, &run, 1, power, mass, scratch);
        });
    if (!(fmt.key.fast && fmt.value.fast)) return kAvx2.receive(fmt, tile, runs, count, power, mass, scratch);
    using Receive = void (*)(const Format&, const Tile&, const Run*, int, float, float*, Scratch&);
    static constexpr Receive by_rows[] = {receive_rows<1>, receive_rows<2>, receive_rows<3>, receive_rows<4>,
                                          receive_rows<5>, receive_rows<6>, receive_rows<7>, receive_rows<8>};
    by_rows[tile.rows - 1](fmt, tile, runs, count, power, mass, scratch);
}

void turn(const float* matrix, int dim, int kept, const float* x, float* out) { kAvx2.turn(matrix, dim, kept, x, out); }

void lift(const float* matrix, int dim, int kept, const float* u, float* out) { kAvx2.lift(matrix, dim, kept, u, out); }

}  // namespace

extern const Kernels KVFOLD_NAMED(k){attend, receive, turn, lift, KVFOLD_NAME, &kVnni, &kLinearVnni, headVnni};

}  // namespace kvfold
