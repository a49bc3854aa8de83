// The loops of add_layer_norm, compiled once per instruction set: passes over a row that stays in the first cache, for
// the sum and its mean, for the variance around that, and to normalise; for the gradient, which has the statistics
// computed again, two more instead of the last.
#include "add_layer_norm/add_layer_norm.h"

#include <type_traits>

#include "common/simd.h"

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

struct Statistics {
  float mean;
  float rstd;
};

template <bool kEvenOdd, class X>
inline Statistics statistics(const X* row, float row_sum, int64_t width, float eps) {
  const float mean = row_sum / static_cast<float>(width);
  const float variance = sum_squares<kEvenOdd>(row, mean, width) / static_cast<float>(width);
  return {mean, 1 / __builtin_sqrtf(variance + eps)};
}

template <class X, class Residual, class Out, class Weight>
void forward(const AddLayerNormArgs& a, int64_t begin, int64_t end, bool stream) {
  // The sum is as wide as the wider of the two.
  using Sum = std::conditional_t<(sizeof(X) > sizeof(Residual)), X, Residual>;
  constexpr bool kEvenOdd = sizeof(X) + sizeof(Residual) + sizeof(Out) + sizeof(Weight) < 16;
  const int64_t width = a.width;
  const Weight *weight = static_cast<const Weight*>(a.weight), *bias = static_cast<const Weight*>(a.bias);
  const auto finish = [&](const auto* row, float row_sum, Out* out) {
    const auto [mean, rstd] = statistics<kEvenOdd>(row, row_sum, width, a.eps);
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

// With s the standardised row and g = grad_out * weight: grad = rstd * (g - mean(g) - s * mean(g * s)) + grad_sum;
// the gradients of weight and bias are the sums over all rows of grad_out * s and grad_out.
template <class Sum, class Out, class Weight>
void backward(const AddLayerNormBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  constexpr bool kEvenOdd = sizeof(Sum) + sizeof(Out) + sizeof(Weight) < 12;
  const int64_t width = a.width, padded = add_layer_norm_padded(width);
  const Weight* weight = static_cast<const Weight*>(a.weight);
  float *d_weight = scratch, *d_bias = scratch + padded;  // in the order of the lanes
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    std::memset(scratch, 0, 2 * padded * sizeof(float));
    const int64_t first = chunk * a.chunk_rows, past = first + a.chunk_rows;
    for (int64_t row = first; row < (past < a.rows ? past : a.rows); ++row) {
      const Sum* x = static_cast<const Sum*>(a.sum) + row * width;
      const Out* grad_out = static_cast<const Out*>(a.grad_out) + row * width;
      const Statistics found = statistics<kEvenOdd>(x, sum_row<kEvenOdd>(x, width), width, a.eps);
      const Pair mean = broadcast_pair(found.mean), rstd = broadcast_pair(found.rstd);
      Pair sums = {}, products = {};
      each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {  // past the end of a row grad_out reads as 0
        const Pair standard = (access.load(x + c) - mean) * rstd, g = access.load(grad_out + c);
        store<false>(d_weight + c, fma(g, standard, load<false>(d_weight + c)));
        store<false>(d_bias + c, g + load<false>(d_bias + c));
        const Pair weighted = g * access.load(weight + c);
        sums = sums + weighted;
        products = fma(weighted, standard, products);
      });
      const float size = static_cast<float>(width);
      const Pair mean_g = broadcast_pair(sum(sums) / size), mean_gs = broadcast_pair(sum(products) / size);
      const Sum* grad_sum = a.grad_sum ? static_cast<const Sum*>(a.grad_sum) + row * width : nullptr;
      Sum* grad = static_cast<Sum*>(a.grad) + row * width;
      each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {
        const Pair standard = (access.load(x + c) - mean) * rstd;
        const Pair centred = access.load(grad_out + c) * access.load(weight + c) - mean_g - standard * mean_gs;
        const Pair other = grad_sum ? access.load(grad_sum + c) : Pair{};
        access.store(grad + c, fma(centred, rstd, other));
      });
    }
    float* partial = a.partial + chunk * 2 * width;
    each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {
      access.store(partial + c, load<false>(d_weight + c));
      access.store(partial + width + c, load<false>(d_bias + c));
    });
  }
}

// Calls visit with a value of the type.
template <class Visit>
inline void with_type(RowType type, Visit visit) {
  type == RowType::kBFloat16 ? visit(BFloat16{}) : visit(float{});
}

void choose_forward(const AddLayerNormArgs& a, int64_t begin, int64_t end, bool stream) {
  with_type(a.x_type, [&](auto x) {
    with_type(a.residual_type, [&](auto residual) {
      with_type(a.out_type, [&](auto out) {
        with_type(a.weight_type, [&](auto weight) {
          forward<decltype(x), decltype(residual), decltype(out), decltype(weight)>(a, begin, end, stream);
        });
      });
    });
  });
}

void choose_backward(const AddLayerNormBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  with_type(a.sum_type, [&](auto sum) {
    with_type(a.out_type, [&](auto out) {
      with_type(a.weight_type, [&](auto weight) {
        backward<decltype(sum), decltype(out), decltype(weight)>(a, begin, end, scratch);
      });
    });
  });
}

}  // namespace

const AddLayerNormKernels kAddLayerNorm = {choose_forward, choose_backward};

}  // namespace titok::TITOK_ISA
