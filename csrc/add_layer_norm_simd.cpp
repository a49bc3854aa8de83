// The loops of add_layer_norm, compiled once per instruction set. A row is widened once into a float scratch row and
// stays in L1 for the passes over it. Sums run over sixteen lanes, four at a time, in one order on every machine.
#include "add_layer_norm.h"

#include <omp.h>

#include <cmath>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors are passed to inlined functions only

namespace titok::TITOK_ISA {
namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

struct BFloat16 {
  uint16_t bits;
};

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
inline Floats load(const BFloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof bits);
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}
inline void store(float* to, Floats v) { std::memcpy(to, &v, sizeof v); }
inline void store(BFloat16* to, Floats v) {  // to nearest even; a NaN is made quiet, not rounded
  const Words bits = (Words)v;
  const Words rounded = v == v ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : Words{} + 0x7fc0;
  const Halves halves = __builtin_convertvector(rounded, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

// Whole vectors, then one of the `width % kLanes` values that are left, zeros beyond.
template <typename Body>
inline void for_each(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}
template <typename T>
inline Floats load(const T* from, int64_t count) {
  if (count == kLanes) return load(from);
  T some[kLanes] = {};
  std::memcpy(some, from, count * sizeof(T));
  return load(some);
}
template <typename T>
inline void store(T* to, Floats v, int64_t count) {
  if (count == kLanes) return store(to, v);
  T some[kLanes];
  store(some, v);
  std::memcpy(to, some, count * sizeof(T));
}

// Sum of term(i, count), whose lanes past `count` are zero, over a row: four chains to hide the latency of an addition.
template <typename Term>
inline float sum(int64_t width, Term term) {
  Floats chain[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
#pragma GCC unroll 4
    for (int64_t j = 0; j < 4; ++j) chain[j] += term(i + j * kLanes, kLanes);
  }
  for (int64_t j = 0; i < width; i += kLanes, ++j) chain[j] += term(i, width - i < kLanes ? width - i : kLanes);
  float lanes[kLanes];
  store(lanes, (chain[0] + chain[1]) + (chain[2] + chain[3]));
  for (int64_t half = kLanes / 2; half; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

inline Floats only(Floats v, int64_t count) {
  for (int64_t l = count; l < kLanes; ++l) v[l] = 0;
  return v;
}

// Turns the scratch row into its deviations from the mean (zeros past the width) and returns 1 / deviation.
inline float centre(float* row, int64_t width, float eps) {
  const float mean = sum(width, [&](int64_t i, int64_t) { return load(row + i); }) / static_cast<float>(width);
  for_each(width, [&](int64_t i, int64_t count) { store(row + i, only(load(row + i) - mean, count)); });
  const float squares = sum(width, [&](int64_t i, int64_t) {
    const Floats v = load(row + i);
    return v * v;
  });
  return 1.0f / std::sqrt(squares / static_cast<float>(width) + eps);
}

template <typename X, typename R, typename T, typename Y>
void forward(const AddLayerNormArgs& a, float* scratch, int64_t stride) {
#pragma omp parallel for schedule(static)
  for (int64_t m = 0; m < a.rows; ++m) {
    float* row = scratch + omp_get_thread_num() * stride;
    const X* x = static_cast<const X*>(a.x) + m * a.width;
    const R* residual = static_cast<const R*>(a.residual) + m * a.width;
    T* total = static_cast<T*>(a.total) + m * a.width;
    Y* out = static_cast<Y*>(a.normalised) + m * a.width;
    for_each(a.width, [&](int64_t i, int64_t count) {
      T rounded[kLanes];
      store(rounded, load(x + i, count) + load(residual + i, count));
      std::memcpy(total + i, rounded, count * sizeof(T));
      store(row + i, load(rounded));
    });
    const float rstd = centre(row, a.width, a.eps);
    for_each(a.width, [&](int64_t i, int64_t count) {
      const Floats y = load(row + i) * rstd * load(a.weight + i, count) + load(a.bias + i, count);
      store(out + i, y, count);
    });
  }
}

template <typename T, typename Y>
void backward(const AddLayerNormBackwardArgs& a, float* scratch, int64_t stride) {
  const int64_t per_part = (a.rows + a.parts - 1) / a.parts;
#pragma omp parallel for schedule(static)
  for (int64_t part = 0; part < a.parts; ++part) {
    float* row = scratch + omp_get_thread_num() * stride;
    float* grad_weight = a.partial + part * a.width;
    float* grad_bias = a.partial + (a.parts + part) * a.width;
    std::memset(grad_weight, 0, a.width * sizeof(float));
    std::memset(grad_bias, 0, a.width * sizeof(float));
    const int64_t end = (part + 1) * per_part < a.rows ? (part + 1) * per_part : a.rows;
    for (int64_t m = part * per_part; m < end; ++m) {
      const T* total = static_cast<const T*>(a.total) + m * a.width;
      const T* grad_total = a.grad_total ? static_cast<const T*>(a.grad_total) + m * a.width : nullptr;
      const Y* dy = static_cast<const Y*>(a.grad_normalised) + m * a.width;
      T* grad = static_cast<T*>(a.grad) + m * a.width;
      for_each(a.width, [&](int64_t i, int64_t count) { store(row + i, load(total + i, count)); });
      const float rstd = centre(row, a.width, a.eps);
      const auto scaled = [&](int64_t i, int64_t count) { return load(dy + i, count) * load(a.weight + i, count); };
      const float mean = sum(a.width, scaled) / static_cast<float>(a.width);
      const float slope =
          sum(a.width, [&](int64_t i, int64_t count) { return scaled(i, count) * load(row + i); }) * rstd * rstd /
          static_cast<float>(a.width);
      for_each(a.width, [&](int64_t i, int64_t count) {
        const Floats centred = load(row + i), g = load(dy + i, count);
        store(grad_weight + i, load(grad_weight + i, count) + g * (centred * rstd), count);
        store(grad_bias + i, load(grad_bias + i, count) + g, count);
        Floats dx = (g * load(a.weight + i, count) - mean - centred * slope) * rstd;
        if (grad_total) dx += load(grad_total + i, count);
        store(grad + i, dx, count);
      });
    }
  }
}

}  // namespace

void add_layer_norm(const AddLayerNormArgs& a, float* scratch, int64_t stride) {
  const int dtypes = a.x_is_bf16 * 4 + a.residual_is_bf16 * 2 + a.normalised_is_bf16;
  switch (dtypes) {
    case 0: return forward<float, float, float, float>(a, scratch, stride);
    case 1: return forward<float, float, float, BFloat16>(a, scratch, stride);
    case 2: return forward<float, BFloat16, float, float>(a, scratch, stride);
    case 3: return forward<float, BFloat16, float, BFloat16>(a, scratch, stride);
    case 4: return forward<BFloat16, float, float, float>(a, scratch, stride);
    case 5: return forward<BFloat16, float, float, BFloat16>(a, scratch, stride);
    case 6: return forward<BFloat16, BFloat16, BFloat16, float>(a, scratch, stride);
    default: return forward<BFloat16, BFloat16, BFloat16, BFloat16>(a, scratch, stride);
  }
}

void add_layer_norm_backward(const AddLayerNormBackwardArgs& a, float* scratch, int64_t stride) {
  if (a.total_is_bf16) {
    if (a.grad_normalised_is_bf16) return backward<BFloat16, BFloat16>(a, scratch, stride);
    return backward<BFloat16, float>(a, scratch, stride);
  }
  if (a.grad_normalised_is_bf16) return backward<float, BFloat16>(a, scratch, stride);
  return backward<float, float>(a, scratch, stride);
}

}  // namespace titok::TITOK_ISA
