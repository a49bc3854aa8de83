// titok._C.masked_attention and its backward: addresses, strides and sizes in, nothing out.
// titok/ops/masked_attention.py checks them.
#include <pybind11/pybind11.h>

#include "masked_attention.h"
#include "module.h"

namespace py = pybind11;

namespace titok {
namespace {

// What both directions take.
MaskedAttentionArgs common(uintptr_t qkv, int64_t batch_stride, int64_t token_stride, uintptr_t key_mask, uintptr_t out,
                           uintptr_t lse, bool is_bf16, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
                           int64_t first_query, int64_t queries, float scale) {
  MaskedAttentionArgs args{};
  args.qkv = reinterpret_cast<const void*>(qkv);
  args.batch_stride = batch_stride;
  args.token_stride = token_stride;
  args.key_mask = reinterpret_cast<const bool*>(key_mask);
  args.out = reinterpret_cast<void*>(out);
  args.lse = reinterpret_cast<float*>(lse);
  args.is_bf16 = is_bf16;
  args.batch = batch;
  args.tokens = tokens;
  args.heads = heads;
  args.head_dim = head_dim;
  args.first_query = first_query;
  args.queries = queries;
  args.scale = scale;
  return args;
}

void forward(uintptr_t qkv, int64_t batch_stride, int64_t token_stride, uintptr_t key_mask, uintptr_t out,
             uintptr_t lse, bool is_bf16, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
             int64_t first_query, int64_t queries, float scale) {
  launch_masked_attention(common(qkv, batch_stride, token_stride, key_mask, out, lse, is_bf16, batch, tokens, heads,
                                 head_dim, first_query, queries, scale));
}

void backward(uintptr_t qkv, int64_t batch_stride, int64_t token_stride, uintptr_t key_mask, uintptr_t out,
              uintptr_t lse, bool is_bf16, int64_t batch, int64_t tokens, int64_t heads, int64_t head_dim,
              int64_t first_query, int64_t queries, float scale, uintptr_t grad, int64_t grad_batch_stride,
              int64_t grad_token_stride, uintptr_t dqkv) {
  MaskedAttentionArgs args = common(qkv, batch_stride, token_stride, key_mask, out, lse, is_bf16, batch, tokens, heads,
                                    head_dim, first_query, queries, scale);
  args.grad = reinterpret_cast<const void*>(grad);
  args.grad_batch_stride = grad_batch_stride;
  args.grad_token_stride = grad_token_stride;
  args.dqkv = reinterpret_cast<void*>(dqkv);
  launch_masked_attention_backward(args);
}

}  // namespace

void bind_masked_attention(py::module_& m) {
  m.def("masked_attention", &forward, py::call_guard<py::gil_scoped_release>());
  m.def("masked_attention_backward", &backward, py::call_guard<py::gil_scoped_release>());
}

}  // namespace titok
