// What Python asks first: the version of the calls, the kernels for this machine, and formats as they keep them.
#include <cstring>

#include "attend.h"
#include "heads.h"
#include "linear.h"

#pragma GCC visibility push(default)
extern "C" {

int kvfold_version() { return 3; }

// Kernels by name (null: the best that the machine has); the result is null where it lacks what the name needs.
const void* kvfold_kernels(const char* name) {
    using namespace kvfold;
#ifdef KVFOLD_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool vnni = avx2 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi");
    const bool bf16 = vnni && __builtin_cpu_supports("avx512bf16");
    const struct { const Kernels& kernels; bool there; } all[] = {
        {kVnniBf16, bf16}, {kVnni, vnni}, {kAvx2, avx2}, {kPortable, true}};
#else
    const struct { const Kernels& kernels; bool there; } all[] = {{kPortable, true}};
#endif
    for (const auto& candidate : all)
        if (candidate.there && (!name || !std::strcmp(name, candidate.kernels.name))) return &candidate.kernels;
    return nullptr;
}

const char* kvfold_kernels_name(const void* kernels) { return static_cast<const kvfold::Kernels*>(kernels)->name; }

int64_t kvfold_struct_size(int64_t which) {
    static constexpr size_t sizes[] = {
        sizeof(kvfold_step),   sizeof(kvfold_layer),  sizeof(kvfold_sealed_tables), sizeof(kvfold_sealed),
        sizeof(kvfold_frame),  sizeof(kvfold_tracks), sizeof(kvfold_watch),         sizeof(kvfold_staged),
        sizeof(kvfold_linear), sizeof(kvfold_heads),
    };
    return int64_t(sizes[which]);
}

const void* kvfold_format(const int32_t* words) { return new kvfold::Format(kvfold::make_format(words)); }

int64_t kvfold_format_bytes(const void* format, int64_t which) {
    const auto& fmt = *static_cast<const kvfold::Format*>(format);
    return which ? fmt.capacity : fmt.block_bytes;
}
}
#pragma GCC visibility pop
