// What both directions of group_norm_silu compute with.
#pragma once

#include "common/simd_math.h"

namespace titok::TITOK_ISA {
namespace {

inline float parameter(const void* values, DType dtype, int64_t c) {
  return dtype == DType::kBFloat16 ? bit_cast<float>(uint32_t{static_cast<const BFloat16*>(values)[c].bits} << 16)
                                   : static_cast<const float*>(values)[c];
}

// x within [-limit, limit]. Of a NaN the result is undefined.
inline Floats clamp(Floats x, Floats limit) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_maskz_range_ps(0xffff, (__m512)x, (__m512)limit, 0x2);  // least magnitude, sign of x
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_min_ps(_mm256_max_ps((__m256)x, (__m256)-limit), (__m256)limit);
#else
  x = x < limit ? x : limit;
  return x > -limit ? x : -limit;
#endif
}

// A constant in a register. GCC would read it from memory at each use, and the loop has no loads to spare.
inline Floats in_register(float value) {
  Floats v = broadcast(value);
#if defined(TITOK_ISA_AVX512)
  asm("" : "+v"(v));
#endif
  return v;
}

// 1 + exp(-z) of several vectors, for results that are stored as Out.
//
// exp(-z) = 2^n 2^f with n + f = -z log2(e) and |f| <= 1/2; n is added to the exponent field of the polynomial's
// result. Each step is done for all vectors before the next: the chain of dependent instructions of one vector is
// longer than a core looks ahead.
template <class Out>
struct OnePlusExpMinus {
  Floats limit = in_register(87.0f);  // exp(-87) is a normal number; the caller returns a NaN by computing with z, too
  Floats minus_log2e = in_register(-1.44269504f);
  Floats round = in_register(kRoundToInteger);
  Floats one = in_register(1.0f);
  Floats coefficients[Exp2<Out>::kCount];

  OnePlusExpMinus() {
    for (int i = 0; i < Exp2<Out>::kCount; ++i) coefficients[i] = in_register(Exp2<Out>::kCoefficients[i]);
  }

  template <int kCount>
  inline void operator()(const Floats (&z)[kCount], Floats (&sum)[kCount]) const {
    Floats x[kCount], shifted[kCount], fraction[kCount], power[kCount];
    for (int i = 0; i < kCount; ++i) x[i] = clamp(z[i], limit);
    for (int i = 0; i < kCount; ++i) shifted[i] = fma(x[i], minus_log2e, round);
    for (int i = 0; i < kCount; ++i) fraction[i] = fma(x[i], minus_log2e, round - shifted[i]);
    for (int i = 0; i < kCount; ++i) power[i] = fma(coefficients[0], fraction[i], coefficients[1]);
    for (int k = 2; k < Exp2<Out>::kCount; ++k) {
      for (int i = 0; i < kCount; ++i) power[i] = fma(power[i], fraction[i], coefficients[k]);
    }
    for (int i = 0; i < kCount; ++i)
      power[i] = bit_cast<Floats>(bit_cast<Words>(power[i]) + (bit_cast<Words>(shifted[i]) << 23));
    for (int i = 0; i < kCount; ++i) sum[i] = one + power[i];
  }
};

}  // namespace
}  // namespace titok::TITOK_ISA
