// Masked attention between two linear layers, without a transposed copy in between: arguments and entry point.
#pragma once

#include <cstdint>

namespace titok {

struct MaskedAttentionArgs {
  // (batch, tokens, 3, heads, head_dim) float32 or bfloat16: queries, keys, values; the last three dimensions dense
  const void* qkv;
  int64_t batch_stride;  // in elements
  int64_t token_stride;
  const bool* key_mask;  // (batch, tokens), true where a key is visible; null where all are
  void* out;             // (batch, queries, heads, head_dim), contiguous, type of qkv; what backward reads
  float* lse;            // (batch, heads, queries) log2(sum(exp(scale * scores))), or null forward
  bool is_bf16;
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t first_query;
  int64_t queries;
  float scale;
  // backward only
  const void* grad;  // of out, its type; heads and their channels dense
  int64_t grad_batch_stride;
  int64_t grad_token_stride;
  void* dqkv;  // gradient of qkv, contiguous; all but the queries that are not among `queries` is written
};

void launch_masked_attention(const MaskedAttentionArgs& args);
void launch_masked_attention_backward(const MaskedAttentionArgs& args);

// One instruction set's; `scratch` belongs to one thread and is aligned to 64 bytes. An item is up to kQueryBlock
// queries of one head, items side by side share the packed keys and values of their head; backward it is a head.
constexpr int64_t kQueryBlock = 48;
struct MaskedAttentionKernels {
  int64_t (*scratch_bytes)(const MaskedAttentionArgs& args);
  void (*run)(const MaskedAttentionArgs& args, int64_t first_item, int64_t last_item, void* scratch);
};
namespace generic {
extern const MaskedAttentionKernels kMaskedAttention, kMaskedAttentionBackward;
}
namespace avx2 {
extern const MaskedAttentionKernels kMaskedAttention, kMaskedAttentionBackward;
}
namespace avx512 {
extern const MaskedAttentionKernels kMaskedAttention, kMaskedAttentionBackward;
}
namespace avx512bf16 {  // multiplies bfloat16 without widening it; an even head_dim only
extern const MaskedAttentionKernels kMaskedAttention, kMaskedAttentionBackward;
}

}  // namespace titok
