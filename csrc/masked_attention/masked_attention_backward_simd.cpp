// The loops of masked_attention backward, compiled once per instruction set (Dao 2023, "FlashAttention-2",
// algorithm 2, with whole rows of scores).
//
// With scores S = Q K^T, weights P = 2^(S * scale / ln 2 - lse), gradient dO of the output O, and D = sum(dO * O)
// for each query:
//
//   dV = P^T dO    dP = dO V^T    dS = P * (dP - D)    dQ = scale dS K    dK = scale dS^T Q
//
// The visible keys and values of a head are packed once. Then blocks of queries pass. The tiles of whole rows of S
// and dP fit the second-level cache up to about 1,000 tokens. Each block adds to dK and dV of the head, in float32
// and in a fixed order.
#include "masked_attention/masked_attention_tiles.h"

namespace titok::TITOK_ISA {
namespace {

constexpr int64_t kMaxBlock = 96;  // queries of a block; even

// One thread's memory: the packed head, a block of queries with its tiles, and the gradients of the head.
template <class Packing>
struct Scratch {
  int64_t depth;  // words of the channels of a token
  int64_t step;   // words from query to query; step and width are multiples of kLanes
  int64_t width;  // channels of a row of sums
  int64_t span;   // words of a row of scores: an odd number of cache lines, because columns are read too
  int64_t block;  // queries of a block

  int64_t* visible;            // (tokens): indices of the visible tokens
  uint32_t* keys;              // right factor over channels: depth x tokens
  uint32_t* values;            // right factor over channels: depth x tokens
  uint32_t* keys_by_token;     // right factor over tokens: tokens x width
  uint32_t* queries;           // left factor: block x step
  uint32_t* grads;             // of the output; left factor: block x step
  uint32_t* queries_by_token;  // right factor over tokens: block x width
  uint32_t* grads_by_token;    // right factor over tokens: block x width
  uint32_t* scores;            // block x span: S, then what store_gradients leaves
  uint32_t* slopes;            // block x span: dP, then what store_gradients leaves
  float* dq;                   // block x width
  float* dk;                   // tokens x width
  float* dv;                   // tokens x width
  int64_t bytes;               // of all

  Scratch(const MaskedAttentionArgs& a, void* memory) {
    depth = a.head_dim / Packing::kPerWord;
    step = round_up(depth, kLanes);
    width = round_up(a.head_dim, kLanes);
    span = ((a.tokens + 15) / 16 | 1) * 16;
    const int64_t most = span > 1024 ? kMaxBlock / 2 : kMaxBlock, blocks = (a.queries + most - 1) / most;
    block = round_up((a.queries + blocks - 1) / blocks, kRows);
    Arena arena{static_cast<char*>(memory)};
    visible = arena.take<int64_t>(a.tokens);
    keys = arena.take<uint32_t>(depth * round_up(a.tokens, kTile));
    values = arena.take<uint32_t>(depth * round_up(a.tokens, kTile));
    keys_by_token = arena.take<uint32_t>(width * round_up(a.tokens, Packing::kPerWord) / Packing::kPerWord);
    queries = queries_by_token = arena.take<uint32_t>(step * block);
    grads = grads_by_token = arena.take<uint32_t>(step * block);
    if (Packing::kPerWord > 1) {  // with one value a word both packings are the same
      queries_by_token = arena.take<uint32_t>(width * block / Packing::kPerWord);
      grads_by_token = arena.take<uint32_t>(width * block / Packing::kPerWord);
    }
    scores = arena.take<uint32_t>(span * block);
    slopes = arena.take<uint32_t>(span * block);
    dq = arena.take<float>(width * block);
    dk = arena.take<float>(width * a.tokens);
    dv = arena.take<float>(width * a.tokens);
    bytes = arena.used;
  }
};

// Stores P and dS of kLanes keys, k = at, at + 1, ..., and of kPerWord neighbouring queries over their S and dP.
//
// One value a word, query q:
//
//   row q of scores    S(q, k)         becomes   P(q, k)
//   row q of slopes    dP(q, k)        becomes   dS(q, k)
//
// Two values a word, queries q and q + 1. [x, y] is one word with x in its lower half. The sums over queries (dV
// and dK) need words of neighbouring queries, the sum over keys (dQ) words of neighbouring keys:
//
//   row q of scores        S(q, k)         becomes   [P(q, k), P(q + 1, k)]             for dV
//   row q + 1 of scores    S(q + 1, k)     becomes   [dS(q, k), dS(q + 1, k)]           for dK
//   row q of slopes        dP(q, k)        becomes   [dS(q, k), dS(q, k + 1)]           for dQ, half as many words
//   row q + 1 of slopes    dP(q + 1, k)    becomes   [dS(q + 1, k), dS(q + 1, k + 1)]   for dQ, half as many words
//
// Args: scores, slopes: row q. span: words from row to row.
template <class T>
inline void store_gradients(Float32Packing<T>, const Floats (&weights)[1], const Floats (&slopes_of)[1],
                            uint32_t* scores, uint32_t* slopes, int64_t, int64_t at) {
  write(scores + at, weights[0]);
  write(slopes + at, slopes_of[0]);
}

#if defined(TITOK_ISA_AVX512BF16)
inline void store_gradients(BFloat16PairPacking, const Floats (&weights)[2], const Floats (&slopes_of)[2],
                            uint32_t* scores, uint32_t* slopes, int64_t span, int64_t at) {
  typedef uint16_t TwoHalves __attribute__((vector_size(kLanes * 4)));
  TwoHalves interleave;
  for (int k = 0; k < 2 * kLanes; ++k) interleave[k] = k / 2 + k % 2 * kLanes;
  // The first kLanes values are of query q, the others of query q + 1.
  const auto p = bit_cast<TwoHalves>(_mm512_cvtne2ps_pbh((__m512)weights[1], (__m512)weights[0]));
  const auto ds = bit_cast<TwoHalves>(_mm512_cvtne2ps_pbh((__m512)slopes_of[1], (__m512)slopes_of[0]));
  write(scores + at, __builtin_shuffle(p, interleave));
  write(scores + span + at, __builtin_shuffle(ds, interleave));
  std::memcpy(slopes + at / 2, &ds, sizeof ds / 2);
  std::memcpy(slopes + span + at / 2, reinterpret_cast<const char*>(&ds) + sizeof ds / 2, sizeof ds / 2);
}
#endif

// S and dP of a block to P and dS, in place. Beside the last of an odd number of queries a query of zeros is
// stored.
//
// Args: rows: queries. count: keys. lse, delta: of each query; delta is D above.
template <class Packing>
void differentiate(const Scratch<Packing>& tile, int64_t rows, int64_t count, float scale, const float* lse,
                   const float* delta) {
  constexpr int kPerWord = Packing::kPerWord;
  const Floats log2_scale = broadcast(scale * 1.44269504f);
  for (int64_t row = 0; row < rows; row += kPerWord) {
    uint32_t* const scores = tile.scores + row * tile.span;
    uint32_t* const slopes = tile.slopes + row * tile.span;
    for (int64_t at = 0; at < count; at += kLanes) {
      Floats p[kPerWord] = {}, ds[kPerWord] = {};
#pragma GCC unroll 2
      for (int i = 0; i < kPerWord; ++i) {
        if (row + i == rows) break;
        const int64_t place = i * tile.span + at;
        p[i] = exp2_nonpositive(fma(read<Floats>(scores + place), log2_scale, broadcast(-lse[row + i])));
        ds[i] = p[i] * (read<Floats>(slopes + place) - broadcast(delta[row + i]));
      }
      store_gradients(Packing{}, p, ds, scores, slopes, tile.span, at);
    }
  }
}

template <class T>
inline float dot(const T* a, const T* b, int64_t head_dim) {
  const auto load = [&](const T* head, int64_t at) {
    return bit_cast<Floats>(widen_to_words(read_part<Stored<T>>(head, at, head_dim)));
  };
  Floats sums = {};
  for (int64_t at = 0; at < head_dim; at += kLanes) sums = fma(load(a, at), load(b, at), sums);
  return across(sums, add)[0];
}

template <class Packing>
void run(const MaskedAttentionArgs& a, int64_t first_item, int64_t last_item, void* memory) {
  using T = typename Packing::Value;
  constexpr int kPerWord = Packing::kPerWord;
  const Scratch<Packing> scratch(a, memory);
  const int64_t model_dim = a.heads * a.head_dim, row_dim = 3 * model_dim;
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t sample = item / a.heads, head = item % a.heads;
    const T* const qkv = static_cast<const T*>(a.qkv) + sample * a.batch_stride + head * a.head_dim;
    const T* const all_grads = static_cast<const T*>(a.grad) + sample * a.grad_batch_stride + head * a.head_dim;
    const T* const out = static_cast<const T*>(a.out) + sample * a.queries * model_dim + head * a.head_dim;
    T* const dqkv = static_cast<T*>(a.dqkv) + sample * a.tokens * row_dim + head * a.head_dim;
    T* const all_dq = dqkv + a.first_query * row_dim;
    const float* const lse = a.lse + item * a.queries;
    const int64_t count = list_visible(a, sample, scratch.visible);
    const Tokens<T> keys{qkv + model_dim, a.token_stride, a.head_dim, count, scratch.visible};
    const Tokens<T> values{qkv + 2 * model_dim, a.token_stride, a.head_dim, count, scratch.visible};
    pack_right_over_channels<Packing>(keys, scratch.keys);
    pack_right_over_tokens<Packing>(keys, scratch.width, scratch.keys_by_token);
    pack_right_over_channels<Packing>(values, scratch.values);
    for (int64_t start = 0; start < a.queries; start += scratch.block) {
      const int64_t rows = least(scratch.block, a.queries - start);
      T* const dq = all_dq + start * row_dim;
      if (count == 0) {
        for (int64_t r = 0; r < rows; ++r) std::memset(dq + r * row_dim, 0, a.head_dim * sizeof(T));
        continue;
      }
      const Tokens<T> queries{qkv + (a.first_query + start) * a.token_stride, a.token_stride, a.head_dim, rows,
                              nullptr};
      const Tokens<T> grads{all_grads + start * a.grad_token_stride, a.grad_token_stride, a.head_dim, rows,
                            nullptr};
      pack_left<Packing>(queries, scratch.step, scratch.queries);
      pack_left<Packing>(grads, scratch.step, scratch.grads);
      if (kPerWord > 1) {
        pack_right_over_tokens<Packing>(queries, scratch.width, scratch.queries_by_token);
        pack_right_over_tokens<Packing>(grads, scratch.width, scratch.grads_by_token);
      }
      const auto multiply_over_channels = [&](const uint32_t* left, const uint32_t* right, uint32_t* to) {
        multiply<Packing>(rows, round_up(count, kLanes), scratch.depth, left, scratch.step, right, kTile,
                          kTile * scratch.depth, reinterpret_cast<float*>(to), scratch.span);
      };
      multiply_over_channels(scratch.queries, scratch.keys, scratch.scores);
      multiply_over_channels(scratch.grads, scratch.values, scratch.slopes);
      float delta[kMaxBlock];
      for (int64_t r = 0; r < rows; ++r) {
        delta[r] = dot(grads[r], out + (start + r) * model_dim, a.head_dim);
        prefetch_next_head(grads[r], a.head_dim);
        prefetch_next_head(out + (start + r) * model_dim, a.head_dim);
        prefetch_next_head(queries[r], a.head_dim);
      }
      differentiate<Packing>(scratch, rows, count, a.scale, lse + start, delta);
      multiply<Packing>(rows, scratch.width, (count + kPerWord - 1) / kPerWord, scratch.slopes, scratch.span,
                        scratch.keys_by_token, scratch.width, kTile, scratch.dq, scratch.width);
      for (int64_t r = 0; r < rows; ++r) {
        write_row(scratch.dq + r * scratch.width, a.scale, a.head_dim, dq + r * row_dim);
        prefetch_next_head(dq + r * row_dim, a.head_dim);
        prefetch_next_head(queries[r] + model_dim, a.head_dim);
        prefetch_next_head(queries[r] + 2 * model_dim, a.head_dim);
      }
      const auto multiply_over_queries = [&](const uint32_t* left, const uint32_t* right, float* to) {
        multiply<Packing, true>(count, scratch.width, (rows + kPerWord - 1) / kPerWord, left,
                                kPerWord * scratch.span, right, scratch.width, kTile, to, scratch.width,
                                start > 0);
      };
      const uint32_t* const slopes_by_query = kPerWord > 1 ? scratch.scores + scratch.span : scratch.slopes;
      multiply_over_queries(scratch.scores, scratch.grads_by_token, scratch.dv);
      multiply_over_queries(slopes_by_query, scratch.queries_by_token, scratch.dk);
    }
    for (int64_t token = 0, i = 0; token < a.tokens; ++token) {
      T *const dk = dqkv + token * row_dim + model_dim, *const dv = dk + model_dim;
      prefetch_next_head(dk, a.head_dim);
      prefetch_next_head(dv, a.head_dim);
      if (i < count && scratch.visible[i] == token) {
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
  return with_packing(a, [&](auto packing) { return Scratch<decltype(packing)>(a, nullptr).bytes; });
}

void run_for_dtype(const MaskedAttentionArgs& a, int64_t first_item, int64_t last_item, void* scratch) {
  with_packing(a, [&](auto packing) { run<decltype(packing)>(a, first_item, last_item, scratch); });
}

}  // namespace
}  // namespace titok::TITOK_ISA

titok::MaskedAttentionKernel titok::masked_attention_backward_kernel(TITOK_ISA::ThisIsa) {
  return {TITOK_ISA::scratch_bytes, TITOK_ISA::run_for_dtype};
}
