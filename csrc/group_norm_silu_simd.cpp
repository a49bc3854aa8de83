// The loops of group_norm_silu, written for the compiler's vectorizer and compiled once per instruction set.
//
// Lanes are channels and sums run over pixels in a fixed order, so every instruction set and every number of
// threads gives the same bits. No standard header with inline code may be used here: its code, compiled for
// AVX-512, could be the copy that the linker keeps for everybody.
#include "group_norm_silu.h"

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
      run_squares += wide * wide;
    }
    sums[c] += run;
    squares[c] += run_squares;
  }
}

template <bool kAdd, typename T>
void sum_chunk(const T* x, const T* residual, T* sum, int64_t pixels, int64_t channels, double* sums) {
  double* squares = sums + channels;
  std::memset(sums, 0, 2 * channels * sizeof(double));
  int64_t p = 0;
  for (; p + kRun <= pixels; p += kRun) {
    const int64_t at = p * channels;
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

// exp by Cody and Waite's reduction and the polynomial of Cephes' expf, within 2 ulp; clamped to normal numbers.
inline float exp_clamped(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float poly = 1.9875691500e-4f;
  poly = poly * r + 1.3981999507e-3f;
  poly = poly * r + 8.3334519073e-3f;
  poly = poly * r + 4.1665795894e-2f;
  poly = poly * r + 1.6666665459e-1f;
  poly = poly * r + 5.0000001201e-1f;
  poly = poly * (r * r) + r + 1.0f;
  return bits_to_float(float_to_bits(poly) + (float_to_bits(shifted) << 23));
}

template <typename In, typename Out>
void normalise_chunk(const In* __restrict x, Out* __restrict out, int64_t pixels, int64_t channels, Affine affine) {
  const float* __restrict mean = affine.mean;
  const float* __restrict scale = affine.scale;
  const float* __restrict shift = affine.shift;
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels) {
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const float z = (widen(x[c]) - mean[c]) * scale[c] + shift[c];
      out[c] = narrow<Out>(z / (1.0f + exp_clamped(-z)));
    }
  }
}

template <typename In, typename Out>
void run(const GroupNormSiluArgs& a, double* scratch) {
  const int64_t chunk = group_norm_silu_chunk(a), chunks = group_norm_silu_chunks(a);
  float* floats = reinterpret_cast<float*>(scratch + chunks * 2 * a.channels);
  const Affine affine{floats, floats + a.channels, floats + 2 * a.channels};
#pragma omp parallel
  for (int64_t image = 0; image < a.batch; ++image) {
    const int64_t offset = image * a.pixels * a.channels;
    const In* x = static_cast<const In*>(a.x) + offset;
    const In* residual = a.residual ? static_cast<const In*>(a.residual) + offset : nullptr;
    In* sum = a.sum ? static_cast<In*>(a.sum) + offset : nullptr;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = i * chunk, count = a.pixels - first < chunk ? a.pixels - first : chunk;
      const int64_t at = first * a.channels;
      double* sums = scratch + i * 2 * a.channels;
      if (residual)
        sum_chunk<true>(x + at, residual + at, sum + at, count, a.channels, sums);
      else
        sum_chunk<false, In>(x + at, nullptr, nullptr, count, a.channels, sums);
    }
#pragma omp single
    finish_statistics(a, image, scratch, chunks, affine);
    const In* normed = residual ? sum : x;
    Out* out = static_cast<Out*>(a.out) + offset;
    // The same static schedule: each thread meets the chunks that it has in its own cache.
#pragma omp for schedule(static)
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = i * chunk, count = a.pixels - first < chunk ? a.pixels - first : chunk;
      const int64_t at = first * a.channels;
      normalise_chunk(normed + at, out + at, count, a.channels, affine);
    }
  }
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& a, double* scratch) {
  if (a.x_is_bf16)
    a.out_is_bf16 ? run<BFloat16, BFloat16>(a, scratch) : run<BFloat16, float>(a, scratch);
  else
    a.out_is_bf16 ? run<float, BFloat16>(a, scratch) : run<float, float>(a, scratch);
}

}  // namespace titok::TITOK_ISA
