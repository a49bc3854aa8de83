// The loops of masked_attention backward, compiled once per instruction set (Dao 2023, algorithm 2, with whole rows).
// Of scores S = q k^T, weights P = 2^(S * scale / ln 2 - lse), gradient dO and D = sum(dO * out) per query:
//
//   dV = P^T dO,  dP = dO V^T,  dS = P * (dP - D),  dQ = scale dS K,  dK = scale dS^T Q
//
// A head's visible keys and values are packed once; then blocks of queries pass, whose tiles of whole rows of S and dP
// lie in the second cache up to some 1,000 tokens, and add to dK and dV of the head, in float32 and in one order.
#include "masked_attention/masked_attention_tiles.h"

namespace titok::TITOK_ISA {
namespace {

constexpr int64_t kBlock = 96;  // at most so many queries in a block; even

// One thread's: what is packed of a head and of a block of queries, its tiles, and the gradients of the head.
template <class Kind>
struct Scratch {
  int64_t depth;  // words of a token
  int64_t step;   // words from packed query to query; a multiple of kLanes, as is the width
  int64_t width;  // channels of a row of sums
  int64_t span;   // words of a row of scores, in an odd number of cache lines: columns are read too
  int64_t block;  // queries
  int64_t* seen;  // visible tokens
  uint32_t *keys, *values, *keys_by_token;
  uint32_t *queries, *grads, *queries_by_token, *grads_by_token;  // grads: of the output
  uint32_t *scores, *slopes;                                      // S, then P; dP, then dS
  float *dq, *dk, *dv;
  int64_t bytes;

  Scratch(const MaskedAttentionArgs& a, void* memory) {
    depth = a.head_dim / Kind::kValues;
    step = round_up(depth, kLanes);
    width = round_up(a.head_dim, kLanes);
    span = ((a.tokens + 15) / 16 | 1) * 16;
    const int64_t most = span > 1024 ? kBlock / 2 : kBlock, blocks = (a.queries + most - 1) / most;
    block = round_up((a.queries + blocks - 1) / blocks, kRows);
    Arena arena{static_cast<char*>(memory)};
    seen = arena.take<int64_t>(a.tokens);
    keys = arena.take<uint32_t>(depth * round_up(a.tokens, kTile));
    values = arena.take<uint32_t>(depth * round_up(a.tokens, kTile));
    keys_by_token = arena.take<uint32_t>(width * round_up(a.tokens, Kind::kValues) / Kind::kValues);
    queries = queries_by_token = arena.take<uint32_t>(step * block);
    grads = grads_by_token = arena.take<uint32_t>(step * block);
    if (Kind::kValues > 1) {  // with single words, rows and sums are packed the same way
      queries_by_token = arena.take<uint32_t>(width * block / Kind::kValues);
      grads_by_token = arena.take<uint32_t>(width * block / Kind::kValues);
    }
    scores = arena.take<uint32_t>(span * block);
    slopes = arena.take<uint32_t>(span * block);
    dq = arena.take<float>(width * block);
    dk = arena.take<float>(width * a.tokens);
    dv = arena.take<float>(width * a.tokens);
    bytes = arena.next - static_cast<char*>(memory);
  }
};

// Keeps P and dS of a vector of keys and of kValues queries, in place, as words of neighbouring queries and dS as words
// of neighbouring keys too. Single words: that is one. Pairs: the row of P's pairs takes the place of the first query's
// scores, that of dS's pairs the place of the second one's.
template <class T>
inline void keep(Singles<T>, const Floats (&weights)[1], const Floats (&slopes)[1], uint32_t* to_scores,
                 uint32_t* to_slopes, int64_t, int64_t at) {
  std::memcpy(to_scores + at, weights, sizeof weights);
  std::memcpy(to_slopes + at, slopes, sizeof slopes);
}

#if defined(TITOK_ISA_AVX512BF16)
inline void keep(Pairs, const Floats (&weights)[2], const Floats (&slopes)[2], uint32_t* to_scores,
                 uint32_t* to_slopes, int64_t span, int64_t at) {
  typedef uint16_t TwoHalves __attribute__((vector_size(kLanes * 4)));
  TwoHalves turns;
  for (int k = 0; k < 2 * kLanes; ++k) turns[k] = k / 2 + k % 2 * kLanes;
  const auto p = as<TwoHalves>(_mm512_cvtne2ps_pbh((__m512)weights[1], (__m512)weights[0]));
  const auto ds = as<TwoHalves>(_mm512_cvtne2ps_pbh((__m512)slopes[1], (__m512)slopes[0]));
  const TwoHalves p_pairs = __builtin_shuffle(p, turns), ds_pairs = __builtin_shuffle(ds, turns);
  std::memcpy(to_scores + at, &p_pairs, sizeof p_pairs);
  std::memcpy(to_scores + span + at, &ds_pairs, sizeof ds_pairs);
  std::memcpy(to_slopes + at / 2, &ds, sizeof ds / 2);
  std::memcpy(to_slopes + span + at / 2, reinterpret_cast<const char*>(&ds) + sizeof ds / 2, sizeof ds / 2);
}
#endif

// S and dP of a block to P and dS, in place. A query past the end counts as one of zeros.
template <class Kind>
void differentiate(const Scratch<Kind>& tile, int64_t rows, int64_t count, float scale, const float* lse,
                   const float* delta) {
  constexpr int kValues = Kind::kValues;
  const Floats log2_scale = broadcast(scale * 1.44269504f);
  for (int64_t row = 0; row < rows; row += kValues) {
    uint32_t* const scores = tile.scores + row * tile.span;
    uint32_t* const slopes = tile.slopes + row * tile.span;
    for (int64_t at = 0; at < count; at += kLanes) {
      Floats p[kValues] = {}, ds[kValues] = {};
#pragma GCC unroll 2
      for (int i = 0; i < kValues; ++i) {
        if (row + i == rows) break;
        const int64_t place = i * tile.span + at;
        p[i] = exp2(fma(read<Floats>(scores + place), log2_scale, broadcast(-lse[row + i])));
        ds[i] = p[i] * (read<Floats>(slopes + place) - broadcast(delta[row + i]));
      }
      keep(Kind{}, p, ds, scores, slopes, tile.span, at);
    }
  }
}

template <class T>
inline float dot(const T* a, const T* b, int64_t head_dim) {
  const auto load = [&](const T* head, int64_t at) {
    return as<Floats>(widen(read_part<Stored<T>>(head, at, head_dim)));
  };
  Floats sums = {};
  for (int64_t at = 0; at < head_dim; at += kLanes) sums = fma(load(a, at), load(b, at), sums);
  return across(sums, [](Floats x, Floats y) { return x + y; })[0];
}

template <class Kind>
void run(const MaskedAttentionArgs& a, int64_t first_item, int64_t last_item, void* memory) {
  using T = typename Kind::Value;
  const Scratch<Kind> scratch(a, memory);
  const int64_t model_dim = a.heads * a.head_dim, row_dim = 3 * model_dim;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t sample = item / a.heads, head = item % a.heads;
    const T* const qkv = static_cast<const T*>(a.qkv) + sample * a.batch_stride + head * a.head_dim;
    const T* const all_grads = static_cast<const T*>(a.grad) + sample * a.grad_batch_stride + head * a.head_dim;
    const T* const out = static_cast<const T*>(a.out) + sample * a.queries * model_dim + head * a.head_dim;
    T* const dqkv = static_cast<T*>(a.dqkv) + sample * a.tokens * row_dim + head * a.head_dim;
    T* const all_dq = dqkv + a.first_query * row_dim;
    const float* const lse = a.lse + item * a.queries;
    const int64_t count = list_visible(a, sample, scratch.seen);
    const Tokens<T> keys{qkv + model_dim, a.token_stride, a.head_dim, count, scratch.seen};
    pack_columns<Kind>(keys, scratch.keys);
    pack_sums<Kind>(keys, scratch.width, scratch.keys_by_token);
    pack_columns<Kind>({qkv + 2 * model_dim, a.token_stride, a.head_dim, count, scratch.seen}, scratch.values);
    for (int64_t start = 0; start < a.queries; start += scratch.block) {
      const int64_t rows = least(scratch.block, a.queries - start);
      T* const dq = all_dq + start * row_dim;
      if (count == 0) {
        for (int64_t r = 0; r < rows; ++r) std::memset(dq + r * row_dim, 0, a.head_dim * sizeof(T));
        continue;
      }
      const Tokens<T> queries{qkv + (a.first_query + start) * a.token_stride, a.token_stride, a.head_dim, rows,
                              nullptr};
      const Tokens<T> grads{all_grads + start * a.grad_token_stride, a.grad_token_stride, a.head_dim, rows, nullptr};
      pack_rows<Kind>(queries, scratch.step, scratch.queries);
      pack_rows<Kind>(grads, scratch.step, scratch.grads);
      if (Kind::kValues > 1) {
        pack_sums<Kind>(queries, scratch.width, scratch.queries_by_token);
        pack_sums<Kind>(grads, scratch.width, scratch.grads_by_token);
      }
      const auto over_channels = [&](const uint32_t* left, const uint32_t* right, uint32_t* to) {
        multiply<Kind>(rows, round_up(count, kLanes), scratch.depth, left, scratch.step, right, kTile,
                       kTile * scratch.depth, reinterpret_cast<float*>(to), scratch.span);
      };
      over_channels(scratch.queries, scratch.keys, scratch.scores);
      over_channels(scratch.grads, scratch.values, scratch.slopes);
      float delta[kBlock];
      for (int64_t r = 0; r < rows; ++r) {
        delta[r] = dot(grads[r], out + (start + r) * model_dim, a.head_dim);
        fetch_next_head(grads[r], a.head_dim);
        fetch_next_head(out + (start + r) * model_dim, a.head_dim);
        fetch_next_head(queries[r], a.head_dim);
      }
      differentiate<Kind>(scratch, rows, count, a.scale, lse + start, delta);
      multiply<Kind>(rows, scratch.width, (count + Kind::kValues - 1) / Kind::kValues, scratch.slopes, scratch.span,
                     scratch.keys_by_token, scratch.width, kTile, scratch.dq, scratch.width);
      for (int64_t r = 0; r < rows; ++r) {
        write_row(scratch.dq + r * scratch.width, a.scale, a.head_dim, dq + r * row_dim);
        fetch_next_head(dq + r * row_dim, a.head_dim);
        fetch_next_head(queries[r] + model_dim, a.head_dim);
        fetch_next_head(queries[r] + 2 * model_dim, a.head_dim);
      }
      const auto over_queries = [&](const uint32_t* left, const uint32_t* right, float* to) {
        multiply<Kind, true>(count, scratch.width, (rows + Kind::kValues - 1) / Kind::kValues, left,
                             Kind::kValues * scratch.span, right, scratch.width, kTile, to, scratch.width, start > 0);
      };
      over_queries(scratch.scores, scratch.grads_by_token, scratch.dv);
      over_queries(Kind::kValues > 1 ? scratch.scores + scratch.span : scratch.slopes, scratch.queries_by_token,
                   scratch.dk);
    }
    for (int64_t token = 0, i = 0; token < a.tokens; ++token) {
      T *const dk = dqkv + token * row_dim + model_dim, *const dv = dk + model_dim;
      fetch_next_head(dk, a.head_dim);
      fetch_next_head(dv, a.head_dim);
      if (i < count && scratch.seen[i] == token) {
        write_row(scratch.dk + i * scratch.width, a.scale, a.head_dim, dk);
        write_row(scratch.dv + i * scratch.width, 1, a.head_dim, dv);
        ++i;
      } else {
        std::memset(dk, 0, a.head_dim * sizeof(T));
        std::memset(dv, 0, a.head_dim * sizeof(T));
      }
    }
  }
}

int64_t scratch_bytes(const MaskedAttentionArgs& a) {
  return with_kind(a, [&](auto kind) { return Scratch<decltype(kind)>(a, nullptr).bytes; });
}

void run_items(const MaskedAttentionArgs& a, int64_t first_item, int64_t last_item, void* scratch) {
  with_kind(a, [&](auto kind) { run<decltype(kind)>(a, first_item, last_item, scratch); });
}

}  // namespace

extern const MaskedAttentionKernels kMaskedAttentionBackward = {scratch_bytes, run_items};

}  // namespace titok::TITOK_ISA
