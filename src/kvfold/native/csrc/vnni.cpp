// Attention with AVX-512 VNNI and VBMI; compiled once more with products of bfloat16 where the machine has them.
#include "coded.h"
#include "raw.h"

namespace kvfold {
namespace {

template <int M>
void attend_rows(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    if (fmt.raw())
        attend_raw<M>(fmt, tile, runs, count, scratch);
    else
        attend_coded<M>(fmt, tile, runs, count, scratch);
}

void attend(const Format& fmt, Tile& tile, const Run* runs, int count, Scratch& scratch) {
    if (!(fmt.key.fast && fmt.value.fast)) return kAvx2.attend(fmt, tile, runs, count, scratch);
    using Attend = void (*)(const Format&, Tile&, const Run*, int, Scratch&);
    static constexpr Attend by_rows[] = {attend_rows<1>, attend_rows<2>, attend_rows<3>, attend_rows<4>,
                                         attend_rows<5>, attend_rows<6>, attend_rows<7>, attend_rows<8>};
    by_rows[tile.rows - 1](fmt, tile, runs, count, scratch);
}

}  // namespace

extern const Kernels KVFOLD_NAMED(k){attend, KVFOLD_NAME, &kVnni, &kLinearVnni, turnVnni};

}  // namespace kvfold
