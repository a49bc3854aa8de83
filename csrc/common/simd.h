// Vectors of float32 for the <op>_simd.cpp files, as wide as the instruction set that the file is compiled for; maps
// and rows may be float32 or bfloat16 (rounded to nearest even).
//
// Everything lies in an unnamed namespace, and no standard header with inline code is used: code compiled for AVX-512
// must never be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"

#if defined(TITOK_ISA_AVX512) || defined(TITOK_ISA_AVX2)
#include <immintrin.h>
#endif

namespace titok::TITOK_ISA {
namespace {

#if defined(TITOK_ISA_AVX512)
constexpr int kLanes = 16;
#elif defined(TITOK_ISA_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kPair = 2 * kLanes;

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));  // two registers

template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline Floats broadcast(float value) { return value - Floats{}; }

// The build forbids the compiler to contract a * b + c, so that the fused product is asked for by name.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// kStream: past the caches, for what is larger than they are; `p` must then be aligned to the vector.
template <bool kStream, class Vector>
inline void store_bits(void* p, Vector v) {
#if defined(TITOK_ISA_AVX512)
  if constexpr (kStream) return _mm512_stream_si512(static_cast<__m512i*>(p), (__m512i)v);
#elif defined(TITOK_ISA_AVX2)
  if constexpr (kStream) return _mm256_stream_si256(static_cast<__m256i*>(p), (__m256i)v);
#endif
  std::memcpy(p, &v, sizeof v);
}

// Streamed stores are in no order with those of other threads until this.
inline void fence() {
#if defined(TITOK_ISA_AVX512) || defined(TITOK_ISA_AVX2)
  _mm_sfence();
#endif
}

// kPair neighbouring values. A register of bfloat16 falls apart into even and odd positions with one instruction each,
// into halves with several: so two orders, and loops over bfloat16 use kEvenOdd for all that they touch.
struct Pair {
  Floats first, second;
};

// Where value i of a pair lies among the lanes of `first` and then `second`.
template <bool kEvenOdd>
inline int lane_of(int i) {
  return kEvenOdd ? i % 2 * kLanes + i / 2 : i;
}

template <bool kEvenOdd>
inline Pair load(const float* p) {
  Pair v;
  std::memcpy(&v.first, p, sizeof v.first);
  std::memcpy(&v.second, p + kLanes, sizeof v.second);
  if constexpr (kEvenOdd) {
    Ints even;
    for (int k = 0; k < kLanes; ++k) even[k] = 2 * k;
    return {__builtin_shuffle(v.first, v.second, even), __builtin_shuffle(v.first, v.second, even + 1)};
  }
  return v;
}

template <bool kEvenOdd>
inline Pair load(const BFloat16* p) {
  static_assert(kEvenOdd);
  Words v;
  std::memcpy(&v, p, sizeof v);
  return {as<Floats>(v << 16), as<Floats>(v & 0xffff0000)};
}

template <bool kEvenOdd, bool kStream = false>
inline void store(float* p, Pair v) {
  if constexpr (kEvenOdd) {
    Ints low;
    for (int k = 0; k < kLanes; ++k) low[k] = k / 2 + k % 2 * kLanes;
    v = {__builtin_shuffle(v.first, v.second, low), __builtin_shuffle(v.first, v.second, low + kLanes / 2)};
  }
  store_bits<kStream>(p, v.first);
  store_bits<kStream>(p + kLanes, v.second);
}

// The nearest bfloat16 in the upper half of each lane, ties to even, and rubbish in the lower. Adding would carry a NaN
// out of its range.
inline Words nearest_bfloat16(Floats v) {
  const Words word = as<Words>(v);
  return v == v ? word + 0x7fff + ((word >> 16) & 1) : 0x7fc00000 - Words{};
}

// The upper halves of v as they are.
template <bool kEvenOdd, bool kStream = false>
inline void store_truncated(BFloat16* p, Pair v) {
  static_assert(kEvenOdd);
  store_bits<kStream>(p, as<Words>(v.first) >> 16 | (as<Words>(v.second) & 0xffff0000));
}

template <bool kEvenOdd, bool kStream = false>
inline void store(BFloat16* p, Pair v) {
  store_truncated<kEvenOdd, kStream>(p, {as<Floats>(nearest_bfloat16(v.first)), as<Floats>(nearest_bfloat16(v.second))});
}

// What is left of values that are stored as T.
template <class T>
inline Pair rounded(Pair v) {
  if constexpr (sizeof(T) == 4) return v;
  return {as<Floats>(nearest_bfloat16(v.first) & 0xffff0000), as<Floats>(nearest_bfloat16(v.second) & 0xffff0000)};
}

// How loops over the channels of a row reach them: whole pairs, and the end of a row, where lanes past it read as 0.
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
  Pair keep(Pair v) const { return v; }
};

template <bool kEvenOdd>
struct EndOfRow {
  int64_t count;
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
  // v with 0 past the end.
  Pair keep(Pair v) const {
    for (int i = static_cast<int>(count); i < kPair; ++i) {
      const int lane = lane_of<kEvenOdd>(i);
      (lane < kLanes ? v.first : v.second)[lane % kLanes] = 0;
    }
    return v;
  }
};

// Calls visit(channel, access) for each pair of a row.
template <bool kEvenOdd, bool kStream = false, class Visit>
inline void each_pair(int64_t width, Visit visit) {
  int64_t c = 0;
  for (; c + kPair <= width; c += kPair) visit(c, WholePair<kEvenOdd, kStream>{});
  if (c < width) visit(c, EndOfRow<kEvenOdd>{width - c});
}

inline Pair operator+(Pair a, Pair b) { return {a.first + b.first, a.second + b.second}; }
inline Pair operator-(Pair a, Pair b) { return {a.first - b.first, a.second - b.second}; }
inline Pair operator*(Pair a, Pair b) { return {a.first * b.first, a.second * b.second}; }
inline Pair fma(Pair a, Pair b, Pair c) { return {fma(a.first, b.first, c.first), fma(a.second, b.second, c.second)}; }

inline Pair broadcast_pair(float value) { return {broadcast(value), broadcast(value)}; }

inline float sum(Pair pair) {
  Floats v = pair.first + pair.second;
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  return v[0];
}

}  // namespace
}  // namespace titok::TITOK_ISA
