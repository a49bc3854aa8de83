// What both directions of masked_attention are made of: matrix products of packed factors, and how factors are
// packed.
//
// Factors of products are packed as 32-bit words. A word holds one float32 or, where the CPU multiplies bfloat16,
// two bfloat16 that are neighbours along the dimension that is summed over.
#pragma once

#include "common/simd_math.h"
#include "masked_attention/masked_attention.h"

namespace titok::TITOK_ISA {
namespace {

// A product is computed in register tiles of kRows x kPanels vectors of sums. They leave registers for kPanels
// vectors of the right factor and one broadcast word of the left.
#if defined(TITOK_ISA_AVX512)
constexpr int kRows = 6, kPanels = 4;
#else
constexpr int kRows = 6, kPanels = 2;
#endif
constexpr int kTile = kPanels * kLanes;  // columns

constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- Rows as tensors store them

// float32 to the type of a tensor, which the second argument names.
inline Floats narrow(Floats v, const float*) { return v; }
inline Halves narrow(Floats v, const BFloat16*) {
#if defined(TITOK_ISA_AVX512BF16)
  return bit_cast<Halves>(_mm512_cvtneps_pbh((__m512)v));
#else
  return __builtin_convertvector(nearest_bfloat16(v) >> 16, Halves);
#endif
}

// kLanes values as a tensor of T stores them.
template <class T>
using Stored = decltype(narrow(Floats{}, static_cast<const T*>(nullptr)));

inline Words widen_to_words(Floats v) { return bit_cast<Words>(v); }
inline Words widen_to_words(Halves v) { return bit_cast<Words>(widen(v)); }

// The channels of a head from `at` on, as many as Part holds; 0 past the last one.
template <class Part, class T>
inline Part read_part(const T* row, int64_t at, int64_t head_dim) {
  const int64_t count = head_dim - at;
  if (count >= static_cast<int64_t>(sizeof(Part) / sizeof(T))) return read<Part>(row + at);
#if defined(TITOK_ISA_AVX512)
  const uint32_t mask = (1u << count) - 1;
  if constexpr (sizeof(T) == 4)
    return bit_cast<Part>(_mm512_maskz_loadu_epi32(mask, row + at));
  else if constexpr (sizeof(Part) == 32)
    return bit_cast<Part>(_mm256_maskz_loadu_epi16(mask, row + at));
  else
    return bit_cast<Part>(_mm512_maskz_loadu_epi16(mask, row + at));
#else
  Part part = {};
  std::memcpy(&part, row + at, count * sizeof(T));
  return part;
#endif
}

// Writes `factor` times a row of sums to the head_dim channels of a head.
template <class T>
inline void write_row(const float* sums, float factor, int64_t head_dim, T* out) {
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    const auto values = narrow(read<Floats>(sums + c) * broadcast(factor), out);
    if (c + kLanes <= head_dim)
      write(out + c, values);
    else
      std::memcpy(out + c, &values, (head_dim - c) * sizeof(T));
  }
}

// One head's channels of some tokens.
template <class T>
struct Tokens {
  const T* first;  // channels of token 0
  int64_t stride;  // elements from token to token
  int64_t head_dim;
  int64_t count;
  const int64_t* indices;  // of the tokens, or null: 0, 1, 2, ...

  const T* operator[](int64_t i) const { return first + (indices ? indices[i] : i) * stride; }
};

// Lists the visible tokens of a sample and returns their number.
inline int64_t list_visible(const MaskedAttentionArgs& a, int64_t sample, int64_t* visible) {
  int64_t count = 0;
  for (int64_t token = 0; token < a.tokens; ++token) {
    if (!a.key_mask || a.key_mask[sample * a.tokens + token]) visible[count++] = token;
  }
  return count;
}

// Prefetches a token's channels of the next head, so that they arrive while this head is computed. Neighbouring
// tokens lie pages apart, which hardware prefetchers do not follow. After the last head the prefetch is useless
// but harmless.
template <class T>
inline void prefetch_next_head(const T* channels, int64_t head_dim) {
  const char* const next = reinterpret_cast<const char*>(channels + head_dim);
  for (int64_t at = 0; at < head_dim * static_cast<int64_t>(sizeof(T)); at += 64)
    __builtin_prefetch(next + at, 0, 2);
}

// ---- How words hold values

// One float32 a word, of tensors of T.
template <class T>
struct Float32Packing {
  using Value = T;
  using Part = Stored<T>;  // the part of a row that makes a vector of words
  static constexpr int kPerWord = 1;
  static Words to_words(Part part) { return widen_to_words(part); }
  static Floats multiply_add(Words a, Words b, Floats c) {
    return fma(bit_cast<Floats>(a), bit_cast<Floats>(b), c);
  }
  // Stores the weights of keys at ... at + kLanes in the row of a left factor whose depth is the keys.
  static void store_weights(Floats weights, uint32_t* row, int64_t at) { write(row + at, weights); }
};

#if defined(TITOK_ISA_AVX512BF16)
// Two bfloat16 a word.
struct BFloat16PairPacking {
  using Value = BFloat16;
  using Part = Words;
  static constexpr int kPerWord = 2;
  static Words to_words(Part part) { return part; }
  static Floats multiply_add(Words a, Words b, Floats c) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  }
  static void store_weights(Floats weights, uint32_t* row, int64_t at) {
    BFloat16* const to = reinterpret_cast<BFloat16*>(row) + at;
    write(to, narrow(weights, to));
  }
};
#endif

// Calls visit with a value of the packing for these arguments.
template <class Visit>
inline auto with_packing([[maybe_unused]] const MaskedAttentionArgs& a, Visit visit) {
#if defined(TITOK_ISA_AVX512BF16)
  return visit(BFloat16PairPacking{});
#else
  return with_storage_type(a.dtype, [&](auto value) { return visit(Float32Packing<decltype(value)>{}); });
#endif
}

// Hands out a thread's memory in arrays aligned to a cache line. With null for the memory it only counts.
struct Arena {
  char* memory;
  int64_t used = 0;  // bytes

  template <class T>
  T* take(int64_t size) {
    T* const array = memory ? reinterpret_cast<T*>(memory + used) : nullptr;
    used += round_up(size * sizeof(T), 64);
    return array;
  }
};

// ---- Packed factors of C = A B, where C is rows x columns, A rows x depth and B depth x columns

// A whose depth is channels: [token][word], `step` words a token, a multiple of kLanes.
//
//   token 0:   w0 w1 ... 0 0      words past the last channel are 0
//   token 1:   w0 w1 ... 0 0
template <class Packing>
void pack_left(const Tokens<typename Packing::Value>& from, int64_t step, uint32_t* to) {
  for (int64_t i = 0; i < from.count; ++i) {
    for (int64_t word = 0; word < step; word += kLanes) {
      const int64_t at = word * Packing::kPerWord;
      write(to + i * step + word,
            Packing::to_words(read_part<typename Packing::Part>(from[i], at, from.head_dim)));
    }
  }
}

// kLanes x kLanes words across the diagonal, in log2(kLanes) steps that swap blocks of 1, 2, 4, ... words.
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

// B whose depth is channels and whose columns are tokens: [tile of kTile tokens][word][token of the tile].
//
//   tile 0:   word 0 of tokens 0 ... kTile - 1
//             word 1 of tokens 0 ... kTile - 1
//             ...
//   tile 1:   word 0 of tokens kTile ... 2 kTile - 1
//
// The last token is repeated up to the end of its vector.
template <class Packing>
void pack_right_over_channels(const Tokens<typename Packing::Value>& from, uint32_t* to) {
  const int64_t depth = from.head_dim / Packing::kPerWord;
  for (int64_t token = 0; token < from.count; token += kLanes) {
    uint32_t* const column = to + token / kTile * kTile * depth + token % kTile;
    for (int64_t word = 0; word < depth; word += kLanes) {
      const int64_t at = word * Packing::kPerWord;
      Words rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const auto* const row = from[least(token + i, from.count - 1)];
        rows[i] = Packing::to_words(read_part<typename Packing::Part>(row, at, from.head_dim));
      }
      transpose(rows);
      for (int64_t i = 0; i < least(kLanes, depth - word); ++i) write(column + (word + i) * kTile, rows[i]);
    }
  }
}

// B whose depth is tokens and whose columns are channels: [word of one or two tokens][channel], `width` words a
// row, a multiple of kLanes. A missing second token of the last word is 0, and so are channels past the last one.
template <class Packing>
void pack_right_over_tokens(const Tokens<typename Packing::Value>& from, int64_t width, uint32_t* to) {
  const auto load = [&](int64_t i, int64_t at) {
    if (i >= from.count) return Words{};
    return widen_to_words(read_part<Stored<typename Packing::Value>>(from[i], at, from.head_dim));
  };
  for (int64_t i = 0; i < from.count; i += Packing::kPerWord) {
    for (int64_t at = 0; at < width; at += kLanes) {
      Words words = load(i, at);
      if constexpr (Packing::kPerWord == 2) words = words >> 16 | load(i + 1, at);
      write(to + i / Packing::kPerWord * width + at, words);
    }
  }
}

// One register tile of C = A B, or with `add` of C += A B. A is [row][depth], or with kTransposed [depth][row].
// The template arguments kR and kP count down to `rows` and `panels`, so that each tile size has its own unrolled
// loop.
template <class Packing, bool kTransposed, int kR = kRows, int kP = kPanels>
void multiply_tile(int64_t rows, int64_t panels, int64_t depth, const uint32_t* a, int64_t a_stride,
                   const uint32_t* b, int64_t b_stride, float* c, int64_t c_stride, bool add) {
  if constexpr (kR > 1) {
    if (rows < kR) {
      return multiply_tile<Packing, kTransposed, kR - 1, kP>(rows, panels, depth, a, a_stride, b, b_stride, c,
                                                             c_stride, add);
    }
  }
  if constexpr (kP > 1) {
    if (panels < kP) {
      return multiply_tile<Packing, kTransposed, kR, kP - 1>(rows, panels, depth, a, a_stride, b, b_stride, c,
                                                             c_stride, add);
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
      for (int p = 0; p < kP; ++p) sums[r][p] = Packing::multiply_add(value, columns[p], sums[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p) write(c + r * c_stride + p * kLanes, sums[r][p]);
  }
}

// C = A B, or with `add` C += A B. Strides are in words.
//
// Args: columns: a multiple of kLanes. depth: words. b: tiles of kTile columns that lie tile_stride apart, each
// with rows that lie b_stride apart.
template <class Packing, bool kTransposed = false>
void multiply(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b,
              int64_t b_stride, int64_t tile_stride, float* c, int64_t c_stride, bool add = false) {
  for (int64_t column = 0; column < columns; column += kTile, b += tile_stride) {
    for (int64_t row = 0; row < rows; row += kRows) {
      multiply_tile<Packing, kTransposed>(least(kRows, rows - row), least(kPanels, (columns - column) / kLanes),
                                          depth, a + row * (kTransposed ? 1 : a_stride), a_stride, b, b_stride,
                                          c + row * c_stride + column, c_stride, add);
    }
  }
}

}  // namespace
}  // namespace titok::TITOK_ISA
