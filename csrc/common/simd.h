// Vectors of float32 for the <op>_simd.cpp files, as wide as the instruction set that the file is compiled for,
// and rows of float32 or bfloat16 that are computed on in float32.
//
// Everything lies in an unnamed namespace, and the <op>_simd.cpp files use no inline code of the standard library:
// the linker must never keep a copy that was compiled for AVX-512 for all callers. Vectors are GCC's
// (vector_size), with intrinsics where GCC's operators do not reach an instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu_isa.h"
#include "common/dtype.h"
#include "common/host_device.h"

#if defined(TITOK_ISA_AVX512) || defined(TITOK_ISA_AVX2)
#include <immintrin.h>
#endif

namespace titok::TITOK_ISA {
namespace {

#if defined(TITOK_ISA_AVX512BF16)
using ThisIsa = Avx512Bf16;
constexpr int kLanes = 16;
#elif defined(TITOK_ISA_AVX512VNNI)
using ThisIsa = Avx512Vnni;
constexpr int kLanes = 16;
#elif defined(TITOK_ISA_AVX512)
using ThisIsa = Avx512;
constexpr int kLanes = 16;
#elif defined(TITOK_ISA_AVX2)
using ThisIsa = Avx2;
constexpr int kLanes = 8;
#else
using ThisIsa = Generic;
constexpr int kLanes = 4;
#endif
constexpr int kPair = 2 * kLanes;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));  // two registers

// ---- Single vectors

template <class Vector>
inline Vector read(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <class Vector>
inline void write(void* p, Vector v) {
  std::memcpy(p, &v, sizeof v);
}

inline Floats broadcast(float value) { return value - Floats{}; }

// 0, 1, 2, ...
inline Ints lane_numbers() {
  Ints lanes;
  for (int k = 0; k < kLanes; ++k) lanes[k] = k;
  return lanes;
}

// a * b + c, rounded once where the instruction set has the instruction. The build forbids the compiler to fuse on
// its own, so results depend only on where this function is called.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Folds all lanes with a commutative function, which leaves the result in every lane.
template <class Fold>
inline Floats across(Floats v, Fold fold) {
  const Ints lanes = lane_numbers();
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) v = fold(v, __builtin_shuffle(v, lanes ^ step));
  return v;
}

inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// With kStream, writes past the caches, which suits results that are larger than they are. `p` must then be
// aligned to the vector. Sanitizers do not see what such an instruction writes, so that their builds use none.
template <bool kStream, class Vector>
inline void write_streamed(void* p, Vector v) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#elif defined(TITOK_ISA_AVX512)
  if constexpr (kStream) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(TITOK_ISA_AVX2)
  if constexpr (kStream) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  write(p, v);
}

// Makes this thread's streamed writes visible before anything that it writes later.
inline void fence() {
#if defined(TITOK_ISA_AVX512) || defined(TITOK_ISA_AVX2)
  _mm_sfence();
#endif
}

// ---- bfloat16

// bfloat16 to float32, which is exact.
inline Floats widen(Halves v) { return bit_cast<Floats>(__builtin_convertvector(v, Words) << 16); }

// The nearest bfloat16 (ties to even) in the upper half of each lane; the lower half is undefined. A NaN becomes
// the default NaN, because rounding could carry it into the infinities.
inline Words nearest_bfloat16(Floats v) {
  const Words word = bit_cast<Words>(v);
  return v == v ? word + 0x7fff + ((word >> 16) & 1) : 0x7fc00000 - Words{};
}

// Calls visit with a value of the type that stores a float32 or bfloat16 tensor: float or BFloat16.
template <class Visit>
inline auto with_storage_type(DType dtype, Visit visit) {
  return dtype == DType::kBFloat16 ? visit(BFloat16{}) : visit(float{});
}

// ---- Pairs of vectors: kPair neighbouring values of a row
//
// The values lie in one of two orders. With kLanes = 4, values 0 ... 7 of a row:
//
//                    first        second
//   in order        0 1 2 3      4 5 6 7
//   kEvenOdd        0 2 4 6      1 3 5 7
//
// A vector of bfloat16 splits into even and odd values with one instruction each (a shift and a mask), into halves
// with several. A loop that touches any bfloat16 row therefore uses kEvenOdd for all its rows.
struct Pair {
  Floats first, second;
};

// The lane of value i of a pair, lanes of `second` counting on from those of `first`.
template <bool kEvenOdd>
inline int lane_of(int i) {
  return kEvenOdd ? i % 2 * kLanes + i / 2 : i;
}

template <bool kEvenOdd>
inline Pair load(const float* p) {
  const Floats first = read<Floats>(p), second = read<Floats>(p + kLanes);
  if constexpr (kEvenOdd) {
    const Ints even = 2 * lane_numbers();
    return {__builtin_shuffle(first, second, even), __builtin_shuffle(first, second, even + 1)};
  }
  return {first, second};
}

template <bool kEvenOdd>
inline Pair load(const BFloat16* p) {
  static_assert(kEvenOdd);
  const Words v = read<Words>(p);
  return {bit_cast<Floats>(v << 16), bit_cast<Floats>(v & 0xffff0000)};
}

template <bool kEvenOdd, bool kStream = false>
inline void store(float* p, Pair v) {
  if constexpr (kEvenOdd) {
    Ints low;
    for (int k = 0; k < kLanes; ++k) low[k] = k / 2 + k % 2 * kLanes;
    v = {__builtin_shuffle(v.first, v.second, low), __builtin_shuffle(v.first, v.second, low + kLanes / 2)};
  }
  write_streamed<kStream>(p, v.first);
  write_streamed<kStream>(p + kLanes, v.second);
}

// Stores the upper halves of the lanes as they are.
template <bool kEvenOdd, bool kStream = false>
inline void store_truncated(BFloat16* p, Pair v) {
  static_assert(kEvenOdd);
  write_streamed<kStream>(p, bit_cast<Words>(v.first) >> 16 | (bit_cast<Words>(v.second) & 0xffff0000));
}

template <bool kEvenOdd, bool kStream = false>
inline void store(BFloat16* p, Pair v) {
  const Pair rounded = {bit_cast<Floats>(nearest_bfloat16(v.first)), bit_cast<Floats>(nearest_bfloat16(v.second))};
  store_truncated<kEvenOdd, kStream>(p, rounded);
}

// The values after rounding to T.
template <class T>
inline Pair rounded(Pair v) {
  if constexpr (sizeof(T) == 4) return v;
  return {bit_cast<Floats>(nearest_bfloat16(v.first) & 0xffff0000),
          bit_cast<Floats>(nearest_bfloat16(v.second) & 0xffff0000)};
}

inline Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
inline Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
inline Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
inline Pair fma(Pair a, Pair b, Pair c) {
  return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)};
}

inline Pair broadcast_pair(float value) { return {broadcast(value), broadcast(value)}; }

// The sum of all values. Not computed by `across`, with whose shuffles add_layer_norm took half as long again
// (AVX2, GCC 12).
inline float sum(Pair pair) {
  Floats v = pair.first + pair.second;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  return v[0];
}

// ---- Loops over a row
//
// A loop body reads and writes through an `access`: WholePair, and for the last values of a row EndOfRow. Both
// have the same functions, so that one body serves both.

template <bool kEvenOdd, bool kStream = false>
struct WholePair {
  template <class T>
  Pair load(const T* p) const {
    return TITOK_ISA::load<kEvenOdd>(p);
  }
  template <class T>
  void store(T* p, Pair v) const {
    TITOK_ISA::store<kEvenOdd, kStream>(p, v);
  }
  void store_truncated(BFloat16* p, Pair v) const { TITOK_ISA::store_truncated<kEvenOdd, kStream>(p, v); }
  Pair clear_past_end(Pair v) const { return v; }
};

// Reads values past the end of the row as 0 and does not write them.
template <bool kEvenOdd>
struct EndOfRow {
  int64_t count;  // values up to the end of the row
  template <class T>
  Pair load(const T* p) const {
    T staged[kPair] = {};
    std::memcpy(staged, p, count * sizeof(T));
    return TITOK_ISA::load<kEvenOdd>(staged);
  }
  template <class T>
  void store(T* p, Pair v) const {
    T staged[kPair];
    TITOK_ISA::store<kEvenOdd>(staged, v);
    std::memcpy(p, staged, count * sizeof(T));
  }
  void store_truncated(BFloat16* p, Pair v) const {
    BFloat16 staged[kPair];
    TITOK_ISA::store_truncated<kEvenOdd>(staged, v);
    std::memcpy(p, staged, count * sizeof *p);
  }
  Pair clear_past_end(Pair v) const {
    for (int i = static_cast<int>(count); i < kPair; ++i) {
      const int lane = lane_of<kEvenOdd>(i);
      (lane < kLanes ? v.first : v.second)[lane % kLanes] = 0;
    }
    return v;
  }
};

// Calls visit(channel, access) for each pair of a row of `width` values.
template <bool kEvenOdd, bool kStream = false, class Visit>
inline void each_pair(int64_t width, Visit visit) {
  int64_t c = 0;
  for (; c + kPair <= width; c += kPair) visit(c, WholePair<kEvenOdd, kStream>{});
  if (c < width) visit(c, EndOfRow<kEvenOdd>{width - c});
}

}  // namespace
}  // namespace titok::TITOK_ISA
