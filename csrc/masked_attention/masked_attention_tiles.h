// What the two directions of masked_attention share: words, how they are packed, the loops of the products.
//
// What products read is packed as 32-bit words: a float32 each, or where the hardware multiplies bfloat16 a pair of
// neighbours along the dimension that is summed over.
#pragma once

#include "masked_attention/masked_attention.h"
#include "common/simd.h"

namespace titok::TITOK_ISA {
namespace {

// A product's register tile: kRows * kPanels sums, kPanels vectors of one factor and a broadcast word of the other.
#if defined(TITOK_ISA_AVX512)
constexpr int kRows = 6, kPanels = 4;
#else
constexpr int kRows = 6, kPanels = 2;
#endif
constexpr int kTile = kPanels * kLanes;

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));

template <class Vector>
inline Vector read(const void* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Ints lane_numbers() {
  Ints lanes;
  for (int k = 0; k < kLanes; ++k) lanes[k] = k;
  return lanes;
}

// To the type of the output.
inline Floats narrow(Floats v, const float*) { return v; }
inline Halves narrow(Floats v, const BFloat16*) {
#if defined(TITOK_ISA_AVX512BF16)
  return as<Halves>(_mm512_cvtneps_pbh((__m512)v));
#else
  return __builtin_convertvector(nearest_bfloat16(v) >> 16, Halves);
#endif
}

// kLanes values as they are stored, and as words of float32.
template <class T>
using Stored = decltype(narrow(Floats{}, static_cast<const T*>(nullptr)));
inline Words widen(Floats v) { return as<Words>(v); }
inline Words widen(Halves v) { return __builtin_convertvector(v, Words) << 16; }

// The two kinds of words.
template <class T>
struct Singles {
  using Value = T;
  using Part = Stored<T>;  // of a row, that makes a vector of words
  static constexpr int kValues = 1;
  static Words load(Part part) { return widen(part); }
  static Floats multiply_add(Words a, Words b, Floats c) { return fma(as<Floats>(a), as<Floats>(b), c); }
  static void store_weights(Floats weights, uint32_t* row, int64_t at) {
    std::memcpy(row + at, &weights, sizeof weights);
  }
};

#if defined(TITOK_ISA_AVX512BF16)
struct Pairs {
  using Value = BFloat16;
  using Part = Words;
  static constexpr int kValues = 2;
  static Words load(Part part) { return part; }
  static Floats multiply_add(Words a, Words b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static void store_weights(Floats weights, uint32_t* row, int64_t at) {
    BFloat16* const to = reinterpret_cast<BFloat16*>(row) + at;
    const Halves rounded = narrow(weights, to);
    std::memcpy(to, &rounded, sizeof rounded);
  }
};
#endif

// Calls visit with a value of the kind for these arguments.
template <class Visit>
inline auto with_kind([[maybe_unused]] const MaskedAttentionArgs& a, Visit visit) {
#if defined(TITOK_ISA_AVX512BF16)
  return visit(Pairs{});
#else
  return a.is_bf16 ? visit(Singles<BFloat16>{}) : visit(Singles<float>{});
#endif
}

// The part of a row from channel `at` on; what is past its last channel is 0.
template <class Part, class T>
inline Part read_part(const T* row, int64_t at, int64_t head_dim) {
  const int64_t count = head_dim - at;
  if (count >= static_cast<int64_t>(sizeof(Part) / sizeof(T))) return read<Part>(row + at);
#if defined(TITOK_ISA_AVX512)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4)
    return as<Part>(_mm512_maskz_loadu_epi32(mask, row + at));
  else if constexpr (sizeof(Part) == 32)
    return as<Part>(_mm256_maskz_loadu_epi16(mask, row + at));
  else
    return as<Part>(_mm512_maskz_loadu_epi16(mask, row + at));
#else
  Part part = {};
  std::memcpy(&part, row + at, count * sizeof(T));
  return part;
#endif
}

// kLanes x kLanes words across the diagonal: swaps blocks of half the size, a quarter and so on down to 1.
inline void transpose(Words (&rows)[kLanes]) {
  const Ints lanes = lane_numbers();
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    const Ints moved = (lanes & step) != 0;
    const Ints upper = moved ? lanes + (kLanes - step) : lanes, lower = moved ? lanes + kLanes : lanes + step;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const Words a = rows[i], b = rows[i + step];
      rows[i] = __builtin_shuffle(a, b, upper);
      rows[i + step] = __builtin_shuffle(a, b, lower);
    }
  }
}

// Hands out a thread's memory in arrays aligned to 64 bytes; from null on it only counts.
struct Arena {
  char* next;

  template <class T>
  T* take(int64_t size) {
    T* const array = reinterpret_cast<T*>(next);
    next += round_up(size * sizeof(T), 64);
    return array;
  }
};

// Lists the tokens that a sample's queries see, and returns how many they are.
inline int64_t list_visible(const MaskedAttentionArgs& a, int64_t sample, int64_t* seen) {
  int64_t count = 0;
  for (int64_t token = 0; token < a.tokens; ++token) {
    if (!a.key_mask || a.key_mask[sample * a.tokens + token]) seen[count++] = token;
  }
  return count;
}

// One head's channels of some tokens.
template <class T>
struct Tokens {
  const T* first;
  int64_t stride;
  int64_t head_dim;
  int64_t count;
  const int64_t* order;  // null: neighbours

  const T* operator[](int64_t i) const { return first + (order ? order[i] : i) * stride; }
};

// Asks for a token's channels of the head after this one, so that they come while this one is computed: neighbouring
// tokens lie pages apart, which hardware does not foresee. After the last head it asks for what nobody wants.
template <class T>
inline void fetch_next_head(const T* channels, int64_t head_dim) {
  const char* const next = reinterpret_cast<const char*>(channels + head_dim);
  for (int64_t at = 0; at < head_dim * static_cast<int64_t>(sizeof(T)); at += 64) __builtin_prefetch(next + at, 0, 2);
}

// Factor a of a sum over channels: [token][word], tokens `step` words apart, a multiple of kLanes.
template <class Kind>
void pack_rows(const Tokens<typename Kind::Value>& from, int64_t step, uint32_t* to) {
  for (int64_t i = 0; i < from.count; ++i) {
    for (int64_t word = 0; word < step; word += kLanes) {
      const Words words =
          Kind::load(read_part<typename Kind::Part>(from[i], word * Kind::kValues, from.head_dim));
      std::memcpy(to + i * step + word, &words, sizeof words);
    }
  }
}

// Factor b of a sum over channels: [tile][word][token of the tile]. The last token is repeated to the end of its vector.
template <class Kind>
void pack_columns(const Tokens<typename Kind::Value>& from, uint32_t* to) {
  const int64_t depth = from.head_dim / Kind::kValues;
  for (int64_t token = 0; token < from.count; token += kLanes) {
    uint32_t* const column = to + token / kTile * kTile * depth + token % kTile;
    for (int64_t word = 0; word < depth; word += kLanes) {
      const int64_t at = word * Kind::kValues;
      Words rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const auto* const row = from[least(token + i, from.count - 1)];
        rows[i] = Kind::load(read_part<typename Kind::Part>(row, at, from.head_dim));
      }
      transpose(rows);
      for (int64_t i = 0; i < least(kLanes, depth - word); ++i) {
        std::memcpy(column + (word + i) * kTile, &rows[i], sizeof rows[i]);
      }
    }
  }
}

// Factor b of a sum over tokens: [token, or pair of tokens][channel], `width` channels, a multiple of kLanes.
template <class Kind>
void pack_sums(const Tokens<typename Kind::Value>& from, int64_t width, uint32_t* to) {
  const auto load = [&](int64_t i, int64_t at) {
    if (i >= from.count) return Words{};
    return widen(read_part<Stored<typename Kind::Value>>(from[i], at, from.head_dim));
  };
  for (int64_t i = 0; i < from.count; i += Kind::kValues) {
    for (int64_t at = 0; at < width; at += kLanes) {
      Words words = load(i, at);
      if constexpr (Kind::kValues == 2) words = words >> 16 | load(i + 1, at);
      std::memcpy(to + i / Kind::kValues * width + at, &words, sizeof words);
    }
  }
}

// One register tile of c = a b, or of c += a b; a by rows, or kTransposed. The template arguments count down to `rows`
// and `panels`.
template <class Kind, bool kTransposed, int kR = kRows, int kP = kPanels>
void multiply_tile(int64_t rows, int64_t panels, int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b,
                   int64_t b_stride, float* c, int64_t c_stride, bool add) {
  if constexpr (kR > 1) {
    if (rows < kR) {
      return multiply_tile<Kind, kTransposed, kR - 1, kP>(rows, panels, depth, a, a_stride, b, b_stride, c, c_stride,
                                                          add);
    }
  }
  if constexpr (kP > 1) {
    if (panels < kP) {
      return multiply_tile<Kind, kTransposed, kR, kP - 1>(rows, panels, depth, a, a_stride, b, b_stride, c, c_stride,
                                                          add);
    }
  }
  Floats sums[kR][kP] = {};
  if (add) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
      for (int p = 0; p < kP; ++p) sums[r][p] = read<Floats>(c + r * c_stride + p * kLanes);
    }
  }
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Words columns[kP];
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p) columns[p] = read<Words>(b + p * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const Words value = (kTransposed ? a[k * a_stride + r] : a[r * a_stride + k]) - Words{};
#pragma GCC unroll 8
      for (int p = 0; p < kP; ++p) sums[r][p] = Kind::multiply_add(value, columns[p], sums[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p) std::memcpy(c + r * c_stride + p * kLanes, &sums[r][p], sizeof(Floats));
  }
}

// c = a b, or c += a b: `rows` rows of `columns` (a multiple of kLanes), b in tiles of kTile columns that lie
// tile_stride apart; a by rows, or kTransposed.
template <class Kind, bool kTransposed = false>
void multiply(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b,
              int64_t b_stride, int64_t tile_stride, float* c, int64_t c_stride, bool add = false) {
  for (int64_t column = 0; column < columns; column += kTile, b += tile_stride) {
    for (int64_t row = 0; row < rows; row += kRows) {
      multiply_tile<Kind, kTransposed>(least(kRows, rows - row), least(kPanels, (columns - column) / kLanes), depth,
                                       a + row * (kTransposed ? 1 : a_stride), a_stride, b, b_stride,
                                       c + row * c_stride + column, c_stride, add);
    }
  }
}

inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// Folds all lanes into each.
template <class Fold>
inline Floats across(Floats v, Fold fold) {
  const Ints lanes = lane_numbers();
#pragma GCC unroll 4
  for (int step = kLanes / 2; step > 0; step /= 2) v = fold(v, __builtin_shuffle(v, lanes ^ step));
  return v;
}

// 2^x for x <= 0: relative error 1.5e-7 from a minimax polynomial; 0 below the normal numbers, -inf included.
inline Floats exp2(Floats x) {
  constexpr float kRound = 12582912.0f + 127;  // 1.5 * 2^23 leaves the nearest integer in the low bits, here biased
  const Floats shifted = x + kRound;
  const Floats f = x - (shifted - kRound);
  Floats p = fma(broadcast(1.327647245e-03f), f, broadcast(9.675541893e-03f));
  p = fma(p, f, broadcast(5.550713092e-02f));
  p = fma(p, f, broadcast(2.402212024e-01f));
  p = fma(p, f, broadcast(6.931469440e-01f));
  p = fma(p, f, broadcast(1.000000119e+00f)) * as<Floats>(as<Words>(shifted) << 23);
  return x < -126.0f ? Floats{} : p;  // a NaN stays
}

// Sums over tokens, times a factor, as one head of the output has them.
template <class T>
inline void write_row(const float* sums, float factor, int64_t head_dim, T* out) {
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    const auto values = narrow(read<Floats>(sums + c) * broadcast(factor), out);
    if (c + kLanes <= head_dim)
      std::memcpy(out + c, &values, sizeof values);
    else
      std::memcpy(out + c, &values, (head_dim - c) * sizeof(T));
  }
}

}  // namespace
}  // namespace titok::TITOK_ISA
