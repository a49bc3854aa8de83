// Vectors of float32 for the <op>_simd.cpp files, as wide as the instruction set that the file is compiled for; maps
// and rows may be float32 or bfloat16 (rounded to nearest even).
//
// Everything lies in an unnamed namespace, and no standard header with inline code is used: code compiled for AVX-512
// must never be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>
#include <cstring>

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

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef double Doubles __attribute__((vector_size(kLanes * 8)));  // two registers

struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bits(From from) {
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

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Floats load(const BFloat16* p) {
  Halves v;
  std::memcpy(&v, p, sizeof v);
  return bits<Floats>(__builtin_convertvector(v, Words) << 16);
}

// The nearest bfloat16 in the upper half of each lane, ties to even. The addition would carry a NaN out of its range.
inline Words round_to_bfloat16(Floats v) {
  const Words word = bits<Words>(v);
  const Words rounded = word + 0x7fff + ((word >> 16) & 1);
  return (v == v ? rounded : 0x7fc00000 - Words{}) & 0xffff0000;
}

// What is left of a value once it is stored as T.
template <class T>
inline Floats rounded(Floats v) {
  if constexpr (sizeof(T) == 2) return bits<Floats>(round_to_bfloat16(v));
  return v;
}

// kStream: past the caches, for what is larger than they are; `p` must then be aligned to the vector.
template <bool kStream = false>
inline void store(float* p, Floats v) {
#if defined(TITOK_ISA_AVX512)
  if constexpr (kStream) return _mm512_stream_ps(p, (__m512)v);
#elif defined(TITOK_ISA_AVX2)
  if constexpr (kStream) return _mm256_stream_ps(p, (__m256)v);
#endif
  std::memcpy(p, &v, sizeof v);
}

template <bool kStream = false>
inline void store(BFloat16* p, Floats v) {
#if defined(TITOK_ISA_AVX512)
  const __m256i halves = _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)(round_to_bfloat16(v) >> 16));
  if constexpr (kStream) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), halves);
#elif defined(TITOK_ISA_AVX2)
  const __m256i words = (__m256i)(round_to_bfloat16(v) >> 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  const __m128i halves = _mm256_castsi256_si128(packed);
  if constexpr (kStream) return _mm_stream_si128(reinterpret_cast<__m128i*>(p), halves);
#else
  const Halves halves = __builtin_convertvector(round_to_bfloat16(v) >> 16, Halves);
#endif
  std::memcpy(p, &halves, sizeof halves);
}

// Streamed stores are not ordered with those of other threads until this.
inline void fence() {
#if defined(TITOK_ISA_AVX512) || defined(TITOK_ISA_AVX2)
  _mm_sfence();
#endif
}

// The last vector of a row: `count` lanes, the others 0.
template <class T>
inline Floats load(const T* p, int64_t count) {
  T staged[kLanes] = {};
  std::memcpy(staged, p, count * sizeof(T));
  return load(staged);
}

template <class T>
inline void store(T* p, Floats v, int64_t count) {
  T staged[kLanes];
  store(staged, v);
  std::memcpy(p, staged, count * sizeof(T));
}

// Halves are added to each other, so that the order does not depend on who calls.
inline float sum(Floats v) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  return v[0];
}

}  // namespace
}  // namespace titok::TITOK_ISA
