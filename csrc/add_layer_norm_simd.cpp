// The loops of add_layer_norm, compiled once per instruction set: three passes over a row that stays in the first
// cache, for the sum and its mean, for the variance around that, and to normalise.
#include "add_layer_norm.h"

#include <type_traits>

#include "simd.h"

namespace titok::TITOK_ISA {
namespace {

constexpr int kUnroll = 4;  // independent sums, to hide the latency of an addition

// Calls visit(k, c) for each whole vector of a row: channels c ... go to sum k.
template <class Visit>
inline void each(int64_t width, Visit visit) {
  int64_t c = 0;
  for (; c + kUnroll * kLanes <= width; c += kUnroll * kLanes) {
#pragma GCC unroll 4
    for (int k = 0; k < kUnroll; ++k) visit(k, c + k * kLanes);
  }
  for (; c + kLanes <= width; c += kLanes) visit(0, c);
}

inline float total(const Floats (&sums)[kUnroll]) { return sum((sums[0] + sums[1]) + (sums[2] + sums[3])); }

template <class X, class Residual, class Sum>
inline float add_row(const X* x, const Residual* residual, Sum* to, int64_t width) {
  Floats sums[kUnroll] = {};
  each(width, [&](int k, int64_t c) {
    const Floats v = rounded<Sum>(load(x + c) + load(residual + c));
    store(to + c, v);
    sums[k] += v;
  });
  if (const int64_t rest = width % kLanes, c = width - rest; rest) {
    const Floats v = rounded<Sum>(load(x + c, rest) + load(residual + c, rest));
    store(to + c, v, rest);
    sums[0] += v;
  }
  return total(sums);
}

template <class X>
inline float sum_row(const X* x, int64_t width) {
  Floats sums[kUnroll] = {};
  each(width, [&](int k, int64_t c) { sums[k] += load(x + c); });
  if (const int64_t rest = width % kLanes; rest) sums[0] += load(x + width - rest, rest);
  return total(sums);
}

template <class X>
inline float sum_squares(const X* x, float mean, int64_t width) {
  const Floats means = broadcast(mean);
  Floats sums[kUnroll] = {};
  each(width, [&](int k, int64_t c) {
    const Floats v = load(x + c) - means;
    sums[k] = fma(v, v, sums[k]);
  });
  if (const int64_t rest = width % kLanes; rest) {
    Floats v = load(x + width - rest, rest) - means;
    for (int64_t k = rest; k < kLanes; ++k) v[k] = 0;
    sums[0] = fma(v, v, sums[0]);
  }
  return total(sums);
}

template <bool kStream, class X, class Out, class Weight>
inline void normalise_row(const X* x, float mean, float rstd, const Weight* weight, const Weight* bias, Out* out,
                          int64_t width) {
  const Floats means = broadcast(mean), scales = broadcast(rstd);
  each(width, [&](int, int64_t c) {
    store<kStream>(out + c, fma((load(x + c) - means) * scales, load(weight + c), load(bias + c)));
  });
  if (const int64_t rest = width % kLanes, c = width - rest; rest) {
    store(out + c, fma((load(x + c, rest) - means) * scales, load(weight + c, rest), load(bias + c, rest)), rest);
  }
}

template <class X, class Residual, class Out, class Weight>
void run(const AddLayerNormArgs& a, int64_t begin, int64_t end, bool stream) {
  // The sum is as wide as the wider of the two.
  using Sum = std::conditional_t<(sizeof(X) > sizeof(Residual)), X, Residual>;
  const int64_t width = a.width;
  const Weight *weight = static_cast<const Weight*>(a.weight), *bias = static_cast<const Weight*>(a.bias);
  const auto finish = [&](const auto* row, float row_sum, Out* out) {
    const float mean = row_sum / static_cast<float>(width);
    const float variance = sum_squares(row, mean, width) / static_cast<float>(width);
    const float rstd = 1 / __builtin_sqrtf(variance + a.eps);
    if (stream)
      normalise_row<true>(row, mean, rstd, weight, bias, out, width);
    else
      normalise_row<false>(row, mean, rstd, weight, bias, out, width);
  };
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * width;
    Out* out = static_cast<Out*>(a.out) + row * width;
    if (a.residual) {
      Sum* sum = static_cast<Sum*>(a.sum) + row * width;
      finish(sum, add_row(x, static_cast<const Residual*>(a.residual) + row * width, sum, width), out);
    } else {
      finish(x, sum_row(x, width), out);
    }
  }
  if (stream) fence();
}

// Calls visit with a value of the type.
template <class Visit>
inline void with_type(RowType type, Visit visit) {
  type == RowType::kBFloat16 ? visit(BFloat16{}) : visit(float{});
}

}  // namespace

void add_layer_norm(const AddLayerNormArgs& a, int64_t begin, int64_t end, bool stream) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.residual_type, [&](auto residual) {
      with_type(a.out_type, [&](auto out) {
        with_type(a.weight_type, [&](auto weight) {
          run<decltype(x), decltype(residual), decltype(out), decltype(weight)>(a, begin, end, stream);
        });
      });
    });
  });
}

}  // namespace titok::TITOK_ISA
