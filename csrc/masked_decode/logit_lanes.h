// What rows of logits need of vectors beside common/simd.h: lane-wise maxima, lanes one by one, and the exact weights of
// common/fixed_math.h, which every instruction set computes with the same bits.
#pragma once

#include "common/fixed_math.h"
#include "common/float16.h"
#include "common/simd.h"

template <>
struct titok::Lanes<titok::TITOK_ISA::Floats> {
  using Int = TITOK_ISA::Ints;
  static TITOK_HD Int truncate(TITOK_ISA::Floats x) { return __builtin_convertvector(x, TITOK_ISA::Ints); }
  static TITOK_HD TITOK_ISA::Floats convert(TITOK_ISA::Words x) {
    return __builtin_convertvector(bit_cast<TITOK_ISA::Ints>(x), TITOK_ISA::Floats);
  }
  static TITOK_HD TITOK_ISA::Floats fuse(TITOK_ISA::Floats a, TITOK_ISA::Floats b, TITOK_ISA::Floats c) {
    return TITOK_ISA::fma(a, b, c);
  }
  // The instructions return their second operand where one is NaN or both are equal, as `?:` does.
  static TITOK_HD TITOK_ISA::Floats larger(TITOK_ISA::Floats a, TITOK_ISA::Floats b) {
#if defined(TITOK_ISA_AVX512)
    return (TITOK_ISA::Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(TITOK_ISA_AVX2)
    return (TITOK_ISA::Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
  }
  static TITOK_HD TITOK_ISA::Floats smaller(TITOK_ISA::Floats a, TITOK_ISA::Floats b) {
#if defined(TITOK_ISA_AVX512)
    return (TITOK_ISA::Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(TITOK_ISA_AVX2)
    return (TITOK_ISA::Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
  }
};

namespace titok::TITOK_ISA {
namespace {

TITOK_HD Floats larger(Floats a, Floats b) { return Lanes<Floats>::larger(a, b); }
TITOK_HD Floats smaller(Floats a, Floats b) { return Lanes<Floats>::smaller(a, b); }

// Bit i says whether a comparison holds in lane i.
TITOK_HD uint32_t lanes_where(Ints holds) {
#if defined(TITOK_ISA_AVX512)
  return _mm512_test_epi32_mask((__m512i)holds, (__m512i)holds);
#elif defined(TITOK_ISA_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)holds));
#else
  uint32_t lanes = 0;
  for (int i = 0; i < kLanes; ++i) lanes |= static_cast<uint32_t>(holds[i]) & (1u << i);
  return lanes;
#endif
}
constexpr uint32_t kAllLanes = (1u << kLanes) - 1;

// sortable() of every lane.
TITOK_HD Words sortable_lanes(Floats x) {
  const Words bits = bit_cast<Words>(x);
  return bits ^ (bit_cast<Words>(bit_cast<Ints>(bits) >> 31) | 0x80000000u);
}

// The lanes of a vector in memory, to be read one by one. A loop over `vector[i]` takes each lane out of the register
// with several instructions instead, which made a draw with `top_p` 4 times slower (AVX-512, GCC 12).
class LanesInMemory {
 public:
  explicit TITOK_HD LanesInMemory(Words vector) {
    write(lanes_, vector);
    asm("" : "+m"(lanes_));  // keeps GCC from returning to the register
  }
  TITOK_HD uint32_t operator[](int i) const { return lanes_[i]; }

 private:
  uint32_t lanes_[kLanes];
};

// The sum of all lanes.
TITOK_HD int64_t add_lanes(Words vector) {
  const LanesInMemory lanes(vector);
  int64_t sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lanes[i];
  return sum;
}

// Adds `values` to sums[places] in the lanes whose bit is set in `chosen`.
TITOK_HD void add_at(Words places, Words values, uint32_t chosen, int64_t* sums) {
  const LanesInMemory place(places), value(values);
  if (chosen == kAllLanes) {
    for (int i = 0; i < kLanes; ++i) sums[place[i]] += value[i];
    return;
  }
  for (; chosen != 0; chosen &= chosen - 1) {
    const int i = __builtin_ctz(chosen);
    sums[place[i]] += value[i];
  }
}

TITOK_HD Floats load_logits(const float* from) { return read<Floats>(from); }
TITOK_HD Floats load_logits(const BFloat16* from) { return widen(read<Halves>(from)); }
TITOK_HD Floats load_logits(const Float16* from) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_maskz_cvtph_ps(0xFFFF, read<__m256i>(from));
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_cvtph_ps(read<__m128i>(from));
#else
  return widen_float16<Floats>(__builtin_convertvector(read<Halves>(from), Words));
#endif
}

}  // namespace
}  // namespace titok::TITOK_ISA
