// GroupNorm (Wu and He 2018) and SiLU of channels-last maps, optionally of the sum of two maps: arguments and
// entry points of both directions.
#pragma once

#include <cstdint>

#include "common/cpu_isa.h"
#include "common/dtype.h"

namespace titok {

// Maps are (batch, pixels, channels), contiguous. Every dtype is float32 or bfloat16.
struct GroupNormSiluArgs {
  const void* x;         // map of map_dtype
  const void* residual;  // map of map_dtype, or null: nothing is added
  void* total;           // map of map_dtype, output: x + residual, rounded; null without residual
  void* normalised;      // map of normalised_dtype, output
  const void* weight;    // (channels) parameter_dtype
  const void* bias;      // (channels) parameter_dtype
  float* mean;           // (batch, groups), output, or null
  float* rstd;           // (batch, groups), output, or null: 1 / sqrt(variance + eps)
  DType map_dtype;
  DType normalised_dtype;
  DType parameter_dtype;
  int64_t batch;
  int64_t pixels;
  int64_t channels;
  int64_t groups;  // divides channels
  double eps;
};

void launch_group_norm_silu(const GroupNormSiluArgs& args);

struct GroupNormSiluBackwardArgs {
  const void* grad;        // map of grad_dtype: the gradient of the normalised map
  const void* grad_total;  // map of map_dtype, or null: is added to grad_x
  const void* x;           // map of map_dtype: what was normalised
  const void* weight;      // (channels) parameter_dtype
  const void* bias;        // (channels) parameter_dtype
  const float* mean;       // (batch, groups)
  const float* rstd;       // (batch, groups)
  void* grad_x;            // map of map_dtype, output
  float* grad_weight;      // (channels), output
  float* grad_bias;        // (channels), output
  DType map_dtype;
  DType grad_dtype;
  DType parameter_dtype;
  int64_t batch;
  int64_t pixels;
  int64_t channels;
  int64_t groups;  // divides channels
};

void launch_group_norm_silu_backward(const GroupNormSiluBackwardArgs& args);

// How a call divides its work. Pixels are summed in chunks whose size depends on the shape alone, so that results
// do not depend on the number of threads.
//
// Scratch of a thread, or of an image in the backward pass, scratch_size doubles:
//
//   chunk 0       [sums: padded][sums of squares: padded]
//   ...
//   chunk n - 1   [sums: padded][sums of squares: padded]
//   as floats     [mean: padded][scale: padded][shift: padded], or the backward pass's 7 * padded
struct GroupNormSiluPlan {
  int64_t chunk;         // pixels of a chunk; the last one of an image may have fewer
  int64_t chunks;        // chunks of an image
  int64_t padded;        // channels, rounded up to whole pairs of vectors
  int64_t scratch_size;  // (chunks + 1) * 2 * padded; backward (chunks + 2) * 2 * padded
  int threads;
  bool stream;  // write past the caches
};

// One instruction set's. `scratch` holds plan.threads * plan.scratch_size doubles.
using GroupNormSiluKernel = void (*)(const GroupNormSiluArgs& args, const GroupNormSiluPlan& plan,
                                     double* scratch);
GroupNormSiluKernel group_norm_silu_kernel(Generic);
GroupNormSiluKernel group_norm_silu_kernel(Avx2);
GroupNormSiluKernel group_norm_silu_kernel(Avx512);

// One instruction set's. `scratch` holds args.batch * plan.scratch_size doubles.
using GroupNormSiluBackwardKernel = void (*)(const GroupNormSiluBackwardArgs& args, const GroupNormSiluPlan& plan,
                                             double* scratch);
GroupNormSiluBackwardKernel group_norm_silu_backward_kernel(Generic);
GroupNormSiluBackwardKernel group_norm_silu_backward_kernel(Avx2);
GroupNormSiluBackwardKernel group_norm_silu_backward_kernel(Avx512);

}  // namespace titok
