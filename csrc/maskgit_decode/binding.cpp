// titok._C.maskgit_decode_step and maskgit_decode_step_cuda: check tensors and hand their memory to the launchers.
#include <cfloat>
#include <cstring>
#include <stdexcept>

#include "maskgit_decode/maskgit_decode.h"
#include "module.h"

namespace titok {
namespace {

constexpr int kParams = 8, kPackedWords = sizeof(DecodeParams) / 4;

DecodeParams read_params(Call call) {
  DecodeParams params{};
  params.seed = call.unsigned_integer("params.seed");
  params.first_sample = call.unsigned_integer("params.first_sample");
  params.step = static_cast<uint32_t>(call.integer("params.step", 0, UINT32_MAX));
  params.num_masked = static_cast<int32_t>(call.integer("params.num_masked", 0, INT32_MAX));
  params.guidance = static_cast<float>(call.number("params.guidance"));
  params.inverse_temperature = static_cast<float>(call.number("params.inverse_temperature"));
  params.noise = static_cast<float>(call.number("params.noise"));
  params.draw_scale = static_cast<float>(call.number("params.draw_scale"));
  return params;
}

void check_draw_scale(const char* name, const DecodeParams& params) {
  if (!usable_draw_scale(params.draw_scale)) {
    raise_value_error(name, "a finite number >= 0", std::to_string(params.draw_scale));
  }
}

void check_optional(const TensorArg& tensor, DType dtype, std::initializer_list<int64_t> shape) {
  if (tensor.given) expect_contiguous(tensor, {dtype}, shape);
}

// (batch, length, codes), or with rows (any number, codes).
void check_logits(const TensorArg& logits, bool by_rows, int64_t batch, int64_t length, int64_t codes) {
  if (by_rows) {
    expect_shape(logits, {kAnySize, codes});
  } else {
    expect_shape(logits, {batch, length, codes});
  }
  expect_dense_last_dimension(logits);
}

// Reads and checks the arguments that both functions share.
DecodeArgs read_arguments(Call& call) {
  const TensorArg tokens = call.tensor("tokens"), cond = call.tensor("cond"),
                  uncond = call.optional_tensor("uncond");
  const TensorArg rows = call.optional_tensor("rows"), uncond_rows = call.optional_tensor("uncond_rows");
  const TensorArg keep = call.optional_tensor("keep"), packed = call.optional_tensor("packed");
  const DecodeParams params = read_params(call.tuple("params", kParams));
  const int64_t mask_token = call.integer("mask_token", INT64_MIN, INT64_MAX);
  const bool maskgit = call.boolean("maskgit");
  const TensorArg out = call.tensor("out"), confidence = call.tensor("confidence");

  expect_contiguous(tokens, {DType::kInt64}, {kAnySize, kAnySize});
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  if (length > kMaxTokens || batch * length > INT32_MAX) {
    raise_value_error("tokens",
                      "at most " + std::to_string(kMaxTokens) + " tokens in a sample and 2^31 - 1 in all",
                      shape_of(tokens));
  }
  expect_dtype(cond, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  check_logits(cond, rows.given, batch, length, kAnySize);
  const int64_t codes = cond.size(-1);
  if (codes < 1 || codes > kMaxCodes) {
    raise_value_error("cond", "1 to " + std::to_string(kMaxCodes) + " codes in the last dimension",
                      shape_of(cond));
  }
  if (uncond.given) {
    expect_dtype(uncond, {cond.dtype});
    check_logits(uncond, rows.given, batch, length, codes);
    expect_given(uncond_rows, rows.given, rows.given ? "beside rows and uncond" : "without rows");
  }
  check_optional(rows, DType::kInt64, {batch, length});
  check_optional(uncond_rows, DType::kInt64, {batch, length});
  check_optional(keep, DType::kInt64, {batch});
  check_optional(packed, DType::kInt32, {kPackedWords});
  if (!packed.given) check_draw_scale("params.draw_scale", params);
  if (mask_token >= 0 && mask_token < codes) {
    raise_value_error("mask_token", "an integer outside [0, " + std::to_string(codes) + ")",
                      std::to_string(mask_token));
  }
  expect_contiguous(out, {DType::kInt64}, {batch, length});
  expect_contiguous(confidence, {DType::kFloat32}, {batch, length});

  DecodeArgs args{};
  args.tokens = tokens.as<const int64_t>();
  args.cond = cond.data;
  args.uncond = uncond.data;
  args.rows = rows.as<const int64_t>();
  args.uncond_rows = uncond.given ? uncond_rows.as<const int64_t>() : nullptr;
  args.keep = keep.as<const int64_t>();
  args.params_at = packed.as<const DecodeParams>();
  args.cond_stride_b = rows.given ? 0 : cond.stride(0);
  args.cond_stride_n = cond.stride(-2);
  args.cond_rows_count = cond.size(0);
  if (uncond.given) {
    args.uncond_stride_b = rows.given ? 0 : uncond.stride(0);
    args.uncond_stride_n = uncond.stride(-2);
    args.uncond_rows_count = uncond.size(0);
  }
  args.mask_token = mask_token;
  args.batch = static_cast<int32_t>(batch);
  args.length = static_cast<int32_t>(length);
  args.codes = static_cast<int32_t>(codes);
  args.dtype = cond.dtype;
  args.maskgit = maskgit;
  args.out = out.as<int64_t>();
  args.confidence = confidence.as<float>();
  args.params = params;
  return args;
}

PyObject* maskgit_decode_step(Call& call) {
  DecodeArgs args = read_arguments(call);
  const int threads = static_cast<int>(call.integer("threads", 1, INT32_MAX));
  if (args.params_at) {
    std::memcpy(&args.params, args.params_at, sizeof args.params);
    check_draw_scale("packed", args.params);
  }
  DecodeError error = DecodeError::kNone;
  if (args.batch > 0 && args.length > 0) {
    const WithoutGil released;
    error = launch_maskgit_decode(args, threads);
  }
  return PyLong_FromLong(static_cast<long>(error));
}

#if defined(TITOK_WITH_CUDA)
PyObject* maskgit_decode_step_cuda(Call& call) {
  call.expect_device(DeviceKind::kCuda);
  DecodeArgs args = read_arguments(call);
  const TensorArg order = call.optional_tensor("order"), drawn = call.tensor("drawn"),
                  workspace = call.tensor("workspace");
  void* const stream = reinterpret_cast<void*>(call.unsigned_integer("stream"));
  check_optional(order, DType::kInt64, {2, args.batch, args.length});
  expect_contiguous(drawn, {DType::kInt32}, {args.batch, args.length});
  expect_contiguous(workspace, {DType::kInt32}, {kAnySize});
  if (workspace.size(0) < args.batch) {
    raise_value_error("workspace", "at least " + std::to_string(args.batch) + " items", shape_of(workspace));
  }
  args.order = order.as<int64_t>();
  args.drawn = drawn.as<int32_t>();
  args.arrivals = workspace.as<uint32_t>();
  if (args.batch == 0 || args.length == 0) Py_RETURN_NONE;
  if (args.rows && (args.cond_rows_count == 0 || (args.uncond && args.uncond_rows_count == 0))) {
    raise_value_error(args.cond_rows_count == 0 ? "cond" : "uncond", "at least one row", "none");
  }
  const char* error;
  {
    const WithoutGil released;
    error = launch_maskgit_decode_cuda(args, stream);
  }
  if (error) throw std::runtime_error(std::string("maskgit_decode_step: CUDA error: ") + error);
  Py_RETURN_NONE;
}
#endif

PyMethodDef kFunctions[] = {
    python_function<maskgit_decode_step, 13>(
        "maskgit_decode_step",
        "maskgit_decode_step($module, tokens, cond, uncond, rows, uncond_rows, keep, packed, params, mask_token,\n"
        "                    maskgit, out, confidence, threads, /)\n"
        "--\n\n"
        "One step of MaskGIT's decoding; titok.ops.maskgit_decode_step states the definition. CPU tensors.\n\n"
        "params holds the eight numbers of a step, in the order of DecodeParams in csrc. packed, int32 (10,) or\n"
        "None, holds the same numbers as bytes and replaces params. Returns 0, or the number of the argument\n"
        "that holds a value out of range: 1 tokens, 2 rows, 3 uncond_rows, 4 keep. Then nothing is written."),
#if defined(TITOK_WITH_CUDA)
    python_function<maskgit_decode_step_cuda, 16>(
        "maskgit_decode_step_cuda",
        "maskgit_decode_step_cuda($module, tokens, cond, uncond, rows, uncond_rows, keep, packed, params,\n"
        "                         mask_token, maskgit, out, confidence, order, drawn, workspace, stream, /)\n"
        "--\n\n"
        "maskgit_decode_step on tensors of the current CUDA device: one launch on `stream` (a cudaStream_t as an\n"
        "integer), without a synchronisation.\n\n"
        "order (2, B, N) int64 or None takes the positions of each sample, masked ones first, and the place of\n"
        "each. drawn (B, N) int32 takes the drawn codes, -1 at known positions. workspace, at least B zeros of\n"
        "int32, is zero again afterwards. Values out of range are clamped, not reported."),
#endif
    {}};

}  // namespace

int bind_maskgit_decode(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
