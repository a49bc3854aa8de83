// The loops of int8_linear, compiled once per instruction set.
//
// A register tile holds the sums of kRows rows and one panel of outputs. The instruction of AVX-512 VNNI adds the four
// products of a group of inputs to each of 16 sums. Without it the same sums take many instructions; they are there
// so that all CPUs compute the same.
#include "common/simd_math.h"
#include "int8_linear/int8_linear.h"

namespace titok::TITOK_ISA {
namespace {

constexpr int kRows = 6;
constexpr int kVectors = kInt8Panel / kLanes;
constexpr int64_t kCacheLine = 64;  // bytes

// ---- Rows to 8 bits

// kLanes values of a row; `past` beyond its end.
inline Floats load_row(const float* row, int64_t count, float past) {
  if (count >= kLanes) return read<Floats>(row);
  Floats v = broadcast(past);
  std::memcpy(&v, row, count * sizeof *row);
  return v;
}
inline Floats load_row(const BFloat16* row, int64_t count, float past) {
  if (count >= kLanes) return widen(read<Halves>(row));
  Floats v = broadcast(past);
  for (int64_t i = 0; i < count; ++i) v[i] = bit_cast<float>(uint32_t{row[i].bits} << 16);
  return v;
}

inline Floats minimum(Floats a, Floats b) { return a < b ? a : b; }

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// The lowest byte of each lane. GCC turns the conversion of vectors into 50 instructions.
inline Bytes lowest_bytes(Words v) {
#if defined(TITOK_ISA_AVX512)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)v);
#else
  return __builtin_convertvector(v, Bytes);
#endif
}

template <class T>
void quantize(const Int8LinearArgs& a, int64_t first_row, int64_t begin, int64_t end, const Int8Rows& out) {
  for (int64_t r = begin; r < end; ++r) {
    const T* const row = static_cast<const T*>(a.x) + (first_row + r) * a.inputs;
    const float first = load_row(row, 1, 0)[0];
    Floats low = broadcast(first), high = low, poison = {};
    for (int64_t k = 0; k < a.inputs; k += kLanes) {
      const Floats v = load_row(row + k, a.inputs - k, first);
      low = minimum(v, low);
      high = maximum(v, high);
      poison += v - v;  // 0, or NaN if a value is not finite
    }
    const float lowest = across(low, minimum)[0], range = across(high, maximum)[0] - lowest;
    // Of a range that is too small to divide by, nothing but the smallest value is kept.
    const bool divides = range >= 1e-35f;
    out.low[r] = lowest + across(poison, add)[0];
    out.step[r] = divides ? range / 255 : 0;
    const Floats factor = broadcast(divides ? 255 / range : 0), offset = broadcast(lowest);
    uint8_t* const values = out.values + r * a.inputs;
    for (int64_t k = 0; k < a.inputs; k += kLanes) {
      // Adding kRoundToInteger leaves the rounded number in the low bits.
      const Floats v = (load_row(row + k, a.inputs - k, lowest) - offset) * factor + kRoundToInteger;
      const Bytes bytes = lowest_bytes(bit_cast<Words>(v));
      if (k + kLanes <= a.inputs)
        write(values + k, bytes);
      else
        std::memcpy(values + k, &bytes, a.inputs - k);
    }
  }
}

// ---- Products

// sums += the products of a group of inputs, which `group` holds as four bytes, and their weights.
inline Ints multiply_add(uint32_t group, const int8_t* weights, Ints sums) {
#if defined(TITOK_ISA_AVX512VNNI)
  return (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(static_cast<int>(group)),
                                   read<__m512i>(weights));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int k = 0; k < kInt8Group; ++k)
      sums[lane] += static_cast<int32_t>(group >> 8 * k & 255) * weights[lane * kInt8Group + k];
  }
  return sums;
#endif
}

// The sums of `kCount` rows, (kCount, kInt8Panel). `ahead` is memory that is read soon, a cache line for each group.
template <int kCount>
inline void multiply_rows(const uint8_t* rows, int64_t inputs, const int8_t* weights, const int8_t* ahead,
                          int32_t* out) {
  Ints sums[kCount][kVectors] = {};
  for (int64_t g = 0; g < inputs / kInt8Group; ++g) {
    __builtin_prefetch(ahead + g * kCacheLine, 0, 2);
    uint32_t groups[kCount];
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) std::memcpy(&groups[r], rows + r * inputs + g * kInt8Group, kInt8Group);
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
#pragma GCC unroll 6
      for (int r = 0; r < kCount; ++r)
        sums[r][v] = multiply_add(groups[r], weights + (g * kVectors + v) * kLanes * kInt8Group, sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) write(out + r * kInt8Panel + v * kLanes, sums[r][v]);
  }
}

// x Phi(x), with Phi(-|x|) = t (a1 + t (a2 + ...)) exp(-x^2 / 2) / 2 and t = 1 / (1 + p |x| / sqrt(2)): Abramowitz and
// Stegun, "Handbook of Mathematical Functions", 7.1.26, with an absolute error below 1e-7 in Phi.
inline Floats gelu(Floats x) {
  const Floats size = x < 0 ? -x : x;
  const Floats t = 1 / fma(size, broadcast(0.3275911f * 0.70710678f), broadcast(1));
  constexpr float kTail[] = {1.061405429f, -1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f};
  Floats tail = broadcast(0.5f * kTail[0]);
  for (int k = 1; k < 5; ++k) tail = fma(tail, t, broadcast(0.5f * kTail[k]));
  tail *= t * exp2_nonpositive(x * x * -0.72134752f);
  tail = tail == 0 ? tail : tail * size;  // no infinity times 0
  return (x > 0 ? x : Floats{}) - tail;
}

inline void store_row(float* out, int64_t count, Floats v) {
  std::memcpy(out, &v, (count < kLanes ? count : kLanes) * sizeof *out);
}
inline void store_row(BFloat16* out, int64_t count, Floats v) {
  const Halves halves = __builtin_convertvector(nearest_bfloat16(v) >> 16, Halves);
  std::memcpy(out, &halves, (count < kLanes ? count : kLanes) * sizeof *out);
}

template <int kCount, class T>
void compute_tile(const Int8LinearArgs& a, int64_t first_row, int64_t begin, int64_t panel, const Int8Rows& rows,
                  const int8_t* ahead) {
  const int8_t* const weights = a.weight + panel * kInt8Panel * a.inputs;
  int32_t sums[kCount * kInt8Panel];
  multiply_rows<kCount>(rows.values + begin * a.inputs, a.inputs, weights, ahead, sums);
  for (int v = 0; v < kVectors; ++v) {
    const int64_t column = panel * kInt8Panel + v * kLanes, count = a.outputs - column;
    if (count <= 0) return;
    const Floats scale = read<Floats>(a.scale + column), total = read<Floats>(a.total + column);
    const Floats bias = a.bias ? load_row(static_cast<const T*>(a.bias) + column, count, 0) : Floats{};
    for (int r = 0; r < kCount; ++r) {
      const Floats product = __builtin_convertvector(read<Ints>(sums + r * kInt8Panel + v * kLanes), Floats);
      Floats y = fma(total, broadcast(rows.low[begin + r]), bias);
      y = fma(product, scale * broadcast(rows.step[begin + r]), y);
      if (a.gelu) y = gelu(y);
      store_row(static_cast<T*>(a.out) + (first_row + begin + r) * a.outputs + column, count, y);
    }
  }
}

template <class T>
void multiply(const Int8LinearArgs& a, int64_t first_row, int64_t begin, int64_t end, int64_t panel,
              const Int8Rows& rows) {
  // The next panel is fetched from memory while this one is multiplied, a quarter of it in each of four blocks.
  const int64_t quarter = a.inputs / 4 * kInt8Panel;
  const int8_t* const next = a.weight + (panel + 1) * 4 * quarter;
  int64_t part = 0;
  const auto ahead = [&] { return next + quarter * (part++ & 3); };
  for (; begin + kRows <= end; begin += kRows) compute_tile<kRows, T>(a, first_row, begin, panel, rows, ahead());
  switch (end - begin) {
    case 5: return compute_tile<5, T>(a, first_row, begin, panel, rows, ahead());
    case 4: return compute_tile<4, T>(a, first_row, begin, panel, rows, ahead());
    case 3: return compute_tile<3, T>(a, first_row, begin, panel, rows, ahead());
    case 2: return compute_tile<2, T>(a, first_row, begin, panel, rows, ahead());
    case 1: return compute_tile<1, T>(a, first_row, begin, panel, rows, ahead());
    default: return;
  }
}

void quantize_dtype(const Int8LinearArgs& a, int64_t first_row, int64_t begin, int64_t end, const Int8Rows& rows) {
  with_storage_type(a.dtype, [&](auto t) { quantize<decltype(t)>(a, first_row, begin, end, rows); });
}

void multiply_dtype(const Int8LinearArgs& a, int64_t first_row, int64_t begin, int64_t end, int64_t panel,
                    const Int8Rows& rows) {
  with_storage_type(a.dtype, [&](auto t) { multiply<decltype(t)>(a, first_row, begin, end, panel, rows); });
}

constexpr Int8LinearKernels kKernels = {quantize_dtype, multiply_dtype};

}  // namespace
}  // namespace titok::TITOK_ISA

const titok::Int8LinearKernels& titok::int8_linear_kernels(TITOK_ISA::ThisIsa) { return TITOK_ISA::kKernels; }
