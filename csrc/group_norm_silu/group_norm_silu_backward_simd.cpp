// The loops of group_norm_silu backward, compiled once per instruction set.
//
// With s = (x - mean) * rstd, z = weight * s + bias and g the gradient of z, which is
//
//   g = grad * sigmoid(z) * (1 + z * (1 - sigmoid(z))),
//
// the gradient of bias is the sum of g, that of weight is the sum of g * s, and with means over a group
//
//   grad_x = rstd * (weight * g - mean(weight * g) - s * mean(weight * g * s)) + grad_total.
//
// Two phases over an image: the sums of each channel, then grad_x, for which g is computed once more. Lanes are
// channels, and sums run over pixels in a fixed order, so every number of threads gives the same bits.
#include <omp.h>

#include "group_norm_silu/group_norm_silu.h"
#include "group_norm_silu/silu.h"

namespace titok::TITOK_ISA {
namespace {

// Pixels that are summed in float32 before the sums are added in float64.
constexpr int kRun = 16;

// What the loops read of each channel of an image. Stored as the pairs lie in registers.
//
//   s = (x - mean) * rstd      z = s * weight + bias      grad_x = g * of_slope + s * of_standardised + constant
struct Channels {
  float* mean;
  float* rstd;
  float* weight;
  float* bias;
  float* of_slope;
  float* of_standardised;
  float* constant;

  Channels(float* memory, int64_t padded)
      : mean(memory),
        rstd(memory + padded),
        weight(memory + 2 * padded),
        bias(memory + 3 * padded),
        of_slope(memory + 4 * padded),
        of_standardised(memory + 5 * padded),
        constant(memory + 6 * padded) {}
};

template <bool kEvenOdd, class Map, class Grad>
struct Image {
  const Map* x;
  const Grad* grad;
  const Map* grad_total;  // or null
  Map* grad_x;
  int64_t width;  // channels
  Channels channels;
  OnePlusExpMinus<float> denominator = {};

  // s and g of kPixels pixels from p on, of the pair from channel c on.
  template <int kPixels, class Access>
  inline void slopes(int64_t p, int64_t c, Access access, Pair (&standardised)[kPixels], Pair (&g)[kPixels]) const {
    const Pair mean = load<false>(channels.mean + c), rstd = load<false>(channels.rstd + c);
    const Pair weight = load<false>(channels.weight + c), bias = load<false>(channels.bias + c);
    Floats z[2 * kPixels], below[2 * kPixels];
    for (int i = 0; i < kPixels; ++i) {
      standardised[i] = (access.load(x + (p + i) * width + c) - mean) * rstd;
      const Pair affine = fma(standardised[i], weight, bias);
      z[2 * i] = affine.first;
      z[2 * i + 1] = affine.second;
    }
    denominator(z, below);
    const Floats one = denominator.one;
    for (int i = 0; i < 2 * kPixels; ++i) {
      const Floats sigmoid = one / below[i];
      z[i] = sigmoid * fma(z[i], one - sigmoid, one);
    }
    for (int i = 0; i < kPixels; ++i)
      g[i] = access.load(grad + (p + i) * width + c) * Pair{z[2 * i], z[2 * i + 1]};
  }

  // Adds g and g * s of kCount pixels from p on to the sums of each channel.
  template <int kCount>
  void add_run(int64_t p, double* sums, double* products) const {
    constexpr int kPixels = kCount % 2 == 0 ? 2 : 1;
    const auto add = [](double* to, Floats v) {
      write(to, read<Doubles>(to) + __builtin_convertvector(v, Doubles));
    };
    each_pair<kEvenOdd>(width, [&](int64_t c, auto access) {
      Pair sum = {}, product = {};
      for (int k = 0; k < kCount; k += kPixels) {
        Pair standardised[kPixels], g[kPixels];
        slopes(p + k, c, access, standardised, g);
        for (int i = 0; i < kPixels; ++i) {
          sum = sum + g[i];
          product = fma(g[i], standardised[i], product);
        }
      }
      add(sums + c, sum.first);
      add(sums + c + kLanes, sum.second);
      add(products + c, product.first);
      add(products + c + kLanes, product.second);
    });
  }

  void add_all(int64_t begin, int64_t end, double* sums, double* products) const {
    int64_t p = begin;
    for (; p + kRun <= end; p += kRun) add_run<kRun>(p, sums, products);
    for (; p < end; ++p) add_run<1>(p, sums, products);
  }

  template <int kPixels, class Access>
  inline void write_pixels(int64_t p, int64_t c, Access access) const {
    Pair standardised[kPixels], g[kPixels];
    slopes(p, c, access, standardised, g);
    const Pair of_slope = load<false>(channels.of_slope + c), constant = load<false>(channels.constant + c);
    const Pair of_standardised = load<false>(channels.of_standardised + c);
    for (int i = 0; i < kPixels; ++i) {
      const int64_t at = (p + i) * width + c;
      Pair result = fma(g[i], of_slope, fma(standardised[i], of_standardised, constant));
      if (grad_total) result = result + access.load(grad_total + at);
      access.store(grad_x + at, result);
    }
  }

  void write_all(int64_t begin, int64_t end) const {
    int64_t p = begin;
    for (; p + 2 <= end; p += 2)
      each_pair<kEvenOdd>(width, [&](int64_t c, auto access) { write_pixels<2>(p, c, access); });
    for (; p < end; ++p)
      each_pair<kEvenOdd>(width, [&](int64_t c, auto access) { write_pixels<1>(p, c, access); });
  }
};

template <bool kEvenOdd>
int64_t place(int64_t c) {
  return c / kPair * kPair + lane_of<kEvenOdd>(static_cast<int>(c % kPair));
}

template <bool kEvenOdd>
void read_channels(const GroupNormSiluBackwardArgs& a, int64_t image, Channels to) {
  const int64_t width = a.channels / a.groups;
  for (int64_t c = 0; c < a.channels; ++c) {
    const int64_t at = place<kEvenOdd>(c), group = image * a.groups + c / width;
    to.mean[at] = a.mean[group];
    to.rstd[at] = a.rstd[group];
    to.weight[at] = parameter(a.weight, a.parameter_dtype, c);
    to.bias[at] = parameter(a.bias, a.parameter_dtype, c);
  }
}

// Adds up the chunks of an image into the first, and derives the factors of grad_x.
template <bool kEvenOdd>
void finish_sums(const GroupNormSiluBackwardArgs& a, const GroupNormSiluPlan& plan, double* sums, Channels to) {
  const int64_t padded = plan.padded, width = a.channels / a.groups;
  for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
    const double* more = sums + chunk * 2 * padded;
#pragma omp simd
    for (int64_t c = 0; c < 2 * padded; ++c) sums[c] += more[c];
  }
  const double size = static_cast<double>(width * a.pixels);
  for (int64_t g = 0; g < a.groups; ++g) {
    double slope = 0, product = 0;  // sums over the group of weight * g and of weight * g * s
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const int64_t at = place<kEvenOdd>(c);
      slope += to.weight[at] * sums[at];
      product += to.weight[at] * sums[padded + at];
    }
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const int64_t at = place<kEvenOdd>(c);
      const double rstd = to.rstd[at];
      to.of_slope[at] = static_cast<float>(rstd * to.weight[at]);
      to.of_standardised[at] = static_cast<float>(-rstd * product / size);
      to.constant[at] = static_cast<float>(-rstd * slope / size);
    }
  }
}

template <class Map, class Grad>
void run(const GroupNormSiluBackwardArgs& a, const GroupNormSiluPlan& plan, double* scratch) {
  constexpr bool kEvenOdd = sizeof(Map) == 2 || sizeof(Grad) == 2;
  const int64_t chunk = plan.chunk, chunks = plan.chunks, padded = plan.padded;
  const auto sums_of = [&](int64_t image) { return scratch + image * plan.scratch_size; };
  const auto image_at = [&](int64_t image) {
    const int64_t at = image * a.pixels * a.channels;
    const Map* total = static_cast<const Map*>(a.grad_total);
    return Image<kEvenOdd, Map, Grad>{static_cast<const Map*>(a.x) + at,
                                      static_cast<const Grad*>(a.grad) + at,
                                      total ? total + at : nullptr,
                                      static_cast<Map*>(a.grad_x) + at,
                                      a.channels,
                                      Channels(reinterpret_cast<float*>(sums_of(image) + chunks * 2 * padded), padded)};
  };
  const auto end_of = [&](int64_t i) { return (i + 1) * chunk < a.pixels ? (i + 1) * chunk : a.pixels; };
  const auto add_chunk = [&](int64_t image, int64_t i) {
    double* sums = sums_of(image) + i * 2 * padded;
    std::memset(sums, 0, 2 * padded * sizeof(double));
    image_at(image).add_all(i * chunk, end_of(i), sums, sums + padded);
  };
  const auto write_chunk = [&](int64_t image, int64_t i) { image_at(image).write_all(i * chunk, end_of(i)); };

  // The second phase takes the chunks in reverse, so that it begins with those that the first left in the caches.
  // With enough images each thread takes whole ones, so that the phases need no barrier between them.
  if (a.batch % plan.threads == 0 || a.batch >= 4 * plan.threads) {
#pragma omp parallel for schedule(static) num_threads(plan.threads)
    for (int64_t image = 0; image < a.batch; ++image) {
      const Channels channels = image_at(image).channels;
      read_channels<kEvenOdd>(a, image, channels);
      for (int64_t i = 0; i < chunks; ++i) add_chunk(image, i);
      finish_sums<kEvenOdd>(a, plan, sums_of(image), channels);
      for (int64_t i = chunks; i-- > 0;) write_chunk(image, i);
    }
  } else {
#pragma omp parallel num_threads(plan.threads) if (chunks > 1)
    {
      const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      const int64_t begin = chunks * thread / team, end = chunks * (thread + 1) / team;
      for (int64_t image = 0; image < a.batch; ++image) {
        const Channels channels = image_at(image).channels;
#pragma omp single
        read_channels<kEvenOdd>(a, image, channels);
        for (int64_t i = begin; i < end; ++i) add_chunk(image, i);
#pragma omp barrier
#pragma omp single
        finish_sums<kEvenOdd>(a, plan, sums_of(image), channels);
        for (int64_t i = end; i-- > begin;) write_chunk(image, i);
      }
    }
  }
  for (int64_t c = 0; c < a.channels; ++c) {
    const int64_t at = place<kEvenOdd>(c);
    double bias = 0, weight = 0;
    for (int64_t image = 0; image < a.batch; ++image) {
      bias += sums_of(image)[at];
      weight += sums_of(image)[padded + at];
    }
    a.grad_bias[c] = static_cast<float>(bias);
    a.grad_weight[c] = static_cast<float>(weight);
  }
}

void run_for_dtypes(const GroupNormSiluBackwardArgs& a, const GroupNormSiluPlan& plan, double* scratch) {
  with_storage_type(a.map_dtype, [&](auto map) {
    with_storage_type(a.grad_dtype, [&](auto grad) { run<decltype(map), decltype(grad)>(a, plan, scratch); });
  });
}

}  // namespace
}  // namespace titok::TITOK_ISA

titok::GroupNormSiluBackwardKernel titok::group_norm_silu_backward_kernel(TITOK_ISA::ThisIsa) {
  return TITOK_ISA::run_for_dtypes;
}
