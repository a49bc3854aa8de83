// titok._C.masked_decode_step, masked_decode_step_cuda and masked_decode_partial: check tensors and hand their memory to
// the launchers.
#include <stdexcept>

#include "masked_decode/masked_decode.h"
#include "module.h"

namespace titok {
namespace {

// (batch, length, codes), or with rows (any number, codes).
void check_logits(const TensorArg& logits, bool by_rows, int64_t batch, int64_t length, int64_t codes) {
  if (by_rows) {
    expect_shape(logits, {kAnySize, codes});
  } else {
    expect_shape(logits, {batch, length, codes});
  }
  expect_dense_last_dimension(logits);
}

void check_optional(const TensorArg& tensor, DType dtype, int64_t batch, int64_t length) {
  if (tensor.given) expect_contiguous(tensor, {dtype}, {batch, length});
}

void check_numbers(const MaskedDecodeArgs& args) {
  for (int b = 0; b < args.batch; ++b) {
    const float scale = args.floats[b].draw_scale;
    if (!usable_draw_scale(scale)) {
      raise_value_error("floats", "finite scales of the draw >= 0", std::to_string(scale));
    }
    const float bound = args.floats[b].limit;
    const bool is_bound = args.policy == Policy::kEntropy || args.policy == Policy::kFactor;
    if (is_bound && !(bound >= 0.0f && bound <= 1e6f)) {
      raise_value_error("floats", "bounds of the entropy and factors in [0, 1e6]", std::to_string(bound));
    }
    const int64_t top_p = args.integers[b].top_p;
    if (top_p < 0 || top_p > kTopPOne) raise_value_error("integers", "top_p in [0, 2^32]", std::to_string(top_p));
  }
}

// Reads and checks the arguments that the CPU's and the GPU's function share. The numbers of the rows are not read.
MaskedDecodeArgs read_arguments(Call& call) {
  const TensorArg tokens = call.tensor("tokens"), cond = call.tensor("cond"),
                  uncond = call.optional_tensor("uncond");
  const TensorArg rows = call.optional_tensor("rows"), uncond_rows = call.optional_tensor("uncond_rows");
  const TensorArg undecided = call.optional_tensor("undecided"), editable = call.optional_tensor("editable"),
                  step_map = call.optional_tensor("step_map");
  const TensorArg integers = call.tensor("integers"), floats = call.tensor("floats");
  MaskedDecodeArgs args{};
  args.mask_token = call.integer("mask_token", INT64_MIN, INT64_MAX);
  args.policy = static_cast<Policy>(call.integer("policy", 0, 5));
  args.confidence = static_cast<Confidence>(call.integer("confidence", 0, 5));
  args.model_law = call.boolean("model_law");
  args.renoise = call.boolean("renoise");
  args.edits = call.boolean("edits");
  args.block_length = static_cast<int32_t>(call.integer("block_length", 0, INT32_MAX));
  const TensorArg out = call.tensor("out"), confidences = call.tensor("confidences");
  const TensorArg log_probabilities = call.optional_tensor("log_probabilities"),
                  new_step_map = call.optional_tensor("new_step_map");

  expect_contiguous(tokens, {DType::kInt64}, {kAnySize, kAnySize});
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  if (length > kMaxTokens || batch * length > INT32_MAX) {
    raise_value_error("tokens",
                      "at most " + std::to_string(kMaxTokens) + " tokens in a row and 2^31 - 1 in all",
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
  check_optional(rows, DType::kInt64, batch, length);
  check_optional(uncond_rows, DType::kInt64, batch, length);
  check_optional(undecided, DType::kBool, batch, length);
  check_optional(editable, DType::kBool, batch, length);
  check_optional(step_map, DType::kInt32, batch, length);
  expect_contiguous(integers, {DType::kInt64}, {batch, sizeof(RowIntegers) / 8});
  expect_contiguous(floats, {DType::kFloat32}, {batch, sizeof(RowFloats) / 4});
  expect_contiguous(out, {DType::kInt64}, {batch, length});
  expect_contiguous(confidences, {DType::kFloat32}, {batch, length});
  check_optional(log_probabilities, DType::kFloat32, batch, length);
  expect_given(new_step_map, step_map.given, step_map.given ? "beside step_map" : "without step_map");
  check_optional(new_step_map, DType::kInt32, batch, length);

  args.tokens = tokens.as<const int64_t>();
  args.cond = cond.data;
  args.uncond = uncond.given ? uncond.data : nullptr;
  args.rows = rows.as<const int64_t>();
  args.uncond_rows = uncond.given ? uncond_rows.as<const int64_t>() : nullptr;
  args.undecided = undecided.as<const bool>();
  args.editable = editable.as<const bool>();
  args.step_map = step_map.as<const int32_t>();
  args.integers = integers.as<const RowIntegers>();
  args.floats = floats.as<const RowFloats>();
  args.cond_stride_b = rows.given ? 0 : cond.stride(0);
  args.cond_stride_n = cond.stride(-2);
  args.cond_rows_count = cond.size(0);
  if (uncond.given) {
    args.uncond_stride_b = rows.given ? 0 : uncond.stride(0);
    args.uncond_stride_n = uncond.stride(-2);
    args.uncond_rows_count = uncond.size(0);
  }
  args.batch = static_cast<int32_t>(batch);
  args.length = static_cast<int32_t>(length);
  args.codes = static_cast<int32_t>(codes);
  args.dtype = cond.dtype;
  args.out = out.as<int64_t>();
  args.confidences = confidences.as<float>();
  args.log_probabilities = log_probabilities.as<float>();
  args.new_step_map = new_step_map.as<int32_t>();
  return args;
}

PyObject* masked_decode_step(Call& call) {
  const MaskedDecodeArgs args = read_arguments(call);
  const int threads = static_cast<int>(call.integer("threads", 1, INT32_MAX));
  check_numbers(args);
  const char* wrong = nullptr;
  if (args.batch > 0 && args.length > 0) {
    const WithoutGil released;
    wrong = launch_masked_decode(args, threads);
  }
  if (wrong != nullptr) raise_value_error(wrong, "rows of the logits where a code is drawn", "another");
  Py_RETURN_NONE;
}

#if defined(TITOK_WITH_CUDA)
PyObject* masked_decode_step_cuda(Call& call) {
  call.expect_device(DeviceKind::kCuda);
  GpuDecodeArgs args{};
  args.step = read_arguments(call);
  args.needs = needs_of(args.step);
  args.truncates = call.boolean("truncates");
  args.chunk = static_cast<int32_t>(call.integer("chunk", kSegment, kMostChunk));
  const TensorArg state = call.tensor("state"), partials = call.tensor("partials"),
                  arrivals = call.tensor("arrivals");
  void* const stream = reinterpret_cast<void*>(call.unsigned_integer("stream"));
  const MaskedDecodeArgs& step = args.step;
  if (args.chunk % kSegment != 0) {
    raise_value_error("chunk", "a multiple of " + std::to_string(kSegment), std::to_string(args.chunk));
  }
  args.chunks = (step.codes + args.chunk - 1) / args.chunk;
  expect_contiguous(state, {DType::kInt64}, {step.batch, step.length, kColumns});
  expect_contiguous(partials, {DType::kInt64}, {step.batch, step.length, args.chunks, kDigits});
  expect_contiguous(arrivals, {DType::kInt32}, {step.batch, step.length});
  args.state = state.as<int64_t>();
  args.partials = partials.as<int64_t>();
  args.arrivals = arrivals.as<uint32_t>();
  if (step.batch == 0 || step.length == 0) Py_RETURN_NONE;
  if (step.rows && (step.cond_rows_count == 0 || (step.uncond && step.uncond_rows_count == 0))) {
    raise_value_error(step.cond_rows_count == 0 ? "cond" : "uncond", "at least one row", "none");
  }
  const char* error;
  {
    const WithoutGil released;
    error = launch_masked_decode_cuda(args, stream);
  }
  if (error) throw std::runtime_error(std::string("masked_decode_step: CUDA error: ") + error);
  Py_RETURN_NONE;
}
#endif

PyObject* masked_decode_partial(Call& call) {
  const TensorArg cond = call.tensor("cond"), uncond = call.optional_tensor("uncond");
  const TensorArg rows = call.optional_tensor("rows"), uncond_rows = call.optional_tensor("uncond_rows");
  const TensorArg integers = call.tensor("integers"), floats = call.tensor("floats"), state = call.tensor("state");
  PartialArgs args{};
  args.stage = static_cast<Stage>(call.integer("stage", 0, 4));
  args.shift = static_cast<int32_t>(call.integer("shift", 0, 32 - kDigitBits));
  args.all_codes = static_cast<int32_t>(call.integer("all_codes", 1, kMaxCodes));
  args.first_code = static_cast<int32_t>(call.integer("first_code", 0, kMaxCodes));
  args.first_chunk = static_cast<int32_t>(call.integer("first_chunk", 0, INT32_MAX));
  args.step.model_law = call.boolean("model_law");
  args.needs.law = call.boolean("needs_law");
  args.needs.entropy = call.boolean("needs_products");
  args.needs.margin = call.boolean("needs_second");
  const TensorArg partials = call.tensor("partials");
  const int threads = static_cast<int>(call.integer("threads", 1, INT32_MAX));

  expect_contiguous(state, {DType::kInt64}, {kAnySize, kAnySize, kColumns});
  const int64_t batch = state.size(0), length = state.size(1);
  expect_contiguous(partials, {DType::kInt64}, {batch, length, kAnySize, partial_width(args.stage)});
  const int64_t chunks = partials.size(2);
  if (chunks < 1 || batch * length > INT32_MAX || chunks > INT32_MAX) {
    raise_value_error("partials", "at least one chunk", shape_of(partials));
  }
  expect_dtype(cond, {DType::kFloat32, DType::kBFloat16, DType::kFloat16});
  check_logits(cond, rows.given, batch, length, kAnySize);
  const int64_t codes = cond.size(-1);
  if (codes < 1 || args.first_code + codes > args.all_codes) {
    raise_value_error("cond", "codes within [0, " + std::to_string(args.all_codes) + ")", shape_of(cond));
  }
  if (uncond.given) {
    expect_dtype(uncond, {cond.dtype});
    check_logits(uncond, rows.given, batch, length, codes);
    expect_given(uncond_rows, rows.given, rows.given ? "beside rows and uncond" : "without rows");
  }
  check_optional(rows, DType::kInt64, batch, length);
  check_optional(uncond_rows, DType::kInt64, batch, length);
  expect_contiguous(integers, {DType::kInt64}, {batch, sizeof(RowIntegers) / 8});
  expect_contiguous(floats, {DType::kFloat32}, {batch, sizeof(RowFloats) / 4});
  args.step.cond = cond.data;
  args.step.uncond = uncond.given ? uncond.data : nullptr;
  args.step.rows = rows.as<const int64_t>();
  args.step.uncond_rows = uncond.given ? uncond_rows.as<const int64_t>() : nullptr;
  args.step.integers = integers.as<const RowIntegers>();
  args.step.floats = floats.as<const RowFloats>();
  args.step.cond_stride_b = rows.given ? 0 : cond.stride(0);
  args.step.cond_stride_n = cond.stride(-2);
  args.step.cond_rows_count = cond.size(0);
  if (uncond.given) {
    args.step.uncond_stride_b = rows.given ? 0 : uncond.stride(0);
    args.step.uncond_stride_n = uncond.stride(-2);
    args.step.uncond_rows_count = uncond.size(0);
  }
  args.step.batch = static_cast<int32_t>(batch);
  args.step.length = static_cast<int32_t>(length);
  args.step.codes = static_cast<int32_t>(codes);
  args.step.dtype = cond.dtype;
  args.chunks = static_cast<int32_t>(chunks);
  args.state = state.as<const int64_t>();
  args.partials = partials.as<int64_t>();
  const char* wrong = nullptr;
  if (batch > 0 && length > 0) {
    const WithoutGil released;
    wrong = launch_masked_decode_partial(args, threads);
  }
  if (wrong != nullptr) raise_value_error(wrong, "rows of the logits where a code is drawn", "another");
  Py_RETURN_NONE;
}

PyMethodDef kFunctions[] = {
    python_function<masked_decode_partial, 18>(
        "masked_decode_partial",
        "masked_decode_partial($module, cond, uncond, rows, uncond_rows, integers, floats, state, stage, shift,\n"
        "                      all_codes, first_code, first_chunk, model_law, needs_law, needs_products,\n"
        "                      needs_second, partials, threads, /)\n"
        "--\n\n"
        "Partial results of one stage; titok/ops/masked_decode_split.py states what each holds. CPU tensors."),
    python_function<masked_decode_step, 22>(
        "masked_decode_step",
        "masked_decode_step($module, tokens, cond, uncond, rows, uncond_rows, undecided, editable, step_map,\n"
        "                   integers, floats, mask_token, policy, confidence, model_law, renoise, edits,\n"
        "                   block_length, out, confidences, log_probabilities, new_step_map, threads, /)\n"
        "--\n\n"
        "One decode step; titok.ops.masked_decode_step states the definition. CPU tensors.\n\n"
        "integers (B, 8) int64 and floats (B, 6) float32 hold the numbers of each row, policy and confidence the\n"
        "places of their names in titok.ops.masked_decode_plain."),
#if defined(TITOK_WITH_CUDA)
    python_function<masked_decode_step_cuda, 27>(
        "masked_decode_step_cuda",
        "masked_decode_step_cuda($module, tokens, cond, uncond, rows, uncond_rows, undecided, editable, step_map,\n"
        "                        integers, floats, mask_token, policy, confidence, model_law, renoise, edits,\n"
        "                        block_length, out, confidences, log_probabilities, new_step_map, truncates,\n"
        "                        chunk, state, partials, arrivals, stream, /)\n"
        "--\n\n"
        "masked_decode_step on tensors of the current CUDA device: 5 launches on `stream` (a cudaStream_t as an\n"
        "integer), 21 where `truncates`, without a synchronisation.\n\n"
        "chunk is the number of codes of a block, a multiple of 256 up to 32,768. state (B, N, 13) and partials\n"
        "(B, N, ceil(V / chunk), 16), int64, and arrivals (B, N) int32 are memory for the kernels. Values out of\n"
        "range are clamped, not reported."),
#endif
    {}};

}  // namespace

int bind_masked_decode(PyObject* module) { return PyModule_AddFunctions(module, kFunctions); }

}  // namespace titok
