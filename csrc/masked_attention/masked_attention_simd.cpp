// The loops of masked_attention forward, compiled once per instruction set.
//
// The visible keys and values of a head are packed once. Then blocks of up to kQueryBlock queries pass: scores,
// softmax and the weighted sum of the values run on one tile of whole rows of scores. The tile fits the
// second-level cache up to about 2,000 tokens. At 4,096 it has 768 KiB, for which the online softmax of
// FlashAttention would still not pay.
#include "masked_attention/masked_attention_tiles.h"

namespace titok::TITOK_ISA {
namespace {

// One thread's memory: the packed head, and a block of queries.
template <class Packing>
struct Scratch {
  int64_t depth;  // words of the channels of a query or a key
  int64_t step;   // words from query to query; step, width and span are multiples of kLanes
  int64_t width;  // words of the channels of a value
  int64_t span;   // words of a row of scores

  int64_t* visible;   // (tokens): indices of the visible tokens
  uint32_t* keys;     // right factor over channels: depth x tokens
  uint32_t* values;   // right factor over tokens: tokens x width
  uint32_t* queries;  // left factor: kQueryBlock x step
  uint32_t* scores;   // kQueryBlock x span: float32 scores, then their weights as a left factor
  float* sums;        // kQueryBlock x width: weighted sums of values
  int64_t bytes;      // of all

  Scratch(const MaskedAttentionArgs& a, void* memory) {
    depth = a.head_dim / Packing::kPerWord;
    step = round_up(depth, kLanes);
    width = round_up(a.head_dim, kLanes);
    span = round_up(a.tokens, kLanes);
    Arena arena{static_cast<char*>(memory)};
    visible = arena.take<int64_t>(span);
    keys = arena.take<uint32_t>(depth * round_up(a.tokens, kTile));
    values = arena.take<uint32_t>(width * round_up(a.tokens, Packing::kPerWord) / Packing::kPerWord);
    queries = arena.take<uint32_t>(step * kQueryBlock);
    scores = arena.take<uint32_t>(span * kQueryBlock);
    sums = arena.take<float>(width * kQueryBlock);
    bytes = arena.used;
  }
};

struct Softmax {
  float largest;  // score * scale / ln 2
  float total;    // sum of the weights
};

// Turns the `count` scores of a query into weights exp(scale * (score - largest score)), in place.
template <class Packing>
inline Softmax softmax(uint32_t* row, int64_t count, float scale) {
  const Floats infinity = broadcast(__builtin_inff()), log2_scale = broadcast(scale * 1.44269504f);
  Floats largest = -infinity;
  const auto read_scores = [&](int64_t at) { return read<Floats>(row + at) * log2_scale; };
  const auto write_scores = [&](int64_t at, Floats v) {
    largest = maximum(v, largest);
    write(row + at, v);
  };
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) write_scores(at, read_scores(at));
  if (at < count) {
    const Ints inside = lane_numbers() < static_cast<int32_t>(count - at);
    write_scores(at, inside ? read_scores(at) : -infinity);
  }
  largest = across(largest, maximum);
  Floats sums = {};
  for (at = 0; at < count; at += kLanes) {
    const Floats weights = exp2_nonpositive(read<Floats>(row + at) - largest);
    sums += weights;
    Packing::store_weights(weights, row, at);
  }
  return {largest[0], across(sums, add)[0]};
}

template <class Packing>
void run(const MaskedAttentionArgs& a, int64_t first_item, int64_t last_item, void* memory) {
  using T = typename Packing::Value;
  constexpr int kPerWord = Packing::kPerWord;
  Scratch<Packing> scratch(a, memory);
  const int64_t blocks = (a.queries + kQueryBlock - 1) / kQueryBlock, model_dim = a.heads * a.head_dim;
  int64_t packed_head = -1, count = 0;  // count: visible tokens
  for (int64_t item = first_item; item < last_item; ++item) {
    const int64_t head = item / blocks % a.heads, sample = item / blocks / a.heads;
    const T* const queries = static_cast<const T*>(a.qkv) + sample * a.batch_stride + head * a.head_dim;
    if (packed_head != item / blocks) {
      packed_head = item / blocks;
      count = list_visible(a, sample, scratch.visible);
      const T *const keys = queries + model_dim, *const values = queries + 2 * model_dim;
      pack_right_over_channels<Packing>({keys, a.token_stride, a.head_dim, count, scratch.visible}, scratch.keys);
      pack_right_over_tokens<Packing>({values, a.token_stride, a.head_dim, count, scratch.visible}, scratch.width,
                                      scratch.values);
    }
    const int64_t start = item % blocks * kQueryBlock, rows = least(kQueryBlock, a.queries - start);
    T* const out = static_cast<T*>(a.out) + (sample * a.queries + start) * model_dim + head * a.head_dim;
    if (count == 0) {
      for (int64_t r = 0; r < rows; ++r) std::memset(out + r * model_dim, 0, a.head_dim * sizeof(T));
      continue;
    }
    const T* const first = queries + (a.first_query + start) * a.token_stride;
    pack_left<Packing>({first, a.token_stride, a.head_dim, rows, nullptr}, scratch.step, scratch.queries);
    multiply<Packing>(rows, round_up(count, kLanes), scratch.depth, scratch.queries, scratch.step, scratch.keys,
                      kTile, kTile * scratch.depth, reinterpret_cast<float*>(scratch.scores), scratch.span);
    float totals[kQueryBlock];
    for (int64_t r = 0; r < rows; ++r) {
      for (int part = 0; part < 3; ++part)
        prefetch_next_head(first + r * a.token_stride + part * model_dim, a.head_dim);
      const Softmax row = softmax<Packing>(scratch.scores + r * scratch.span, count, a.scale);
      totals[r] = row.total;
      if (a.lse)
        a.lse[(sample * a.heads + head) * a.queries + start + r] = row.largest + __builtin_log2f(row.total);
    }
    multiply<Packing>(rows, scratch.width, (count + kPerWord - 1) / kPerWord, scratch.scores, scratch.span,
                      scratch.values, scratch.width, kTile, scratch.sums, scratch.width);
    for (int64_t r = 0; r < rows; ++r) {
      write_row(scratch.sums + r * scratch.width, 1 / totals[r], a.head_dim, out + r * model_dim);
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

titok::MaskedAttentionKernel titok::masked_attention_kernel(TITOK_ISA::ThisIsa) {
  return {TITOK_ISA::scratch_bytes, TITOK_ISA::run_for_dtype};
}
