// Masked attention (Vaswani et al. 2017, equation 1) from the output of one linear layer to the input of the next,
// without transposed copies: arguments and entry points.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace titok {

// Tensors are of `dtype`, float32 or bfloat16, unless said otherwise. Strides are in elements.
struct MaskedAttentionArgs {
  const void* qkv;          // (batch, tokens, 3, heads, head_dim): queries, keys, values; the last three dimensions dense
  int64_t batch_stride;     // of qkv
  int64_t token_stride;     // of qkv
  const uint8_t* key_mask;  // (batch, tokens) bool, nonzero where a key is visible, contiguous; null: all are
  void* out;                // (batch, queries, heads, head_dim), contiguous; output of forward, input of backward
  // (batch, heads, queries) float32, contiguous: log2 of the sum over visible keys of 2^(score * scale / ln 2). Output of
  // forward, where it may be null; input of backward. Undefined for samples without a visible key.
  float* lse;
  DType dtype;
  int64_t batch;
  int64_t tokens;
  int64_t heads;
  int64_t head_dim;
  int64_t first_query;  // the queries are tokens [first_query, first_query + queries)
  int64_t queries;
  float scale;  // factor of the scores

  // Of backward only.
  const void* grad;           // (batch, queries, heads, head_dim): gradient of out; the last two dimensions dense
  int64_t grad_batch_stride;  // of grad
  int64_t grad_token_stride;  // of grad
  void* dqkv;  // (batch, tokens, 3, heads, head_dim), contiguous, output; the queries of other tokens are not written
};

void launch_masked_attention(const MaskedAttentionArgs& args);
void launch_masked_attention_backward(const MaskedAttentionArgs& args);

// One direction of one instruction set. An item is a piece of work for one thread: forward up to kQueryBlock queries of
// one head of one sample, in the order (sample, head, block), backward one head of one sample.
constexpr int64_t kQueryBlock = 48;
struct MaskedAttentionKernel {
  int64_t (*scratch_bytes)(const MaskedAttentionArgs& args);  // for one thread
  // `scratch` is aligned to a cache line.
  void (*run)(const MaskedAttentionArgs& args, int64_t first_item, int64_t last_item, void* scratch);
};
MaskedAttentionKernel masked_attention_kernel(Generic);
MaskedAttentionKernel masked_attention_kernel(Avx2);
MaskedAttentionKernel masked_attention_kernel(Avx512);
MaskedAttentionKernel masked_attention_kernel(Avx512Bf16);  // for bfloat16 and an even head_dim only
MaskedAttentionKernel masked_attention_backward_kernel(Generic);
MaskedAttentionKernel masked_attention_backward_kernel(Avx2);
MaskedAttentionKernel masked_attention_backward_kernel(Avx512);
MaskedAttentionKernel masked_attention_backward_kernel(Avx512Bf16);

}  // namespace titok
