// The loops of group_norm_silu, compiled once per instruction set.
//
// Two phases over an image: sums and sums of squares of each channel, then SiLU((x - mean) * scale + shift). Lanes
// are channels, and sums run over pixels in a fixed order, so every number of threads gives the same bits, and so
// do AVX2 and AVX-512.
#include <omp.h>

#include "group_norm_silu/group_norm_silu.h"
#include "group_norm_silu/silu.h"

namespace titok::TITOK_ISA {
namespace {

// Pixels that are summed in float32 before the sums are added in float64. The float32 sums are of differences from
// the run's first pixel, because a mean far from zero would otherwise cancel the variance. Relative to the run's
// own variance the rounding error is at most kRun + 1 units whatever that first pixel is: n (first - mean)^2 is at
// most n times the sum of (x - mean)^2.
constexpr int kRun = 16;

// Sums over pixels for each channel, stored as the pairs lie in registers.
struct ChannelSums {
  double* sums;     // of the values
  double* squares;  // of their squares

  // Adds `count` values of each lane: `origin`, and others of whose differences from `origin` the sums are given.
  void add(int64_t c, Floats origin, Floats differences, Floats squared_differences, int count) const {
    const Doubles first = __builtin_convertvector(origin, Doubles);
    const Doubles difference = __builtin_convertvector(differences, Doubles);
    const Doubles total = difference + static_cast<double>(count) * first;
    const Doubles square = __builtin_convertvector(squared_differences, Doubles) + first * (difference + total);
    write(sums + c, read<Doubles>(sums + c) + total);
    write(squares + c, read<Doubles>(squares + c) + square);
  }
};

// The first phase reads a run's pixels side by side, which are more streams than the hardware prefetcher follows.
// Prefetches go into the second-level cache only, because the pixels in between may fill the first.
constexpr int kPixelsAhead = 2 * kRun;
template <class T>
inline void prefetch_pair(const T* from) {
  for (int i = 0; i < kPair * static_cast<int>(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + i, 0, 2);
}

// The values that are normalised: x, or with kAdd x + residual, which is then stored in `total`.
template <bool kEvenOdd, bool kAdd, bool kStream, class T>
struct Source {
  const T* x;
  const T* residual;
  T* total;
  int64_t channels;

  // The pair at pixel p from channel c on.
  template <class Access>
  Pair operator()(int64_t p, int64_t c, Access access) const {
    const int64_t at = p * channels + c;
    if constexpr (!kAdd) return access.load(x + at);
    const Pair v = access.load(x + at) + access.load(residual + at);
    access.store(total + at, v);
    return rounded<T>(v);
  }

  // Adds kCount pixels from p on.
  template <int kCount>
  void add_run(int64_t p, ChannelSums to) const {
    each_pair<kEvenOdd, kStream>(channels, [&](int64_t c, auto access) {
      for (int k = kPixelsAhead; k < kPixelsAhead + kCount; ++k) {
        prefetch_pair(x + (p + k) * channels + c);
        if constexpr (kAdd) prefetch_pair(residual + (p + k) * channels + c);
      }
      const Pair origin = (*this)(p, c, access);
      Pair sums = {}, squares = {};
#pragma GCC unroll 16
      for (int k = 1; k < kCount; ++k) {
        const Pair v = (*this)(p + k, c, access) - origin;
        sums = sums + v;
        squares = fma(v, v, squares);
      }
      to.add(c, origin.first, sums.first, squares.first, kCount);
      to.add(c + kLanes, origin.second, sums.second, squares.second, kCount);
    });
  }

  void add_all(int64_t pixels, ChannelSums to) const {
    int64_t p = 0;
    for (; p + kRun <= pixels; p += kRun) add_run<kRun>(p, to);
    for (; p < pixels; ++p) add_run<1>(p, to);
  }
};

// The second phase computes SiLU((x - mean) * scale + shift) for each channel. Stored as the pairs lie in
// registers.
struct Affine {
  float* mean;
  float* scale;
  float* shift;

  Affine from(int64_t c) const { return {mean + c, scale + c, shift + c}; }
};

// To float32, any NaN becoming the default one: half_unit_up relies on it.
inline float quiet(double value) { return value == value ? static_cast<float>(value) : __builtin_nanf(""); }

// Adds up the chunks of an image into the first, and derives the statistics of each group and the affine map.
template <bool kEvenOdd>
void finish_statistics(const GroupNormSiluArgs& a, const GroupNormSiluPlan& plan, int64_t image, double* sums,
                       Affine affine) {
  const int64_t padded = plan.padded;
  for (int64_t chunk = 1; chunk < plan.chunks; ++chunk) {
    const double* more = sums + chunk * 2 * padded;
#pragma omp simd
    for (int64_t c = 0; c < 2 * padded; ++c) sums[c] += more[c];
  }
  const auto place = [](int64_t c) { return c / kPair * kPair + lane_of<kEvenOdd>(static_cast<int>(c % kPair)); };
  const int64_t width = a.channels / a.groups;
  const double size = static_cast<double>(width * a.pixels);
  for (int64_t g = 0; g < a.groups; ++g) {
    double total = 0, squares = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      total += sums[place(c)];
      squares += sums[padded + place(c)];
    }
    const double mean = total / size;
    double variance = squares / size - mean * mean;
    variance = variance < 0 ? 0 : variance;  // a NaN stays
    const double rstd = 1 / __builtin_sqrt(variance + a.eps);
    if (a.mean) a.mean[image * a.groups + g] = static_cast<float>(mean);
    if (a.rstd) a.rstd[image * a.groups + g] = static_cast<float>(rstd);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const int64_t at = place(c);
      const double scale = rstd * parameter(a.weight, a.parameter_dtype, c);
      affine.mean[at] = quiet(mean);
      affine.scale[at] = quiet(scale);
      // The second phase subtracts the mean as a float32 before it scales, so that a mean far from zero does not
      // cancel the result. The shift makes up for the rounding of that mean.
      const double shift = parameter(a.bias, a.parameter_dtype, c) + (affine.mean[at] - mean) * scale;
      affine.shift[at] = quiet(shift);
    }
  }
}

// z / (1 + exp(-z)) for results that are stored as Out.
template <class Out>
struct Silu {
  OnePlusExpMinus<Out> denominator;

  template <int kCount>
  inline void operator()(Floats (&z)[kCount]) const {
    Floats below[kCount];
    denominator(z, below);
    for (int i = 0; i < kCount; ++i) z[i] /= below[i];
  }
};

// Rounds to the nearest bfloat16 once the lower half is cut off, ties away from zero. Ties to even would take
// longer and be no better, because SiLU is rounded before. A NaN of all ones would overflow; quiet() parameters
// and bfloat16 maps give none.
inline Floats half_unit_up(Floats v) { return bit_cast<Floats>(bit_cast<Words>(v) + 0x8000); }

// The second phase for kPairs neighbouring pairs of one pixel.
template <int kPairs, class Access, class In, class Out>
inline void normalise_pairs(const Access& access, const In* x, Out* out, Affine affine, const Silu<Out>& silu) {
  Floats z[2 * kPairs];
  for (int i = 0; i < kPairs; ++i) {
    const int at = i * kPair;
    const Pair centred = access.load(x + at) - load<false>(affine.mean + at);
    const Pair v = fma(centred, load<false>(affine.scale + at), load<false>(affine.shift + at));
    z[2 * i] = v.first;
    z[2 * i + 1] = v.second;
  }
  silu(z);
  for (int i = 0; i < kPairs; ++i) {
    const Pair y = {z[2 * i], z[2 * i + 1]};
    if constexpr (sizeof(In) == 2 && sizeof(Out) == 2)
      access.store_truncated(out + i * kPair, {half_unit_up(y.first), half_unit_up(y.second)});
    else
      access.store(out + i * kPair, y);
  }
}

template <bool kEvenOdd, bool kStream, class In, class Out>
void normalise_chunk(const In* x, Out* out, int64_t pixels, int64_t channels, Affine affine) {
  constexpr int kPairs = 2;
  const Silu<Out> silu;
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels) {
    int64_t c = 0;
    for (; c + kPairs * kPair <= channels; c += kPairs * kPair)
      normalise_pairs<kPairs>(WholePair<kEvenOdd, kStream>{}, x + c, out + c, affine.from(c), silu);
    each_pair<kEvenOdd, kStream>(channels - c, [&](int64_t more, auto access) {
      normalise_pairs<1>(access, x + c + more, out + c + more, affine.from(c + more), silu);
    });
  }
}

template <class In, class Out, bool kStream>
void run(const GroupNormSiluArgs& a, const GroupNormSiluPlan& plan, double* scratch) {
  constexpr bool kEvenOdd = sizeof(In) == 2 || sizeof(Out) == 2;
  const int64_t chunk = plan.chunk, chunks = plan.chunks, padded = plan.padded;
  const int threads = plan.threads;
  const auto first_element = [&](int64_t image, int64_t i) { return (image * a.pixels + i * chunk) * a.channels; };
  const auto pixels_of = [&](int64_t i) { return a.pixels - i * chunk < chunk ? a.pixels - i * chunk : chunk; };
  const auto affine_in = [&](double* memory) {
    float* floats = reinterpret_cast<float*>(memory + chunks * 2 * padded);
    return Affine{floats, floats + padded, floats + 2 * padded};
  };
  const auto sum_chunk = [&](int64_t image, int64_t i, double* memory) {
    const int64_t at = first_element(image, i);
    const ChannelSums to = {memory + i * 2 * padded, memory + (i * 2 + 1) * padded};
    std::memset(to.sums, 0, 2 * padded * sizeof(double));
    const In* x = static_cast<const In*>(a.x) + at;
    if (a.residual) {
      const In* residual = static_cast<const In*>(a.residual) + at;
      In* total = static_cast<In*>(a.total) + at;
      Source<kEvenOdd, true, kStream, In>{x, residual, total, a.channels}.add_all(pixels_of(i), to);
    } else {
      Source<kEvenOdd, false, kStream, In>{x, nullptr, nullptr, a.channels}.add_all(pixels_of(i), to);
    }
  };
  const auto normalise = [&](int64_t image, int64_t i, double* memory) {
    const int64_t at = first_element(image, i);
    const In* x = static_cast<const In*>(a.residual ? a.total : a.x) + at;
    Out* out = static_cast<Out*>(a.normalised) + at;
    normalise_chunk<kEvenOdd, kStream>(x, out, pixels_of(i), a.channels, affine_in(memory));
  };

  // The second phase takes the chunks in reverse, so that it begins with those that the first left in the caches.
  // With enough images each thread takes whole ones, so that the phases need no barrier between them.
  if (a.batch % threads == 0 || a.batch >= 4 * threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t image = 0; image < a.batch; ++image) {
      double* own = scratch + omp_get_thread_num() * plan.scratch_size;
      for (int64_t i = 0; i < chunks; ++i) sum_chunk(image, i, own);
      finish_statistics<kEvenOdd>(a, plan, image, own, affine_in(own));
      for (int64_t i = chunks; i-- > 0;) normalise(image, i, own);
      if (kStream) fence();
    }
    return;
  }
#pragma omp parallel num_threads(threads) if (chunks > 1)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    const int64_t begin = chunks * thread / team, end = chunks * (thread + 1) / team;
    for (int64_t image = 0; image < a.batch; ++image) {
      for (int64_t i = begin; i < end; ++i) sum_chunk(image, i, scratch);
#pragma omp barrier
#pragma omp single
      finish_statistics<kEvenOdd>(a, plan, image, scratch, affine_in(scratch));
      for (int64_t i = end; i-- > begin;) normalise(image, i, scratch);
    }
    if (kStream) fence();
  }
}

void run_for_dtypes(const GroupNormSiluArgs& a, const GroupNormSiluPlan& plan, double* scratch) {
  with_storage_type(a.map_dtype, [&](auto in) {
    with_storage_type(a.normalised_dtype, [&](auto out) {
      if (plan.stream)
        run<decltype(in), decltype(out), true>(a, plan, scratch);
      else
        run<decltype(in), decltype(out), false>(a, plan, scratch);
    });
  });
}

}  // namespace
}  // namespace titok::TITOK_ISA

titok::GroupNormSiluKernel titok::group_norm_silu_kernel(TITOK_ISA::ThisIsa) { return TITOK_ISA::run_for_dtypes; }
