// The loops of masked_attention, compiled once per instruction set. A head's visible keys and values are packed once;
// then, for a block of queries, scores, softmax and the weighted sum of the values run on one tile of whole rows of
// scores, which the second cache holds up to some 2,000 tokens; at 4,096 it is 768 KiB, still no reason to go online.
//
// What products read is packed as 32-bit words: a float32 each, or where the hardware multiplies bfloat16 a pair of
// neighbours along the dimension that is summed over.
#include "masked_attention.h"

#include <type_traits>

#include "simd.h"

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

// kLanes values as float32.
inline Words widen(const float* p) { return read<Words>(p); }
inline Words widen(const BFloat16* p) {
  return __builtin_convertvector(read<Halves>(p), Words) << 16;
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

// The two kinds of words.
template <class T>
struct Singles {
  using Value = T;
  static constexpr int kValues = 1;
  static Words load(const T* p) { return widen(p); }
  static Floats multiply_add(Words a, Words b, Floats c) { return fma(as<Floats>(a), as<Floats>(b), c); }
  static void store_weights(Floats weights, uint32_t* row, int64_t at) {
    std::memcpy(row + at, &weights, sizeof weights);
  }
};

#if defined(TITOK_ISA_AVX512BF16)
struct Pairs {
  using Value = BFloat16;
  static constexpr int kValues = 2;
  static Words load(const BFloat16* p) { return read<Words>(p); }
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

// A vector of words from channel `at` of a head on; those past its last channel are 0.
template <int kValues, class T, class Load>
inline Words load_part(const T* head, int64_t at, int64_t head_dim, Load load) {
  if (at + kLanes * kValues <= head_dim) return load(head + at);
  T staged[kLanes * kValues] = {};
  if (at < head_dim) std::memcpy(staged, head + at, (head_dim - at) * sizeof(T));
  return load(staged);
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

// One thread's: what is packed of a head, and the tile of a block of queries.
template <class Kind>
struct Scratch {
  int64_t depth;  // words of a query or a key
  int64_t step;   // from query to query; this and the next two are multiples of kLanes
  int64_t width;  // words of a row of values
  int64_t span;   // words of a row of scores
  int64_t* seen;  // visible tokens
  uint32_t *keys, *values, *queries, *scores;
  float* sums;
  int64_t bytes;

  Scratch(const MaskedAttentionArgs& a, void* memory) {
    depth = a.head_dim / Kind::kValues;
    step = round_up(depth, kLanes);
    width = round_up(a.head_dim, kLanes);
    span = round_up(a.tokens, kLanes);
    char* next = static_cast<char*>(memory);
    const auto take = [&](auto*& array, int64_t size) {
      array = reinterpret_cast<std::remove_reference_t<decltype(array)>>(next);
      next += round_up(size * sizeof *array, 64);
    };
    take(seen, span);
    take(keys, depth * round_up(a.tokens, kTile));
    take(values, width * round_up(a.tokens, Kind::kValues) / Kind::kValues);
    take(queries, step * kQueryBlock);
    take(scores, span * kQueryBlock);
    take(sums, width * kQueryBlock);
    bytes = next - static_cast<char*>(memory);
  }
};

// A head's visible keys, as columns: [tile][word][key of the tile]. The last one is repeated to the end of its vector.
template <class Kind>
void pack_keys(const typename Kind::Value* from, int64_t stride, int64_t head_dim, int64_t count, Scratch<Kind>& to) {
  for (int64_t key = 0; key < count; key += kLanes) {
    uint32_t* const column = to.keys + key / kTile * kTile * to.depth + key % kTile;
    for (int64_t word = 0; word < to.depth; word += kLanes) {
      const int64_t at = word * Kind::kValues;
      Words rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        const int64_t token = to.seen[least(key + i, count - 1)];
        rows[i] = load_part<Kind::kValues>(from + token * stride, at, head_dim, Kind::load);
      }
      transpose(rows);
      for (int64_t i = 0; i < least(kLanes, to.depth - word); ++i) {
        std::memcpy(column + (word + i) * kTile, &rows[i], sizeof rows[i]);
      }
    }
  }
}

template <class Kind>
void pack_values(const typename Kind::Value* from, int64_t stride, int64_t head_dim, int64_t count,
                 Scratch<Kind>& to) {
  const auto load = [&](int64_t key, int64_t at) {
    if (key >= count) return Words{};
    return load_part<1>(from + to.seen[key] * stride, at, head_dim, [](const auto* p) { return widen(p); });
  };
  for (int64_t key = 0; key < count; key += Kind::kValues) {
    for (int64_t at = 0; at < to.width; at += kLanes) {
      Words words = load(key, at);
      if constexpr (Kind::kValues == 2) words = words >> 16 | load(key + 1, at);
      std::memcpy(to.values + key / Kind::kValues * to.width + at, &words, sizeof words);
    }
  }
}

// One register tile of c = a b, a by rows. The template arguments count down to `rows` and `panels`.
template <class Kind, int kR = kRows, int kP = kPanels>
void multiply_tile(int64_t rows, int64_t panels, int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b,
                   int64_t b_stride, float* c, int64_t c_stride) {
  if constexpr (kR > 1) {
    if (rows < kR) {
      return multiply_tile<Kind, kR - 1, kP>(rows, panels, depth, a, a_stride, b, b_stride, c, c_stride);
    }
  }
  if constexpr (kP > 1) {
    if (panels < kP) {
      return multiply_tile<Kind, kR, kP - 1>(rows, panels, depth, a, a_stride, b, b_stride, c, c_stride);
    }
  }
  Floats sums[kR][kP] = {};
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Words columns[kP];
#pragma GCC unroll 8
    for (int p = 0; p < kP; ++p) columns[p] = read<Words>(b + p * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      const Words value = a[r * a_stride + k] - Words{};
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

// c = a b: `rows` rows of `columns` (a multiple of kLanes), b in tiles of kTile columns that lie tile_stride apart.
template <class Kind>
void multiply(int64_t rows, int64_t columns, int64_t depth, const uint32_t* a, int64_t a_stride, const uint32_t* b,
              int64_t b_stride, int64_t tile_stride, float* c, int64_t c_stride) {
  for (int64_t column = 0; column < columns; column += kTile, b += tile_stride) {
    for (int64_t row = 0; row < rows; row += kRows) {
      multiply_tile<Kind>(least(kRows, rows - row), least(kPanels, (columns - column) / kLanes), depth,
                          a + row * a_stride, a_stride, b, b_stride, c + row * c_stride + column, c_stride);
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

// Scores of one query to weights exp(scale * (score - largest)), in place; returns their sum.
template <class Kind>
inline float softmax(uint32_t* row, int64_t count, float scale) {
  const Floats infinity = broadcast(__builtin_inff()), log2_scale = broadcast(scale * 1.44269504f);
  Floats largest = -infinity;
  const auto read_scores = [&](int64_t at) { return read<Floats>(row + at) * log2_scale; };
  const auto write_scores = [&](int64_t at, Floats v) {
    largest = maximum(v, largest);
    std::memcpy(row + at, &v, sizeof v);
  };
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) write_scores(at, read_scores(at));
  if (at < count) {
    const Ints here = lane_numbers() < static_cast<int32_t>(count - at);
    write_scores(at, here ? read_scores(at) : -infinity);
  }
  largest = across(largest, maximum);
  Floats sums = {};
  for (at = 0; at < count; at += kLanes) {
    const Floats weights = exp2(read<Floats>(row + at) - largest);
    sums += weights;
    Kind::store_weights(weights, row, at);
  }
  return across(sums, [](Floats a, Floats b) { return a + b; })[0];
}

// The sums of a query, divided by its total, as the output has them.
template <class T>
inline void write_row(const float* sums, float total, int64_t head_dim, T* out) {
  const Floats factor = broadcast(1 / total);
  for (int64_t c = 0; c < head_dim; c += kLanes) {
    const auto values = narrow(read<Floats>(sums + c) * factor, out);
    if (c + kLanes <= head_dim)
      std::memcpy(out + c, &values, sizeof values);
    else
      std::memcpy(out + c, &values, (head_dim - c) * sizeof(T));
  }
}

template <class Kind>
void run(const MaskedAttentionArgs& a, int64_t first_item, int64_t last_item, void* memory) {
  using T = typename Kind::Value;
  Scratch<Kind> scratch(a, memory);
  const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock, model_dim = a.heads * a.head_dim;
  int64_t packed = -1, count = 0;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t head = item / blocks % a.heads, sample = item / blocks / a.heads;
    const T* const queries = static_cast<const T*>(a.qkv) + sample * a.batch_stride + head * a.head_dim;
    if (packed != item / blocks) {
      packed = item / blocks;
      count = 0;
      for (int64_t token = 0; token < a.tokens; ++token) {
        if (!a.key_mask || a.key_mask[sample * a.tokens + token]) scratch.seen[count++] = token;
      }
      pack_keys<Kind>(queries + model_dim, a.token_stride, a.head_dim, count, scratch);
      pack_values<Kind>(queries + 2 * model_dim, a.token_stride, a.head_dim, count, scratch);
    }
    const int64_t start = item % blocks * kQueryBlock, rows = least(kQueryBlock, a.queries - start);
    T* const out = static_cast<T*>(a.out) + (sample * a.queries + start) * model_dim + head * a.head_dim;
    if (count == 0) {
      for (int64_t r = 0; r < rows; ++r) std::memset(out + r * model_dim, 0, a.head_dim * sizeof(T));
      continue;
    }
    for (int64_t r = 0; r < rows; ++r) {
      const T* const query = queries + (a.first_query + start + r) * a.token_stride;
      for (int64_t word = 0; word < scratch.step; word += kLanes) {
        const int64_t at = word * Kind::kValues;
        const Words words = load_part<Kind::kValues>(query, at, a.head_dim, Kind::load);
        std::memcpy(scratch.queries + r * scratch.step + word, &words, sizeof words);
      }
    }
    multiply<Kind>(rows, round_up(count, kLanes), scratch.depth, scratch.queries, scratch.step, scratch.keys, kTile,
                   kTile * scratch.depth, reinterpret_cast<float*>(scratch.scores), scratch.span);
    float totals[kQueryBlock];
    for (int64_t r = 0; r < rows; ++r) {
      totals[r] = softmax<Kind>(scratch.scores + r * scratch.span, count, a.scale);
    }
    multiply<Kind>(rows, scratch.width, (count + Kind::kValues - 1) / Kind::kValues, scratch.scores, scratch.span,
                   scratch.values, scratch.width, kTile, scratch.sums, scratch.width);
    for (int64_t r = 0; r < rows; ++r) {
      write_row(scratch.sums + r * scratch.width, totals[r], a.head_dim, out + r * model_dim);
    }
  }
}

template <class Kind>
int64_t bytes(const MaskedAttentionArgs& a) {
  return Scratch<Kind>(a, nullptr).bytes;
}

int64_t scratch_bytes(const MaskedAttentionArgs& a) {
#if defined(TITOK_ISA_AVX512BF16)
  return bytes<Pairs>(a);
#else
  return bytes<Singles<float>>(a);
#endif
}

void run_items(const MaskedAttentionArgs& a, int64_t first_item, int64_t last_item, void* scratch) {
#if defined(TITOK_ISA_AVX512BF16)
  run<Pairs>(a, first_item, last_item, scratch);
#else
  a.is_bf16 ? run<Singles<BFloat16>>(a, first_item, last_item, scratch)
            : run<Singles<float>>(a, first_item, last_item, scratch);
#endif
}

}  // namespace

extern const MaskedAttentionKernels kMaskedAttention = {scratch_bytes, run_items};

}  // namespace titok::TITOK_ISA
