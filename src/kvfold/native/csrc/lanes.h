// A vector register's numbers side by side, as GCC and Clang map them to what the machine has.
#pragma once
#include <cstdint>
#include <cstring>

namespace kvfold {
namespace {

#ifdef __AVX2__
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
using Lanes = float __attribute__((vector_size(4 * kLanes)));
using Words = uint32_t __attribute__((vector_size(4 * kLanes)));
using Whole = int32_t __attribute__((vector_size(4 * kLanes)));
using Halves = uint16_t __attribute__((vector_size(2 * kLanes)));
using Bytes = uint8_t __attribute__((vector_size(kLanes)));

template <class T>
inline T load(const void* data) {
    T x;
    std::memcpy(&x, data, sizeof x);
    return x;
}

inline void store(float* data, Lanes x) { std::memcpy(data, &x, sizeof x); }

inline Lanes all(float x) { return x - Lanes{}; }

// Unsigned numbers below 2^31 go as signed ones, which all machines convert.
inline Lanes numbers_of(Words x) { return __builtin_convertvector((Whole)x, Lanes); }

// IEEE's numbers of 16 bits.
inline Lanes widen_f16(const uint8_t* data) {
    const Words x = __builtin_convertvector(load<Halves>(data), Words), size = x & 0x7fff;
    const Words whole = size >= 0x7c00 ? size << 13 | 0x7f800000u : (size << 13) + (112u << 23);
    const Words found = size < 0x400 ? (Words)(numbers_of(size) * 0x1p-24f) : whole;
    return (Lanes)(found | (x & 0x8000) << 16);
}

// Uncompressed numbers of 16 or 32 bits, two vectors of them. Those of 16 bits come apart with the fewest instructions
// as the even and the odd ones.
struct Pair {
    Lanes part[2];
};

template <int Bits>
inline Pair load_pair(const uint8_t* data) {
    if constexpr (Bits == 32) return {{load<Lanes>(data), load<Lanes>(data + 4 * kLanes)}};
    const auto both = load<Words>(data);
    return {{(Lanes)(both << 16), (Lanes)(both & 0xffff0000u)}};
}

// Where number i is among them.
inline int place_of(int i, int bits) {
    constexpr int size = 2 * kLanes;
    return bits == 32 ? i : i / size * size + i % 2 * kLanes + i % size / 2;
}

// 2^x for x < 128, relative error below 3e-7; 0 below 2^-126.
inline Lanes exp2_of(Lanes x) {
    const Lanes inside = x < -126.f ? all(-126.f) : x;
    const float rounding = 12582912.f;  // 1.5 * 2^23: what is added to it loses its fraction
    const Lanes whole = (inside + rounding) - rounding, part = inside - whole;
    Lanes y = all(0.00015403530f);
    for (const float c : {0.0013333558f, 0.0096181291f, 0.0555041087f, 0.2402265070f, 0.6931471806f, 1.f}) y = y * part + c;
    const Lanes scale = (Lanes)((__builtin_convertvector(whole, Whole) + 127) << 23);
    return x < -126.f ? Lanes{} : y * scale;
}

#ifdef __clang__
#define KVFOLD_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define KVFOLD_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Whole{__VA_ARGS__})
#endif

// Lane i is the sum of x[i].
#ifdef __AVX2__
inline Lanes sums(const Lanes (&x)[kLanes]) {
    Lanes two[4], four[2];
    for (int i = 0; i < 4; ++i)
        two[i] = KVFOLD_SHUFFLE(x[2 * i], x[2 * i + 1], 0, 8, 1, 9, 4, 12, 5, 13) +
                 KVFOLD_SHUFFLE(x[2 * i], x[2 * i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    for (int i = 0; i < 2; ++i)
        four[i] = KVFOLD_SHUFFLE(two[2 * i], two[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
                  KVFOLD_SHUFFLE(two[2 * i], two[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return KVFOLD_SHUFFLE(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11) +
           KVFOLD_SHUFFLE(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#else
inline Lanes sums(const Lanes (&x)[kLanes]) {
    Lanes two[2];
    for (int i = 0; i < 2; ++i)
        two[i] = KVFOLD_SHUFFLE(x[2 * i], x[2 * i + 1], 0, 4, 1, 5) + KVFOLD_SHUFFLE(x[2 * i], x[2 * i + 1], 2, 6, 3, 7);
    return KVFOLD_SHUFFLE(two[0], two[1], 0, 1, 4, 5) + KVFOLD_SHUFFLE(two[0], two[1], 2, 3, 6, 7);
}
#endif

}  // namespace
}  // namespace kvfold
