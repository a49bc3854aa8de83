// The loops of add_layer_norm, compiled once per instruction set: three passes over a row that stays in the first
// cache, for the sum and its mean, for the variance around that, and to normalise.
#include "add_layer_norm.h"

#include <type_traits>

#include "simd.h"

namespace titok::TITOK_ISA {
namespace {

template <bool kEvenOdd, class X, class Residual, class Sum>
inline float add_row(const X* x, const Residual* residual, Sum* to, int64_t width) {
  Pair sums = {};
  each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {
    const Pair v = rounded<Sum>(access.load(x + c) + access.load(residual + c));
    access.store(to + c, v);
    sums = sums + v;
  });
  return sum(sums);
}

template <bool kEvenOdd, class X>
inline float sum_row(const X* x, int64_t width) {
  Pair sums = {};
  each_pair<kEvenOdd>(width, [&](int64_t c, auto access) { sums = sums + access.load(x + c); });
  return sum(sums);
}

template <bool kEvenOdd, class X>
inline float sum_squares(const X* x, float mean, int64_t width) {
  const Pair means = broadcast_pair(mean);
  Pair sums = {};
  each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {
    const Pair v = access.keep(access.load(x + c) - means);
    sums = fma(v, v, sums);
  });
  return sum(sums);
}

template <bool kEvenOdd, bool kStream, class X, class Out, class Weight>
inline void normalise_row(const X* x, float mean, float rstd, const Weight* weight, const Weight* bias, Out* out,
                          int64_t width) {
  const Pair means = broadcast_pair(mean), scales = broadcast_pair(rstd);
  each_pair<kEvenOdd, kStream>(width, [&](int64_t c, auto access) {
    const Pair standard = (access.load(x + c) - means) * scales;
    access.store(out + c, fma(standard, access.load(weight + c), access.load(bias + c)));
  });
}

template <class X, class Residual, class Out, class Weight>
void run(const AddLayerNormArgs& a, int64_t begin, int64_t end, bool stream) {
  // The sum is as wide as the wider of the two.
  using Sum = std::conditional_t<(sizeof(X) > sizeof(Residual)), X, Residual>;
  constexpr bool kEvenOdd = sizeof(X) + sizeof(Residual) + sizeof(Out) + sizeof(Weight) < 16;
  const int64_t width = a.width;
  const Weight *weight = static_cast<const Weight*>(a.weight), *bias = static_cast<const Weight*>(a.bias);
  const auto finish = [&](const auto* row, float row_sum, Out* out) {
    const float mean = row_sum / static_cast<float>(width);
    const float variance = sum_squares<kEvenOdd>(row, mean, width) / static_cast<float>(width);
    const float rstd = 1 / __builtin_sqrtf(variance + a.eps);
    if (stream)
      normalise_row<kEvenOdd, true>(row, mean, rstd, weight, bias, out, width);
    else
      normalise_row<kEvenOdd, false>(row, mean, rstd, weight, bias, out, width);
  };
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * width;
    Out* out = static_cast<Out*>(a.out) + row * width;
    if (a.residual) {
      const Residual* residual = static_cast<const Residual*>(a.residual) + row * width;
      Sum* sum = static_cast<Sum*>(a.sum) + row * width;
      finish(sum, add_row<kEvenOdd>(x, residual, sum, width), out);
    } else {
      finish(x, sum_row<kEvenOdd>(x, width), out);
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
