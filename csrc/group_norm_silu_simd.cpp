// The loops of group_norm_silu, written for the compiler's vectorizer and compiled once per instruction set.
//
// Lanes are channels and sums run over pixels in a fixed order, so every instruction set and every number of
// threads gives the same bits. No standard header with inline code may be used here: its code, compiled for
// AVX-512, could be the copy that the linker keeps for everybody.
#include "group_norm_silu.h"

#include <omp.h>

#include <cmath>
#include <cstring>

namespace titok::TITOK_ISA {
namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The build forbids the compiler to contract a * b + c, so that the fused product is asked for by name.
template <typename T>
inline T fma(T a, T b, T c) {
#ifdef __FMA__
  if constexpr (sizeof(T) == 4)
    return __builtin_fmaf(a, b, c);
  else
    return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return bits_to_float(uint32_t{value.bits} << 16); }

template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {  // to nearest even; the addition would carry a NaN out of its range
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return {static_cast<uint16_t>(value == value ? rounded : 0x7fc0)};
}

// What a run of kRun pixels is summed in before it goes to float64. float32 maps need float64 throughout: a mean
// far from zero would otherwise eat the variance. The square of a bfloat16 has 16 significant bits, so float32
// adds eight of one magnitude exactly, and where magnitudes differ, the variance is no small part of the sum.
constexpr int kRun = 8;
template <typename T>
struct RunSum;
template <>
struct RunSum<float> {
  using Type = double;
};
template <>
struct RunSum<BFloat16> {
  using Type = float;
};

// Adds `kPixels` pixels to the sums and sums of squares of each channel.
template <int kPixels, bool kAdd, typename T>
inline void add_run(const T* __restrict x, const T* __restrict residual, T* __restrict sum, int64_t channels,
                    double* __restrict sums, double* __restrict squares) {
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    typename RunSum<T>::Type run = 0, run_squares = 0;
#pragma GCC unroll 8
    for (int p = 0; p < kPixels; ++p) {
      float value = widen(x[p * channels + c]);
      if constexpr (kAdd) {
        const T total = narrow<T>(value + widen(residual[p * channels + c]));
        sum[p * channels + c] = total;
        value = widen(total);
      }
      const typename RunSum<T>::Type wide = value;
      run += wide;
      run_squares = fma(wide, wide, run_squares);
    }
    sums[c] += run;
    squares[c] += run_squares;
  }
}

// kRun rows read side by side are more streams than the hardware's prefetcher follows.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

template <bool kAdd, typename T>
void sum_chunk(const T* x, const T* residual, T* sum, int64_t pixels, int64_t channels, double* sums) {
  double* squares = sums + channels;
  std::memset(sums, 0, 2 * channels * sizeof(double));
  const int64_t run_bytes = kRun * channels * static_cast<int64_t>(sizeof(T));
  int64_t p = 0;
  for (; p + kRun <= pixels; p += kRun) {
    const int64_t at = p * channels;
    prefetch(x + at + kRun * channels, run_bytes);
    if constexpr (kAdd) prefetch(residual + at + kRun * channels, run_bytes);
    add_run<kRun, kAdd>(x + at, kAdd ? residual + at : nullptr, kAdd ? sum + at : nullptr, channels, sums, squares);
  }
  for (; p < pixels; ++p) {
    const int64_t at = p * channels;
    add_run<1, kAdd>(x + at, kAdd ? residual + at : nullptr, kAdd ? sum + at : nullptr, channels, sums, squares);
  }
}

// What the second phase does to a channel: silu((x - mean) * scale + shift).
struct Affine {
  float* mean;
  float* scale;
  float* shift;
};

void finish_statistics(const GroupNormSiluArgs& a, int64_t image, double* sums, int64_t chunks, Affine affine) {
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const double* more = sums + chunk * 2 * a.channels;
#pragma omp simd
    for (int64_t c = 0; c < 2 * a.channels; ++c) sums[c] += more[c];
  }
  const int64_t width = a.channels / a.groups;
  const double size = static_cast<double>(width * a.pixels);
  for (int64_t g = 0; g < a.groups; ++g) {
    double total = 0, squares = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      total += sums[c];
      squares += sums[a.channels + c];
    }
    const double mean = total / size;
    double variance = squares / size - mean * mean;
    variance = variance < 0 ? 0 : variance;  // keeps NaN
    const double rstd = 1 / std::sqrt(variance + a.eps);
    a.mean[image * a.groups + g] = static_cast<float>(mean);
    a.rstd[image * a.groups + g] = static_cast<float>(rstd);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      affine.mean[c] = static_cast<float>(mean);
      affine.scale[c] = static_cast<float>(rstd * a.weight[c]);
      // Subtracting the float32 mean first keeps a far mean from cancelling; its rounding is made good here.
      affine.shift[c] = static_cast<float>(a.bias[c] + (affine.mean[c] - mean) * rstd * a.weight[c]);
    }
  }
}

// 2^f for |f| <= 1/2: minimax polynomials of relative error 1.5e-7 for float32 and 7.5e-5, a 26th of half a unit in
// the last place, for bfloat16.
template <typename Out>
inline float exp2_fraction(float f) {
  if constexpr (sizeof(Out) == 2) {
    const float p = fma(fma(5.517166853e-02f, f, 2.426111400e-01f), f, 6.932609677e-01f);
    return fma(p, f, 9.999280572e-01f);
  }
  float p = fma(fma(1.327647245e-03f, f, 9.675541893e-03f), f, 5.550713092e-02f);
  p = fma(fma(p, f, 2.402212024e-01f), f, 6.931469440e-01f);
  return fma(p, f, 1.000000119e+00f);
}

// z / (1 + exp(-z))
template <typename Out>
inline float silu(float z) {
  // -z, its magnitude at most 87 so that exp(-z) is a normal number. In integers, because GCC splits the loop at a
  // comparison of floats; a NaN comes back through the numerator.
  const uint32_t bits = float_to_bits(z), magnitude = bits & 0x7fffffff;
  constexpr uint32_t kLimit = 0x42ae0000;  // 87.0f
  const float x = bits_to_float((magnitude < kLimit ? magnitude : kLimit) | (~bits & 0x80000000));
  constexpr float kLog2E = 1.44269504f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = fma(x, kLog2E, kRound);
  const float power = exp2_fraction<Out>(fma(x, kLog2E, kRound - shifted));
  const float exp = bits_to_float(float_to_bits(power) + (float_to_bits(shifted) << 23));
  return z / (1.0f + exp);
}

template <typename In, typename Out>
void normalise_chunk(const In* __restrict x, Out* __restrict out, int64_t pixels, int64_t channels, Affine affine) {
  const float* __restrict mean = affine.mean;
  const float* __restrict scale = affine.scale;
  const float* __restrict shift = affine.shift;
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      out[c] = narrow<Out>(silu<Out>(fma(widen(x[c]) - mean[c], scale[c], shift[c])));
    }
  }
}

template <typename In, typename Out>
void run(const GroupNormSiluArgs& a, double* scratch, int threads) {
  const int64_t chunk = group_norm_silu_chunk(a), chunks = group_norm_silu_chunks(a);
  const int64_t scratch_size = group_norm_silu_scratch(a);
  const auto elements = [&](int64_t image, int64_t i) { return (image * a.pixels + i * chunk) * a.channels; };
  const auto size = [&](int64_t i) { return a.pixels - i * chunk < chunk ? a.pixels - i * chunk : chunk; };
  const auto affine = [&](double* own) {
    float* floats = reinterpret_cast<float*>(own + chunks * 2 * a.channels);
    return Affine{floats, floats + a.channels, floats + 2 * a.channels};
  };
  const auto sum = [&](int64_t image, int64_t i, double* own) {
    const int64_t at = elements(image, i);
    const In* x = static_cast<const In*>(a.x) + at;
    double* sums = own + i * 2 * a.channels;
    if (a.residual)
      sum_chunk<true>(x, static_cast<const In*>(a.residual) + at, static_cast<In*>(a.sum) + at, size(i), a.channels,
                      sums);
    else
      sum_chunk<false, In>(x, nullptr, nullptr, size(i), a.channels, sums);
  };
  const auto normalise = [&](int64_t image, int64_t i, double* own) {
    const int64_t at = elements(image, i);
    const In* x = static_cast<const In*>(a.residual ? a.sum : a.x) + at;
    normalise_chunk(x, static_cast<Out*>(a.out) + at, size(i), a.channels, affine(own));
  };

  if (a.batch % threads == 0 || a.batch >= 4 * threads) {  // an image to a thread: no waiting between the phases
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t image = 0; image < a.batch; ++image) {
      double* own = scratch + omp_get_thread_num() * scratch_size;
      for (int64_t i = 0; i < chunks; ++i) sum(image, i, own);
      finish_statistics(a, image, own, chunks, affine(own));
      for (int64_t i = 0; i < chunks; ++i) normalise(image, i, own);
    }
    return;
  }
#pragma omp parallel num_threads(threads) if (chunks > 1)
  for (int64_t image = 0; image < a.batch; ++image) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) sum(image, i, scratch);
#pragma omp single
    finish_statistics(a, image, scratch, chunks, affine(scratch));
    // The same static schedule: each thread meets the chunks that it has in its own cache.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) normalise(image, i, scratch);
  }
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& a, double* scratch, int threads) {
  if (a.x_is_bf16)
    a.out_is_bf16 ? run<BFloat16, BFloat16>(a, scratch, threads) : run<BFloat16, float>(a, scratch, threads);
  else
    a.out_is_bf16 ? run<float, BFloat16>(a, scratch, threads) : run<float, float>(a, scratch, threads);
}

}  // namespace titok::TITOK_ISA
