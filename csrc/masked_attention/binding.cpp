// titok._C.masked_attention and its backward: checks tensors and hands their memory to the launchers.
#include "masked_attention/masked_attention.h"
#include "module.h"

namespace titok {
namespace {

// Keeps every product of sizes within 64 bits.
constexpr int64_t kMaxTokens = int64_t{1} << 24, kMaxWidth = int64_t{1} << 24;

void check_dense(const TensorArg& tensor, DType dtype, std::initializer_list<int64_t> shape) {
  expect_dtype(tensor, {dtype});
  expect_shape(tensor, shape);
  expect_contiguous(tensor);
}

// Checks what both directions are given and fills what both read.
MaskedAttentionArgs check_common(const TensorArg& qkv, const TensorArg& key_mask, int64_t heads, int64_t start,
                                 double scale, const TensorArg& out, const TensorArg& lse) {
  expect_dtype(qkv, {DType::kFloat32, DType::kBFloat16});
  expect_shape(qkv, {kAnySize, kAnySize, kAnySize});
  const int64_t batch = qkv.size(0), tokens = qkv.size(1), width = qkv.size(2);
  if (tokens > kMaxTokens || width > kMaxWidth) {
    raise_value_error("qkv", "at most " + std::to_string(kMaxTokens) + " tokens of as many channels", shape_of(qkv));
  }
  if (width == 0 || heads > width || width % (3 * heads) != 0) {
    raise_value_error("qkv", "shape (B, N, 3 * num_heads * D) with num_heads = " + std::to_string(heads) + " and D >= 1",
                      shape_of(qkv));
  }
  expect_dense_last_dimension(qkv);
  if (key_mask.given) check_dense(key_mask, DType::kBool, {batch, tokens});
  if (start > tokens) raise_value_error("start", "at most " + std::to_string(tokens) + " tokens", std::to_string(start));
  check_dense(out, qkv.dtype, {batch, kAnySize, width / 3});
  const int64_t queries = out.size(1);
  if (queries > tokens - start) {
    raise_value_error("out", "at most " + std::to_string(tokens - start) + " queries from start on", shape_of(out));
  }
  if (lse.given) check_dense(lse, DType::kFloat32, {batch, heads, queries});

  MaskedAttentionArgs args{};
  args.qkv = qkv.data;
  args.batch_stride = qkv.stride(0);
  args.token_stride = qkv.stride(1);
  args.key_mask = key_mask.as<const uint8_t>();
  args.out = out.data;
  args.lse = lse.as<float>();
  args.dtype = qkv.dtype;
  args.batch = batch;
  args.tokens = tokens;
  args.heads = heads;
  args.head_dim = width / (3 * heads);
  args.first_query = start;
  args.queries = queries;
  args.scale = static_cast<float>(scale);
  return args;
}

PyObject* masked_attention(Call& call) {
  const TensorArg qkv = call.tensor("qkv"), key_mask = call.optional_tensor("key_mask");
  const int64_t heads = call.integer("num_heads", 1, kMaxWidth), start = call.integer("start", 0, kMaxTokens);
  const double scale = call.number("scale");
  const TensorArg out = call.tensor("out"), lse = call.optional_tensor("lse");
  const MaskedAttentionArgs args = check_common(qkv, key_mask, heads, start, scale, out, lse);
  if (out.numel() == 0) Py_RETURN_NONE;
  {
    const WithoutGil released;
    launch_masked_attention(args);
  }
  Py_RETURN_NONE;
}

PyObject* masked_attention_backward(Call& call) {
  const TensorArg grad = call.tensor("grad"), qkv = call.tensor("qkv"), key_mask = call.optional_tensor("key_mask");
  const TensorArg out = call.tensor("out"), lse = call.tensor("lse");
  const int64_t heads = call.integer("num_heads", 1, kMaxWidth), start = call.integer("start", 0, kMaxTokens);
  const double scale = call.number("scale");
  const TensorArg dqkv = call.tensor("dqkv");
  MaskedAttentionArgs args = check_common(qkv, key_mask, heads, start, scale, out, lse);
  expect_dtype(grad, {qkv.dtype});
  expect_shape_of(grad, out);
  expect_dense_last_dimension(grad);
  check_dense(dqkv, qkv.dtype, {qkv.size(0), qkv.size(1), qkv.size(2)});
  if (dqkv.numel() == 0) Py_RETURN_NONE;
  args.grad = grad.data;
  args.grad_batch_stride = grad.stride(0);
  args.grad_token_stride = grad.stride(1);
  args.dqkv = dqkv.data;
  {
    const WithoutGil released;
    launch_masked_attention_backward(args);
  }
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    python_function<masked_attention, 7>(
        "masked_attention",
        "masked_attention($module, qkv, key_mask, num_heads, start, scale, out, lse, /)\n--\n\n"
        "Attention of the tokens start ... start + Nq of each sample to all tokens that key_mask shows. CPU tensors.\n\n"
        "qkv (B, N, 3 * H * D) float32 or bfloat16, its last dimension dense; key_mask (B, N) bool, true where a token\n"
        "is visible, or None; out (B, Nq, H * D) like qkv, contiguous; lse (B, H, Nq) float32, or None: takes log2 of\n"
        "the sum of 2^(scale / ln 2 * score) over the visible tokens, nothing where no token is visible."),
    python_function<masked_attention_backward, 9>(
        "masked_attention_backward",
        "masked_attention_backward($module, grad, qkv, key_mask, out, lse, num_heads, start, scale, dqkv, /)\n--\n\n"
        "Gradient of qkv from that of out: into dqkv (B, N, 3 * H * D), contiguous. Queries outside start ... start +\n"
        "Nq have none: their part of dqkv is not written."),
    {}};

}  // namespace

int bind_masked_attention(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
