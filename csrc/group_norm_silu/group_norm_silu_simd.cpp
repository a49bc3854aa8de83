// The loops of group_norm_silu, compiled once per instruction set.
//
// Lanes are channels and sums run over pixels in a fixed order, so every number of threads gives the same bits, and so
// do AVX2 and AVX-512.
#include "group_norm_silu/group_norm_silu.h"

#include <omp.h>

#include <cmath>

#include "common/simd.h"

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

// Rows read side by side are more streams than the hardware's prefetcher follows. Into the second cache only: the rows
// between here and there may fill the first.
constexpr int kAhead = 2 * kRun;
template <class T>
inline void prefetch_pair(const T* from) {
  for (int i = 0; i < kPair * static_cast<int>(sizeof(T)); i += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + i, 0, 2);
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
      for (int k = kAhead; k < kAhead + kCount; ++k) {
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

// What the second phase does to a channel: silu((x - mean) * scale + shift). In the order of the lanes.
struct Affine {
  float* mean;
  float* scale;
  float* shift;

  Affine from(int64_t c) const { return {mean + c, scale + c, shift + c}; }
};

inline float parameter(const void* values, bool is_bf16, int64_t c) {
  return is_bf16 ? as<float>(uint32_t{static_cast<const BFloat16*>(values)[c].bits} << 16)
                 : static_cast<const float*>(values)[c];
}

// In float32, any NaN as the usual one.
inline float quiet(double value) { return value == value ? static_cast<float>(value) : __builtin_nanf(""); }

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
      affine.mean[at] = quiet(mean);
      affine.scale[at] = quiet(scale);
      // Subtracting the float32 mean first keeps a far mean from cancelling; its rounding is made good here.
      const double shift = parameter(a.bias, a.weight_is_bf16, c) + (affine.mean[at] - mean) * scale;
      affine.shift[at] = quiet(shift);
    }
  }
}

// -limit to limit; of a NaN, anything.
inline Floats clamp(Floats x, Floats limit) {
#if defined(TITOK_ISA_AVX512)
  return (Floats)_mm512_maskz_range_ps(0xffff, (__m512)x, (__m512)limit, 0x2);  // least magnitude, sign of x
#elif defined(TITOK_ISA_AVX2)
  return (Floats)_mm256_min_ps(_mm256_max_ps((__m256)x, (__m256)-limit), (__m256)limit);
#else
  x = x < limit ? x : limit;
  return x > -limit ? x : -limit;
#endif
}

// 2^f for |f| <= 1/2, highest power first: minimax polynomials of relative error 1.5e-7 for float32 and 7.5e-5, a 26th
// of half a unit in the last place, for bfloat16.
template <class Out>
struct Exp2;
template <>
struct Exp2<float> {
  static constexpr int kCount = 6;
  static constexpr float kCoefficients[] = {1.327647245e-03f, 9.675541893e-03f, 5.550713092e-02f,
                                            2.402212024e-01f, 6.931469440e-01f, 1.000000119e+00f};
};
template <>
struct Exp2<BFloat16> {
  static constexpr int kCount = 4;
  static constexpr float kCoefficients[] = {5.517166853e-02f, 2.426111400e-01f, 6.932609677e-01f, 9.999280572e-01f};
};

// A constant that GCC would otherwise read from memory in each use: there are more uses than loads to spare.
inline Floats in_register(float value) {
  Floats v = broadcast(value);
#if defined(TITOK_ISA_AVX512)
  asm("" : "+v"(v));
#endif
  return v;
}

// z / (1 + exp(-z)) of some vectors, step by step for all of them: one after the other, the chain of instructions that
// wait for each other is longer than what a core looks ahead.
template <class Out>
struct Silu {
  Floats limit = in_register(87.0f);  // exp(-limit) is a normal number; a NaN comes back through the numerator
  Floats log2e = in_register(-1.44269504f);
  Floats round = in_register(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  Floats one = in_register(1.0f);
  Floats coefficients[Exp2<Out>::kCount];

  Silu() {
    for (int i = 0; i < Exp2<Out>::kCount; ++i) coefficients[i] = in_register(Exp2<Out>::kCoefficients[i]);
  }

  template <int kCount>
  inline void operator()(Floats (&z)[kCount]) const {
    Floats x[kCount], shifted[kCount], fraction[kCount], power[kCount];
    for (int i = 0; i < kCount; ++i) x[i] = clamp(z[i], limit);
    for (int i = 0; i < kCount; ++i) shifted[i] = fma(x[i], log2e, round);
    for (int i = 0; i < kCount; ++i) fraction[i] = fma(x[i], log2e, round - shifted[i]);
    for (int i = 0; i < kCount; ++i) power[i] = fma(coefficients[0], fraction[i], coefficients[1]);
    for (int k = 2; k < Exp2<Out>::kCount; ++k) {
      for (int i = 0; i < kCount; ++i) power[i] = fma(power[i], fraction[i], coefficients[k]);
    }
    for (int i = 0; i < kCount; ++i) power[i] = as<Floats>(as<Words>(power[i]) + (as<Words>(shifted[i]) << 23));
    for (int i = 0; i < kCount; ++i) z[i] /= one + power[i];
  }
};

// To the nearest bfloat16, once truncated, ties away from zero: a rounded SiLU is no nearer to one than to the other. A
// NaN of all ones would leave its range; none is made of bfloat16 maps and quiet() parameters.
inline Floats half_unit_up(Floats v) { return as<Floats>(as<Words>(v) + 0x8000); }

// kPairs neighbouring pairs of one pixel from x, out and affine on.
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
