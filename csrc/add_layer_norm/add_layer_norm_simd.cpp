// The loops of add_layer_norm, compiled once per instruction set.
//
// A row is read several times while it stays in the first-level cache: for the sum and its mean, for the variance around
// that mean (the two-pass formula, which does not cancel), and to normalise. The backward pass computes the statistics
// again from `total` and reads the row twice more.
#include "add_layer_norm/add_layer_norm.h"

#include "common/simd.h"

namespace titok::TITOK_ISA {
namespace {

// The wider of two storage types.
template <class A, class B, bool kFirst = (sizeof(A) > sizeof(B))>
struct Wider {
  using Type = A;
};
template <class A, class B>
struct Wider<A, B, false> {
  using Type = B;
};

// total = x + residual, rounded to its type. Returns the sum of the row.
template <bool kEvenOdd, class X, class Residual, class Total>
inline float add_row(const X* x, const Residual* residual, Total* total, int64_t width) {
  Pair sums = {};
  each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {
    const Pair v = rounded<Total>(access.load(x + c) + access.load(residual + c));
    access.store(total + c, v);
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
    const Pair v = access.clear_past_end(access.load(x + c) - means);
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
  float rstd;  // 1 / sqrt(variance + eps)
};

template <bool kEvenOdd, class X>
inline Statistics statistics(const X* row, float row_sum, int64_t width, float eps) {
  const float mean = row_sum / static_cast<float>(width);
  const float variance = sum_squares<kEvenOdd>(row, mean, width) / static_cast<float>(width);
  return {mean, 1 / __builtin_sqrtf(variance + eps)};
}

template <class X, class Residual, class Out, class Weight>
void forward(const AddLayerNormArgs& a, int64_t begin, int64_t end, bool stream) {
  using Total = typename Wider<X, Residual>::Type;
  constexpr bool kEvenOdd = sizeof(X) + sizeof(Residual) + sizeof(Out) + sizeof(Weight) < 16;  // any bfloat16
  const int64_t width = a.width;
  const Weight *weight = static_cast<const Weight*>(a.weight), *bias = static_cast<const Weight*>(a.bias);
  const auto normalise = [&](const auto* row, float row_sum, Out* out) {
    const auto [mean, rstd] = statistics<kEvenOdd>(row, row_sum, width, a.eps);
    if (stream)
      normalise_row<kEvenOdd, true>(row, mean, rstd, weight, bias, out, width);
    else
      normalise_row<kEvenOdd, false>(row, mean, rstd, weight, bias, out, width);
  };
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * width;
    Out* out = static_cast<Out*>(a.normalised) + row * width;
    if (a.residual) {
      const Residual* residual = static_cast<const Residual*>(a.residual) + row * width;
      Total* total = static_cast<Total*>(a.total) + row * width;
      normalise(total, add_row<kEvenOdd>(x, residual, total, width), out);
    } else {
      normalise(x, sum_row<kEvenOdd>(x, width), out);
    }
  }
  if (stream) fence();
}

// With s = (total - mean) * rstd the standardised row and g = grad_normalised * weight:
//
//   grad = rstd * (g - mean(g) - s * mean(g * s)) + grad_total
//
// The gradients of weight and bias are the sums over all rows of grad_normalised * s and of grad_normalised.
template <class Total, class Out, class Weight>
void backward(const AddLayerNormBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  constexpr bool kEvenOdd = sizeof(Total) + sizeof(Out) + sizeof(Weight) < 12;  // any bfloat16
  const int64_t width = a.width, padded = add_layer_norm_padded(width);
  const int64_t chunk_rows = add_layer_norm_chunk_rows(a.rows);
  const Weight* weight = static_cast<const Weight*>(a.weight);
  float *d_weight = scratch, *d_bias = scratch + padded;  // stored as the pairs lie in registers
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    std::memset(scratch, 0, 2 * padded * sizeof(float));
    const int64_t first = chunk * chunk_rows, past = first + chunk_rows;
    for (int64_t row = first; row < (past < a.rows ? past : a.rows); ++row) {
      const Total* x = static_cast<const Total*>(a.total) + row * width;
      const Out* grad_out = static_cast<const Out*>(a.grad_normalised) + row * width;
      const Statistics found = statistics<kEvenOdd>(x, sum_row<kEvenOdd>(x, width), width, a.eps);
      const Pair mean = broadcast_pair(found.mean), rstd = broadcast_pair(found.rstd);
      Pair sums = {}, products = {};
      each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {  // past the end grad_out is 0, and so are all terms
        const Pair standard = (access.load(x + c) - mean) * rstd, g = access.load(grad_out + c);
        store<false>(d_weight + c, fma(g, standard, load<false>(d_weight + c)));
        store<false>(d_bias + c, g + load<false>(d_bias + c));
        const Pair weighted = g * access.load(weight + c);
        sums = sums + weighted;
        products = fma(weighted, standard, products);
      });
      const float size = static_cast<float>(width);
      const Pair mean_g = broadcast_pair(sum(sums) / size), mean_gs = broadcast_pair(sum(products) / size);
      const Total* grad_total = a.grad_total ? static_cast<const Total*>(a.grad_total) + row * width : nullptr;
      Total* grad = static_cast<Total*>(a.grad) + row * width;
      each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {
        const Pair standard = (access.load(x + c) - mean) * rstd;
        const Pair centred = access.load(grad_out + c) * access.load(weight + c) - mean_g - standard * mean_gs;
        const Pair other = grad_total ? access.load(grad_total + c) : Pair{};
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

void forward_of_dtypes(const AddLayerNormArgs& a, int64_t begin, int64_t end, bool stream) {
  with_storage_type(a.x_dtype, [&](auto x) {
    with_storage_type(a.residual_dtype, [&](auto residual) {
      with_storage_type(a.normalised_dtype, [&](auto out) {
        with_storage_type(a.weight_dtype, [&](auto weight) {
          forward<decltype(x), decltype(residual), decltype(out), decltype(weight)>(a, begin, end, stream);
        });
      });
    });
  });
}

void backward_of_dtypes(const AddLayerNormBackwardArgs& a, int64_t begin, int64_t end, float* scratch) {
  with_storage_type(a.total_dtype, [&](auto total) {
    with_storage_type(a.normalised_dtype, [&](auto out) {
      with_storage_type(a.weight_dtype, [&](auto weight) {
        backward<decltype(total), decltype(out), decltype(weight)>(a, begin, end, scratch);
      });
    });
  });
}

constexpr AddLayerNormKernels kKernels = {forward_of_dtypes, backward_of_dtypes};

}  // namespace
}  // namespace titok::TITOK_ISA

const titok::AddLayerNormKernels& titok::add_layer_norm_kernels(TITOK_ISA::ThisIsa) { return TITOK_ISA::kKernels; }
