// The loops of group_norm_silu, compiled once per instruction set.
//
// Lanes are channels and sums run over pixels in a fixed order, so every number of threads gives the same bits, and so
// do AVX2 and AVX-512.
#include "group_norm_silu.h"

#include <omp.h>

#include <cmath>

#include "simd.h"

namespace titok::TITOK_ISA {
namespace {

// Pixels that are summed in float32, as differences from the first of them: a mean far from zero would eat the
// variance otherwise. Against the run's own variance the rounding error is at most kRun + 1 units, whatever the first
// pixel is, because n (first - mean)^2 is at most n times the sum of all (x - mean)^2. Runs are added in float64.
constexpr int kRun = 16;

// Sums and sums of squares of each channel, in the order of the lanes.
struct ChannelSums {
  double* sums;
  double* squares;

  // Adds `count` values of each lane: origin, and others whose differences from it have these sums.
  void add(int64_t c, Floats origin, Floats differences, Floats squared_differences, int count) const {
    const Doubles first = __builtin_convertvector(origin, Doubles);
    const Doubles difference = __builtin_convertvector(differences, Doubles);
    const Doubles total = difference + static_cast<double>(count) * first;
    const Doubles square = __builtin_convertvector(squared_differences, Doubles) + first * (difference + total);
    accumulate(sums + c, total);
    accumulate(squares + c, square);
  }

  static void accumulate(double* to, Doubles more) {
    Doubles v;
    std::memcpy(&v, to, sizeof v);
    v += more;
    std::memcpy(to, &v, sizeof v);
  }
};

// Rows read side by side are more streams than the hardware's prefetcher follows.
inline void prefetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
}

template <bool kEvenOdd, bool kAdd, bool kStream, class T>
struct Source {
  const T* x;
  const T* residual;
  T* sum;
  int64_t channels;

  // The value at pixel p from channel c on; with a residual, the sum, which is stored.
  template <class Access>
  Pair operator()(int64_t p, int64_t c, Access access) const {
    const int64_t at = p * channels + c;
    if constexpr (!kAdd) return access.load(x + at);
    const Pair total = access.load(x + at) + access.load(residual + at);
    access.store(sum + at, total);
    return rounded<T>(total);
  }

  // kCount pixels from p on.
  template <int kCount>
  void add_run(int64_t p, ChannelSums to) const {
    each_pair<kEvenOdd, kStream>(channels, [&](int64_t c, auto access) {
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
    for (; p + kRun <= pixels; p += kRun) {
      const int64_t next = (p + kRun) * channels, bytes = kRun * channels * static_cast<int64_t>(sizeof(T));
      prefetch(x + next, bytes);
      if constexpr (kAdd) prefetch(residual + next, bytes);
      add_run<kRun>(p, to);
    }
    for (; p < pixels; ++p) add_run<1>(p, to);
  }
};

// What the second phase does to a channel: silu((x - mean) * scale + shift). In the order of the lanes.
struct Affine {
  float* mean;
  float* scale;
  float* shift;
};

inline float parameter(const void* values, bool is_bf16, int64_t c) {
  return is_bf16 ? as<float>(uint32_t{static_cast<const BFloat16*>(values)[c].bits} << 16)
                 : static_cast<const float*>(values)[c];
}

template <bool kEvenOdd>
void finish_statistics(const GroupNormSiluArgs& a, int64_t image, double* sums, int64_t chunks, Affine affine) {
  const int64_t padded = group_norm_silu_padded(a);
  for (int64_t chunk = 1; chunk < chunks; ++chunk) {
    const double* more = sums + chunk * 2 * padded;
#pragma omp simd
    for (int64_t c = 0; c < 2 * padded; ++c) sums[c] += more[c];
  }
  const auto lane = [](int64_t c) { return c / kPair * kPair + lane_of<kEvenOdd>(static_cast<int>(c % kPair)); };
  const int64_t width = a.channels / a.groups;
  const double size = static_cast<double>(width * a.pixels);
  for (int64_t g = 0; g < a.groups; ++g) {
    double total = 0, squares = 0;
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      total += sums[lane(c)];
      squares += sums[padded + lane(c)];
    }
    const double mean = total / size;
    double variance = squares / size - mean * mean;
    variance = variance < 0 ? 0 : variance;  // keeps NaN
    const double rstd = 1 / std::sqrt(variance + a.eps);
    if (a.mean) a.mean[image * a.groups + g] = static_cast<float>(mean);
    if (a.rstd) a.rstd[image * a.groups + g] = static_cast<float>(rstd);
    for (int64_t c = g * width; c < (g + 1) * width; ++c) {
      const int64_t at = lane(c);
      const double scale = rstd * parameter(a.weight, a.weight_is_bf16, c);
      affine.mean[at] = static_cast<float>(mean);
      affine.scale[at] = static_cast<float>(scale);
      // Subtracting the float32 mean first keeps a far mean from cancelling; its rounding is made good here.
      const double shift = parameter(a.bias, a.weight_is_bf16, c) + (affine.mean[at] - mean) * scale;
      affine.shift[at] = static_cast<float>(shift);
    }
  }
}

// -limit to limit; of a NaN, anything.
inline Floats clamp(Floats x, float limit) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_maskz_range_ps(0xffff, (__m512)x, (__m512)broadcast(limit), 0x2);  // least magnitude, sign of x
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_min_ps(_mm256_max_ps((__m256)x, (__m256)broadcast(-limit)), (__m256)broadcast(limit));
#else
  x = x < limit ? x : broadcast(limit);
  return x > -limit ? x : broadcast(-limit);
#endif
}

// 2^f for |f| <= 1/2: minimax polynomials of relative error 1.5e-7 for float32 and 7.5e-5, a 26th of half a unit in
// the last place, for bfloat16.
template <class Out>
inline Floats exp2_fraction(Floats f) {
  if constexpr (sizeof(Out) == 2) {
    const Floats p = fma(fma(broadcast(5.517166853e-02f), f, broadcast(2.426111400e-01f)), f, broadcast(6.932609677e-01f));
    return fma(p, f, broadcast(9.999280572e-01f));
  }
  Floats p = fma(fma(broadcast(1.327647245e-03f), f, broadcast(9.675541893e-03f)), f, broadcast(5.550713092e-02f));
  p = fma(fma(p, f, broadcast(2.402212024e-01f)), f, broadcast(6.931469440e-01f));
  return fma(p, f, broadcast(1.000000119e+00f));
}

// z / (1 + exp(-z))
template <class Out>
inline Floats silu(Floats z) {
  const Floats x = clamp(z, 87.0f);            // exp(-x) is a normal number; a NaN comes back through the numerator
  const Floats log2e = broadcast(-1.44269504f);
  const Floats round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Floats shifted = fma(x, log2e, round);
  const Floats power = exp2_fraction<Out>(fma(x, log2e, round - shifted));
  const Floats exp = as<Floats>(as<Words>(power) + (as<Words>(shifted) << 23));
  return z / (1.0f + exp);
}

template <bool kEvenOdd, bool kStream, class In, class Out>
void normalise_chunk(const In* x, Out* out, int64_t pixels, int64_t channels, Affine affine) {
  for (int64_t p = 0; p < pixels; ++p, x += channels, out += channels) {
    each_pair<kEvenOdd, kStream>(channels, [&](int64_t c, auto access) {
      const Pair centred = access.load(x + c) - load<false>(affine.mean + c);
      const Pair z = fma(centred, load<false>(affine.scale + c), load<false>(affine.shift + c));
      access.store(out + c, Pair{silu<Out>(z.first), silu<Out>(z.second)});
    });
  }
}

template <class In, class Out, bool kStream>
void run(const GroupNormSiluArgs& a, double* scratch, int threads) {
  constexpr bool kEvenOdd = sizeof(In) == 2 || sizeof(Out) == 2;
  const int64_t chunk = group_norm_silu_chunk(a), chunks = group_norm_silu_chunks(a);
  const int64_t scratch_size = group_norm_silu_scratch(a), padded = group_norm_silu_padded(a);
  const auto elements = [&](int64_t image, int64_t i) { return (image * a.pixels + i * chunk) * a.channels; };
  const auto size = [&](int64_t i) { return a.pixels - i * chunk < chunk ? a.pixels - i * chunk : chunk; };
  const auto affine = [&](double* own) {
    float* floats = reinterpret_cast<float*>(own + chunks * 2 * padded);
    return Affine{floats, floats + padded, floats + 2 * padded};
  };
  const auto sum = [&](int64_t image, int64_t i, double* own) {
    const int64_t at = elements(image, i);
    const ChannelSums to = {own + i * 2 * padded, own + (i * 2 + 1) * padded};
    std::memset(to.sums, 0, 2 * padded * sizeof(double));
    const In *x = static_cast<const In*>(a.x) + at, *residual = static_cast<const In*>(a.residual) + at;
    if (a.residual)
      Source<kEvenOdd, true, kStream, In>{x, residual, static_cast<In*>(a.sum) + at, a.channels}.add_all(size(i), to);
    else
      Source<kEvenOdd, false, kStream, In>{x, nullptr, nullptr, a.channels}.add_all(size(i), to);
  };
  const auto normalise = [&](int64_t image, int64_t i, double* own) {
    const int64_t at = elements(image, i);
    const In* x = static_cast<const In*>(a.residual ? a.sum : a.x) + at;
    normalise_chunk<kEvenOdd, kStream>(x, static_cast<Out*>(a.out) + at, size(i), a.channels, affine(own));
  };

  // The second phase goes backwards: it begins with what the first left in the caches.
  if (a.batch % threads == 0 || a.batch >= 4 * threads) {  // an image to a thread: no waiting between the phases
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t image = 0; image < a.batch; ++image) {
      double* own = scratch + omp_get_thread_num() * scratch_size;
      for (int64_t i = 0; i < chunks; ++i) sum(image, i, own);
      finish_statistics<kEvenOdd>(a, image, own, chunks, affine(own));
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
      for (int64_t i = begin; i < end; ++i) sum(image, i, scratch);
#pragma omp barrier
#pragma omp single
      finish_statistics<kEvenOdd>(a, image, scratch, chunks, affine(scratch));
      for (int64_t i = end; i-- > begin;) normalise(image, i, scratch);
    }
    if (kStream) fence();
  }
}

template <class In, class Out>
void choose_stores(const GroupNormSiluArgs& a, double* scratch, int threads) {
  a.stream ? run<In, Out, true>(a, scratch, threads) : run<In, Out, false>(a, scratch, threads);
}

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& a, double* scratch, int threads) {
  if (a.x_is_bf16)
    a.out_is_bf16 ? choose_stores<BFloat16, BFloat16>(a, scratch, threads)
                  : choose_stores<BFloat16, float>(a, scratch, threads);
  else
    a.out_is_bf16 ? choose_stores<float, BFloat16>(a, scratch, threads)
                  : choose_stores<float, float>(a, scratch, threads);
}

}  // namespace titok::TITOK_ISA
