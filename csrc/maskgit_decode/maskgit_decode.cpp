// One step of MaskGIT's decoding on the CPU: policy "count" of the masked decode step.
#include "maskgit_decode/maskgit_decode.h"

#include <vector>

#include "masked_decode/masked_decode.h"

namespace titok {
namespace {

DecodeError check(const DecodeArgs& args) {
  const int64_t count = int64_t{args.batch} * args.length;
  const auto outside = [](const int64_t* rows, int64_t i, int64_t end) {
    return rows != nullptr && (rows[i] < 0 || rows[i] >= end);
  };
  for (int64_t i = 0; i < count; ++i) {
    if (args.tokens[i] != args.mask_token) {
      if (args.tokens[i] < 0 || args.tokens[i] >= args.codes) return DecodeError::kTokens;
      continue;
    }
    if (outside(args.rows, i, args.cond_rows_count)) return DecodeError::kRows;
    if (args.uncond != nullptr && outside(args.uncond_rows, i, args.uncond_rows_count))
      return DecodeError::kUncondRows;
  }
  for (int b = 0; args.keep != nullptr && b < args.batch; ++b) {
    if (args.keep[b] < 0) return DecodeError::kKeep;
  }
  return DecodeError::kNone;
}

}  // namespace

DecodeError launch_maskgit_decode(const DecodeArgs& args, int threads) {
  const DecodeError error = check(args);
  if (error != DecodeError::kNone) return error;
  const DecodeParams& params = args.params;
  std::vector<RowIntegers> integers(args.batch);
  const std::vector<RowFloats> floats(
      args.batch,
      {params.guidance, params.inverse_temperature, params.draw_scale, params.noise, 0.0f, 0.0f});
  for (int b = 0; b < args.batch; ++b) {
    integers[b] = {static_cast<int64_t>(params.seed),
                   static_cast<int64_t>(params.first_sample + b),
                   params.step,
                   args.keep != nullptr ? args.keep[b] : params.num_masked,
                   0,
                   kTopPOne,
                   0,
                   args.length};
  }
  MaskedDecodeArgs step{};
  step.tokens = args.tokens;
  step.cond = args.cond;
  step.uncond = args.uncond;
  step.rows = args.rows;
  step.uncond_rows = args.uncond_rows;
  step.integers = integers.data();
  step.floats = floats.data();
  step.cond_stride_b = args.cond_stride_b;
  step.cond_stride_n = args.cond_stride_n;
  step.uncond_stride_b = args.uncond_stride_b;
  step.uncond_stride_n = args.uncond_stride_n;
  step.cond_rows_count = args.cond_rows_count;
  step.uncond_rows_count = args.uncond_rows_count;
  step.mask_token = args.mask_token;
  step.batch = args.batch;
  step.length = args.length;
  step.codes = args.codes;
  step.dtype = args.dtype;
  step.policy = Policy::kCount;
  step.confidence = args.maskgit ? Confidence::kLogProbability : Confidence::kLogit;
  step.out = args.out;
  step.confidences = args.confidence;
  launch_masked_decode(step, threads);  // the rows were checked
  return DecodeError::kNone;
}

}  // namespace titok
