// The loops of masked_attention forward, compiled once per instruction set. A head's visible keys and values are packed
// once; then, for a block of queries, scores, softmax and the weighted sum of the values run on one tile of whole rows of
// scores, which the second cache holds up to some 2,000 tokens; at 4,096 it is 768 KiB, still no reason to go online.
#include "masked_attention/masked_attention_tiles.h"

namespace titok::TITOK_ISA {
namespace {

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
    Arena arena{static_cast<char*>(memory)};
    seen = arena.take<int64_t>(span);
    keys = arena.take<uint32_t>(depth * round_up(a.tokens, kTile));
    values = arena.take<uint32_t>(width * round_up(a.tokens, Kind::kValues) / Kind::kValues);
    queries = arena.take<uint32_t>(step * kQueryBlock);
    scores = arena.take<uint32_t>(span * kQueryBlock);
    sums = arena.take<float>(width * kQueryBlock);
    bytes = arena.next - static_cast<char*>(memory);
  }
};

struct Softmax {
  float largest;  // score, times scale / ln 2
  float total;    // of the weights
};

// Scores of one query to weights exp(scale * (score - largest)), in place.
template <class Kind>
inline Softmax softmax(uint32_t* row, int64_t count, float scale) {
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
  return {largest[0], across(sums, [](Floats a, Floats b) { return a + b; })[0]};
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
      count = list_visible(a, sample, scratch.seen);
      pack_columns<Kind>({queries + model_dim, a.token_stride, a.head_dim, count, scratch.seen}, scratch.keys);
      pack_sums<Kind>({queries + 2 * model_dim, a.token_stride, a.head_dim, count, scratch.seen}, scratch.width,
                      scratch.values);
    }
    const int64_t start = item % blocks * kQueryBlock, rows = least(kQueryBlock, a.queries - start);
    T* const out = static_cast<T*>(a.out) + (sample * a.queries + start) * model_dim + head * a.head_dim;
    if (count == 0) {
      for (int64_t r = 0; r < rows; ++r) std::memset(out + r * model_dim, 0, a.head_dim * sizeof(T));
      continue;
    }
    const T* const first = queries + (a.first_query + start) * a.token_stride;
    pack_rows<Kind>({first, a.token_stride, a.head_dim, rows, nullptr}, scratch.step, scratch.queries);
    multiply<Kind>(rows, round_up(count, kLanes), scratch.depth, scratch.queries, scratch.step, scratch.keys, kTile,
                   kTile * scratch.depth, reinterpret_cast<float*>(scratch.scores), scratch.span);
    float totals[kQueryBlock];
    for (int64_t r = 0; r < rows; ++r) {
      for (int part = 0; part < 3; ++part) fetch_next_head(first + r * a.token_stride + part * model_dim, a.head_dim);
      const Softmax row = softmax<Kind>(scratch.scores + r * scratch.span, count, a.scale);
      totals[r] = row.total;
      if (a.lse) a.lse[(sample * a.heads + head) * a.queries + start + r] = row.largest + __builtin_log2f(row.total);
    }
    multiply<Kind>(rows, scratch.width, (count + Kind::kValues - 1) / Kind::kValues, scratch.scores, scratch.span,
                   scratch.values, scratch.width, kTile, scratch.sums, scratch.width);
    for (int64_t r = 0; r < rows; ++r) {
      write_row(scratch.sums + r * scratch.width, 1 / totals[r], a.head_dim, out + r * model_dim);
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

extern const MaskedAttentionKernels kMaskedAttention = {scratch_bytes, run_items};

}  // namespace titok::TITOK_ISA
